//! A program that binds its own sockets, and knows nothing of any other generation.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;

use nix::sys::signal::Signal;

use crate::client::{ask, ask_unix, get};
use crate::command::run;
use crate::exec::plain;
use crate::home::{HANDOVER, Home};
use crate::oracle::Load;
use crate::rights::is_root_or_skip;
use crate::server::Server;
use crate::wait::{LONG, eventually, eventually_equal};

mod awkward;
mod limits;
mod new_ones;
mod take_over;

/// An address that no other test has, nor another run of them.
fn own_address() -> SocketAddr {
    static COUNT: AtomicU32 = AtomicU32::new(1);
    let number = std::process::id() * 64 + COUNT.fetch_add(1, Ordering::Relaxed);
    let [_, a, b, c] = number.to_be_bytes();
    SocketAddr::from(([127, 128 | a, b, c], 8080))
}

/// `handover exec` with these options, and the program with these arguments, once it serves.
fn exec(options: &[&str], arguments: &[&str]) -> Server {
    exec_in(Home::new(), options, &[&[plain().to_str().unwrap()], arguments].concat())
}

fn exec_in(home: Home, options: &[&str], program: &[&str]) -> Server {
    let arguments = [&["exec", "--trial", "100ms"], options, &["--"], program].concat();
    let command = home.logged(HANDOVER, &arguments);
    Server::run(home, command)
}

/// With one address.
fn exec_at(address: SocketAddr, options: &[&str]) -> Server {
    exec(options, &["epoll", &address.to_string()])
}

/// Before each script. Most are told an address.
const PRELUDE: &str = r#"
import ctypes, os, select, signal, socket, struct, subprocess, sys, threading, time

def end(*_):
    sys.exit(0)

def address(number=0):
    host, port = sys.argv[1].split(":")
    return host, int(port) + number

def answer(listener):
    connection, _ = listener.accept()
    connection.recv(65536)
    body = f"gen={os.environ['HANDOVER_GENERATION']} pid={os.getpid()}".encode()
    connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
    connection.close()

def wait_on(listeners):
    poll = select.epoll()
    for listener in listeners:
        poll.register(listener, select.EPOLLIN)
    while True:
        poll.poll()

# From now on and by all that it starts, with EPERM.
def refuse(call):
    filters = b"".join(struct.pack("HBBI", *one) for one in [
        (0x20, 0, 0, 0), (0x15, 0, 1, call), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7fff0000)])
    buffer = ctypes.create_string_buffer(filters)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, struct.pack("HxxxxxxP", 4, ctypes.addressof(buffer)), 0, 0) == 0

signal.signal(signal.SIGTERM, end)
"#;

fn script(script: &str) -> String {
    format!("{PRELUDE}{script}")
}

/// A script under `handover exec`.
fn python(text: &str, arguments: &[&str]) -> Server {
    exec_in(Home::new(), &[], &[&["python3", "-c", &script(text)], arguments].concat())
}

impl Server {
    fn sockets(&self) -> BTreeSet<(String, u64)> {
        let listeners = self.status(self.first_pid()).listeners;
        listeners.into_iter().map(|listener| (listener.address, listener.cookie)).collect()
    }
}

/// Until it is over, and how many times.
fn connects_to(path: &Path, is_over: &AtomicBool) -> io::Result<usize> {
    let mut count = 0;
    while !is_over.load(Ordering::SeqCst) {
        UnixStream::connect(path)?;
        count += 1;
    }
    Ok(count)
}

/// Says so when it is dropped, also by a panic.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

