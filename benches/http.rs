//! What clients see of an upgrade: ten thousand idle connections that begin to drain, and the latency around it.
//!
//! `cargo bench --all-features --bench http`, after `cargo build --release --all-features --examples`.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{Result, Samples, Scratch, heading, number, raise_fd_limit, row};
use handover::control::{Client, StageName, Status, Target, UpgradeRequest, Wait};
use oracle::{Kind, Load};

mod common;
#[path = "../tests/oracle/mod.rs"]
mod oracle;

const IDLE: usize = 10_000;
const QUESTION: &[u8] = b"GET / HTTP/1.1\r\nHost: bench\r\n\r\n";

fn main() -> Result<()> {
    let limit = raise_fd_limit(20_000)?;
    let scratch = Scratch::new()?;
    idle(&scratch, IDLE.min(usize::try_from(limit)?.saturating_sub(200)))?;
    latency(&scratch)
}

/// examples/axum.rs.
struct Axum<'a> {
    scratch: &'a Scratch,
    child: Child,
    pid_file: PathBuf,
    address: String,
}

impl<'a> Axum<'a> {
    fn start(scratch: &'a Scratch) -> Result<Self> {
        let program = std::env::current_exe()?;
        let program = program.parent().and_then(Path::parent).ok_or("no target directory")?.join("examples/axum");
        let pid_file = scratch.0.join("pid");
        let _ = std::fs::remove_file(&pid_file);
        let mut command = scratch.command(&program);
        let child = command.args(["--listen", "127.0.0.1:0", "--pid-file"]).arg(&pid_file).stdout(Stdio::null());
        let child = child.spawn().map_err(|error| format!("{}: {error}: is it built?", program.display()))?;
        let mut axum = Self { scratch, child, pid_file, address: String::new() };
        let deadline = Instant::now() + Duration::from_secs(30);
        while axum.pid().is_err() {
            if Instant::now() > deadline {
                return Err("the server does not start".into());
            }
            thread::sleep(Duration::from_millis(5));
        }
        axum.address.clone_from(&axum.status()?.listeners[0].address);
        Ok(axum)
    }

    fn pid(&self) -> Result<i32> {
        Ok(std::fs::read_to_string(&self.pid_file)?.trim().parse()?)
    }

    fn control(&self) -> Result<Target> {
        Ok(Target::Socket(self.scratch.0.join(format!("{}.sock", self.pid()?))))
    }

    fn status(&self) -> Result<Status> {
        Ok(Client::connect(&self.control()?)?.status()?)
    }

    /// Returns when the trial is over, and when that was.
    fn upgrade(&self, trial: Duration) -> Result<Instant> {
        let trial_ms = Some(u64::try_from(trial.as_millis())?);
        let request = UpgradeRequest { wait: Some(Wait::Healthy), trial_ms, ..UpgradeRequest::default() };
        let mut healthy = None;
        Client::connect(&self.control()?)?.upgrade(&request, |answer| {
            if let handover::control::Answer::Stage(stage) = answer {
                if stage.stage == StageName::Healthy {
                    healthy = Some(Instant::now());
                }
            }
        })?;
        healthy.ok_or_else(|| "the upgrade never became healthy".into())
    }

