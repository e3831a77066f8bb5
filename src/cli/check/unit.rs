//! The systemd unit: would `systemctl reload` upgrade the service, and tell the truth about it?

use std::path::{Path, PathBuf};
use std::time::Duration;

use handover::control::Target;

use super::Findings;
use super::exec_line::{ExecLine, RELOAD};
use super::process::Process;
use super::systemctl::{self, Properties};
use super::unit_file::{UnitFile, time_span};

/// What systemd does where the unit says nothing (DefaultTimeoutStartSec, DefaultTimeoutStopSec).
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(90);
/// Those of the library, where no process says otherwise.
const DEFAULT_READY_TIMEOUT: Duration = Duration::from_secs(30);
const DEFAULT_TRIAL: Duration = Duration::from_secs(1);
const DEFAULT_DRAIN_TIMEOUT: Duration = Duration::from_secs(60);
const STOP: &str = "ExecStop=-handover stop --pid $MAINPID";

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Unit {
    kind: String,
    notify_access: String,
    kill_mode: String,
    start: Option<ExecLine>,
    reload: Vec<ExecLine>,
    stop: Vec<ExecLine>,
    restart: String,
    /// Empty: systemd is too old to have it.
    oom_policy: String,
    /// `None`: for ever.
    timeout_start: Option<Duration>,
    timeout_stop: Option<Duration>,
    watchdog: Option<Duration>,
    fd_store_max: usize,
    /// Its programs are below another root, by this setting.
    root: Option<&'static str>,
    main_pid: Option<i32>,
    is_stale: bool,
}

const ROOTS: [&str; 2] = ["RootDirectory", "RootImage"];

impl Unit {
    /// From systemd if that runs and is meant, else from the unit's file.
    pub(super) fn load(named: &str, findings: &mut Findings) -> Option<Self> {
        if named.contains('/') || !systemctl::runs() {
            return match UnitFile::read(named) {
                Ok(file) => Some(Self::from_file(&file)),
                Err(error) => {
                    findings.problem(format!("the unit {named} cannot be read: {error}"), "name it, or its file");
                    None
                }
            };
        }
        match Properties::ask(named) {
            Ok(properties) if properties.one("LoadState") == Some("not-found") => {
                findings.problem(format!("there is no unit {named}"), "`systemctl list-units --type=service`");
                None
            }
            Ok(properties) => Some(Self::from_properties(&properties)),
            Err(why) => {
                findings.problem(format!("systemd cannot be asked about {named}: {why}"), "name the unit's file");
                None
            }
        }
    }

    pub(super) fn from_file(file: &UnitFile) -> Self {
        let kind = file.one("Type").unwrap_or(if file.one("BusName").is_some() { "dbus" } else { "simple" });
        let notifies = kind.starts_with("notify") || file.one("WatchdogSec").is_some();
        let span = |name: &str| file.one(name).and_then(time_span);
        let timeout = |name: &str| {
            let named = span(name).or_else(|| span("TimeoutSec"));
            named.unwrap_or(Some(DEFAULT_TIMEOUT)).filter(|time| !time.is_zero())
        };
        let lines = |name: &str| file.all(name).iter().filter_map(|line| ExecLine::of_file(line)).collect();
        let delegates = file.one("Delegate").is_some_and(|value| !matches!(value, "no" | "false" | "off" | "0"));
        Self {
            kind: kind.to_owned(),
            notify_access: file.one("NotifyAccess").unwrap_or(if notifies { "main" } else { "none" }).to_owned(),
            kill_mode: file.one("KillMode").unwrap_or("control-group").to_owned(),
            start: file.one("ExecStart").and_then(ExecLine::of_file),
            reload: lines("ExecReload"),
            stop: lines("ExecStop"),
            restart: file.one("Restart").unwrap_or("no").to_owned(),
            oom_policy: file.one("OOMPolicy").unwrap_or(if delegates { "continue" } else { "stop" }).to_owned(),
            timeout_start: timeout("TimeoutStartSec"),
            timeout_stop: timeout("TimeoutStopSec"),
            watchdog: span("WatchdogSec").flatten().filter(|time| !time.is_zero()),
            fd_store_max: file.one("FileDescriptorStoreMax").and_then(|max| max.parse().ok()).unwrap_or(0),
            root: ROOTS.into_iter().find(|name| file.one(name).is_some_and(|root| root != "/")),
            main_pid: None,
            is_stale: false,
        }
    }

