//! An echo server with a thread for each connection: each line comes back as `gen=<generation> pid=<pid> <line>`.
//!
//! `cargo run --example std -- --listen 127.0.0.1:7000`, then `handover upgrade --pid <pid>`.

use std::io::{self, BufRead, BufReader, Write};
use std::net::TcpStream;

use clap::Parser;
use handover::{Config, Connection, Handover};

#[derive(Parser)]
struct Arguments {
    #[arg(long, default_value = "127.0.0.1:7000")]
    listen: String,
    #[arg(long)]
    pid_file: Option<std::path::PathBuf>,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    env_logger::init();
    let arguments = Arguments::parse();
    let mut config = Config::default();
    if let Some(file) = arguments.pid_file {
        config = config.pid_file(file);
    }

    let handover = Handover::start(config)?; // inherits, or starts generation 1
    let listener = handover.tcp("echo", &arguments.listen)?; // handed over by name, or bound
    let echoes = handover.clone();
    std::thread::spawn(move || {
        for connection in listener.incoming() {
            let handover = echoes.clone();
            let spawned = std::thread::Builder::new().spawn(move || echo(&handover, &connection));
            if let Err(error) = spawned {
                log::warn!("no thread for a connection, which is closed: {error}");
            }
        }
    });
    handover.ready()?; // returns when this process owns the listeners
    let drained = handover.wait(); // upgraded or told to stop, and every connection has ended
    log::info!("{drained:?}");
    Ok(())
}

fn echo(handover: &Handover, connection: &Connection<TcpStream>) -> io::Result<()> {
    let (generation, pid) = (handover.generation(), std::process::id());
    let mut reader = BufReader::new(connection);
    let mut line = String::new();
    // Kept connections are closed only when they have been silent for a while, so that no request meets a closed one.
    while !reader.buffer().is_empty() || handover.wait_for_request(connection)? {
        line.clear();
        if reader.read_line(&mut line)? == 0 {
            break;
        }
        // In one piece: Nagle's algorithm would hold back what follows the first.
        (&mut &*connection).write_all(format!("gen={generation} pid={pid} {line}").as_bytes())?;
    }
    Ok(())
}
