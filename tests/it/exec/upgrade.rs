//! Upgrades: all or nothing, and without loss.

use nix::sys::signal::Signal;

use crate::client::ask;
use crate::exec::{exec, exec_in, plain};
use crate::home::{HANDOVER, Home, fixture};
use crate::oracle::Load;
use crate::server::{SOON, Server};
use crate::wait::{LONG, eventually, eventually_equal};

#[test]
fn the_stages_in_their_order() {
    let server = exec(&["--workers", "2"]);
    let run = server.upgrade(&["--json", "--wait", "drained"]).exits_with(0);
    let names: Vec<String> = run
        .json()
        .iter()
        .map(|line| line["stage"].as_str().or(line["event"].as_str()).unwrap().to_owned())
        .filter(|name| name != "draining")
        .collect();
    assert_eq!(names, ["accepted", "spawned", "spawned", "ready", "ready", "healthy", "committed", "result"]);
    let last = run.last_json();
    assert_eq!((last["result"].as_str(), last["generation"].as_u64()), (Some("upgraded"), Some(2)));
    assert_eq!(last["pid"].as_i64(), Some(i64::from(server.first_pid())));
}

#[test]
fn ten_upgrades_of_two_workers_lose_nothing() {
    let server = exec(&["--workers", "2"]);
    let cookie = server.serving().listeners[0].cookie;
    let load = server.load().new_connections(6).kept(6).slow(2, 1.0).start();
    server.upgrade_again_and_again(10, "20ms", &load);
    let tally = load.stop();
    tally.assert_lossless();
    assert_eq!(tally.generations().len(), 11, "{tally}");
    assert_eq!((server.serving().listeners[0].cookie, server.pid()), (cookie, server.first_pid()));
    server.assert_supervises(2);
}

#[test]
fn one_worker_that_fails_rolls_all_back_and_leaves_nothing() {
    let server = exec(&["--workers", "2"]);
    let workers = server.wait_for_workers(2);
    let fds = server.assert_supervises(2);
    let load = server.load().start();
    for (plain, message) in [
        (
            "exit=3,worker=1",
            "worker 1 of the new build exited with status 3 before it was ready; generation 1 serves on",
        ),
        ("hang,worker=0", "worker 0 of the new build was not ready in time"),
    ] {
        load.wait_for_more(20, LONG).unwrap();
        let timeout = if plain.starts_with("hang") { "1s" } else { "30s" };
        let plain = format!("PLAIN={plain}");
        let run = server.upgrade(&["--env", &plain, "--ready-timeout", timeout, "--trial", "2s"]).exits_with(1);
        run.complains(message);
        assert_eq!(server.wait_for_workers(2), workers);
    }
    // The other worker of the new build served already, and has finished what it had.
    server.upgrade(&["--env", "PLAIN=exit=3"]).complains("  | plain: no database at db.internal");
    server.upgrade(&["--exe", "/no/such/program"]).exits_with(1).complains("No such file or directory");
    server.upgrade(&["--exe", "/etc/passwd"]).exits_with(1).complains("chmod +x");
    load.stop().assert_lossless();
    eventually_equal("what is held", &(fds, workers), || (server.assert_supervises(2), server.wait_for_workers(2)));
    assert!(server.serving().last_upgrade.unwrap().message.contains("chmod +x"));
}

#[test]
fn a_death_in_the_trial_rolls_back() {
    let server = exec(&[]);
    let run = server.upgrade(&["--env", "PLAIN=die-after=2000", "--trial", "30s", "--json"]).exits_with(1);
    let last = run.last_json();
    assert_eq!(last["result"], "rolled-back");
    assert!(last["failure"].as_str().unwrap().contains("exited with status 9 within the trial"));
    assert_eq!(server.answerer().generation, 1);
}

#[test]
fn what_an_upgrade_changes_stays() {
    let server = exec(&[]);
    server.upgrade(&["--env", "A=1", "--", "epoll"]).exits_with(0);
    server.upgrade(&[]).exits_with(0);
    eventually("the third alone", || (server.workers().len() == 1).then_some(()));
    assert_eq!((server.get("/env/A"), server.get("/args")), ("1".to_owned(), "epoll".to_owned()));
    // A failed one changes nothing.
    server.upgrade(&["--env", "A=2", "--env", "PLAIN=exit=1"]).exits_with(1);
    server.upgrade(&["--wait", "drained"]).exits_with(0);
    assert_eq!(server.get("/env/A"), "1");
}

#[test]
fn a_slow_request_is_answered_by_the_old_one_and_a_second_upgrade_is_refused() {
    let server = exec(&[]);
    let slow = ask(server.address(), "/slow/3");
    eventually("the request in flight", || (server.workers()[0].connections == 1).then_some(()));
    let mut upgrade = server.begin_upgrade(&["--trial", "1s", "--wait", "drained", "--json"]);
    upgrade.wait_for_line("\"spawned\"");
    let pid = server.first_pid().to_string();
    for verb in ["restart", "upgrade"] {
        server.handover(&[verb, "--pid", &pid]).exits_with(3).complains("another upgrade is under way");
        server.handover(&[verb, "--json", "--pid", &pid]).exits_with(3).tells_only_the_result();
    }
    upgrade.wait_for_line("\"connections\":1");
    assert_eq!(slow.answerer().generation, 1);
    let run = upgrade.finish().exits_with(0);
    assert_eq!(run.last_json()["result"], "upgraded");
    assert_eq!(server.answerer().generation, 2);
}

