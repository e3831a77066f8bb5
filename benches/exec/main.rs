//! `handover exec` beside pm2 and Server::Starter's start_server, where they are installed: the same Node program under each.
//!
//! `cargo bench --all-features --bench exec`, after `cargo build --release --all-features --bins --examples`; `scripts/bench.sh
//! exec` gets pm2 as well.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use common::{Result, Scratch, heading, number, resident_kib, row};
use handover::control::{Client, State, Target, UpgradeRequest};
use oracle::Tally;
use peer::{Peer, Process, UPGRADES, free_address, measure, wait_for};

#[path = "../common/mod.rs"]
mod common;
#[path = "../../tests/oracle/mod.rs"]
mod oracle;
#[path = "../common/peer.rs"]
mod peer;

const APP: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/exec/app.js");
const WORKERS: usize = 4;
const LISTENERS: usize = 10;

fn main() -> Result<()> {
    let scratch = Scratch::new()?;
    println!("### `handover exec` beside other supervisors\n");
    println!(
        "One process of the same Node program. {UPGRADES} upgrades with 16 clients and 2,000 new connections a second, \
         then {UPGRADES} with 16 kept connections in a closed loop. Errors of all requests; milliseconds from the trigger \
         until the new build has answered a new connection, and until the command has returned, median (and the middle \
         half); memory of the supervisor alone.\n"
    );
    heading(&[
        "",
        "errors, new connections",
        "errors, kept connections",
        "trigger → serving, ms",
        "trigger → returned, ms",
        "supervisor, KiB",
    ]);
    show("handover exec", &Exec::start(&scratch)?)?;
    for (name, peer) in [
        ("start_server", StartServer::start(&scratch).map(Peer::boxed)),
        ("pm2 reload", Pm2::start(&scratch).map(Peer::boxed)),
    ] {
        match peer {
            Ok(peer) => show(name, peer.as_ref())?,
            Err(error) => println!("\nleft out: {name}: {error}\n"),
        }
    }
    size(&scratch)
}

fn show(name: &str, peer: &dyn Peer) -> Result<()> {
    let measured = measure(peer)?;
    let errors = |tally: &Tally| format!("{} of {}", tally.failed(), tally.requests());
    row(&[
        name,
        &errors(&measured.fresh),
        &errors(&measured.kept),
        &measured.serving.show(),
        &measured.returned.show(),
        &number(measured.resident_kib as f64),
    ]);
    Ok(())
}

/// The supervisor of a program with many workers and listeners.
fn size(scratch: &Scratch) -> Result<()> {
    let program = release()?.join("examples/plain");
    let workers = WORKERS.to_string();
    let mut options = vec!["--workers", &workers];
    // Beside the one that each service has.
    for _ in 1..LISTENERS {
        options.extend(["--listen", "127.0.0.1:0"]);
    }
    let exec = Exec::supervise(scratch, &options, Command::new(program))?;
    let before = resident_kib(exec.pid)?;
    for _ in 0..UPGRADES {
        exec.replace(0)?;
    }
    println!(
        "\nThe supervisor of {WORKERS} workers with {LISTENERS} listeners: {before} KiB resident, {} KiB after \
         {UPGRADES} upgrades; the target is at most 5,120.\n",
        resident_kib(exec.pid)?
    );
    Ok(())
}

fn release() -> Result<PathBuf> {
    let program = std::env::current_exe()?;
    Ok(program.parent().and_then(Path::parent).ok_or("no target directory")?.to_owned())
}

/// The program, whose answers name the generation that the file named.
struct App {
    generation_file: PathBuf,
    address: SocketAddr,
}

impl App {
    fn new(scratch: &Scratch, name: &str) -> Result<Self> {
        let app = Self { generation_file: scratch.0.join(name), address: free_address()? };
        app.set_generation(1)?;
        Ok(app)
    }

    fn set_generation(&self, generation: u64) -> Result<()> {
        Ok(fs::write(&self.generation_file, generation.to_string())?)
    }

    fn environment(&self, command: &mut Command) {
        command.env("GENERATION_FILE", &self.generation_file).env("APP_PORT", self.address.port().to_string());
    }
}

struct Exec {
    scratch: PathBuf,
    app: App,
    pid: i32,
    _process: Process,
}

impl Exec {
    fn start(scratch: &Scratch) -> Result<Self> {
        let mut program = Command::new("node");
        program.arg(APP);
        Self::supervise(scratch, &[], program)
    }

