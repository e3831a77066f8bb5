//! What the new process is: program, arguments, environment, directory. And starting it.

use std::env;
use std::ffi::{CString, OsStr, OsString};
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use nix::sys::signal::{SigSet, Signal};
use nix::unistd::Pid;
#[cfg(feature = "cli")]
use serde::{Deserialize, Serialize};

use super::preflight;
use crate::config::Config;
use crate::control::UpgradeRequest;
use crate::error::{Error, ErrorKind};
use crate::protocol::{BuildIdentity, CHANNEL_FD, CHANNEL_VARIABLE};
#[cfg(feature = "cli")]
use crate::saved;
use crate::sys::{self, SpawnRequest};

/// How this process was started: what an upgrade repeats.
#[derive(Clone, Debug)]
#[cfg_attr(feature = "cli", derive(Serialize, Deserialize))]
pub(crate) struct Started {
    /// As it was named; resolved at each upgrade.
    #[cfg_attr(feature = "cli", serde(with = "saved::path"))]
    pub(crate) program: PathBuf,
    argv0: OsString,
    arguments: Vec<OsString>,
    /// By the path with its symbolic links, so that `current/` is followed to where it points at the time.
    #[cfg_attr(feature = "cli", serde(with = "saved::path"))]
    directory: PathBuf,
    #[cfg_attr(feature = "cli", serde(with = "saved::signals"))]
    pub(crate) signal_mask: SigSet,
    #[cfg_attr(feature = "cli", serde(with = "saved::signals"))]
    pub(crate) ignored: SigSet,
}

impl Started {
    pub(crate) fn of_this_process() -> Self {
        let directory = start_directory();
        let mut arguments = env::args_os();
        let argv0 = arguments.next().unwrap_or_default();
        let arguments = arguments.collect();
        // argv[0] is what the caller liked to put there. It is only believed if it leads to the file that runs.
        let named = resolve(Path::new(&argv0), &directory, env::var_os("PATH").as_deref());
        let executable = fs::metadata("/proc/self/exe").ok();
        let same = |path: &PathBuf| match (fs::metadata(path), &executable) {
            (Ok(named), Some(runs)) => (named.dev(), named.ino()) == (runs.dev(), runs.ino()),
            _ => false,
        };
        // Or that this was executed by, and which leads elsewhere by now: the next deployment has been quick.
        let executed = sys::executed_path().map(|path| directory.join(path));
        let program = match named.filter(|path| executed.as_ref() == Some(path) || same(path)) {
            Some(_) => PathBuf::from(&argv0),
            None => env::current_exe().unwrap_or_else(|_| PathBuf::from(&argv0)),
        };
        let signal_mask = SigSet::thread_get_mask().unwrap_or(SigSet::empty());
        let mut ignored = sys::ignored_signals();
        // By Rust's runtime, which does it again.
        ignored.remove(Signal::SIGPIPE);
        Self { program, argv0, arguments, directory, signal_mask, ignored }
    }

    /// Another program, as a shell would start it from here.
    #[cfg(feature = "cli")]
    pub(crate) fn of_command(program: OsString, arguments: Vec<OsString>) -> Self {
        Self { program: PathBuf::from(&program), argv0: program, arguments, ..Self::of_this_process() }
    }

    /// As whatever `request` starts would see it.
    #[cfg(feature = "cli")]
    pub(crate) fn changed_by(&self, request: &UpgradeRequest) -> Self {
        let mut changed = self.clone();
        if let Some(program) = &request.exe {
            changed.program.clone_from(program);
            changed.argv0 = program.clone().into_os_string();
        }
        changed.arguments = request.arguments().unwrap_or(changed.arguments);
        changed
    }

    /// What an upgrade starts unless it is told otherwise, as an absolute path, for people.
    pub(crate) fn program_path(&self, config: &Config) -> PathBuf {
        let (named, path) = (config.program.as_ref().unwrap_or(&self.program), env::var_os("PATH"));
        resolve(named, &self.directory, path.as_deref()).unwrap_or_else(|| named.clone())
    }

