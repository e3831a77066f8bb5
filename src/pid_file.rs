//! A pid file that names the serving process at every instant: written beside it and renamed over it.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::error::Error;

#[derive(Debug)]
pub(crate) struct PidFile {
    path: PathBuf,
    /// Beside it, so that the rename stays within one file system.
    prepared: PathBuf,
}

impl PidFile {
    pub(crate) fn new(path: &Path) -> Self {
        let prepared = prepared_by(path, std::process::id());
        Self { path: path.to_path_buf(), prepared }
    }

    /// Everything that can fail, before anybody relies on this process: a full disk, a missing directory.
    pub(crate) fn prepare(&self) -> Result<(), Error> {
        let write = || -> io::Result<()> {
            // A link that somebody has planted there, or what a process of the same pid has left, is no file to write to.
            self.discard();
            let mut file = fs::File::create_new(&self.prepared)?;
            writeln!(file, "{}", std::process::id())?;
            file.sync_all()
        };
        write().map_err(|error| {
            self.discard();
            Error::io(format!("write the pid file {}", self.path.display()), error)
        })
    }

    /// From now on this process is the one.
    pub(crate) fn put_in_place(&self) {
        if let Err(error) = fs::rename(&self.prepared, &self.path) {
            log::error!("cannot put the pid file {} in place: {error}", self.path.display());
        }
    }

    pub(crate) fn discard(&self) {
        let _ = fs::remove_file(&self.prepared);
    }

    /// What a process has left behind that was killed in between.
    pub(crate) fn discard_of(&self, pid: u32) {
        let _ = fs::remove_file(prepared_by(&self.path, pid));
    }

    /// The service ends; but the file may name another process by now.
    pub(crate) fn remove(&self) {
        let names_us = fs::read_to_string(&self.path).is_ok_and(|text| text.trim() == std::process::id().to_string());
        if names_us {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn prepared_by(path: &Path, pid: u32) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{pid}"));
    path.with_file_name(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_is_whole_at_every_instant_and_removed_only_if_ours() {
        let path = std::env::temp_dir().join(format!("handover-pid-file-{}", std::process::id()));
        fs::write(&path, "1\n").unwrap();
        let file = PidFile::new(&path);
        file.prepare().unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "1\n");
        file.remove();
        assert!(path.exists());
        file.put_in_place();
        assert_eq!(fs::read_to_string(&path).unwrap(), format!("{}\n", std::process::id()));
        assert!(!file.prepared.exists());
        file.remove();
        assert!(!path.exists());
    }

    #[test]
    fn a_directory_that_is_missing_is_told_before_it_matters() {
        let error = PidFile::new(Path::new("/nonexistent/app.pid")).prepare().unwrap_err();
        assert!(
            error.to_string().starts_with("cannot write the pid file /nonexistent/app.pid: No such file"),
            "{error}"
        );
    }
}
