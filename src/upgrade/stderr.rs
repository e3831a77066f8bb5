//! What a new process writes to stderr before commit: passed on as it comes, with the last lines kept.

use std::collections::VecDeque;
use std::io::{self, PipeReader, Read, Write};
use std::sync::{Arc, Mutex};
use std::thread;

use crate::text::printable;
use crate::watch::lock;

const LINES_KEPT: usize = 20;
const LINE_BYTES_MAX: usize = 1000;

/// The tail of a stream of text.
#[derive(Debug, Default)]
#[cfg_attr(feature = "cli", derive(serde::Serialize, serde::Deserialize))]
pub(crate) struct Tail {
    lines: VecDeque<String>,
    partial: Vec<u8>,
    ended: bool,
}

impl Tail {
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        for byte in bytes {
            match byte {
                b'\n' => self.end_line(),
                _ if self.partial.len() < LINE_BYTES_MAX => self.partial.push(*byte),
                // The rest of an overlong line is passed on and not kept.
                _ => {}
            }
        }
    }

    fn end_line(&mut self) {
        let bytes = std::mem::take(&mut self.partial);
        let text = String::from_utf8_lossy(&bytes);
        let line = printable(text.trim_end());
        if self.lines.len() == LINES_KEPT {
            self.lines.pop_front();
        }
        self.lines.push_back(line);
    }

    /// The last lines, an unfinished one included.
    pub(crate) fn lines(&mut self) -> Vec<String> {
        if !self.partial.is_empty() {
            self.end_line();
        }
        self.lines.iter().cloned().collect()
    }
}

#[derive(Clone, Debug)]
pub(crate) struct StderrTail(Arc<Mutex<Tail>>);

impl StderrTail {
    /// Passes on what comes out of `pipe`, on a thread that ends with the pipe; `on_end` is called then.
    pub(crate) fn follow(mut pipe: PipeReader, on_end: impl FnOnce() + Send + 'static) -> io::Result<Self> {
        let tail = Arc::new(Mutex::new(Tail::default()));
        let shared = tail.clone();
        let pass_on = move || {
            let mut buffer = [0; 8192];
            loop {
                let bytes = match pipe.read(&mut buffer) {
                    Ok(0) => break,
                    Ok(count) => buffer.get(..count).unwrap_or_default(),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(_) => break,
                };
                lock(&shared).push(bytes);
                // If ours is closed or full for ever there is nowhere to say so.
                let _ = io::stderr().write_all(bytes);
            }
            lock(&shared).ended = true;
            on_end();
        };
        thread::Builder::new().name("handover-stderr".into()).spawn(pass_on)?;
        Ok(Self(tail))
    }

    /// Whether everybody who could write to it has closed it.
    pub(crate) fn ended(&self) -> bool {
        lock(&self.0).ended
    }

    /// The last lines, an unfinished one included.
    pub(crate) fn lines(&self) -> Vec<String> {
        lock(&self.0).lines()
    }
}

/// Few lines are kept, none of them long or with a control character in it, in whatever pieces they come.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(bytes: &[u8]) {
    let (pieces, whole) = crate::fuzz::in_pieces(bytes);
    let (mut tail, mut other) = (Tail::default(), Tail::default());
    pieces.for_each(|piece| tail.push(piece));
    other.push(whole);
    assert_eq!(tail.lines(), other.lines());
    assert!(tail.lines().len() <= LINES_KEPT);
    for line in tail.lines() {
        // What is no UTF-8 takes three bytes each.
        assert!(
            line.len() <= 3 * LINE_BYTES_MAX && !line.chars().any(|one| one.is_control() && one != '\t'),
            "{line:?}"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_lines_are_kept_and_they_are_harmless() {
        let mut tail = Tail::default();
        for number in 0..100 {
            tail.push(format!("line {number}\n").as_bytes());
        }
        assert_eq!(tail.lines.len(), LINES_KEPT);
        assert_eq!(tail.lines.back().map(String::as_str), Some("line 99"));
        tail.push(b"\x1b[2Jgone\xff\r\n");
        assert_eq!(tail.lines.back().map(String::as_str), Some("\u{fffd}[2Jgone\u{fffd}"));
    }

    #[test]
    fn a_megabyte_without_a_newline_takes_no_memory() {
        let mut tail = Tail::default();
        for _ in 0..1024 {
            tail.push(&[b'x'; 1024]);
        }
        assert_eq!(tail.partial.len(), LINE_BYTES_MAX);
    }

    #[test]
    fn the_end_of_the_pipe_is_told() {
        let (reader, mut writer) = io::pipe().unwrap();
        let (sender, receiver) = std::sync::mpsc::channel();
        let tail = StderrTail::follow(reader, move || sender.send(()).unwrap()).unwrap();
        writer.write_all(b"").unwrap();
        drop(writer);
        receiver.recv().unwrap();
        assert!(tail.ended() && tail.lines().is_empty());
    }
}
