//! Looking at the new build before it is started, and explaining why it could not be.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::sys::statvfs::{FsFlags, statvfs};
use nix::unistd::{AccessFlags, eaccess};

use crate::error::{Error, ErrorKind};

/// What an upgrade looks at before it starts a program: it exists, is a file, is executable for this user, and neither
/// it nor any directory on the way to it is writable to all.
///
/// # Errors
///
/// Why it will not be started, and what to do.
pub fn check(program: &Path) -> Result<(), Error> {
    let tried = || format!("start the new build `{}`", program.display());
    let refuse = |cause: String, mend: &str| Err(Error::new(ErrorKind::NotUpgraded, tried(), cause).mend(mend));
    let metadata = match fs::metadata(program) {
        Ok(metadata) => metadata,
        Err(error) => {
            if let Some((link, target)) = dangling_link(program) {
                let cause = format!("{} is a link to {}, which does not exist", link.display(), target.display());
                return refuse(cause, "let the link lead to a build");
            }
            let error = Error::io(tried(), error).with_kind(ErrorKind::NotUpgraded);
            return Err(error.mend("put the new build there, or name another with --exe"));
        }
    };
    if metadata.is_dir() {
        return refuse("it is a directory".to_owned(), "name the program in it");
    }
    if !metadata.is_file() {
        return refuse("it is no regular file".to_owned(), "name a program");
    }
    if let Err(error) = eaccess(program, AccessFlags::X_OK) {
        if statvfs(program).is_ok_and(|mount| mount.flags().contains(FsFlags::ST_NOEXEC)) {
            let cause = "its file system is mounted with noexec".to_owned();
            return refuse(cause, "install it elsewhere, or `mount -o remount,exec`");
        }
        return refuse(io::Error::from(error).to_string(), "is it executable? `chmod +x` makes it so");
    }
    if metadata.mode() & 0o002 != 0 {
        let mode = metadata.mode() & 0o7777;
        return refuse(
            format!("anybody may write to it (mode {mode:04o})"),
            "`chmod o-w` before it is run as this user",
        );
    }
    if let Some(directory) = open_to_all(program) {
        let cause = format!("anybody may replace it: the directory {} is writable to all", directory.display());
        return refuse(cause, "`chmod o-w` the directory");
    }
    Ok(())
}

/// A directory on the way to `path`, also by its links, where anybody may put something else in the place of what is there.
fn open_to_all(path: &Path) -> Option<PathBuf> {
    // As many as the kernel follows.
    const LINKS_MAX: usize = 40;
    let mut path = std::path::absolute(path).ok()?;
    for _ in 0..LINKS_MAX {
        let (link, target) = 'links: {
            let mut parts: Vec<&Path> = path.ancestors().collect();
            while let Some(part) = parts.pop() {
                let metadata = fs::symlink_metadata(part).ok()?;
                if metadata.is_symlink() {
                    break 'links (part, fs::read_link(part).ok()?);
                }
                // In a sticky directory like /tmp others cannot replace what is not theirs.
                if metadata.is_dir() && metadata.mode() & 0o1002 == 0o002 {
                    return Some(part.to_path_buf());
                }
            }
            return None;
        };
        let rest = path.strip_prefix(link).ok()?.to_path_buf();
        let led = link.parent()?.join(target);
        path = if rest.as_os_str().is_empty() { led } else { led.join(rest) };
    }
    None
}

/// Why exec failed, where the error alone does not say.
pub(crate) fn explain(program: &Path, directory: &Path, error: io::Error) -> Error {
    let tried = format!("start the new build `{}`", program.display());
    let code = error.raw_os_error();
    let failed = Error::io(tried, error).with_kind(ErrorKind::NotUpgraded);
    match code {
        Some(libc::ENOENT | libc::ENOTDIR | libc::EACCES) if !directory.is_dir() => {
            failed.mend(format!("its working directory {} is gone or not accessible", directory.display()))
        }
        Some(libc::ENOENT) => match interpreter(program) {
            Some(missing) if !missing.exists() => {
                failed.mend(format!("it needs the interpreter {}, which does not exist", missing.display()))
            }
            _ => failed,
        },
        Some(libc::ENOEXEC) => match architecture(program) {
            Some(other) if other != std::env::consts::ARCH => {
                failed.mend(format!("it is built for {other}, and this machine is {}", std::env::consts::ARCH))
            }
            Some(_) => failed.mend("the file is damaged or incomplete"),
            None => failed.mend("it is neither an ELF program nor a script that begins with `#!`"),
        },
        Some(libc::ETXTBSY) => failed.mend("it is being written: install it with `mv`, not with `cp` over it"),
        Some(libc::EAGAIN | libc::ENOMEM) => failed.mend("out of processes or memory: see `ulimit -u` and TasksMax="),
        _ => failed,
    }
}