    /// The program for a process that runs another one and is to start this one again; it may have another directory.
    pub(crate) fn lasting_program(&self) -> PathBuf {
        let is_path = self.program.as_os_str().as_bytes().contains(&b'/');
        if is_path { self.directory.join(&self.program) } else { self.program.clone() }
    }

    /// Where it starts it; `asked` goes before the configuration.
    pub(crate) fn directory(&self, config: &Config, asked: Option<&PathBuf>) -> PathBuf {
        let named = asked.or(config.directory.as_ref());
        named.map_or_else(|| self.directory.clone(), |path| self.directory.join(path))
    }
}

/// What one upgrade starts.
#[derive(Debug)]
#[cfg_attr(feature = "cli", derive(Serialize, Deserialize))]
pub(crate) struct Plan {
    #[cfg_attr(feature = "cli", serde(with = "saved::path"))]
    pub(crate) program: PathBuf,
    pub(crate) argv: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    #[cfg_attr(feature = "cli", serde(with = "saved::path"))]
    pub(crate) directory: PathBuf,
    #[cfg_attr(feature = "cli", serde(with = "saved::signals"))]
    signal_mask: SigSet,
    #[cfg_attr(feature = "cli", serde(with = "saved::signals"))]
    ignored: SigSet,
    /// The file that was looked at.
    #[cfg_attr(feature = "cli", serde(skip))]
    looked_at: Option<FileIdentity>,
}

/// Device, inode, and when either the file or its name was changed last.
type FileIdentity = (u64, u64, i64, i64);

fn identity_of(path: &Path) -> Option<FileIdentity> {
    let file = fs::metadata(path).ok()?;
    Some((file.dev(), file.ino(), file.ctime(), file.ctime_nsec()))
}

impl Plan {
    /// The request goes before the configuration, and that before how this process was started.
    pub(crate) fn new(
        started: &Started,
        config: &Config,
        request: &UpgradeRequest,
        previous: Option<&BuildIdentity>,
    ) -> Result<Self, Error> {
        let directory = started.directory(config, request.cwd.as_ref());
        let other_program = request.exe.as_ref().or(config.program.as_ref());
        let named = match request.previous {
            true => previous_program(request, previous)?,
            false => other_program.unwrap_or(&started.program),
        };
        let mut environment: Vec<(OsString, OsString)> = env::vars_os().filter(|(name, _)| !is_ours(name)).collect();
        let mut set = |name: &OsStr, value: Option<&OsStr>| {
            environment.retain(|(other, _)| other != name);
            environment.extend(value.map(|value| (name.to_owned(), value.to_owned())));
        };
        config.environment.iter().for_each(|(name, value)| set(name, value.as_deref()));
        request.env.iter().for_each(|(name, value)| set(OsStr::new(name), Some(OsStr::new(value))));
        let path = environment.iter().find(|(name, _)| name == "PATH").map(|(_, value)| value.clone());
        let program = resolve(named, &started.directory, path.as_deref()).unwrap_or_else(|| named.clone());
        let looked_at = identity_of(&program);
        preflight::check(&program)?;
        let argv0 = match other_program {
            Some(other) => other.clone().into_os_string(),
            None => started.argv0.clone(),
        };
        let arguments = request.arguments().or_else(|| config.arguments.clone());
        let mut argv = vec![argv0];
        argv.extend(arguments.unwrap_or_else(|| started.arguments.clone()));
        let (signal_mask, ignored) = (started.signal_mask, started.ignored);
        Ok(Self { program, argv, environment, directory, signal_mask, ignored, looked_at })
    }

    /// Starts it with one end of the channel, and with `stderr` for its fd 2 where that is to be another than ours.
    pub(crate) fn spawn(&self, channel: &UnixStream, stderr: Option<BorrowedFd<'_>>) -> Result<Pid, Error> {
        let inode = inode_of(channel).map_err(|error| self.explain(error))?;
        let channel_variable = (CHANNEL_VARIABLE.into(), format!("{CHANNEL_FD}:{inode}").into());
        let stderr = stderr.map(|fd| (fd, libc::STDERR_FILENO));
        let fds = stderr.into_iter().chain([(channel.as_fd(), CHANNEL_FD)]).collect();
        self.run(&self.program, &self.argv, &[channel_variable], fds)
    }

