//! Whether a program is *seen* to wait for connections: the proof of readiness of one that says nothing.
//!
//! Looked at from outside, in `/proc`: an epoll set that holds the listener, or a thread blocked in `accept`, `poll`,
//! `select` or, for datagrams, `recv` on it. One that has so much to do that it is never blocked is seen to have accepted
//! a connection. What cannot be seen is io_uring, and a program of another user when this
//! one has not the rights of a debugger (`ptrace(2)`); such a program has to say that it is ready.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::unistd::Pid;

use super::{connections, family};
use crate::listeners::Address;

const EPOLLIN: u32 = libc::EPOLLIN as u32;
/// `poll` and `select` with more are not read through.
const POLLED_MAX: usize = 4096;
/// Listeners of which a program can have too much to do to be seen waiting.
const BUSY_MAX: usize = 8;

/// A socket that a program is to wait on.
#[derive(Debug)]
pub(super) struct Watched {
    pub(super) name: String,
    /// By which it is known in `/proc`.
    pub(super) inode: u64,
    /// As the kernel names it.
    pub(super) address: Address,
    /// Otherwise it counts only where the program has it.
    pub(super) is_awaited: bool,
}

/// What was seen of one worker.
#[derive(Debug, Default)]
pub(super) struct Look {
    /// Of the inodes asked for, those that are waited on.
    pub(super) waited_on: Vec<u64>,
    /// And those that it has.
    pub(super) held: Vec<u64>,
    /// Some of it could not be looked at.
    pub(super) denied: Option<io::Error>,
}

impl Look {
    /// At a worker and all that it has started.
    pub(super) fn at(worker: Pid, inodes: &[u64]) -> Self {
        let mut look = Self::default();
        for pid in family::of(worker) {
            if let Err(error) = look.at_process(pid, inodes) {
                // One that has just ended is no obstacle.
                if error.kind() == io::ErrorKind::PermissionDenied {
                    look.denied = Some(error);
                }
            }
        }
        look
    }

    /// And at connections that it has accepted, which takes longer: not where a great many are missing.
    pub(super) fn at_connections(&mut self, worker: Pid, watched: &[&Watched]) {
        let missing: Vec<&&Watched> = watched.iter().filter(|one| !self.waited_on.contains(&one.inode)).collect();
        for one in missing.iter().filter(|_| missing.len() <= BUSY_MAX) {
            if connections::open(&[worker], std::slice::from_ref(&one.address)) != [0] {
                self.waited_on.push(one.inode);
            }
        }
    }

    fn at_process(&mut self, pid: Pid, inodes: &[u64]) -> io::Result<()> {
        let pid = family::living_thread(pid);
        let fds = family::fds(pid)?;
        let inode = |link: &Path| family::socket_inode(link).filter(|inode| inodes.contains(inode));
        let held: BTreeMap<i32, u64> = fds.iter().filter_map(|(fd, link)| Some((*fd, inode(link)?))).collect();
        if held.is_empty() {
            return Ok(());
        }
        self.held.extend(held.values());
        for (fd, _) in fds.iter().filter(|(_, link)| link.as_os_str() == "anon_inode:[eventpoll]") {
            let text = fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}")).unwrap_or_default();
            self.waited_on.extend(in_epoll_set(&text).filter(|inode| inodes.contains(inode)));
        }
        for thread in family::threads(pid) {
            let text = fs::read_to_string(thread.join("syscall"))?;
            let waits = system_call(&text).map(|call| fds_waited_for(&call, pid)).unwrap_or_default();
            self.waited_on.extend(waits.iter().filter_map(|fd| held.get(fd)));
        }
        Ok(())
    }
}

/// Inodes in an epoll set that are waited on for reading (`fdinfo` of the set, proc(5)).
fn in_epoll_set(fdinfo: &str) -> impl Iterator<Item = u64> {
    fdinfo.lines().filter(|line| line.starts_with("tfd:")).filter_map(|line| {
        let mut words = line.split_ascii_whitespace();
        let events = words.by_ref().skip_while(|word| *word != "events:").nth(1)?;
        let inode = words.find_map(|word| word.strip_prefix("ino:"))?;
        let reads = u32::from_str_radix(events, 16).ok()? & EPOLLIN != 0;
        u64::from_str_radix(inode, 16).ok().filter(|_| reads)
    })
}

/// The number of the system call that a thread is blocked in, and its arguments.
struct SystemCall {
    number: i64,
    arguments: [u64; 6],
}

/// None while the thread runs.
fn system_call(text: &str) -> Option<SystemCall> {
    let mut words = text.split_ascii_whitespace();
    let number = words.next()?.parse().ok()?;
    let mut arguments = [0; 6];
    for argument in &mut arguments {
        *argument = u64::from_str_radix(words.next()?.strip_prefix("0x")?, 16).ok()?;
    }
    Some(SystemCall { number, arguments })
}

