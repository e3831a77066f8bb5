//! The open connections of any program, counted from outside.

use std::collections::HashSet;
use std::fs;

use nix::unistd::Pid;

use super::family;
use crate::control::unix_sockets;
use crate::listeners::Address;
use crate::sock_diag::tcp_connections;

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
        Err(error) => log::debug!("cannot count the TCP connections: {error}"),
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
