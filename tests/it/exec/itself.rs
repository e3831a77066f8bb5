//! The supervisor replaced by its own new build: the same process, with all that it runs.

use std::fs;
use std::os::unix::fs::symlink;

use handover::control::{State, WorkerStatus};
use nix::sys::signal::Signal;

use crate::client::ask;
use crate::command::Run;
use crate::exec::{HTTP, exec, exec_in, plain};
use crate::home::{HANDOVER, Home};
use crate::server::{SOON, Server};
use crate::wait::{LONG, eventually, eventually_equal};

impl Server {
    #[track_caller]
    fn replace_itself(&self, arguments: &[&str]) -> Run {
        let pid = self.first_pid().to_string();
        self.handover(&[&["upgrade", "--self", "--pid", &pid], arguments].concat())
    }
}

fn identities(workers: &[WorkerStatus]) -> Vec<(Option<i32>, u64, u64)> {
    workers.iter().map(|worker| (worker.pid, worker.generation, worker.since_unix_ms)).collect()
}

#[test]
fn ten_times_in_a_row_under_load_nothing_is_lost_and_nothing_grows() {
    let server = exec(&["--workers", "2"]);
    let (pid, cookie) = (server.first_pid(), server.serving().listeners[0].cookie);
    server.replace_itself(&[]).exits_with(0);
    let (fds, workers) = (server.assert_supervises(2), identities(&server.workers()));
    let load = server.load().new_connections(4).kept(4).slow(2, 1.0).start();
    for _ in 0..10 {
        load.wait_for_more(50, LONG).unwrap();
        server.replace_itself(&[]).exits_with(0).says(&format!("process {pid} goes on as handover "));
        assert_eq!(identities(&server.workers()), workers);
    }
    load.stop().assert_lossless();
    assert_eq!((server.assert_supervises(2), server.serving().listeners[0].cookie), (fds, cookie));
    // It still does what a supervisor does.
    let load = server.load().new_connections(4).start();
    server.upgrade(&["--wait", "drained"]).exits_with(0);
    server.signal(pid, Signal::SIGUSR2);
    load.wait_for_generation(3, LONG).unwrap();
    load.stop().assert_lossless();
    eventually_equal("its fds", &fds, || server.assert_supervises(2));
    server.handover(&["stop", "--pid", &pid.to_string()]).exits_with(0);
    eventually_equal("nothing left", &(vec![], vec![]), || (server.home.processes(), server.home.sockets()));
}

/// A deployment that switches a link, of the supervisor this time.
#[test]
fn the_new_build_is_the_one_that_runs_then() {
    let home = Home::new();
    let (one, two) = (home.copy(HANDOVER.as_ref(), "one"), home.copy(HANDOVER.as_ref(), "two"));
    let link = home.path("handover");
    symlink(&one, &link).unwrap();
    let mut command = home.logged(&link, &["exec"]);
    command.args(HTTP).arg("--").arg(plain());
    let server = Server::run(home, command);
    let exe = || fs::read_link(format!("/proc/{}/exe", server.first_pid())).unwrap();
    let command_line = || fs::read(format!("/proc/{}/cmdline", server.first_pid())).unwrap();
    let (before, workers) = (command_line(), identities(&server.workers()));
    fs::remove_file(&link).unwrap();
    symlink(&two, &link).unwrap();
    server.replace_itself(&[]).exits_with(0).says(&two.display().to_string());
    assert_eq!((exe(), command_line()), (two, before));
    // What it was told stays for the next time.
    let three = server.home.copy(HANDOVER.as_ref(), "three");
    server.replace_itself(&["--exe", three.to_str().unwrap()]).exits_with(0);
    server.replace_itself(&[]).exits_with(0);
    assert_eq!((exe(), identities(&server.workers())), (three, workers));
}

