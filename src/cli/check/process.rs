//! The running process: does it answer, and has it the fds, the memory, the tasks and the directory for a second one?

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use handover::ErrorKind;
use handover::control::{Client, State, Status, Target};

use super::proc_files::{bytes, effective_id, field, groups, has_signal, soft_limit, variable};
use super::{Findings, cgroup, same_file};

const PATIENCE: Duration = Duration::from_secs(3);
/// What an upgrade opens in the old process: channel, stderr, pidfd, state, the client that asks.
const FDS_OF_UPGRADE: u64 = 10;
/// What a new process has open beside its listeners before it serves.
const FDS_OF_START: u64 = 32;
const MIB: u64 = 1 << 20;
/// More are not looked at.
const PROCESSES_MAX: usize = 1024;

/// A process as far as this user may look at it.
#[derive(Debug)]
pub(super) struct Process {
    pub(super) pid: i32,
    /// What it says of itself, if it answers.
    pub(super) status: Option<Status>,
    /// `/proc/PID/status`.
    proc_status: String,
    environ: Vec<u8>,
}

impl Process {
    fn new(pid: i32, status: Option<Status>) -> Self {
        let proc_status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let environ = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        Self { pid, status, proc_status, environ }
    }

    /// What an upgrade would start.
    pub(super) fn program(&self) -> Option<PathBuf> {
        self.status.as_ref().map(|status| status.program.clone())
    }

    /// It is `handover exec`, and what serves runs below it.
    pub(super) fn supervises(&self) -> bool {
        self.status.as_ref().is_some_and(|status| !status.workers.is_empty())
    }

    /// `/proc/PID/status` of all that an upgrade would double: the process, or the workers of a supervisor with what they have
    /// started. `None`: those are known by other numbers there than here.
    fn doubled(&self) -> Option<Vec<String>> {
        let Some(status) = self.status.as_ref().filter(|status| !status.workers.is_empty()) else {
            return Some(vec![self.proc_status.clone()]);
        };
        let serves = status.workers.iter().filter(|worker| worker.state != State::Draining);
        let mut pids: Vec<i32> = serves.filter_map(|worker| worker.pid).collect();
        if status.pid != self.pid {
            return None;
        }
        let mut looked_at = 0;
        while let Some(pid) = pids.get(looked_at).copied().filter(|_| looked_at < PROCESSES_MAX) {
            looked_at += 1;
            let children = children(pid).into_iter().filter(|child| !pids.contains(child)).collect::<Vec<_>>();
            pids.extend(children);
        }
        let read = |pid: &i32| fs::read_to_string(format!("/proc/{pid}/status")).ok();
        Some(pids.iter().filter_map(read).collect())
    }

    pub(super) fn uid(&self) -> Option<u32> {
        effective_id(&self.proc_status, "Uid")
    }

    pub(super) fn gid(&self) -> Option<u32> {
        effective_id(&self.proc_status, "Gid")
    }

    pub(super) fn groups(&self) -> Vec<u32> {
        groups(&self.proc_status)
    }

    pub(super) fn variable(&self, name: &str) -> Option<Vec<u8>> {
        variable(&self.environ, name)
    }

    pub(super) fn catches(&self, signal: i32) -> bool {
        has_signal(&self.proc_status, "SigCgt", signal)
    }

    pub(super) fn ignores(&self, signal: i32) -> bool {
        has_signal(&self.proc_status, "SigIgn", signal)
    }

    /// A path as this process sees it, which may be another file than what is there for us.
    pub(super) fn seen_by_it(&self, path: &Path) -> PathBuf {
        let relative = path.strip_prefix("/").unwrap_or(path);
        PathBuf::from(format!("/proc/{}/root", self.pid)).join(relative)
    }
}

fn children(pid: i32) -> Vec<i32> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let texts = threads.filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok());
    texts
        .flat_map(|text| text.split_ascii_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>())
        .collect()
}

