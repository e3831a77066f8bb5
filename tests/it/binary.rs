//! Which file is started, and with what: replaced by `cp`, by `mv`, through a link; other arguments, another place.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;

use crate::home::Home;
use crate::server::Server;

const ARGUMENTS: [&str; 4] = ["--tcp", "http=127.0.0.1:0", "--trial", "100ms"];

fn start(home: Home, program: &Path) -> Server {
    let command = home.logged(program, &ARGUMENTS);
    Server::run(home, command)
}

/// The serving process runs the file that is at `path` now.
#[track_caller]
fn runs(server: &Server, path: &Path) {
    let metadata = fs::metadata(path).unwrap();
    let build = server.serving().build;
    assert_eq!((build.device, build.inode), (metadata.dev(), metadata.ino()));
}

#[test]
fn replaced_by_mv() {
    let home = Home::new();
    let program = home.copy_of_fixture("server");
    let server = start(home, &program);
    fs::rename(server.home.copy_of_fixture("server.new"), &program).unwrap();
    assert!(server.get("/exe").ends_with("server (deleted)"));
    server.upgrade(&[]).exits_with(0);
    runs(&server, &program);
    // And once more, for the new process must not know itself by a path that is gone.
    fs::rename(server.home.copy_of_fixture("server.new"), &program).unwrap();
    server.upgrade(&[]).exits_with(0);
    runs(&server, &program);
}

/// The kernel lets nobody write to a file that runs; `cp -f` and `install` make a new file.
#[test]
fn replaced_by_cp() {
    let home = Home::new();
    let program = home.copy_of_fixture("server");
    let server = start(home, &program);
    let inode = fs::metadata(&program).unwrap().ino();
    let copied = std::process::Command::new("cp").arg("-f").args([&crate::home::fixture(), &program]).status();
    assert!(copied.unwrap().success());
    assert_ne!(fs::metadata(&program).unwrap().ino(), inode);
    server.upgrade(&[]).exits_with(0);
    runs(&server, &program);
}

#[test]
fn while_it_is_being_written() {
    let server = Server::http();
    let program = server.home.copy_of_fixture("server");
    let writer = fs::File::options().append(true).open(&program).unwrap();
    server
        .upgrade(&["--exe", program.to_str().unwrap()])
        .exits_with(1)
        .complains("it is being written: install it with `mv`, not with `cp` over it");
    drop(writer);
    // A child of another test may have inherited the fd for a moment.
    crate::wait::eventually("the file to be free", || {
        (server.upgrade(&["--exe", program.to_str().unwrap()]).code == Some(0)).then_some(())
    });
    runs(&server, &program);
}

fn releases(names: &[&str]) -> Home {
    let home = Home::new();
    for release in names {
        fs::create_dir(home.path(release)).unwrap();
        home.copy_of_fixture(&format!("{release}/server"));
    }
    home
}

fn switch_to(home: &Home, release: &str) {
    symlink(release, home.path("next")).unwrap();
    fs::rename(home.path("next"), home.path("current")).unwrap();
}

#[test]
fn switched_by_a_link() {
    let home = releases(&["1", "2"]);
    switch_to(&home, "1");
    let program = home.path("current/server");
    let server = start(home, &program);
    assert_eq!(server.get("/exe"), server.home.path("1/server").display().to_string());
    switch_to(&server.home, "2");
    server.upgrade(&[]).exits_with(0);
    assert_eq!(server.get("/exe"), server.home.path("2/server").display().to_string());
    assert_eq!(server.serving().program, program);
    // Back, as one does with a release that was none.
    switch_to(&server.home, "1");
    server.upgrade(&[]).exits_with(0);
    assert_eq!(server.get("/exe"), server.home.path("1/server").display().to_string());
}

/// By two deployments, one after the other, of which the first one's build takes its time before it calls `Handover::start`.
#[test]
fn switched_again_before_the_new_build_asks_how_it_was_started() {
    let home = releases(&["1", "2", "3"]);
    switch_to(&home, "1");
    let program = home.path("current/server");
    let server = start(home, &program);
    switch_to(&server.home, "2");
    let hold = server.home.fifo("hold");
    let upgrade = server.begin_upgrade(&["--env", &hold.fault("hold-before-start")]);
    let held = hold.reached();
    switch_to(&server.home, "3");
    held.let_go();
    upgrade.finish().exits_with(0);
    assert_eq!(server.get("/exe"), server.home.path("2/server").display().to_string());
    assert_eq!(server.serving().program, program);
    server.upgrade(&["--env", "FIXTURE_FAULT="]).exits_with(0);
    assert_eq!(server.get("/exe"), server.home.path("3/server").display().to_string());
}

/// `cd /srv/app/current && ./server`: the directory is followed to where the link points now.
#[test]
fn in_a_working_directory_switched_by_a_link() {
    let home = releases(&["1", "2"]);
    symlink("1", home.path("current")).unwrap();
    let mut command = home.logged("./server", &ARGUMENTS);
    command.current_dir(home.path("current")).env("PWD", home.path("current"));
    let server = Server::run(home, command);
    fs::remove_file(server.home.path("current")).unwrap();
    symlink("2", server.home.path("current")).unwrap();
    server.upgrade(&[]).exits_with(0);
    assert_eq!(server.get("/exe"), server.home.path("2/server").display().to_string());
    assert_eq!(server.get("/cwd"), server.home.path("2").display().to_string());
}

#[test]
fn with_other_arguments_environment_directory_and_program() {
    let server = Server::http();
    let program = server.home.copy_of_fixture("other");
    let arguments = ["--tcp", "http=127.0.0.1:0", "--trial", "100ms", "--linger", "1s"];
    let place = server.home.path("");
    let request = ["--exe", program.to_str().unwrap(), "--cwd", place.to_str().unwrap(), "--env", "COLOUR=red", "--"];
    server.upgrade(&[&request[..], &arguments].concat()).exits_with(0);
    let check = |server: &Server| {
        assert_eq!(server.get("/exe"), program.display().to_string());
        assert_eq!(server.get("/args"), arguments.join(" "));
        assert_eq!(Path::new(&server.get("/cwd")), fs::canonicalize(&place).unwrap());
        assert_eq!(server.get("/env/COLOUR"), "red");
    };
    check(&server);
    // The next upgrade repeats how the process was started.
    server.upgrade(&[]).exits_with(0);
    check(&server);
    assert_eq!(server.generation(), 3);
}

/// An application that finds out too late that it cannot run: within the trial the old one takes over again.
#[test]
fn the_application_fails_when_it_serves_already() {
    let server = Server::http();
    let old = server.pid();
    let load = server.load().start();
    let arguments = ["--trial", "30s", "--", "--tcp", "http=127.0.0.1:0", "--own-pid-file", "/dev/full"];
    server
        .upgrade(&arguments)
        .exits_with(1)
        .complains("rolled back")
        .complains("exited with status 1 within the trial");
    load.wait_for_more(20, crate::wait::LONG).unwrap();
    // The new build had accepted before it noticed, and what it had accepted died with it.
    drop(load.stop());
    assert_eq!(server.answerer().pid.cast_signed(), old);
    assert!(server.home.log().contains("pid file: No space left on device"), "{}", server.home.log());
    server.assert_only(old);
}
