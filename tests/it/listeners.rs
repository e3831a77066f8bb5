//! Every kind of listener over upgrades: the same socket, the same address, its path and its options.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;

use handover::control::State;

use crate::client::{ask, ask_unix};
use crate::command::{Running, run};
use crate::home::{Home, fixture};
use crate::oracle::{Load, Target};
use crate::server::Server;
use crate::wait::{LONG, eventually};

fn has_ipv6(what: &str) -> bool {
    let has = TcpListener::bind("[::1]:0").is_ok();
    if !has {
        assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "{what}: needs IPv6, and CI leaves nothing out");
        eprintln!("left out, because this machine has no IPv6: {what}");
    }
    has
}

/// Name, address and cookie of each listener.
fn identities(server: &Server) -> Vec<(String, String, u64)> {
    let status = server.serving();
    status.listeners.into_iter().map(|one| (one.name, one.address, one.cookie)).collect()
}

#[test]
fn sockets_and_addresses_are_the_same_in_every_generation() {
    let home = Home::new();
    let (unix, datagram) = (home.path("unix"), home.path("datagram"));
    let abstract_name = format!("abstract=@handover-it-{}", std::process::id());
    let server = Server::start_in(
        home,
        &[
            "--tcp",
            "http=127.0.0.1:0",
            "--tcp",
            "admin=127.0.0.1:0",
            "--udp",
            "dns=127.0.0.1:0",
            "--unix",
            &format!("unix={}", unix.display()),
            "--unix",
            &abstract_name,
            "--unix-datagram",
            &format!("datagram={}", datagram.display()),
        ],
    );
    let before = identities(&server);
    assert_eq!(before.len(), 6);
    for generation in 2..=4 {
        server.upgrade(&["--trial", "50ms"]).exits_with(0);
        assert_eq!(identities(&server), before);
        assert_eq!(server.generation(), generation);
        assert!(server.serving().listeners.iter().all(|one| one.source == "handed-over"));
    }
    assert_eq!(ask_unix(&unix, "/").answerer().generation, 4);
    // Both at 127.0.0.1:0, and told apart by name.
    let admin: SocketAddr = server.address_of("admin").parse().unwrap();
    assert_ne!(admin, server.address());
    assert_eq!(ask(admin, "/").answerer().generation, 4);
}

#[test]
fn one_port_for_tcp_and_udp_is_two_listeners() {
    let server = Server::http();
    let address = server.address();
    let udp = format!("udp={address}");
    let arguments = ["--", "--trial", "50ms", "--tcp", "http=127.0.0.1:0", "--udp", &udp];
    server.upgrade(&arguments).exits_with(0).says("keeps http; adds udp");
    let before = identities(&server);
    server.upgrade(&[]).exits_with(0).says("keeps http, udp");
    assert_eq!(identities(&server), before);
}

#[test]
fn a_unix_path_keeps_inode_and_mode_and_goes_with_the_last_generation() {
    let home = Home::new();
    let path = home.path("server.sock");
    let server = Server::start_in(home, &["--unix", &format!("http={},mode=0640", path.display())]);
    let before = fs::symlink_metadata(&path).unwrap();
    assert_eq!(before.permissions().mode() & 0o7777, 0o640);
    let load = Load::new(Target::Unix(path.clone())).new_connections(2).kept(2).monotonic().start();
    for generation in 2..=3 {
        server.upgrade(&["--wait", "drained"]).exits_with(0);
        load.wait_for_generation(generation, LONG).unwrap();
        let now = fs::symlink_metadata(&path).unwrap();
        assert_eq!((now.ino(), now.permissions().mode()), (before.ino(), before.permissions().mode()));
    }
    load.stop().assert_lossless();
    // Another mode is set when the new build has the socket.
    let arguments = ["--", "--trial", "50ms", "--unix", &format!("http={},mode=0600", path.display())];
    server.upgrade(&arguments).exits_with(0);
    let mode = || fs::symlink_metadata(&path).unwrap().permissions().mode() & 0o7777;
    eventually("the new mode", || (mode() == 0o600).then_some(()));
    server.handover(&["stop", "--pid", &server.pid().to_string()]).exits_with(0);
    assert!(!path.exists());
}

/// Once its socket is closed another one may have its inode number, and be the path of the service that was started meanwhile.
#[test]
fn a_unix_path_goes_before_the_drain_and_not_after_it() {
    let home = Home::new();
    let path = home.path("server.sock");
    let server = Server::start_in(home, &["--unix", &format!("http={}", path.display())]);
    let asked = path.clone();
    let request = std::thread::spawn(move || ask_unix(&asked, "/slow/2").answerer());
    eventually("a request", || (server.serving().connections.open > 0).then_some(()));
    let pid = server.pid();
    let stop = Running::start(server.handover_command(&["stop", "--pid", &pid.to_string()]));
    eventually("its path to go", || (!path.exists()).then_some(()));
    assert_eq!(server.status(pid).state, State::Draining);
    let _next = UnixListener::bind(&path).unwrap();
    stop.finish().exits_with(0);
    assert!(path.exists());
    assert_eq!(request.join().unwrap().generation, 1);
}

#[test]
fn a_unix_path_that_is_somebody_elses_by_now_stays() {
    let home = Home::new();
    let path = home.path("server.sock");
    let server = Server::start_in(home, &["--unix", &format!("http={}", path.display())]);
    fs::remove_file(&path).unwrap();
    let _other = UnixListener::bind(&path).unwrap();
    server.upgrade(&[]).exits_with(0);
    server.handover(&["stop", "--pid", &server.pid().to_string()]).exits_with(0);
    assert!(path.exists());
}

