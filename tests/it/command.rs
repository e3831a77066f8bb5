//! The `handover` command, run to its end or watched while it runs.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use serde_json::Value;

use crate::wait::{LONG, eventually};

/// How a command ended.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Run {
    #[track_caller]
    pub(crate) fn exits_with(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "{self:#?}");
        self
    }

    /// On stderr.
    #[track_caller]
    pub(crate) fn complains(self, part: &str) -> Self {
        assert!(self.stderr.contains(part), "`{part}` is not in {self:#?}");
        self
    }

    /// On stdout.
    #[track_caller]
    pub(crate) fn says(self, part: &str) -> Self {
        assert!(self.stdout.contains(part), "`{part}` is not in {self:#?}");
        self
    }

    /// With `--json`: nothing is accepted that is refused.
    #[track_caller]
    pub(crate) fn tells_only_the_result(self) -> Self {
        let events: Vec<Value> = self.json().iter().map(|line| line["event"].clone()).collect();
        assert_eq!(events, ["result"], "{self:#?}");
        self
    }

    /// With `--json`: every line is an object.
    #[track_caller]
    pub(crate) fn json(&self) -> Vec<Value> {
        let parse = |line: &str| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {self:#?}"));
        self.stdout.lines().map(parse).collect()
    }

    /// With `--json`: the last line.
    #[track_caller]
    pub(crate) fn last_json(&self) -> Value {
        self.json().pop().unwrap_or_else(|| panic!("no line: {self:#?}"))
    }
}

/// A command that runs.
pub(crate) struct Running {
    child: Child,
    lines: Receiver<String>,
    stdout: String,
    stderr: Option<JoinHandle<String>>,
}

impl Running {
    pub(crate) fn start(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (stdout, mut stderr) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        let (sender, lines) = channel();
        thread::spawn(move || {
            BufReader::new(stdout).lines().map_while(Result::ok).try_for_each(|line| sender.send(line))
        });
        let stderr = thread::spawn(move || {
            let mut text = String::new();
            let _ = stderr.read_to_string(&mut text);
            text
        });
        Self { child, lines, stdout: String::new(), stderr: Some(stderr) }
    }

    /// Waits for a line with `part` in it, and returns that.
    #[track_caller]
    pub(crate) fn wait_for_line(&mut self, part: &str) -> String {
        let deadline = Instant::now() + LONG;
        loop {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    self.stdout.push_str(&line);
                    self.stdout.push('\n');
                    if line.contains(part) {
                        return line;
                    }
                }
                Err(_) => {
                    let _ = self.child.kill();
                    let stderr = self.stderr.take().map(|thread| thread.join().unwrap()).unwrap_or_default();
                    panic!("no line with `{part}`, but\n{}and on stderr\n{stderr}", self.stdout);
                }
            }
        }
    }

    pub(crate) fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// The new process, of an upgrade with `--json`.
    #[track_caller]
    pub(crate) fn new_pid(&mut self) -> i32 {
        let line: Value = serde_json::from_str(&self.wait_for_line("spawned")).unwrap();
        i32::try_from(line["pid"].as_i64().unwrap()).unwrap()
    }

    #[track_caller]
    pub(crate) fn finish(mut self) -> Run {
        let status = eventually("the end of the command", || self.child.try_wait().unwrap());
        // Whoever holds the other end of these pipes is the command alone.
        loop {
            match self.lines.recv_timeout(LONG) {
                Ok(line) => self.stdout.push_str(&(line + "\n")),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => panic!("stdout stays open after the command's end"),
            }
        }
        let stderr = self.stderr.take().map(|thread| thread.join().unwrap()).unwrap_or_default();
        Run { code: status.code(), stdout: std::mem::take(&mut self.stdout), stderr }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[track_caller]
pub(crate) fn run(command: Command) -> Run {
    Running::start(command).finish()
}
