//! What `handover check` reads: files of others, and tables of the kernel.

use handover::control::Status;

use super::Findings;
use super::cgroup;
use super::elf;
use super::exec_line::ExecLine;
use super::proc_files::{bytes, effective_id, field, groups, has_signal, soft_limit, variable};
use super::process::Process;
use super::systemctl::Properties;
use super::unit::Unit;
use super::unit_file::{UnitFile, time_span};

pub(crate) fn unit_files(bytes: &[u8]) {
    let mut file = UnitFile::default();
    // Each part is a drop-in.
    String::from_utf8_lossy(bytes).split('\0').for_each(|text| file.parse(text));
    judge(&Unit::from_file(&file));
}

pub(crate) fn systemctl(bytes: &[u8]) {
    judge(&Unit::from_properties(&Properties::parse(&String::from_utf8_lossy(bytes))));
}

/// What a good unit makes of the limits of a process.
pub(super) fn judge_with(process: &Process, findings: &mut Findings) {
    let mut file = UnitFile::default();
    file.parse("[Service]\nType=notify\nTimeoutStartSec=1min\nFileDescriptorStoreMax=1\nWatchdogSec=5\n");
    Unit::from_file(&file).check(Some(process), findings);
}

fn judge(unit: &Unit) {
    let mut findings = Findings::about("unit");
    unit.check(None, &mut findings);
    assert!(!findings.all.is_empty());
    assert!(findings.all.iter().all(|finding| !super::line(finding).contains('\n')));
    assert!(unit.program().is_none_or(|program| program.is_absolute()));
}

pub(crate) fn exec_lines(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    for line in text.lines() {
        for line in [ExecLine::of_file(line), ExecLine::of_property(line)].into_iter().flatten() {
            assert!(!line.is_upgrade() || line.text.contains("handover"));
            assert!(line.signal().is_none() || line.text.contains("kill"));
        }
        let _ = time_span(line);
    }
}

pub(crate) fn process_files(table: &[u8]) {
    let text = String::from_utf8_lossy(table);
    for name in ["Uid", "RssAnon", "Threads"] {
        assert!(field(&text, name).is_none_or(|value| !value.contains('\n')));
        let _ = (bytes(&text, name), effective_id(&text, name));
    }
    let _ = (groups(&text), soft_limit(&text, "Max open files"), variable(table, "PATH"));
    let _ = (1..=64).filter(|signal| has_signal(&text, "SigCgt", *signal)).count();
    cgroup::fuzz(&text);
}

pub(crate) fn programs(bytes: &[u8]) {
    use std::io::Write;
    let memfd = nix::sys::memfd::memfd_create("program", nix::sys::memfd::MFdFlags::MFD_CLOEXEC);
    let Ok(mut file) = memfd.map(std::fs::File::from) else { return };
    let _ = file.write_all(bytes);
    if let Ok(elf::Program::Elf(elf)) = elf::read_file(&file) {
        assert!(bytes.starts_with(b"\x7fELF"));
        assert!(elf.loader.is_none_or(|loader| loader.as_os_str().len() <= 3 * elf::PATH_BYTES_MAX as usize));
    }
}

pub(crate) fn statuses(status: &Status) {
    let mut findings = Findings::about("process");
    super::process::judge_told(status, &mut findings);
    assert!(!findings.all.is_empty());
}
