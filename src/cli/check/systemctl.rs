//! What a running systemd says about a unit: `systemctl show`, bounded in time, for a manager may hang.

use std::path::Path;
use std::process::Command;

use super::bounded;

const PROPERTIES: &str = "LoadState,Type,NotifyAccess,KillMode,ExecStart,ExecReload,ExecStop,Restart,OOMPolicy,\
    TimeoutStartUSec,TimeoutStopUSec,WatchdogUSec,FileDescriptorStoreMax,RootDirectory,RootImage,MainPID,NeedDaemonReload";

/// The properties of a unit, some of them on several lines.
#[derive(Debug, Default)]
pub(super) struct Properties(Vec<(String, String)>);

impl Properties {
    /// `Err` completes "systemd cannot be asked: …".
    pub(super) fn ask(unit: &str) -> Result<Self, String> {
        let mut command = Command::new("systemctl");
        command.args(["show", "--no-pager", "--property", PROPERTIES, "--", unit]).env("LC_ALL", "C");
        let ran = bounded::run(command, bounded::TIMEOUT).map_err(|error| error.to_string())?;
        match ran.status {
            Some(status) if status.success() => Ok(Self::parse(&ran.output)),
            Some(_) => Err(ran.output.trim().to_owned()),
            None => Err(format!("it has not answered within {} s", bounded::TIMEOUT.as_secs())),
        }
    }

    pub(super) fn parse(output: &str) -> Self {
        let pairs = output.lines().filter_map(|line| line.split_once('='));
        Self(pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect())
    }

    pub(super) fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.0.iter().filter(move |(other, _)| other == name).map(|(_, value)| value.as_str())
    }

    pub(super) fn one<'a>(&'a self, name: &'a str) -> Option<&'a str> {
        self.all(name).next()
    }
}

/// As sd_booted(3) looks.
pub(super) fn runs() -> bool {
    Path::new("/run/systemd/system").is_dir()
}