    pub(super) fn from_properties(properties: &Properties) -> Self {
        let text = |name| properties.one(name).unwrap_or_default().to_owned();
        let span = |name| properties.one(name).and_then(time_span);
        let lines = |name| properties.all(name).filter_map(ExecLine::of_property).collect();
        Self {
            kind: text("Type"),
            notify_access: text("NotifyAccess"),
            kill_mode: text("KillMode"),
            start: properties.one("ExecStart").and_then(ExecLine::of_property),
            reload: lines("ExecReload"),
            stop: lines("ExecStop"),
            restart: text("Restart"),
            oom_policy: text("OOMPolicy"),
            timeout_start: span("TimeoutStartUSec").flatten(),
            timeout_stop: span("TimeoutStopUSec").flatten(),
            watchdog: span("WatchdogUSec").flatten().filter(|time| !time.is_zero()),
            fd_store_max: text("FileDescriptorStoreMax").parse().unwrap_or(0),
            root: ROOTS.into_iter().find(|name| properties.one(name).is_some_and(|root| !matches!(root, "" | "/"))),
            main_pid: text("MainPID").parse().ok().filter(|pid| *pid > 0),
            is_stale: text("NeedDaemonReload") == "yes",
        }
    }

    pub(super) fn main_process(&self) -> Option<Target> {
        self.main_pid.map(Target::Pid)
    }

    /// What it starts, where that is a plain path that is seen from here.
    pub(super) fn program(&self) -> Option<PathBuf> {
        let start = self.start.as_ref().filter(|_| self.root.is_none())?;
        start.path().map(Path::to_path_buf)
    }

    pub(super) fn check(&self, process: Option<&Process>, findings: &mut Findings) {
        self.check_kind(findings);
        self.check_kill_mode(findings);
        self.check_start(process, findings);
        self.check_reload(process, findings);
        self.check_stop(findings);
        self.check_restart(findings);
        self.check_oom_policy(findings);
        self.check_times(process, findings);
        self.check_fd_store(process, findings);
        if self.is_stale {
            findings.warning("its file has changed since systemd read it", "`systemctl daemon-reload`");
        }
        match (self.main_pid, process) {
            (Some(main), Some(process)) if main != process.pid => findings.problem(
                format!("systemd takes process {main} for the main one, and not {}", process.pid),
                "NotifyAccess=main, and the first generation started by the unit",
            ),
            _ => {}
        }
    }

    fn check_kind(&self, findings: &mut Findings) {
        let (kind, access) = (self.kind.as_str(), self.notify_access.as_str());
        let listens = access != "none";
        match kind {
            "notify" | "notify-reload" if listens => findings.ok(format!("Type={kind}, NotifyAccess={access}")),
            "simple" | "exec" if listens => findings.warning(
                format!("Type={kind}: systemd does not wait for the service to be ready when it starts it"),
                "Type=notify",
            ),
            "notify" | "notify-reload" | "simple" | "exec" => findings.problem(
                format!(
                    "Type={kind} with NotifyAccess={access}: systemd does not hear of the new main process, and ends \
                     the service when the old one exits"
                ),
                "Type=notify and NotifyAccess=main",
            ),
            _ => findings.problem(
                format!("Type={kind}: systemd does not follow the main process over an upgrade"),
                "Type=notify and NotifyAccess=main",
            ),
        }
    }

    fn check_kill_mode(&self, findings: &mut Findings) {
        let what = match self.kill_mode.as_str() {
            "control-group" => return,
            "mixed" => "an older generation that drains is killed by `systemctl stop`",
            _ => "a generation that drains outlives `systemctl stop`",
        };
        findings.warning(format!("KillMode={}: {what}", self.kill_mode), "remove it");
    }

