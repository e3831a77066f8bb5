//! Sockets that a service manager passes to the supervisor: those of its own `.socket` units, and what an earlier run has
//! put into its store.

use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;

use crate::client::{ask, get};
use crate::exec::plain;
use crate::home::{HANDOVER, Home};
use crate::server::Server;

/// `handover exec` with one or two sockets from a service manager, once the program serves.
fn exec(home: Home, sockets: Vec<OwnedFd>, names: &str, options: &[&str], program: &[&str]) -> Server {
    let count = sockets.len();
    // Passed as fds 0 and 1, which a test can do without unsafe code.
    let mut redirected = "exec 3<&0 0</dev/null".to_owned();
    if count > 1 {
        redirected += "; exec 4<&1 1>&2";
    }
    let variables = format!("export LISTEN_PID=$$ LISTEN_FDS={count} LISTEN_FDNAMES={names}");
    let script = format!("{redirected}; {variables}; exec {HANDOVER} exec \"$@\"");
    let plain = plain();
    let program = [&[plain.to_str().unwrap()], program].concat();
    let arguments = [&["-c", &script, "sh", "--trial", "100ms"], options, &["--"], &program].concat();
    let mut command = home.logged("/bin/sh", &arguments);
    let mut sockets = sockets.into_iter();
    command.env("NOTIFY_SOCKET", home.path("notify")).stdin(sockets.next().unwrap());
    if let Some(second) = sockets.next() {
        command.stdout(second);
    }
    Server::run(home, command)
}

fn bound() -> (SocketAddr, OwnedFd) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    (listener.local_addr().unwrap(), listener.into())
}

/// systemd gives all sockets of a unit the name of that.
#[test]
fn several_of_one_name_are_all_passed_on() {
    for names in ["app.socket:app.socket", ""] {
        let ((first, one), (second, two)) = (bound(), bound());
        let server = exec(Home::new(), vec![one, two], names, &[], &[]);
        let each = |generation: u64| {
            for address in [first, second] {
                assert_eq!(ask(address, "/").answerer().generation, generation);
                assert_eq!(get(address, "/env/LISTEN_FDS"), "2");
            }
            let addresses: Vec<String> = server.serving().listeners.into_iter().map(|one| one.address).collect();
            assert_eq!(addresses, [first.to_string(), second.to_string()]);
        };
        each(1);
        server.upgrade(&["--wait", "drained"]).exits_with(0);
        each(2);
        server.handover(&["upgrade", "--self", "--pid", &server.first_pid().to_string()]).exits_with(0);
        each(2);
        server.upgrade(&["--wait", "drained"]).exits_with(0);
        each(3);
    }
}
