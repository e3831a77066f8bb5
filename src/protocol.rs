//! Frames: encode, decode, limits. No I/O; `docs/protocol.md` is the specification.

use std::borrow::Cow;
use std::fmt;
use std::fs::Metadata;
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::text::printable;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::shared::unix_ms;

/// The kernel's `SCM_MAX_FD`.
pub(crate) const FDS_PER_MESSAGE: usize = 253;
/// The payload of each message that carries fds.
pub(crate) const FD_BYTE: u8 = b'F';
pub(crate) const HEADER_BYTES: usize = 16;
pub(crate) const BODY_BYTES_MAX: usize = 4 << 20;
pub(crate) const FDS_MAX: usize = 16_384;
/// From so many listeners on a second thread is worth its start.
pub(crate) const MANY: usize = 1000;
pub(crate) const STATE_BYTES_MAX: u64 = 64 << 20;
pub(crate) const NAME_BYTES_MAX: usize = 255;
/// The number of the channel's fd in the new process.
pub(crate) const CHANNEL_FD: i32 = 3;
pub(crate) const CHANNEL_VARIABLE: &str = "HANDOVER_FD";
/// What this build speaks.
pub(crate) const VERSIONS: Versions = Versions { min: 1, max: 1 };

const MAGIC: [u8; 4] = *b"HNDO";

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Versions {
    pub(crate) min: u32,
    pub(crate) max: u32,
}

impl Versions {
    /// The highest version in both ranges.
    pub(crate) fn common(self, other: Self) -> Option<u32> {
        let version = self.max.min(other.max);
        (version >= self.min && version >= other.min).then_some(version)
    }
}

impl std::fmt::Display for Versions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} to {}", self.min, self.max)
    }
}

/// What sort of socket a listener is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Kind {
    /// A listening TCP socket, IPv4 or IPv6.
    Tcp,
    /// A listening Unix stream socket.
    Unix,
    /// A bound UDP socket.
    Udp,
    /// A bound Unix datagram socket.
    UnixDatagram,
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Unix => "unix",
            Self::Udp => "udp",
            Self::UnixDatagram => "unix-datagram",
        })
    }
}

/// Which build a process runs: the file as it was at the start.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct BuildIdentity {
    /// Where the file was.
    #[serde(serialize_with = "lossy")]
    pub path: PathBuf,
    /// `st_dev`.
    pub device: u64,
    /// `st_ino`.
    pub inode: u64,
    /// In bytes; 0 if it is not known.
    #[serde(default)]
    pub size: u64,
    /// When it was last written, in milliseconds since 1970; 0 if it is not known.
    #[serde(default)]
    pub modified_unix_ms: u64,
}

impl BuildIdentity {
    /// Whether a file is this one. Its size and time are looked at too, because an inode number that is free is given to
    /// the next file.
    pub(crate) fn is(&self, file: &Metadata) -> bool {
        let known = |own: u64, other: u64| own == 0 || own == other;
        (self.device, self.inode) == (file.dev(), file.ino())
            && known(self.size, file.len())
            && known(self.modified_unix_ms, file.modified().map(unix_ms).unwrap_or_default())
    }
}

/// JSON is Unicode, paths are not; for people that is near enough.
pub(crate) fn lossy<S: serde::Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&path.to_string_lossy())
}

/// Device and inode of a path that a generation of this service made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PathIdentity {
    pub(crate) device: u64,
    pub(crate) inode: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct OfferedListener {
    pub(crate) name: String,
    pub(crate) kind: Kind,
    pub(crate) address: OfferedAddress,
    pub(crate) cookie: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) path: Option<PathIdentity>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) backlog: Option<u32>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) activated: bool,
}

/// Where a listener is bound. It is a string on the wire; there are thousands, so IP addresses never become one here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum OfferedAddress {
    Ip(SocketAddr),
    /// Of a Unix socket: for people.
    Text(String),
}

impl Serialize for OfferedAddress {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Ip(address) => address.serialize(serializer),
            Self::Text(text) => text.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for OfferedAddress {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl serde::de::Visitor<'_> for Text {
            type Value = OfferedAddress;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an address")
            }