#[test]
fn what_outlives_the_drain_deadline_is_cut_and_counted() {
    let server = exec(&[]);
    let slow: Vec<_> = (0..3).map(|_| ask(server.address(), "/slow/600")).collect();
    eventually("the requests in flight", || (server.workers()[0].connections == 3).then_some(()));
    let run = server.upgrade(&["--wait", "drained", "--drain-timeout", "500ms", "--json"]).exits_with(5);
    assert_eq!((&run.last_json()["result"], &run.last_json()["cut"]), (&"cut".into(), &3.into()));
    for one in slow {
        assert!(one.try_answer().is_err() || server.answerer().generation == 2);
    }
    server.assert_supervises(1);
}

#[test]
fn signals_upgrade_and_the_pid_stays() {
    let server = exec(&[]);
    for (signal, generation) in [(Signal::SIGUSR2, 2), (Signal::SIGHUP, 3)] {
        server.signal(server.first_pid(), signal);
        eventually("the next generation", || (server.serving().generation == generation).then_some(()));
        assert_eq!(server.pid(), server.first_pid());
    }
}

/// A deployment that switches a link, and the way back.
#[test]
fn a_link_is_followed_at_each_upgrade_and_the_previous_build_is_known() {
    let home = Home::new();
    let (one, two, link) = (home.copy(&plain(), "one"), home.copy(&plain(), "two"), home.path("current"));
    std::os::unix::fs::symlink(&one, &link).unwrap();
    let server = exec_in(home, &[], link.to_str().unwrap());
    std::fs::remove_file(&link).unwrap();
    std::os::unix::fs::symlink(&two, &link).unwrap();
    server.upgrade(&["--wait", "drained"]).exits_with(0);
    assert_eq!(server.get("/exe"), two.display().to_string());
    server.upgrade(&["--previous", "--wait", "drained"]).exits_with(0);
    assert_eq!(server.get("/exe"), one.display().to_string());
}

/// A server with the library takes the sockets as from systemd, says READY=1, and drains as it always does.
#[test]
fn a_server_with_the_library_loses_nothing_either() {
    let home = Home::new();
    let mut command = home.logged(HANDOVER, &["exec", "--trial", "100ms", "--workers", "2", "--ready", "notify"]);
    command.args(["--listen", "http=127.0.0.1:0", "--"]).arg(fixture()).args(["--tcp", "http=127.0.0.1:0"]).args(SOON);
    let server = Server::run(home, command);
    // Its workers have control sockets of their own, so the supervisor is asked by its pid.
    let (pid, address) = (server.first_pid(), server.status(server.first_pid()).listeners[0].address.clone());
    let load =
        Load::new(address.parse::<std::net::SocketAddr>().unwrap()).new_connections(2).kept(4).slow(1, 1.0).start();
    for generation in 2..=5 {
        load.wait_for_more(50, LONG).unwrap();
        server.handover(&["upgrade", "--pid", &pid.to_string(), "--wait", "drained"]).exits_with(0);
        assert_eq!(server.status(pid).generation, generation);
    }
    load.stop().assert_lossless();
}

#[test]
fn scaled_up_and_down_under_load() {
    let server = exec(&["--workers", "2"]);
    let pid = server.first_pid().to_string();
    let scale = |workers: &str| server.handover(&["scale", workers, "--pid", &pid]);
    let load = server.load().start();
    scale("4").exits_with(0).says("scaled from 2 to 4 workers");
    server.assert_supervises(4);
    server.upgrade(&["--wait", "drained"]).exits_with(0).says("4 workers");
    scale("1").exits_with(0).says("scaled from 4 to 1 workers");
    server.assert_supervises(1);
    load.stop().assert_lossless();
    // One that does not come up leaves all as it was.
    server.upgrade(&["--env", "PLAIN=exit=3,worker=1", "--wait", "drained"]).exits_with(0);
    scale("2").exits_with(1).complains("not scaled: worker 1 exited with status 3 before it was ready; 1 serve on");
    server.assert_supervises(1);
    scale("0").exits_with(2);
}

/// Resident kilobytes that are this process's own.
fn anonymous_kilobytes(pid: i32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[test]
fn after_forty_upgrades_nothing_has_grown() {
    let server = exec(&["--workers", "2"]);
    let pid = server.first_pid();
    let measure = || (server.assert_supervises(2), anonymous_kilobytes(pid));
    server.upgrade(&["--trial", "0s", "--wait", "drained"]).exits_with(0);
    server.upgrade(&["--env", "PLAIN=exit=1"]).exits_with(1);
    let (fds, memory) = measure();
    for _ in 0..20 {
        server.upgrade(&["--trial", "0s", "--wait", "drained"]).exits_with(0);
        server.upgrade(&["--env", "PLAIN=exit=1"]).exits_with(1);
    }
    let (fds_now, memory_now) = measure();
    assert_eq!(fds_now, fds);
    assert!(memory_now < memory + 512, "{memory} kB became {memory_now} kB");
}
