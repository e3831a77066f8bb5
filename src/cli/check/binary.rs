//! The new build: can it be started here, by the user that the process runs as?

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::unistd::geteuid;

use super::bounded::{self, Ran, TIMEOUT};
use super::elf::{self, Elf, Program};
use super::process::Process;
use super::{Findings, same_file};

pub(super) fn check(program: &Path, process: Option<&Process>, run_version: bool, findings: &mut Findings) {
    let named = program.display();
    let place = match process {
        Some(process) => place(program, process),
        None => Place::Here,
    };
    let path = match &place {
        Place::Here => program.to_path_buf(),
        Place::There(path) => path.clone(),
    };
    if let (Place::There(there), true) = (&place, program.exists()) {
        if !there.exists() {
            return findings.problem(
                format!("{named} is not there as the process sees it: that has a mount namespace of its own"),
                "install it where the service sees it (PrivateTmp=, ProtectHome=, a container)",
            );
        }
    }
    if let Err(error) = handover::check_program(&path) {
        return findings.failure(error.to_string());
    }
    if let Some(cause) = process.and_then(|process| why_it_may_not(process, &path)) {
        findings.problem(cause, "`chmod a+rx`, or another owner");
    }
    match elf::read(&path) {
        Err(error) => findings.warning(format!("{named} cannot be read: {error}"), "look as root"),
        Ok(Program::Neither) => findings.problem(
            format!("{named} is neither an ELF program nor a script that begins with `#!`"),
            "install it again",
        ),
        Ok(Program::Script(interpreter)) => {
            let is_there = exists(&interpreter, process, &place);
            check_script(&named.to_string(), &interpreter, is_there, findings);
        }
        Ok(Program::Elf(elf)) => check_elf(&path, &named.to_string(), &elf, process, &place, findings),
    }
    if run_version {
        match place {
            Place::Here => check_version(program, process, findings),
            Place::There(_) => findings.warning(
                format!("{named} was not run: it is another file in the mount namespace of the process"),
                "run it there",
            ),
        }
    }
}

/// Where the file is that the process would start.
enum Place {
    /// The same as what this command sees.
    Here,
    /// Another one, in a mount namespace of its own.
    There(PathBuf),
}

fn place(program: &Path, process: &Process) -> Place {
    let there = process.seen_by_it(program);
    // Another user's process may not be looked at.
    let may_look = process.seen_by_it(Path::new("/")).exists();
    let is_nowhere = !program.exists() && !there.exists();
    if !may_look || is_nowhere || same_file(program, &there) { Place::Here } else { Place::There(there) }
}

/// By the permission bits, where this command runs as another user than the process.
fn why_it_may_not(process: &Process, path: &Path) -> Option<String> {
    let uid = process.uid()?;
    if uid == 0 || uid == geteuid().as_raw() {
        return None;
    }
    let mut groups = process.groups();
    groups.extend(process.gid());
    let real = fs::canonicalize(path).ok()?;
    let closed = real.ancestors().find(|one| {
        let metadata = fs::metadata(one);
        metadata.is_ok_and(|metadata| !may_execute(metadata.mode(), metadata.uid(), metadata.gid(), uid, &groups))
    })?;
    Some(format!("uid {uid}, which the process runs as, may not enter or execute {}", closed.display()))
}

fn may_execute(mode: u32, owner: u32, group: u32, uid: u32, groups: &[u32]) -> bool {
    let bit = if owner == uid {
        0o100
    } else if groups.contains(&group) {
        0o010
    } else {
        0o001
    };
    mode & bit != 0
}

/// As the process sees it. An absolute link leads elsewhere from here, and is taken at its word.
fn exists(path: &Path, process: Option<&Process>, place: &Place) -> bool {
    match (place, process) {
        (Place::There(_), Some(process)) => fs::symlink_metadata(process.seen_by_it(path)).is_ok(),
        _ => path.exists(),
    }
}

fn check_script(named: &str, interpreter: &Path, is_there: bool, findings: &mut Findings) {
    match is_there {
        true => findings.ok(format!("{named} is a script for {}", interpreter.display())),
        false => findings.problem(
            format!("{named} needs the interpreter {}, which does not exist", interpreter.display()),
            "install it, or mend the first line",
        ),
    }
}

