//! The same upgrades under the same load, on whoever replaces a server.

// Each benchmark uses a part of it.
#![allow(dead_code)]

use std::fs;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::common::{Result, Samples, resident_kib};
use crate::oracle::{Load, Tally};

pub(crate) const UPGRADES: u64 = 10;

/// A server whose answers name their generation.
pub(crate) trait Peer {
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

/// How a peer's upgrades went.
pub(crate) struct Measured {
    /// With new connections.
    pub(crate) fresh: Tally,
    /// With kept ones.
    pub(crate) kept: Tally,
    /// From the trigger until a new connection was answered by the new build, and until the trigger had returned.
    pub(crate) serving: Samples,
    pub(crate) returned: Samples,
    /// All its processes together, at the end.
    pub(crate) resident_kib: u64,
}

pub(crate) fn measure(peer: &dyn Peer) -> Result<Measured> {
    let (mut serving, mut returned) = (Samples::default(), Samples::default());
    let mut generation = 1;
    let fresh = Load::new(peer.address()).new_connections(16).rate(2_000.0);
    let fresh = upgrade_under(fresh, peer, &mut generation, &mut serving, &mut returned)?;
    let kept = Load::new(peer.address()).kept(16);
    let kept = upgrade_under(kept, peer, &mut generation, &mut Samples::default(), &mut Samples::default())?;
    let resident_kib = peer.pids()?.into_iter().filter_map(|pid| resident_kib(pid).ok()).sum();
    Ok(Measured { fresh, kept, serving, returned, resident_kib })
}

fn upgrade_under(
    load: Load,
    peer: &dyn Peer,
    generation: &mut u64,
    serving: &mut Samples,
    returned: &mut Samples,
) -> Result<Tally> {
    let begun = Instant::now();
    let running = load.start();
    for _ in 0..UPGRADES {
        thread::sleep(Duration::from_millis(700));
        *generation += 1;
        let triggered = begun.elapsed();
        peer.replace(*generation)?;
        returned.push((begun.elapsed() - triggered).as_secs_f64() * 1e3);
        running.wait_for_generation(*generation, Duration::from_secs(10)).map_err(|vain| vain.to_string())?;
        if let Some(first) = running.tally().first_answer(*generation) {
            serving.push(first.saturating_sub(triggered).as_secs_f64() * 1e3);
        }
    }
    thread::sleep(Duration::from_millis(700));
    Ok(running.stop())
}

/// A child that is stopped with this value.
pub(crate) struct Process(Child);

impl Process {
    pub(crate) fn start(command: &mut Command) -> Result<Self> {
        let program = command.get_program().to_string_lossy().into_owned();
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        Ok(Self(child.map_err(|error| format!("{program}: {error}"))?))
    }

    pub(crate) fn pid(&self) -> Result<i32> {
        Ok(i32::try_from(self.0.id())?)
    }

    pub(crate) fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(self.pid()?), signal)?)
    }

    /// Itself and its children.
    pub(crate) fn pids(&self) -> Result<Vec<i32>> {
        let own = self.pid()?;
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

/// Programs that cannot be told to listen on a port of the kernel's choice get one that was free a moment ago.
pub(crate) fn free_address() -> Result<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}

pub(crate) fn wait_for(address: SocketAddr) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(10);
    while TcpStream::connect(address).is_err() {
        if Instant::now() > deadline {
            return Err(format!("nobody listens on {address}").into());
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}