fn is_refused(address: SocketAddr) -> bool {
    TcpStream::connect(address).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

#[test]
fn ten_upgrades_lose_nothing() {
    let address = own_address();
    let server = exec_at(address, &["--workers", "2"]);
    let sockets = server.sockets();
    assert_eq!(sockets.len(), 1);
    let load = Load::new(address).new_connections(4).kept(4).slow(2, 1.0).start();
    server.upgrade_again_and_again(10, "20ms", &load);
    let tally = load.stop();
    tally.assert_lossless();
    assert_eq!(tally.generations().len(), 11, "{tally}");
    assert_eq!((server.sockets(), server.pid()), (sockets, server.first_pid()));
    server.assert_supervises(2);
}

/// Its connections are there until it is gone, and to give its memory back takes longer than the next count.
#[test]
fn what_is_cut_is_counted_once() {
    let deaf = r#"
ballast = b"x" * (256 << 20)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
listener = socket.create_server(address())
accepted = []
while True:
    accepted.append(listener.accept())
"#;
    let address = own_address();
    let server = python(deaf, &[&address.to_string()]);
    for _ in 0..3 {
        let client = TcpStream::connect(address).unwrap();
        eventually("the connection", || (server.serving().connections.open == 1).then_some(()));
        let run = server.upgrade(&["--wait", "drained", "--drain-timeout", "300ms", "--json"]).exits_with(5);
        assert_eq!(run.last_json()["cut"], 1, "{run:?}");
        drop(client);
    }
}

/// What it has bound is not the supervisor's any more then.
#[test]
fn what_a_stop_cuts_is_counted() {
    let home = Home::new();
    let (address, path) = (own_address(), home.path("app.sock"));
    let program = plain();
    let program = [program.to_str().unwrap(), "epoll", &address.to_string(), path.to_str().unwrap()];
    let mut server = exec_in(home, &[], &program);
    let slow = (ask(address, "/slow/600"), ask_unix(&path, "/slow/600"));
    eventually("the requests in flight", || (server.serving().connections.open == 2).then_some(()));
    let pid = server.first_pid().to_string();
    let run = server.handover(&["stop", "--pid", &pid, "--drain-timeout", "300ms"]).exits_with(5);
    run.complains("; 2 connections were closed before they had ended");
    assert_eq!(eventually("the end of the supervisor", || server.try_wait()).code(), Some(5));
    drop(slow);
}

/// Of every kind, and the path that clients know leads to one that serves at every moment, though each program removes it
/// when it starts and again when it ends.
#[test]
fn sockets_of_every_kind_stay() {
    let home = Home::new();
    let (path, name) = (home.path("app.sock"), format!("@{}", home.path("abstract").display()));
    let (tcp, udp) = (own_address(), own_address());
    let v6 = format!("[::1]:{}", tcp.ip().to_string().bytes().map(u16::from).sum::<u16>() + 20_000);
    let (tcp_text, udp_text) = (tcp.to_string(), format!("udp:{udp}"));
    let program = plain();
    let program = [program.to_str().unwrap(), "poll", &tcp_text, &v6, path.to_str().unwrap(), &name, &udp_text];
    let server = exec_in(home, &[], &program);
    let sockets = server.sockets();
    assert_eq!(sockets.len(), 5, "{sockets:?}");
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        let connects = scope.spawn(|| connects_to(&path, &is_over));
        let over = Over(&is_over);
        for generation in 2..=6 {
            server.upgrade(&["--trial", "20ms", "--wait", "drained"]).exits_with(0);
            assert_eq!(ask_unix(&path, "/").answerer().generation, generation);
            assert_eq!(ask(v6.parse().unwrap(), "/").answerer().generation, generation);
            let client = UdpSocket::bind("127.0.0.1:0").unwrap();
            client.set_read_timeout(Some(LONG)).unwrap();
            client.send_to(b"x", udp).unwrap();
            let mut buffer = [0; 64];
            let length = client.recv(&mut buffer).unwrap();
            assert!(buffer[..length].starts_with(format!("gen={generation} ").as_bytes()));
        }
        drop(over);
        assert!(connects.join().unwrap().unwrap() > 100);
    });
    assert_eq!(server.sockets(), sockets);
    server.handover(&["stop", "--pid", &server.first_pid().to_string()]).exits_with(0);
    assert!(!path.exists() && is_refused(tcp));
}

#[test]
fn ports_that_the_kernel_chose_stay_in_their_order() {
    let server = exec(&["--workers", "2"], &["epoll", "127.0.0.1:0", "127.0.0.1:0"]);
    let sockets = server.sockets();
    assert_eq!(sockets.len(), 2);
    for _ in 0..3 {
        server.upgrade(&["--trial", "20ms", "--wait", "drained"]).exits_with(0);
        assert_eq!(server.sockets(), sockets);
    }
    assert!(server.home.log().contains("is given the socket at"));
}

/// Each has a queue of its own: one that was not taken over would lose what waits in it.
#[test]
fn sockets_that_share_a_port_stay_each() {
    let address = own_address();
    let home = Home::new();
    let text = address.to_string();
    let arguments = ["exec", "--trial", "20ms", "--", plain().to_str().unwrap(), "epoll", &text].map(str::to_owned);
    let mut command = home.logged(HANDOVER, &arguments.each_ref().map(String::as_str));
    command.env("PLAIN", "reuseport=3");
    let server = Server::run(home, command);
    let sockets = server.sockets();
    assert_eq!(sockets.len(), 3);
    let load = Load::new(address).new_connections(6).kept(2).start();
    for _ in 0..5 {
        load.wait_for_more(50, LONG).unwrap();
        server.upgrade(&["--wait", "drained"]).exits_with(0);
    }
    load.stop().assert_lossless();
    assert_eq!(server.sockets(), sockets);
}

