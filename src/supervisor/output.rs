//! What a worker writes to stderr: passed on byte by byte to where ours goes, with the last lines kept for the report of
//! a build that fails.
//!
//! Nothing here blocks: what our stderr does not take at once (a full pipe, a terminal that was stopped) stays in the
//! worker's pipe, and the worker waits as it would without us.

use std::io::{self, ErrorKind, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::PollFlags;

use crate::upgrade::stderr::Tail;

/// What a pipe that can be written to takes without blocking: PIPE_BUF.
const CHUNK_BYTES: usize = 4096;
/// One worker that writes without end must not keep the others waiting.
const CHUNKS_AT_ONCE: usize = 16;

pub(super) struct Output {
    pipe: Option<PipeReader>,
    tail: Tail,
}

/// How passing on went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Passed {
    /// There is no more for now.
    All,
    /// Our own stderr takes nothing at the moment.
    Blocked,
}

impl Output {
    /// This side, and the one for the program.
    pub(super) fn pipe() -> io::Result<(Self, PipeWriter)> {
        let (reader, writer) = io::pipe()?;
        fcntl(&reader, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        Ok((Self { pipe: Some(reader), tail: Tail::default() }, writer))
    }

    pub(super) fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.pipe.as_ref().map(AsFd::as_fd)
    }

    pub(super) fn pass_on(&mut self) -> Passed {
        self.pass_on_to(&mut io::stderr())
    }

    fn pass_on_to(&mut self, to: &mut (impl Write + AsFd)) -> Passed {
        let mut buffer = [0; CHUNK_BYTES];
        for _ in 0..CHUNKS_AT_ONCE {
            let Some(pipe) = &mut self.pipe else { return Passed::All };
            if !takes_more(to.as_fd()) {
                return Passed::Blocked;
            }
            match pipe.read(&mut buffer) {
                Ok(0) => self.pipe = None,
                Ok(count) => {
                    let bytes = buffer.get(..count).unwrap_or_default();
                    self.tail.push(bytes);
                    // If ours is closed there is nowhere to say so.
                    let _ = to.write_all(bytes);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Passed::All,
                Err(_) => self.pipe = None,
            }
        }
        Passed::All
    }

    pub(super) fn last_lines(&mut self) -> Vec<String> {
        self.tail.lines()
    }
}

/// Also of one that is closed: writing to it fails at once.
fn takes_more(fd: BorrowedFd<'_>) -> bool {
    crate::poll::wait(fd, PollFlags::POLLOUT, Some(Instant::now())).unwrap_or(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_pass_unchanged_and_wait_while_nobody_takes_them() {
        let (mut output, mut program) = Output::pipe().unwrap();
        let (mut reader, mut ours) = io::pipe().unwrap();
        program.write_all(b"one\xff\ntwo").unwrap();
        assert_eq!(output.pass_on_to(&mut ours), Passed::All);
        let mut buffer = vec![0; 1 << 20];
        let count = reader.read(&mut buffer).unwrap();
        assert_eq!(&buffer[..count], b"one\xff\ntwo");
        assert_eq!(output.last_lines(), ["one\u{fffd}", "two"]);
        let mut written = 0;
        for _ in 0..100 {
            let free = crate::poll::wait(program.as_fd(), PollFlags::POLLOUT, Some(Instant::now())).unwrap();
            written += if free { program.write(&[b'x'; 4096]).unwrap() } else { 0 };
            output.pass_on_to(&mut ours);
        }
        // Two pipes full, and nobody has blocked.
        assert_eq!(output.pass_on_to(&mut ours), Passed::Blocked);
        assert!(written >= 100_000, "{written}");
        drop(reader);
        while output.fd().is_some() && written > 0 {
            output.pass_on_to(&mut ours);
            written = written.saturating_sub(4096 * CHUNKS_AT_ONCE);
        }
        drop(program);
        output.pass_on_to(&mut ours);
        assert!(output.fd().is_none());
    }
}
