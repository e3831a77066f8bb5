//! A web server on axum: `/`, `/slow/<seconds>`, `/stream`, `/ws`.
//!
//! `cargo run --features axum --example axum -- --listen 127.0.0.1:8080`, then `handover upgrade --pid <pid>`.

use std::convert::Infallible;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{Path, State};
use axum::response::Response;
use axum::routing::{any, get};
use clap::Parser;
use futures_util::stream;
use handover::{Config, Handover};
use tokio::time::sleep;

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
    let mut config = Config::default().version(env!("CARGO_PKG_VERSION"));
    if let Some(file) = arguments.pid_file {
        config = config.pid_file(file);
    }

    let handover = Handover::start(config)?;
    let http = handover.tcp("http", &arguments.listen)?; // handed over by name, or bound
    let app = Router::new()
        .route("/", any(identity))
        .route("/slow/{seconds}", any(slow))
        .route("/stream", get(lines))
        .route("/ws", get(websocket))
        .with_state(handover.clone());
    let server = tokio::spawn(handover::axum::serve(http, app));
    handover.ready_async().await?; // returns when this process owns the listeners
    let drained = server.await?; // upgraded or told to stop, and every connection has ended
    log::info!("{drained:?}");
    Ok(())
}

fn who(handover: &Handover) -> String {
    format!("gen={} pid={}", handover.generation(), std::process::id())
}

// Both read the body of the request, up to axum's limit: hyper closes a connection on which some is left, and does not say so.

async fn identity(State(handover): State<Handover>, _: Bytes) -> String {
    who(&handover)
}

async fn slow(State(handover): State<Handover>, Path(seconds): Path<f64>, _: Bytes) -> String {
    sleep(Duration::try_from_secs_f64(seconds).unwrap_or_default()).await;
    who(&handover)
}

/// Twenty lines in two seconds.
async fn lines() -> Response {
    Response::new(Body::from_stream(stream::unfold(1, |line| async move {
        sleep(Duration::from_millis(100)).await;
        (line <= 20).then(|| (Ok::<_, Infallible>(Bytes::from(format!("line {line} of 20\n"))), line + 1))
    })))
}

async fn websocket(State(handover): State<Handover>, upgrade: WebSocketUpgrade) -> Response {
    upgrade.on_upgrade(move |socket| echo(handover, socket))
}

/// Echoes until this process drains, and then says good-bye: a client that reconnects reaches the new build.
async fn echo(handover: Handover, mut socket: WebSocket) {
    let mut draining = handover.draining();
    loop {
        let message = tokio::select! {
            message = socket.recv() => message,
            () = &mut draining => break,
        };
        match message {
            Some(Ok(Message::Text(text))) => {
                let answer = format!("{} {text}", who(&handover));
                if socket.send(Message::Text(answer.into())).await.is_err() {
                    return;
                }
            }
            Some(Ok(_)) => {}
            _ => return,
        }
    }
    let _ = socket.send(Message::Close(None)).await;
    // The client's own Close, or what it sent before it saw ours.
    while let Some(Ok(_)) = socket.recv().await {}
}
