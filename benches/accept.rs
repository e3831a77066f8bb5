//! What the gate and the counting of connections add to an accept, against a bare accept loop in the same run.
//!
//! `cargo bench --bench accept`. Both loops take connections that wait in the queue already, a hundred at a time and in
//! turns, and close them; what differs is the library.

use std::hint::black_box;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::time::Instant;

use common::{Result, Samples, Scratch, heading, number, row};
use handover::{Config, Handover};

mod common;

const BATCH: usize = 100;
const ROUNDS: usize = 3_000;
const GUARDS: usize = 10_000;

fn main() -> Result<()> {
    let scratch = Scratch::new()?;
    let handover = Handover::start(Config::default().control_directory(&scratch.0))?;
    let unix_name = format!("handover-bench-{}", std::process::id());
    let gated_unix = handover.unix("unix", format!("@{unix_name}-gated"))?;
    let gated_tcp = handover.tcp("tcp", "127.0.0.1:0")?;
    handover.ready()?;
    let name_of = |which: &str| SocketAddr::from_abstract_name(format!("{unix_name}-{which}"));
    let (bare_name, gated_name) = (name_of("bare")?, name_of("gated")?);
    let bare_unix = UnixListener::bind_addr(&bare_name)?;
    let bare_tcp = TcpListener::bind("127.0.0.1:0")?;
    let (bare_address, gated_address) = (bare_tcp.local_addr()?, gated_tcp.local_addr());

    println!("### Gate and guard\n");
    println!("Nanoseconds for an accept and the close, medians (and the middle half).\n");
    heading(&["", "bare accept loop", "with the library", "difference"]);
    compare(
        "Unix",
        || UnixStream::connect_addr(&bare_name),
        || bare_unix.accept(),
        || UnixStream::connect_addr(&gated_name),
        || gated_unix.accept(),
    )?;
    compare(
        "TCP",
        || TcpStream::connect(bare_address),
        || bare_tcp.accept(),
        || TcpStream::connect(gated_address),
        || gated_tcp.accept(),
    )?;

    let mut guards = Samples::default();
    for _ in 0..100 {
        let begun = Instant::now();
        for _ in 0..GUARDS {
            drop(black_box(handover.guard()));
        }
        guards.push(begun.elapsed().as_secs_f64() * 1e9 / GUARDS as f64);
    }
    println!("\nA guard taken and dropped, without an accept: {} ns.\n", guards.show());
    Ok(())
}

fn compare<S, A, B>(
    what: &str,
    bare_connect: impl Fn() -> io::Result<S>,
    bare_accept: impl Fn() -> io::Result<A>,
    gated_connect: impl Fn() -> io::Result<S>,
    gated_accept: impl Fn() -> io::Result<B>,
) -> Result<()> {
    let [mut bare, mut gated, mut difference] = [(); 3].map(|()| Samples::default());
    for round in 0..ROUNDS {
        let mut taken = [0.0; 2];
        // In turns, and each of them first in every other round.
        for turn in [round % 2, 1 - round % 2] {
            taken[turn] =
                if turn == 0 { batch(&bare_connect, &bare_accept)? } else { batch(&gated_connect, &gated_accept)? };
        }
        bare.push(taken[0]);
        gated.push(taken[1]);
        difference.push(taken[1] - taken[0]);
    }
    row(&[what.to_owned(), bare.show(), gated.show(), number(difference.median())]);
    Ok(())
}

/// Nanoseconds an accept, of connections that wait already.
fn batch<S, A>(connect: impl Fn() -> io::Result<S>, accept: impl Fn() -> io::Result<A>) -> Result<f64> {
    let clients: io::Result<Vec<S>> = (0..BATCH).map(|_| connect()).collect();
    let clients = clients?;
    let begun = Instant::now();
    for _ in 0..BATCH {
        drop(black_box(accept()?));
    }
    let taken = begun.elapsed().as_secs_f64() * 1e9 / BATCH as f64;
    drop(clients);
    Ok(taken)
}
