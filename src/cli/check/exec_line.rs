//! A command of a unit: `ExecStart=` and its like.

use std::path::{Path, PathBuf};

use nix::sys::signal::Signal;

use super::Findings;
use super::process::Process;

/// What upgrades by `systemctl reload`.
pub(super) const RELOAD: &str = "ExecReload=handover upgrade --pid $MAINPID";

/// A command of the unit.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct ExecLine {
    pub(super) program: PathBuf,
    /// With its arguments.
    pub(super) text: String,
    pub(super) ignores_failure: bool,
}

impl ExecLine {
    /// `@-:+!` before the path are systemd's.
    pub(super) fn of_file(line: &str) -> Option<Self> {
        let text = line.trim_start_matches(['@', '-', ':', '+', '!']);
        let flags = line.get(..line.len() - text.len())?;
        let program = text.split_ascii_whitespace().next()?.trim_matches(['"', '\'']);
        Some(Self { program: program.into(), text: text.to_owned(), ignores_failure: flags.contains('-') })
    }

    /// `{ path=/bin/a ; argv[]=/bin/a b ; ignore_errors=no ; … }`
    pub(super) fn of_property(value: &str) -> Option<Self> {
        let mut parts = value.trim_start_matches("{ ").split(" ; ");
        let program = parts.next()?.strip_prefix("path=")?;
        let text = parts.next()?.strip_prefix("argv[]=")?;
        let ignores_failure = parts.any(|part| part == "ignore_errors=yes");
        Some(Self { program: program.into(), text: text.to_owned(), ignores_failure })
    }

    /// Where that is told: systemd puts in what `%` stands for, and looks through directories for a name alone.
    pub(super) fn path(&self) -> Option<&Path> {
        let is_plain = self.program.is_absolute() && !self.program.as_os_str().as_encoded_bytes().contains(&b'%');
        is_plain.then_some(&*self.program)
    }

    /// One of ExecReload=.
    pub(super) fn check_reload(&self, sees_it: bool, process: Option<&Process>, findings: &mut Findings) {
        if sees_it && self.path().is_some_and(|program| !program.exists()) {
            return findings
                .problem(format!("ExecReload={}: there is no such program", self.program.display()), "mend the path");
        }
        if self.ignores_failure {
            findings.problem(
                format!("ExecReload=-{}: `systemctl reload` says yes when the upgrade has failed", self.text),
                "remove the `-`",
            );
        }
        if let Some(signal) = self.signal() {
            match process {
                Some(process) if !process.catches(signal as i32) => findings.problem(
                    format!("ExecReload={} sends {signal}, for which the process has no handler", self.text),
                    RELOAD,
                ),
                _ => findings.warning(
                    format!("ExecReload={}: a signal answers nobody, so every reload succeeds", self.text),
                    RELOAD,
                ),
            }
        } else if self.is_upgrade() && !self.ignores_failure {
            findings.ok(format!("ExecReload={}", self.text));
        }
    }

    pub(super) fn is_upgrade(&self) -> bool {
        self.is_handover("upgrade")
    }

    /// Whether it is a `handover VERB`, with whatever else is around it.
    pub(super) fn is_handover(&self, verb: &str) -> bool {
        let mut words = self.words();
        words.any(|word| Path::new(word).file_name().is_some_and(|name| name == "handover"))
            && words.any(|word| word == verb)
    }

    fn words(&self) -> impl Iterator<Item = &str> {
        self.text.split(|one: char| one.is_ascii_whitespace() || "\"';&|".contains(one))
    }

    /// The one that `kill` sends.
    pub(super) fn signal(&self) -> Option<Signal> {
        let mut words = self.words();
        words.find(|word| Path::new(word).file_name().is_some_and(|name| name == "kill"))?;
        words.find_map(|word| {
            let name = word.trim_start_matches("--signal=").trim_start_matches('-');
            let by_number = || Signal::try_from(name.parse::<i32>().ok().filter(|_| word.starts_with('-'))?).ok();
            let long = format!("SIG{}", name.trim_start_matches("SIG"));
            long.parse().ok().or_else(by_number)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_signal_of_a_kill_is_read_in_every_spelling() {
        let signal = |line: &str| ExecLine::of_file(line).unwrap().signal();
        for line in ["/bin/kill -HUP $MAINPID", "kill -s HUP 1", "-kill -SIGHUP 1", "kill -1 $MAINPID"] {
            assert_eq!(signal(line), Some(Signal::SIGHUP), "{line}");
        }
        assert_eq!(signal("/bin/sh -c 'kill --signal=USR2 $MAINPID'"), Some(Signal::SIGUSR2));
        assert_eq!(signal("handover upgrade --pid 1"), None);
    }

    #[test]
    fn upgrades_are_recognised() {
        let is = |line: &str| ExecLine::of_file(line).unwrap().is_upgrade();
        assert!(is("handover upgrade --pid $MAINPID") && is("/bin/sh -c \"/usr/bin/handover upgrade --pid 1\""));
        assert!(!is("handover status") && !is("/usr/bin/upgrade handover"));
    }
}