fn check_elf(path: &Path, named: &str, elf: &Elf, process: Option<&Process>, place: &Place, findings: &mut Findings) {
    let machine = std::env::consts::ARCH;
    if elf.architecture != machine {
        let cause = format!("{named} is built for {}, and this machine is {machine}", elf.architecture);
        // Many a kernel can run these beside its own.
        return match (elf.architecture.as_str(), machine) {
            ("x86", "x86_64") | ("arm", "aarch64") => findings.warning(cause, "build for this machine"),
            _ => findings.problem(cause, "build for this machine"),
        };
    }
    let length = fs::metadata(path).map(|metadata| metadata.len()).unwrap_or(u64::MAX);
    if length < elf.bytes_needed {
        let missing = format!("{named} has {length} bytes of at least {}: half a copy", elf.bytes_needed);
        return findings.problem(missing, "install it again: copy it beside, then `mv`");
    }
    let Some(loader) = &elf.loader else {
        return findings.ok(format!("{named} is for {machine}, and static: it needs no library"));
    };
    if !exists(loader, process, place) {
        return findings.problem(
            format!("{named} needs the dynamic loader {}, which does not exist", loader.display()),
            "build for this system, or statically",
        );
    }
    match place {
        Place::Here => check_libraries(path, named, loader, process, findings),
        Place::There(_) => findings.ok(format!("{named} is for {machine}; its libraries were not looked at")),
    }
}

/// Asks the dynamic loader, which maps the program and its libraries and starts neither.
///
/// A crafted file can take over the loader itself, so it is asked as the user that the process runs as, who would run
/// the file anyway; and only the system's own loader is asked, which the file names.
fn check_libraries(path: &Path, named: &str, loader: &Path, process: Option<&Process>, findings: &mut Findings) {
    let not_asked = |findings: &mut Findings, why: &str| {
        findings.warning(format!("{named}: its libraries were not looked at: {why}"), "`ldd` where it is trusted");
    };
    if !is_of_the_system(loader) {
        return not_asked(findings, &format!("its loader {} is not root's alone", loader.display()));
    }
    if process.is_none() && !is_trusted(path) {
        return not_asked(findings, "the file belongs to another user");
    }
    let mut command = as_the_process(loader, process);
    command.arg("--list").arg(path);
    let ran = match bounded::run(command, TIMEOUT) {
        Ok(ran) => ran,
        Err(error) => return not_asked(findings, &error.to_string()),
    };
    let missing = missing_libraries(&ran.output);
    match (missing.is_empty(), ran.status) {
        (false, _) => findings.problem(
            format!("{named}: {}", missing.join("; ")),
            "install the libraries, or build on a system as old as this one",
        ),
        (true, Some(status)) if status.success() => {
            findings.ok(format!("{named} is for {}, and its libraries are there", std::env::consts::ARCH));
        }
        (true, _) => not_asked(findings, &format!("the loader says: {}", first_line(&ran.output))),
    }
}

/// What the loader of glibc or of musl complains about.
fn missing_libraries(output: &str) -> Vec<String> {
    let line = |line: &str| {
        let line = line.trim();
        if let Some(name) = line.strip_suffix("=> not found") {
            return Some(format!("{} is missing", name.trim()));
        }
        // Who it speaks of is said already.
        let line = line.rsplit_once("error while loading shared libraries: ").map_or(line, |(_, cause)| cause);
        let complaint =
            ["' not found", "Error loading shared library", "Error relocating", "cannot open shared object"];
        complaint.iter().any(|part| line.contains(part)).then(|| line.to_owned())
    };
    output.lines().filter_map(line).collect()
}

fn is_of_the_system(loader: &Path) -> bool {
    let real = fs::canonicalize(loader);
    real.and_then(fs::metadata).is_ok_and(|file| file.is_file() && file.uid() == 0 && file.mode() & 0o022 == 0)
}

/// Ours or root's: to look at it must not be a way of running it for somebody else.
fn is_trusted(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|file| file.uid() == 0 || file.uid() == geteuid().as_raw())
}

