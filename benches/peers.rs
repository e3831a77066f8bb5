//! The same load on other servers that replace themselves: nginx and HAProxy, where they are installed.
//!
//! `cargo bench --all-features --bench peers`, after `cargo build --release --all-features --examples`.

use std::fs;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use common::{Result, Samples, Scratch, heading, number, resident_kib, row};
use handover::control::{Client, Target, UpgradeRequest, Wait};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use oracle::{Load, Tally};

mod common;
#[path = "../tests/oracle/mod.rs"]
mod oracle;

const UPGRADES: u64 = 10;

fn main() -> Result<()> {
    let scratch = Scratch::new()?;
    println!("### Beside other servers\n");
    println!(
        "{UPGRADES} upgrades with 16 clients and 2,000 new connections a second, then {UPGRADES} with 16 kept \
         connections in a closed loop. Errors of all requests; milliseconds from the trigger until the new build has \
         answered a new connection, median (and the middle half); memory of all processes at the end.\n"
    );
    heading(&["", "errors, new connections", "errors, kept connections", "trigger → serving, ms", "resident, KiB"]);
    measure("handover (examples/axum.rs)", &Ours::start(&scratch)?)?;
    for peer in [Nginx::start(&scratch).map(Peer::boxed), Haproxy::start(&scratch).map(Peer::boxed)] {
        match peer {
            Ok(peer) => measure(peer.name(), peer.as_ref())?,
            Err(error) => println!("\nleft out: {error}\n"),
        }
    }
    println!();
    Ok(())
}

/// A server whose answers name their generation.
trait Peer {
    fn name(&self) -> &str;
    fn address(&self) -> SocketAddr;
    /// Pulls the trigger and returns.
    fn replace(&self, generation: u64) -> Result<()>;
    /// The processes that are there now.
    fn pids(&self) -> Result<Vec<i32>>;

    fn boxed<'a>(self) -> Box<dyn Peer + 'a>
    where
        Self: Sized + 'a,
    {
        Box::new(self)
    }
}

fn measure(name: &str, peer: &dyn Peer) -> Result<()> {
    let mut serving = Samples::default();
    let mut generation = 1;
    let fresh = Load::new(peer.address()).new_connections(16).rate(2_000.0);
    let fresh = upgrade_under(fresh, peer, &mut generation, Some(&mut serving))?;
    let kept = upgrade_under(Load::new(peer.address()).kept(16), peer, &mut generation, None)?;
    let resident: u64 = peer.pids()?.into_iter().filter_map(|pid| resident_kib(pid).ok()).sum();
    let errors = |tally: &Tally| format!("{} of {}", tally.failed(), tally.requests());
    row(&[name, &errors(&fresh), &errors(&kept), &serving.show(), &number(resident as f64)]);
    Ok(())
}

fn upgrade_under(
    load: Load,
    peer: &dyn Peer,
    generation: &mut u64,
    mut serving: Option<&mut Samples>,
) -> Result<Tally> {
    let begun = Instant::now();
    let running = load.start();
    for _ in 0..UPGRADES {
        thread::sleep(Duration::from_millis(700));
        *generation += 1;
        let triggered = begun.elapsed();
        peer.replace(*generation)?;
        running.wait_for_generation(*generation, Duration::from_secs(10)).map_err(|vain| vain.to_string())?;
        if let (Some(serving), Some(first)) = (&mut serving, running.tally().first_answer(*generation)) {
            serving.push(first.saturating_sub(triggered).as_secs_f64() * 1e3);
        }
    }
    thread::sleep(Duration::from_millis(700));
    Ok(running.stop())
}

/// A child that is stopped with this value.
struct Process(Child);

impl Process {
    fn start(command: &mut Command) -> Result<Self> {
        let program = command.get_program().to_string_lossy().into_owned();
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        Ok(Self(child.map_err(|error| format!("{program}: {error}"))?))
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(i32::try_from(self.0.id())?), signal)?)
    }

    /// Itself and its children.
    fn pids(&self) -> Result<Vec<i32>> {
        let own = i32::try_from(self.0.id())?;
        let children = fs::read_to_string(format!("/proc/{own}/task/{own}/children"))?;
        Ok(std::iter::once(own).chain(children.split_whitespace().filter_map(|pid| pid.parse().ok())).collect())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.signal(Signal::SIGTERM);
        let _ = self.0.wait();
    }
}

struct Ours {
    scratch: PathBuf,
    address: SocketAddr,
    _first: Process,
}

impl Ours {
    fn start(scratch: &Scratch) -> Result<Self> {
        let program = std::env::current_exe()?;
        let program = program.parent().and_then(Path::parent).ok_or("no target directory")?.join("examples/axum");
        let address = free_address()?;
        let mut command = scratch.command(&program);
        command.args(["--listen", &address.to_string(), "--pid-file"]).arg(scratch.0.join("pid"));
        let first = Process::start(&mut command)?;
        wait_for(address)?;
        Ok(Self { scratch: scratch.0.clone(), address, _first: first })
    }

