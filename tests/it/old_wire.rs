//! The new build meets an old process that is dead, of another version, or no old process at all: it must not serve
//! what it has not understood, and must serve if nobody else does.

use std::fs::File;
use std::io::{IoSlice, Read, Write};
use std::net::SocketAddr;
use std::net::TcpListener;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::process::Child;

use handover::control::State;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::{Value, json};
use socket2::SockRef;

use crate::home::{Home, fixture};
use crate::server::Server;
use crate::wait::{LONG, eventually};

const OFFER: u16 = 1;
const ADOPTED: u16 = 2;
const REFUSED: u16 = 3;
const READY: u16 = 6;
const COMMIT: u16 = 7;
const ACCEPTING: u16 = 8;
const SETTLED: u16 = 9;
const ABORTED: u16 = 10;

/// The old side, played by the test.
struct Old {
    channel: UnixStream,
    listener: TcpListener,
}

impl Old {
    /// Starts the fixture as the new build of a process that is this test.
    fn start() -> (Self, Home, Child) {
        Self::start_with("")
    }

    fn start_with(options: &str) -> (Self, Home, Child) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let home = Home::new();
        let inode = nix::sys::stat::fstat(&theirs).unwrap().st_ino;
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        // As fd 0 first, which a test can pass without unsafe code.
        let script = format!(
            "exec 3<&0 0</dev/null; HANDOVER_FD=3:{inode} exec {} --tcp http={} --linger 100ms --trial 100ms {options}",
            fixture().display(),
            listener.local_addr().unwrap()
        );
        let mut command = home.logged("/bin/sh", &["-c", &script]);
        let child = command.stdin(OwnedFd::from(theirs)).spawn().unwrap();
        // The command holds their end too, and would keep the channel from ending.
        drop(command);
        ours.set_read_timeout(Some(LONG)).unwrap();
        (Self { channel: ours, listener }, home, child)
    }

    fn cookie(&self) -> u64 {
        SockRef::from(&self.listener).cookie().unwrap()
    }

    fn offer(&self) -> Value {
        json!({
            "protocol": {"min": 1, "max": 1},
            "generation": 5,
            "pid": std::process::id(),
            "listeners": [{
                "name": "http",
                "kind": "tcp",
                "address": self.listener.local_addr().unwrap().to_string(),
                "cookie": self.cookie(),
            }],
        })
    }

    fn say(&mut self, kind: u16, body: &Value, announced_fds: u32) {
        let body = body.to_string();
        let mut header = [0; 16];
        header[..4].copy_from_slice(b"HNDO");
        header[4..6].copy_from_slice(&kind.to_be_bytes());
        header[8..12].copy_from_slice(&u32::try_from(body.len()).unwrap().to_be_bytes());
        header[12..].copy_from_slice(&announced_fds.to_be_bytes());
        self.channel.write_all(&[&header, body.as_bytes()].concat()).unwrap();
    }

    fn send_fds(&self, fds: &[RawFd]) {
        let control = [ControlMessage::ScmRights(fds)];
        sendmsg::<()>(self.channel.as_raw_fd(), &[IoSlice::new(b"F")], &control, MsgFlags::empty(), None).unwrap();
    }

    fn hear(&mut self) -> (u16, Value) {
        let mut header = [0; 16];
        self.channel.read_exact(&mut header).unwrap();
        let mut body = vec![0; u32::from_be_bytes(header[8..12].try_into().unwrap()) as usize];
        self.channel.read_exact(&mut body).unwrap();
        (u16::from_be_bytes([header[4], header[5]]), serde_json::from_slice(&body).unwrap())
    }

    /// Offers the listener as it should be done.
    fn hand_over(&mut self) {
        self.say(OFFER, &self.offer(), 1);
        self.send_fds(&[self.listener.as_raw_fd()]);
        let (kind, body) = self.hear();
        assert_eq!((kind, &body["listeners"][0]["cookie"]), (ADOPTED, &self.cookie().into()), "{body}");
        assert_eq!(self.hear().0, READY);
    }

    /// The new process says why, and ends without having served.
    #[track_caller]
    fn refused_by_new(mut self, home: &Home, child: Child, reason: &str) {
        let (kind, body) = self.hear();
        assert_eq!(kind, REFUSED, "{body}");
        assert!(body["reason"].as_str().unwrap().contains(reason), "{body}");
        ends_with(child, 1);
        assert!(home.log().contains(reason), "{}", home.log());
        assert_eq!(home.sockets(), Vec::<String>::new());
    }
}

#[track_caller]
fn ends_with(mut child: Child, code: i32) {
    let status = eventually("the end of the new process", || child.try_wait().unwrap());
    assert_eq!(status.code(), Some(code));
}

/// Keeps other tests, which ask for any port, from this one. Whoever asks for it by number can bind it all the same.
fn reserve(address: SocketAddr) -> socket2::Socket {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.set_reuse_address(true).unwrap();
    // A process that another test is about to start may hold the listener for a moment.
    eventually("the address to be free", || socket.bind(&address.into()).ok());
    socket
}

/// Nobody serves: this process must, as the first generation.
#[track_caller]
fn serves_as_the_first(old: Old, home: Home, child: Child) {
    let address = old.listener.local_addr().unwrap();
    // The listener dies with the old process: no later than its channel.
    drop(old.listener);
    let _reserved = reserve(address);
    drop(old.channel);
    let server = Server::adopt(home, child);
    server.wait_until(server.first_pid(), State::Serving);
    assert_eq!((server.address(), server.answerer().generation), (address, 1));
}

#[test]
fn dead_before_its_offer() {
    let (old, home, child) = Old::start();
    serves_as_the_first(old, home, child);
}