    fn supervise(scratch: &Scratch, options: &[&str], program: Command) -> Result<Self> {
        let app = App::new(scratch, "generation-exec")?;
        let mut command = scratch.command(&release()?.join("handover"));
        command.args(["exec", "--listen", &app.address.to_string()]).args(options).arg("--");
        command.arg(program.get_program()).args(program.get_args());
        app.environment(&mut command);
        let process = Process::start(&mut command)?;
        let exec = Self { scratch: scratch.0.clone(), app, pid: process.pid()?, _process: process };
        exec.wait_until_settled()?;
        Ok(exec)
    }

    fn control(&self) -> Result<Client> {
        Ok(Client::connect(&Target::Socket(self.scratch.join(format!("{}.sock", self.pid))))?)
    }

    /// Until it serves, and no older generation is left.
    fn wait_until_settled(&self) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            match self.control().and_then(|control| Ok(control.status()?)) {
                Ok(status) if status.state == State::Serving && status.draining.is_empty() => return Ok(()),
                _ if Instant::now() > deadline => return Err("handover exec does not serve".into()),
                _ => thread::sleep(Duration::from_millis(5)),
            }
        }
    }
}

impl Peer for Exec {
    fn address(&self) -> SocketAddr {
        self.app.address
    }

    fn replace(&self, generation: u64) -> Result<()> {
        self.app.set_generation(generation)?;
        self.control()?.upgrade(&UpgradeRequest::default(), |_| {})?;
        Ok(())
    }

    fn pids(&self) -> Result<Vec<i32>> {
        Ok(vec![self.pid])
    }
}

struct StartServer {
    app: App,
    files: [PathBuf; 2],
    process: Process,
}

impl StartServer {
    fn start(scratch: &Scratch) -> Result<Self> {
        let app = App::new(scratch, "generation-starter")?;
        let files = [scratch.0.join("starter.pid"), scratch.0.join("starter.status")];
        let mut command = Self::command(&files);
        command.arg(format!("--port={}", app.address)).args(["--", "node", APP]);
        app.environment(&mut command);
        let process = Process::start(&mut command)?;
        wait_for(app.address)?;
        Ok(Self { app, files, process })
    }

    fn command([pid, status]: &[PathBuf; 2]) -> Command {
        let mut command = Command::new("start_server");
        command.arg(format!("--pid-file={}", pid.display())).arg(format!("--status-file={}", status.display()));
        command
    }
}

impl Peer for StartServer {
    fn address(&self) -> SocketAddr {
        self.app.address
    }

    fn replace(&self, generation: u64) -> Result<()> {
        self.app.set_generation(generation)?;
        run(Self::command(&self.files).arg("--restart"))
    }

    fn pids(&self) -> Result<Vec<i32>> {
        Ok(vec![self.process.pid()?])
    }
}

struct Pm2 {
    app: App,
    home: PathBuf,
}

impl Pm2 {
    fn start(scratch: &Scratch) -> Result<Self> {
        let pm2 = Self { app: App::new(scratch, "generation-pm2")?, home: scratch.0.join("pm2") };
        run(pm2.command()?.args(["start", APP, "--name", "app", "-i", "1"]))?;
        wait_for(pm2.app.address)?;
        Ok(pm2)
    }

    fn command(&self) -> Result<Command> {
        let programs = release()?.with_file_name("programs");
        let mut command = Command::new(programs.join("node_modules/.bin/pm2"));
        command.env("PM2_HOME", &self.home);
        self.app.environment(&mut command);
        Ok(command)
    }
}

impl Peer for Pm2 {
    fn address(&self) -> SocketAddr {
        self.app.address
    }

    fn replace(&self, generation: u64) -> Result<()> {
        self.app.set_generation(generation)?;
        run(self.command()?.args(["reload", "app"]))
    }

    fn pids(&self) -> Result<Vec<i32>> {
        Ok(vec![fs::read_to_string(self.home.join("pm2.pid"))?.trim().parse()?])
    }
}

impl Drop for Pm2 {
    fn drop(&mut self) {
        let _ = self.command().and_then(|mut command| run(command.arg("kill")));
    }
}

fn run(command: &mut Command) -> Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let done = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
    let status = done.map_err(|error| format!("{program}: {error}"))?;
    if status.success() { Ok(()) } else { Err(format!("{program}: {status}").into()) }
}
