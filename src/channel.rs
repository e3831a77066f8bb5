//! The channel between the two processes: frames and fds over a Unix stream socket, never blocking the engine.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use nix::poll::{PollFd, PollFlags};
use sendfd::SendWithFd;

use crate::both::both;
use crate::fault;
use crate::protocol::{
    BODY_BYTES_MAX, FD_BYTE, FDS_PER_MESSAGE, HEADER_BYTES, Header, MANY, Malformed, Message, Offer, VERSIONS, Versions,
};
use crate::sys;

/// What is read in one turn of the engine.
const SHARE_BYTES: usize = 8192;

/// As many of them as the longest frame has.
pub(crate) const SHARES_MAX: usize = (HEADER_BYTES + BODY_BYTES_MAX).div_ceil(SHARE_BYTES);

pub(crate) struct Channel {
    stream: UnixStream,
    incoming: Vec<u8>,
    /// The kind of the last frame that has begun to come.
    begun: Option<u16>,
    /// This turn of the engine has had its share of what the other side sends.
    has_read: bool,
    outgoing: VecDeque<Outgoing>,
}

enum Outgoing {
    Bytes { bytes: Vec<u8>, sent: usize },
    Fds(Vec<Arc<OwnedFd>>),
}

/// What a look at the channel found.
#[derive(Debug)]
pub(crate) enum Received {
    Message(Message),
    /// Nothing more for now.
    Nothing,
    /// The other side has closed it, between two frames or within one.
    End,
}

/// Why nothing can come over the channel any more. The text completes "the new process …" or "the old process …".
#[derive(Debug)]
pub(crate) enum Broken {
    Malformed(Malformed),
    /// It speaks none of our versions.
    Versions(Versions),
    Io(io::Error),
}

impl std::fmt::Display for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Malformed(malformed) => write!(f, "sent {malformed}"),
            Self::Versions(versions) => write!(f, "speaks protocol versions {versions}, this build speaks {VERSIONS}"),
            Self::Io(error) => write!(f, "cannot be talked to: {error}"),
        }
    }
}

impl From<Malformed> for Broken {
    fn from(malformed: Malformed) -> Self {
        Self::Malformed(malformed)
    }
}

