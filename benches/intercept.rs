//! What it costs a program that `handover exec` decides on its calls: of the calls that it makes, and of the requests that it
//! serves.
//!
//! `cargo bench --all-features --bench intercept`, after `cargo build --release --all-features --bins --examples`.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use common::{Result, Samples, Scratch, heading, number, row};
use nix::unistd::{getppid, unlink};
use oracle::Load;
use peer::{Process, free_address, wait_for};
use socket2::{Domain, Socket, Type};

#[path = "common/mod.rs"]
mod common;
#[path = "../tests/oracle/mod.rs"]
mod oracle;
#[path = "common/peer.rs"]
mod peer;

const APP: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/exec/app.js");
/// Where this program, as one that is supervised, writes what its calls took.
const RESULT: &str = "HANDOVER_BENCH_RESULT";
const ADDRESS: &str = "HANDOVER_BENCH_ADDRESS";
const CALLS: u32 = 1_000;
const BATCHES: usize = 50;
const ROUNDS: usize = 30;
const ROUND: Duration = Duration::from_millis(1_000);
/// The program has the first processor alone, and its clients the second: which of them is where would else be chance.
const OF_THE_PROGRAM: [&str; 3] = ["taskset", "--cpu-list", "0"];
const OF_THE_CLIENTS: [&str; 4] = ["taskset", "--all-tasks", "--cpu-list", "1"];
const CLIENTS: usize = 8;

fn main() -> Result<()> {
    if let (Some(result), Ok(address)) = (std::env::var_os(RESULT), std::env::var(ADDRESS)) {
        return measure_calls(&PathBuf::from(result), address.parse()?);
    }
    let scratch = Scratch::new()?;
    println!("### Interception\n");
    calls(&scratch)?;
    requests(&scratch)
}

/// As the program: first a socket that is kept, then the calls, then it waits for its end.
fn measure_calls(result: &Path, address: SocketAddr) -> Result<()> {
    let listener = std::net::TcpListener::bind(address)?;
    let (socket, _other) = UnixStream::pair()?;
    let mut lines = Vec::new();
    let mut measure = |name: &str, call: &dyn Fn() -> Result<()>| -> Result<()> {
        let mut nanoseconds = Samples::default();
        for _ in 0..BATCHES {
            let begun = Instant::now();
            for _ in 0..CALLS {
                call()?;
            }
            nanoseconds.push(begun.elapsed().as_secs_f64() * 1e9 / f64::from(CALLS));
        }
        lines.push(format!("{name}\t{}\t{}", nanoseconds.median(), nanoseconds.show()));
        Ok(())
    };
    measure("`getppid`, which nobody decides on", &|| {
        getppid();
        Ok(())
    })?;
    measure("`shutdown` of the sending side", &|| Ok(socket.shutdown(std::net::Shutdown::Write)?))?;
    measure("`shutdown` of both sides", &|| Ok(socket.shutdown(std::net::Shutdown::Both)?))?;
    measure("`unlink` of what is not there", &|| {
        let _ = unlink("/nonexistent");
        Ok(())
    })?;
    measure("`socket`, `bind` to any port, `close`", &|| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        Ok(socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into())?)
    })?;
    let beside = result.with_extension("new");
    fs::write(&beside, lines.join("\n"))?;
    fs::rename(&beside, result)?;
    loop {
        drop(listener.accept()?);
    }
}

fn calls(scratch: &Scratch) -> Result<()> {
    println!("Nanoseconds for a call, medians (and the middle half) of {BATCHES} times {CALLS}.\n");
    heading(&["", "bare", "under interception", "more"]);
    let own = std::env::current_exe()?;
    let of = |name: &str, mut command: Command| -> Result<Vec<(String, f64, String)>> {
        let result = scratch.0.join(name);
        command.env(RESULT, &result).env(ADDRESS, free_address()?.to_string());
        let _process = Process::start(&mut command)?;
        let deadline = Instant::now() + Duration::from_secs(60);
        while !result.exists() {
            if Instant::now() > deadline {
                return Err("the calls take too long".into());
            }
            thread::sleep(Duration::from_millis(10));
        }
        let text = fs::read_to_string(&result)?;
        let line = |line: &str| {
            let mut parts = line.split('\t');
            let mut part = || parts.next().ok_or("not what it writes");
            Ok((part()?.to_owned(), part()?.parse()?, part()?.to_owned()))
        };
        text.lines().map(line).collect()
    };
    let bare = of("calls-bare", Command::new(&own))?;
    let mut exec = scratch.command(&release()?.join("handover"));
    exec.args(["exec", "--"]).arg(&own);
    for ((name, bare, shown), (_, here, shown_here)) in bare.into_iter().zip(of("calls-exec", exec)?) {
        row(&[name, shown, shown_here, number(here - bare)]);
    }
    println!();
    Ok(())
}