#[test]
fn a_new_build_that_cannot_take_over_leaves_the_old_one_as_it_was() {
    let server = exec(&["--workers", "2"]);
    let (fds, workers) = (server.assert_supervises(2), identities(&server.workers()));
    let newer = r#"{"takes_over":false,"handover":"9.0.0","reason":"it is of version 1, and this build reads 2"}"#;
    let builds = [
        ("garbage", "\x7fgarbage".to_owned(), "exited with status 127"),
        ("fails", "#!/bin/sh\necho out of order >&2; exit 1\n".to_owned(), "the new build exited with status 1"),
        ("other", "#!/bin/sh\nexit 0\n".to_owned(), "did not say that it can take over"),
        ("newer", format!("#!/bin/sh\necho '{newer}'\nexit 1\n"), "handover 9.0.0, refuses: it is of version 1"),
        ("dies", "#!/bin/sh\nkill -9 $$\n".to_owned(), "the new build was killed by SIGKILL"),
        ("hangs", "#!/bin/sh\nexec sleep 600\n".to_owned(), "has not said within 1s whether it can take over"),
        ("chatty", "#!/bin/sh\nyes\n".to_owned(), "has not said within 1s"),
        ("missing", String::new(), "No such file or directory"),
    ];
    let load = server.load().new_connections(4).start();
    for (name, content, message) in builds {
        load.wait_for_more(20, LONG).unwrap();
        let build = if content.is_empty() { "/no/such/build".into() } else { server.home.script(name, &content) };
        let build = build.display().to_string();
        let run = server.replace_itself(&["--exe", &build, "--ready-timeout", "1s"]).exits_with(1).complains(message);
        if name == "fails" {
            run.complains("  | out of order");
        }
        assert_eq!(identities(&server.workers()), workers, "{name}");
    }
    load.stop().assert_lossless();
    assert_eq!(server.assert_supervises(2), fds);
    server.replace_itself(&[]).exits_with(0);
    server.upgrade(&["--wait", "drained"]).exits_with(0);
}

/// What it knows is worth nothing if it does not cross: what was changed, what was before, what has crashed.
#[test]
fn what_it_knows_stays() {
    let home = Home::new();
    let (one, two) = (home.copy(&plain(), "one"), home.copy(&plain(), "two"));
    let server = exec_in(home, &["--log-prefix", "--name", "kept"], one.to_str().unwrap());
    let upgrade = ["--exe", two.to_str().unwrap(), "--env", "A=1", "--wait", "drained", "--", "epoll"];
    server.upgrade(&upgrade).exits_with(0);
    let last = server.serving().last_upgrade;
    server.replace_itself(&[]).exits_with(0);
    assert_eq!((server.serving().last_upgrade, server.serving().name), (last, Some("kept".to_owned())));
    // Crashed since: the build that is started again is the one that was committed, as it was.
    let old = server.worker_pids()[0];
    server.signal(old, Signal::SIGKILL);
    server.wait_for_end(old);
    let is = |path: &str| server.get(path);
    assert_eq!((is("/exe"), is("/env/A"), is("/args")), (two.display().to_string(), "1".into(), "epoll".into()));
    eventually("it counts as steady only later", || (server.workers()[0].crashes == 1).then_some(()));
    server.replace_itself(&[]).exits_with(0);
    assert_eq!(server.workers()[0].crashes, 1);
    // And the program's environment knows nothing of all that.
    assert_eq!(is("/env/HANDOVER_SUPERVISOR"), "");
    server.upgrade(&["--previous", "--wait", "drained"]).exits_with(0);
    assert_eq!(is("/exe"), one.display().to_string());
    // Its stderr is passed on by the next build as by the one before.
    server.replace_itself(&[]).exits_with(0);
    server.upgrade(&["--env", "PLAIN=exit=3"]).exits_with(1).complains("  | plain: no database at db.internal");
    assert!(server.home.log().contains("4.0 | plain: no database"));
}

#[test]
fn whoever_waits_for_a_drain_hears_its_end_from_the_next_build() {
    let server = exec(&[]);
    let slow = ask(server.address(), "/slow/3");
    eventually("the request in flight", || (server.workers()[0].connections == 1).then_some(()));
    let mut upgrade = server.begin_upgrade(&["--wait", "drained", "--drain-timeout", "20s", "--json"]);
    upgrade.wait_for_line("\"connections\":1");
    server.replace_itself(&[]).exits_with(0);
    assert_eq!(slow.answerer().generation, 1);
    assert_eq!(upgrade.finish().exits_with(0).last_json()["result"], "upgraded");
    // And one that does not end in time is killed in time.
    let cut = ask(server.address(), "/slow/600");
    eventually("the request in flight", || (server.workers()[0].connections == 1).then_some(()));
    let mut upgrade = server.begin_upgrade(&["--wait", "drained", "--drain-timeout", "4s"]);
    upgrade.wait_for_line("1 connection open");
    server.replace_itself(&[]).exits_with(0);
    upgrade.finish().exits_with(5).complains("1 connection was closed");
    drop(cut);
    server.assert_supervises(1);
}

