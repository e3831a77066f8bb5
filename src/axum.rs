//! An axum `Router` served so that an upgrade loses nothing.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use axum::{Router, routing::get};
//! use handover::{Config, Handover};
//!
//! let handover = Handover::start(Config::default())?;
//! let http = handover.tcp("http", "0.0.0.0:8080")?;
//! let app = Router::new().route("/", get(|| async { "hello\n" }));
//! let server = tokio::spawn(handover::axum::serve(http, app));
//! handover.ready_async().await?; // returns when this process owns the listeners
//! server.await?; // upgraded or told to stop, and drained
//! # Ok(())
//! # }
//! ```

use std::net::SocketAddr;

use ::axum::Router;
use ::axum::extract::connect_info::ConnectInfo;
use ::axum::response::Response;
use ::axum::serve::Listener;
use ::hyper::Request;
use ::hyper::body::Incoming;
use ::hyper::service::Service;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpStream;

use crate::connections::Connection;
use crate::hyper;
use crate::shared::Drained;
use crate::tokio::TcpListener;

/// Serves `router` until this process is drained: in place of `axum::serve(listener, router)`. How kept connections are
/// drained is told in [`handover::hyper`](crate::hyper). `ConnectInfo<SocketAddr>` can be extracted.
pub async fn serve(listener: impl Into<TcpListener>, router: Router) -> Drained {
    hyper::serve_each(listener.into(), move |peer| ForPeer { router: router.clone(), peer }).await
}

/// Serves `router` on a Unix socket; as [`serve`].
pub async fn serve_unix(listener: impl Into<crate::tokio::UnixListener>, router: Router) -> Drained {
    hyper::serve_each(listener.into(), move |()| TowerToHyperService::new(router.clone())).await
}

/// The router with what it may want to know of the connection.
struct ForPeer {
    router: Router,
    peer: SocketAddr,
}

impl Service<Request<Incoming>> for ForPeer {
    type Response = Response;
    type Error = std::convert::Infallible;
    type Future = <TowerToHyperService<Router> as Service<Request<Incoming>>>::Future;

    fn call(&self, mut request: Request<Incoming>) -> Self::Future {
        request.extensions_mut().insert(ConnectInfo(self.peer));
        TowerToHyperService::new(self.router.clone()).call(request)
    }
}

/// For `axum::serve` itself. Its graceful shutdown closes silent connections at once and loses what is on its way to
/// them: prefer [`serve`].
impl Listener for TcpListener {
    type Io = Connection<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        match self.next_connection().await {
            Some(accepted) => accepted,
            // This process drains; axum's own graceful shutdown ends the wait.
            None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> std::io::Result<Self::Addr> {
        Ok(TcpListener::local_addr(self))
    }
}
