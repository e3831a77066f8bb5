//! `posix_spawn(3)`: no code of ours runs between fork and exec, and no page table is copied.
//!
//! `std::process::Command` cannot pass an fd without `pre_exec`, which makes it fork; `nix` has no file action for the
//! working directory. Hence by hand.

use std::ffi::{CStr, CString, OsStr};
use std::io;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use nix::sys::signal::{SigSet, Signal};
use nix::unistd::Pid;

/// What to execute, with everything that the new process is to inherit.
pub(crate) struct SpawnRequest<'a> {
    pub(crate) program: CString,
    /// With argv[0].
    pub(crate) arguments: Vec<CString>,
    /// Each `NAME=value`.
    pub(crate) environment: Vec<CString>,
    pub(crate) directory: CString,
    /// Fds of this process and the numbers that they have in the new one; everything else is CLOEXEC.
    pub(crate) fds: Vec<(BorrowedFd<'a>, RawFd)>,
    pub(crate) signal_mask: SigSet,
    /// Stay ignored if this process ignores them; every other signal is at its default.
    pub(crate) ignored: SigSet,
}

/// The path that this process was executed by (`AT_EXECFN`), as whoever did that has written it.
pub(crate) fn executed_path() -> Option<PathBuf> {
    // SAFETY: the call only looks up a number among those that the kernel has left above the stack.
    let address = unsafe { libc::getauxval(libc::AT_EXECFN) };
    let text = std::ptr::with_exposed_provenance::<libc::c_char>(usize::try_from(address).ok()?);
    if text.is_null() {
        return None;
    }
    // SAFETY: the number is the address of a string that the kernel has written there at exec. It lies above arguments and
    // environment, is followed by a zero byte at the least, and stays for as long as the process.
    let text = unsafe { CStr::from_ptr(text) };
    Some(PathBuf::from(OsStr::from_bytes(text.to_bytes())))
}

/// Starts the program. The error is that of exec where exec failed.
pub(crate) fn spawn(request: &SpawnRequest<'_>) -> io::Result<Pid> {
    let mut actions = FileActions::new()?;
    for (fd, number) in &request.fds {
        actions.dup2(*fd, *number)?;
    }
    actions.chdir(&request.directory)?;
    let attributes = Attributes::new(&request.signal_mask, &request.ignored)?;
    let arguments = pointers(&request.arguments);
    let environment = pointers(&request.environment);
    let mut pid: libc::pid_t = 0;
    // SAFETY: every pointer is to memory that this function keeps alive until the call returns (the vectors are
    // terminated by null, the strings by NUL); glibc and musl copy nothing that outlives the call, because the caller
    // is suspended until the child has called exec.
    let error = unsafe {
        libc::posix_spawn(
            &raw mut pid,
            request.program.as_ptr(),
            &raw const actions.0,
            &raw const attributes.0,
            arguments.as_ptr(),
            environment.as_ptr(),
        )
    };
    check(error)?;
    Ok(Pid::from_raw(pid))
}

fn pointers(strings: &[CString]) -> Vec<*mut libc::c_char> {
    let null = std::iter::once(std::ptr::null_mut());
    strings.iter().map(|string| string.as_ptr().cast_mut()).chain(null).collect()
}

fn check(error: libc::c_int) -> io::Result<()> {
    if error == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(error)) }
}

/// With the fds that it names by number, which must be open until the spawn.
struct FileActions<'a>(libc::posix_spawn_file_actions_t, PhantomData<BorrowedFd<'a>>);

impl<'a> FileActions<'a> {
    fn new() -> io::Result<Self> {
        let mut actions = MaybeUninit::uninit();
        // SAFETY: init writes the whole value or reports an error.
        check(unsafe { libc::posix_spawn_file_actions_init(actions.as_mut_ptr()) })?;
        // SAFETY: init succeeded.
        Ok(Self(unsafe { actions.assume_init() }, PhantomData))
    }

    /// Also right when `fd` has that number already: the action then clears CLOEXEC (glibc 2.29, musl 1.1.24).
    fn dup2(&mut self, fd: BorrowedFd<'a>, number: RawFd) -> io::Result<()> {
        // SAFETY: the value was initialised; the fd is borrowed for as long as that lives.
        check(unsafe { libc::posix_spawn_file_actions_adddup2(&raw mut self.0, fd.as_raw_fd(), number) })
    }