/// Looks at a process, and at what it would start if `starts_its_own`. `None`: there is none that could be upgraded.
pub(super) fn check(target: &Target, starts_its_own: bool, findings: &mut Findings) -> Option<Process> {
    let process = ask(target, findings)?;
    check_fds(&process, findings);
    check_memory(&process, findings);
    check_tasks(&process, findings);
    check_directory(&process, findings);
    if starts_its_own {
        check_build(&process, findings);
    }
    check_signals(&process, findings);
    Some(process)
}

fn ask(target: &Target, findings: &mut Findings) -> Option<Process> {
    let client = match Client::connect(target).and_then(|client| client.patience(PATIENCE)) {
        Ok(client) => client,
        Err(error) => {
            findings.failure(error.to_string());
            // One that we may not ask can still be looked at.
            let pid = matches!(target, Target::Pid(_)) && error.kind() == ErrorKind::NotPermitted;
            let Target::Pid(number) = target else { return None };
            return pid.then(|| Process::new(*number, None));
        }
    };
    let pid = client.pid();
    match client.status() {
        Ok(status) => {
            judge_state(pid, &status, findings);
            Some(Process::new(pid, Some(status)))
        }
        Err(error) => {
            findings.failure(error.to_string());
            Some(Process::new(pid, None))
        }
    }
}

/// All that is made of what a process says of itself.
#[cfg(any(test, fuzzing))]
pub(super) fn judge_told(status: &Status, findings: &mut Findings) {
    let pid = status.pid;
    judge_state(pid, status, findings);
    let (listeners, connections) = (status.listeners.len() as u64, status.connections.open as u64);
    judge_fds(Fds { pid, limit: 1024, open: 10, listeners, connections }, findings);
    let process = Process { pid, status: Some(status.clone()), proc_status: String::new(), environ: vec![] };
    super::fuzz::judge_with(&process, findings);
}

fn judge_state(pid: i32, status: &Status, findings: &mut Findings) {
    let state = status.state;
    match state {
        State::Serving => {
            findings.ok(format!("process {pid} answers: generation {}, {state}", status.generation));
        }
        State::Upgrading | State::Trial => {
            findings.warning(format!("an upgrade of process {pid} is under way"), "wait until it is over");
        }
        State::Starting => {
            findings.problem(format!("process {pid} is still starting up"), "wait until it serves");
        }
        _ => findings.problem(
            format!("process {pid} is {state}, and will not be upgraded any more"),
            "`handover ps` shows the one that serves",
        ),
    }
    let draining = status.draining.len();
    if let Some(limits) = status.limits.filter(|limits| draining >= limits.max_draining) {
        let pids: Vec<String> = status.draining.iter().map(|older| older.pid.to_string()).collect();
        findings.problem(
            format!(
                "{draining} older generations still drain (pid {}), and at most {} may",
                pids.join(", "),
                limits.max_draining
            ),
            "wait, or end one of them: `handover stop --pid N --drain-timeout 1s`",
        );
    }
}

fn check_fds(process: &Process, findings: &mut Findings) {
    let pid = process.pid;
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap_or_default();
    let open = fs::read_dir(format!("/proc/{pid}/fd")).map(|entries| entries.count() as u64);
    let (Some(limit), Ok(open)) = (soft_limit(&limits, "Max open files"), open) else { return };
    let (listeners, connections) = match &process.status {
        Some(status) => (status.listeners.len() as u64, status.connections.open as u64),
        None => (0, 0),
    };
    judge_fds(Fds { pid, limit, open, listeners, connections }, findings);
}

struct Fds {
    pid: i32,
    /// Which the new process inherits.
    limit: u64,
    open: u64,
    listeners: u64,
    connections: u64,
}