    fn wait_for_older(&self) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !self.status()?.draining.is_empty() {
            if Instant::now() > deadline {
                return Err("older generations do not end".into());
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    fn stop(mut self) -> Result<()> {
        Client::connect(&self.control()?)?.stop(None, |_| {})?;
        self.child.wait()?;
        Ok(())
    }
}

fn idle(scratch: &Scratch, count: usize) -> Result<()> {
    let axum = Axum::start(scratch)?;
    let mut connections = Vec::with_capacity(count);
    for _ in 0..count {
        let mut connection = TcpStream::connect(&axum.address)?;
        connection.set_nodelay(true)?;
        connection.set_read_timeout(Some(Duration::from_secs(30)))?;
        connection.write_all(QUESTION)?;
        if answer(&mut connection)?.closes {
            return Err("closed before the upgrade".into());
        }
        connections.push(connection);
    }
    let (old, over) = (axum.control()?, Arc::new(AtomicBool::new(false)));
    let asker = thread::spawn({
        let over = over.clone();
        move || {
            let mut asked: Vec<(Instant, f64)> = vec![];
            while !over.load(Ordering::Relaxed) {
                let begun = Instant::now();
                if Client::connect(&old).and_then(Client::status).is_err() {
                    break;
                }
                asked.push((begun, begun.elapsed().as_secs_f64() * 1e3));
                thread::sleep(Duration::from_millis(1));
            }
            asked
        }
    });
    let trial = Duration::from_millis(300);
    let drained = axum.upgrade(trial)?;
    let mut sent = Vec::with_capacity(count);
    for connection in &mut connections {
        connection.write_all(QUESTION)?;
        sent.push(drained.elapsed().as_secs_f64() * 1e3);
    }
    let (mut last_open, mut kept_open) = (0.0_f64, 0);
    for (connection, sent) in connections.iter_mut().zip(&sent) {
        if !answer(connection)?.closes {
            kept_open += 1;
            last_open = last_open.max(*sent);
        }
    }
    let answered = drained.elapsed().as_secs_f64() * 1e3;
    over.store(true, Ordering::Relaxed);
    let asked = asker.join().map_err(|_| "the asker panicked")?;
    let [mut before, mut after] = [(); 2].map(|()| Samples::default());
    for (at, milliseconds) in asked {
        if at < drained { before.push(milliseconds) } else { after.push(milliseconds) }
    }
    drop(connections);
    axum.wait_for_older()?;
    axum.stop()?;
    println!("### {count} idle keep-alive connections\n");
    println!(
        "Each was asked once more, from {} to {} ms after the drain began; all answers were there after {} ms. \
         {} of them left the connection open, the last one asked {} ms after the drain began; all others said \
         `Connection: close`.\n",
        number(sent.first().copied().unwrap_or_default()),
        number(sent.last().copied().unwrap_or_default()),
        number(answered),
        kept_open,
        number(last_open)
    );
    println!(
        "`status` of that process meanwhile: {} ms, at most {}; before the drain {} ms, at most {}.\n",
        after.show(),
        number(after.quantile(1.0)),
        before.show(),
        number(before.quantile(1.0))
    );
    Ok(())
}

struct Answered {
    closes: bool,
}

fn answer(connection: &mut TcpStream) -> Result<Answered> {
    let mut text = vec![];
    let mut buffer = [0; 1024];
    loop {
        let count = match connection.read(&mut buffer) {
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            result => result?,
        };
        if count == 0 {
            return Err(format!("lost: {}", text.escape_ascii()).into());
        }
        text.extend_from_slice(&buffer[..count]);
        let head = String::from_utf8_lossy(&text).to_ascii_lowercase();
        // The body is `gen=… pid=…` and comes with its head.
        if head.contains("\r\n\r\ngen=") {
            return Ok(Answered { closes: head.contains("connection: close") });
        }
    }
}

/// A second with an upgrade in it, and one without, in turns.
fn latency(scratch: &Scratch) -> Result<()> {
    const ROUNDS: usize = 15;
    let axum = Axum::start(scratch)?;
    let target: std::net::SocketAddr = axum.address.parse()?;
    let kinds = [Kind::New, Kind::Kept];
    // Quiet and upgraded; new and kept; p50, p99 and the longest.
    let mut seen: [[[Samples; 3]; 2]; 2] = Default::default();
    for round in 0..2 * ROUNDS {
        let upgraded = round % 2;
        let load = Load::new(target).new_connections(16).rate(1_000.0).kept(16).think(Duration::from_millis(10));
        let running = load.duration(Duration::from_secs(1)).start();
        if upgraded == 1 {
            thread::sleep(Duration::from_millis(300));
            axum.upgrade(Duration::from_millis(200))?;
        }
        running.wait_for_end(Duration::from_secs(60));
        let tally = running.stop();
        if !tally.lossless() {
            return Err(format!("requests were lost: {tally}").into());
        }
        for (kind, samples) in kinds.iter().zip(&mut seen[upgraded]) {
            let latency = tally.latency(*kind).ok_or("nothing was asked")?;
            let values = [latency.value_at_quantile(0.5), latency.value_at_quantile(0.99), latency.max()];
            for (samples, value) in samples.iter_mut().zip(values) {
                samples.push(value as f64 / 1e3);
            }
        }
        axum.wait_for_older()?;
    }
    axum.stop()?;
    println!("### Latency in the second around an upgrade\n");
    println!(
        "1,000 new connections a second, and 16 kept ones with a request every 10 ms; {ROUNDS} seconds of each, in \
         turns. Milliseconds; medians over the seconds (and the middle half).\n"
    );
    heading(&["", "p50", "p99", "longest"]);
    for (when, kinds_seen) in ["a quiet second", "the second of an upgrade"].iter().zip(&seen) {
        for (kind, samples) in kinds.iter().zip(kinds_seen) {
            let [p50, p99, longest] = samples;
            row(&[format!("{when}, {kind} connections"), p50.show(), p99.show(), longest.show()]);
        }
    }
    println!();
    Ok(())
}
