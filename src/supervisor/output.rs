//! What a worker writes: passed on to where our own output goes, with the last lines of stderr kept for the report of a
//! build that fails. Byte by byte, or line by line with a prefix that says who writes.
//!
//! Nothing here blocks: what our own stream does not take at once (a full pipe, a terminal that was stopped) stays in the
//! worker's pipe, and the worker waits as it would without us.

use std::fs::File;
use std::io::{self, ErrorKind, IsTerminal, PipeReader, PipeWriter, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::LazyLock;
use std::time::Instant;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::PollFlags;
use serde::{Deserialize, Serialize};

use crate::saved;
use crate::upgrade::stderr::Tail;

/// What a pipe that can be written to takes without blocking: PIPE_BUF.
const CHUNK_BYTES: usize = 4096;
/// One worker that writes without end must not keep the others waiting; and as much as a pipe holds.
const BYTES_AT_ONCE: usize = 64 << 10;

/// Where it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Stream {
    Stdout,
    Stderr,
}

impl Stream {
    pub(super) const ALL: [Self; 2] = [Self::Stdout, Self::Stderr];

    pub(super) fn number(self) -> i32 {
        match self {
            Self::Stdout => libc::STDOUT_FILENO,
            Self::Stderr => libc::STDERR_FILENO,
        }
    }

    pub(super) fn fd(self) -> BorrowedFd<'static> {
        static OURS: LazyLock<(io::Stdout, io::Stderr)> = LazyLock::new(|| (io::stdout(), io::stderr()));
        static TERMINALS: LazyLock<[Option<File>; 2]> =
            LazyLock::new(|| [&OURS.0 as &dyn AsFd, &OURS.1].map(non_blocking));
        let ([stdout, stderr], (our_stdout, our_stderr)) = (&*TERMINALS, &*OURS);
        match self {
            Self::Stdout => stdout.as_ref().map_or(our_stdout.as_fd(), AsFd::as_fd),
            Self::Stderr => stderr.as_ref().map_or(our_stderr.as_fd(), AsFd::as_fd),
        }
    }
}

/// A terminal opened once more, so that it is non-blocking for nobody else: it can be written to as soon as it has room for a
/// byte. None: it is none, or may not be opened by this user (su(1)).
fn non_blocking(stream: &dyn AsFd) -> Option<File> {
    let stream = stream.as_fd();
    let open = || {
        let path = format!("/proc/self/fd/{}", stream.as_raw_fd());
        File::options().write(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path).ok()
    };
    stream.is_terminal().then(open)?
}

#[derive(Serialize, Deserialize)]
pub(super) struct Output {
    #[serde(with = "saved::fd::option")]
    pipe: Option<PipeReader>,
    pub(super) stream: Stream,
    tail: Tail,
    prefix: Option<Prefix>,
    /// What was read and has not been taken yet. Nothing more is read until it is.
    #[serde(default)]
    rest: Vec<u8>,
}

#[derive(Serialize, Deserialize)]
struct Prefix {
    text: String,
    /// The next byte begins a line.
    at_start: bool,
}

/// How passing on went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Passed {
    /// There is no more for now.
    All,
    /// Our own stream takes nothing at the moment.
    Blocked,
}

impl Output {
    /// This side, and the one for the program.
    pub(super) fn pipe(stream: Stream, prefix: Option<String>) -> io::Result<(Self, PipeWriter)> {
        let (reader, writer) = io::pipe()?;
        fcntl(&reader, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        let prefix = prefix.map(|text| Prefix { text, at_start: true });
        Ok((Self { pipe: Some(reader), stream, tail: Tail::default(), prefix, rest: vec![] }, writer))
    }

    pub(super) fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.pipe.as_ref().map(AsFd::as_fd)
    }

    pub(super) fn pass_on(&mut self) -> Passed {
        self.pass_on_to(self.stream.fd())
    }