            fn visit_str<E>(self, text: &str) -> Result<OfferedAddress, E> {
                Ok(text.parse().map_or_else(|_| OfferedAddress::Text(text.to_owned()), OfferedAddress::Ip))
            }
        }
        deserializer.deserialize_str(Text)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct OfferedState {
    pub(crate) version: u32,
    pub(crate) length: u64,
}

/// A generation that no longer accepts and finishes its connections.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct DrainingGeneration {
    /// Its process, in its own pid namespace.
    pub pid: i32,
    /// Its number.
    pub generation: u64,
}

/// The new process is to run when the old one has ended, and not before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct OfferedRestart {
    /// Then the new process kills the old one.
    pub(crate) kill_after_ms: u64,
    /// CLOCK_MONOTONIC when it was asked for: the new process tells its times from there on.
    pub(crate) asked_us: u64,
    /// The last fd is the connection of whoever asked.
    #[serde(default)]
    pub(crate) asker: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Offer {
    pub(crate) protocol: Versions,
    pub(crate) generation: u64,
    pub(crate) pid: i32,
    pub(crate) listeners: Vec<OfferedListener>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) state: Option<OfferedState>,
    #[serde(default)]
    pub(crate) stderr: bool,
    #[serde(default)]
    pub(crate) draining: Vec<DrainingGeneration>,
    #[serde(default)]
    pub(crate) ready_timeout_ms: u64,
    #[serde(default)]
    pub(crate) trial_ms: u64,
    /// What the old process runs: what `previous` means to the new one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) build: Option<BuildIdentity>,
    /// The program that upgrades of the new process start, where that is not the one that it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) program: Option<PathBuf>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) restart: Option<OfferedRestart>,
}

impl Offer {
    pub(crate) fn fd_count(&self) -> usize {
        let asker = self.restart.as_ref().is_some_and(|restart| restart.asker);
        self.listeners.len() + usize::from(self.state.is_some()) + usize::from(self.stderr) + usize::from(asker)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct AdoptedListener {
    pub(crate) name: String,
    pub(crate) cookie: u64,
}

/// What became of the listeners in a new generation, by name, in the order in which its application asked for them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Claims {
    /// Taken over from the old process.
    #[serde(default)]
    pub kept: Vec<String>,
    /// Bound afresh.
    #[serde(default)]
    pub added: Vec<String>,
    /// Offered, but not asked for.
    #[serde(default)]
    pub unclaimed: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Message {
    Offer(Box<Offer>),
    /// `restart`: it will wait for our end. A build that knows nothing of restarts does not say so.
    Adopted {
        protocol: u32,
        listeners: Vec<AdoptedListener>,
        restart: bool,
    },
    Refused {
        reason: String,
        protocol: Option<Versions>,
    },
    Starting {
        reason: String,
    },
    GaveUp {
        reason: String,
    },
    Ready(Claims),
    Commit,
    Accepting {
        listeners: Vec<String>,
    },
    Settled,
    Aborted {
        reason: String,
    },
    Stopping,
}

/// The bodies that have no type of their own, as they stand on the wire.
#[derive(Serialize, Deserialize)]
struct AdoptedBody<'a> {
    protocol: u32,
    listeners: Cow<'a, [AdoptedListener]>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    restart: bool,
}

#[derive(Serialize, Deserialize)]
struct RefusedBody<'a> {
    reason: Cow<'a, str>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    protocol: Option<Versions>,
}

#[derive(Serialize, Deserialize)]
struct ReasonBody<'a> {
    reason: Cow<'a, str>,
}

#[derive(Serialize, Deserialize)]
struct ListenersBody<'a> {
    listeners: Cow<'a, [String]>,
}

#[derive(Serialize, Deserialize)]
struct EmptyBody {}

/// Why bytes are not a frame. The text completes "the other side sent …".
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Malformed(pub(crate) String);

impl std::fmt::Display for Malformed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) kind: u16,
    pub(crate) body_bytes: usize,
    pub(crate) fds: usize,
}

