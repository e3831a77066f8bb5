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

fn python(home: Home, options: &[&str], script: &str, arguments: &[&str]) -> Server {
    exec_in(home, options, &[&["python3", "-c", script], arguments].concat())
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
    for generation in 2..=11 {
        load.wait_for_more(50, LONG).unwrap();
        server.upgrade(&["--trial", "20ms"]).exits_with(0);
        load.wait_for_generation(generation, LONG).unwrap();
        eventually("room for one more", || (server.serving().draining.len() < 4).then_some(()));
    }
    let tally = load.stop();
    tally.assert_lossless();
    assert_eq!(tally.generations().len(), 11, "{tally}");
    assert_eq!((server.sockets(), server.pid()), (sockets, server.first_pid()));
    server.assert_supervises(2);
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

#[test]
fn a_socket_that_was_copied_before_it_was_bound_is_replaced_everywhere() {
    let address = own_address();
    let server = exec_at(address, &[]);
    server.upgrade(&["--env", "PLAIN=copy", "--wait", "drained"]).exits_with(0);
    assert_eq!(get(address, "/env/HANDOVER_GENERATION"), "2");
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
    eventually("clients of the dropped address that are refused", || is_refused(dropped).then_some(()));
    assert_eq!(get(added, "/env/HANDOVER_GENERATION"), "2");
    // From now on it belongs to those that must be listened on.
    server.upgrade(&["--wait", "drained"]).exits_with(0);
    assert_eq!(server.sockets().len(), 2);
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

/// A new process whose `bind` waits for a supervisor that stands still.
fn with_a_call_that_waits(then: impl FnOnce(&Server, i32)) -> Server {
    let address = own_address();
    let server = exec_at(address, &[]);
    let hold = server.home.fifo("hold");
    let environment = format!("PLAIN=hold={}", hold.path().display());
    let mut upgrade = server.begin_upgrade(&["--env", &environment, "--json", "--ready-timeout", "20s"]);
    let spawned = upgrade.wait_for_line("\"spawned\"");
    let pid = serde_json::from_str::<serde_json::Value>(&spawned).unwrap()["pid"].as_i64().unwrap() as i32;
    eventually("the program itself", || {
        let program = fs::read_link(format!("/proc/{pid}/exe")).unwrap();
        (program == fs::canonicalize(plain()).unwrap()).then_some(())
    });
    let held = hold.reached();
    server.freeze(server.first_pid());
    held.let_go();
    let bind = format!("{} ", libc::SYS_bind);
    eventually("its call of bind", || {
        fs::read_to_string(format!("/proc/{pid}/syscall")).ok().filter(|text| text.starts_with(&bind))
    });
    then(&server, pid);
    server.thaw(server.first_pid());
    upgrade.finish();
    server
}

#[test]
fn a_supervisor_that_is_busy_is_waited_for() {
    let server = with_a_call_that_waits(|server, _| {
        // The one that serves is not held up.
        assert_eq!(ask(server_address(server), "/").answerer().generation, 1);
    });
    assert_eq!(server.serving().generation, 2);
}

#[test]
fn one_that_is_killed_while_its_call_waits_is_no_harm() {
    let server = with_a_call_that_waits(|server, pid| {
        server.signal(pid, Signal::SIGKILL);
        eventually("its end", || crate::server::has_ended(pid).then_some(()));
    });
    assert_eq!(server.serving().generation, 1);
    server.upgrade(&["--wait", "drained"]).exits_with(0);
}

fn server_address(server: &Server) -> SocketAddr {
    let log = server.home.log();
    let argument = fs::read(format!("/proc/{}/cmdline", server.first_pid())).unwrap();
    let last = argument.split(|byte| *byte == 0).rev().find(|part| !part.is_empty()).unwrap();
    String::from_utf8_lossy(last).parse().unwrap_or_else(|error| panic!("{error}: {log}"))
}

/// As docs/any-program.md says.
#[test]
fn without_a_supervisor_nothing_can_be_bound_and_what_is_bound_serves_on() {
    let address = own_address();
    let server = exec_at(address, &[]);
    assert_eq!(get(address, "/bind/127.0.0.1:0"), "bound");
    server.signal(server.first_pid(), Signal::SIGKILL);
    server.wait_for_end(server.first_pid());
    assert_eq!(get(address, "/bind/127.0.0.1:0"), "Function not implemented (os error 38)");
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

/// As in a container without CAP_SYS_PTRACE: a filter that refuses pidfd_getfd (438 everywhere).
const WITHOUT_PIDFD_GETFD: &str = r#"
import ctypes, os, struct, sys
program = b"".join(struct.pack("HBBI", *one) for one in [
    (0x20, 0, 0, 0), (0x15, 0, 1, 438), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7fff0000)])
buffer = ctypes.create_string_buffer(program)
prog = struct.pack("HxxxxxxP", 4, ctypes.addressof(buffer))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, prog, 0, 0) == 0
os.execv(sys.argv[1], sys.argv[1:])
"#;

#[test]
fn where_it_cannot_be_done_it_is_told_with_what_can() {
    let home = Home::new();
    let forbidden = |arguments: &[&str]| {
        let mut command = home.command("python3");
        command.args(["-c", WITHOUT_PIDFD_GETFD, HANDOVER]).args(arguments);
        run(command)
    };
    let plain = plain();
    let plain = plain.to_str().unwrap();
    let refused = forbidden(&["exec", "--", plain, "poll", "127.0.0.1:0"]).exits_with(4);
    refused
        .complains("no pidfd_getfd")
        .complains("Operation not permitted")
        .complains("name the address with --listen");
    forbidden(&["check", "--intercept"]).exits_with(1).says("problem  machine").says("CAP_SYS_PTRACE");
    let mut check = home.command(HANDOVER);
    check.args(["check", "--intercept"]);
    run(check).exits_with(0).says("ok       machine  `handover exec` can keep the sockets");
    // What proves itself, and has no sockets to be kept, is run all the same.
    let mut command = home.logged("python3", &["-c", WITHOUT_PIDFD_GETFD, HANDOVER, "exec"]);
    command.args(["--ready-cmd", "true", "--", "sleep", "600"]);
    let server = Server::run(home, command);
    assert!(server.home.log().contains("are not kept"));
}

/// Two supervisors, one below the other: a process can have one filter that asks.
#[test]
fn where_somebody_else_decides_already_it_is_told() {
    let home = Home::new();
    let plain = plain();
    let inner = [HANDOVER, "exec", "--", plain.to_str().unwrap(), "poll", "127.0.0.1:0"];
    let mut command = home.command(HANDOVER);
    command.args(["exec", "--"]).args(inner);
    let run = run(command).exits_with(1);
    run.complains("another supervisor or sandbox decides on its system calls already").complains("--listen");
}

#[test]
fn a_program_that_listens_on_nothing_is_told_so() {
    let home = Home::new();
    let mut command = home.command(HANDOVER);
    command.args(["exec", "--ready-timeout", "500ms", "--", "sleep", "600"]);
    run(command).exits_with(1).complains("it has listened on nothing").complains("--ready-delay");
    let server = exec_in(Home::new(), &["--ready-cmd", "true"], &["sleep", "600"]);
    server.upgrade(&["--wait", "drained"]).exits_with(0);
}

#[test]
fn no_new_privileges_are_forbidden_only_to_those_who_have_none() {
    if !is_root_or_skip("another user") {
        return;
    }
    let forbidden = |server: &Server| {
        let status = fs::read_to_string(format!("/proc/{}/status", server.worker_pids()[0])).unwrap();
        status.lines().find_map(|line| line.strip_prefix("NoNewPrivs:\t")).unwrap().to_owned()
    };
    assert_eq!(forbidden(&exec_at(own_address(), &["--user", "nobody"])), "0");
    let home = Home::new();
    std::os::unix::fs::chown(home.path(""), Some(65534), Some(65534)).unwrap();
    let program = home.copy(&plain(), "plain");
    let handover = home.copy(HANDOVER.as_ref(), "handover");
    let text = own_address().to_string();
    let arguments = ["exec", "--trial", "100ms", "--", program.to_str().unwrap(), "epoll", &text];
    let mut command = home.logged("setpriv", &["--reuid=65534", "--regid=65534", "--clear-groups"]);
    command.arg(&handover).args(arguments);
    let server = Server::run(home, command);
    assert_eq!(forbidden(&server), "1");
    server.upgrade(&["--wait", "drained"]).exits_with(0);
    assert_eq!(get(text.parse().unwrap(), "/env/HANDOVER_GENERATION"), "2");
}

const PREFORKED: &str = r#"
import os, signal, socket, sys, time
host, port = sys.argv[1].split(":")
listener = socket.create_server((host, int(port)))
for number in range(3):
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
        while True:
            connection, _ = listener.accept()
            connection.recv(65536)
            body = f"gen={os.environ['HANDOVER_GENERATION']} pid={os.getpid()}".encode()
            connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
            connection.close()
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
while True:
    time.sleep(1)
"#;

#[test]
fn children_that_accept_for_their_parent_are_seen_to_wait() {
    let address = own_address();
    let server = python(Home::new(), &[], PREFORKED, &[&address.to_string()]);
    server.upgrade(&["--wait", "drained"]).exits_with(0);
    assert_eq!(ask(address, "/").answerer().generation, 2);
}

/// One that leaves its parent behind is nobody's worker: what it binds is its own affair.
const LEAVES: &str = r#"
import os, socket, sys, time
address = (sys.argv[1].split(":")[0], int(sys.argv[1].split(":")[1]))
listener = socket.create_server(address)
if os.environ["HANDOVER_GENERATION"] == "2":
    if os.fork() == 0:
        os.setsid()
        if os.fork() != 0:
            os._exit(0)
        while os.getppid() == int(sys.argv[2]):
            time.sleep(0.01)
        try:
            socket.create_server(address)
            said = "was given it"
        except OSError as error:
            said = error.strerror
        with open(sys.argv[3] + ".new", "w") as file:
            file.write(said)
        os.rename(sys.argv[3] + ".new", sys.argv[3])
        os._exit(0)
    os.wait()
while True:
    listener.accept()
"#;

#[test]
fn a_process_outside_the_tree_of_the_program_is_given_nothing() {
    let home = Home::new();
    let said = home.path("said");
    let address = own_address().to_string();
    let server = python(home, &[], LEAVES, &[&address, "0", said.to_str().unwrap()]);
    server.upgrade(&["--wait", "drained"]).exits_with(0);
    let text = eventually("what it has said", || fs::read_to_string(&said).ok());
    assert!(text.starts_with("Address already in use"), "{text}");
}

/// Signals come all the time, as in a Go program: their handlers have SA_RESTART.
const INTERRUPTED: &str = r#"
import signal, socket, sys, time
signal.signal(signal.SIGALRM, lambda *_: None)
signal.siginterrupt(signal.SIGALRM, False)
signal.setitimer(signal.ITIMER_REAL, 0.0003, 0.0003)
host, port = sys.argv[1].split(":")
listeners = [socket.create_server((host, int(port) + number)) for number in range(200)]
signal.setitimer(signal.ITIMER_REAL, 0)
import select
poll = select.epoll()
for listener in listeners:
    poll.register(listener, select.EPOLLIN)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
while True:
    poll.poll()
"#;

#[test]
fn calls_that_signals_interrupt_come_to_the_same() {
    let address = own_address().to_string();
    let server = python(Home::new(), &[], INTERRUPTED, &[&address]);
    let sockets = server.sockets();
    assert_eq!(sockets.len(), 200);
    for _ in 0..2 {
        server.upgrade(&["--trial", "0s", "--wait", "drained"]).exits_with(0);
        assert_eq!(server.sockets(), sockets);
    }
}

/// A child of a shell, with a filter of its own, that binds a privileged port in a thread and then gives its rights up.
const GUARDED: &str = r#"
import ctypes, os, signal, socket, struct, sys, threading
program = b"".join(struct.pack("HBBI", *one) for one in [
    (0x20, 0, 0, 0), (0x15, 0, 1, 101), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7fff0000)])
