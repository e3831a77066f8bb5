//! What a listener may be asked to be.

/// How many connections may wait to be accepted. The kernel caps it at `net.core.somaxconn`.
const BACKLOG: u32 = 4096;

/// Options of a TCP listener; `TcpOptions::default()` suits most.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct TcpOptions {
    pub(crate) backlog: u32,
    pub(crate) reuse_address: bool,
    pub(crate) only_v6: Option<bool>,
    pub(crate) nodelay: bool,
}

impl Default for TcpOptions {
    fn default() -> Self {
        Self { backlog: BACKLOG, reuse_address: true, only_v6: None, nodelay: true }
    }
}

impl TcpOptions {
    /// Connections that may wait in the queue (`listen(2)`), 4096 by default and at most `net.core.somaxconn`. A new
    /// build may change it: it is applied to the kept socket when the trial is over.
    #[must_use]
    pub fn backlog(mut self, connections: u32) -> Self {
        self.backlog = connections;
        self
    }

    /// `SO_REUSEADDR`, on by default: a first generation can bind while connections of an earlier run are in TIME_WAIT.
    #[must_use]
    pub fn reuse_address(mut self, on: bool) -> Self {
        self.reuse_address = on;
        self
    }

    /// `IPV6_V6ONLY`: false makes `[::]` take IPv4 connections too. The default is the system's
    /// (`net.ipv6.bindv6only`).
    #[must_use]
    pub fn only_v6(mut self, on: bool) -> Self {
        self.only_v6 = Some(on);
        self
    }

    /// `TCP_NODELAY` of the connections, on by default: what is written is sent at once. The listener has it, and Linux
    /// gives it to each connection, so no accept costs more. A new build may change it: it is applied to the kept socket
    /// when the trial is over, for connections that come later. Not to a socket from a service manager (`NoDelay=`).
    #[must_use]
    pub fn nodelay(mut self, on: bool) -> Self {
        self.nodelay = on;
        self
    }
}

/// Options of a Unix listener or datagram socket.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct UnixOptions {
    pub(crate) backlog: u32,
    pub(crate) mode: Option<u32>,
    pub(crate) user: Option<u32>,
    pub(crate) group: Option<u32>,
}

impl Default for UnixOptions {
    fn default() -> Self {
        Self { backlog: BACKLOG, mode: None, user: None, group: None }
    }
}

impl UnixOptions {
    /// Connections that may wait in the queue (`listen(2)`), 4096 by default.
    #[must_use]
    pub fn backlog(mut self, connections: u32) -> Self {
        self.backlog = connections;
        self
    }

    /// The mode of the path, for instance `0o660`; by default what the umask leaves. It is set before the socket
    /// listens, so nobody can connect under another mode.
    #[must_use]
    pub fn mode(mut self, mode: u32) -> Self {
        self.mode = Some(mode);
        self
    }

    /// The owner of the path, as numbers; `None` leaves it.
    #[must_use]
    pub fn owner(mut self, user: Option<u32>, group: Option<u32>) -> Self {
        (self.user, self.group) = (user, group);
        self
    }

    pub(crate) fn says_mode_or_owner(&self) -> bool {
        self.mode.is_some() || self.user.is_some() || self.group.is_some()
    }
}
