//! Where control sockets live: a directory that nobody else can write to.

use std::env;
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::unistd::geteuid;

use crate::error::{Error, ErrorKind};

const MEND: &str = "set HANDOVER_DIR to a directory of this user, or RuntimeDirectory= in the unit";

/// The first of `$HANDOVER_DIR`, `$RUNTIME_DIRECTORY/handover`, `/run/handover` for root,
/// `$XDG_RUNTIME_DIR/handover`, `/tmp/handover-UID`.
pub(crate) fn default_path() -> PathBuf {
    let variable = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(directory) = variable("HANDOVER_DIR") {
        return directory;
    }
    if let Some(directories) = variable("RUNTIME_DIRECTORY") {
        // systemd separates several by colons.
        let first = env::split_paths(&directories).next().unwrap_or_default();
        return first.join("handover");
    }
    if geteuid().is_root() {
        return PathBuf::from("/run/handover");
    }
    match variable("XDG_RUNTIME_DIR") {
        Some(directory) => directory.join("handover"),
        None => PathBuf::from(format!("/tmp/handover-{}", geteuid())),
    }
}

/// Makes the directory with mode 0700 if it is not there, and refuses one in which others could put their sockets.
pub(crate) fn prepare(directory: &Path) -> Result<(), Error> {
    let tried = || format!("use the control directory {}", directory.display());
    match fs::DirBuilder::new().mode(0o700).create(directory) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(Error::io(tried(), error).mend(MEND)),
    }
    let refuse = |cause: String| Err(Error::new(ErrorKind::Failed, tried(), cause).mend(MEND));
    let metadata = fs::symlink_metadata(directory).map_err(|error| Error::io(tried(), error).mend(MEND))?;
    if !metadata.is_dir() {
        return refuse("it is no directory".to_owned());
    }
    if metadata.uid() != geteuid().as_raw() {
        return refuse(format!("it belongs to uid {} and not to uid {}", metadata.uid(), geteuid()));
    }
    if metadata.mode() & 0o022 != 0 {
        return refuse(format!("others may write to it (mode {:04o})", metadata.mode() & 0o7777));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_directory_is_made_private_and_one_that_others_write_to_is_refused() {
        let base = env::temp_dir().join(format!("handover-directory-{}", std::process::id()));
        fs::create_dir(&base).unwrap();
        let directory = base.join("control");
        prepare(&directory).unwrap();
        prepare(&directory).unwrap();
        assert_eq!(fs::metadata(&directory).unwrap().mode() & 0o7777, 0o700);
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o770)).unwrap();
        let error = prepare(&directory).unwrap_err().to_string();
        assert!(error.contains("others may write to it (mode 0770)"), "{error}");
        let link = base.join("link");
        std::os::unix::fs::symlink(&directory, &link).unwrap();
        assert!(prepare(&link).unwrap_err().to_string().contains("no directory"));
        assert!(prepare(&base.join("a/b")).is_err());
        fs::remove_dir_all(&base).unwrap();
    }
}
