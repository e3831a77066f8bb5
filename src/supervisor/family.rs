//! A worker with everything that it has started: `npm start` is three processes, and the last of them serves.

use std::fs;
use std::io;
use std::path::PathBuf;

use nix::unistd::Pid;

use crate::control::state_of;

/// More are not looked at.
const PROCESSES_MAX: usize = 1024;

/// The process and its descendants, as far as they can be seen. One that was orphaned is not among them any more.
pub(super) fn of(root: Pid) -> Vec<Pid> {
    let mut family = vec![root];
    let _ = extend(&mut family).and_then(|()| extend(&mut family));
    family
}

/// The inodes of the sockets of a worker and of all that it has started, as far as they can be seen.
pub(super) fn sockets(worker: Pid) -> Vec<u64> {
    let fds = of(worker).into_iter().filter_map(|pid| fds(pid).ok()).flatten();
    fds.filter_map(|(_, link)| socket_inode(&link)).collect()
}

/// The same, if nothing is left out and the worker lives.
pub(super) fn all_sockets(worker: Pid) -> io::Result<Vec<u64>> {
    let worker = living_thread(worker);
    let mut family = vec![worker];
    extend(&mut family)?;
    extend(&mut family)?;
    if family.len() >= PROCESSES_MAX {
        return Err(io::Error::other("it has started too many processes"));
    }
    let mut sockets = vec![];
    for pid in family {
        match fds(pid) {
            // One that has ended and was not waited for has none, and is root's.
            Err(_) if has_ended(pid) => {}
            fds => sockets.extend(fds?.iter().filter_map(|(_, link)| socket_inode(link))),
        }
    }
    // It may have ended meanwhile.
    if has_fds(worker) { Ok(sockets) } else { Err(io::Error::other("it has ended")) }
}

/// By all descendants of the first that are not in it yet. It is done twice: the kernel gives the children one by one, and one
/// that ends in between can hide the next. Those of a thread that ends become another thread's, which may have been looked at.
fn extend(family: &mut Vec<Pid>) -> io::Result<()> {
    let mut looked_at = 0;
    while let Some(pid) = family.get(looked_at).copied().filter(|_| family.len() < PROCESSES_MAX) {
        looked_at += 1;
        for thread in unless_ended(fs::read_dir(format!("/proc/{pid}/task")))?.into_iter().flatten().flatten() {
            let children = unless_ended(fs::read_to_string(thread.path().join("children")))?.unwrap_or_default();
            let others: Vec<Pid> = children_in(&children).filter(|child| !family.contains(child)).collect();
            family.extend(others);
        }
    }
    Ok(())
}

/// None: the process, or the thread, is gone.
fn unless_ended<T>(read: io::Result<T>) -> io::Result<Option<T>> {
    match read {
        Err(error) if error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH) => Ok(None),
        read => read.map(Some),
    }
}

/// In `/proc/PID/task/TID/children`.
pub(super) fn children_in(text: &str) -> impl Iterator<Item = Pid> {
    text.split_ascii_whitespace().filter_map(|text| text.parse().ok()).filter(|pid| *pid > 0).map(Pid::from_raw)
}

/// The directories of its threads in `/proc`.
pub(super) fn threads(pid: Pid) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    entries.map(|entry| entry.path())
}

/// By which `/proc` shows what a process has: its main thread, or another when that has ended, as it may (pthread_exit(3)).
pub(super) fn living_thread(pid: Pid) -> Pid {
    if !is_zombie(pid) {
        return pid;
    }
    let number = |directory: PathBuf| Some(Pid::from_raw(directory.file_name()?.to_str()?.parse().ok()?));
    threads(pid).filter_map(number).find(|thread| !is_zombie(*thread)).unwrap_or(pid)
}

fn has_ended(pid: Pid) -> bool {
    is_zombie(living_thread(pid))
}

fn is_zombie(thread: Pid) -> bool {
    state_of(thread.as_raw()).is_none_or(|state| state == 'Z')
}

/// Its fds with what they lead to.
pub(super) fn fds(pid: Pid) -> io::Result<Vec<(i32, PathBuf)>> {
    let entries = fs::read_dir(format!("/proc/{}/fd", living_thread(pid)))?.flatten();
    let fd = |entry: fs::DirEntry| Some((entry.file_name().to_str()?.parse().ok()?, fs::read_link(entry.path()).ok()?));
    Ok(entries.filter_map(fd).collect())
}

/// The kernel takes them all away at once when a thread ends, however it does.
pub(super) fn has_fds(thread: Pid) -> bool {
    fs::read_dir(format!("/proc/{thread}/fd")).is_ok_and(|mut fds| fds.next().is_some())
}

/// The inode, if the link is one of a socket.
pub(super) fn socket_inode(link: &std::path::Path) -> Option<u64> {
    link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};
    use std::os::unix::process::CommandExt;
    use std::process::{Command, Stdio};

    #[test]
    fn whoever_is_known_is_not_counted_twice() {
        let script = "sh -c 'sleep 60 & echo; wait' & wait";
        let mut shell =
            Command::new("sh").args(["-c", script]).stdout(Stdio::piped()).process_group(0).spawn().unwrap();
        BufReader::new(shell.stdout.take().unwrap()).read_line(&mut String::new()).unwrap();
        let root = Pid::from_raw(shell.id().cast_signed());
        let mut family = vec![root];
        extend(&mut family).unwrap();
        let once = family.clone();
        extend(&mut family).unwrap();
        assert_eq!((once.len(), once), (3, family));
        nix::sys::signal::killpg(root, nix::sys::signal::Signal::SIGKILL).unwrap();
        shell.wait().unwrap();
    }
}
