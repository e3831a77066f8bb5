//! Binding afresh, and the paths of Unix sockets.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;

use socket2::{Domain, SockAddr, SockRef, Socket, Type};

use super::{Address, UnixOptions, Wanted, WantedOptions};
use crate::error::{Error, ErrorKind};
use crate::protocol::{Kind, PathIdentity};

pub(super) struct Bound {
    pub(super) fd: OwnedFd,
    pub(super) address: Address,
    pub(super) cookie: u64,
    pub(super) path: Option<PathIdentity>,
}

pub(super) fn bind(wanted: &Wanted<'_>) -> Result<Bound, Error> {
    if let Address::Path(path) = &wanted.address {
        make_way(path, wanted)?;
    }
    let failed = |error: io::Error| {
        let kind = error.kind();
        let error = Error::io(wanted.describe(), error);
        match kind {
            io::ErrorKind::AddrInUse => error.mend("another process listens there: see `ss -lnp`"),
            io::ErrorKind::PermissionDenied => {
                error.mend("ports below 1024 need CAP_NET_BIND_SERVICE; a path needs a directory that is writable")
            }
            io::ErrorKind::AddrNotAvailable => error.mend("no interface of this machine has that address"),
            _ => error,
        }
    };
    let (address, domain) = socket_address(&wanted.address).map_err(failed)?;
    let stream = matches!(wanted.kind, Kind::Tcp | Kind::Unix);
    // `Socket::new` sets CLOEXEC in the same call.
    let socket = Socket::new(domain, if stream { Type::STREAM } else { Type::DGRAM }, None).map_err(failed)?;
    let bind = || -> io::Result<()> {
        socket.set_nonblocking(true)?;
        if let WantedOptions::Tcp(options) = &wanted.options {
            socket.set_reuse_address(options.reuse_address)?;
            socket.set_tcp_nodelay(options.nodelay)?;
            if let (Some(only_v6), Domain::IPV6) = (options.only_v6, domain) {
                socket.set_only_v6(only_v6)?;
            }
        }
        socket.bind(&address)
    };
    bind().map_err(failed)?;
    let path = match &wanted.address {
        Address::Path(path) => Some((path, identity_of(path).map_err(failed)?)),
        _ => None,
    };
    let prepare = || -> Result<(Address, u64), Error> {
        if let (Some((path, _)), WantedOptions::Unix(options)) = (&path, &wanted.options) {
            set_mode_and_owner(path, options).map_err(|error| {
                let denied = error.kind() == io::ErrorKind::PermissionDenied;
                let error = Error::io(format!("set the mode and owner of {}", path.display()), error);
                if denied {
                    error.mend("to give it to another user, or to a group that is not one's own, needs CAP_CHOWN")
                } else {
                    error
                }
            })?;
        }
        if let Some(backlog) = wanted.backlog() {
            listen(socket.as_fd(), backlog).map_err(failed)?;
        }
        Ok((Address::of(socket.as_fd()).map_err(failed)?, socket.cookie().map_err(failed)?))
    };
    let prepared = prepare().inspect_err(|_| path.iter().for_each(|(path, identity)| unlink_if_ours(path, *identity)));
    let (address, cookie) = prepared?;
    Ok(Bound { fd: socket.into(), address, cookie, path: path.map(|(_, identity)| identity) })
}

pub(super) fn listen(socket: BorrowedFd<'_>, backlog: u32) -> io::Result<()> {
    SockRef::from(&socket).listen(i32::try_from(backlog).unwrap_or(i32::MAX))
}

fn socket_address(address: &Address) -> io::Result<(SockAddr, Domain)> {
    Ok(match address {
        Address::Ip(ip) => (SockAddr::from(*ip), Domain::for_address(*ip)),
        Address::Path(path) => (SockAddr::unix(path)?, Domain::UNIX),
        Address::Abstract(name) => {
            use std::os::unix::ffi::OsStrExt;
            let with_nul = [&b"\0"[..], name].concat();
            (SockAddr::unix(std::ffi::OsStr::from_bytes(&with_nul))?, Domain::UNIX)
        }
    })
}

/// Removes the socket that a crashed run has left at the path. One that still answers is not touched, and neither is
/// anything that is no socket.
fn make_way(path: &Path, wanted: &Wanted<'_>) -> Result<(), Error> {
    let tried = || wanted.describe();
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io(tried(), error)),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            let cause = "the path exists and is no socket";
            return Err(Error::new(ErrorKind::Failed, tried(), cause).mend("move it away, or choose another path"));
        }
        Ok(_) => {}
    }
    let stream = wanted.kind == Kind::Unix;
    if answers(path, if stream { Type::STREAM } else { Type::DGRAM }).map_err(|error| Error::io(tried(), error))? {
        let cause = "another process listens there";
        return Err(Error::new(ErrorKind::Failed, tried(), cause)
            .mend("stop it, choose another path, or start this program as its upgrade (`handover upgrade --pid`)"));
    }
    fs::remove_file(path).map_err(|error| Error::io(format!("remove the stale socket {}", path.display()), error))
}

fn answers(path: &Path, kind: Type) -> io::Result<bool> {
    let probe = Socket::new(Domain::UNIX, kind, None)?;
    // A full queue would block; it is an answer.
    probe.set_nonblocking(true)?;
    match probe.connect(&SockAddr::unix(path)?) {
        Ok(()) => Ok(true),
        Err(error) => match error.kind() {
            io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound => Ok(false),
            io::ErrorKind::PermissionDenied => Err(error),
            // EPROTOTYPE: a socket of another type answers.
            _ => Ok(true),
        },
    }
}

pub(crate) fn identity_of(path: &Path) -> io::Result<PathIdentity> {
    let metadata = fs::symlink_metadata(path)?;
    Ok(PathIdentity { device: metadata.dev(), inode: metadata.ino() })
}

pub(super) fn set_mode_and_owner(path: &Path, options: &UnixOptions) -> io::Result<()> {
    if options.user.is_some() || options.group.is_some() {
        std::os::unix::fs::lchown(path, options.user, options.group)?;
    }
    match options.mode {
        Some(mode) => fs::set_permissions(path, fs::Permissions::from_mode(mode)),
        None => Ok(()),
    }
}

/// Somebody else may have put a socket of his own at the path since.
pub(crate) fn unlink_if_ours(path: &Path, identity: PathIdentity) {
    if identity_of(path).is_ok_and(|now| now == identity) {
        if let Err(error) = fs::remove_file(path) {
            log::warn!("cannot remove {}: {error}", path.display());
        }
    }
}
