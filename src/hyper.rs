//! HTTP/1 and HTTP/2 drained so that not one request is lost on a kept connection.
//!
//! hyper's own `graceful_shutdown` closes at once a connection that is idle, or that was accepted and has not spoken
//! yet; the request that is on its way there is lost. Here a process that drains goes on answering: a request in flight
//! is finished, the next response on an HTTP/1 connection says `Connection: close`, HTTP/2 gets GOAWAY, and only a
//! connection that stays silent for `linger` is closed.
//!
//! hyper closes a connection, without a word of it in the response, if the service has not read the body of a request to
//! its end; what is on its way there is lost then as well, with and without an upgrade.

use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Instant;

use ::hyper::body::{Body, Incoming};
use ::hyper::service::Service;
use ::hyper::{Request, Response, Version};
use http::{HeaderValue, StatusCode, header};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use pin_project_lite::pin_project;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

use crate::connections::Connection;
use crate::handover::Handover;
use crate::shared::{Drained, Phase, Shared};
use crate::tokio::{LAST_LOOK, TcpListener, UnixListener};

use activity::{Activity, ResponseUnderWay, Watched, WatchedBody};

mod activity;

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A listener that HTTP can be served on: those of [`handover::tokio`](crate::tokio).
pub trait Listener: sealed::Sealed + Send {
    /// What carries a connection.
    type Stream: AsyncRead + AsyncWrite + AsFd + Unpin + Send + 'static;
    /// What is known of the other end.
    type Peer: Clone + Send + Sync + 'static;
}

mod sealed {
    use super::*;

    pub trait Sealed: Sized {
        fn next(&mut self) -> impl Future<Output = Option<Accepted<Self>>> + Send
        where
            Self: Listener;

        fn shared_state(&self) -> SharedState;
    }

    #[allow(unreachable_pub, reason = "in the signature of a public trait that nobody outside can name")]
    pub type Accepted<L> = (Connection<<L as Listener>::Stream>, <L as Listener>::Peer);

    #[allow(unreachable_pub, missing_debug_implementations, reason = "as above")]
    pub struct SharedState(pub(crate) Arc<Shared>);
}

impl Listener for TcpListener {
    type Stream = TcpStream;
    type Peer = SocketAddr;
}

impl sealed::Sealed for TcpListener {
    async fn next(&mut self) -> Option<sealed::Accepted<Self>> {
        self.next_connection().await
    }

    fn shared_state(&self) -> sealed::SharedState {
        sealed::SharedState(self.shared().clone())
    }
}

impl Listener for UnixListener {
    type Stream = UnixStream;
    type Peer = ();
}

impl sealed::Sealed for UnixListener {
    async fn next(&mut self) -> Option<sealed::Accepted<Self>> {
        Some((self.next_connection().await?, ()))
    }

    fn shared_state(&self) -> sealed::SharedState {
        sealed::SharedState(self.shared().clone())
    }
}

/// A hyper service that can be served here: every one whose futures and bodies can be sent between threads.
pub trait HttpService:
    Service<Request<Incoming>, Response = Response<Self::ResponseBody>, Error: Into<BoxError>, Future: Send + 'static>
    + Send
    + 'static
{
    /// The body of its responses.
    type ResponseBody: Body<Data: Send, Error: Into<BoxError>> + Send + 'static;
}

impl<S, B> HttpService for S
where
    S: Service<Request<Incoming>, Response = Response<B>, Error: Into<BoxError>, Future: Send + 'static>
        + Send
        + 'static,
    B: Body<Data: Send, Error: Into<BoxError>> + Send + 'static,
{
    type ResponseBody = B;
}

/// Serves HTTP/1 and HTTP/2 (with prior knowledge) until this process is drained: a task for each connection.
///
/// ```no_run
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// use handover::{Config, Handover};
/// use hyper::service::service_fn;
/// use hyper::{Request, Response, body::Incoming};
///
/// let handover = Handover::start(Config::default())?;
/// let http = handover.tcp("http", "0.0.0.0:8080")?;
/// let hello = service_fn(|_: Request<Incoming>| async { Ok::<_, std::io::Error>(Response::new("hello\n".to_owned())) });
/// let server = tokio::spawn(handover::hyper::serve(http, hello));
/// handover.ready_async().await?;
/// server.await?;
/// # Ok(())
/// # }
/// ```
pub async fn serve<S>(listener: impl Into<TcpListener>, service: S) -> Drained
where
    S: HttpService + Clone,
{
    serve_each(listener.into(), move |_| service.clone()).await
}

