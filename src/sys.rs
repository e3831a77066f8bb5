//! Every `unsafe` block of the crate, behind functions that are safe to call.
//!
//! What `nix`, `socket2` and `sendfd` already wrap is used from there. Here is only what they lack: `posix_spawn` with
//! a working directory, the path that was executed, pidfds, the end of every child, fds that arrive by number or by message, a faster `accept`, system calls that wait for
//! another process, what a signal does, and readings of a socket. The compiler refuses it anywhere else.

mod accept;
mod fds;
mod pidfd;
#[cfg(feature = "cli")]
mod seccomp;
mod signals;
mod socket;
mod spawn;
mod wait;

pub(crate) use accept::{IpAddress, accept, accept_with_peer};
pub(crate) use fds::{FdTable, dup_at_least, fd_from_environment, receive_fds, replace_stderr};
#[cfg(feature = "cli")]
pub(crate) use pidfd::{pidfd_getfd, pidfd_open_thread};
pub(crate) use pidfd::{pidfd_of_peer, pidfd_open, pidfd_send_signal};
#[cfg(feature = "cli")]
pub(crate) use seccomp::{Notification, install_filter, notification_is_available};
pub(crate) use signals::{ignored_signals, is_default};
#[cfg(feature = "cli")]
pub(crate) use socket::receive_with_uid;
pub(crate) use socket::{accept_backlog, receive_from, unread_bytes};
pub(crate) use spawn::{SpawnRequest, executed_path, spawn};
#[cfg(feature = "cli")]
pub(crate) use wait::End;
pub(crate) use wait::{Child, ended_child};