/// As the first generation was started, whose arguments an upgrade repeats. What it took over from is long gone.
#[test]
fn dead_before_its_offer_in_a_service_that_took_over_from_another() {
    let nobody = std::process::id();
    let (old, home, child) = Old::start_with(&format!("--take-over {nobody}"));
    serves_as_the_first(old, home, child);
}

#[test]
fn dead_in_the_middle_of_its_offer() {
    let (mut old, home, child) = Old::start();
    old.channel.write_all(b"HNDO\0\x01\0\0\0\0").unwrap();
    serves_as_the_first(old, home, child);
}

#[test]
fn dead_before_its_fds() {
    let (mut old, home, child) = Old::start();
    old.say(OFFER, &old.offer(), 1);
    serves_as_the_first(old, home, child);
}

#[test]
fn of_a_newer_version() {
    let (mut old, home, child) = Old::start();
    let mut offer = old.offer();
    offer["protocol"] = json!({"min": 2, "max": 3});
    old.say(OFFER, &offer, 1);
    old.send_fds(&[old.listener.as_raw_fd()]);
    old.refused_by_new(&home, child, "speaks protocol versions 2 to 3, this build speaks 1 to 1");
}

/// A later version of the protocol's first version: more fields, and kinds that only it would send.
#[test]
fn that_says_more_than_is_known() {
    let (mut old, home, child) = Old::start();
    let mut offer = old.offer();
    offer["protocol"] = json!({"min": 1, "max": 3, "preferred": 2});
    offer["weather"] = json!("fine");
    offer["listeners"][0]["colour"] = json!("red");
    old.say(OFFER, &offer, 1);
    old.send_fds(&[old.listener.as_raw_fd()]);
    assert_eq!(old.hear().0, ADOPTED);
    drop((home, child));
}

#[test]
fn that_sends_garbage() {
    let (mut old, home, child) = Old::start();
    old.channel.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").unwrap();
    old.refused_by_new(&home, child, "the old process sent bytes that are no frame");
}

#[test]
fn that_sends_a_frame_too_long() {
    let (mut old, home, child) = Old::start();
    old.channel.write_all(b"HNDO\0\x01\0\0\0\x40\0\x01\0\0\0\x01").unwrap();
    old.refused_by_new(&home, child, "a frame of 4194305 bytes, more than 4194304");
}

#[test]
fn that_sends_too_few_fds() {
    let (mut old, home, child) = Old::start();
    let mut offer = old.offer();
    let second = offer["listeners"][0].clone();
    offer["listeners"].as_array_mut().unwrap().push(second);
    offer["listeners"][1]["name"] = json!("other");
    old.say(OFFER, &offer, 2);
    old.send_fds(&[old.listener.as_raw_fd()]);
    old.refused_by_new(&home, child, "1 fds in a message instead of 2");
}

#[test]
fn that_announces_another_number_of_fds_than_of_listeners() {
    let (mut old, home, child) = Old::start();
    old.say(OFFER, &old.offer(), 2);
    old.refused_by_new(&home, child, "`offer` with 2 fds instead of 1");
}

#[test]
fn that_sends_another_socket_than_it_says() {
    let (mut old, home, child) = Old::start();
    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    old.say(OFFER, &old.offer(), 1);
    old.send_fds(&[other.as_raw_fd()]);
    old.refused_by_new(&home, child, "listener `http`: the socket received has cookie");
}

#[test]
fn that_says_another_kind_than_it_sends() {
    for kind in ["udp", "unix", "unix-datagram"] {
        let (mut old, home, child) = Old::start();
        let mut offer = old.offer();
        offer["listeners"][0]["kind"] = kind.into();
        old.say(OFFER, &offer, 1);
        old.send_fds(&[old.listener.as_raw_fd()]);
        old.refused_by_new(&home, child, &format!("listener `http`: the socket received is not of kind {kind}"));
    }
}

#[test]
fn that_sends_what_is_no_socket() {
    let (mut old, home, child) = Old::start();
    let file = File::open("/dev/null").unwrap();
    old.say(OFFER, &old.offer(), 1);
    old.send_fds(&[file.as_raw_fd()]);
    old.refused_by_new(&home, child, "listener `http`: ");
}

#[test]
fn that_takes_it_back() {
    let (mut old, home, child) = Old::start();
    old.hand_over();
    old.say(ABORTED, &json!({"reason": "the upgrade is off: changed my mind"}), 0);
    ends_with(child, 1);
    assert!(home.log().contains("changed my mind"), "{}", home.log());
}

/// It lives and does not keep to the protocol: it must not be taken for dead, or two would serve.
#[test]
fn that_speaks_out_of_turn() {
    let (mut old, home, child) = Old::start();
    old.hand_over();
    old.say(READY, &json!({}), 0);
    ends_with(child, 1);
    assert!(home.log().contains("sent `ready` out of turn"), "{}", home.log());
}

#[test]
fn that_does_all_as_it_should() {
    let (mut old, home, child) = Old::start();
    old.hand_over();
    let server = Server::adopt(home, child);
    let early = crate::client::ask(old.listener.local_addr().unwrap(), "/");
    assert_eq!(server.status(server.first_pid()).connections.accepted, 0);
    old.say(COMMIT, &json!({}), 0);
    assert_eq!(old.hear().0, ACCEPTING);
    old.say(SETTLED, &json!({}), 0);
    assert_eq!(early.answerer().generation, 5);
    server.wait_until(server.first_pid(), State::Serving);
    server.upgrade(&[]).exits_with(0);
    assert_eq!(server.answerer().generation, 6);
}
