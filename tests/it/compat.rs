//! This build and an earlier one hand over to each other. `scripts/compat.sh` builds the earlier one from its tag, and says
//! where it is.

use std::path::PathBuf;
use std::process::Command;

use crate::command::{Run, run};
use crate::home::{Home, fixture};
use crate::server::{SOON, Server};
use crate::wait::{LONG, eventually};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Build {
    Earlier,
    This,
}

use Build::{Earlier, This};

impl Build {
    const BOTH: [Self; 2] = [Earlier, This];

    fn other(self) -> Self {
        if self == Earlier { This } else { Earlier }
    }

    fn fixture(self) -> PathBuf {
        match self {
            Earlier => earlier().join("examples/fixture"),
            This => fixture(),
        }
    }

    fn start(self, arguments: &[&str]) -> Server {
        let home = Home::new();
        let command = home.logged(self.fixture(), &[&SOON[..], &["--tcp", "http=127.0.0.1:0"], arguments].concat());
        Server::run(home, command)
    }

    /// Whether the process that serves is of it.
    #[track_caller]
    fn serves(self, server: &Server) {
        let exe = std::fs::read_link(format!("/proc/{}/exe", server.pid())).unwrap();
        assert_eq!(exe, self.fixture().canonicalize().unwrap());
    }
}

fn earlier() -> PathBuf {
    std::env::var_os("HANDOVER_EARLIER").expect("scripts/compat.sh sets HANDOVER_EARLIER").into()
}

#[track_caller]
fn upgrade_to(build: Build, server: &Server, arguments: &[&str]) -> Run {
    let exe = build.fixture();
    let run = server.upgrade(&[&["--exe", exe.to_str().unwrap()], arguments].concat());
    if run.code == Some(0) {
        build.serves(server);
    }
    run
}

/// From build to build, with requests of every kind on the way: none is lost, and the socket stays the same.
fn walks(builds: &[Build]) {
    let server = builds[0].start(&[]);
    let cookie = server.serving().listeners[0].cookie;
    let load = server.load().new_connections(4).kept(4).slow(1, 0.5).stream(1).monotonic().start();
    for (build, generation) in builds.iter().zip(1..).skip(1) {
        load.wait_for_more(50, LONG).unwrap();
        upgrade_to(*build, &server, &["--wait", "drained"]).exits_with(0);
        load.wait_for_generation(generation, LONG).unwrap();
        assert_eq!(server.serving().listeners[0].cookie, cookie);
    }
    let tally = load.stop();
    tally.assert_lossless();
    assert_eq!(tally.generations().len(), builds.len(), "{tally}");
    server.assert_only(server.pid());
}

#[test]
#[ignore = "scripts/compat.sh"]
fn an_earlier_build_hands_over_to_this_one_and_back_again() {
    walks(&[Earlier, This, Earlier, This]);
}

#[test]
#[ignore = "scripts/compat.sh"]
fn this_build_hands_over_to_an_earlier_one_and_back_again() {
    walks(&[This, Earlier, This, Earlier]);
}

/// The other build fails, and this one serves on as if nothing had happened; then it succeeds.
fn serves_on(fault: &str, arguments: &[&str], said: &str) {
    for build in Build::BOTH {
        let server = build.start(&[]);
        let pid = server.pid();
        let before = server.settled_holdings(pid);
        let load = server.load().start();
        load.wait_for_more(20, LONG).unwrap();
        let fault = format!("FIXTURE_FAULT={fault}");
        upgrade_to(build.other(), &server, &[&["--env", &fault], arguments].concat()).exits_with(1).complains(said);
        load.wait_for_more(50, LONG).unwrap();
        build.serves(&server);
        assert_eq!(server.pid(), pid);
        load.stop().assert_lossless();
        server.assert_holds(pid, &before);
        upgrade_to(build.other(), &server, &[]).exits_with(0);
        assert_eq!(server.answerer().generation, 2);
    }
}

#[test]
#[ignore = "scripts/compat.sh"]
fn a_build_that_dies_in_its_trial_is_rolled_back_either_way() {
    serves_on("dies-in-trial", &["--trial", "30s"], "rolled back: ");
}

#[test]
#[ignore = "scripts/compat.sh"]
fn a_build_that_gives_up_is_given_up_either_way() {
    serves_on("give-up", &[], "the database is of a later version");
}

