//! Where the first generation's sockets come from: LISTEN_FDS, or variables that mean somebody else.

use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;

use crate::client::ask_unix;
use crate::home::{Home, fixture};
use crate::server::{Server, fds_of};
use crate::wait::eventually_equal;

/// Starts the fixture with a listening socket as fd 3 and `variables` set by the shell, whose pid becomes its own.
fn activated(listener: impl Into<OwnedFd>, variables: &str, arguments: &[&str]) -> Server {
    activated_in(Home::new(), listener, variables, arguments)
}

fn activated_in(home: Home, listener: impl Into<OwnedFd>, variables: &str, arguments: &[&str]) -> Server {
    // Passed as fd 0, which a test can do without unsafe code.
    let script = format!("exec 3<&0 0</dev/null; export {variables}; exec {} \"$@\"", fixture().display());
    let arguments = [&["-c", &script, "sh", "--trial", "100ms"], arguments].concat();
    let mut command = home.logged("/bin/sh", &arguments);
    command.stdin(listener.into());
    Server::run(home, command)
}

fn source(server: &Server) -> String {
    server.serving().listeners[0].source.clone()
}

#[test]
fn activated_by_name_and_upgraded() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    // The program asks for another port, but the manager decides.
    let variables = "LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=http";
    let server = activated(listener, variables, &["--tcp", "http=127.0.0.1:1"]);
    assert_eq!((server.address(), source(&server).as_str()), (address, "activated"));
    let cookie = server.serving().listeners[0].cookie;
    for generation in 2..=3 {
        server.upgrade(&[]).exits_with(0);
        assert_eq!((server.address(), source(&server).as_str()), (address, "handed-over"));
        assert_eq!(server.serving().listeners[0].cookie, cookie);
        assert_eq!(server.answerer().generation, generation);
        assert_eq!(server.get("/env/LISTEN_FDS"), "");
        assert_eq!(server.get("/nodelay"), "Ok(false)", "as the manager has left it");
    }
}

#[test]
fn activated_without_names_and_upgraded() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let asked = format!("http={address}");
    let server = activated(listener, "LISTEN_PID=$$ LISTEN_FDS=1", &["--tcp", &asked]);
    assert_eq!((server.address(), source(&server).as_str()), (address, "activated"));
    server.upgrade(&[]).exits_with(0);
    assert_eq!((server.address(), source(&server).as_str()), (address, "handed-over"));
    assert_eq!(server.answerer().generation, 2);
}

/// The stop before has removed it, or systemd has with RuntimeDirectory=.
#[test]
fn a_stored_unix_socket_whose_path_is_gone_is_bound_anew() {
    let home = Home::new();
    let path = home.path("app.sock");
    let stored = UnixListener::bind(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let asked = format!("app={}", path.display());
    let server =
        activated_in(home, stored, "LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=handover.app", &["--unix", &asked]);
    assert_eq!(source(&server), "bound");
    assert_eq!(ask_unix(&path, "/").answerer().generation, 1);
}

/// The unit calls it something else now.
#[test]
fn a_stored_socket_is_found_by_its_address_under_another_name() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let variables = "LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=handover.http";
    let server = activated(listener, variables, &["--tcp", &format!("web={address}")]);
    assert_eq!(source(&server), "activated");
    assert_eq!(crate::client::ask(address, "/").answerer().generation, 1);
}

#[test]
fn sockets_meant_for_another_process_are_not_touched() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let variables = "LISTEN_PID=1 LISTEN_FDS=1 LISTEN_FDNAMES=http";
    let server = activated(listener, variables, &["--tcp", "http=127.0.0.1:0"]);
    assert_ne!(server.address(), address);
    assert_eq!(source(&server), "bound");
}

#[test]
fn a_left_over_variable_is_harmless() {
    for stale in ["3:1", "3", "99:12345", "-1:0", "0:0", "", "nonsense"] {
        let home = Home::new();
        let mut command = home.fixture(&["--tcp", "http=127.0.0.1:0", "--trial", "100ms"]);
        command.env("HANDOVER_FD", stale);
        let server = Server::run(home, command);
        assert_eq!(server.answerer().generation, 1);
        server.upgrade(&[]).exits_with(0);
        assert_eq!(server.answerer().generation, 2);
    }
}

/// Neither listeners nor the channel reach what the server starts, and the variable means nothing there.
#[test]
fn a_child_of_the_server_inherits_nothing() {
    let server = Server::http();
    // What this process was itself given by whoever started it goes through all of them.
    let passed_through = fds_of(std::process::id().cast_signed());
    for generation in 1..=3 {
        let child: i32 = server.get("/child").parse().unwrap();
        let log = server.home.path("log").display().to_string();
        // Its own libraries are open for a moment while it starts.
        eventually_equal(&format!("fds of a child of generation {generation}"), &vec![], || {
            let fds = fds_of(child).into_iter().filter(|fd| !passed_through.contains(fd) && *fd != log);
            fds.collect::<Vec<_>>()
        });
        server.upgrade(&[]).exits_with(0);
    }
}