fn judge_fds(fds: Fds, findings: &mut Findings) {
    let Fds { pid, limit, open, listeners, connections } = fds;
    let old = open.saturating_add(FDS_OF_UPGRADE);
    let new = listeners.saturating_add(FDS_OF_START);
    // The process may say anything of itself; no kernel gives it more than this.
    let mend = |wanted: u64| {
        let wanted = wanted.saturating_mul(2).clamp(1024, 1 << 30).next_power_of_two();
        format!("LimitNOFILE={wanted} in the unit; `prlimit --pid {pid} --nofile={wanted}:{wanted}` until then")
    };
    if old > limit {
        let cause = format!("{open} of {limit} fds are open, and an upgrade needs up to {FDS_OF_UPGRADE} more");
        findings.problem(cause, mend(old));
    } else if new > limit {
        let cause = format!("{listeners} listeners do not fit into the {limit} fds that the new process may have");
        findings.problem(cause, mend(new));
    } else if connections.saturating_add(new) > limit / 5 * 4 {
        let cause = format!(
            "{limit} fds are few for {listeners} listeners and as many connections as are open now ({connections})"
        );
        findings.warning(cause, mend(connections.saturating_add(new)));
    } else if limit == u64::MAX {
        findings.ok(format!("{open} fds are open, without a limit"));
    } else {
        findings.ok(format!("{open} of {limit} fds are open"));
    }
}

fn check_memory(process: &Process, findings: &mut Findings) {
    let Some(doubled) = process.doubled() else {
        return findings.warning(
            format!("the memory and the tasks of what process {} runs were not looked at", process.pid),
            "check from inside its container",
        );
    };
    let private: Vec<u64> = doubled.iter().filter_map(|status| bytes(status, "RssAnon")).collect();
    if private.is_empty() {
        return;
    }
    let private = private.into_iter().fold(0, u64::saturating_add);
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let machine = bytes(&meminfo, "MemAvailable").map(|left| (left, "this machine".to_owned(), "free some"));
    let group = cgroup::memory(process.pid).map(|room| {
        let place = format!("the control group {} (limit {} MiB)", room.group.display(), room.limit / MIB);
        (room.left, place, "MemoryMax= in the unit must hold two copies for the time of an upgrade")
    });
    let Some((left, place, mend)) = machine.into_iter().chain(group).min_by_key(|(left, ..)| *left) else { return };
    judge_memory(private, left, &place, mend, findings);
}

fn judge_memory(private: u64, left: u64, place: &str, mend: &str, findings: &mut Findings) {
    let (has, room) = (private.div_ceil(MIB), left / MIB);
    if private > left {
        findings.warning(
            format!(
                "{place} has room for {room} MiB, and what serves has {has} MiB: a second one as large does not fit"
            ),
            mend,
        );
    } else {
        findings.ok(format!("{place} has room for a second copy: {room} MiB for {has} MiB"));
    }
}

fn check_tasks(process: &Process, findings: &mut Findings) {
    let Some(doubled) = process.doubled() else { return };
    let threads =
        doubled.iter().filter_map(|status| field(status, "Threads")?.parse().ok()).fold(0, u64::saturating_add);
    if let Some(room) = cgroup::tasks(process.pid).filter(|_| threads > 0) {
        judge_tasks(threads, &room, findings);
    }
}

fn judge_tasks(threads: u64, room: &cgroup::Room, findings: &mut Findings) {
    let group = room.group.display();
    let cause = format!(
        "the control group {group} has room for {} more tasks (limit {}), and what serves has {threads} threads",
        room.left, room.limit
    );
    let mend = "a higher TasksMax= in the unit";
    match room.left {
        0 => findings.problem(cause, mend),
        left if left < threads => findings.warning(cause, mend),
        _ => {}
    }
}

/// The directory by the path that an upgrade uses; an old library does not tell it.
fn check_directory(process: &Process, findings: &mut Findings) {
    let told = process.status.as_ref().map(|status| status.directory.clone());
    let real = || fs::read_link(format!("/proc/{}/cwd", process.pid)).ok();
    let Some(directory) = told.filter(|path| !path.as_os_str().is_empty()).or_else(real) else { return };
    match process.seen_by_it(&directory).is_dir() {
        true => findings.ok(format!("its working directory {} is there", directory.display())),
        false => findings.problem(
            format!("its working directory {} is gone, and a new process starts there", directory.display()),
            "make it again, or name another with `handover upgrade --cwd`",
        ),
    }
}

