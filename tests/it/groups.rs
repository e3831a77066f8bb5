//! `handover check` in a control group that is too small for two generations. Needs root, and a kernel whose groups, of
//! either version, can be written to.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::command::{Run, run};
use crate::home::{HANDOVER, Home, fixture};
use crate::rights::is_root_or_skip;
use crate::server::{SOON, Server};
use crate::wait::eventually;

/// A group of a test's own.
struct Group {
    directory: PathBuf,
    is_version_2: bool,
}

impl Group {
    fn new(controller: &str) -> Option<Self> {
        if !is_root_or_skip("limits of control groups") {
            return None;
        }
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("handover-it-{}-{controller}-{number}", std::process::id());
        let own = fs::read_to_string("/proc/self/cgroup").unwrap();
        let own = own.lines().find_map(|line| line.split_once(&format!(":{controller}:/"))).map(|(_, path)| path);
        let is_version_2 = own.is_none();
        let parent = match own {
            Some(path) => Path::new("/sys/fs/cgroup").join(controller).join(path),
            None => PathBuf::from("/sys/fs/cgroup"),
        };
        let directory = parent.join(name);
        let usable = fs::create_dir(&directory).is_ok() && directory.join(limit_of(controller, is_version_2)).exists();
        let group = Self { directory, is_version_2 };
        if !usable {
            eprintln!("left out, because no group with the controller {controller} can be made: limits of it");
            return None;
        }
        Some(group)
    }

    fn start(&self, options: &[&str]) -> Server {
        self.start_below(&[], options)
    }

    /// As `supervisor` runs it.
    fn start_below(&self, supervisor: &[&str], options: &[&str]) -> Server {
        let home = Home::new();
        let script = "echo $$ >\"$0/cgroup.procs\" && exec \"$@\"";
        let program = fixture();
        let program = [&[program.to_str().unwrap()][..], &SOON, &["--tcp", "http=127.0.0.1:0"], options].concat();
        let start = ["-c", script, self.directory.to_str().unwrap()];
        let command = home.logged("/bin/sh", &[&start, supervisor, &program].concat());
        Server::run(home, command)
    }

    fn read(&self, name: &str) -> u64 {
        fs::read_to_string(self.directory.join(name)).unwrap().trim().parse().unwrap()
    }

    fn limit(&self, controller: &str, limit: u64) {
        let file = self.directory.join(limit_of(controller, self.is_version_2));
        fs::write(file, limit.to_string()).unwrap();
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Processes that have been killed leave it a moment later.
        eventually("an empty group", || {
            let removed = fs::remove_dir(&self.directory);
            (removed.is_ok() || !self.directory.exists()).then_some(())
        });
    }
}

fn limit_of(controller: &str, is_version_2: bool) -> &'static str {
    match (controller, is_version_2) {
        ("pids", _) => "pids.max",
        (_, true) => "memory.max",
        (_, false) => "memory.limit_in_bytes",
    }
}

fn check(server: &Server) -> Run {
    let mut command = Command::new(HANDOVER);
    command.args(["check", "--pid", &server.first_pid().to_string()]);
    run(command)
}

#[test]
fn memory_for_two_is_looked_for() {
    const STATE_BYTES: u64 = 32 << 20;
    let Some(group) = Group::new("memory") else { return };
    let server = group.start(&["--state-bytes", &STATE_BYTES.to_string()]);
    let used = group.read(if group.is_version_2 { "memory.current" } else { "memory.usage_in_bytes" });
    group.limit("memory", used + STATE_BYTES / 4);
    let run = check(&server).exits_with(0).says(&format!("the control group {}", group.directory.display()));
    let line = run.stdout.lines().find(|line| line.contains("the control group")).unwrap();
    assert!(line.starts_with("warning  process ") && line.contains("a second one as large does not fit"), "{line}");
    assert!(line.contains("MemoryMax="), "{line}");
    group.limit("memory", 4 * (used + STATE_BYTES));
    let run = check(&server).exits_with(0);
    let line = run.stdout.lines().find(|line| line.contains("has room for a second copy")).unwrap();
    assert!(line.starts_with("ok       process "), "{line}");
    server.upgrade(&[]).exits_with(0);
}

/// Not its own, of which there will be no second: what it runs is many times as large.
#[test]
fn of_a_supervisor_the_memory_of_what_it_runs_is_looked_at() {
    const STATE_BYTES: u64 = 32 << 20;
    let Some(group) = Group::new("memory") else { return };
    let supervisor = [HANDOVER, "exec", "--trial", "100ms", "--listen", "http=127.0.0.1:0", "--workers", "2", "--"];
    let server = group.start_below(&supervisor, &["--state-bytes", &STATE_BYTES.to_string()]);
    let used = group.read(if group.is_version_2 { "memory.current" } else { "memory.usage_in_bytes" });
    // Room for one of them, and not for both.
    group.limit("memory", used + STATE_BYTES + STATE_BYTES / 2);
    let run = check(&server).exits_with(0);
    let line = run.stdout.lines().find(|line| line.contains("the control group")).unwrap();
    assert!(line.starts_with("warning  process ") && line.contains("a second one as large does not fit"), "{line}");
    group.limit("memory", 4 * (used + STATE_BYTES));
    check(&server).exits_with(0).says("has room for a second copy");
}

/// Two generations live in the group for a while. The new one wants more than there is: it is by far the largest, and so the
/// one that the kernel ends; the old one serves on. It has nothing to do meanwhile: where it asks for memory at that very
/// moment the kernel may end it as well.
#[test]
fn a_new_build_that_takes_all_the_memory() {
    let Some(group) = Group::new("memory") else { return };
    let server = group.start(&[]);
    let old = server.first_pid();
    let _ = server.settled_holdings(old);
    let used = group.read(if group.is_version_2 { "memory.current" } else { "memory.usage_in_bytes" });
    group.limit("memory", used + (128 << 20));
    let run = server.upgrade_with_fault("eats-mebibytes=1024", &[]).exits_with(1);
    run.complains("was killed by SIGKILL before it was ready")
        .complains("out of memory? `dmesg` tells")
        .complains("serves on");
    server.assert_only(old);
    assert_eq!(server.answerer().generation, 1);
    server.upgrade(&[]).exits_with(0);
}

#[test]
fn tasks_for_two_are_looked_for() {
    let Some(group) = Group::new("pids") else { return };
    let server = group.start(&[]);
    let _ = server.settled_holdings(server.first_pid());
    let tasks = group.read("pids.current");
    let about = format!("the control group {} has room for", group.directory.display());
    group.limit("pids", tasks);
    check(&server).exits_with(1).says("problem  process ").says(&format!("{about} 0 more tasks (limit {tasks})"));
    server.upgrade(&[]).exits_with(1).complains("out of processes or memory").complains("serves on");
    group.limit("pids", tasks + 1);
    check(&server).exits_with(0).says("warning  process ").says(&format!("{about} 1 more tasks"));
    group.limit("pids", 10 * tasks);
    assert!(!check(&server).exits_with(0).stdout.contains("more tasks"));
    server.upgrade(&[]).exits_with(0);
}