buffer = ctypes.create_string_buffer(program)
prog = struct.pack("HxxxxxxP", 4, ctypes.addressof(buffer))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, prog, 0, 0) == 0
listeners = []
thread = threading.Thread(target=lambda: listeners.append(socket.create_server((sys.argv[1], 80))))
thread.start()
thread.join()
os.setgid(65534)
os.setuid(65534)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
while True:
    connection, _ = listeners[0].accept()
    connection.recv(65536)
    body = f"gen={os.environ['HANDOVER_GENERATION']} pid={os.getpid()}".encode()
    connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
    connection.close()
"#;

#[test]
fn a_program_that_guards_itself_is_given_its_socket_too() {
    if !is_root_or_skip("a privileged port") {
        return;
    }
    let ip = own_address().ip();
    let shell = "trap 'kill $!; wait $!; exit 0' TERM; python3 -c \"$0\" \"$1\" & wait $!";
    let server = exec_in(Home::new(), &[], &["sh", "-c", shell, GUARDED, &ip.to_string()]);
    let sockets = server.sockets();
    for generation in 2..=3 {
        server.upgrade(&["--wait", "drained"]).exits_with(0);
        assert_eq!(ask(SocketAddr::new(ip, 80), "/").answerer().generation, generation);
    }
    assert_eq!(server.sockets(), sockets);
}