    fn chdir(&mut self, directory: &CString) -> io::Result<()> {
        // SAFETY: the value was initialised; the path is copied by the call.
        check(unsafe { libc::posix_spawn_file_actions_addchdir_np(&raw mut self.0, directory.as_ptr()) })
    }
}

impl Drop for FileActions<'_> {
    fn drop(&mut self) {
        // SAFETY: the value was initialised and is destroyed once.
        unsafe { libc::posix_spawn_file_actions_destroy(&raw mut self.0) };
    }
}

struct Attributes(libc::posix_spawnattr_t);

impl Attributes {
    /// An ignored signal stays ignored over exec, so what this process has come to ignore is put back.
    fn new(mask: &SigSet, ignored: &SigSet) -> io::Result<Self> {
        let mut attributes = MaybeUninit::uninit();
        // SAFETY: init writes the whole value or reports an error.
        check(unsafe { libc::posix_spawnattr_init(attributes.as_mut_ptr()) })?;
        // SAFETY: init succeeded.
        let mut attributes = Self(unsafe { attributes.assume_init() });
        let defaults: SigSet = Signal::iterator().filter(|signal| !ignored.contains(*signal)).collect();
        let flags = (libc::POSIX_SPAWN_SETSIGMASK | libc::POSIX_SPAWN_SETSIGDEF) as libc::c_short;
        // SAFETY: the value was initialised; both sets are read during the calls only.
        unsafe {
            check(libc::posix_spawnattr_setsigmask(&raw mut attributes.0, mask.as_ref()))?;
            check(libc::posix_spawnattr_setsigdefault(&raw mut attributes.0, defaults.as_ref()))?;
            check(libc::posix_spawnattr_setflags(&raw mut attributes.0, flags))?;
        }
        Ok(attributes)
    }
}

impl Drop for Attributes {
    fn drop(&mut self) {
        // SAFETY: the value was initialised and is destroyed once.
        unsafe { libc::posix_spawnattr_destroy(&raw mut self.0) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::wait::{WaitStatus, waitpid};
    use std::io::Read;
    use std::os::fd::AsFd;

    fn c(text: &str) -> CString {
        CString::new(text).unwrap()
    }

    #[test]
    fn only_the_named_fd_crosses_and_the_directory_is_set() {
        let (mut reader, writer) = io::pipe().unwrap();
        let kept_back = std::os::unix::net::UnixStream::pair().unwrap();
        let link = |fd: BorrowedFd<'_>| {
            let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap();
            link.into_os_string().into_string().unwrap()
        };
        let (pipe, socket) = (link(writer.as_fd()), link(kept_back.0.as_fd()));
        let request = SpawnRequest {
            program: c("/bin/sh"),
            arguments: vec![
                c("sh"),
                c("-c"),
                c("for fd in /proc/$$/fd/*; do readlink $fd; done >&3; pwd >&3; echo $A >&3"),
            ],
            environment: vec![c("A=b"), c("PATH=/usr/bin:/bin")],
            directory: c("/"),
            fds: vec![(writer.as_fd(), 3)],
            signal_mask: SigSet::empty(),
            ignored: SigSet::empty(),
        };
        let pid = spawn(&request).unwrap();
        drop(request);
        drop(writer);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(waitpid(pid, None).unwrap(), WaitStatus::Exited(pid, 0));
        assert!(text.ends_with("/\nb\n"), "{text}");
        assert!(!text.contains(&socket), "{text}");
        // As fd 3, and as fd 1 of the loop.
        assert_eq!(text.lines().filter(|line| *line == pipe).count(), 2, "{text}");
    }

    #[test]
    fn a_failed_exec_is_an_error() {
        let request = SpawnRequest {
            program: c("/nonexistent"),
            arguments: vec![c("x")],
            environment: vec![],
            directory: c("/"),
            fds: vec![],
            signal_mask: SigSet::empty(),
            ignored: SigSet::empty(),
        };
        assert_eq!(spawn(&request).unwrap_err().raw_os_error(), Some(libc::ENOENT));
    }
}