#[test]
fn a_unix_path_that_answers_is_not_stolen() {
    let home = Home::new();
    let path = home.path("server.sock");
    let _other = UnixListener::bind(&path).unwrap();
    let mut command = home.command(fixture());
    command.args(["--unix", &format!("http={}", path.display())]);
    run(command).exits_with(1).complains("another process listens there").complains("handover upgrade --pid");
}

#[test]
fn a_stale_unix_path_is_replaced_and_a_file_is_not() {
    let home = Home::new();
    let (path, file) = (home.path("server.sock"), home.file("file", b"precious", 0o600));
    drop(UnixListener::bind(&path).unwrap());
    let server = Server::start_in(home, &["--unix", &format!("http={}", path.display())]);
    assert_eq!(ask_unix(&path, "/").answerer().generation, 1);
    let mut command = server.home.command(fixture());
    command.args(["--unix", &format!("http={}", file.display())]);
    run(command).exits_with(1).complains("the path exists and is no socket");
    assert_eq!(fs::read(file).unwrap(), b"precious");
}

#[test]
fn dual_stack_stays_dual() {
    if !has_ipv6("a dual-stack listener") {
        return;
    }
    let server = Server::start(&["--tcp", "http=[::]:0,v6only=false"]);
    for generation in 1..=2 {
        let port = server.address().port();
        for ip in ["127.0.0.1", "[::1]"] {
            let answer = ask(format!("{ip}:{port}").parse().unwrap(), "/").answerer();
            assert_eq!(answer.generation, generation, "{ip}");
        }
        server.upgrade(&[]).exits_with(0);
    }
}

#[test]
fn v6_only_takes_no_v4() {
    if !has_ipv6("an IPv6-only listener") {
        return;
    }
    let server = Server::start(&["--tcp", "http=[::]:0,v6only=true"]);
    server.upgrade(&[]).exits_with(0);
    let port = server.address().port();
    assert_eq!(ask(format!("[::1]:{port}").parse().unwrap(), "/").answerer().generation, 2);
    // An address of its own: on 127.0.0.1 another test may listen on a port of that number.
    assert!(std::net::TcpStream::connect(("127.77.0.1", port)).is_err());
}

#[test]
fn connections_have_tcp_nodelay_as_the_build_asks() {
    let server = Server::http();
    assert_eq!(server.get("/nodelay"), "Ok(true)");
    server.upgrade(&[]).exits_with(0);
    assert_eq!((server.answerer().generation, server.get("/nodelay").as_str()), (2, "Ok(true)"));
    for (generation, on) in [(3, false), (4, true)] {
        let asked = format!("http=127.0.0.1:0,nodelay={on}");
        server
            .upgrade(&["--wait", "drained", "--", "--trial", "50ms", "--tcp", &asked])
            .exits_with(0)
            .says("keeps http");
        assert_eq!((server.answerer().generation, server.get("/nodelay")), (generation, format!("Ok({on})")));
    }
}

#[test]
fn a_listener_that_is_not_wanted_is_closed() {
    let server = Server::start(&["--tcp", "http=127.0.0.1:0", "--tcp", "admin=127.77.0.1:0"]);
    let admin: SocketAddr = server.address_of("admin").parse().unwrap();
    let arguments = ["--wait", "drained", "--", "--trial", "50ms", "--tcp", "http=127.0.0.1:0"];
    server.upgrade(&arguments).exits_with(0).says("keeps http; does not want admin");
    let error = std::net::TcpStream::connect(admin).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
}

#[test]
fn a_listener_that_is_not_wanted_now_may_be_kept_for_later() {
    let server = Server::start(&["--tcp", "http=127.0.0.1:0", "--tcp", "admin=127.0.0.1:0"]);
    let before = identities(&server);
    let admin: SocketAddr = server.address_of("admin").parse().unwrap();
    let without = ["--wait", "drained", "--", "--trial", "50ms", "--tcp", "http=127.0.0.1:0", "--unclaimed", "keep"];
    server.upgrade(&without).exits_with(0);
    let waits = ask(admin, "/");
    let with = ["--", "--trial", "50ms", "--tcp", "http=127.0.0.1:0", "--tcp", "admin=127.0.0.1:0"];
    server.upgrade(&with).exits_with(0).says("keeps http, admin");
    assert_eq!(waits.answerer().generation, 3);
    assert_eq!(identities(&server), before);
}

#[test]
fn a_listener_with_another_address_is_bound_afresh() {
    let server = Server::http();
    let old = server.address();
    let arguments = ["--wait", "drained", "--", "--trial", "50ms", "--tcp", "http=127.0.0.2:0"];
    server.upgrade(&arguments).exits_with(0).says("adds http");
    assert_eq!(server.address().ip().to_string(), "127.0.0.2");
    assert_eq!(server.answerer().generation, 2);
    assert!(std::net::TcpStream::connect(old).is_err());
}

/// Whatever a program does first: before commit nobody accepts, after it both ways do.
#[test]
fn the_order_of_ready_and_accept_is_no_trap() {
    let server = Server::start(&["--tcp", "http=127.0.0.1:0", "--ready-first"]);
    let load = server.load().monotonic().start();
    for generation in 2..=4 {
        server.upgrade(&["--trial", "50ms"]).exits_with(0);
        load.wait_for_generation(generation, LONG).unwrap();
    }
    load.stop().assert_lossless();
}
