//! Whether an HTTP/1 connection of a process that drains is silent: no response under way, no byte in either direction.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Instant;

use ::hyper::body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::shared::Shared;
use crate::watch::lock;

pub(super) struct Activity {
    shared: Arc<Shared>,
    responses: AtomicUsize,
    /// Kept only while this process drains: before, a connection pays one load for it.
    last: Mutex<Option<Instant>>,
}

impl Activity {
    pub(super) fn new(shared: Arc<Shared>) -> Arc<Self> {
        Arc::new(Self { shared, responses: AtomicUsize::new(0), last: Mutex::new(None) })
    }

    /// Since when it has been silent, in a drain that began at `begun`. Now, if it is not.
    pub(super) fn silent_since(&self, begun: Instant) -> Instant {
        if self.responses.load(Ordering::SeqCst) > 0 {
            return Instant::now();
        }
        lock(&self.last).map_or(begun, |last| last.max(begun))
    }

    pub(super) fn is_draining(&self) -> bool {
        self.shared.is_draining()
    }

    pub(super) fn begin_response(self: &Arc<Self>) -> ResponseUnderWay {
        self.responses.fetch_add(1, Ordering::SeqCst);
        ResponseUnderWay(self.clone())
    }

    fn note(&self) {
        if self.is_draining() {
            *lock(&self.last) = Some(Instant::now());
        }
    }
}

/// From the call of the service to the end of the body.
pub(super) struct ResponseUnderWay(Arc<Activity>);

impl Drop for ResponseUnderWay {
    fn drop(&mut self) {
        self.0.note();
        self.0.responses.fetch_sub(1, Ordering::SeqCst);
    }
}

pin_project! {
    /// What carries the connection.
    pub(super) struct Watched<I> {
        #[pin]
        io: I,
        activity: Arc<Activity>,
    }
}

impl<I> Watched<I> {
    pub(super) fn new(io: I, activity: Arc<Activity>) -> Self {
        Self { io, activity }
    }
}

impl<I: AsyncRead> AsyncRead for Watched<I> {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.project();
        let read = this.io.poll_read(context, buffer);
        if read.is_ready() {
            this.activity.note();
        }
        read
    }
}

impl<I: AsyncWrite> AsyncWrite for Watched<I> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.project();
        let written = this.io.poll_write(context, bytes);
        if written.is_ready() {
            this.activity.note();
        }
        written
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.project();
        let written = this.io.poll_write_vectored(context, slices);
        if written.is_ready() {
            this.activity.note();
        }
        written
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.project().io.poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.project().io.poll_shutdown(context)
    }
}

pin_project! {
    /// The body of a response, which is under way until this is dropped.
    pub(super) struct WatchedBody<B> {
        #[pin]
        body: B,
        under_way: Option<ResponseUnderWay>,
    }
}

impl<B> WatchedBody<B> {
    pub(super) fn new(body: B, under_way: Option<ResponseUnderWay>) -> Self {
        Self { body, under_way }
    }
}

impl<B: Body> Body for WatchedBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        self.project().body.poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