impl Header {
    pub(crate) fn decode(bytes: [u8; HEADER_BYTES]) -> Result<Self, Malformed> {
        let [m0, m1, m2, m3, k0, k1, _, _, b0, b1, b2, b3, f0, f1, f2, f3] = bytes;
        if [m0, m1, m2, m3] != MAGIC {
            return Err(Malformed(format!("bytes that are no frame ({:?}…)", String::from_utf8_lossy(&bytes))));
        }
        let body_bytes = u32::from_be_bytes([b0, b1, b2, b3]) as usize;
        let fds = u32::from_be_bytes([f0, f1, f2, f3]) as usize;
        if body_bytes > BODY_BYTES_MAX {
            return Err(Malformed(format!("a frame of {body_bytes} bytes, more than {BODY_BYTES_MAX}")));
        }
        if fds > FDS_MAX {
            return Err(Malformed(format!("a frame of {fds} fds, more than {FDS_MAX}")));
        }
        Ok(Self { kind: u16::from_be_bytes([k0, k1]), body_bytes, fds })
    }

    /// The versions that an offer names, whatever else another version has in it.
    pub(crate) fn offered_versions(self, body: &[u8]) -> Option<Versions> {
        #[derive(Deserialize)]
        struct OnlyVersions {
            protocol: Versions,
        }
        let only: OnlyVersions = (self.kind == 1).then(|| serde_json::from_slice(body).ok())??;
        Some(only.protocol)
    }

    fn encode(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..6].copy_from_slice(&self.kind.to_be_bytes());
        bytes[8..12].copy_from_slice(&(self.body_bytes as u32).to_be_bytes());
        bytes[12..].copy_from_slice(&(self.fds as u32).to_be_bytes());
        bytes
    }
}

