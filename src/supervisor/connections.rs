//! The open connections of any program, counted from outside.

use std::collections::HashSet;
use std::fs;
use std::time::Instant;

use nix::unistd::Pid;

use super::family;
use crate::control::unix_sockets;
use crate::listeners::Address;
use crate::sock_diag::tcp_connections;

/// The last count that was made for `status`, which anybody may ask for as often as he likes.
#[derive(Default)]
pub(super) struct Counted {
    workers: Vec<Pid>,
    open: Vec<usize>,
    due: Option<Instant>,
}

impl Counted {
    /// The same as [`open`]. The kernel looks through all the sockets there are, so that takes a tenth of the time at most.
    pub(super) fn open(&mut self, workers: Vec<Pid>, addresses: &[Address]) -> Vec<usize> {
        let begun = Instant::now();
        if self.workers != workers || self.due.is_none_or(|due| due <= begun) {
            self.open = open(&workers, addresses);
            self.workers = workers;
            self.due = Some(Instant::now() + 10 * begun.elapsed());
        }
        self.open.clone()
    }
}

/// How many connections to `addresses` each of the workers has open, with all that it has started.
pub(super) fn open(workers: &[Pid], addresses: &[Address]) -> Vec<usize> {
    let connections = connections_to(addresses);
    let count = |worker: &Pid| {
        let held: HashSet<u64> = family::sockets(*worker).into_iter().collect();
        held.intersection(&connections).count()
    };
    workers.iter().map(count).collect()
}

fn connections_to(addresses: &[Address]) -> HashSet<u64> {
    let mut found = HashSet::new();
    let (mut tcp, mut paths) = (Vec::new(), Vec::new());
    for address in addresses {
        match address {
            Address::Ip(ip) => tcp.push(*ip),
            Address::Path(path) => paths.push(path.as_os_str().as_encoded_bytes().to_vec()),
            Address::Abstract(name) => paths.push([b"@", name.as_slice()].concat()),
        }
    }
    match tcp_connections(&tcp) {
        Ok(connections) => found.extend(connections),
        Err(error) => log::warn!("cannot count the TCP connections, and takes them for none: {error}"),
    }
    if !paths.is_empty() {
        let table = fs::read("/proc/self/net/unix").unwrap_or_default();
        // Listeners have that name too, and they are held by the workers.
        let of_ours = unix_sockets(&table).filter(|socket| paths.iter().any(|path| path == socket.path));
        found.extend(of_ours.filter(|socket| !socket.listens()).map(|socket| socket.inode));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::time::Duration;

    #[test]
    fn a_count_is_good_for_ten_times_as_long_as_it_took() {
        let (us, now) = (vec![Pid::this()], Instant::now());
        let counted = |due| Counted { workers: us.clone(), open: vec![3], due: Some(due) };
        let fresh = || counted(now + Duration::from_secs(60));
        assert_eq!((fresh().open(us.clone(), &[]), fresh().open(vec![], &[])), (vec![3], vec![]));
        let mut stale = counted(now);
        assert_eq!(stale.open(us.clone(), &[]), [0]);
        assert!(stale.due.is_some_and(|due| due > now));
    }

    #[test]
    fn what_is_accepted_is_open_and_what_waits_or_belongs_to_the_client_is_not() {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let path = std::env::temp_dir().join(format!("handover-connections-{}.sock", std::process::id()));
        let unix = UnixListener::bind(&path).unwrap();
        let addresses = [Address::Ip(tcp.local_addr().unwrap()), Address::Path(path.clone())];
        let count = || open(&[Pid::this()], &addresses)[0];
        let tcp_clients: Vec<_> = (0..3).map(|_| TcpStream::connect(tcp.local_addr().unwrap()).unwrap()).collect();
        let unix_clients: Vec<_> = (0..3).map(|_| UnixStream::connect(&path).unwrap()).collect();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(count(), 0);
        let accepted = (tcp.accept().unwrap(), tcp.accept().unwrap(), unix.accept().unwrap());
        assert_eq!(count(), 3);
        drop((accepted.1, accepted.2));
        assert_eq!(count(), 1);
        drop((tcp_clients, unix_clients));
    }
}