    fn check_oom_policy(&self, findings: &mut Findings) {
        if let policy @ ("stop" | "kill") = self.oom_policy.as_str() {
            findings.warning(
                format!(
                    "OOMPolicy={policy}: where the kernel ends one process for want of memory, such as a new build that is \
                     too large, systemd ends the whole service"
                ),
                "OOMPolicy=continue",
            );
        }
    }

    fn check_start(&self, process: Option<&Process>, findings: &mut Findings) {
        if let Some(root) = self.root {
            return findings.ok(format!("{root}=: the programs of the unit are not looked at"));
        }
        let Some(program) = self.program() else { return };
        let serves = process.filter(|process| !process.supervises()).and_then(Process::program);
        if !program.exists() {
            findings.problem(
                format!("ExecStart={}: there is no such file, so the service cannot be started", program.display()),
                "install it there, or mend the path",
            );
        } else if let Some(other) = serves.filter(|serves| *serves != program) {
            findings.warning(
                format!("ExecStart={}, and an upgrade starts {}", program.display(), other.display()),
                "after a crash or a reboot the unit starts another build than upgrades do: name one path in both",
            );
        } else {
            findings.ok(format!("ExecStart={}", program.display()));
        }
    }

    fn check_reload(&self, process: Option<&Process>, findings: &mut Findings) {
        if self.reload.is_empty() && self.kind != "notify-reload" {
            return findings.warning("there is no ExecReload=, so `systemctl reload` does not upgrade", RELOAD);
        }
        for line in &self.reload {
            line.check_reload(self.root.is_none(), process, findings);
        }
        let upgrades = |line: &ExecLine| line.is_upgrade() || line.signal().is_some();
        if !self.reload.is_empty() && !self.reload.iter().any(upgrades) {
            let first = self.reload.first().map(|line| line.text.as_str()).unwrap_or_default();
            findings.warning(format!("ExecReload={first} does not upgrade, as far as can be seen"), RELOAD);
        }
    }

    /// docs/systemd.md has the reasons.
    fn check_stop(&self, findings: &mut Findings) {
        match self.stop.iter().find(|line| line.is_handover("stop")) {
            None => findings.warning(
                "no ExecStop= that waits: after an upgrade `systemctl stop` and `restart` cut what is in flight",
                STOP,
            ),
            Some(line) if !line.ignores_failure => findings.warning(
                format!("ExecStop={}: a stop after a crash, or one that cuts connections, is a failed one", line.text),
                STOP,
            ),
            Some(line) => findings.ok(format!("ExecStop=-{}", line.text)),
        }
    }

    fn check_restart(&self, findings: &mut Findings) {
        let what = match self.restart.as_str() {
            "always" => return findings.ok("Restart=always"),
            "no" => "nothing starts the service again when it crashes",
            _ => {
                "a crash while an older generation drains is taken for a clean end, and nothing starts the service again"
            }
        };
        findings.warning(format!("Restart={}: {what}", self.restart), "Restart=always");
    }