/// The interpreter of a script, or the dynamic loader of an ELF program of 64 bits.
fn interpreter(program: &Path) -> Option<PathBuf> {
    let file = File::open(program).ok()?;
    let mut start = Vec::new();
    BufReader::new(file).take(4096).read_until(0xff, &mut start).ok()?;
    if let Some(script) = start.strip_prefix(b"#!") {
        let line = script.split(|byte| *byte == b'\n').next()?;
        return Some(PathBuf::from(String::from_utf8_lossy(line).split_ascii_whitespace().next()?));
    }
    let loader = start.windows(4).position(|part| part == b"/lib").filter(|_| start.starts_with(b"\x7fELF"))?;
    let path = start.get(loader..)?.split(|byte| *byte == 0).next()?;
    Some(PathBuf::from(String::from_utf8_lossy(path).into_owned()))
}

/// What an ELF program is built for, in the words of `std::env::consts::ARCH`.
fn architecture(program: &Path) -> Option<String> {
    let mut header = [0; 20];
    File::open(program).ok()?.read_exact(&mut header).ok()?;
    if !header.starts_with(b"\x7fELF") {
        return None;
    }
    let [.., low, high] = header;
    let machine = if header[5] == 2 { u16::from_be_bytes([low, high]) } else { u16::from_le_bytes([low, high]) };
    Some(match machine {
        3 => "x86".into(),
        40 => "arm".into(),
        62 => "x86_64".into(),
        183 => "aarch64".into(),
        243 => "riscv64".into(),
        other => format!("ELF machine {other}"),
    })
}

/// The link on the way to `path` that leads nowhere, and where it should lead.
fn dangling_link(path: &Path) -> Option<(&Path, PathBuf)> {
    let first_missing = path.ancestors().take_while(|part| !part.exists()).last()?;
    Some((first_missing, fs::read_link(first_missing).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    struct Files(PathBuf);

    impl Files {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("handover-preflight-{name}-{}", std::process::id()));
            fs::create_dir(&path).unwrap();
            Self(path)
        }

        fn file(&self, name: &str, content: &[u8], mode: u32) -> PathBuf {
            let path = self.0.join(name);
            fs::write(&path, content).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            path
        }
    }

    impl Drop for Files {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).unwrap();
        }
    }

    #[test]
    fn each_reason_is_named() {
        let files = Files::new("check");
        let refused = |path: &Path| check(path).unwrap_err().to_string();
        assert!(refused(&files.0.join("missing")).contains("No such file"));
        std::os::unix::fs::symlink("releases/5", files.0.join("current")).unwrap();
        for path in ["current", "current/bin/server"] {
            assert!(refused(&files.0.join(path)).contains("current is a link to releases/5, which does not exist"));
        }
        assert!(refused(&files.0).contains("it is a directory"));
        assert!(refused(Path::new("/dev/null")).contains("no regular file"));
        assert!(refused(&files.file("plain", b"", 0o644)).contains("chmod +x"));
        assert!(refused(&files.file("open", b"", 0o757)).contains("mode 0757"));
        let good = files.file("good", b"", 0o755);
        check(&good).unwrap();
        let open = |path: &Path| format!("anybody may replace it: the directory {} is writable to all", path.display());
        fs::set_permissions(&files.0, fs::Permissions::from_mode(0o777)).unwrap();
        assert!(refused(&good).contains(&open(&files.0)));
    }

    /// Whoever may replace a directory, or a link, may replace what is behind it.
    #[test]
    fn a_directory_further_up_or_before_a_link_is_looked_at() {
        let files = Files::new("way");
        let mode = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        let (up, links) = (files.0.join("up"), files.0.join("links"));
        fs::create_dir_all(up.join("app/bin")).unwrap();
        fs::create_dir(&links).unwrap();
        let program = files.file("up/app/bin/server", b"", 0o755);
        let link = links.join("current");
        std::os::unix::fs::symlink("../up/app", &link).unwrap();
        let by_link = link.join("bin/server");
        check(&program).and_then(|()| check(&by_link)).unwrap();
        for open in [&links, &up] {
            mode(open, 0o777);
            let refusal = check(&by_link).unwrap_err().to_string();
            // By the link it is `links/../up`.
            let name = open.file_name().unwrap().to_str().unwrap();
            assert!(refusal.contains(&format!("/{name} is writable to all")), "{refusal}");
            assert_eq!(check(&program).is_err(), *open == up);
            // Like /tmp.
            mode(open, 0o1777);
            check(&by_link).unwrap();
            mode(open, 0o755);
        }
    }

    #[test]
    fn exec_errors_are_explained() {
        let files = Files::new("explain");
        let explained =
            |path: &Path, code| explain(path, Path::new("/"), io::Error::from_raw_os_error(code)).to_string();
        let script = files.file("script", b"#!/no/such/shell -e\n", 0o755);
        assert!(explained(&script, libc::ENOENT).contains("interpreter /no/such/shell,"));
        let mut elf = [0; 20];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        elf[18] = if cfg!(target_arch = "aarch64") { 62 } else { 183 };
        let foreign = files.file("foreign", &elf, 0o755);
        assert!(explained(&foreign, libc::ENOEXEC).contains("it is built for"));
        assert!(explained(&files.file("text", b"hello", 0o755), libc::ENOEXEC).contains("begins with `#!`"));
        let gone = explain(&script, Path::new("/no/such/dir"), io::Error::from_raw_os_error(libc::ENOENT));
        assert!(gone.to_string().contains("working directory /no/such/dir"));
    }
}
