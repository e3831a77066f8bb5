//! Where it cannot be done, and while nobody answers.

use super::*;

/// A new process whose `bind` waits for a supervisor that stands still.
fn with_a_call_that_waits(then: impl FnOnce(&Server, i32)) -> Server {
    let address = own_address();
    let server = exec_at(address, &[]);
    let hold = server.home.fifo("hold");
    let environment = format!("PLAIN=hold={}", hold.path().display());
    let mut upgrade = server.begin_upgrade(&["--env", &environment, "--json", "--ready-timeout", "20s"]);
    let spawned = upgrade.wait_for_line("\"spawned\"");
    let pid = serde_json::from_str::<serde_json::Value>(&spawned).unwrap()["pid"].as_i64().unwrap() as i32;
    eventually("the program itself", || {
        let program = fs::read_link(format!("/proc/{pid}/exe")).unwrap();
        (program == fs::canonicalize(plain()).unwrap()).then_some(())
    });
    let held = hold.reached();
    server.freeze(server.first_pid());
    held.let_go();
    let bind = format!("{} ", libc::SYS_bind);
    eventually("its call of bind", || {
        fs::read_to_string(format!("/proc/{pid}/syscall")).ok().filter(|text| text.starts_with(&bind))
    });
    then(&server, pid);
    server.thaw(server.first_pid());
    upgrade.finish();
    server
}

#[test]
fn a_supervisor_that_is_busy_is_waited_for() {
    let server = with_a_call_that_waits(|server, _| {
        // The one that serves is not held up.
        assert_eq!(ask(server_address(server), "/").answerer().generation, 1);
    });
    assert_eq!(server.serving().generation, 2);
}

#[test]
fn one_that_is_killed_while_its_call_waits_is_no_harm() {
    let server = with_a_call_that_waits(|server, pid| {
        server.signal(pid, Signal::SIGKILL);
        eventually("its end", || crate::server::has_ended(pid).then_some(()));
    });
    assert_eq!(server.serving().generation, 1);
    server.upgrade(&["--wait", "drained"]).exits_with(0);
}

/// So that it can take the socket of the program, and not look under which numbers the program has it.
#[test]
fn a_supervisor_without_fds_does_not_say_that_a_socket_is_bound() {
    let limit = |pid: i32, limit: &str| {
        let limit = format!("--nofile={limit}:");
        let limited = Command::new("prlimit").args(["--pid", &pid.to_string(), &limit]).status();
        assert!(limited.unwrap().success());
    };
    let attempt = || {
        let server = with_a_call_that_waits(|server, _| {
            let open = fs::read_dir(format!("/proc/{}/fd", server.first_pid())).unwrap().flatten();
            let open: BTreeSet<u32> = open.map(|fd| fd.file_name().to_str().unwrap().parse().unwrap()).collect();
            let fourth = (0..).filter(|number| !open.contains(number)).nth(3).unwrap();
            limit(server.first_pid(), &fourth.to_string());
        });
        limit(server.first_pid(), "1024");
        let message = server.serving().last_upgrade.unwrap().message;
        let has_failed = !message.starts_with("upgraded");
        if has_failed {
            server.upgrade(&["--wait", "drained"]).exits_with(0);
        }
        (has_failed, message)
    };
    // One that stood still in the middle of a look at the program has more room than that.
    let (_, failed) = (0..20).map(|_| attempt()).find(|(has_failed, _)| *has_failed).unwrap();
    assert!(failed.contains("the new build exited with status 101 before it was ready"), "{failed}");
}

fn server_address(server: &Server) -> SocketAddr {
    let log = server.home.log();
    let argument = fs::read(format!("/proc/{}/cmdline", server.first_pid())).unwrap();
    let last = argument.split(|byte| *byte == 0).rev().find(|part| !part.is_empty()).unwrap();
    String::from_utf8_lossy(last).parse().unwrap_or_else(|error| panic!("{error}: {log}"))
}

/// As docs/any-program.md says.
#[test]
fn without_a_supervisor_nothing_can_be_bound_and_what_is_bound_serves_on() {
    let address = own_address();
    let server = exec_at(address, &[]);
    assert_eq!(get(address, "/bind/127.0.0.1:0"), "bound");
    server.signal(server.first_pid(), Signal::SIGKILL);
    server.wait_for_end(server.first_pid());
    assert_eq!(get(address, "/bind/127.0.0.1:0"), "Function not implemented (os error 38)");
}