/// With the identity and the library path of the process, and nothing else of its environment or ours.
fn as_the_process(program: &Path, process: Option<&Process>) -> Command {
    let mut command = Command::new(program);
    command.env_clear().current_dir("/");
    let path = process.and_then(|process| process.variable("PATH")).map(OsString::from_vec);
    command.env("PATH", path.as_deref().unwrap_or(OsStr::new("/usr/local/bin:/usr/bin:/bin")));
    if let Some(libraries) = process.and_then(|process| process.variable("LD_LIBRARY_PATH")) {
        command.env("LD_LIBRARY_PATH", OsString::from_vec(libraries));
    }
    let identity = process.and_then(|process| Some((process.uid()?, process.gid()?)));
    if let Some((uid, gid)) = identity.filter(|(uid, _)| geteuid().is_root() && *uid != 0) {
        command.uid(uid).gid(gid);
    }
    command
}

fn check_version(program: &Path, process: Option<&Process>, findings: &mut Findings) {
    let named = program.display();
    if process.is_none() && !is_trusted(program) {
        return findings.warning(
            format!("{named} was not run: it belongs to another user"),
            "name the process too, and it is run as that one's user",
        );
    }
    let mut command = as_the_process(program, process);
    command.arg("--version");
    match bounded::run(command, TIMEOUT) {
        Err(error) => findings.problem(format!("{named} --version cannot be run: {error}"), "run it by hand"),
        Ok(Ran { status: None, .. }) => findings.warning(
            format!("{named} --version did not end within {} s and was killed", TIMEOUT.as_secs()),
            "does it know --version?",
        ),
        Ok(Ran { status: Some(status), output }) if status.success() => {
            findings.ok(format!("{named} --version says: {}", first_line(&output)));
        }
        Ok(Ran { status: Some(status), output }) => findings
            .problem(format!("{named} --version ended with {status}: {}", first_line(&output)), "run it by hand"),
    }
}

/// Without what could move a cursor.
fn first_line(output: &str) -> String {
    let line = output.lines().find(|line| !line.trim().is_empty()).unwrap_or("(nothing)");
    line.chars().filter(|one| !one.is_control()).take(200).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_loaders_say_is_understood() {
        let glibc = "\tlinux-vdso.so.1 (0x00007ffd)\n\tlibzz.so => not found\n\tlibc.so.6 => /lib/libc.so.6 (0x7f)\n\
            ./m: /lib/libc.so.6: version `GLIBC_2.99' not found (required by ./m)\n";
        let missing = missing_libraries(glibc);
        assert_eq!(missing[0], "libzz.so is missing");
        assert!(missing[1].contains("GLIBC_2.99") && missing.len() == 2, "{missing:?}");
        let musl = "Error loading shared library libzz.so: No such file or directory (needed by ./m)\n";
        assert_eq!(missing_libraries(musl).len(), 1);
        assert!(missing_libraries("\tlibc.so.6 => /lib/libc.so.6 (0x7f)\n").is_empty());
    }

    #[test]
    fn a_list_of_glibc_ends_at_the_first_that_is_missing() {
        let cannot = "libzz.so: cannot open shared object file: No such file or directory";
        assert_eq!(missing_libraries(&format!("./m: error while loading shared libraries: {cannot}\n")), [cannot]);
    }

    #[test]
    fn the_first_class_that_fits_decides() {
        let may = |mode, groups: &[u32]| may_execute(mode, 1000, 50, 1000, groups);
        assert!(may(0o100, &[]) && !may(0o011, &[50]));
        let other = |mode, groups: &[u32]| may_execute(mode, 0, 50, 1000, groups);
        assert!(other(0o010, &[50]) && !other(0o101, &[50]) && other(0o001, &[7]) && !other(0o750, &[7]));
    }

    #[test]
    fn a_version_is_one_harmless_line() {
        assert_eq!(first_line("\n\x1b[2Japp 1.0\nmore\n"), "[2Japp 1.0");
        assert_eq!(first_line(""), "(nothing)");
    }
}
