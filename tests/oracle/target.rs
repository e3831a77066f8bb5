//! Where the load goes.

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// A TCP address, or the path of a Unix stream socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl Target {
    /// What the `Host` field says.
    pub fn host(&self) -> String {
        match self {
            Target::Tcp(address) => address.to_string(),
            Target::Unix(_) => "localhost".to_owned(),
        }
    }
}

impl From<SocketAddr> for Target {
    fn from(address: SocketAddr) -> Self {
        Target::Tcp(address)
    }
}

impl From<PathBuf> for Target {
    fn from(path: PathBuf) -> Self {
        Target::Unix(path)
    }
}

impl From<&Path> for Target {
    fn from(path: &Path) -> Self {
        Target::Unix(path.to_owned())
    }
}

impl FromStr for Target {
    type Err = String;

    /// `127.0.0.1:80`, `[::1]:80`, `unix:name.sock`, or anything with a slash in it.
    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("unix:") {
            Some("") => Err("`unix:` without a path".to_owned()),
            Some(path) => Ok(Target::Unix(path.into())),
            None if text.contains('/') => Ok(Target::Unix(text.into())),
            None => text
                .parse()
                .map(Target::Tcp)
                .map_err(|_| format!("`{text}` is neither ADDRESS:PORT nor the path of a Unix socket (unix:PATH)")),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Target::Tcp(address) => address.fmt(f),
            Target::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_told_apart() {
        assert_eq!("127.0.0.1:80".parse(), Ok(Target::Tcp(([127, 0, 0, 1], 80).into())));
        assert!(matches!("[::1]:80".parse(), Ok(Target::Tcp(SocketAddr::V6(_)))));
        assert_eq!("/run/a".parse(), Ok(Target::Unix("/run/a".into())));
        assert_eq!("unix:a".parse(), Ok(Target::Unix("a".into())));
        assert!("".parse::<Target>().is_err());
        assert!("unix:".parse::<Target>().is_err());
        assert!("localhost".parse::<Target>().is_err());
    }
}
