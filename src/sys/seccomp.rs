//! System calls of another process, decided on by this one: seccomp(2) with user notification, seccomp_unotify(2).
//!
//! The filter is a few instructions of classic BPF that look at nothing but the number of the call, so that the kernel
//! remembers for every other number that it is allowed (its per-filter bitmap, Linux 5.11) and does not run it at all.
//! Only of `shutdown` does it look at what is shut: the sending side is that of a connection.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

/// `AUDIT_ARCH_…` of the calls that are looked at, and of those of 32-bit programs.
#[cfg(target_arch = "x86_64")]
mod arch {
    pub(super) const NATIVE: u32 = 0xc000_003e;
    pub(super) const FOREIGN: u32 = 0x4000_0003;
    /// `bind`, `listen`, `socketcall`, by arch/x86/entry/syscalls/syscall_32.tbl.
    pub(super) const FOREIGN_CALLS: [u32; 3] = [361, 363, SOCKETCALL];
    pub(super) const SOCKETCALL: u32 = 102;
    pub(super) const REMOVALS: [libc::c_long; 2] = [libc::SYS_unlink, libc::SYS_unlinkat];
    /// `__X32_SYSCALL_BIT`
    pub(super) const OTHER_ABI: u32 = 0x4000_0000;
}
#[cfg(target_arch = "aarch64")]
mod arch {
    pub(super) const NATIVE: u32 = 0xc000_00b7;
    pub(super) const FOREIGN: u32 = 0x4000_0028;
    /// `bind`, `listen`, by arch/arm/tools/syscall.tbl.
    pub(super) const FOREIGN_CALLS: [u32; 2] = [282, 284];
    /// None there.
    pub(super) const SOCKETCALL: u32 = u32::MAX;
    pub(super) const REMOVALS: [libc::c_long; 1] = [libc::SYS_unlinkat];
    pub(super) const OTHER_ABI: u32 = 0;
}
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
mod arch {
    pub(super) const NATIVE: u32 = 0;
    pub(super) const FOREIGN: u32 = 0;
    pub(super) const FOREIGN_CALLS: [u32; 0] = [];
    pub(super) const SOCKETCALL: u32 = u32::MAX;
    pub(super) const REMOVALS: [libc::c_long; 0] = [];
    pub(super) const OTHER_ABI: u32 = 0;
}

/// `socketcall(2)`: its first argument, by linux/net.h.
const SOCKETCALL_BIND: u32 = 2;
const SOCKETCALL_LISTEN: u32 = 4;

/// One instruction, as `BPF_STMT` and `BPF_JUMP` make them.
fn instruction(code: u32, jump_if_true: u8, jump_if_false: u8, operand: u32) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt: jump_if_true, jf: jump_if_false, k: operand }
}

/// Loads a word of `seccomp_data`.
fn load(offset: usize) -> libc::sock_filter {
    instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, offset as u32)
}

fn answer(action: u32) -> libc::sock_filter {
    instruction(libc::BPF_RET | libc::BPF_K, 0, 0, action)
}

/// `then`, if what was loaded is `value`.
fn when(value: u32, then: &[libc::sock_filter]) -> Vec<libc::sock_filter> {
    let mut section = vec![instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, then.len() as u8, value)];
    section.extend_from_slice(then);
    section
}

/// The low half of an argument.
fn argument(index: usize) -> usize {
    let half = if cfg!(target_endian = "big") { 4 } else { 0 };
    std::mem::offset_of!(libc::seccomp_data, args) + index * 8 + half
}