/// Of the same Node program, bare and supervised, in turns.
fn requests(scratch: &Scratch) -> Result<()> {
    let generation = scratch.0.join("generation");
    fs::write(&generation, "1")?;
    let start = |mut command: Command| -> Result<(SocketAddr, Process)> {
        let address = free_address()?;
        command.env("GENERATION_FILE", &generation).env("APP_PORT", address.port().to_string());
        let process = Process::start(&mut command)?;
        wait_for(address)?;
        Ok((address, process))
    };
    let [pinned, arguments @ ..] = OF_THE_PROGRAM;
    let mut node = Command::new(pinned);
    node.args(arguments).args(["node", APP]);
    let mut exec = scratch.command(&release()?.join("handover"));
    exec.args(["exec", "--"]).args(OF_THE_PROGRAM).args(["node", APP]);
    let [pinned, arguments @ ..] = OF_THE_CLIENTS;
    Command::new(pinned).args(arguments).args(["--pid", &std::process::id().to_string()]).output()?;
    let (bare, alone) = start(node)?;
    let (here, supervised) = start(exec)?;
    // Its main thread does the work.
    let pids = [alone.pid()?, *supervised.pids()?.get(1).ok_or("no program runs below handover exec")?];
    println!(
        "Requests of a Node program on a processor of its own, {CLIENTS} clients in a closed loop; {ROUNDS} pairs of rounds, \
         bare and under interception in turns, medians (and the middle half). The ratio is that of each pair.\n"
    );
    heading(&["", "bare", "under interception", "ratio"]);
    for (name, is_kept) in [("on kept connections", true), ("a connection for each", false)] {
        let round = |which: usize| -> Result<[f64; 2]> {
            let load = Load::new([bare, here][which]);
            let load = if is_kept { load.kept(CLIENTS) } else { load.new_connections(CLIENTS) };
            let running = load.start();
            let (begun, worked) = (Instant::now(), processor_time(pids[which])?);
            thread::sleep(ROUND);
            let requests = running.stop().requests() as f64;
            let worked = processor_time(pids[which])?.saturating_sub(worked);
            Ok([requests / begun.elapsed().as_secs_f64(), worked.as_secs_f64() * 1e6 / requests])
        };
        let mut measured: [[Samples; 3]; 2] = Default::default();
        for pair in 0..ROUNDS {
            // Each goes first as often as the other.
            let first = pair % 2;
            let (one, other) = (round(first)?, round(1 - first)?);
            let [bare, here] = if first == 0 { [one, other] } else { [other, one] };
            for (what, samples) in measured.iter_mut().enumerate() {
                samples[0].push(bare[what]);
                samples[1].push(here[what]);
                samples[2].push(here[what] / bare[what]);
            }
        }
        for (what, [bare, here, ratio]) in ["a second", "µs of its processor each"].into_iter().zip(&measured) {
            row(&[&format!("{name}, {what}"), &bare.show(), &here.show(), &ratio.show()]);
        }
    }
    println!();
    Ok(())
}

/// Of the main thread of a process (proc_pid_schedstat(5)).
fn processor_time(pid: i32) -> Result<Duration> {
    let text = fs::read_to_string(format!("/proc/{pid}/schedstat"))?;
    let nanoseconds = text.split_whitespace().next().ok_or("nothing in schedstat")?;
    Ok(Duration::from_nanos(nanoseconds.parse()?))
}

fn release() -> Result<PathBuf> {
    let program = std::env::current_exe()?;
    Ok(program.parent().and_then(Path::parent).ok_or("no target directory")?.to_owned())
}
