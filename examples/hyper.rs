//! A web server on hyper alone, which accepts its connections itself: the place where TLS would go.
//!
//! `cargo run --features hyper --example hyper -- --listen 127.0.0.1:8080`, then `handover upgrade --pid <pid>`.

use std::future::poll_fn;
use std::pin::Pin;

use clap::Parser;
use handover::{Config, Handover};
use hyper::body::{Body, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioExecutor;
use hyper_util::server::conn::auto;

#[derive(Parser)]
struct Arguments {
    #[arg(long, default_value = "127.0.0.1:8080")]
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
    let mut listener = handover::tokio::TcpListener::new(handover.tcp("http", &arguments.listen)?);
    handover.ready_async().await?; // returns when this process owns the listeners
    while let Some((connection, _)) = listener.next_connection().await {
        let for_connection = handover.clone();
        tokio::spawn(async move {
            let who = format!("gen={} pid={}", for_connection.generation(), std::process::id());
            let answer = service_fn(move |request: Request<Incoming>| {
                let response = Response::new(who.clone());
                async move { read_to_its_end(request.into_body()).await.map(|()| response) }
            });
            // A TLS acceptor would take `connection` here and give what is served below.
            let builder = auto::Builder::new(TokioExecutor::new());
            let served = handover::hyper::serve_connection(&for_connection, connection, answer, builder).await;
            if let Err(error) = served {
                log::debug!("{error}");
            }
        });
    }
    let drained = handover.drained().await; // upgraded or told to stop, and every connection has ended
    log::info!("{drained:?}");
    Ok(())
}

/// hyper closes a connection on which some of a body is left, and does not say so.
async fn read_to_its_end(mut body: Incoming) -> hyper::Result<()> {
    while let Some(frame) = poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await {
        frame?;
    }
    Ok(())
}