    fn pid(&self) -> Result<i32> {
        Ok(fs::read_to_string(self.scratch.join("pid"))?.trim().parse()?)
    }

    fn control(&self) -> Result<Client> {
        Ok(Client::connect(&Target::Socket(self.scratch.join(format!("{}.sock", self.pid()?))))?)
    }
}

impl Drop for Ours {
    fn drop(&mut self) {
        let _ = self.control().map(|control| control.stop(Some(Duration::from_secs(1)), |_| {}));
    }
}

impl Peer for Ours {
    fn name(&self) -> &str {
        "handover"
    }

    fn address(&self) -> SocketAddr {
        self.address
    }

    fn replace(&self, _: u64) -> Result<()> {
        let request = UpgradeRequest { wait: Some(Wait::Ready), trial_ms: Some(200), ..UpgradeRequest::default() };
        self.control()?.upgrade(&request, |_| {})?;
        Ok(())
    }

    fn pids(&self) -> Result<Vec<i32>> {
        Ok(vec![self.pid()?])
    }
}

struct Nginx {
    directory: PathBuf,
    address: SocketAddr,
    master: Process,
}

impl Nginx {
    fn start(scratch: &Scratch) -> Result<Self> {
        let (directory, address) = (scratch.0.join("nginx"), free_address()?);
        fs::create_dir_all(&directory)?;
        Self::configure(&directory, address, 1)?;
        let mut command = Command::new("nginx");
        command.arg("-p").arg(&directory).arg("-c").arg(directory.join("nginx.conf"));
        let master = Process::start(&mut command)?;
        wait_for(address)?;
        Ok(Self { directory, address, master })
    }

    fn configure(directory: &Path, address: SocketAddr, generation: u64) -> Result<()> {
        let text = format!(
            "daemon off; worker_processes 2; pid {0}/pid; error_log {0}/log; events {{ }}
            http {{ access_log off; client_body_temp_path {0}/body; proxy_temp_path {0}/proxy;
            fastcgi_temp_path {0}/fastcgi; uwsgi_temp_path {0}/uwsgi; scgi_temp_path {0}/scgi;
            server {{ listen {address}; location / {{ default_type text/plain;
            return 200 'gen={generation} pid=$pid'; }} }} }}",
            directory.display()
        );
        Ok(fs::write(directory.join("nginx.conf"), text)?)
    }
}

impl Peer for Nginx {
    fn name(&self) -> &str {
        "nginx, reload"
    }

    fn address(&self) -> SocketAddr {
        self.address
    }

    fn replace(&self, generation: u64) -> Result<()> {
        Self::configure(&self.directory, self.address, generation)?;
        self.master.signal(Signal::SIGHUP)
    }

    fn pids(&self) -> Result<Vec<i32>> {
        self.master.pids()
    }
}

struct Haproxy {
    directory: PathBuf,
    address: SocketAddr,
    master: Process,
}

impl Haproxy {
    fn start(scratch: &Scratch) -> Result<Self> {
        let (directory, address) = (scratch.0.join("haproxy"), free_address()?);
        fs::create_dir_all(&directory)?;
        Self::configure(&directory, address, 1)?;
        let mut command = Command::new("haproxy");
        command.args(["-W", "-db", "-f"]).arg(directory.join("haproxy.cfg"));
        let master = Process::start(&mut command)?;
        wait_for(address)?;
        Ok(Self { directory, address, master })
    }

    fn configure(directory: &Path, address: SocketAddr, generation: u64) -> Result<()> {
        let text = format!(
            "global
    nbthread 2
    maxconn 4000
    stats socket {}/admin mode 600 level admin expose-fd listeners
defaults
    mode http
    timeout client 30s
    timeout connect 5s
    timeout server 30s
frontend http
    bind {address}
    http-request return status 200 content-type text/plain lf-string \"gen={generation} pid=%pid\"
",
            directory.display()
        );
        Ok(fs::write(directory.join("haproxy.cfg"), text)?)
    }
}

impl Peer for Haproxy {
    fn name(&self) -> &str {
        "HAProxy, reload"
    }

    fn address(&self) -> SocketAddr {
        self.address
    }

    fn replace(&self, generation: u64) -> Result<()> {
        Self::configure(&self.directory, self.address, generation)?;
        self.master.signal(Signal::SIGUSR2)
    }

    fn pids(&self) -> Result<Vec<i32>> {
        self.master.pids()
    }
}

/// Programs that cannot be told to listen on a port of the kernel's choice get one that was free a moment ago.
fn free_address() -> Result<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}

fn wait_for(address: SocketAddr) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(10);
    while TcpStream::connect(address).is_err() {
        if Instant::now() > deadline {
            return Err(format!("nobody listens on {address}").into());
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}