fn fds_waited_for(call: &SystemCall, pid: Pid) -> Vec<i32> {
    let [first, second, ..] = call.arguments;
    let poll = |count: u64, array: u64| polled(pid, usize::try_from(count).unwrap_or_default(), array);
    let select = |count: u64, set: u64| selected(pid, usize::try_from(count).unwrap_or_default(), set);
    match call.number {
        libc::SYS_accept | libc::SYS_accept4 | libc::SYS_recvfrom | libc::SYS_recvmsg | libc::SYS_recvmmsg => {
            i32::try_from(first).into_iter().collect()
        }
        libc::SYS_ppoll => poll(second, first),
        libc::SYS_pselect6 => select(first, second),
        #[cfg(target_arch = "x86_64")]
        libc::SYS_poll => poll(second, first),
        #[cfg(target_arch = "x86_64")]
        libc::SYS_select => select(first, second),
        _ => vec![],
    }
}

/// The fds of an array of `pollfd` in another process.
fn polled(pid: Pid, count: usize, address: u64) -> Vec<i32> {
    let bytes = memory(pid, address, count.min(POLLED_MAX) * 8).unwrap_or_default();
    let entries = bytes.chunks_exact(8).filter_map(|entry| {
        let fd = i32::from_ne_bytes(entry.get(..4)?.try_into().ok()?);
        let events = i16::from_ne_bytes(entry.get(4..6)?.try_into().ok()?);
        (events & libc::POLLIN != 0).then_some(fd)
    });
    entries.collect()
}

/// The fds of an `fd_set` in another process.
fn selected(pid: Pid, count: usize, address: u64) -> Vec<i32> {
    let count = count.min(libc::FD_SETSIZE);
    let bytes = memory(pid, address, count.div_ceil(64) * 8).unwrap_or_default();
    let is_set = |fd: &usize| {
        let word = bytes.get(fd / 64 * 8..fd / 64 * 8 + 8).and_then(|word| word.try_into().ok());
        word.is_some_and(|word| u64::from_ne_bytes(word) >> (fd % 64) & 1 == 1)
    };
    (0..count).filter(is_set).filter_map(|fd| i32::try_from(fd).ok()).collect()
}

fn memory(pid: Pid, address: u64, length: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; length];
    File::open(format!("/proc/{pid}/mem"))?.read_exact_at(&mut bytes, address)?;
    Ok(bytes)
}

/// `fdinfo` of an epoll set, and what a thread waits in.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    assert!(in_epoll_set(&text).count() <= text.lines().count());
    assert!(family::children_in(&text).all(|pid| pid.as_raw() > 0));
    if let Some(call) = system_call(&text) {
        // Of this process, so that its memory may be read, wherever that is.
        assert!(fds_waited_for(&call, Pid::this()).len() <= POLLED_MAX.max(libc::FD_SETSIZE));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::garbled::garbled;
    use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
    use nix::sys::select::{FdSet, select};
    use std::net::{TcpListener, UdpSocket};
    use std::os::fd::AsFd;
    use std::thread;
    use std::time::{Duration, Instant};

    fn waited_on(inode: u64) -> bool {
        let mut look = Look::default();
        look.at_process(Pid::this(), &[inode]).unwrap();
        look.waited_on.contains(&inode)
    }

    fn inode(socket: impl AsFd) -> u64 {
        nix::sys::stat::fstat(socket).unwrap().st_ino
    }

    #[track_caller]
    fn is_seen(inode: u64) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while !waited_on(inode) {
            assert!(Instant::now() < deadline);
            thread::yield_now();
        }
    }

    #[test]
    fn a_listener_in_an_epoll_set_for_reading_is_seen() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
        assert!(!waited_on(inode(&listener)));
        epoll.add(&listener, EpollEvent::new(EpollFlags::EPOLLOUT, 0)).unwrap();
        assert!(!waited_on(inode(&listener)));
        epoll.modify(&listener, &mut EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 0)).unwrap();
        assert!(waited_on(inode(&listener)));
    }

    #[test]
    fn a_thread_in_each_of_the_blocking_calls_is_seen() {
        let wake = |listener: &TcpListener| drop(std::net::TcpStream::connect(listener.local_addr().unwrap()));
        let ways: [fn(&TcpListener); 3] = [
            |listener| drop(listener.accept().unwrap()),
            |listener| assert!(crate::poll::wait(listener.as_fd(), nix::poll::PollFlags::POLLIN, None).unwrap()),
            |listener| {
                let mut set = FdSet::new();
                set.insert(listener.as_fd());
                select(None, &mut set, None, None, None).unwrap();
            },
        ];
        for way in ways {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            thread::scope(|scope| {
                scope.spawn(|| way(&listener));
                is_seen(inode(&listener));
                wake(&listener);
            });
            assert!(!waited_on(inode(&listener)));
        }
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        thread::scope(|scope| {
            scope.spawn(|| socket.recv_from(&mut [0; 8]).unwrap());
            is_seen(inode(&socket));
            socket.send_to(b"x", socket.local_addr().unwrap()).unwrap();
        });
    }

    proptest::proptest! {
        #[test]
        fn any_text_of_proc_is_read(
            set in garbled(vec![b"tfd:        5 events:       19 data:  5  pos:0 ino:1a2b sdev:8\n".to_vec()]),
            call in garbled(vec![b"232 0x4 0x7ffd 0x400 0xffffffff 0x0 0x8 0x7ffe 0x7fff\n".to_vec()])
        ) {
            let _ = in_epoll_set(&String::from_utf8_lossy(&set)).count();
            if let Some(call) = system_call(&String::from_utf8_lossy(&call)) {
                // Of this process, so that its memory may be read, wherever that is.
                let _ = fds_waited_for(&call, Pid::this());
            }
        }
    }
}
