//! What the benchmarks share: medians, a clock that two processes agree on, a server to upgrade.

// Each benchmark uses a part of it.
#![allow(dead_code, unreachable_pub)]

use std::error::Error;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use handover::ErrorKind;
use handover::control::{Client, State, Status, Target, UpgradeRequest, Wait};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::time::{ClockId, clock_gettime};

pub type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// What was measured, in any unit.
#[derive(Clone, Debug, Default)]
pub struct Samples(Vec<f64>);

impl Samples {
    pub fn push(&mut self, sample: f64) {
        self.0.push(sample);
    }

    pub fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    pub fn quantile(&self, quantile: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let last = sorted.len().saturating_sub(1) as f64;
        sorted.get((quantile * last).round() as usize).copied().unwrap_or(f64::NAN)
    }

    /// The median, and what the middle half lies between.
    pub fn show(&self) -> String {
        format!("{} ({}–{})", number(self.median()), number(self.quantile(0.25)), number(self.quantile(0.75)))
    }
}

/// Three digits that count.
pub fn number(value: f64) -> String {
    let decimals = match value.abs() {
        size if size >= 100.0 => 0,
        size if size >= 10.0 => 1,
        size if size >= 1.0 => 2,
        _ => 3,
    };
    format!("{value:.decimals$}")
}

/// One row of a Markdown table.
pub fn row<T: AsRef<str>>(cells: &[T]) {
    let cells: Vec<&str> = cells.iter().map(AsRef::as_ref).collect();
    println!("| {} |", cells.join(" | "));
}

pub fn heading<T: AsRef<str>>(cells: &[T]) {
    row(cells);
    println!("|{}", "---|".repeat(cells.len()));
}

/// `CLOCK_MONOTONIC` in milliseconds, the same in every process.
pub fn now_ms() -> Result<f64> {
    let now = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC)?);
    Ok(now.as_secs_f64() * 1000.0)
}

/// Raises the soft limit of fds, and the hard one where that is allowed. Returns what it is then.
pub fn raise_fd_limit(wanted: u64) -> Result<u64> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if wanted > hard && setrlimit(Resource::RLIMIT_NOFILE, wanted, wanted).is_ok() {
        return Ok(wanted);
    }
    let limit = wanted.min(hard);
    setrlimit(Resource::RLIMIT_NOFILE, limit, hard)?;
    Ok(limit)
}

/// A directory for control sockets, in the environment of every process that is started from now on, and removed with
/// this value.
pub struct Scratch(pub PathBuf);

impl Scratch {
    /// Call it before there are other threads.
    pub fn new() -> Result<Self> {
        let path = std::env::temp_dir().join(format!("handover-bench-{}", std::process::id()));
        std::fs::create_dir(&path)?;
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o700))?;
        Ok(Self(path))
    }

    pub fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.env("HANDOVER_DIR", &self.0).stdin(Stdio::null());
        command
    }

    fn target(&self, pid: i32) -> Target {
        Target::Socket(self.0.join(format!("{pid}.sock")))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A line that a server writes when it accepts.
#[derive(Clone, Debug)]
pub struct Accepting {
    pub generation: u64,
    pub pid: i32,
    pub at_ms: f64,
    pub address: String,
}

impl Accepting {
    /// What the server prints.
    pub fn say(generation: u64, address: &str) -> Result<()> {
        println!("accepting {generation} {} {} {address}", std::process::id(), now_ms()?);
        Ok(())
    }

    fn parse(line: &str) -> Result<Self> {
        let mut words = line.split_whitespace().skip(1);
        let mut word = || words.next().ok_or_else(|| format!("not what a server says: {line}"));
        Ok(Self {
            generation: word()?.parse()?,
            pid: word()?.parse()?,
            at_ms: word()?.parse()?,
            address: word()?.to_owned(),
        })
    }
}

/// A server that says when it accepts, in each of its generations.
pub struct Server<'a> {
    scratch: &'a Scratch,
    child: Child,
    lines: BufReader<ChildStdout>,
    pub now: Accepting,
    /// From before the spawn of the first generation until it accepted.
    pub start_ms: f64,
}

impl<'a> Server<'a> {
    pub fn start(scratch: &'a Scratch, program: &Path, arguments: &[String]) -> Result<Self> {
        let mut command = scratch.command(program);
        command.args(arguments).stdout(Stdio::piped());
        let begun = now_ms()?;
        let mut child = command.spawn()?;
        let stdout = child.stdout.take().ok_or("no standard output")?;
        let mut lines = BufReader::new(stdout);
        let now = next(&mut lines)?;
        let start_ms = now.at_ms - begun;
        Ok(Self { scratch, child, lines, now, start_ms })
    }

    /// Milliseconds until a program that ends by itself has said something.
    pub fn start_only(scratch: &'a Scratch, program: &Path, arguments: &[String]) -> Result<f64> {
        let mut server = Self::start(scratch, program, arguments)?;
        server.child.wait()?;
        Ok(server.start_ms)
    }

    /// Milliseconds from the trigger until the new build accepts.
    pub fn upgrade(&mut self) -> Result<f64> {
        self.settle()?;
        let request = UpgradeRequest { wait: Some(Wait::Ready), trial_ms: Some(20), ..UpgradeRequest::default() };
        let begun = now_ms()?;
        Client::connect(&self.scratch.target(self.now.pid))?.upgrade(&request, |_| {})?;
        self.now = next(&mut self.lines)?;
        Ok(self.now.at_ms - begun)
    }

    /// Waits until the last upgrade is over and the older generations have gone.
    pub fn settle(&self) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            match self.status() {
                Ok(status) if status.state == State::Serving && status.draining.is_empty() => return Ok(()),
                Err(error) if Instant::now() > deadline => return Err(error),
                _ if Instant::now() > deadline => return Err("the last upgrade does not end".into()),
                _ => thread::sleep(Duration::from_millis(2)),
            }
        }
    }

    pub fn status(&self) -> Result<Status> {
        Ok(Client::connect(&self.scratch.target(self.now.pid))?.status()?)
    }

    pub fn stop(mut self) -> Result<()> {
        self.settle()?;
        let client = Client::connect(&self.scratch.target(self.now.pid))?;
        match client.stop(None, |_| {}) {
            Ok(_) => {}
            // It may be gone before it has said so.
            Err(error) if error.kind() == ErrorKind::NotRunning => {}
            Err(error) => return Err(error.into()),
        }
        self.child.wait()?;
        Ok(())
    }
}

fn next(lines: &mut BufReader<ChildStdout>) -> Result<Accepting> {
    let mut line = String::new();
    lines.read_line(&mut line)?;
    Accepting::parse(&line)
}

/// Resident memory of a process in KiB.
pub fn resident_kib(pid: i32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or("0 kB");
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}