#[test]
fn while_an_upgrade_is_under_way_it_is_refused_and_the_reverse() {
    let server = exec(&[]);
    let hold = server.home.fifo("hold");
    let mut upgrade = server.begin_upgrade(&["--env", &format!("PLAIN=hold={}", hold.path().display())]);
    upgrade.wait_for_line("spawned");
    server.replace_itself(&[]).exits_with(3).complains("another upgrade is under way");
    hold.reached().let_go();
    upgrade.finish().exits_with(0);
    let slow = server.home.script("slow", &format!("#!/bin/sh\ncat {}\nexit 1\n", hold.path().display()));
    let pid = server.first_pid().to_string();
    let command = ["upgrade", "--self", "--pid", &pid, "--exe", slow.to_str().unwrap(), "--ready-timeout", "30s"];
    let mut replacing = crate::command::Running::start(server.handover_command(&command));
    replacing.wait_for_line("spawned");
    server.upgrade(&[]).exits_with(3).complains("this supervisor is just being replaced");
    server.restart(&[]).exits_with(3);
    server.replace_itself(&[]).exits_with(3);
    server.handover(&["scale", "2", "--pid", &pid]).exits_with(3);
    hold.reached().let_go();
    replacing.finish().exits_with(1);
    assert_eq!(server.serving().generation, 2);
    // A stop goes before all.
    let mut replacing = crate::command::Running::start(server.handover_command(&command));
    replacing.wait_for_line("spawned");
    server.signal(server.first_pid(), Signal::SIGTERM);
    replacing.finish().exits_with(8).complains("told to stop meanwhile");
    eventually_equal("the processes", &vec![], || server.home.processes());
}

/// At no instant is there nobody who would see the end of a worker, or a signal.
#[test]
fn deaths_and_signals_around_it_are_seen() {
    let server = exec(&["--workers", "2"]);
    let load = server.load().new_connections(2).start();
    for round in 0..10 {
        let worker = server.wait_for_workers(2)[round % 2];
        let pid = server.first_pid().to_string();
        let replacing = crate::command::Running::start(server.handover_command(&["upgrade", "--self", "--pid", &pid]));
        std::thread::sleep(std::time::Duration::from_millis(round as u64 * 2));
        server.signal(worker, Signal::SIGKILL);
        server.signal(server.first_pid(), Signal::SIGWINCH);
        replacing.finish().exits_with(0);
        eventually("the one that was killed is gone, and another is there", || {
            let workers = server.workers();
            let serve = workers.len() == 2 && workers.iter().all(|worker| worker.state == State::Serving);
            (serve && workers.iter().all(|one| one.pid != Some(worker))).then_some(())
        });
    }
    // What was killed had connections; what waits in the queue has nothing to fear.
    assert_eq!(load.stop().count(crate::oracle::Outcome::Refused), 0);
    server.assert_supervises(2);
    // A signal that is sent again and again while it is replaced is never one too many.
    let before = server.serving().generation;
    for _ in 0..5 {
        let pid = server.first_pid().to_string();
        let mut replacing =
            crate::command::Running::start(server.handover_command(&["upgrade", "--self", "--pid", &pid]));
        while !replacing.has_ended() {
            server.signal(server.first_pid(), Signal::SIGUSR2);
        }
        // Refused where the signal was first.
        assert!(matches!(replacing.finish().code, Some(0 | 3)));
        server.serving();
    }
    server.upgrade(&["--wait", "drained"]).exits_with(0);
    assert!(server.serving().generation > before);
    server.assert_supervises(2);
}

#[test]
fn a_server_with_the_library_is_no_supervisor() {
    let server = Server::start(&[&["--tcp", "http=127.0.0.1:0"], &SOON[..]].concat());
    server.replace_itself(&[]).exits_with(2).complains("this process is no supervisor");
}
