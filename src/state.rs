//! The application's state on its way from the old process to the new one.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::protocol::STATE_BYTES_MAX;

/// State that an application hands from its old build to its new one: bytes, and a version that says how to read them.
///
/// The library does not look into it. A new build must cope with the versions that older builds wrote, and with none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct HandedState {
    /// The application's own number for the format of `bytes`.
    pub version: u32,
    /// At most 64 MiB.
    pub bytes: Vec<u8>,
}

impl HandedState {
    /// State in the format `version`.
    #[must_use]
    pub fn new(version: u32, bytes: impl Into<Vec<u8>>) -> Self {
        Self { version, bytes: bytes.into() }
    }

    /// A sealed memfd with the bytes: whatever happens to this process, the new one reads what it was given.
    pub(crate) fn to_memfd(&self) -> io::Result<OwnedFd> {
        if self.bytes.len() as u64 > STATE_BYTES_MAX {
            let text = format!("a state of {} bytes is more than {STATE_BYTES_MAX}", self.bytes.len());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let memfd = memfd_create("handover-state", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
        let mut file = File::from(memfd);
        file.write_all(&self.bytes)?;
        let seals = SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
        Ok(file.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sealed_state_cannot_be_changed() {
        let mut file = File::from(HandedState::new(1, "sessions").to_memfd().unwrap());
        assert!(file.write_all(b"x").is_err());
        assert_eq!(file.metadata().unwrap().len(), 8);
    }

    #[test]
    fn a_state_over_the_bound_is_refused() {
        let state = HandedState::new(1, vec![0; usize::try_from(STATE_BYTES_MAX).unwrap() + 1]);
        assert_eq!(state.to_memfd().unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
