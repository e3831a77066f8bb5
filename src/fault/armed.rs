//! `HANDOVER_FAULT=STEP,FAULT,FILE`: at that step that fault, once. The file says that it was, and in which process; where
//! it is there already nothing is done, so one variable serves a whole family of processes that inherit it.

use std::fs::{self, File};
use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::OnceLock;
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, raise};

use crate::channel::Channel;

const VARIABLE: &str = "HANDOVER_FAULT";

/// Shorter than any timeout of the test.
const DELAY: Duration = Duration::from_millis(150);

/// Longer than the rest of the upgrade.
const WITHOUT_FDS: Duration = Duration::from_millis(1500);

/// So that a process without a limit is not filled for ever.
const FDS_MAX: usize = 4096;

/// Where the count of fds ends in the header of a frame.
const COUNT: usize = 15;

struct Asked {
    step: String,
    fault: String,
    file: String,
}

impl Asked {
    fn from_environment() -> Option<Self> {
        let text = std::env::var(VARIABLE).ok()?;
        let mut parts = text.splitn(3, ',').map(str::to_owned);
        Some(Self { step: parts.next()?, fault: parts.next()?, file: parts.next()? })
    }

    /// True for the first process that comes here.
    fn is_first(&self) -> bool {
        let file = File::options().write(true).create_new(true).open(&self.file);
        file.and_then(|mut file| writeln!(file, "{}", std::process::id())).is_ok()
    }

    fn happens(&self, channel: Option<&UnixStream>) {
        match self.fault.as_str() {
            // To this thread, so that nothing after this is done before it takes effect.
            "kill" => drop(raise(Signal::SIGKILL)),
            "stop" => drop(raise(Signal::SIGSTOP)),
            "end" => drop(channel.map(|channel| channel.shutdown(Shutdown::Both))),
            "fds" => use_up_fds(),
            "delay" => thread::sleep(DELAY),
            // This thread alone, until the test takes the file away.
            "hold" => {
                while Path::new(&self.file).exists() {
                    thread::sleep(Duration::from_millis(5));
                }
            }
            fault => log::error!("{VARIABLE}: no fault is named {fault}"),
        }
    }
}

/// What is asked for at this step, if that is now.
fn due(step: &str) -> Option<&'static Asked> {
    static ASKED: OnceLock<Option<Asked>> = OnceLock::new();
    let asked = ASKED.get_or_init(Asked::from_environment).as_ref()?;
    (asked.step == step && asked.is_first()).then_some(asked)
}

pub(crate) fn reached(step: &str, channel: Option<&Channel>) {
    if let Some(asked) = due(step) {
        asked.happens(channel.map(Channel::stream));
    }
}

pub(crate) fn sends(frame: &str, mut bytes: Vec<u8>, stream: &UnixStream) -> Vec<u8> {
    match due(frame).map(|asked| (asked.fault.as_str(), asked)) {
        // What follows is taken for its rest.
        Some(("short", _)) => bytes.truncate(bytes.len() / 2),
        Some(("count", _)) => bytes.get_mut(COUNT).into_iter().for_each(|count| *count += 1),
        Some((_, asked)) => asked.happens(Some(stream)),
        None => {}
    }
    bytes
}

fn use_up_fds() {
    let null = |_| File::open("/dev/null").ok();
    let all: Vec<fs::File> = (0..FDS_MAX).map_while(null).collect();
    thread::spawn(move || {
        thread::sleep(WITHOUT_FDS);
        drop(all);
    });
}
