//! As much of the ELF format as tells whether a program can run here. `elf(5)`; everything read is checked, because a
//! half-copied or hostile file is what this is for.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const PT_LOAD: u32 = 1;
const PT_INTERP: u32 = 3;
const SEGMENTS_MAX: u16 = 512;
pub(super) const PATH_BYTES_MAX: u64 = 4096;

/// What sort of file is to be started.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Program {
    Elf(Elf),
    /// With its interpreter.
    Script(PathBuf),
    Neither,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Elf {
    /// In the words of `std::env::consts::ARCH`.
    pub(super) architecture: String,
    /// The dynamic loader; none for a static program.
    pub(super) loader: Option<PathBuf>,
    /// How long the file must be for every segment to be in it.
    pub(super) bytes_needed: u64,
}

pub(super) fn read(path: &Path) -> io::Result<Program> {
    read_file(&File::open(path)?)
}

pub(super) fn read_file(file: &File) -> io::Result<Program> {
    let mut start = [0; 256];
    let count = file.read_at(&mut start, 0)?;
    let start = start.get(..count).unwrap_or_default();
    if let Some(line) = start.strip_prefix(b"#!") {
        let line = line.split(|byte| *byte == b'\n').next().unwrap_or_default();
        let interpreter = String::from_utf8_lossy(line).split_ascii_whitespace().next().map(PathBuf::from);
        return Ok(interpreter.map_or(Program::Neither, Program::Script));
    }
    Ok(elf(file, start).map_or(Program::Neither, Program::Elf))
}

/// Numbers at offsets, in the byte order and the word size of the file.
struct Header<'a> {
    bytes: &'a [u8],
    big_endian: bool,
    wide: bool,
}

impl Header<'_> {
    fn number(&self, offset: usize, size: usize) -> Option<u64> {
        let bytes = self.bytes.get(offset..offset.checked_add(size)?)?;
        let fold = |number: u64, byte: &u8| (number << 8) | u64::from(*byte);
        Some(if self.big_endian { bytes.iter().fold(0, fold) } else { bytes.iter().rev().fold(0, fold) })
    }

    /// A field that is elsewhere in a file of 32 bits, and a word there.
    fn word(&self, wide_offset: usize, narrow_offset: usize) -> Option<u64> {
        if self.wide { self.number(wide_offset, 8) } else { self.number(narrow_offset, 4) }
    }
}

fn elf(file: &File, start: &[u8]) -> Option<Elf> {
    let wide = match start.strip_prefix(b"\x7fELF")?.first()? {
        1 => false,
        2 => true,
        _ => return None,
    };
    let header = Header { bytes: start, big_endian: start.get(5) == Some(&2), wide };
    let architecture = architecture(header.number(18, 2)?, wide);
    let table = header.word(32, 28)?;
    let (size_at, count_at) = if wide { (54, 56) } else { (42, 44) };
    let (size, count) = (header.number(size_at, 2)?, u16::try_from(header.number(count_at, 2)?).ok()?);
    let mut found = Elf { architecture, loader: None, bytes_needed: table.checked_add(size * u64::from(count))? };
    for number in 0..count.min(SEGMENTS_MAX) {
        let mut bytes = [0; 56];
        let at = table.checked_add(u64::from(number) * size)?;
        let read = file.read_at(&mut bytes, at).ok()?;
        let segment = Header { bytes: bytes.get(..read)?, ..header };
        // Cut off: `bytes_needed` says so.
        let Some(kind) = segment.number(0, 4) else { break };
        let (Some(offset), Some(length)) = (segment.word(8, 4), segment.word(32, 16)) else { break };
        match u32::try_from(kind) {
            Ok(PT_LOAD) => found.bytes_needed = found.bytes_needed.max(offset.saturating_add(length)),
            Ok(PT_INTERP) => found.loader = loader(file, offset, length),
            _ => {}
        }
    }
    Some(found)
}

fn loader(file: &File, offset: u64, length: u64) -> Option<PathBuf> {
    let mut path = vec![0; usize::try_from(length.min(PATH_BYTES_MAX)).ok()?];
    file.read_exact_at(&mut path, offset).ok()?;
    let path = path.split(|byte| *byte == 0).next()?;
    Some(PathBuf::from(String::from_utf8_lossy(path).into_owned()))
}

fn architecture(machine: u64, wide: bool) -> String {
    let name = match (machine, wide) {
        (3, _) => "x86",
        (8, false) => "mips",
        (8, true) => "mips64",
        (20, _) => "powerpc",
        (21, _) => "powerpc64",
        (22, _) => "s390x",
        (40, _) => "arm",
        (62, _) => "x86_64",
        (183, _) => "aarch64",
        (243, false) => "riscv32",
        (243, true) => "riscv64",
        (258, _) => "loongarch64",
        _ => return format!("ELF machine {machine}"),
    };
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Read;

    use super::*;

    fn written(name: &str, bytes: &[u8]) -> (PathBuf, Program) {
        let path = std::env::temp_dir().join(format!("handover-elf-{name}-{}", std::process::id()));
        fs::write(&path, bytes).unwrap();
        let program = read(&path).unwrap();
        fs::remove_file(&path).unwrap();
        (path, program)
    }

    #[test]
    fn this_very_program_is_for_this_machine() {
        let path = std::env::current_exe().unwrap();
        let Program::Elf(elf) = read(&path).unwrap() else { panic!() };
        assert_eq!(elf.architecture, std::env::consts::ARCH);
        assert!(elf.bytes_needed <= fs::metadata(&path).unwrap().len());
        if let Some(loader) = elf.loader {
            assert!(loader.exists(), "{}", loader.display());
        }
    }

    #[test]
    fn half_a_copy_is_seen() {
        let whole = fs::read(std::env::current_exe().unwrap()).unwrap();
        let (_, program) = written("half", &whole[..4096]);
        let Program::Elf(elf) = program else { panic!() };
        assert!(elf.bytes_needed > 4096, "{elf:?}");
        // Wherever it is cut nothing goes wrong.
        for length in 0..80 {
            written("cut", &whole[..length]);
        }
    }

    #[test]
    fn scripts_and_other_files_are_told_apart() {
        assert_eq!(written("script", b"#! /usr/bin/env python3\n").1, Program::Script("/usr/bin/env".into()));
        assert_eq!(written("text", b"hello").1, Program::Neither);
        assert_eq!(written("bang", b"#!\n").1, Program::Neither);
        assert_eq!(written("empty", b"").1, Program::Neither);
    }

    #[test]
    fn garbage_behind_the_magic_number_does_no_harm() {
        let mut bytes = [0xff; 256];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        written("garbage", &bytes);
        bytes[4] = 1;
        written("garbage32", &bytes);
    }

    proptest::proptest! {
        #![proptest_config(proptest::test_runner::Config::with_cases(64))]
        /// Any of the numbers in its header may be wrong.
        #[test]
        fn a_garbled_header_does_no_harm(
            changes in proptest::collection::vec((4..64_usize, proptest::num::u8::ANY), 1..6), id in 0..u32::MAX
        ) {
            let mut start = [0; 4096];
            File::open(std::env::current_exe().unwrap()).unwrap().read_exact(&mut start).unwrap();
            changes.iter().for_each(|(place, byte)| start[*place] = *byte);
            written(&format!("garbled-{id}"), &start);
        }
    }
}
