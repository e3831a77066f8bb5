//! State from the old build to the new one.

use crate::server::Server;

const HTTP: [&str; 2] = ["--tcp", "http=127.0.0.1:0"];

fn checksum(bytes: impl Iterator<Item = u8>) -> u64 {
    bytes.fold(0, |sum: u64, byte| sum.wrapping_mul(31).wrapping_add(byte.into()))
}

#[test]
fn none_where_none_is_handed_over() {
    let server = Server::http();
    assert_eq!(server.get("/state"), "none");
    server.upgrade(&[]).exits_with(0);
    assert_eq!(server.get("/state"), "none");
}

#[test]
fn small() {
    let server = Server::start(&[&HTTP[..], &["--state", "seventeen sessions"]].concat());
    assert_eq!(server.get("/state"), "none");
    server.upgrade(&[]).exits_with(0);
    let sum = checksum("seventeen sessions".bytes());
    assert_eq!(server.get("/state"), format!("version=1 length=18 sum={sum}"));
}

#[test]
fn empty_is_not_none() {
    let server = Server::start(&[&HTTP[..], &["--state", ""]].concat());
    server.upgrade(&[]).exits_with(0);
    assert_eq!(server.get("/state"), "version=1 length=0 sum=0");
}

#[test]
fn of_five_megabytes_and_versioned() {
    let length = 5 << 20;
    let state = ["--state-bytes", &length.to_string(), "--state-version", "7"];
    let server = Server::start(&[&HTTP[..], &state].concat());
    let sum = checksum((0..length).map(|position: u32| (position % 251) as u8));
    for _ in 0..2 {
        server.upgrade(&[]).exits_with(0);
        assert_eq!(server.get("/state"), format!("version=7 length={length} sum={sum}"));
    }
    let pid = server.pid();
    assert!(!crate::server::fds_of(pid).iter().any(|fd| fd.contains("memfd")), "it is closed when it is read");
}

#[test]
fn beyond_its_bound_fails_the_upgrade_and_says_so() {
    let server = Server::start(&[&HTTP[..], &["--state-bytes", &((64 << 20) + 1).to_string()]].concat());
    let pid = server.pid();
    let before = server.settled_holdings(pid);
    server.upgrade(&[]).exits_with(1).complains("more than 67108864");
    server.assert_holds(pid, &before);
    assert_eq!(server.answerer().generation, 1);
}