/// All of them bind the same address at the same moment.
#[test]
fn workers_that_bind_one_address_share_the_socket() {
    for _ in 0..5 {
        let address = own_address();
        let server = exec_at(address, &["--workers", "4"]);
        assert_eq!(server.sockets().len(), 1);
        server.upgrade(&["--trial", "0s", "--wait", "drained"]).exits_with(0);
        server.assert_supervises(4);
        assert!(!server.home.log().contains("has ended by itself"));
    }
}

#[test]
fn an_address_that_the_new_build_does_not_want_is_told_and_closed() {
    let (kept, dropped, added) = (own_address(), own_address(), own_address());
    let server = exec(&[], &["epoll", &kept.to_string(), &dropped.to_string()]);
    let arguments = ["--", "epoll", &kept.to_string(), &added.to_string()].map(str::to_owned);
    let arguments = arguments.each_ref().map(String::as_str);
    let before = server.sockets();
    // It may just not have come to that yet.
    let run = server.upgrade(&[&["--ready-timeout", "500ms"][..], &arguments].concat()).exits_with(1);
    run.complains(&format!("it does not wait for connections on {dropped}")).complains("--ready-delay");
    assert_eq!(server.sockets(), before);
    eventually("the new address is free again", || is_refused(added).then_some(()));
    let run = server.upgrade(&[&["--ready-delay", "200ms"][..], &arguments].concat()).exits_with(0);
    run.says(&format!("keeps {kept}")).says(&format!("adds {added}")).says(&format!("does not want {dropped}"));
    // It is not closed yet, and not waited for either.
    server.upgrade(&["--wait", "drained"]).exits_with(0);
    eventually("clients of the dropped address that are refused", || is_refused(dropped).then_some(()));
    assert_eq!(get(added, "/env/HANDOVER_GENERATION"), "3");
    // From now on it belongs to those that must be listened on.
    server.upgrade(&["--wait", "drained"]).exits_with(0);
    assert_eq!(server.sockets().len(), 2);
}

/// Though it binds before it connects, as some do for the sake of their port.
#[test]
fn the_end_of_a_client_of_the_program_is_seen_at_once() {
    let connects = r#"
listener = socket.create_server(address())
peer, number = int(sys.argv[2]), 1
while True:
    answer(listener)
    client = socket.socket()
    client.bind(address(number))
    client.connect((address()[0], peer))
    client.close()
    number += 1
"#;
    let address = own_address();
    let peer = std::net::TcpListener::bind((address.ip(), 0)).unwrap();
    let server = python(connects, &[&address.to_string(), &peer.local_addr().unwrap().port().to_string()]);
    for _ in 0..3 {
        assert_eq!(ask(address, "/").answerer().generation, 1);
        let (mut accepted, _) = peer.accept().unwrap();
        let begun = std::time::Instant::now();
        assert_eq!(io::Read::read(&mut accepted, &mut [0]).unwrap(), 0);
        assert!(begun.elapsed() < std::time::Duration::from_secs(1), "{:?}", begun.elapsed());
    }
    assert_eq!(server.sockets().len(), 1);
}

/// They are not forgotten by a supervisor that is replaced meanwhile.
#[test]
fn what_is_cut_at_an_address_that_was_closed_before_the_supervisor_was_replaced_is_counted() {
    // Connections are told apart by their ports.
    let (kept, dropped) = (own_address(), awkward::next_to(own_address()));
    let server = exec(&[], &["epoll", &kept.to_string(), &dropped.to_string()]);
    let slow = ask(dropped, "/slow/600");
    eventually("the request in flight", || (server.serving().connections.open == 1).then_some(()));
    let options = ["--ready-delay", "200ms", "--drain-timeout", "10min"];
    server.upgrade(&[&options[..], &["--", "epoll", &kept.to_string()]].concat()).exits_with(0);
    eventually("clients of the dropped address that are refused", || is_refused(dropped).then_some(()));
    server.upgrade(&["--self"]).exits_with(0);
    let pid = server.first_pid().to_string();
    let run = server.handover(&["stop", "--pid", &pid, "--drain-timeout", "300ms"]).exits_with(5);
    run.complains("; 1 connection was closed before it had ended");
    drop(slow);
}

