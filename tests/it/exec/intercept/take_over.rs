//! A server that runs already.

use std::io::Read;
use std::os::unix::process::ExitStatusExt;

use super::*;

/// Also has what clients have: sockets that the kernel bound when they sent, or asked for a name.
const WITH_CLIENTS: &str = r#"
asks = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
asks.sendto(b"x", ("127.0.0.1", 9))
logs = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
logs.bind("")
assert len(logs.getsockname()) == 6
listener = socket.create_server(address())
while True:
    answer(listener)
"#;

#[test]
fn what_a_server_has_as_a_client_is_not_taken() {
    let address = own_address();
    let server = taken_over(WITH_CLIENTS, address, address);
    assert_eq!(server.sockets().len(), 1);
    assert_eq!(ask(address, "/").answerer().generation, 1);
    assert!(server.home.log().contains("may be a client's, and is left to it: name all of its addresses"));
}

#[test]
fn a_server_that_has_ended_its_main_thread_is_taken_over() {
    let address = own_address();
    let server = taken_over(awkward::MAIN_THREAD_ENDS, address, awkward::next_to(address));
    assert_eq!(server.sockets().len(), 2);
    assert_eq!(ask(address, "/").answerer().generation, 1);
}

/// What has taken the place of a server that runs such a script, which listens on `last` in the end.
fn taken_over(text: &str, address: SocketAddr, last: SocketAddr) -> Server {
    let home = Home::new();
    let (script, text) = (script(text), address.to_string());
    let program = ["python3", "-c", &script, &text];
    let mut command = home.logged(program[0], &program[1..]);
    let mut old = command.env("HANDOVER_GENERATION", "0").spawn().unwrap();
    eventually("the server", || TcpStream::connect(last).ok());
    let server = exec_in(home, &["--take-over", &old.id().to_string()], &program);
    assert!(old.wait().unwrap().success());
    server
}

/// Among the ports that the kernel gives to clients.
#[test]
fn one_that_could_be_of_a_client_is_taken_if_it_is_named() {
    const PORT: u16 = 45_678;
    let (home, address) = (Home::new(), SocketAddr::from(([0, 0, 0, 0], PORT)));
    let udp = format!("udp:{address}");
    let program = plain();
    let program = [program.to_str().unwrap(), "poll", &udp];
    let mut old = started_plainly(&home, &program[1..]);
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client.set_read_timeout(Some(std::time::Duration::from_millis(100))).unwrap();
    let mut buffer = [0; 64];
    let mut answered_by = |generation: u64| {
        let length = client.send_to(b"x", ("127.0.0.1", PORT)).and_then(|_| client.recv(&mut buffer)).ok()?;
        buffer[..length].starts_with(format!("gen={generation} ").as_bytes()).then_some(())
    };
    eventually("the server", || answered_by(0));
    let server = exec_in(home, &["--take-over", &old.id().to_string(), "--listen", &udp], &program);
    assert!(old.wait().unwrap().success());
    eventually("its place to be taken", || answered_by(1));
    assert_eq!(server.sockets().len(), 1);
}

/// Not even an upgrade that is asked for meanwhile.
#[test]
fn without_overlap_nothing_is_started_before_the_server_has_ended() {
    let home = Home::new();
    let (address, hold) = (own_address(), home.fifo("hold"));
    let slow_to_end = script(
        r#"
def end_when_let_go(*_):
    open(sys.argv[2]).read()
    sys.exit(0)

signal.signal(signal.SIGTERM, end_when_let_go)
listener = socket.create_server(address())
while True:
    answer(listener)
"#,
    );
    let (at, fifo) = (address.to_string(), hold.path().display().to_string());
    let mut command = home.logged("python3", &["-c", &slow_to_end, &at, &fifo]);
    let mut old = command.env("HANDOVER_GENERATION", "0").spawn().unwrap();
    eventually("the server", || TcpStream::connect(address).ok());
    let pid = old.id().to_string();
    let arguments = ["exec", "--trial", "100ms", "--take-over", &pid, "--no-overlap", "--"];
    let mut command = home.logged(HANDOVER, &arguments);
    let new = command.args([plain().to_str().unwrap(), "epoll", &at]).spawn().unwrap();
    let server = Server::adopt(home, new);
    let held = hold.reached();
    for verb in ["upgrade", "restart"] {
        let run = server.handover(&[verb, "--pid", &server.first_pid().to_string()]);
        run.exits_with(3).complains("is still starting up");
    }
    server.signal(server.first_pid(), Signal::SIGUSR2);
    eventually("the signal", || server.home.log().contains("asked for by signal").then_some(()));
    assert_eq!(server.worker_pids(), Vec::<i32>::new());
    held.let_go();
    assert!(old.wait().unwrap().success());
    server.wait_until(server.first_pid(), handover::control::State::Serving);
    assert_eq!(ask(address, "/").answerer().generation, 1);
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

/// It does not listen to its signal, and what serves is a process that it has started.
#[test]
fn a_server_that_does_not_end_is_killed_with_what_it_has_started() {
    let home = Home::new();
    let (at, plain) = (own_address(), plain());
    let address = at.to_string();
    let plain = plain.to_str().unwrap();
    let script = format!("trap '' TERM; {plain} epoll {address} & wait");
    let mut old = home.logged("sh", &["-c", &script]).env("HANDOVER_GENERATION", "0").spawn().unwrap();
    let mut idle = eventually("the server", || TcpStream::connect(at).ok());
    idle.set_read_timeout(Some(LONG)).unwrap();
    let options = ["--take-over", &old.id().to_string(), "--drain-timeout", "300ms"];
    let server = exec_in(home, &options, &[plain, "epoll", &address]);
    assert_eq!(old.wait().unwrap().signal(), Some(libc::SIGKILL));
    match idle.read(&mut [0]) {
        Ok(0) => {}
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
        other => panic!("its child lives: {other:?}"),
    }
    eventually("its end to be seen", || server.home.log().contains("has taken its place").then_some(()));
    assert!(server.home.log().contains("is killed, with 1 connections"), "{}", server.home.log());
    assert_eq!(ask(at, "/").answerer().generation, 1);
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
    let pid_file = home.path("app.pid").display().to_string();
    refused(&["2147483647", "--pid-file", &pid_file], &["true"], "No such process");
    let left = fs::read_dir(home.path("")).unwrap().flatten().map(|entry| entry.file_name());
    assert_eq!(left.filter(|name| name.to_string_lossy().starts_with("app.pid")).count(), 0);
    let mut sleeps = Command::new("sleep").arg("600").spawn().unwrap();
    refused(&[&sleeps.id().to_string()], &["true"], "neither it nor what it has started listens on anything");
    sleeps.kill().unwrap();
    sleeps.wait().unwrap();
    load.stop().assert_lossless();
    assert!(old.try_wait().unwrap().is_none());
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(old.id().cast_signed()), Signal::SIGTERM).unwrap();
    assert!(old.wait().unwrap().success());
}
