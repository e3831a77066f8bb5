//! What runs between the spawn of a worker and its program, in the new process: LISTEN_PID, which only that process
//! knows, its process group, the filter of its system calls, and another user.
//!
//! It is this same binary by a hidden verb, so that no code of ours ever runs in a fork.

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::unistd::{Pid, User, initgroups, setgid, setpgid, setuid};

use super::interception;
use crate::error::{Error, ErrorKind};
use crate::fault;
use crate::sys;
use crate::upgrade::preflight;

/// The verb; no help and no completion names it.
const VERB: &str = "run-worker";
/// The file that runs, also when another was put in its place.
pub(super) const PROGRAM: &str = "/proc/self/exe";

/// The command line of the trampoline to `program`; `filter` is the number of the socket by which the supervisor gets hold of
/// the filter, if the program is to run under one.
pub(super) fn arguments(user: Option<&str>, filter: Option<RawFd>, program: &Path, argv: &[OsString]) -> Vec<OsString> {
    let filter = filter.map(|socket| socket.to_string()).unwrap_or_default();
    let user = user.unwrap_or_default();
    let own = ["handover".into(), VERB.into(), user.into(), filter.into(), program.as_os_str().to_owned()];
    own.into_iter().chain(argv.iter().cloned()).collect()
}

/// Becomes the program, if that is what this process was started for. Returns why it cannot, or `None` if it was started
/// for something else.
#[must_use]
pub fn run_worker(arguments: impl IntoIterator<Item = OsString>) -> Option<Error> {
    let mut arguments = arguments.into_iter().skip(1);
    arguments.next().filter(|verb| verb == VERB)?;
    let user = arguments.next()?;
    let filter = arguments.next()?.to_str()?.parse().ok();
    let program = PathBuf::from(arguments.next()?);
    let name = arguments.next()?;
    let mut command = Command::new(&program);
    command.arg0(name).args(arguments);
    Some(become_program(&program, &user.to_string_lossy(), filter, command))
}

fn become_program(program: &Path, user: &str, filter: Option<RawFd>, mut command: Command) -> Error {
    // A terminal's ^C is for the supervisor, which tells the workers; and what a worker has started is killed with it.
    if let Err(error) = setpgid(Pid::from_raw(0), Pid::from_raw(0)) {
        log::debug!("no process group of its own: {error}");
    }
    if std::env::var_os("LISTEN_FDS").is_some() {
        command.env("LISTEN_PID", std::process::id().to_string());
    }
    // While it still may without giving up setuid programs.
    if let Some(socket) = filter {
        let socket = sys::fd_from_environment(socket).map(UnixStream::from);
        if let Some(Err(error)) = socket.map(|socket| interception::install(&socket)) {
            return error;
        }
    }
    if !user.is_empty() {
        if let Err(error) = change_user(user, &mut command) {
            return error;
        }
    }
    fault::reached("worker: started", None);
    let error = command.exec();
    preflight::explain(program, &std::env::current_dir().unwrap_or_default(), error)
}

fn change_user(name: &str, command: &mut Command) -> Result<(), Error> {
    let user = find_user(name)?;
    let c_name = std::ffi::CString::new(user.name.as_str());
    let c_name = c_name.map_err(|error| Error::new(ErrorKind::Invalid, tried(name), error.to_string()))?;
    let change = || initgroups(&c_name, user.gid).and_then(|()| setgid(user.gid)).and_then(|()| setuid(user.uid));
    change().map_err(|error| Error::io(tried(name), error).mend("only root may run a program as another user"))?;
    command.env("USER", &user.name).env("LOGNAME", &user.name).env("HOME", &user.dir);
    Ok(())
}

fn tried(name: &str) -> String {
    format!("run the program as user `{name}`")
}

pub(super) fn find_user(name: &str) -> Result<User, Error> {
    let found = User::from_name(name).map_err(|error| Error::io(tried(name), error))?;
    found.ok_or_else(|| Error::new(ErrorKind::Invalid, tried(name), "there is no such user"))
}