/// Threads that start programs (by `vfork`, as Python does) while others bind.
const STARTS_PROGRAMS: &str = r#"
import select, signal, socket, subprocess, sys, threading
host, port = sys.argv[1].split(":")
is_over = threading.Event()
def start():
    while not is_over.is_set():
        subprocess.run(["true"])
threads = [threading.Thread(target=start) for _ in range(2)]
for thread in threads:
    thread.start()
listeners = [socket.create_server((host, int(port) + number)) for number in range(50)]
is_over.set()
for thread in threads:
    thread.join()
poll = select.epoll()
for listener in listeners:
    poll.register(listener, select.EPOLLIN)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
while True:
    poll.poll()
"#;

#[test]
fn a_program_that_starts_others_while_it_binds() {
    let address = own_address().to_string();
    let server = python(Home::new(), &[], STARTS_PROGRAMS, &[&address]);
    let sockets = server.sockets();
    assert_eq!(sockets.len(), 50);
    server.upgrade(&["--wait", "drained"]).exits_with(0);
    assert_eq!(server.sockets(), sockets);
}

/// Binds by the 32-bit interface of the kernel, `int 0x80`.
#[cfg(target_arch = "x86_64")]
const OF_32_BITS: &str = r#"
import ctypes, mmap, signal, socket, struct, sys
MAP_32BIT = 0x40
memory = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_32BIT, prot=7)
host, port = sys.argv[1].split(":")
address = struct.pack("=H", socket.AF_INET) + struct.pack("!H", int(port)) + socket.inet_aton(host) + bytes(8)
# push rbx; mov eax, edi; mov ebx, esi; xchg ecx, edx; int 0x80; pop rbx; ret
code = bytes.fromhex("5389f889f387d1cd805bc3")
memory[:len(code)] = code
memory[1024:1024 + len(address)] = address
base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
call = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_uint, ctypes.c_int)(base)
listener = socket.socket()
BIND = 361
result = call(BIND, listener.fileno(), base + 1024, len(address))
if result != 0:
    sys.exit(f"bind: {result}")
