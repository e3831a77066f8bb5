//! How a program is started: its sockets, its environment, its user.

use std::fs;
use std::net::TcpListener;

use crate::client::ask_unix;
use crate::command::run;
use crate::exec::{HTTP, exec, exec_in, plain};
use crate::home::{HANDOVER, Home};
use crate::oracle::Answer;
use crate::wait::eventually;

#[test]
fn the_program_is_told_of_its_sockets_in_each_of_the_ways() {
    let home = Home::new();
    let path = home.path("app.sock");
    let unix = format!("app={}", path.display());
    let server = exec_in(home, &["--listen", &unix, "--workers", "2"], plain().to_str().unwrap());
    let env = |name: &str| server.get(&format!("/env/{name}"));
    assert_eq!((env("LISTEN_FDS"), env("LISTEN_FDNAMES")), ("2".to_owned(), "http:app".to_owned()));
    let ports = format!("{}=3;{}=4", server.address(), path.display());
    assert_eq!((env("SERVER_STARTER_PORT"), env("SERVER_STARTER_GENERATION")), (ports, "1".to_owned()));
    assert_eq!(
        (env("EINHORN_FD_0"), env("EINHORN_FD_1"), env("EINHORN_FD_COUNT")),
        ("3".into(), "4".into(), "2".into())
    );
    assert_eq!((env("HANDOVER_GENERATION"), env("HANDOVER_FD")), ("1".to_owned(), String::new()));
    assert!(["0", "1"].contains(&env("HANDOVER_WORKER").as_str()));
    assert!(env("NOTIFY_SOCKET").starts_with('@'));
    // It answers on both.
    assert_eq!(ask_unix(&path, "/").answerer().generation, 1);
    server.handover(&["stop", "--pid", &server.first_pid().to_string()]).exits_with(0);
    assert!(!path.exists());
}

#[test]
fn nothing_but_its_own_reaches_the_program() {
    let server = exec(&[]);
    let worker = server.worker_pids()[0];
    let passed_through = crate::server::fds_of(std::process::id().cast_signed());
    let log = server.home.path("log").display().to_string();
    let fds = || {
        let mut fds = crate::server::fds_of(worker);
        fds.retain(|fd| !passed_through.contains(fd) && *fd != log && !fd.starts_with("anon_inode:[eventpoll]"));
        fds
    };
    // The listener, and the pipe that is its stderr.
    let kinds = || fds().iter().map(|fd| fd.split(':').next().unwrap().to_owned()).collect::<Vec<_>>();
    eventually("its fds", || (kinds() == ["pipe", "socket"]).then_some(()));
}

#[test]
fn a_program_that_does_not_start_is_told_and_ends_the_supervisor() {
    let refused = |program: &str, plain: &str, code: i32, message: &str| {
        let home = Home::new();
        let mut command = home.command(HANDOVER);
        let timeout = if plain == "hang" { "500ms" } else { "30s" };
        command.args(["exec"]).args(HTTP).args(["--ready-timeout", timeout, "--", program]).env("PLAIN", plain);
        run(command).exits_with(code).complains(message);
        assert_eq!((home.processes(), home.sockets()), (vec![], Vec::<String>::new()));
    };
    let plain = plain();
    let plain = plain.to_str().unwrap();
    refused(plain, "exit=3", 1, "it exited with status 3 before it was ready");
    refused(plain, "exit=3", 1, "plain: no database at db.internal");
    refused(plain, "exit=0", 1, "let it stay in the foreground");
    refused(plain, "hang", 1, "it was not ready in time: it does not wait for connections on http");
    let missing =
        |name: &str| format!("cannot start `{name}`: No such file or directory (os error 2) (is it installed?");
    for name in ["/no/such/program", "no-such-program"] {
        refused(name, "", 1, &missing(name));
    }
    refused("/etc/passwd", "", 1, "is it executable?");
}

#[test]
fn wrong_usage() {
    let exec = |arguments: &[&str]| {
        let home = Home::new();
        let mut command = home.command(HANDOVER);
        command.arg("exec").args(arguments);
        run(command).exits_with(2)
    };
    exec(&[]).complains("PROGRAM");
    exec(&["--intercept", "off", "--", "true"]).complains("name its address with --listen");
    exec(&["--listen", "nowhere", "--", "true"]).complains("is no address");
    exec(&["--listen", "a=0", "--listen", "a=0", "--", "true"]).complains("a listener of that name already");
    exec(&["--listen", "0", "--workers", "0", "--", "true"]).complains("0");
    exec(&["--listen", "0", "--stop-signal", "NONE", "--", "true"]).complains("is no signal");
    exec(&["--listen", "0", "--user", "nobody-by-that-name", "--", "true"]).complains("there is no such user");
}

#[test]
fn an_address_that_is_taken_is_told() {
    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    let home = Home::new();
    let mut command = home.command(HANDOVER);
    command.args(["exec", "--listen", &other.local_addr().unwrap().to_string(), "--", "true"]);
    run(command).exits_with(1).complains("another process listens there");
}

#[test]
fn as_another_user() {
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let home = Home::new();
    // It must be able to reach the program.
    let program = std::env::temp_dir().join(format!("handover-it-plain-{}", std::process::id()));
    fs::copy(plain(), &program).unwrap();
    let server = exec_in(home, &["--user", "nobody"], program.to_str().unwrap());
    let nobody = nix::unistd::User::from_name("nobody").unwrap().unwrap();
    assert_eq!(server.get("/ids"), format!("{} {}", nobody.uid, nobody.gid));
    assert_eq!(server.get("/env/USER"), "nobody");
    server.upgrade(&["--wait", "drained"]).exits_with(0);
    fs::remove_file(&program).unwrap();
    assert_eq!(server.answerer().generation, 2);
}

#[test]
fn by_name_and_by_pid_file() {
    let home = Home::new();
    let (file, name) = (home.path("pid"), format!("it-{}", std::process::id()));
    let file = file.to_str().unwrap().to_owned();
    let server = exec_in(home, &["--name", &name, "--pid-file", &file], plain().to_str().unwrap());
    let pid = server.first_pid();
    assert_eq!(fs::read_to_string(&file).unwrap(), format!("{pid}\n"));
    server.handover(&["status", "--name", &name]).exits_with(0).says(&format!("name         {name}")).says("WORKER");
    server.handover(&["upgrade", "--name", &name]).exits_with(0).says("upgraded to generation 2");
    server
        .handover(&["upgrade", "--pid-file", &file, "--wait", "drained"])
        .exits_with(0)
        .says("upgraded to generation 3");
    server.handover(&["upgrade", "--name", "no-such-service"]).exits_with(7).complains("no service named");
    let answer: Answer = server.answerer();
    assert_eq!((answer.generation, server.pid()), (3, pid));
    // One that stands still runs all the same, and is not to be started a second time.
    let supervisor = nix::unistd::Pid::from_raw(pid);
    nix::sys::signal::kill(supervisor, nix::sys::signal::Signal::SIGSTOP).unwrap();
    let asked = server.handover(&["upgrade", "--name", &name]);
    nix::sys::signal::kill(supervisor, nix::sys::signal::Signal::SIGCONT).unwrap();
    asked.exits_with(1).complains(&format!("it may be `{name}`: if so name it with --pid")).complains(&pid.to_string());
    server.handover(&["stop", "--name", &name]).exits_with(0);
    assert!(!std::path::Path::new(&file).exists());
}