impl From<io::Error> for Broken {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl Channel {
    pub(crate) fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self { stream, incoming: Vec::new(), begun: None, has_read: false, outgoing: VecDeque::new() })
    }

    /// Queues a frame and sends what the socket takes; [`flush`](Self::flush) sends the rest. That the other side has
    /// closed the channel is no error here: what it said before is still to be read, and after that comes the end.
    pub(crate) fn send(&mut self, message: &Message, fds: Vec<Arc<OwnedFd>>) -> Result<(), Broken> {
        let bytes = message.encode().map_err(|malformed| io::Error::other(malformed.0))?;
        let bytes = fault::sends(message.name(), bytes, &self.stream);
        self.outgoing.push_back(Outgoing::Bytes { bytes, sent: 0 });
        self.outgoing.extend(fds.chunks(FDS_PER_MESSAGE).map(|fds| Outgoing::Fds(fds.to_vec())));
        Ok(self.flush()?)
    }

    pub(crate) fn flush(&mut self) -> io::Result<()> {
        while let Some(next) = self.outgoing.front_mut() {
            let result = match next {
                Outgoing::Bytes { bytes, sent } => {
                    self.stream.write(bytes.get(*sent..).unwrap_or_default()).map(|count| {
                        *sent += count;
                        *sent == bytes.len()
                    })
                }
                Outgoing::Fds(fds) => {
                    let numbers: Vec<RawFd> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
                    self.stream.send_with_fd(&[FD_BYTE], &numbers).map(|count| count == 1)
                }
            };
            match result {
                Ok(true) => drop(self.outgoing.pop_front()),
                Ok(false) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) => {
                    self.outgoing.clear();
                    return Ok(());
                }
                Err(error) if error.raw_os_error() == Some(libc::ETOOMANYREFS) => {
                    return Err(io::Error::other(
                        "too many fds in flight for this user (raise `ulimit -n` or LimitNOFILE=)",
                    ));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    #[cfg(feature = "fault-points")]
    pub(crate) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// What `poll` should look for.
    pub(crate) fn interest(&self) -> PollFlags {
        match self.outgoing.is_empty() {
            true => PollFlags::POLLIN,
            false => PollFlags::POLLIN | PollFlags::POLLOUT,
        }
    }

    /// The next frame, which must be one without fds. Plain reads: fds that a peer attaches are closed by the kernel.
    ///
    /// `Nothing` also when one read's worth has been taken and there is more: a peer that never stops talking must not
    /// keep the engine from everything else. `poll` says at once that there is more.
    pub(crate) fn receive(&mut self) -> Result<Received, Broken> {
        loop {
            if let Some(message) = self.take_frame()? {
                return Ok(Received::Message(message));
            }
            if std::mem::take(&mut self.has_read) {
                return Ok(Received::Nothing);
            }
            let mut buffer = [0; SHARE_BYTES];
            match self.stream.read(&mut buffer) {
                Ok(0) => return Ok(Received::End),
                Ok(count) => {
                    self.incoming.extend_from_slice(buffer.get(..count).unwrap_or_default());
                    self.has_read = true;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Received::Nothing),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // A peer that dies with our bytes unread resets the connection: its end all the same.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(Received::End),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Whether there is more to read now.
    pub(crate) fn has_more(&self) -> bool {
        crate::poll::wait(self.stream.as_fd(), PollFlags::POLLIN, Some(Instant::now())).unwrap_or(false)
    }

    /// Whether the last frame, whole or broken, says by its header that it is such a message.
    pub(crate) fn has_begun(&self, message: &Message) -> bool {
        self.begun == Some(message.kind())
    }

    fn take_frame(&mut self) -> Result<Option<Message>, Malformed> {
        let Some((header, rest)) = self.incoming.split_first_chunk::<HEADER_BYTES>() else { return Ok(None) };
        let header = Header::decode(*header)?;
        self.begun = Some(header.kind);
        if header.fds != 0 {
            return Err(Malformed(format!("a frame of kind {} with {} fds", header.kind, header.fds)));
        }
        let Some(body) = rest.get(..header.body_bytes) else { return Ok(None) };
        let message = Message::decode(header, body)?;
        self.incoming.drain(..HEADER_BYTES + header.body_bytes);
        Ok(Some(message))
    }

    /// The offer and its fds, waiting until `deadline`. `None`: the other side has closed the channel before all of it
    /// was there.
    pub(crate) fn receive_offer(&mut self, deadline: Instant) -> Result<Option<(Offer, Vec<OwnedFd>)>, Broken> {
        let mut header = [0; HEADER_BYTES];
        if !self.read_exact(&mut header, deadline)? {
            return Ok(None);
        }
        let header = Header::decode(header)?;
        let mut body = vec![0; header.body_bytes];
        if !self.read_exact(&mut body, deadline)? {
            return Ok(None);
        }
        fault::reached("new: offer", Some(self));
        if header.fds < MANY {
            let offer = decode_offer(header, &body)?;
            return Ok(self.receive_fds(header.fds, deadline)?.map(|fds| (offer, fds)));
        }
        let (fds, offer) = both(|| self.receive_fds(header.fds, deadline), || decode_offer(header, &body));
        let offer = offer?;
        Ok(fds?.map(|fds| (offer, fds)))
    }

    fn receive_fds(&mut self, count: usize, deadline: Instant) -> Result<Option<Vec<OwnedFd>>, Broken> {
        let mut fds = Vec::with_capacity(count);
        if count > FDS_PER_MESSAGE {
            grow_fd_table(self.stream.as_fd(), count);
        }
        while fds.len() < count {
            self.wait_readable(deadline)?;
            let received = match sys::receive_fds(self.stream.as_fd()) {
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                    continue;
                }
                received => received?,
            };
            let expected = (count - fds.len()).min(FDS_PER_MESSAGE);
            match received.payload {
                None => return Ok(None),
                _ if received.truncated => {
                    return Err(io::Error::other(format!(
                        "only {} of {count} fds fit (raise `ulimit -n` or LimitNOFILE=)",
                        fds.len() + received.fds.len()
                    ))
                    .into());
                }
                Some(FD_BYTE) if received.fds.len() == expected => fds.extend(received.fds),
                Some(_) => {
                    let got = received.fds.len();
                    return Err(Malformed(format!("{got} fds in a message instead of {expected}")).into());
                }
            }
        }
        Ok(Some(fds))
    }

    fn read_exact(&mut self, buffer: &mut [u8], deadline: Instant) -> io::Result<bool> {
        let mut filled = 0;
        while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match self.stream.read(rest) {
                Ok(0) => return Ok(false),
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.wait_readable(deadline)?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    fn wait_readable(&self, deadline: Instant) -> io::Result<()> {
        crate::poll::wait(self.stream.as_fd(), PollFlags::POLLIN, Some(deadline))?
            .then_some(())
            .ok_or_else(|| io::Error::new(io::ErrorKind::TimedOut, "it was silent for too long"))
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// The versions come first: an offer in none of ours may mean something else by every other field.
fn decode_offer(header: Header, body: &[u8]) -> Result<Offer, Broken> {
    let decoded = Message::decode(header, body);
    let versions = match &decoded {
        Ok(Message::Offer(offer)) => Some(offer.protocol),
        Ok(_) => None,
        Err(_) => header.offered_versions(body),
    };
    if let Some(versions) = versions.filter(|versions| VERSIONS.common(*versions).is_none()) {
        return Err(Broken::Versions(versions));
    }
    match decoded? {
        Message::Offer(offer) => Ok(*offer),
        Message::Aborted { reason } => Err(Malformed(format!("`aborted`: {reason}")).into()),
        other => Err(Malformed(format!("`{}` instead of an offer", other.name())).into()),
    }
}

/// Grows the fd table in one step. In a process with threads every doubling waits for an RCU grace period, which for
/// ten thousand fds adds up to 75 ms instead of 3. Failing here costs only that time.
fn grow_fd_table(any: BorrowedFd<'_>, count: usize) {
    let highest = i32::try_from(count).unwrap_or(i32::MAX).saturating_add(any.as_raw_fd());
    drop(sys::dup_at_least(any, highest));
}

/// An fd to poll, for lists of them.
pub(crate) fn poll_fd<'a>(fd: &'a impl AsFd, flags: PollFlags) -> PollFd<'a> {
    PollFd::new(fd.as_fd(), flags)
}

/// In whatever pieces they come, the same frames come of them, and the same reason.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz_stream(bytes: &[u8]) {
    type Taken = (Vec<Message>, Option<Malformed>, usize);
    fn take<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> Option<Taken> {
        let mut channel = Channel::new(UnixStream::pair().ok()?.0).ok()?;
        let mut taken = vec![];
        for piece in pieces {
            channel.incoming.extend_from_slice(piece);
            loop {
                match channel.take_frame() {
                    Ok(Some(message)) => taken.push(message),
                    Ok(None) => break,
                    Err(malformed) => return Some((taken, Some(malformed), 0)),
                }
            }
        }
        Some((taken, None, channel.incoming.len()))
    }
    let (pieces, whole) = crate::fuzz::in_pieces(bytes);
    assert_eq!(take(pieces), take(std::iter::once(whole)));
}

/// An offer and messages with fds: the first byte says how many of these there are, the next ones how many fds each has.
/// As many are received as the offer says or none, and none stays open.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz_offer(bytes: &[u8]) {
    const MESSAGES_MAX: u8 = 8;
    const WAIT: std::time::Duration = std::time::Duration::from_secs(30);
    let Some((messages, rest)) = bytes.split_first() else { return };
    let Some((counts, frame)) = rest.split_at_checked(usize::from(messages % MESSAGES_MAX)) else { return };
    let (Ok((pipe, passed)), Ok((mut theirs, ours))) = (io::pipe(), UnixStream::pair()) else { return };
    let deadline = Instant::now() + WAIT;
    // Less than the buffer of a socket holds, so that nobody waits.
    let _ = theirs.write_all(frame.get(..100_000).unwrap_or(frame));
    for count in counts {
        let fds = vec![passed.as_raw_fd(); usize::from(*count)];
        let _ = theirs.send_with_fd(if count % 16 == 15 { b"X" } else { b"F" }, &fds);
    }
    drop((theirs, passed));
    let received = Channel::new(ours).map(|mut channel| channel.receive_offer(deadline));
    if let Ok(Ok(Some((offer, fds)))) = &received {
        assert_eq!(fds.len(), offer.fd_count());
    }
    assert!(Instant::now() < deadline, "waited for what cannot come");
    drop(received);
    // Its end comes when the last copy is closed.
    assert!(matches!(crate::poll::wait(pipe.as_fd(), PollFlags::POLLIN, Some(deadline)), Ok(true)));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::garbled::garbled;
    use crate::protocol::{Claims, Kind, OfferedAddress, OfferedListener};
    use std::time::Duration;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(5)
    }

    fn offer(count: usize) -> Offer {
        let listener = |index| OfferedListener {
            name: format!("listener-{index}"),
            kind: Kind::Tcp,
            address: OfferedAddress::Ip("127.0.0.1:1".parse().unwrap()),
            cookie: index as u64,
            path: None,
            backlog: None,
            activated: false,
        };
        Offer {
            protocol: VERSIONS,
            generation: 2,
            pid: 1,
            listeners: (0..count).map(listener).collect(),
            state: None,
            stderr: false,
            draining: vec![],
            ready_timeout_ms: 1,
            trial_ms: 1,
            build: None,
            program: None,
            restart: None,
        }
    }

    /// More bytes and messages than the socket's buffer holds, so that sending must go on later.
    #[test]
    fn an_offer_larger_than_the_socket_buffer_crosses() {
        for count in [700, MANY + 700] {
            offer_crosses(count);
        }
    }

    fn offer_crosses(count: usize) {
        let (a, b) = UnixStream::pair().unwrap();
        socket2::SockRef::from(&a).set_send_buffer_size(4096).unwrap();
        let (mut old, mut new) = (Channel::new(a).unwrap(), Channel::new(b).unwrap());
        let fd = Arc::new(OwnedFd::from(std::fs::File::open("/dev/null").unwrap()));
        old.send(&Message::Offer(offer(count).into()), vec![fd; count]).unwrap();
        assert!(old.interest().contains(PollFlags::POLLOUT));
        let receiver = std::thread::spawn(move || new.receive_offer(soon()).unwrap().unwrap());
        while old.interest().contains(PollFlags::POLLOUT) {
            assert!(crate::poll::wait(old.as_fd(), PollFlags::POLLOUT, Some(soon())).unwrap());
            old.flush().unwrap();
        }
        let (received, fds) = receiver.join().unwrap();
        assert_eq!(received, offer(count));
        assert_eq!(fds.len(), count);
    }

    #[test]
    fn an_offer_cut_short_is_an_end_and_not_an_error() {
        let bytes = Message::Offer(offer(3).into()).encode().unwrap();
        for length in [0, 5, HEADER_BYTES, bytes.len() - 1, bytes.len()] {
            let (mut a, b) = UnixStream::pair().unwrap();
            a.write_all(&bytes[..length]).unwrap();
            drop(a);
            assert!(Channel::new(b).unwrap().receive_offer(soon()).unwrap().is_none(), "{length}");
        }
    }

    proptest::proptest! {
        /// In whatever pieces it comes: frames, then an end or a reason, and nothing is waited for.
        #[test]
        fn a_garbled_stream_ends(
            frames in proptest::collection::vec(garbled(frames()), 1..4), piece in 1..200_usize
        ) {
            let (mut theirs, ours) = UnixStream::pair().unwrap();
            let mut channel = Channel::new(ours).unwrap();
            for piece in frames.concat().chunks(piece) {
                theirs.write_all(piece).unwrap();
                if channel.receive().is_err() {
                    return Ok(());
                }
            }
            drop(theirs);
            while let Ok(Received::Message(_)) = channel.receive() {}
        }
    }

    fn frames() -> Vec<Vec<u8>> {
        let claims = Claims { kept: vec!["http".into()], ..Claims::default() };
        let messages = [Message::Ready(claims), Message::Commit, Message::Aborted { reason: "stopped".into() }];
        messages.iter().map(|message| message.encode().unwrap()).collect()
    }

    #[test]
    fn wrong_counts_of_fds_are_refused() {
        for (sent, complaint) in [(2, "2 fds in a message instead of 3"), (4, "4 fds in a message instead of 3")] {
            let (mut a, b) = UnixStream::pair().unwrap();
            a.write_all(&Message::Offer(offer(3).into()).encode().unwrap()).unwrap();
            a.send_with_fd(&[FD_BYTE], &vec![a.as_raw_fd(); sent]).unwrap();
            let broken = Channel::new(b).unwrap().receive_offer(soon()).unwrap_err();
            assert!(broken.to_string().contains(complaint), "{broken}");
        }
    }

    #[test]
    fn silence_ends_at_the_deadline() {
        let (_a, b) = UnixStream::pair().unwrap();
        let broken = Channel::new(b).unwrap().receive_offer(Instant::now()).unwrap_err();
        assert!(matches!(broken, Broken::Io(error) if error.kind() == io::ErrorKind::TimedOut));
    }

    #[test]
    fn several_frames_in_one_read_and_one_in_several() {
        let (mut a, b) = UnixStream::pair().unwrap();
        let mut channel = Channel::new(b).unwrap();
        let commit = Message::Commit.encode().unwrap();
        let both = [&commit[..], &Message::Settled.encode().unwrap()].concat();
        a.write_all(&both[..commit.len() + 3]).unwrap();
        assert!(matches!(channel.receive(), Ok(Received::Message(Message::Commit))));
        assert!(matches!(channel.receive(), Ok(Received::Nothing)));
        a.write_all(&both[commit.len() + 3..]).unwrap();
        assert!(matches!(channel.receive(), Ok(Received::Message(Message::Settled))));
        drop(a);
        // The share of one turn is used up.
        assert!(matches!(channel.receive(), Ok(Received::Nothing)));
        assert!(matches!(channel.receive(), Ok(Received::End)));
    }
}