    /// TimeoutStartSec= holds for a reload too.
    fn check_times(&self, process: Option<&Process>, findings: &mut Findings) {
        let limits = process.and_then(|process| process.status.as_ref()?.limits);
        let time = |of: Option<u64>, default| of.map_or(default, Duration::from_millis);
        let ready = time(limits.map(|limits| limits.ready_timeout_ms), DEFAULT_READY_TIMEOUT);
        let whole = ready + time(limits.map(|limits| limits.trial_ms), DEFAULT_TRIAL);
        let show = humantime::format_duration;
        if let Some(limit) = self.timeout_start.filter(|limit| *limit < whole) {
            findings.problem(
                format!(
                    "TimeoutStartSec={}: systemd gives a reload up then, and an upgrade may take {} (ready_timeout \
                     and trial)",
                    show(limit),
                    show(whole)
                ),
                format!("TimeoutStartSec={} or more, or `handover upgrade --ready-timeout`", whole.as_secs() + 5),
            );
        }
        let drain =
            limits.map(|limits| Duration::from_millis(limits.drain_timeout_ms)).unwrap_or(DEFAULT_DRAIN_TIMEOUT);
        if let Some(limit) = self.timeout_stop.filter(|limit| *limit < drain) {
            findings.warning(
                format!(
                    "TimeoutStopSec={}: what has not drained by then is killed, and drain_timeout is {}",
                    show(limit),
                    show(drain)
                ),
                format!("TimeoutStopSec={} or more, or a shorter drain_timeout", drain.as_secs() + 5),
            );
        }
        if let Some(limit) = self.watchdog.filter(|limit| *limit < ready) {
            findings.warning(
                format!(
                    "WatchdogSec={} is shorter than ready_timeout ({}): a service that says nothing while its new \
                     build starts is killed",
                    show(limit),
                    show(ready)
                ),
                "let the old process go on answering the watchdog (`Config::watchdog`), or a longer WatchdogSec=",
            );
        }
    }

