//! A process that has made a system call and waits for its answer: what is read of it, and taken from it.

use std::fs::{self, File};
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::unistd::Pid;

use super::family;
use crate::listeners::Address;
use crate::sys;

/// `sizeof(struct sockaddr_storage)`
const ADDRESS_BYTES_MAX: usize = 128;
/// PATH_MAX
const PATH_BYTES_MAX: usize = 4096;
/// No family tree is higher.
const ANCESTORS_MAX: usize = 64;

pub(super) struct Caller {
    pub(super) pid: Pid,
    parent: Pid,
    /// `/proc` shows nothing by the number of a process whose main thread has ended.
    thread: Pid,
    pidfd: OwnedFd,
}

impl Caller {
    pub(super) fn of_thread(thread: Pid) -> io::Result<Self> {
        let (pid, parent) = process_and_parent(thread)?;
        let pidfd = match thread == pid {
            true => sys::pidfd_open(pid)?,
            // Before Linux 6.9 by way of the main thread, as long as that lives.
            false => sys::pidfd_open_thread(thread).or_else(|_| sys::pidfd_open(pid))?,
        };
        Ok(Self { pid, parent, thread, pidfd })
    }

    /// Whether it is the worker, or was started by it or by what that has started.
    pub(super) fn is_of(&self, worker: Pid) -> bool {
        let mut ancestor = (self.pid, self.parent);
        for _ in 0..ANCESTORS_MAX {
            if ancestor.0 == worker {
                return true;
            }
            let Ok(next) = process_and_parent(ancestor.1) else { return false };
            ancestor = next;
        }
        false
    }

    /// A copy of its fd.
    pub(super) fn fd(&self, number: RawFd) -> io::Result<OwnedFd> {
        sys::pidfd_getfd(self.pidfd.as_fd(), number)
    }

    /// The numbers by which it has that socket, each with whether it is closed at exec.
    pub(super) fn numbers_of(&self, inode: u64) -> io::Result<Vec<(RawFd, bool)>> {
        let fds = family::fds(self.thread)?;
        let numbers =
            fds.iter().filter(|(_, link)| family::socket_inode(link) == Some(inode)).map(|(number, _)| *number);
        numbers.map(|number| Ok((number, self.is_closed_at_exec(number)?))).collect()
    }

    fn is_closed_at_exec(&self, number: RawFd) -> io::Result<bool> {
        let text = fs::read_to_string(format!("/proc/{}/fdinfo/{number}", self.thread))?;
        let flags = text.lines().find_map(|line| line.strip_prefix("flags:"));
        let flags = flags.and_then(|flags| i32::from_str_radix(flags.trim(), 8).ok());
        Ok(flags.is_some_and(|flags| flags & libc::O_CLOEXEC != 0))
    }

    /// A `sockaddr` in its memory. None: one that no listener is bound to.
    pub(super) fn address(&self, at: u64, length: u64) -> io::Result<Option<Address>> {
        let length = usize::try_from(length).unwrap_or(usize::MAX).min(ADDRESS_BYTES_MAX);
        let mut bytes = vec![0; length];
        self.memory()?.read_exact_at(&mut bytes, at)?;
        Ok(read_address(&bytes).map(|address| match address {
            Address::Path(path) => Address::Path(self.path(None, &path)),
            other => other,
        }))
    }

    /// A path in its memory, as this process sees it.
    pub(super) fn path_at(&self, directory: Option<RawFd>, at: u64) -> io::Result<PathBuf> {
        let memory = self.memory()?;
        let mut bytes = vec![0; PATH_BYTES_MAX];
        // What comes behind it may not be mapped.
        let read = memory.read_at(&mut bytes, at)?;
        let path = bytes.get(..read).and_then(|bytes| bytes.split(|byte| *byte == 0).next()).unwrap_or_default();
        Ok(self.path(directory, Path::new(std::ffi::OsStr::from_bytes(path))))
    }

    /// The path as this process sees it: from the root and the directory of the caller.
    pub(super) fn path(&self, directory: Option<RawFd>, path: &Path) -> PathBuf {
        let link = |name: &str| fs::read_link(format!("/proc/{}/{name}", self.thread)).unwrap_or_default();
        let path = match path.strip_prefix("/") {
            Ok(below_root) => link("root").join(below_root),
            Err(_) => link(&directory.map_or("cwd".to_owned(), |number| format!("fd/{number}"))).join(path),
        };
        without_links(&path)
    }

    fn memory(&self) -> io::Result<File> {
        File::open(format!("/proc/{}/mem", self.thread))
    }
}

/// The path with every link in its directory resolved, but not what it leads to itself.
fn without_links(path: &Path) -> PathBuf {
    let directory = path.parent().and_then(|parent| fs::canonicalize(parent).ok());
    match (directory, path.file_name()) {
        (Some(directory), Some(name)) => directory.join(name),
        _ => path.to_path_buf(),
    }
}