/// It is closed long before the old build has ended.
#[test]
fn what_is_cut_at_an_address_that_the_new_build_does_not_want_is_counted() {
    // Connections are told apart by their ports.
    let (kept, dropped) = (own_address(), awkward::next_to(own_address()));
    let server = exec(&[], &["epoll", &kept.to_string(), &dropped.to_string()]);
    let slow = ask(dropped, "/slow/600");
    eventually("the request in flight", || (server.serving().connections.open == 1).then_some(()));
    let options = ["--ready-delay", "200ms", "--wait", "drained", "--drain-timeout", "8s", "--json"];
    let run = server.upgrade(&[&options[..], &["--", "epoll", &kept.to_string()]].concat()).exits_with(5);
    assert_eq!(run.last_json()["cut"], 1, "{run:?}");
    assert!(is_refused(dropped));
    drop(slow);
}

#[test]
fn what_the_program_opens_and_closes_while_it_serves() {
    let (first, second) = (own_address(), own_address());
    let server = exec_at(first, &[]);
    get(first, &format!("/open/{second}"));
    assert_eq!(get(second, "/env/HANDOVER_GENERATION"), "1");
    let udp = own_address();
    get(first, &format!("/open/udp:{udp}"));
    eventually("two listeners", || (server.sockets().len() == 2).then_some(()));
    get(first, &format!("/close/{second}"));
    eventually("clients that are refused", || is_refused(second).then_some(()));
    eventually("one listener", || (server.sockets().len() == 1).then_some(()));
    server.upgrade(&["--wait", "drained"]).exits_with(0);
    // Where the old one asked for itself nobody is in its way.
    UdpSocket::bind(udp).unwrap();
}

#[test]
fn a_build_that_fails_changes_nothing() {
    let address = own_address();
    let server = exec_at(address, &["--workers", "2"]);
    let (sockets, fds) = (server.sockets(), server.assert_supervises(2));
    let load = Load::new(address).new_connections(2).kept(2).start();
    for plain in ["exit=3,worker=1", "hang,worker=0"] {
        load.wait_for_more(20, LONG).unwrap();
        let environment = format!("PLAIN={plain}");
        server.upgrade(&["--env", &environment, "--ready-timeout", "1s", "--trial", "2s"]).exits_with(1);
        assert_eq!(server.sockets(), sockets);
    }
    load.stop().assert_lossless();
    assert_eq!(server.assert_supervises(2), fds);
}

#[test]
fn clients_wait_while_a_crashed_program_is_started_again() {
    let address = own_address();
    let server = exec_at(address, &[]);
    let sockets = server.sockets();
    for _ in 0..3 {
        let worker = server.worker_pids()[0];
        server.signal(worker, Signal::SIGKILL);
        // Accepted by the one that is killed, or by the next.
        eventually("an answer", || ask(address, "/").try_answer().ok().filter(|text| !text.is_empty()));
        eventually("another worker", || (*server.wait_for_workers(1) != [worker]).then_some(()));
    }
    assert_eq!(server.sockets(), sockets);
}

/// The supervisor learns of both at the same moment.
#[test]
fn a_program_that_crashes_when_an_upgrade_is_asked_for() {
    let address = own_address();
    let server = exec_at(address, &[]);
    let sockets = server.sockets();
    for _ in 0..3 {
        let worker = server.wait_for_workers(1)[0];
        server.freeze(server.first_pid());
        server.signal(worker, Signal::SIGKILL);
        eventually("its end", || crate::server::has_ended(worker).then_some(()));
        server.signal(server.first_pid(), Signal::SIGUSR2);
        server.thaw(server.first_pid());
        eventually("another worker", || (*server.wait_for_workers(1) != [worker]).then_some(()));
        server.wait_until(server.first_pid(), handover::control::State::Serving);
        assert_eq!(server.sockets(), sockets);
        assert!(!ask(address, "/").try_answer().unwrap().is_empty());
    }
}

#[test]
fn one_after_the_other_and_restarted() {
    let address = own_address();
    let server = exec_at(address, &["--no-overlap"]);
    let sockets = server.sockets();
    let load = Load::new(address).new_connections(2).start();
    server.upgrade(&["--wait", "drained"]).exits_with(0);
    server.upgrade(&["--wait", "drained", "--env", "PLAIN=exit=1"]).exits_with(1);
    server.restart(&["--drain", "5s"]).exits_with(0);
    load.stop().assert_lossless();
    assert_eq!(server.sockets(), sockets);
}