listener.listen()
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
while True:
    listener.accept()
"#;

#[cfg(target_arch = "x86_64")]
#[test]
fn a_32_bit_call_is_passed_by_with_a_warning() {
    let address = own_address().to_string();
    let server = python(Home::new(), &[], OF_32_BITS, &[&address]);
    assert!(server.home.log().contains("runs a 32-bit program: what it listens on is not kept for its next build"));
    // EADDRINUSE: nothing was put in the place of its socket.
    server.upgrade(&[]).exits_with(1).complains("bind: -98");
    assert_eq!(server.serving().generation, 1);
}

const IN_CHROOT: &str = r#"
import os, socket, sys
os.chroot(sys.argv[1])
os.chdir("/run")
if os.path.exists("app.sock"):
    os.unlink("app.sock")
listener = socket.socket(socket.AF_UNIX)
listener.bind("app.sock")
listener.listen()
while True:
    listener.accept()
"#;

#[test]
fn a_path_below_another_root() {
    if !is_root_or_skip("chroot") {
        return;
    }
    let home = Home::new();
    fs::create_dir_all(home.path("root/run")).unwrap();
    let (root, path) = (home.path("root"), home.path("root/run/app.sock"));
    let server = python(home, &[], IN_CHROOT, &[root.to_str().unwrap()]);
    let sockets = server.sockets();
    for _ in 0..2 {
        server.upgrade(&["--wait", "drained"]).exits_with(0);
        UnixStream::connect(&path).unwrap();
    }
    assert_eq!(server.sockets(), sockets);
    assert!(sockets.first().unwrap().0.ends_with("/root/run/app.sock"));
}