    /// Starts `program` in place of the one that is planned, with the environment and in the directory of that.
    pub(crate) fn run(
        &self,
        program: &Path,
        argv: &[OsString],
        more_environment: &[(OsString, OsString)],
        fds: Vec<(BorrowedFd<'_>, RawFd)>,
    ) -> Result<Pid, Error> {
        let is_set_anew = |name: &OsString| more_environment.iter().any(|(other, _)| other == name);
        let kept = self.environment.iter().filter(|(name, _)| !is_set_anew(name));
        let variables = kept.chain(more_environment).map(|(name, value)| {
            let mut variable = name.clone();
            variable.push("=");
            variable.push(value);
            c_string(&variable)
        });
        let spawn = || {
            sys::spawn(&SpawnRequest {
                program: c_string(program.as_os_str())?,
                arguments: argv.iter().map(|text| c_string(text)).collect::<io::Result<_>>()?,
                environment: variables.collect::<io::Result<_>>()?,
                directory: c_string(self.directory.as_os_str())?,
                fds,
                signal_mask: self.signal_mask,
                ignored: self.ignored,
            })
        };
        spawn().map_err(|error| self.explain(error))
    }

    /// Whether something else was put there after it was looked at, and that is what runs as process `pid`.
    ///
    /// The file that runs may also be the interpreter of a script, or what a wrapper has executed since.
    pub(crate) fn was_replaced(&self, pid: Pid) -> bool {
        let is_another = |path: &Path| identity_of(path) != self.looked_at;
        is_another(&self.program) && is_another(Path::new(&format!("/proc/{pid}/exe")))
    }

    fn explain(&self, error: io::Error) -> Error {
        preflight::explain(&self.program, &self.directory, error)
    }
}

/// Where the build is that served before, if it is still that one.
fn previous_program<'a>(request: &UpgradeRequest, previous: Option<&'a BuildIdentity>) -> Result<&'a PathBuf, Error> {
    let refuse = |kind, cause: String| Error::new(kind, "start the build that served before", cause);
    if request.exe.is_some() {
        return Err(refuse(ErrorKind::Invalid, "another program is named too".to_owned()));
    }
    let Some(build) = previous else {
        let cause = "this process does not know of any: it is the first generation, or the one before did not say";
        return Err(refuse(ErrorKind::NotUpgraded, cause.to_owned()).mend("name it with --exe"));
    };
    let path = &build.path;
    let gone = |what: &str| {
        let cause = format!("it is not at {} any more: {what}", path.display());
        Err(refuse(ErrorKind::NotUpgraded, cause).mend("install it again and upgrade, or name it with --exe"))
    };
    match fs::metadata(path) {
        Ok(file) if build.is(&file) => Ok(path),
        Ok(_) => gone("it was replaced"),
        Err(error) => gone(&error.to_string()),
    }
}

