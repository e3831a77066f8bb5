//! The pid file names the process that serves, and a disk that is full harms nobody.

use std::fs;
use std::path::Path;

use crate::home::{Home, fixture};
use crate::rights::is_root_or_skip;
use crate::server::Server;
use crate::wait::{eventually, eventually_equal};

#[track_caller]
fn names(file: &Path, pid: i32) {
    assert_eq!(fs::read_to_string(file).unwrap(), format!("{pid}\n"));
}

/// Only the file itself, none that was prepared beside it.
#[track_caller]
fn lies_alone(file: &Path) {
    let names = || -> Vec<_> { fs::read_dir(file.parent().unwrap()).unwrap().map(|one| one.unwrap().path()).collect() };
    eventually_equal("the directory of the pid file", &vec![file.to_path_buf()], names);
}

fn start() -> (Server, std::path::PathBuf) {
    let home = Home::new();
    fs::create_dir(home.path("run")).unwrap();
    let file = home.path("run/server.pid");
    let server = Server::start_in(home, &["--tcp", "http=127.0.0.1:0", "--pid-file", file.to_str().unwrap()]);
    (server, file)
}

#[test]
fn names_the_process_that_serves_and_goes_with_the_last() {
    let (server, file) = start();
    names(&file, server.first_pid());
    for _ in 0..2 {
        server.upgrade(&["--wait", "drained"]).exits_with(0);
        names(&file, server.pid());
        lies_alone(&file);
    }
    server.handover(&["stop", "--pid-file", file.to_str().unwrap()]).exits_with(0);
    assert!(!file.exists());
}

#[test]
fn names_the_old_process_when_the_new_one_fails() {
    let (server, file) = start();
    let old = server.pid();
    for fault in ["exit-1", "give-up", "killed-after-adopted", "dies-in-trial"] {
        server.upgrade_with_fault(fault, &["--trial", "30s"]).exits_with(1);
        names(&file, old);
        lies_alone(&file);
    }
}

#[test]
fn that_cannot_be_written_fails_the_upgrade() {
    let server = Server::http();
    let old = server.pid();
    let before = server.settled_holdings(old);
    let file = server.home.path("missing/server.pid");
    let arguments = ["--", "--tcp", "http=127.0.0.1:0", "--pid-file", file.to_str().unwrap()];
    server.upgrade(&arguments).exits_with(1).complains("gave up: cannot write the pid file").complains("No such file");
    server.assert_holds(old, &before);
    assert_eq!(server.answerer().generation, 1);
}

#[test]
fn on_a_full_disk_fails_the_upgrade() {
    if !is_root_or_skip("a full disk for the pid file") {
        return;
    }
    let home = Home::new();
    let disk = home.path("disk");
    fs::create_dir(&disk).unwrap();
    // Room for one page: the pid file of the first generation, and not the one that is prepared beside it.
    let script = format!(
        "mount -t tmpfs -o size=4k none {0} && exec {1} --tcp http=127.0.0.1:0 --trial 100ms --pid-file {0}/pid",
        disk.display(),
        fixture().display()
    );
    let command = home.logged("unshare", &["-m", "/bin/sh", "-c", &script]);
    let server = Server::run(home, command);
    let old = server.pid();
    let before = server.settled_holdings(old);
    let load = server.load().start();
    server.upgrade(&[]).exits_with(1).complains("cannot write the pid file").complains("No space left on device");
    load.wait_for_more(20, crate::wait::LONG).unwrap();
    load.stop().assert_lossless();
    server.assert_holds(old, &before);
    let disk_as_it_sees_it = format!("/proc/{old}/root{}", disk.display());
    assert_eq!(fs::read_dir(disk_as_it_sees_it).unwrap().count(), 1);
}

/// What a process does that has no handler yet is to die: the file must never name one.
#[test]
fn whom_it_names_can_be_signalled_at_any_time() {
    let (server, file) = start();
    let load = server.load().start();
    eventually("generation 8", || {
        let pid: i32 = fs::read_to_string(&file).unwrap().trim().parse().unwrap();
        server.signal(pid, nix::sys::signal::Signal::SIGUSR2);
        server.status_of_serving().filter(|status| status.generation >= 8)
    });
    assert!(!server.home.log().contains("was killed by"), "{}", server.home.log());
    load.stop().assert_lossless();
}
