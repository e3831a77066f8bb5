//! Sockets that a service manager passes to the supervisor: those of its own `.socket` units, and what an earlier run has
//! put into its store.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use crate::client::{ask, ask_unix, get};
use crate::exec::plain;
use crate::home::{HANDOVER, Home};
use crate::server::Server;
use crate::wait::{eventually, eventually_equal};

/// Hears what it is told on NOTIFY_SOCKET. An fd that comes with it is closed, as systemd closes that of a barrier.
struct Manager {
    socket: UnixDatagram,
    heard: Arc<Mutex<Vec<String>>>,
    thread: Option<JoinHandle<()>>,
}

impl Manager {
    fn in_home(home: &Home) -> Self {
        let socket = UnixDatagram::bind(home.path("notify")).unwrap();
        let heard = Arc::new(Mutex::new(vec![]));
        let (reads, writes) = (socket.try_clone().unwrap(), Arc::clone(&heard));
        let thread = thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = reads.recv(&mut buffer) {
                writes.lock().unwrap().push(String::from_utf8_lossy(&buffer[..length]).into_owned());
            }
        });
        Self { socket, heard, thread: Some(thread) }
    }

    /// What of the store, in its order.
    fn store(&self) -> Vec<String> {
        let heard = self.heard.lock().unwrap();
        let of_store = heard.iter().filter_map(|message| message.strip_prefix("FDSTORE"));
        of_store.map(|message| message.replace("\nFDNAME=", " ")).collect()
    }

    #[track_caller]
    fn forgets(&self, name: &str) {
        let wanted = format!("REMOVE=1 {name}");
        eventually(&wanted, || self.store().contains(&wanted).then_some(()));
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

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

fn is_refused(address: SocketAddr) -> bool {
    std::net::TcpStream::connect(address).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
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

/// `systemctl restart`: the stop removes the path, or systemd does with RuntimeDirectory=, and the store keeps the socket.
#[test]
fn a_stored_unix_socket_whose_path_is_gone_is_bound_anew() {
    for name in ["handover.app", "handover.kept-1"] {
        let home = Home::new();
        let path = home.path("app.sock");
        let stored = UnixListener::bind(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let manager = Manager::in_home(&home);
        let (listen, at) = (format!("app={}", path.display()), path.display().to_string());
        let (options, program) = match name {
            "handover.app" => (vec!["--listen", &listen], vec![]),
            _ => (vec![], vec!["poll", &at]),
        };
        let options = [&options[..], &["--fd-store"]].concat();
        let server = exec(home, vec![stored.into()], name, &options, &program);
        assert_eq!(ask_unix(&path, "/").answerer().generation, 1);
        // The name is the new one's from then on.
        eventually_equal("what is stored", &vec![format!("REMOVE=1 {name}"), format!("=1 {name}")], || manager.store());
        drop(server);
    }
}

#[test]
fn a_stored_unix_socket_whose_path_is_there_is_gone_on_with() {
    let home = Home::new();
    let path = home.path("app.sock");
    let stored = UnixListener::bind(&path).unwrap();
    let waits = UnixStream::connect(&path).unwrap();
    let at = path.display().to_string();
    let server = exec(home, vec![stored.into()], "handover.kept-1", &[], &["poll", &at]);
    let mut waits = waits;
    io::Write::write_all(&mut waits, b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n").unwrap();
    assert!(io::read_to_string(waits).unwrap().contains("gen=1 "));
    drop(server);
}

/// The unit says another address now.
#[test]
fn a_stored_socket_that_the_program_does_not_bind_any_more_is_not_waited_for() {
    let home = Home::new();
    let manager = Manager::in_home(&home);
    let ((old, stored), (new, free)) = (bound(), bound());
    drop(free);
    let server = exec(home, vec![stored], "handover.kept-1", &["--fd-store"], &["poll", &new.to_string()]);
    assert_eq!(ask(new, "/").answerer().generation, 1);
    eventually("clients of the old address that are refused", || is_refused(old).then_some(()));
    manager.forgets("handover.kept-1");
    server.upgrade(&["--wait", "drained"]).exits_with(0);
    assert_eq!(server.serving().listeners.len(), 1);
}

#[test]
fn a_stored_socket_that_is_not_named_any_more_is_closed_and_leaves_the_store() {
    let home = Home::new();
    let manager = Manager::in_home(&home);
    let (old, stored) = bound();
    let server = exec(home, vec![stored], "handover.old", &["--listen", "http=127.0.0.1:0", "--fd-store"], &[]);
    assert_eq!((server.get("/env/LISTEN_FDS"), server.get("/env/LISTEN_FDNAMES")), ("1".into(), "http".into()));
    assert!(is_refused(old));
    manager.forgets("handover.old");
}

/// The unit has `--listen` no more, and the program binds the address itself.
#[test]
fn a_stored_socket_that_was_named_is_found_by_a_program_that_binds_it() {
    let home = Home::new();
    let manager = Manager::in_home(&home);
    let (address, stored) = bound();
    let server = exec(home, vec![stored], "handover.http", &["--fd-store"], &["poll", &address.to_string()]);
    assert_eq!(get(address, "/env/LISTEN_FDS"), "");
    eventually_equal(
        "what is stored",
        &vec!["REMOVE=1 handover.http".to_owned(), "=1 handover.kept-1".to_owned()],
        || manager.store(),
    );
    server.upgrade(&["--wait", "drained"]).exits_with(0);
    assert_eq!(ask(address, "/").answerer().generation, 2);
}

#[test]
fn a_stored_socket_is_found_by_its_address_under_another_name() {
    let home = Home::new();
    let manager = Manager::in_home(&home);
    let (address, stored) = bound();
    let cookie = socket2::SockRef::from(&stored).cookie().unwrap();
    let server = exec(home, vec![stored], "handover.http", &["--listen", &format!("web={address}"), "--fd-store"], &[]);
    assert_eq!((get(address, "/env/LISTEN_FDNAMES"), server.serving().listeners[0].cookie), ("web".into(), cookie));
    // systemd keeps a socket once: under its old name, until that is removed.
    eventually_equal(
        "what is stored",
        &vec!["REMOVE=1 handover.http".to_owned(), "=1 handover.web".to_owned()],
        || manager.store(),
    );
}
