//! A connection of a process that drains, with the client's side played byte by byte.

use std::convert::Infallible;
use std::time::Duration;

use ::hyper::body::{Bytes, Frame};
use ::hyper::service::service_fn;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

use super::*;
use crate::config::{Config, Signals};
use crate::connections::Guard;

const LINGER: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_secs(30);

/// Chunks of a body, as the test sends them.
struct Chunks(mpsc::UnboundedReceiver<&'static str>);

impl Body for Chunks {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0.poll_recv(context).map(|chunk| chunk.map(|text| Ok(Frame::data(Bytes::from(text)))))
    }
}

/// A connection whose requests are all answered by what the test puts into `bodies`.
struct Served<C = DuplexStream> {
    handover: Handover,
    client: C,
    bodies: mpsc::UnboundedSender<Chunks>,
    // The drain goes on after the connection.
    _guard: Guard,
}

impl Served {
    fn new() -> Self {
        let (client, io) = duplex(1 << 16);
        Self::over(client, io)
    }
}

impl<C: AsyncRead + AsyncWrite + Unpin> Served<C> {
    fn over(client: C, io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) -> Self {
        let config = Config::default().without_control_socket().signals(Signals::none()).linger(LINGER);
        let handover = Handover::start(config).unwrap();
        handover.ready().unwrap();
        let (bodies, next) = mpsc::unbounded_channel::<Chunks>();
        let next = Arc::new(tokio::sync::Mutex::new(next));
        let service = service_fn(move |_| {
            let next = next.clone();
            async move { Ok::<_, Infallible>(Response::new(next.lock().await.recv().await.unwrap())) }
        });
        let server = handover.clone();
        tokio::spawn(
            async move { serve_connection(&server, io, service, auto::Builder::new(TokioExecutor::new())).await },
        );
        let guard = handover.guard();
        Self { handover, client, bodies, _guard: guard }
    }

    async fn drain(&self) {
        self.handover.stop();
        timeout(PATIENCE, self.handover.draining()).await.unwrap();
    }

    async fn send(&mut self, text: &str) {
        self.client.write_all(text.as_bytes()).await.unwrap();
    }

    fn answer(&self) -> mpsc::UnboundedSender<&'static str> {
        let (chunks, body) = mpsc::unbounded_channel();
        self.bodies.send(Chunks(body)).unwrap();
        chunks
    }

    fn answer_at_once(&self) {
        self.answer().send("x").unwrap();
    }

    /// Reads up to `end`, or to the end of the connection.
    async fn read_to(&mut self, end: &str) -> String {
        let mut text = String::new();
        let mut byte = [0];
        while !text.ends_with(end) && timeout(PATIENCE, self.client.read(&mut byte)).await.unwrap().unwrap() > 0 {
            text.push(byte[0].into());
        }
        text
    }

    async fn assert_closed(&mut self) {
        assert_eq!(self.read_to("\0").await, "");
    }
}

const REQUEST: &str = "GET / HTTP/1.1\r\nhost: test\r\n\r\n";
const END: &str = "\r\n0\r\n\r\n";

/// The head of such a response could not say that the connection will be closed.
#[tokio::test]
async fn a_response_begun_before_the_drain_is_followed_by_silence_or_another_answer() {
    let mut served = Served::new();
    served.send(REQUEST).await;
    let chunks = served.answer();
    chunks.send("one").unwrap();
    let head = served.read_to("one").await;
    assert!(!head.contains("connection"), "{head}");
    served.drain().await;
    sleep(2 * LINGER + LINGER / 2).await;
    drop(chunks);
    assert_eq!(served.read_to(END).await, END);
    assert!(timeout(LINGER / 4, served.read_to("\0")).await.is_err(), "closed while a request may be on its way");
    served.send(REQUEST).await;
    served.answer_at_once();
    let last = served.read_to(END).await;
    assert!(last.contains("connection: close\r\n"), "{last}");
    served.assert_closed().await;
}

#[tokio::test]
async fn a_request_that_comes_slowly_is_answered() {
    let mut served = Served::new();
    // hyper itself waits for the first request of a connection.
    served.send(REQUEST).await;
    served.answer_at_once();
    assert!(served.read_to(END).await.ends_with(END));
    served.send("GET / HTTP/1.1\r\n").await;
    served.drain().await;
    for _ in 0..10 {
        sleep(LINGER / 4).await;
        served.send("x-more: 1\r\n").await;
    }
    served.send("\r\n").await;
    served.answer_at_once();
    let last = served.read_to(END).await;
    assert!(last.contains("connection: close\r\n"), "{last}");
    served.assert_closed().await;
}

#[tokio::test]
async fn silent_connections_are_closed() {
    let (mut never_spoke, mut asked_before) = (Served::new(), Served::new());
    asked_before.send(REQUEST).await;
    asked_before.answer_at_once();
    assert!(asked_before.read_to(END).await.ends_with(END));
    never_spoke.drain().await;
    asked_before.drain().await;
    assert!(timeout(LINGER / 2, never_spoke.read_to("\0")).await.is_err(), "closed before its time");
    never_spoke.assert_closed().await;
    asked_before.assert_closed().await;
}

/// When it goes on, the time is over and the request is there, and hyper finds out about both at once.
#[tokio::test]
async fn a_request_that_came_while_the_process_stood_still_is_answered() {
    let mut all = Vec::new();
    // It is a matter of chance which of the two is looked at first.
    for _ in 0..16 {
        let (client, io) = UnixStream::pair().unwrap();
        let mut served = Served::over(client, io);
        served.send(REQUEST).await;
        served.answer_at_once();
        assert!(served.read_to(END).await.ends_with(END));
        served.drain().await;
        all.push(served);
    }
    for served in &mut all {
        served.send(REQUEST).await;
        served.answer_at_once();
    }
    std::thread::sleep(2 * LINGER);
    for served in &mut all {
        let last = served.read_to(END).await;
        assert!(last.contains("connection: close\r\n"), "{last}");
    }
}
