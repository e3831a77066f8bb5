//! Datagram sockets: what is queued belongs to the socket, and is received once, by whoever has the gate open.

use std::net::{SocketAddr, UdpSocket};
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use crate::home::Home;
use crate::oracle::Answer;
use crate::server::Server;
use crate::wait::LONG;

/// What is in flight at a time: far less than a socket's buffer, so that none is dropped for want of room.
const WINDOW: u64 = 20;

/// Who received which number.
fn read(text: &[u8]) -> (Answer, u64) {
    let (answer, rest) = Answer::parse(text).unwrap_or_else(|| panic!("{}", text.escape_ascii()));
    (answer, std::str::from_utf8(rest).unwrap().trim().parse().unwrap())
}

/// The numbers come back, each of them once, in whatever order.
fn each_once(mut numbers: Vec<u64>, wanted: impl Iterator<Item = u64>) {
    numbers.sort_unstable();
    assert_eq!(numbers, wanted.collect::<Vec<_>>());
}

/// A wait with a timeout is not restarted after a stop of this process (signal(7)).
fn uninterrupted(mut receive: impl FnMut() -> std::io::Result<usize>) -> usize {
    loop {
        match receive() {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            result => return result.unwrap(),
        }
    }
}

struct Client {
    socket: UdpSocket,
}

impl Client {
    fn to(address: &str) -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.connect(address.parse::<SocketAddr>().unwrap()).unwrap();
        socket.set_read_timeout(Some(LONG)).unwrap();
        Self { socket }
    }

    fn send(&self, number: u64) {
        self.socket.send(number.to_string().as_bytes()).unwrap();
    }

    fn receive(&self) -> (Answer, u64) {
        let mut buffer = [0; 256];
        let length = uninterrupted(|| self.socket.recv(&mut buffer));
        read(&buffer[..length])
    }

    /// No second answer lies in the queue.
    fn assert_nothing_more(&self) {
        self.socket.set_read_timeout(Some(Duration::from_millis(10))).unwrap();
        assert!(self.socket.recv(&mut [0; 256]).is_err());
        self.socket.set_read_timeout(Some(LONG)).unwrap();
    }
}

#[test]
fn what_is_queued_while_nobody_receives_is_the_new_ones() {
    let server = Server::start(&["--udp", "dns=127.0.0.1:0"]);
    let (old, client) = (server.pid(), Client::to(&server.address_of("dns")));
    client.send(0);
    assert_eq!(client.receive().0.generation, 1);
    let hold = server.home.fifo("hold");
    let upgrade = server.begin_upgrade(&["--env", &hold.fault("hold-before-ready")]);
    let held = hold.reached();
    server.freeze(old);
    (1..=WINDOW).for_each(|number| client.send(number));
    server.signal(old, nix::sys::signal::Signal::SIGKILL);
    held.let_go();
    let received: Vec<(Answer, u64)> = (1..=WINDOW).map(|_| client.receive()).collect();
    assert!(received.iter().all(|(answer, _)| answer.generation == 2), "{received:?}");
    each_once(received.into_iter().map(|(_, number)| number).collect(), 1..=WINDOW);
    client.assert_nothing_more();
    upgrade.finish().exits_with(0);
}

#[test]
fn none_is_lost_or_received_twice_over_upgrades() {
    let server = Server::start(&["--udp", "dns=127.0.0.1:0"]);
    let client = Client::to(&server.address_of("dns"));
    let (mut numbers, mut sent) = (Vec::new(), 0);
    for generation in 2..=4 {
        let mut upgrade = server.begin_upgrade(&["--trial", "50ms"]);
        loop {
            let over = upgrade.has_ended();
            (0..WINDOW).for_each(|number| client.send(sent + number));
            sent += WINDOW;
            let received: Vec<(Answer, u64)> = (0..WINDOW).map(|_| client.receive()).collect();
            numbers.extend(received.iter().map(|(_, number)| *number));
            if over {
                assert!(received.iter().all(|(answer, _)| answer.generation == generation), "{received:?}");
                break;
            }
        }
        upgrade.finish().exits_with(0);
    }
    each_once(numbers, 0..sent);
    client.assert_nothing_more();
}

#[test]
fn the_same_for_unix_datagrams() {
    let home = Home::new();
    let (path, own) = (home.path("server.sock"), home.path("client.sock"));
    let server = Server::start_in(home, &["--unix-datagram", &format!("log={}", path.display())]);
    let client = UnixDatagram::bind(own).unwrap();
    client.connect(&path).unwrap();
    client.set_read_timeout(Some(LONG)).unwrap();
    client.set_write_timeout(Some(LONG)).unwrap();
    let receive = || {
        let mut buffer = [0; 256];
        let length = uninterrupted(|| client.recv(&mut buffer));
        read(&buffer[..length])
    };
    // The queue of a Unix datagram socket holds no more than this (net.unix.max_dgram_qlen).
    let window = 8;
    let (mut numbers, mut sent) = (Vec::new(), 0);
    for generation in 2..=4 {
        let mut upgrade = server.begin_upgrade(&["--trial", "50ms"]);
        loop {
            let over = upgrade.has_ended();
            for number in sent..sent + window {
                client.send(number.to_string().as_bytes()).unwrap();
            }
            sent += window;
            let received: Vec<(Answer, u64)> = (0..window).map(|_| receive()).collect();
            numbers.extend(received.iter().map(|(_, number)| *number));
            if over {
                assert!(received.iter().all(|(answer, _)| answer.generation == generation), "{received:?}");
                break;
            }
        }
        upgrade.finish().exits_with(0);
    }
    each_once(numbers, 0..sent);
}
