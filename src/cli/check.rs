//! `handover check`: will an upgrade work? Each finding is one line, with what to do about it.

mod binary;
mod bounded;
mod cgroup;
mod elf;
mod exec_line;
mod process;
mod proc_files;
mod systemctl;
mod unit;
mod unit_file;
#[cfg(any(test, fuzzing))]
pub(super) mod fuzz;

use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;
use serde_json::json;

use super::exit::{Exit, Failure};
use super::output::Output;
use super::{Which, build, status};
use process::Process;
use unit::Unit;

/// Say whether an upgrade will work, and what to mend if not
///
/// Looks at the new build, at the running process and, with --unit, at its systemd unit. Nothing is changed, and nothing
/// is run but the dynamic loader (and the new build itself with --run-version).
#[derive(Args, Debug)]
#[command(after_long_help = "Examples:\n  \
    handover check --pid 4711\n  \
    handover check --unit app.service                    its main process, its program and the unit\n  \
    handover check --pid 4711 --exe /srv/app/releases/43/server --run-version\n  \
    handover check --unit ./app.service                  a unit file, before it is installed\n  \
    handover check --intercept                           may `handover exec` intercept here?\n  \
    handover check --pid 4711 --json | jq -r 'select(.level == \"problem\").message'\n\n\
    Exit codes: 0 no problem, though there may be warnings; 1 a problem; 2 usage.")]
pub(crate) struct Arguments {
    #[command(flatten)]
    which: Which,
    /// Look at this program instead of the one that an upgrade would start
    #[arg(long, value_name = "PATH")]
    exe: Option<PathBuf>,
    /// Look at this systemd unit too: by name, or a unit file by its path
    #[arg(long, value_name = "NAME")]
    unit: Option<String>,
    /// Look whether `handover exec` can keep the sockets that a program binds by itself
    #[arg(long)]
    intercept: bool,
    /// Run the new build with --version, for 5 s at the most
    #[arg(long)]
    run_version: bool,
    /// Print one JSON object a line
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Level {
    Ok,
    Warning,
    Problem,
}

impl Level {
    fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Problem => "problem",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Finding {
    level: Level,
    /// What was looked at: `machine`, `process`, `binary` or `unit`.
    about: &'static str,
    message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    mend: Option<String>,
}

/// The findings about one thing, in the order in which they were made.
#[derive(Debug)]
struct Findings {
    about: &'static str,
    all: Vec<Finding>,
}

impl Findings {
    fn about(about: &'static str) -> Self {
        Self { about, all: vec![] }
    }

    fn ok(&mut self, message: impl Into<String>) {
        self.add(Level::Ok, message.into(), None);
    }

    fn warning(&mut self, message: impl Into<String>, mend: impl Into<String>) {
        self.add(Level::Warning, message.into(), Some(mend.into()));
    }

    fn problem(&mut self, message: impl Into<String>, mend: impl Into<String>) {
        self.add(Level::Problem, message.into(), Some(mend.into()));
    }

    /// A message of the library, which says what to do itself.
    fn failure(&mut self, message: impl Into<String>) {
        self.add(Level::Problem, message.into(), None);
    }