fn started_plainly(home: &Home, arguments: &[&str]) -> std::process::Child {
    let mut command: Command = home.logged(plain(), arguments);
    command.env("HANDOVER_GENERATION", "0").spawn().unwrap()
}

#[test]
fn a_running_server_is_taken_over() {
    let home = Home::new();
    let path = home.path("app.sock");
    let (one, two) = (own_address(), own_address());
    let arguments = ["epoll", &one.to_string(), &two.to_string(), path.to_str().unwrap()].map(str::to_owned);
    let arguments = arguments.each_ref().map(String::as_str);
    let mut old = started_plainly(&home, &arguments);
    eventually("the server", || UnixStream::connect(&path).ok());
    let load = Load::new(one).also(two).new_connections(2).kept(2).slow(2, 1.0).start();
    load.wait_for_more(50, LONG).unwrap();
    let is_over = AtomicBool::new(false);
    let server = thread::scope(|scope| {
        let connects = scope.spawn(|| connects_to(&path, &is_over));
        let over = Over(&is_over);
        let pid = old.id().to_string();
        let program = plain();
        let program = [&[program.to_str().unwrap()][..], &arguments].concat();
        let server = exec_in(home, &["--take-over", &pid], &program);
        assert!(old.wait().unwrap().success());
        eventually("its end to be seen", || server.home.log().contains("has taken its place").then_some(()));
        drop(over);
        // That one path is there at every moment cannot be had from a server that removes it by itself: see the docs.
        let _ = connects.join();
        server
    });
    load.wait_for_generation(1, LONG).unwrap();
    server.upgrade(&["--wait", "drained"]).exits_with(0);
    load.stop().assert_lossless();
    assert_eq!(ask_unix(&path, "/").answerer().generation, 2);
    assert_eq!(server.sockets().len(), 3);
    let beside = fs::read_dir(path.parent().unwrap()).unwrap().flatten().map(|entry| entry.file_name());
    assert_eq!(beside.filter(|name| name.to_string_lossy().contains("app.sock")).count(), 1);
}

#[test]
fn a_server_whose_place_cannot_be_taken_serves_on() {
    let home = Home::new();
    let (address, other) = (own_address(), own_address());
    let mut old = started_plainly(&home, &["epoll", &address.to_string()]);
    eventually("the server", || TcpStream::connect(address).ok());
    let load = Load::new(address).new_connections(2).kept(2).start();
    let pid = old.id().to_string();
    let refused = |options: &[&str], program: &[&str], message: &str| {
        let mut command = home.command(HANDOVER);
        command.args(["exec", "--ready-timeout", "500ms", "--take-over"]).args(options).arg("--").args(program);
        run(command).exits_with(1).complains(message);
    };
    let other = other.to_string();
    let plain = plain();
    let plain = plain.to_str().unwrap();
    refused(&[&pid], &[plain, "epoll", &other], &format!("it does not wait for connections on {address}"));
    refused(&[&pid], &["false"], "exited with status 1");
    refused(&[&pid, "--listen", &other], &["true"], &format!("it does not listen on {other}; it does on {address}"));
    refused(&["2147483647"], &["true"], "No such process");
    let mut sleeps = Command::new("sleep").arg("600").spawn().unwrap();
    refused(&[&sleeps.id().to_string()], &["true"], "neither it nor what it has started listens on anything");
    sleeps.kill().unwrap();
    sleeps.wait().unwrap();
    load.stop().assert_lossless();
    assert!(old.try_wait().unwrap().is_none());
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(old.id().cast_signed()), Signal::SIGTERM).unwrap();
    assert!(old.wait().unwrap().success());
}
