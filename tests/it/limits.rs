//! A process that has no fd left.

use std::net::TcpStream;

use crate::home::{Home, fixture};
use crate::server::Server;
use crate::wait::eventually;

/// A server that may have so many fds, with idle connections until `free` are left.
fn with_free_fds(limit: usize, free: usize) -> (Server, Vec<TcpStream>) {
    let home = Home::new();
    let script = format!("ulimit -n {limit}; exec {} \"$@\"", fixture().display());
    let arguments = ["-c", &script, "sh", "--tcp", "http=127.0.0.1:0", "--trial", "100ms", "--linger", "100ms"];
    let command = home.logged("/bin/sh", &arguments);
    let server = Server::run(home, command);
    let pid = server.pid();
    let address = server.address();
    let _ = server.settled_holdings(pid);
    // One that it was given with a higher number does not count.
    let number = |entry: std::fs::DirEntry| entry.file_name().to_str()?.parse::<usize>().ok();
    let fds = || std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    let open = || fds().filter_map(number).filter(|number| *number < limit).count();
    let mut idle = Vec::new();
    let mut looks = 0;
    // An fd that is open for a moment may make one too few at first.
    eventually("so few free fds", || {
        if looks % 20 == 0 {
            idle.extend((open()..limit - free).map(|_| TcpStream::connect(address).unwrap()));
        }
        looks += 1;
        (open() >= limit - free).then_some(())
    });
    (server, idle)
}

#[test]
fn too_few_for_an_upgrade_it_says_so_and_serves_on() {
    let (server, idle) = with_free_fds(64, 3);
    let pid = server.first_pid().to_string();
    let run = server.handover(&["upgrade", "--pid", &pid]).exits_with(1);
    run.complains("Too many open files").complains("serves on");
    drop(idle);
    eventually("fds again", || (server.status(server.first_pid()).connections.open == 0).then_some(()));
    assert_eq!(server.answerer().generation, 1);
    server.upgrade(&[]).exits_with(0);
    assert_eq!(server.answerer().generation, 2);
}

/// Wherever in the upgrade they run out: it is done, or it is said; and nobody is left who was started and not watched.
#[test]
fn a_few_more_and_it_is_done_or_says_so() {
    let mut done = 0;
    for free in 4..10 {
        let (server, idle) = with_free_fds(64, free);
        let old = server.first_pid();
        let run = server.handover(&["upgrade", "--pid", &old.to_string()]);
        done += usize::from(run.code == Some(0));
        match run.code {
            Some(0) => {
                assert_eq!(server.pid(), crate::client::ask(server_address(&idle), "/").answerer().pid.cast_signed())
            }
            _ => {
                run.exits_with(1).complains("serves on");
                eventually("nobody but the old process", || (server.home.processes() == [old]).then_some(()));
            }
        }
    }
    assert!((1..6).contains(&done), "{done}");
}

/// Clients wait in the queue, and whoever asks is let in: to be told, if nothing else.
#[test]
fn none_at_all_and_it_still_answers() {
    let (server, idle) = with_free_fds(64, 0);
    let waiting = crate::client::ask(server_address(&idle), "/");
    let pid = server.first_pid().to_string();
    let log = server.home.log().len();
    server.handover(&["status", "--pid", &pid]).exits_with(0).says("serving");
    server.handover(&["upgrade", "--pid", &pid]).exits_with(1).complains("Too many open files");
    // And it does not say so a thousand times a second meanwhile.
    assert!(server.home.log().len() < log + 100_000, "{} bytes of log", server.home.log().len() - log);
    drop(idle);
    assert_eq!(waiting.answerer().generation, 1);
    server.upgrade(&[]).exits_with(0);
}

fn server_address(connections: &[TcpStream]) -> std::net::SocketAddr {
    connections[0].peer_addr().unwrap()
}
