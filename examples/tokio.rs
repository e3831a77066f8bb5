//! An echo server on tokio: each line comes back as `gen=<generation> pid=<pid> <line>`.
//!
//! `cargo run --features tokio --example tokio -- --listen 127.0.0.1:7000`, then `handover upgrade --pid <pid>`.

use clap::Parser;
use handover::{Config, Connection, Handover};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

#[derive(Parser)]
struct Arguments {
    #[arg(long, default_value = "127.0.0.1:7000")]
    listen: String,
    #[arg(long)]
    pid_file: Option<std::path::PathBuf>,
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    env_logger::init();
    let arguments = Arguments::parse();
    let mut config = Config::default();
    if let Some(file) = arguments.pid_file {
        config = config.pid_file(file);
    }

    let handover = Handover::start(config)?; // inherits, or starts generation 1
    let mut listener = handover::tokio::TcpListener::new(handover.tcp("echo", &arguments.listen)?);
    handover.ready_async().await?; // returns when this process owns the listeners
    while let Some((connection, _)) = listener.next_connection().await {
        tokio::spawn(echo(handover.clone(), connection));
    }
    let drained = handover.drained().await; // every connection has ended
    log::info!("{drained:?}");
    Ok(())
}

async fn echo(handover: Handover, connection: Connection<TcpStream>) -> std::io::Result<()> {
    let (generation, pid) = (handover.generation(), std::process::id());
    let mut connection = BufReader::new(connection);
    let mut line = String::new();
    loop {
        // Kept connections are closed only when they have been silent for a while: a line may be on its way.
        tokio::select! {
            _ = connection.fill_buf() => {}
            () = handover.lingered() => return Ok(()),
        }
        line.clear();
        if connection.read_line(&mut line).await? == 0 {
            return Ok(());
        }
        connection.write_all(format!("gen={generation} pid={pid} {line}").as_bytes()).await?;
    }
}
