//! Finding the control socket of a process: the one that it really listens on, whatever its directory, mount namespace
//! or user.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind};

/// How often the table of Unix sockets is read before one is not there: the kernel gives it in pieces of a page and goes on by
/// counting, so that one which is closed in between can hide another (seen once in ten thousand readings).
const READINGS: usize = 4;

/// A process that is to be asked.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Target {
    /// By its pid, as this process sees it.
    Pid(i32),
    /// By the path of its control socket.
    Socket(PathBuf),
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Pid(pid) => write!(f, "process {pid}"),
            Self::Socket(path) => write!(f, "{}", path.display()),
        }
    }
}

/// A process with a control socket.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Service {
    /// The process, as this process sees it.
    pub pid: i32,
    /// Its control socket, as a path that this process can use.
    pub socket: PathBuf,
}

/// Every process of this machine with a control socket that this user can see.
#[must_use]
pub fn services() -> Vec<Service> {
    let Ok(processes) = fs::read_dir("/proc") else { return vec![] };
    let pids = processes.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let mut namespaces = HashMap::new();
    let find = |pid: i32| {
        let namespace = fs::metadata(format!("/proc/{pid}/ns/net")).ok()?.ino();
        let table: &mut Vec<u8> = namespaces.entry(namespace).or_default();
        // Where the one before has ended meanwhile it is empty.
        if table.is_empty() {
            *table = (0..READINGS).filter_map(|_| read_table(pid).ok()).flatten().collect();
        }
        find_in(pid, table).ok().flatten()
    };
    let mut found: Vec<Service> = pids.filter_map(find).collect();
    found.sort_by_key(|service| service.pid);
    found
}

/// The control socket of `pid`.
pub(crate) fn service_of(pid: i32) -> Result<Service, Error> {
    let tried = || format!("find the control socket of process {pid}");
    let missing = |cause: &str, mend: &str| Err(Error::new(ErrorKind::NotRunning, tried(), cause).mend(mend));
    match find(pid) {
        Ok(Some(service)) => Ok(service),
        Ok(None) if is_zombie(pid) => missing(
            "it has exited already (a zombie)",
            "its parent has not reaped it; `handover ps` lists those that serve",
        ),
        Ok(None) => {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            let cause = format!("it runs (`{}`), and is no handover process", name.trim());
            missing(&cause, "`handover ps` lists those that are; a pid file may be out of date")
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => missing(
            "there is no such process",
            "`handover ps` lists those that can be upgraded; a pid file may be out of date",
        ),
        Err(error) => Err(Error::io(tried(), error).mend("ask as root, or as the user that the process runs as")),
    }
}

fn find(pid: i32) -> io::Result<Option<Service>> {
    find_by(pid, || read_table(pid))
}

fn find_by(pid: i32, mut table: impl FnMut() -> io::Result<Vec<u8>>) -> io::Result<Option<Service>> {
    for _ in 0..READINGS {
        if let Some(service) = find_in(pid, &table()?)? {
            return Ok(Some(service));
        }
    }
    Ok(None)
}

/// The table of the process's network namespace.
fn read_table(pid: i32) -> io::Result<Vec<u8>> {
    fs::read(format!("/proc/{pid}/net/unix")).or_else(|error| match error.raw_os_error() {
        // A zombie has no network namespace any more; which error that gives depends on the moment.
        Some(libc::EINVAL | libc::ENOENT) if is_zombie(pid) => Ok(vec![]),
        _ => Err(error),
    })
}

fn find_in(pid: i32, table: &[u8]) -> io::Result<Option<Service>> {
    let proc = PathBuf::from(format!("/proc/{pid}"));
    let own_pid = innermost_pid(&fs::read_to_string(proc.join("status"))?).unwrap_or(pid);
    let suffix = format!("/{own_pid}.sock");
    let candidates: Vec<(u64, &[u8])> =
        listening_paths(table).filter(|(_, path)| path.ends_with(suffix.as_bytes())).collect();
    if candidates.is_empty() {
        return Ok(None);
    }
    let held = socket_inodes(&proc.join("fd"))?;
    let path = candidates.iter().find(|(inode, _)| held.contains(inode)).map(|(_, path)| *path);
    Ok(path.map(|path| {
        let inside = Path::new(std::ffi::OsStr::from_bytes(path));
        let relative = inside.strip_prefix("/").unwrap_or(inside);
        Service { pid, socket: proc.join("root").join(relative) }
    }))
}

fn is_zombie(pid: i32) -> bool {
    state_of(pid) == Some('Z')
}

/// What a process is doing, by a letter; `T` when it is stopped by a signal, `t` by a debugger.
pub(crate) fn state_of(pid: i32) -> Option<char> {
    state_in(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// The name before it is the program's choice, and may have anything in it.
fn state_in(stat: &str) -> Option<char> {
    stat.rsplit_once(") ")?.1.chars().next()
}

/// The pid namespace of a process, if that is not ours.
pub(super) fn other_pid_namespace(pid: i32) -> Option<u64> {
    let theirs = pid_namespace(pid)?;
    (pid_namespace(std::process::id().cast_signed()) != Some(theirs)).then_some(theirs)
}

fn pid_namespace(pid: i32) -> Option<u64> {
    fs::metadata(format!("/proc/{pid}/ns/pid")).ok().map(|namespace| namespace.ino())
}

/// What this process calls the one that is called `pid` in that namespace.
pub(super) fn pid_here(namespace: u64, pid: i32) -> Option<i32> {
    let mut all = fs::read_dir("/proc").ok()?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    all.find(|here: &i32| {
        let status = fs::read_to_string(format!("/proc/{here}/status")).unwrap_or_default();
        innermost_pid(&status) == Some(pid) && pid_namespace(*here) == Some(namespace)
    })
}

/// The pid that a process has in its own namespace: the last field of `NSpid`.
fn innermost_pid(status: &str) -> Option<i32> {
    let line = status.lines().find(|line| line.starts_with("NSpid:"))?;
    line.split_ascii_whitespace().next_back()?.parse().ok()
}

/// Inode and path of the listening stream sockets in a table like `/proc/net/unix`.
fn listening_paths(table: &[u8]) -> impl Iterator<Item = (u64, &[u8])> {
    let listening = unix_sockets(table).filter(UnixSocket::listens);
    listening.map(|socket| (socket.inode, socket.path)).filter(|(_, path)| path.starts_with(b"/"))
}

/// A line of `/proc/net/unix` with a name.
pub(crate) struct UnixSocket<'a> {
    flags: u32,
    pub(crate) inode: u64,
    /// `@` stands for the NUL of an abstract name.
    pub(crate) path: &'a [u8],
}

impl UnixSocket<'_> {
    pub(crate) fn listens(&self) -> bool {
        const SO_ACCEPTCON: u32 = 1 << 16;
        self.flags & SO_ACCEPTCON != 0
    }
}

pub(crate) fn unix_sockets(table: &[u8]) -> impl Iterator<Item = UnixSocket<'_>> {
    table.split(|byte| *byte == b'\n').filter_map(|line| {
        // Num RefCount Protocol Flags Type St Inode Path; the path may contain spaces.
        let mut rest = line;
        let mut fields = [&b""[..]; 7];
        for field in &mut fields {
            let start = rest.iter().position(|byte| *byte != b' ')?;
            let length = rest.get(start..)?.iter().position(|byte| *byte == b' ')?;
            *field = rest.get(start..start + length)?;
            rest = rest.get(start + length..)?;
        }
        let text = |field: &[u8]| std::str::from_utf8(field).ok().map(str::to_owned);
        let flags = u32::from_str_radix(&text(fields[3])?, 16).ok()?;
        Some(UnixSocket { flags, inode: text(fields[6])?.parse().ok()?, path: rest.get(1..)? })
    })
}