/// Whether the path leads to the build that runs.
fn check_build(process: &Process, findings: &mut Findings) {
    let Some(status) = &process.status else { return };
    let runs = PathBuf::from(format!("/proc/{}/exe", process.pid));
    let named = process.seen_by_it(&status.program);
    // One that is missing is a finding about the binary.
    if !named.exists() || !runs.exists() {
        return;
    }
    let program = status.program.display();
    let is_what_runs = match process.supervises() {
        true => {
            let build = (status.build.device, status.build.inode);
            fs::metadata(&named).is_ok_and(|file| (file.dev(), file.ino()) == build)
        }
        false => same_file(&named, &runs),
    };
    match is_what_runs {
        true => findings.ok(format!("{program} is the build that runs: an upgrade starts it again")),
        false => findings.ok(format!("{program} is another build than the one that runs: an upgrade starts it")),
    }
}

/// A signal that nothing catches would end the process.
fn check_signals(process: &Process, findings: &mut Findings) {
    if process.proc_status.is_empty() {
        return;
    }
    let upgrades = [("SIGUSR2", libc::SIGUSR2), ("SIGHUP", libc::SIGHUP)];
    let deadly = |signal: i32| !process.catches(signal) && !process.ignores(signal);
    let caught: Vec<&str> = upgrades.iter().filter(|(_, one)| process.catches(*one)).map(|(name, _)| *name).collect();
    let deadly: Vec<&str> = upgrades.iter().filter(|(_, one)| deadly(*one)).map(|(name, _)| *name).collect();
    if !caught.is_empty() {
        findings.ok(format!("it catches {}", caught.join(" and ")));
    }
    if !deadly.is_empty() {
        findings.warning(
            format!("{} would end it: it has no handler", deadly.join(" or ")),
            "upgrade with the command, and send it no such signal",
        );
    }
}

#[cfg(test)]
mod tests {
    use super::super::Level;
    use super::*;

    fn judged(judge: impl FnOnce(&mut Findings)) -> Vec<(Level, String)> {
        let mut findings = Findings::about("process");
        judge(&mut findings);
        let text = |mend: Option<String>| mend.unwrap_or_default();
        findings.all.into_iter().map(|one| (one.level, one.message + " " + &text(one.mend))).collect()
    }

    #[test]
    fn fds_must_do_for_both() {
        let judge = |limit, open, listeners, connections| {
            judged(|findings| judge_fds(Fds { pid: 1, limit, open, listeners, connections }, findings)).remove(0)
        };
        assert_eq!(judge(1024, 20, 3, 10).0, Level::Ok);
        assert_eq!(judge(u64::MAX, 20, 3, 10), (Level::Ok, "20 fds are open, without a limit ".to_owned()));
        let (level, text) = judge(1024, 1020, 3, 1000);
        assert!(level == Level::Problem && text.contains("1020 of 1024 fds are open"), "{text}");
        assert!(text.contains("LimitNOFILE=4096") && text.contains("prlimit --pid 1 --nofile=4096:4096"), "{text}");
        let (level, text) = judge(1024, 900, 1000, 0);
        assert!(level == Level::Problem && text.contains("1000 listeners do not fit"), "{text}");
        assert_eq!(judge(1024, 900, 3, 850).0, Level::Warning);
        // What a process says of itself may be anything.
        assert_eq!(judge(1024, 900, u64::MAX, u64::MAX).0, Level::Problem);
        assert_eq!(judge(u64::MAX, 900, 3, u64::MAX).0, Level::Warning);
    }

    #[test]
    fn memory_is_compared_with_what_is_left() {
        let judge = |private, left| judged(|findings| judge_memory(private, left, "x", "y", findings)).remove(0);
        assert_eq!(judge(10 * MIB, 11 * MIB).0, Level::Ok);
        let (level, text) = judge(10 * MIB, 9 * MIB);
        assert!(level == Level::Warning && text.contains("room for 9 MiB, and what serves has 10 MiB"), "{text}");
    }

    #[test]
    fn tasks_must_be_left() {
        let judge = |left| {
            let room = cgroup::Room { left, limit: 10, group: "/g".into() };
            judged(|findings| judge_tasks(4, &room, findings)).pop().map(|(level, _)| level)
        };
        assert_eq!((judge(0), judge(3), judge(4)), (Some(Level::Problem), Some(Level::Warning), None));
    }
}