fn program() -> Vec<libc::sock_filter> {
    let notify = answer(libc::SECCOMP_RET_USER_NOTIF);
    let allow = answer(libc::SECCOMP_RET_ALLOW);
    let number = load(std::mem::offset_of!(libc::seccomp_data, nr));
    let mut native = vec![number];
    native.push(instruction(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, 0, 0, !arch::OTHER_ABI));
    for call in [libc::SYS_bind, libc::SYS_listen].iter().chain(&arch::REMOVALS) {
        native.extend(when(*call as u32, &[notify]));
    }
    let mut of_shutdown = vec![load(argument(1))];
    of_shutdown.extend(when(libc::SHUT_WR as u32, &[allow]));
    of_shutdown.push(notify);
    native.extend(when(libc::SYS_shutdown as u32, &of_shutdown));
    native.push(allow);
    let mut foreign = vec![number];
    for call in arch::FOREIGN_CALLS.into_iter().filter(|call| *call != arch::SOCKETCALL) {
        foreign.extend(when(call, &[notify]));
    }
    let mut of_socketcall = vec![load(argument(0))];
    for call in [SOCKETCALL_BIND, SOCKETCALL_LISTEN] {
        of_socketcall.extend(when(call, &[notify]));
    }
    of_socketcall.push(allow);
    foreign.extend(when(arch::SOCKETCALL, &of_socketcall));
    foreign.push(allow);
    let mut program = vec![load(std::mem::offset_of!(libc::seccomp_data, arch))];
    program.extend(when(arch::NATIVE, &native));
    program.extend(when(arch::FOREIGN, &foreign));
    program.push(allow);
    program
}

/// From now on `bind`, `listen`, `shutdown` (but of the sending side), `unlink` and `unlinkat` of this thread, and of all that
/// it starts, wait for whoever has the fd that is returned.
///
/// Without CAP_SYS_ADMIN this sets no_new_privs, as the kernel demands (seccomp(2), EACCES).
pub(crate) fn install_filter() -> io::Result<OwnedFd> {
    if arch::NATIVE == 0 {
        return Err(io::Error::new(io::ErrorKind::Unsupported, "not on this processor"));
    }
    let mut instructions = program();
    let program = libc::sock_fprog {
        len: u16::try_from(instructions.len()).map_err(io::Error::other)?,
        filter: instructions.as_mut_ptr(),
    };
    let install = |flags: libc::c_ulong| -> io::Result<OwnedFd> {
        // SAFETY: the program is read during the call, and lives until after it.
        let number = Errno::result(unsafe {
            libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program)
        })?;
        let number = RawFd::try_from(number).map_err(io::Error::other)?;
        // SAFETY: the kernel returned a new fd (with CLOEXEC) that nobody else owns.
        Ok(unsafe { OwnedFd::from_raw_fd(number) })
    };
    // So that a signal does not restart a call that is being decided on (Linux 5.19).
    let best = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV;
    let either = || match install(best) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => install(libc::SECCOMP_FILTER_FLAG_NEW_LISTENER),
        result => result,
    };
    let listener = match either() {
        Err(error) if error.raw_os_error() == Some(libc::EACCES) => {
            nix::sys::prctl::set_no_new_privs()?;
            either()
        }
        result => result,
    }?;
    wake_on_the_same_processor(listener.as_fd());
    Ok(listener)
}

/// Whoever decides runs where the caller waits, which is sooner than on a processor that sleeps (Linux 6.6).
fn wake_on_the_same_processor(listener: BorrowedFd<'_>) {
    // By linux/seccomp.h; libc does not have it.
    const SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP: libc::c_ulong = 1;
    let (listener, flags) = (listener.as_raw_fd(), SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP);
    // SAFETY: the flags are a number, and no memory is touched. EINVAL by an older kernel: it goes without.
    unsafe { libc::ioctl(listener, libc::SECCOMP_IOCTL_NOTIF_SET_FLAGS, flags) };
}

/// Whether the kernel has what [`install_filter`] and [`pidfd_getfd`](super::pidfd_getfd) need, and lets this process
/// use it.
pub(crate) fn notification_is_available() -> io::Result<()> {
    let action = libc::SECCOMP_RET_USER_NOTIF;
    // SAFETY: one word is read during the call.
    let result = unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_ACTION_AVAIL, 0 as libc::c_ulong, &raw const action)
    };
    Errno::result(result)?;
    Ok(())
}

/// A call that waits for an answer.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Notification {
    id: u64,
    /// The thread that has made it.
    #[serde(with = "crate::saved::pid")]
    pub(crate) thread: Pid,
    /// None: it is one of a 32-bit program.
    pub(crate) number: Option<libc::c_long>,
    pub(crate) arguments: [u64; 6],
}