fn socket_inodes(directory: &Path) -> io::Result<HashSet<u64>> {
    let links = fs::read_dir(directory)?.flatten().filter_map(|entry| fs::read_link(entry.path()).ok());
    let inode = |link: PathBuf| link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok();
    Ok(links.filter_map(inode).collect())
}

/// Tables and lines of `/proc`.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(bytes: &[u8]) {
    for socket in unix_sockets(bytes) {
        assert!(!socket.path.contains(&b'\n'));
    }
    assert!(listening_paths(bytes).all(|(_, path)| path.starts_with(b"/")));
    let text = String::from_utf8_lossy(bytes);
    assert!(innermost_pid(&text).is_none() || text.contains("NSpid:"));
    let _ = state_in(&text);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::garbled::garbled;

    const TABLE: &[u8] = b"Num       RefCount Protocol Flags    Type St Inode Path\n\
            0000000000000000: 00000002 00000000 00010000 0001 01 24680 /run/my app/12.sock\n\
            0000000000000000: 00000003 00000000 00000000 0001 03  1357 /run/connected/12.sock\n\
            0000000000000000: 00000002 00000000 00010000 0001 01 11111 @abstract/12.sock\n\
            0000000000000000: 00000003 00000000 00000000 0001 03 99999\n";

    #[test]
    fn the_table_of_unix_sockets_is_read_with_its_odd_paths() {
        let found: Vec<_> = listening_paths(TABLE).collect();
        assert_eq!(found, [(24680, &b"/run/my app/12.sock"[..])]);
    }

    #[test]
    fn a_socket_that_one_reading_misses_is_found() {
        let directory = std::env::temp_dir().join(format!("handover-find-{}", std::process::id()));
        fs::create_dir(&directory).unwrap();
        let pid = std::process::id().cast_signed();
        let path = directory.join(format!("{pid}.sock"));
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let inode = nix::sys::stat::fstat(&listener).unwrap().st_ino;
        let line = format!("0000000000000000: 00000002 00000000 00010000 0001 01 {inode} {}\n", path.display());
        let mut readings = [TABLE.to_vec(), line.into_bytes()].into_iter();
        let found = find_by(pid, || readings.next().ok_or(io::ErrorKind::UnexpectedEof.into())).unwrap().unwrap();
        assert_eq!(found.socket, Path::new(&format!("/proc/{pid}/root{}", path.display())));
        assert_eq!(find_by(pid, || Ok(TABLE.to_vec())).unwrap(), None);
        fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn the_innermost_pid_is_the_last() {
        assert_eq!(innermost_pid("Name:\tx\nNSpid:\t4711\t12\t1\n"), Some(1));
        assert_eq!(innermost_pid("Name:\tx\n"), None);
    }

    #[test]
    fn a_process_that_is_none_of_ours_says_so() {
        let error = service_of(1).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotRunning, "{error}");
        let error = service_of(i32::MAX).unwrap_err();
        assert!(error.to_string().contains("no such process"), "{error}");
    }

    proptest::proptest! {
        #[test]
        fn any_table_is_read(table in garbled(vec![TABLE.to_vec()])) {
            for (_, path) in listening_paths(&table) {
                assert!(path.starts_with(b"/"));
            }
        }
    }
}