fn process_and_parent(thread: Pid) -> io::Result<(Pid, Pid)> {
    let text = fs::read_to_string(format!("/proc/{thread}/status"))?;
    let field = |name: &str| {
        let value = text.lines().find_map(|line| line.strip_prefix(name)).and_then(|value| value.trim().parse().ok());
        value.map(Pid::from_raw).ok_or_else(|| io::Error::other(format!("no {name} in the status of process {thread}")))
    };
    Ok((field("Tgid:")?, field("PPid:")?))
}

/// What `bind` is given: ip(7), ipv6(7), unix(7).
fn read_address(bytes: &[u8]) -> Option<Address> {
    let (family, rest) = bytes.split_first_chunk::<2>()?;
    match i32::from(u16::from_ne_bytes(*family)) {
        libc::AF_INET => {
            let (port, rest) = rest.split_first_chunk::<2>()?;
            let ip = rest.first_chunk::<4>()?;
            Some(Address::Ip((Ipv4Addr::from(*ip), u16::from_be_bytes(*port)).into()))
        }
        libc::AF_INET6 => {
            let (port, rest) = rest.split_first_chunk::<2>()?;
            let (_flow, rest) = rest.split_first_chunk::<4>()?;
            let (ip, rest) = rest.split_first_chunk::<16>()?;
            // It may be left out: the structure of RFC 2133 had none.
            let scope = rest.first_chunk::<4>().map_or(0, |scope| u32::from_ne_bytes(*scope));
            let address = SocketAddrV6::new(Ipv6Addr::from(*ip), u16::from_be_bytes(*port), 0, scope);
            Some(Address::Ip(SocketAddr::V6(address)))
        }
        libc::AF_UNIX => match rest.split_first() {
            // The kernel chooses a name.
            None => None,
            Some((0, name)) => Some(Address::Abstract(name.to_vec())),
            Some(_) => {
                let path = rest.split(|byte| *byte == 0).next()?;
                Some(Address::Path(std::ffi::OsString::from_vec(path.to_vec()).into()))
            }
        },
        _ => None,
    }
}

/// A `sockaddr` that a program passes.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(bytes: &[u8]) {
    if let Some(Address::Path(path)) = read_address(bytes) {
        assert!(!path.as_os_str().is_empty() && !path.as_os_str().as_bytes().contains(&0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::garbled::garbled;

    fn of_family(family: i32, rest: &[u8]) -> Vec<u8> {
        [&u16::try_from(family).unwrap().to_ne_bytes(), rest].concat()
    }

    #[test]
    fn addresses_as_bind_is_given_them() {
        let read = |family: i32, rest: &[u8]| read_address(&of_family(family, rest)).map(|address| address.to_string());
        assert_eq!(read(libc::AF_INET, &[0x1f, 0x90, 127, 0, 0, 1]).as_deref(), Some("127.0.0.1:8080"));
        assert_eq!(read(libc::AF_INET, &[0x1f, 0x90, 127, 0, 0]), None);
        let v6 = [&[0, 80, 9, 9, 9, 9][..], &[0; 15], &[1], &[0; 4]].concat();
        assert_eq!(read(libc::AF_INET6, &v6).as_deref(), Some("[::1]:80"));
        assert_eq!(read(libc::AF_INET6, &v6[..22]).as_deref(), Some("[::1]:80"));
        assert_eq!(read(libc::AF_UNIX, b"/run/x.sock\0garbage").as_deref(), Some("/run/x.sock"));
        assert_eq!(read(libc::AF_UNIX, b"\0name").as_deref(), Some("@name"));
        assert_eq!((read(libc::AF_UNIX, b""), read(libc::AF_NETLINK, &[0; 10])), (None, None));
        assert_eq!(read_address(&[1]), None);
    }

    #[test]
    fn a_path_is_seen_from_the_directory_of_the_caller() {
        let caller = Caller::of_thread(Pid::this()).unwrap();
        assert_eq!(caller.pid, Pid::this());
        assert!(caller.is_of(Pid::this()) && caller.is_of(Pid::parent()) && !caller.is_of(Pid::from_raw(1 << 22)));
        let directory = std::env::current_dir().unwrap();
        let path = std::ffi::CString::new("src/../x.sock").unwrap();
        assert_eq!(caller.path_at(None, path.as_ptr() as u64).unwrap(), directory.join("x.sock"));
        let open = File::open("/dev").unwrap();
        let number = std::os::fd::AsRawFd::as_raw_fd(&open);
        assert_eq!(caller.path(Some(number), Path::new("x")), Path::new("/dev/x"));
        assert_eq!(caller.path(Some(number), Path::new("/x")), Path::new("/x"));
    }

    proptest::proptest! {
        #[test]
        fn any_address_is_read(bytes in garbled(vec![
            of_family(libc::AF_INET, &[0, 80, 127, 0, 0, 1, 0, 0]),
            of_family(libc::AF_INET6, &[0; 26]),
            of_family(libc::AF_UNIX, b"/run/x.sock\0"),
        ])) {
            let _ = read_address(&bytes);
        }
    }
}
