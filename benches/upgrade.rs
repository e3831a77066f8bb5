//! What an upgrade takes: with 1 to 10,000 listeners, beside the start of the same program; and with gigabytes in memory.
//!
//! `cargo bench --bench upgrade`. The benchmark is its own server: it starts itself with `serve`.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::thread;

use common::{Accepting, Result, Samples, Scratch, Server, heading, now_ms, number, raise_fd_limit, row};
use handover::{Config, Handover};
use sendfd::{RecvWithFd, SendWithFd};

mod common;

const LISTENERS: [usize; 4] = [1, 100, 1_000, 10_000];
const MIB: u64 = 1 << 20;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["serve", listeners] => serve(listeners.parse()?),
        ["nothing"] => Accepting::say(0, "-"),
        // Cargo adds `--bench`.
        _ => measure(),
    }
}

/// Listens on so many ports, and keeps as much memory as it is told over a connection to the first.
fn serve(listeners: usize) -> Result<()> {
    let handover = Handover::start(Config::default())?;
    let listeners: std::result::Result<Vec<_>, _> =
        (0..listeners).map(|number| handover.tcp(&format!("l{number}"), address_of(number))).collect();
    let listeners = listeners?;
    let first = listeners.first().ok_or("no listener")?.clone();
    let address = first.local_addr().to_string();
    thread::spawn(move || {
        let mut memory: Vec<u8> = vec![];
        for mut connection in first.incoming() {
            let mut line = String::new();
            let size = BufReader::new(&connection).read_line(&mut line).ok().and_then(|_| line.trim().parse().ok());
            memory = vec![1; size.unwrap_or(0)];
            let _ = writeln!(connection, "{}", memory.len());
        }
    });
    handover.ready()?;
    Accepting::say(handover.generation(), &address)?;
    let _ = handover.wait();
    Ok(())
}

/// A thousand ports to an address: where most of an address's ports are taken, the kernel searches long for the rest.
fn address_of(number: usize) -> String {
    format!("127.0.0.{}:0", 1 + number / 1000)
}

fn measure() -> Result<()> {
    let limit = raise_fd_limit(20_000)?;
    let scratch = Scratch::new()?;
    listeners(&scratch, limit)?;
    memory(&scratch)
}

fn listeners(scratch: &Scratch, limit: u64) -> Result<()> {
    let program = std::env::current_exe()?;
    let serve = |listeners: usize| ["serve".to_owned(), listeners.to_string()];
    println!("### From the trigger until the new build accepts\n");
    println!("Milliseconds, medians (and the middle half) of interleaved samples.\n");
    heading(&[
        "listeners",
        "trigger → accepting",
        "own start, 1 listener",
        "own start, all bound",
        "more than the start with 1",
        "more than the start with all",
        "floor: the fds alone",
    ]);
    let mut floor = Samples::default();
    for count in LISTENERS {
        if limit < count as u64 * 3 / 2 + 100 {
            println!("{count} listeners: left out, for the limit of fds is {limit}");
            continue;
        }
        let rounds = if count < 10_000 { 40 } else { 15 };
        let mut server = Server::start(scratch, &program, &serve(count))?;
        let [mut upgrade, mut start_one, mut start_all, mut fds] = [(); 4].map(|()| Samples::default());
        for _ in 0..rounds {
            upgrade.push(server.upgrade()?);
            server.settle()?;
            for (samples, listeners) in [(&mut start_one, 1), (&mut start_all, count)] {
                let other = Server::start(scratch, &program, &serve(listeners))?;
                samples.push(other.start_ms);
                other.stop()?;
            }
            fds.push(send_fds(count)?);
            floor.push(Server::start_only(scratch, &program, &["nothing".to_owned()])?);
        }
        server.stop()?;
        row(&[
            count.to_string(),
            upgrade.show(),
            start_one.show(),
            start_all.show(),
            number(upgrade.median() - start_one.median()),
            number(upgrade.median() - start_all.median()),
            number(fds.median()),
        ]);
    }
    println!("\nFloor: a program that does nothing has begun {} ms after its spawn.\n", floor.show());
    Ok(())
}

/// Milliseconds for so many fds to another thread and a byte back, with a table that has room for them.
fn send_fds(count: usize) -> Result<f64> {
    let (ours, theirs) = UnixStream::pair()?;
    let fds: Vec<RawFd> = vec![ours.as_raw_fd(); count];
    let grown = nix::fcntl::fcntl(&ours, nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(i32::try_from(count + 100)?))?;
    nix::unistd::close(grown)?;
    let receiver = thread::spawn(move || -> std::io::Result<Vec<RawFd>> {
        let mut received = vec![];
        while received.len() < count {
            let (mut byte, mut fds) = ([0], [0; 253]);
            let (_, number) = theirs.recv_with_fd(&mut byte, &mut fds)?;
            received.extend_from_slice(&fds[..number]);
        }
        (&theirs).write_all(b"F")?;
        Ok(received)
    });
    let begun = now_ms()?;
    for fds in fds.chunks(253) {
        ours.send_with_fd(b"F", fds)?;
    }
    std::io::Read::read_exact(&mut &ours, &mut [0])?;
    let taken = now_ms()? - begun;
    for fd in receiver.join().map_err(|_| "the receiver panicked")?? {
        nix::unistd::close(fd)?;
    }
    Ok(taken)
}

fn memory(scratch: &Scratch) -> Result<()> {
    let program = std::env::current_exe()?;
    let large = large_memory()?;
    let mut server = Server::start(scratch, &program, &["serve".to_owned(), "1".to_owned()])?;
    let sizes = [10 * MIB, large];
    let mut taken = [(); 2].map(|()| Samples::default());
    let mut resident = [0; 2];
    for _ in 0..12 {
        for (index, size) in sizes.into_iter().enumerate() {
            server.settle()?;
            fill(&server.now.address, size)?;
            resident[index] = common::resident_kib(server.now.pid)? / 1024;
            // Writing gigabytes has put everything else out of the processor's caches, which is not what is asked here.
            for _ in 0..3 {
                Server::start(scratch, &program, &["serve".to_owned(), "1".to_owned()])?.stop()?;
                server.status()?;
            }
            taken[index].push(server.upgrade()?);
        }
    }
    server.stop()?;
    println!("### The server's memory\n");
    heading(&["resident, MiB", "trigger → accepting, ms"]);
    for (resident, taken) in resident.iter().zip(&taken) {
        row(&[resident.to_string(), taken.show()]);
    }
    let [small, large] = taken.map(|samples| samples.median());
    println!("\nRatio of the medians: {}.\n", number(large / small));
    Ok(())
}

/// 8 GiB where so much is free, and half of what is free elsewhere.
fn large_memory() -> Result<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo")?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:")).unwrap_or("0 kB");
    let available = line.trim().trim_end_matches(" kB").parse::<u64>()? * 1024;
    Ok((8192 * MIB).min(available / 2))
}

fn fill(address: &str, size: u64) -> Result<()> {
    let mut connection = TcpStream::connect(address)?;
    writeln!(connection, "{size}")?;
    let mut answer = String::new();
    BufReader::new(connection).read_line(&mut answer)?;
    if answer.trim().parse() != Ok(size) {
        return Err(format!("the server has {answer} bytes instead of {size}").into());
    }
    Ok(())
}