#[test]
fn a_supervisor_that_replaces_itself_goes_on_with_all_of_it() {
    let address = own_address();
    let server = exec_at(address, &["--workers", "2"]);
    let sockets = server.sockets();
    let load = Load::new(address).new_connections(2).kept(2).start();
    for _ in 0..2 {
        server.handover(&["upgrade", "--self", "--pid", &server.first_pid().to_string()]).exits_with(0);
        assert_eq!(server.sockets(), sockets);
        let (opened, generation) = (own_address(), server.generation());
        // A call of a program that was started before.
        let opened_by = get(address, &format!("/open/{opened}"));
        assert_eq!((opened_by.as_str(), ask(opened, "/").answerer().generation), ("", generation));
        let delay = ["--ready-delay", "100ms", "--wait", "drained"];
        server.upgrade(&delay).exits_with(0).says(&format!("does not want {opened}"));
        eventually_equal("what is listened on", &sockets, || server.sockets());
    }
    load.stop().assert_lossless();
    assert_eq!(server.sockets(), sockets);
}

/// Its socket has no name then by which the next build of the supervisor could find it.
#[test]
fn a_supervisor_replaces_itself_when_the_kernel_has_refused_a_name() {
    let asks_in_vain = r#"
listener = socket.create_server(address())
while True:
    taken = socket.socket(socket.AF_UNIX)
    answer(listener)
    try:
        taken.bind("\0" + sys.argv[2])
    except OSError:
        pass
"#;
    let home = Home::new();
    let (address, name) = (own_address(), home.path("taken").display().to_string());
    let taken = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None).unwrap();
    taken.bind(&socket2::SockAddr::unix(format!("\0{name}")).unwrap()).unwrap();
    let program = script(asks_in_vain);
    let server = exec_in(home, &[], &["python3", "-c", &program, &address.to_string(), &name]);
    let sockets = server.sockets();
    // The second is answered when the first has asked.
    for _ in 0..2 {
        assert_eq!(ask(address, "/").answerer().generation, 1);
    }
    server.handover(&["upgrade", "--self", "--pid", &server.first_pid().to_string()]).exits_with(0);
    assert_eq!(server.sockets(), sockets);
    server.upgrade(&["--wait", "drained"]).exits_with(0);
    assert_eq!(server.sockets(), sockets);
}

/// Between its calls of `bind` and `listen`, which may be far apart.
#[test]
fn a_port_that_the_kernel_chose_before_the_supervisor_was_replaced_stays() {
    let listens_later = r#"
later = socket.socket()
later.bind(("127.0.0.1", 0))
if os.environ["HANDOVER_GENERATION"] == "1":
    signal.signal(signal.SIGUSR1, lambda *_: later.listen())
    wait_on([socket.create_server(address())])
later.listen()
wait_on([socket.create_server(address()), later])
"#;
    let server = python(listens_later, &[&own_address().to_string()]);
    let pid = server.first_pid();
    server.handover(&["upgrade", "--self", "--pid", &pid.to_string()]).exits_with(0);
    server.signal(pid, Signal::SIGUSR1);
    eventually("two listeners", || (server.sockets().len() == 2).then_some(()));
    let sockets = server.sockets();
    server.upgrade(&["--wait", "drained", "--ready-timeout", "10s"]).exits_with(0);
    assert_eq!(server.sockets(), sockets);
}

/// In a session of its own, as a job that is to outlive the server.
#[test]
fn what_a_program_has_started_and_left_behind_can_do_all_it_could() {
    let leaves_behind = r#"
if os.environ["HANDOVER_GENERATION"] == "1" and os.fork() == 0:
    os.setsid()
    open(sys.argv[2]).read()
    os.unlink(sys.argv[3])
    os._exit(0)
listener = socket.create_server(address())
while True:
    answer(listener)
"#;
    let home = Home::new();
    let (hold, file) = (home.fifo("hold"), home.file("file", b"", 0o600));
    let (program, address) = (script(leaves_behind), own_address().to_string());
    let (fifo, path) = (hold.path().display().to_string(), file.display().to_string());
    let server = exec_in(home, &[], &["python3", "-c", &program, &address, &fifo, &path]);
    server.upgrade(&["--wait", "drained"]).exits_with(0);
    server.handover(&["upgrade", "--self", "--pid", &server.first_pid().to_string()]).exits_with(0);
    hold.reached().let_go();
    eventually("the file to be removed", || (!file.exists()).then_some(()));
    server.assert_supervises(1);
}

#[test]
fn a_listener_that_was_named_is_found_by_its_address_as_well() {
    let address = own_address();
    let named = format!("http={address}");
    let server = exec_at(address, &["--intercept", "on", "--listen", &named]);
    let sockets = server.sockets();
    assert_eq!(sockets.len(), 1);
    server.upgrade(&["--wait", "drained"]).exits_with(0);
    assert_eq!((server.sockets(), get(address, "/env/HANDOVER_GENERATION")), (sockets, "2".to_owned()));
}
