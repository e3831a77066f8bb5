//! Back to the build before: `handover upgrade --previous`.

use std::fs;
use std::os::unix::fs::symlink;

use crate::command::run;
use crate::home::{HANDOVER, Home};
use crate::server::Server;

/// Releases 1 and 2 of a server that was started as `current/server`, and was upgraded from one to the other.
fn upgraded_to_release_2() -> Server {
    let home = Home::new();
    for release in ["1", "2"] {
        fs::create_dir(home.path(release)).unwrap();
        home.copy_of_fixture(&format!("{release}/server"));
    }
    switch_to(&home, "1");
    let command = home.logged(home.path("current/server"), &["--tcp", "http=127.0.0.1:0", "--trial", "100ms"]);
    let server = Server::run(home, command);
    assert_eq!(server.serving().previous, None);
    switch_to(&server.home, "2");
    server.upgrade(&[]).exits_with(0);
    runs(&server, "2");
    server
}

fn switch_to(home: &Home, release: &str) {
    symlink(release, home.path("next")).unwrap();
    fs::rename(home.path("next"), home.path("current")).unwrap();
}

/// The release that serves; and whatever that is, the next upgrade starts what the service was started as.
#[track_caller]
fn runs(server: &Server, release: &str) {
    assert_eq!(server.get("/exe"), server.home.path(release).join("server").display().to_string());
    assert_eq!(server.serving().program, server.home.path("current/server"));
}

#[test]
fn back_and_then_on_again() {
    let server = upgraded_to_release_2();
    let load = server.load().start();
    assert_eq!(server.serving().previous.unwrap().path, server.home.path("1/server"));
    let pid = server.pid().to_string();
    server
        .handover(&["status", "--pid", &pid])
        .says(&format!("previous     {}", server.home.path("1/server").display()));
    server.upgrade(&["--previous"]).exits_with(0).says("upgraded to generation 3");
    runs(&server, "1");
    // The one before this one is release 2 now.
    server.upgrade(&["--previous"]).exits_with(0);
    runs(&server, "2");
    server.upgrade(&["--previous"]).exits_with(0);
    runs(&server, "1");
    // Without it the configured path is started, as ever.
    server.upgrade(&[]).exits_with(0);
    runs(&server, "2");
    server.upgrade(&[]).exits_with(0);
    runs(&server, "2");
    assert_eq!(server.generation(), 7);
    load.wait_for_more(20, crate::wait::LONG).unwrap();
    load.stop().assert_lossless();
}

#[test]
fn the_first_generation_has_none() {
    let server = Server::http();
    server
        .upgrade(&["--previous"])
        .exits_with(1)
        .complains("cannot start the build that served before")
        .complains("it is the first generation")
        .complains("(generation 1) serves on");
    server.upgrade(&[]).exits_with(0);
}

#[test]
fn one_that_was_replaced_is_not_started() {
    let server = upgraded_to_release_2();
    fs::rename(server.home.copy_of_fixture("new"), server.home.path("1/server")).unwrap();
    server.upgrade(&["--previous"]).exits_with(1).complains("1/server any more: it was replaced (install it again");
    fs::remove_dir_all(server.home.path("1")).unwrap();
    server.upgrade(&["--previous"]).exits_with(1).complains("1/server any more: No such file or directory");
    runs(&server, "2");
    server.upgrade(&[]).exits_with(0);
}

/// A failed attempt to go back changes nothing, also not what `--previous` means.
#[test]
fn a_previous_build_that_fails_leaves_everything_as_it_was() {
    let server = upgraded_to_release_2();
    let fault = ["--env", "FIXTURE_FAULT=exit-1"];
    server.upgrade(&[&["--previous"], &fault[..]].concat()).exits_with(1).complains("serves on");
    runs(&server, "2");
    server.upgrade(&["--previous"]).exits_with(0);
    runs(&server, "1");
}

#[test]
fn not_together_with_a_program() {
    let mut command = std::process::Command::new(HANDOVER);
    command.args(["upgrade", "--pid", "1", "--previous", "--exe", "/bin/true"]);
    run(command).exits_with(2).complains("cannot be used with");
}