/// As in a container without CAP_SYS_PTRACE.
const WITHOUT_PIDFD_GETFD: &str = r#"
PIDFD_GETFD = 438
refuse(PIDFD_GETFD)
os.execv(sys.argv[1], sys.argv[1:])
"#;

#[test]
fn where_it_cannot_be_done_it_is_told_with_what_can() {
    let home = Home::new();
    let forbidden = |arguments: &[&str]| {
        let mut command = home.command("python3");
        command.args(["-c", &script(WITHOUT_PIDFD_GETFD), HANDOVER]).args(arguments);
        run(command)
    };
    let plain = plain();
    let plain = plain.to_str().unwrap();
    let refused = forbidden(&["exec", "--", plain, "poll", "127.0.0.1:0"]).exits_with(4);
    refused
        .complains("no pidfd_getfd")
        .complains("Operation not permitted")
        .complains("name the address with --listen");
    forbidden(&["check", "--intercept"]).exits_with(1).says("problem  machine").says("CAP_SYS_PTRACE");
    let mut check = home.command(HANDOVER);
    check.args(["check", "--intercept"]);
    run(check).exits_with(0).says("ok       machine  `handover exec` can keep the sockets");
    // What proves itself, and has no sockets to be kept, is run all the same.
    let mut command = home.logged("python3", &["-c", &script(WITHOUT_PIDFD_GETFD), HANDOVER, "exec"]);
    command.args(["--ready-cmd", "true", "--", "sleep", "600"]);
    let server = Server::run(home, command);
    assert!(server.home.log().contains("are not kept"));
}

/// Two supervisors, one below the other: a process can have one filter that asks.
#[test]
fn where_somebody_else_decides_already_it_is_told() {
    let home = Home::new();
    let plain = plain();
    let inner = [HANDOVER, "exec", "--", plain.to_str().unwrap(), "poll", "127.0.0.1:0"];
    let mut command = home.command(HANDOVER);
    command.args(["exec", "--"]).args(inner);
    let run = run(command).exits_with(1);
    run.complains("another supervisor or sandbox decides on its system calls already").complains("--listen");
}

#[test]
fn a_program_that_listens_on_nothing_is_told_so() {
    let home = Home::new();
    let mut command = home.command(HANDOVER);
    command.args(["exec", "--ready-timeout", "500ms", "--", "sleep", "600"]);
    run(command).exits_with(1).complains("it has listened on nothing").complains("--ready-delay");
    let server = exec_in(Home::new(), &["--ready-cmd", "true"], &["sleep", "600"]);
    server.upgrade(&["--wait", "drained"]).exits_with(0);
}

#[test]
fn no_new_privileges_are_forbidden_only_to_those_who_have_none() {
    if !is_root_or_skip("another user") {
        return;
    }
    let forbidden = |server: &Server| {
        let status = fs::read_to_string(format!("/proc/{}/status", server.worker_pids()[0])).unwrap();
        status.lines().find_map(|line| line.strip_prefix("NoNewPrivs:\t")).unwrap().to_owned()
    };
    assert_eq!(forbidden(&exec_at(own_address(), &["--user", "nobody"])), "0");
    let home = Home::new();
    std::os::unix::fs::chown(home.path(""), Some(65534), Some(65534)).unwrap();
    let program = home.copy(&plain(), "plain");
    let handover = home.copy(HANDOVER.as_ref(), "handover");
    let text = own_address().to_string();
    let arguments = ["exec", "--trial", "100ms", "--", program.to_str().unwrap(), "epoll", &text];
    let mut command = home.logged("setpriv", &["--reuid=65534", "--regid=65534", "--clear-groups"]);
    command.arg(&handover).args(arguments);
    let server = Server::run(home, command);
    assert_eq!(forbidden(&server), "1");
    server.upgrade(&["--wait", "drained"]).exits_with(0);
    assert_eq!(get(text.parse().unwrap(), "/env/HANDOVER_GENERATION"), "2");
}