impl Message {
    /// Its name in `docs/protocol.md`.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Offer(_) => "offer",
            Self::Adopted { .. } => "adopted",
            Self::Refused { .. } => "refused",
            Self::Starting { .. } => "starting",
            Self::GaveUp { .. } => "gave-up",
            Self::Ready(_) => "ready",
            Self::Commit => "commit",
            Self::Accepting { .. } => "accepting",
            Self::Settled => "settled",
            Self::Aborted { .. } => "aborted",
            Self::Stopping => "stopping",
        }
    }

    pub(crate) fn kind(&self) -> u16 {
        match self {
            Self::Offer(_) => 1,
            Self::Adopted { .. } => 2,
            Self::Refused { .. } => 3,
            Self::Starting { .. } => 4,
            Self::GaveUp { .. } => 5,
            Self::Ready(_) => 6,
            Self::Commit => 7,
            Self::Accepting { .. } => 8,
            Self::Settled => 9,
            Self::Aborted { .. } => 10,
            Self::Stopping => 11,
        }
    }

    fn fd_count(&self) -> usize {
        match self {
            Self::Offer(offer) => offer.fd_count(),
            _ => 0,
        }
    }

    /// Header and body; the fds follow as messages of their own. The error is that a bound would be broken.
    pub(crate) fn encode(&self) -> Result<Vec<u8>, Malformed> {
        let (kind, fds) = (self.kind(), self.fd_count());
        // About what a listener takes.
        let mut bytes = Vec::with_capacity(HEADER_BYTES + 1024 + fds * 128);
        bytes.extend_from_slice(&[0; HEADER_BYTES]);
        let written = match self {
            Self::Offer(offer) => serde_json::to_writer(&mut bytes, offer),
            Self::Adopted { protocol, listeners, restart } => {
                let body = AdoptedBody { protocol: *protocol, listeners: listeners.into(), restart: *restart };
                serde_json::to_writer(&mut bytes, &body)
            }
            Self::Refused { reason, protocol } => {
                serde_json::to_writer(&mut bytes, &RefusedBody { reason: reason.into(), protocol: *protocol })
            }
            Self::Starting { reason } | Self::GaveUp { reason } | Self::Aborted { reason } => {
                serde_json::to_writer(&mut bytes, &ReasonBody { reason: reason.into() })
            }
            Self::Ready(claims) => serde_json::to_writer(&mut bytes, claims),
            Self::Accepting { listeners } => {
                serde_json::to_writer(&mut bytes, &ListenersBody { listeners: listeners.into() })
            }
            Self::Commit | Self::Settled | Self::Stopping => serde_json::to_writer(&mut bytes, &EmptyBody {}),
        };
        written.map_err(|error| Malformed(error.to_string()))?;
        let body_bytes = bytes.len() - HEADER_BYTES;
        if body_bytes > BODY_BYTES_MAX || fds > FDS_MAX {
            return Err(Malformed(format!("{fds} listeners, which are more than a frame can carry")));
        }
        bytes[..HEADER_BYTES].copy_from_slice(&Header { kind, body_bytes, fds }.encode());
        Ok(bytes)
    }

    pub(crate) fn decode(header: Header, body: &[u8]) -> Result<Self, Malformed> {
        fn parse<'a, T: Deserialize<'a>>(kind: u16, body: &'a [u8]) -> Result<T, Malformed> {
            // serde takes a JSON array for a struct as well; the page says object.
            if body.first() != Some(&b'{') {
                return Err(Malformed(format!("a frame of kind {kind} whose body is no JSON object")));
            }
            serde_json::from_slice(body).map_err(|error| Malformed(format!("a bad frame of kind {kind}: {error}")))
        }
        fn reason(kind: u16, body: &[u8]) -> Result<String, Malformed> {
            Ok(printable(&parse::<ReasonBody<'_>>(kind, body)?.reason))
        }
        let kind = header.kind;
        let message = match kind {
            1 => Self::Offer(parse(kind, body)?),
            2 => {
                let AdoptedBody { protocol, listeners, restart } = parse(kind, body)?;
                Self::Adopted { protocol, listeners: listeners.into_owned(), restart }
            }
            3 => {
                let RefusedBody { reason, protocol } = parse(kind, body)?;
                Self::Refused { reason: printable(&reason), protocol }
            }
            4 => Self::Starting { reason: reason(kind, body)? },
            5 => Self::GaveUp { reason: reason(kind, body)? },
            6 => Self::Ready(parse(kind, body)?),
            7 => parse::<EmptyBody>(kind, body).map(|_| Self::Commit)?,
            8 => Self::Accepting { listeners: parse::<ListenersBody<'_>>(kind, body)?.listeners.into_owned() },
            9 => parse::<EmptyBody>(kind, body).map(|_| Self::Settled)?,
            10 => Self::Aborted { reason: reason(kind, body)? },
            11 => parse::<EmptyBody>(kind, body).map(|_| Self::Stopping)?,
            _ => {
                return Err(Malformed(format!(
                    "a frame of kind {kind}, which version {} of the protocol does not have",
                    VERSIONS.max
                )));
            }
        };
        if message.fd_count() != header.fds {
            let (name, expected) = (message.name(), message.fd_count());
            return Err(Malformed(format!("`{name}` with {} fds instead of {expected}", header.fds)));
        }
        Ok(message)
    }
}

/// A frame or a reason; a frame that is encoded again is the same.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(bytes: &[u8]) {
    let Some((header, body)) = bytes.split_first_chunk() else { return };
    let Ok(header) = Header::decode(*header) else { return };
    let versions = header.offered_versions(body);
    let Ok(message) = Message::decode(header, body) else { return };
    if let Message::Offer(offer) = &message {
        assert_eq!(versions, Some(offer.protocol));
    }
    let again = message.encode().unwrap_or_default();
    let (header, body) = again.split_first_chunk().unwrap_or((&[0; HEADER_BYTES], &[]));
    let header = Header::decode(*header);
    assert_eq!(header.as_ref().map(|header| header.body_bytes), Ok(body.len()));
    assert_eq!(header.and_then(|header| Message::decode(header, body)), Ok(message));
}

/// Whether a listener may have this name, which also stands in LISTEN_FDNAMES.
pub(crate) fn name_is_valid(name: &str) -> bool {
    let length = 1..=NAME_BYTES_MAX;
    length.contains(&name.len()) && !name.contains(':') && !name.chars().any(char::is_control)
}

#[cfg(test)]
mod tests;