#[test]
#[ignore = "scripts/compat.sh"]
fn a_build_that_is_killed_once_it_has_adopted_is_given_up_either_way() {
    serves_on("killed-after-adopted", &[], "SIGKILL");
}

#[test]
#[ignore = "scripts/compat.sh"]
fn an_old_process_that_is_killed_is_followed_by_the_other_build() {
    for build in Build::BOTH {
        let server = build.start(&[]);
        let hold = server.home.fifo("hold");
        let exe = build.other().fixture();
        let fault = hold.fault("hold-before-ready");
        let upgrade = server.begin_upgrade(&["--exe", exe.to_str().unwrap(), "--env", &fault]);
        let held = hold.reached();
        server.signal(server.first_pid(), nix::sys::signal::Signal::SIGKILL);
        held.let_go();
        eventually("the new process", || server.status_of_serving().filter(|status| status.generation == 2));
        build.other().serves(&server);
        upgrade.finish().exits_with(0);
        assert_eq!(server.answerer().generation, 2);
    }
}

#[test]
#[ignore = "scripts/compat.sh"]
fn state_crosses_either_way() {
    for build in Build::BOTH {
        let server = build.start(&["--state-bytes", "100000"]);
        for next in [build.other(), build] {
            upgrade_to(next, &server, &[]).exits_with(0);
            assert!(server.get("/state").starts_with("version=1 length=100000 "), "{}", server.get("/state"));
        }
    }
}

#[test]
#[ignore = "scripts/compat.sh"]
fn either_takes_over_from_the_other() {
    for build in Build::BOTH {
        let server = build.start(&[]);
        let (old, cookie) = (server.pid(), server.serving().listeners[0].cookie);
        let load = server.load().monotonic().start();
        load.wait_for_more(20, LONG).unwrap();
        let old_pid = old.to_string();
        let arguments = [&SOON[..], &["--tcp", "http=127.0.0.1:0", "--take-over", &old_pid]].concat();
        let mut new = server.home.logged(build.other().fixture(), &arguments).spawn().unwrap();
        load.wait_for_generation(2, LONG).unwrap();
        server.wait_for_end(old);
        load.stop().assert_lossless();
        assert_eq!(server.serving().listeners[0].cookie, cookie);
        build.other().serves(&server);
        new.kill().unwrap();
        new.wait().unwrap();
    }
}

/// A restart is younger than the protocol: a build that knows nothing of it must not be made to run beside the old one.
#[test]
#[ignore = "scripts/compat.sh"]
fn a_restart_succeeds_or_leaves_the_old_process_serving() {
    for build in Build::BOTH {
        let server = build.start(&[]);
        let pid = server.pid();
        let exe = build.other().fixture();
        let run = server.restart(&["--exe", exe.to_str().unwrap()]);
        match run.code {
            Some(0) => build.other().serves(&server),
            _ => {
                assert!(matches!(run.code, Some(1 | 2)), "{run:#?}");
                assert_eq!(server.pid(), pid, "{run:#?}");
                assert_eq!(server.answerer().generation, 1);
            }
        }
    }
}

/// The command of either build with a server of the other.
#[test]
#[ignore = "scripts/compat.sh"]
fn the_command_of_either_build_upgrades_a_server_of_the_other() {
    let server = This.start(&[]);
    let handover = |arguments: &[&str]| {
        let mut command = Command::new(earlier().join("handover"));
        command.args(arguments);
        run(command)
    };
    let pid = server.pid().to_string();
    handover(&["status", "--pid", &pid]).exits_with(0).says("generation");
    handover(&["ps"]).exits_with(0).says(&pid);
    handover(&["upgrade", "--pid", &pid]).exits_with(0);
    assert_eq!(server.answerer().generation, 2);
    handover(&["stop", "--pid", &server.pid().to_string()]).exits_with(0);
    let server = Earlier.start(&[]);
    let pid = server.pid().to_string();
    server.handover(&["status", "--pid", &pid]).exits_with(0).says("generation");
    server.handover(&["ps"]).exits_with(0).says(&pid);
    // A build of another version may lack what is looked for, but is never taken for none of ours.
    let check = server.handover(&["check", "--pid", &pid]);
    assert!(matches!(check.code, Some(0 | 1)) && check.stdout.contains("answers"), "{check:#?}");
    server.upgrade(&["--json"]).exits_with(0);
    assert_eq!(server.answerer().generation, 2);
    server.handover(&["stop", "--pid", &server.pid().to_string()]).exits_with(0);
}
