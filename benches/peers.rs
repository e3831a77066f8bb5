//! The same load on other servers that replace themselves: nginx and HAProxy, where they are installed.
//!
//! `cargo bench --all-features --bench peers`, after `cargo build --release --all-features --examples`.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use common::{Result, Scratch, heading, number, row};
use handover::control::{Client, Target, UpgradeRequest, Wait};
use nix::sys::signal::Signal;
use oracle::Tally;
use peer::{Peer, Process, UPGRADES, free_address, measure, wait_for};

mod common;
#[path = "../tests/oracle/mod.rs"]
mod oracle;
#[path = "common/peer.rs"]
mod peer;

fn main() -> Result<()> {
    let scratch = Scratch::new()?;
    println!("### Beside other servers\n");
    println!(
        "{UPGRADES} upgrades with 16 clients and 2,000 new connections a second, then {UPGRADES} with 16 kept \
         connections in a closed loop. Errors of all requests; milliseconds from the trigger until the new build has \
         answered a new connection, median (and the middle half); memory of all processes at the end.\n"
    );
    heading(&["", "errors, new connections", "errors, kept connections", "trigger → serving, ms", "resident, KiB"]);
    show("handover (examples/axum.rs)", &Ours::start(&scratch)?)?;
    for (name, peer) in [
        ("nginx, reload", Nginx::start(&scratch).map(Peer::boxed)),
        ("HAProxy, reload", Haproxy::start(&scratch).map(Peer::boxed)),
    ] {
        match peer {
            Ok(peer) => show(name, peer.as_ref())?,
            Err(error) => println!("\nleft out: {name}: {error}\n"),
        }
    }
    println!();
    Ok(())
}

fn show(name: &str, peer: &dyn Peer) -> Result<()> {
    let measured = measure(peer)?;
    let errors = |tally: &Tally| format!("{} of {}", tally.failed(), tally.requests());
    let resident = number(measured.resident_kib as f64);
    row(&[name, &errors(&measured.fresh), &errors(&measured.kept), &measured.serving.show(), &resident]);
    Ok(())
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