/// Like [`serve`], with a service of its own for each connection, made for the peer's address.
pub async fn serve_each<L, M, S>(mut listener: L, mut make_service: M) -> Drained
where
    L: Listener,
    M: FnMut(L::Peer) -> S + Send,
    S: HttpService,
{
    let shared = listener.shared_state().0;
    while let Some((connection, peer)) = listener.next().await {
        let serving = drive(shared.clone(), connection, make_service(peer), auto::Builder::new(TokioExecutor::new()));
        tokio::spawn(async move {
            if let Err(error) = serving.await {
                log::debug!("connection: {error}");
            }
        });
    }
    shared.phase.clone().future(|phase: &Phase| phase.drained).await
}

/// Serves one connection that the program has accepted itself and, for instance, put TLS on. `io` should own the
/// [`Connection`] that it was made from, so that it is counted to its end.
///
/// # Errors
///
/// Those of hyper and of the service.
pub async fn serve_connection<I, S>(
    handover: &Handover,
    io: I,
    service: S,
    builder: auto::Builder<TokioExecutor>,
) -> Result<(), BoxError>
where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    S: HttpService,
{
    drive(handover.shared.clone(), io, service, builder).await
}

async fn drive<I, S>(
    shared: Arc<Shared>,
    io: I,
    service: S,
    builder: auto::Builder<TokioExecutor>,
) -> Result<(), BoxError>
where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    S: HttpService,
{
    let activity = Activity::new(shared.clone());
    let speaks_http2 = Arc::new(AtomicBool::new(false));
    let service = LastResponses { service, activity: activity.clone(), speaks_http2: speaks_http2.clone() };
    let io = TokioIo::new(Watched::new(io, activity.clone()));
    let mut connection = pin!(builder.serve_connection_with_upgrades(io, service));
    let drain = shared.phase.clone().future(|phase: &Phase| phase.draining.map(|draining| draining.begun));
    let begun = tokio::select! {
        result = connection.as_mut() => return result,
        begun = drain => begun,
    };
    // GOAWAY says which requests are still answered, so HTTP/2 loses nothing at once. An HTTP/1 connection that is
    // silent may have a request on its way; one that is not says `Connection: close` with its next response.
    let linger = shared.linger();
    while !speaks_http2.load(Ordering::Relaxed) {
        let deadline = activity.silent_since(begun) + linger;
        let is_over = deadline <= Instant::now();
        let until = if is_over { Instant::now() + LAST_LOOK } else { deadline };
        tokio::select! {
            biased; // What lies there unread is no silence.
            result = connection.as_mut() => return result,
            () = tokio::time::sleep_until(until.into()) => {}
        }
        if is_over && activity.silent_since(begun) + linger <= Instant::now() {
            break;
        }
    }
    connection.as_mut().graceful_shutdown();
    connection.await
}

/// Makes each HTTP/1 response of a process that drains the last one of its connection.
struct LastResponses<S> {
    service: S,
    activity: Arc<Activity>,
    speaks_http2: Arc<AtomicBool>,
}

impl<S, B> Service<Request<Incoming>> for LastResponses<S>
where
    S: Service<Request<Incoming>, Response = Response<B>>,
{
    type Response = Response<WatchedBody<B>>;
    type Error = S::Error;
    type Future = LastResponse<S::Future>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let http2 = request.version() == Version::HTTP_2;
        if http2 {
            self.speaks_http2.store(true, Ordering::Relaxed);
        }
        let under_way = Some(self.activity.begin_response());
        LastResponse { response: self.service.call(request), activity: self.activity.clone(), under_way, http2 }
    }
}

pin_project! {
    /// The future of [`LastResponses`].
    struct LastResponse<F> {
        #[pin]
        response: F,
        activity: Arc<Activity>,
        // None once it has gone to the body.
        under_way: Option<ResponseUnderWay>,
        http2: bool,
    }
}

impl<F, B, E> Future for LastResponse<F>
where
    F: Future<Output = Result<Response<B>, E>>,
{
    type Output = Result<Response<WatchedBody<B>>, E>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let mut response = ready!(this.response.poll(context))?;
        let drains = !*this.http2 && this.activity.is_draining();
        if drains && response.status() != StatusCode::SWITCHING_PROTOCOLS {
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        let under_way = this.under_way.take();
        Poll::Ready(Ok(response.map(|body| WatchedBody::new(body, under_way))))
    }
}

#[cfg(test)]
mod tests;