    fn pass_on_to(&mut self, to: BorrowedFd<'_>) -> Passed {
        let mut buffer = [0; CHUNK_BYTES];
        // Each byte may be a line of its own.
        let most = CHUNK_BYTES / (1 + self.prefix.as_ref().map_or(0, |prefix| prefix.text.len()));
        let mut passed = 0;
        loop {
            // If ours is closed there is nowhere to say so.
            if write_all(to, &mut self.rest).is_err_and(|error| error.kind() == ErrorKind::WouldBlock) {
                return Passed::Blocked;
            }
            self.rest.clear();
            if passed >= BYTES_AT_ONCE {
                return Passed::All;
            }
            let Some(pipe) = &mut self.pipe else { return Passed::All };
            if !takes_more(to) {
                return Passed::Blocked;
            }
            match pipe.read(buffer.get_mut(..most).unwrap_or_default()) {
                Ok(0) => self.pipe = None,
                Ok(count) => {
                    passed += count;
                    let bytes = buffer.get(..count).unwrap_or_default();
                    if self.stream == Stream::Stderr {
                        self.tail.push(bytes);
                    }
                    let prefixed = self.prefix.as_mut().map(|prefix| prefix.put_into(bytes));
                    self.rest = prefixed.unwrap_or_else(|| bytes.to_vec());
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Passed::All,
                Err(_) => self.pipe = None,
            }
        }
    }

    pub(super) fn last_lines(&mut self) -> Vec<String> {
        self.tail.lines()
    }
}

impl Prefix {
    fn put_into(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut prefixed = Vec::with_capacity(bytes.len() + self.text.len());
        for line in bytes.split_inclusive(|byte| *byte == b'\n') {
            if self.at_start {
                prefixed.extend_from_slice(self.text.as_bytes());
            }
            prefixed.extend_from_slice(line);
            self.at_start = line.ends_with(b"\n");
        }
        prefixed
    }
}

/// Past the buffers of the standard library, which would keep what has no end of line yet.
fn write_all(to: BorrowedFd<'_>, bytes: &mut Vec<u8>) -> io::Result<()> {
    while !bytes.is_empty() {
        match nix::unistd::write(to, bytes) {
            Ok(count) => drop(bytes.drain(..count)),
            Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Also of one that is closed: writing to it fails at once.
fn takes_more(fd: BorrowedFd<'_>) -> bool {
    crate::poll::wait(fd, PollFlags::POLLOUT, Some(Instant::now())).unwrap_or(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn bytes_pass_unchanged_and_wait_while_nobody_takes_them() {
        let (mut output, mut program) = Output::pipe(Stream::Stderr, None).unwrap();
        let (mut reader, ours) = io::pipe().unwrap();
        program.write_all(b"one\xff\ntwo").unwrap();
        assert_eq!(output.pass_on_to(ours.as_fd()), Passed::All);
        let mut buffer = vec![0; 1 << 20];
        let count = reader.read(&mut buffer).unwrap();
        assert_eq!(&buffer[..count], b"one\xff\ntwo");
        assert_eq!(output.last_lines(), ["one\u{fffd}", "two"]);
        let mut written = 0;
        for _ in 0..100 {
            let free = crate::poll::wait(program.as_fd(), PollFlags::POLLOUT, Some(Instant::now())).unwrap();
            written += if free { program.write(&[b'x'; 4096]).unwrap() } else { 0 };
            output.pass_on_to(ours.as_fd());
        }
        // Two pipes full, and nobody has blocked.
        assert_eq!(output.pass_on_to(ours.as_fd()), Passed::Blocked);
        assert!(written >= 100_000, "{written}");
        // Once ours is closed what comes is thrown away, and the end is seen.
        drop((reader, program));
        for _ in 0..100 {
            output.pass_on_to(ours.as_fd());
        }
        assert!(output.fd().is_none());
    }

    /// Whoever shows it may stand still: a window that was frozen, a network that is gone.
    #[test]
    fn a_terminal_that_nobody_reads_from_is_not_waited_for() {
        for text in ["x", "\n", "a line as most are, with some seventy bytes in it, and an end at last\n"] {
            let terminal = nix::pty::openpty(None, None).unwrap();
            let (sender, blocked) = std::sync::mpsc::channel();
            std::thread::spawn(move || {
                let ours = non_blocking(&terminal.slave).unwrap();
                let (mut output, mut program) = Output::pipe(Stream::Stderr, None).unwrap();
                let (text, mut written) = (text.repeat(CHUNK_BYTES / text.len()), 0);
                while output.pass_on_to(ours.as_fd()) == Passed::All {
                    program.write_all(text.as_bytes()).unwrap();
                    written += text.len();
                }
                sender.send((output, written, ours, terminal)).unwrap();
            });
            let blocked = blocked.recv_timeout(std::time::Duration::from_secs(60));
            let (mut output, written, ours, terminal) = blocked.unwrap_or_else(|error| panic!("{error}: {text:?}"));
            // When somebody reads again all of it is there, once.
            let (mut master, mut buffer, mut shown) = (File::from(terminal.master), [0; 4096], Vec::<u8>::new());
            while shown.len() < written {
                let count: usize = master.read(&mut buffer).unwrap();
                shown.extend(buffer[..count].iter().filter(|byte| **byte != b'\r'));
                output.pass_on_to(ours.as_fd());
            }
            assert!(shown == text.repeat(written / text.len()).into_bytes());
        }
    }

    #[test]
    fn each_line_gets_its_prefix_once() {
        let (mut output, mut program) = Output::pipe(Stream::Stdout, Some("0 | ".to_owned())).unwrap();
        let (mut reader, ours) = io::pipe().unwrap();
        for part in ["a\nb", "c", "\n\nd\n"] {
            program.write_all(part.as_bytes()).unwrap();
            output.pass_on_to(ours.as_fd());
        }
        drop(ours);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "0 | a\n0 | bc\n0 | \n0 | d\n");
        assert!(output.last_lines().is_empty(), "only those of stderr are kept");
    }
}
