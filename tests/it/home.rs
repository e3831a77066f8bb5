//! A directory of a test's own, and the processes that belong to it.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Once};

use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};

use crate::wait::eventually;

/// The variable that says to which test a process belongs.
const MARK: &str = "HANDOVER_IT";

pub(crate) const HANDOVER: &str = env!("CARGO_BIN_EXE_handover");

/// The fixture, which Cargo builds beside the tests.
pub(crate) fn fixture() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    test.ancestors().nth(2).unwrap().join("examples/fixture")
}

/// The tests may run under `nohup` or in the background of a script. What they ignore then is theirs to ignore, and what
/// they start is as started from a terminal: a handler is not inherited.
fn ignore_nothing_in_children() {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:\t")).unwrap();
    let ignored = u64::from_str_radix(ignored, 16).unwrap();
    for signal in [Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT] {
        if ignored >> (signal as i32 - 1) & 1 == 1 {
            signal_hook::flag::register(signal as i32, Arc::default()).unwrap();
        }
    }
}

pub(crate) struct Home {
    root: PathBuf,
}

impl Home {
    pub(crate) fn new() -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        static SIGNALS: Once = Once::new();
        SIGNALS.call_once(ignore_nothing_in_children);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let root = std::env::temp_dir().join(format!("handover-it-{}-{number}", std::process::id()));
        fs::DirBuilder::new().mode(0o700).create(&root).unwrap();
        Self { root }
    }

    pub(crate) fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.root.join(name)
    }

    /// Where the control sockets are.
    pub(crate) fn control(&self) -> PathBuf {
        self.path("control")
    }

    /// A command whose process, with all its descendants, belongs to this test.
    pub(crate) fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        command.env(MARK, &self.root).env("HANDOVER_DIR", self.control());
        command.env_remove("FIXTURE_FAULT").env("PWD", std::env::current_dir().unwrap()).stdin(Stdio::null());
        command
    }

    /// The fixture, which writes what it has to say to the log.
    pub(crate) fn fixture(&self, arguments: &[&str]) -> Command {
        self.logged(fixture(), arguments)
    }

    pub(crate) fn logged(&self, program: impl AsRef<OsStr>, arguments: &[&str]) -> Command {
        let log = fs::File::options().create(true).append(true).open(self.path("log")).unwrap();
        let mut command = self.command(program);
        command.args(arguments).env("RUST_LOG", "debug").stdout(log.try_clone().unwrap()).stderr(log);
        command
    }

    pub(crate) fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.path("log")).unwrap_or_default()).into_owned()
    }

    pub(crate) fn file(&self, name: &str, content: &[u8], mode: u32) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path
    }

    pub(crate) fn copy_of_fixture(&self, name: &str) -> PathBuf {
        self.copy(&fixture(), name)
    }

    /// Something that can be run at once. Another process writes it, because a child that some other test starts at
    /// that moment would inherit an fd open for writing, and until its exec nobody could run the file (ETXTBSY).
    pub(crate) fn copy(&self, from: &Path, name: &str) -> PathBuf {
        let path = self.path(name);
        assert!(Command::new("cp").arg("-p").args([from, &path]).status().unwrap().success());
        path
    }

    pub(crate) fn script(&self, name: &str, content: &str) -> PathBuf {
        let text = self.file(&format!("{name}.text"), content.as_bytes(), 0o755);
        self.copy(&text, name)
    }

    /// Where a process can be made to wait.
    pub(crate) fn fifo(&self, name: &str) -> Hold {
        let path = self.path(name);
        mkfifo(&path, Mode::S_IRWXU).unwrap();
        Hold { path }
    }

    /// The living processes that belong to this test, by their environment.
    pub(crate) fn processes(&self) -> Vec<i32> {
        let wanted = [MARK.as_bytes(), b"=", self.root.as_os_str().as_encoded_bytes()].concat();
        let mut found: Vec<i32> = fs::read_dir("/proc")
            .unwrap()
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .filter(|pid| {
                let mut environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
                if environment.is_empty() {
                    // Its main thread may have ended, and others live.
                    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
                    environment =
                        threads.flat_map(|one| fs::read(one.path().join("environ")).unwrap_or_default()).collect();
                }
                environment.split(|byte| *byte == 0).any(|variable| variable == wanted)
            })
            .collect();
        found.sort_unstable();
        found
    }

    /// The names in the control directory.
    pub(crate) fn sockets(&self) -> Vec<String> {
        let Ok(directory) = fs::read_dir(self.control()) else { return vec![] };
        let mut names: Vec<_> = directory.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the servers' log:\n{}", self.log());
        }
        // One that is just being spawned shows a moment later.
        loop {
            let left = self.processes();
            if left.is_empty() {
                break;
            }
            for pid in left {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
            std::thread::yield_now();
        }
        let _ = fs::remove_dir_all(&self.root);
    }
}

/// A fifo that a process waits at until it is let go.
pub(crate) struct Hold {
    path: PathBuf,
}

impl Hold {
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// For FIXTURE_FAULT.
    pub(crate) fn fault(&self, name: &str) -> String {
        format!("FIXTURE_FAULT={name}={}", self.path.display())
    }

    /// Waits until a process waits here.
    pub(crate) fn reached(&self) -> Held {
        let open = || {
            use std::os::unix::fs::OpenOptionsExt;
            fs::File::options().write(true).custom_flags(libc::O_NONBLOCK).open(&self.path).ok()
        };
        Held { _writer: eventually("a process at the fifo", open) }
    }
}

/// A process waits at the fifo until this is dropped.
pub(crate) struct Held {
    _writer: fs::File,
}

impl Held {
    pub(crate) fn let_go(self) {}
}