    fn check_fd_store(&self, process: Option<&Process>, findings: &mut Findings) {
        let listeners = process.and_then(|process| process.status.as_ref()).map_or(0, |status| status.listeners.len());
        match self.fd_store_max {
            0 => findings.ok("no FileDescriptorStoreMax=: the sockets do not outlive a crash of the service"),
            max if max < listeners => findings.warning(
                format!("FileDescriptorStoreMax={max} holds not all of the {listeners} listeners over a crash"),
                format!("FileDescriptorStoreMax={}", listeners.next_power_of_two().max(16)),
            ),
            max => findings.ok(format!("FileDescriptorStoreMax={max}: the sockets outlive a crash")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Level;
    use super::*;

    fn unit(text: &str) -> Unit {
        let directory = std::env::temp_dir();
        let path = directory.join(format!("handover-unit-{}-{:p}.service", std::process::id(), text));
        std::fs::write(&path, text).unwrap();
        let file = UnitFile::read(path.to_str().unwrap());
        std::fs::remove_file(&path).unwrap();
        Unit::from_file(&file.unwrap())
    }

    /// Of a good unit with other settings put in.
    fn found(settings: &str) -> Vec<(Level, String)> {
        let good = "[Service]\nType=notify\nExecStart=/bin/sh\nExecReload=handover upgrade --pid $MAINPID\n\
            ExecStop=-handover stop --pid $MAINPID\nRestart=always\nOOMPolicy=continue\n";
        let mut findings = Findings::about("unit");
        unit(&format!("{good}{settings}")).check(None, &mut findings);
        let bad = findings.all.into_iter().filter(|finding| finding.level != Level::Ok);
        bad.map(|finding| (finding.level, finding.message)).collect()
    }

    #[track_caller]
    fn finds(settings: &str, level: Level, part: &str) {
        let found = found(settings);
        assert!(found.iter().any(|(of, text)| *of == level && text.contains(part)), "{settings}: {found:?}");
    }

    #[test]
    fn a_good_unit_has_nothing_to_mend() {
        assert_eq!(found(""), []);
        assert_eq!(found("ExecReload=\nExecReload=/opt/%i/handover upgrade --pid $MAINPID\n"), []);
        let elsewhere = "ExecStart=\nExecStart=/no/such/server\nExecReload=\nExecReload=/no/such/handover upgrade\n";
        assert_eq!(found(&format!("RootDirectory=/srv/image\n{elsewhere}")), []);
        assert_eq!(found("OOMPolicy=\nDelegate=yes\n"), []);
        assert_eq!(found("TimeoutStartSec=infinity\nWatchdogSec=60\nKillMode=control-group\n"), []);
    }

    #[test]
    fn each_mistake_is_found() {
        finds("Type=simple\n", Level::Problem, "does not hear of the new main process");
        finds("Type=simple\nNotifyAccess=main\n", Level::Warning, "does not wait");
        finds("NotifyAccess=none\n", Level::Problem, "NotifyAccess=none");
        finds("Type=forking\n", Level::Problem, "Type=forking");
        finds("KillMode=process\n", Level::Warning, "KillMode=process");
        finds("ExecReload=\n", Level::Warning, "there is no ExecReload=");
        finds("ExecReload=\nExecReload=/bin/true\n", Level::Warning, "does not upgrade");
        finds("ExecReload=\nExecReload=/bin/kill -HUP $MAINPID\n", Level::Warning, "a signal answers nobody");
        finds("ExecReload=/no/such/handover upgrade\n", Level::Problem, "no such program");
        finds("ExecReload=-handover upgrade --pid $MAINPID\n", Level::Problem, "says yes");
        finds("ExecStart=\nExecStart=/no/such/server --port 80\n", Level::Problem, "ExecStart=/no/such/server");
        finds("TimeoutStartSec=20\n", Level::Problem, "TimeoutStartSec=20s");
        finds("TimeoutSec=20\n", Level::Problem, "TimeoutStartSec=20s");
        finds("KillMode=mixed\n", Level::Warning, "is killed by `systemctl stop`");
        finds("ExecStop=\n", Level::Warning, "no ExecStop= that waits");
        finds("ExecStop=\nExecStop=-/bin/true\n", Level::Warning, "no ExecStop= that waits");
        finds("ExecStop=\nExecStop=handover stop --pid $MAINPID\n", Level::Warning, "is a failed one");
        finds("Restart=on-failure\n", Level::Warning, "Restart=on-failure: a crash while an older generation drains");
        finds("Restart=no\n", Level::Warning, "Restart=no: nothing starts the service again");
        finds("OOMPolicy=kill\n", Level::Warning, "OOMPolicy=kill");
        finds("OOMPolicy=\n", Level::Warning, "OOMPolicy=stop");
        finds("TimeoutStopSec=30\n", Level::Warning, "TimeoutStopSec=30s: what has not drained by then is killed");
        finds("WatchdogSec=10s\n", Level::Warning, "WatchdogSec=10s");
    }

    #[test]
    fn what_systemctl_shows_is_read() {
        let properties = Properties::parse(
            "Type=notify\nNotifyAccess=main\nKillMode=control-group\nTimeoutStartUSec=1min 30s\n\
             TimeoutStopUSec=infinity\nRestart=on-failure\nOOMPolicy=stop\nWatchdogUSec=0\n\
             FileDescriptorStoreMax=16\nMainPID=4711\nNeedDaemonReload=yes\nLoadState=loaded\n\
             ExecStart={ path=/srv/app ; argv[]=/srv/app --x ; ignore_errors=no ; start_time=[n/a] ; pid=0 }\n\
             ExecStop={ path=/bin/b ; argv[]=b ; ignore_errors=yes ; start_time=[n/a] }\n\
             ExecReload={ path=/bin/a ; argv[]=a b ; ignore_errors=yes ; start_time=[n/a] }\n\
             ExecReload={ path=/bin/c ; argv[]=c ; ignore_errors=no ; start_time=[n/a] }\n",
        );
        let line = |program: &str, text: &str, ignores_failure| ExecLine {
            program: program.into(),
            text: text.into(),
            ignores_failure,
        };
        let expected = Unit {
            kind: "notify".into(),
            notify_access: "main".into(),
            kill_mode: "control-group".into(),
            start: Some(line("/srv/app", "/srv/app --x", false)),
            reload: vec![line("/bin/a", "a b", true), line("/bin/c", "c", false)],
            stop: vec![line("/bin/b", "b", true)],
            restart: "on-failure".into(),
            oom_policy: "stop".into(),
            timeout_start: Some(Duration::from_secs(90)),
            timeout_stop: None,
            watchdog: None,
            fd_store_max: 16,
            root: None,
            main_pid: Some(4711),
            is_stale: true,
        };
        assert_eq!(Unit::from_properties(&properties), expected);
    }
}