impl Notification {
    /// The next one. None: whoever has made it is gone, or was interrupted and makes it again. Blocks only if none was
    /// announced by `poll`.
    pub(crate) fn receive(listener: BorrowedFd<'_>) -> io::Result<Option<Self>> {
        // SAFETY: plain integers, for which all zeroes is a value; the kernel demands it (seccomp_unotify(2)).
        let mut request: libc::seccomp_notif = unsafe { std::mem::zeroed() };
        // SAFETY: the structure is of the size that the number of the ioctl says, and the kernel fills it.
        let result = unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_RECV, &raw mut request) };
        match Errno::result(result) {
            Ok(_) => {}
            Err(Errno::ENOENT | Errno::EINTR) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
        let is_native = request.data.arch == arch::NATIVE;
        let number = libc::c_long::from(request.data.nr) & !libc::c_long::from(arch::OTHER_ABI);
        Ok(Some(Self {
            id: request.id,
            thread: Pid::from_raw(request.pid.cast_signed()),
            number: is_native.then_some(number),
            arguments: request.data.args,
        }))
    }

    /// Whether the caller still waits. What was read of it before, by its number, was its own then.
    pub(crate) fn is_valid(&self, listener: BorrowedFd<'_>) -> bool {
        // SAFETY: the ioctl reads one u64.
        unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_ID_VALID, &raw const self.id) == 0 }
    }

    /// The kernel does what was asked for.
    pub(crate) fn let_pass(&self, listener: BorrowedFd<'_>) {
        self.respond(listener, libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32);
    }

    /// The call returns 0, and has done nothing.
    pub(crate) fn succeed(&self, listener: BorrowedFd<'_>) {
        self.respond(listener, 0);
    }

    fn respond(&self, listener: BorrowedFd<'_>, flags: u32) {
        let response = libc::seccomp_notif_resp { id: self.id, val: 0, error: 0, flags };
        // SAFETY: the structure is of the size that the number of the ioctl says, and the kernel reads it.
        let sent = unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_SEND, &raw const response) };
        // ENOENT: the caller was killed, or was interrupted and calls again.
        if let Err(error) = Errno::result(sent) {
            log::debug!("a call of thread {} was not answered: {error}", self.thread);
        }
    }

    /// Puts a copy of `fd` in the place of fd `number` of the caller, as `dup2` would (Linux 5.9).
    pub(crate) fn replace_fd(
        &self,
        listener: BorrowedFd<'_>,
        fd: BorrowedFd<'_>,
        number: RawFd,
        cloexec: bool,
    ) -> io::Result<()> {
        let request = libc::seccomp_notif_addfd {
            id: self.id,
            flags: libc::SECCOMP_ADDFD_FLAG_SETFD as u32,
            srcfd: fd.as_raw_fd().cast_unsigned(),
            newfd: number.cast_unsigned(),
            newfd_flags: if cloexec { libc::O_CLOEXEC.cast_unsigned() } else { 0 },
        };
        // SAFETY: the structure is of the size that the number of the ioctl says, and the kernel reads it; both fds are
        // open for as long as their borrows.
        let result = unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_ADDFD, &raw const request) };
        Errno::result(result)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::poll::wait;
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use socket2::{Domain, SockRef, Socket, Type};
    use std::net::{SocketAddr, TcpListener};
    use std::os::fd::AsFd;
    use std::sync::mpsc;
    use std::thread;

    const ALLOWED: u32 = libc::SECCOMP_RET_ALLOW;
    const ASKED: u32 = libc::SECCOMP_RET_USER_NOTIF;

    /// What the kernel makes of a call.
    fn verdict(arch: u32, number: u32, argument: u32) -> u32 {
        let program = program();
        let offsets = [std::mem::offset_of!(libc::seccomp_data, nr), std::mem::offset_of!(libc::seccomp_data, arch)];
        let (mut next, mut loaded) = (0, 0);
        loop {
            let instruction = program[next];
            next += 1;
            match u32::from(instruction.code) & 0x07 {
                libc::BPF_LD if instruction.k as usize == offsets[0] => loaded = number,
                libc::BPF_LD if instruction.k as usize == offsets[1] => loaded = arch,
                libc::BPF_LD => loaded = argument,
                libc::BPF_ALU => loaded &= instruction.k,
                libc::BPF_JMP => {
                    next += usize::from(if loaded == instruction.k { instruction.jt } else { instruction.jf });
                }
                _ => return instruction.k,
            }
        }
    }

    #[test]
    fn only_what_concerns_listeners_is_asked_about() {
        let native = |number: libc::c_long| verdict(arch::NATIVE, number as u32, 0);
        for call in [libc::SYS_bind, libc::SYS_listen].iter().chain(&arch::REMOVALS).copied() {
            assert_eq!(native(call), ASKED);
            assert_eq!(verdict(arch::NATIVE, call as u32 | arch::OTHER_ABI, 0), ASKED);
            assert_eq!(verdict(0x1234, call as u32, 0), ALLOWED);
        }
        for call in [libc::SYS_accept4, libc::SYS_connect, libc::SYS_getppid, -1] {
            assert_eq!(native(call), ALLOWED);
        }
        for (side, wanted) in [(libc::SHUT_RD, ASKED), (libc::SHUT_WR, ALLOWED), (libc::SHUT_RDWR, ASKED)] {
            assert_eq!(verdict(arch::NATIVE, libc::SYS_shutdown as u32, side as u32), wanted);
        }
        let foreign = |number, argument| verdict(arch::FOREIGN, number, argument);
        for call in arch::FOREIGN_CALLS.into_iter().filter(|call| *call != arch::SOCKETCALL) {
            assert_eq!(foreign(call, 0), ASKED);
        }
        for (argument, wanted) in [(SOCKETCALL_BIND, ASKED), (3, ALLOWED), (SOCKETCALL_LISTEN, ASKED)] {
            assert!(arch::SOCKETCALL == u32::MAX || foreign(arch::SOCKETCALL, argument) == wanted);
        }
        assert_eq!(foreign(1, SOCKETCALL_BIND), ALLOWED);
    }

    #[test]
    fn a_call_waits_and_comes_to_what_is_answered() {
        let other = TcpListener::bind("127.0.0.1:0").unwrap();
        let (sender, receiver) = mpsc::channel();
        // The filter is that thread's alone.
        let thread = thread::spawn(move || {
            sender.send(install_filter().unwrap()).unwrap();
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
            socket.listen(1).unwrap();
            let bound_and_not_listening = (socket.local_addr().unwrap(), socket.is_listener().unwrap());
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            socket.bind(&SocketAddr::from(([127, 0, 0, 1], 1)).into()).unwrap();
            (bound_and_not_listening, socket.local_addr().unwrap())
        });
        let filter = receiver.recv().unwrap();
        let next = || {
            assert!(wait(filter.as_fd(), PollFlags::POLLIN, None).unwrap());
            Notification::receive(filter.as_fd()).unwrap().unwrap()
        };
        let call = next();
        assert_eq!(call.number, Some(libc::SYS_bind));
        assert!(call.is_valid(filter.as_fd()));
        call.let_pass(filter.as_fd());
        let call = next();
        assert_eq!((call.number, call.arguments[1]), (Some(libc::SYS_listen), 1));
        call.succeed(filter.as_fd());
        assert!(!call.is_valid(filter.as_fd()));
        let call = next();
        let number = RawFd::try_from(call.arguments[0]).unwrap();
        call.replace_fd(filter.as_fd(), other.as_fd(), number, true).unwrap();
        call.succeed(filter.as_fd());
        let ((address, listens), replaced) = thread.join().unwrap();
        assert!(address.as_socket().unwrap().port() != 0 && !listens);
        assert_eq!(replaced.as_socket(), SockRef::from(&other).local_addr().unwrap().as_socket());
        let mut fds = [PollFd::new(filter.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).unwrap();
        // Nobody is left who could call.
        assert_eq!(fds[0].revents(), Some(PollFlags::POLLHUP));
    }
}