    fn add(&mut self, level: Level, message: String, mend: Option<String>) {
        self.all.push(Finding { level, about: self.about, message, mend });
    }
}

pub(super) fn run(arguments: &Arguments, output: &mut Output) -> Result<Exit, Failure> {
    let mut unit_findings = Findings::about("unit");
    let unit = arguments.unit.as_deref().and_then(|name| Unit::load(name, &mut unit_findings));
    let mut process_findings = Findings::about("process");
    let process = find_process(arguments, unit.as_ref(), &mut process_findings)?;
    let binary_findings = check_binary(arguments, process.as_ref(), unit.as_ref())?;
    if let Some(unit) = &unit {
        unit.check(process.as_ref(), &mut unit_findings);
    }
    let machine_findings = check_machine(arguments);
    let all =
        [machine_findings, process_findings, binary_findings, unit_findings].map(|findings| findings.all).concat();
    Ok(print(&all, output))
}

/// The process that is named; else the main process of the unit; else, if nothing else is to be looked at, the only
/// handover process of this machine.
fn find_process(
    arguments: &Arguments,
    unit: Option<&Unit>,
    findings: &mut Findings,
) -> Result<Option<Process>, Failure> {
    let named = match arguments.which.target() {
        Err(failure) if failure.exit == Exit::NotRunning => {
            findings.failure(failure.message);
            return Ok(None);
        }
        named => named?,
    };
    let of_unit = || unit.and_then(Unit::main_process);
    let target = match named.or_else(of_unit) {
        Some(target) => target,
        None if arguments.exe.is_some() || arguments.unit.is_some() || arguments.intercept => return Ok(None),
        None => status::the_only_one()?,
    };
    Ok(process::check(&target, arguments.exe.is_none(), findings))
}

fn check_machine(arguments: &Arguments) -> Findings {
    let mut findings = Findings::about("machine");
    if arguments.intercept {
        match handover::supervisor::can_intercept() {
            Ok(()) => findings.ok("`handover exec` can keep the sockets that a program binds by itself"),
            Err(error) => findings.failure(error.to_string()),
        }
    }
    findings
}

fn check_binary(arguments: &Arguments, process: Option<&Process>, unit: Option<&Unit>) -> Result<Findings, Failure> {
    let mut findings = Findings::about("binary");
    let asked = arguments.exe.as_deref().map(build::seen_from_here).transpose()?;
    let of_process = || process.and_then(Process::program);
    let of_unit = || unit.and_then(Unit::program);
    if let Some(program) = asked.or_else(of_process).or_else(of_unit) {
        binary::check(&program, process, arguments.run_version, &mut findings);
    }
    Ok(findings)
}

fn print(findings: &[Finding], output: &mut Output) -> Exit {
    let count = |level| findings.iter().filter(|finding| finding.level == level).count();
    let (problems, warnings) = (count(Level::Problem), count(Level::Warning));
    let exit = if problems == 0 { Exit::Done } else { Exit::Failed };
    let verdict = verdict(problems, warnings);
    if output.is_json() {
        findings.iter().for_each(|finding| output.json_line(finding));
        output.json_line(&json!({
            "event": "result", "message": verdict, "problems": problems, "warnings": warnings, "exit_code": exit as u8,
        }));
    } else {
        findings.iter().for_each(|finding| output.long_line(&line(finding), 18));
        output.line(&verdict);
    }
    exit
}

fn line(finding: &Finding) -> String {
    let mend = finding.mend.as_ref().map(|mend| format!(" ({mend})")).unwrap_or_default();
    format!("{:<8} {:<8} {}{mend}", finding.level.name(), finding.about, finding.message)
}

fn verdict(problems: usize, warnings: usize) -> String {
    let some = |count: usize, what: &str| format!("{count} {what}{}", if count == 1 { "" } else { "s" });
    match (problems, warnings) {
        (0, 0) => "nothing stands in the way of an upgrade".to_owned(),
        (0, _) => format!("nothing stands in the way of an upgrade; {}", some(warnings, "warning")),
        (_, 0) => some(problems, "problem"),
        _ => format!("{}, {}", some(problems, "problem"), some(warnings, "warning")),
    }
}

/// Whether two paths lead to one file.
fn same_file(one: &Path, other: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let identity = |path: &Path| std::fs::metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()));
    identity(one).is_some() && identity(one) == identity(other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_is_one_line_with_its_mend() {
        let mut findings = Findings::about("unit");
        findings.problem("KillMode=none", "remove it");
        findings.ok("Type=notify");
        let lines: Vec<String> = findings.all.iter().map(line).collect();
        assert_eq!(lines, ["problem  unit     KillMode=none (remove it)", "ok       unit     Type=notify"]);
    }

    #[test]
    fn the_verdict_counts() {
        assert_eq!(verdict(0, 1), "nothing stands in the way of an upgrade; 1 warning");
        assert_eq!(verdict(2, 1), "2 problems, 1 warning");
    }
}