/// Variables that speak of this process's own start and would mislead the new one.
fn is_ours(name: &OsStr) -> bool {
    let ours = [CHANNEL_VARIABLE, "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "WATCHDOG_PID"];
    ours.iter().any(|one| name == *one)
}

pub(crate) fn c_string(text: &OsStr) -> io::Result<CString> {
    let nul = |_| io::Error::new(io::ErrorKind::InvalidInput, "an argument or variable contains a NUL byte");
    CString::new(text.as_bytes()).map_err(nul)
}

fn inode_of(socket: &UnixStream) -> io::Result<u64> {
    let stat = nix::sys::stat::fstat(socket)?;
    Ok(stat.st_ino)
}

/// A program as an absolute path: by PATH if it has no slash, else seen from `directory`.
fn resolve(program: &Path, directory: &Path, path: Option<&OsStr>) -> Option<PathBuf> {
    if program.as_os_str().as_bytes().contains(&b'/') {
        return Some(directory.join(program));
    }
    let directories = env::split_paths(path.unwrap_or(OsStr::new("/usr/local/bin:/usr/bin:/bin")));
    let candidates = directories.map(|one| directory.join(one).join(program));
    candidates.into_iter().find(|candidate| fs::metadata(candidate).is_ok_and(|metadata| metadata.is_file()))
}

/// `$PWD` if it is the working directory, as shells do: it keeps symbolic links.
fn start_directory() -> PathBuf {
    let real = env::current_dir().unwrap_or_else(|_| PathBuf::from("/"));
    let identity = |path: &Path| fs::metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()));
    match env::var_os("PWD").map(PathBuf::from) {
        Some(logical) if logical.is_absolute() && identity(&logical) == identity(&real) => logical,
        _ => real,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn started() -> Started {
        Started {
            program: "/bin/sh".into(),
            argv0: "sh".into(),
            arguments: vec!["-c".into(), "true".into()],
            directory: "/usr".into(),
            signal_mask: SigSet::empty(),
            ignored: SigSet::empty(),
        }
    }

    #[test]
    fn an_upgrade_repeats_the_start() {
        let plan = Plan::new(&started(), &Config::default(), &UpgradeRequest::default(), None).unwrap();
        assert_eq!((plan.program, plan.argv), ("/bin/sh".into(), vec!["sh".into(), "-c".into(), "true".into()]));
        assert_eq!(plan.directory, Path::new("/usr"));
    }

    #[test]
    fn the_request_goes_before_the_configuration() {
        let config =
            Config::default().program("/bin/false").arguments(["a"]).environment("A", "1").environment("B", "1");
        let request = UpgradeRequest {
            exe: Some("/bin/true".into()),
            env: [("A".to_owned(), "2".to_owned())].into(),
            ..UpgradeRequest::default()
        };
        let plan = Plan::new(&started(), &config, &request, None).unwrap();
        assert_eq!((plan.program, plan.argv), ("/bin/true".into(), vec!["/bin/true".into(), "a".into()]));
        let value =
            |name: &str| plan.environment.iter().find(|(other, _)| other == name).map(|(_, value)| value.clone());
        assert_eq!((value("A"), value("B")), (Some("2".into()), Some("1".into())));
    }

    #[test]
    fn the_previous_build_is_started_by_the_name_of_this_one_if_it_is_still_there() {
        let file = fs::metadata("/bin/true").unwrap();
        let build = |inode| {
            let text = format!(r#"{{"path":"/bin/true","device":{},"inode":{inode}}}"#, file.dev());
            serde_json::from_str::<BuildIdentity>(&text).unwrap()
        };
        fn plan(request: &UpgradeRequest, previous: Option<&BuildIdentity>) -> Result<Plan, Error> {
            Plan::new(&started(), &Config::default(), request, previous)
        }
        let request = UpgradeRequest { previous: true, ..UpgradeRequest::default() };
        let good = plan(&request, Some(&build(file.ino()))).unwrap();
        assert_eq!((good.program, good.argv), ("/bin/true".into(), vec!["sh".into(), "-c".into(), "true".into()]));
        let refused = |request: &UpgradeRequest, previous: Option<&BuildIdentity>| {
            plan(request, previous).unwrap_err().to_string()
        };
        let replaced = refused(&request, Some(&build(file.ino() + 1)));
        assert!(replaced.contains("it is not at /bin/true any more: it was replaced (install it again"), "{replaced}");
        assert!(refused(&request, None).contains("it is the first generation"));
        let both = UpgradeRequest { exe: Some("/bin/sh".into()), ..request };
        assert!(refused(&both, Some(&build(file.ino()))).contains("another program is named too"));
    }

    #[test]
    fn names_are_looked_up_and_relative_paths_start_where_the_process_did() {
        assert_eq!(resolve(Path::new("sh"), Path::new("/"), Some(OsStr::new("/nowhere:/bin"))), Some("/bin/sh".into()));
        assert_eq!(resolve(Path::new("sh"), Path::new("/"), Some(OsStr::new("bin"))), Some("/bin/sh".into()));
        assert_eq!(resolve(Path::new("./a"), Path::new("/srv"), None), Some("/srv/./a".into()));
        assert_eq!(resolve(Path::new("no-such-program"), Path::new("/"), None), None);
    }

    #[test]
    fn this_process_knows_its_own_program() {
        let started = Started::of_this_process();
        assert_eq!(fs::canonicalize(started.program_path(&Config::default())).unwrap(), env::current_exe().unwrap());
    }
}
