//! What no generation has that was committed: nobody has to listen there to be ready.

use super::*;

/// Opens one more if it is told another address, and then goes wrong.
const OPENS_ANOTHER: &str = r#"
listener = socket.create_server(address())
if os.environ.get("OTHER"):
    host, port = os.environ["OTHER"].split(":")
    other = socket.create_server((host, int(port)))
    if os.environ["THEN"] == "exit":
        sys.exit(3)
    time.sleep(600)
while True:
    answer(listener)
"#;

#[test]
fn what_a_build_that_failed_has_opened_is_not_asked_of_the_one_before() {
    let (address, other) = (own_address(), own_address());
    let program = script(OPENS_ANOTHER);
    let program = ["python3", "-c", &program, &address.to_string()];
    for (options, verb) in [(&[][..], "restart"), (&["--no-overlap"][..], "upgrade")] {
        let server = exec_in(Home::new(), &[options, &["--ready-timeout", "15s"]].concat(), &program);
        let sockets = server.sockets();
        for then in ["exit", "hang"] {
            let (other, then) = (format!("OTHER={other}"), format!("THEN={then}"));
            let pid = server.first_pid().to_string();
            let request = [verb, "--pid", &pid, "--ready-timeout", "4s", "--env", &other, "--env", &then];
            server.handover(&request).exits_with(1);
            server.wait_for_workers(1);
            assert_eq!(ask(address, "/").answerer().generation, 1);
            eventually_equal("what is listened on", &sockets, || server.sockets());
            assert_eq!(server.workers()[0].crashes, 0, "{verb} {then}");
        }
        assert!(is_refused(other));
    }
}

/// As Java's `new ServerSocket(0)`, to find a port that is free.
const LOOKS_FOR_A_PORT: &str = r#"
socket.create_server(("127.0.0.1", 0)).close()
listener = socket.create_server(address())
while True:
    answer(listener)
"#;

#[test]
fn what_the_program_has_closed_before_it_serves_is_not_waited_for() {
    let address = own_address();
    let server = python(LOOKS_FOR_A_PORT, &[&address.to_string()]);
    for generation in 2..=3 {
        server.upgrade(&["--wait", "drained"]).exits_with(0);
        assert_eq!(ask(address, "/").answerer().generation, generation);
    }
    eventually("one listener", || (server.sockets().len() == 1).then_some(()));
}

/// As Node's inspector, by SIGUSR1.
const OPENS_BY_SIGNAL: &str = r#"
others = []
host, port = address(1)
signal.signal(signal.SIGUSR1, lambda *_: others.append(socket.create_server((host, port))))
listener = socket.create_server(address())
while True:
    answer(listener)
"#;

#[test]
fn what_the_program_opened_while_it_served_is_not_asked_of_it_when_it_is_started_again() {
    let address = own_address();
    let program = script(OPENS_BY_SIGNAL);
    let program = ["python3", "-c", &program, &address.to_string()];
    let server = exec_in(Home::new(), &["--ready-timeout", "10s"], &program);
    let pid = server.first_pid();
    let is_listed = |count: usize| (server.sockets().len() == count).then_some(());
    for round in 1..=3 {
        let worker = server.wait_for_workers(1)[0];
        server.signal(pid, Signal::SIGUSR1);
        eventually("the other listener", || is_listed(2));
        if round == 3 {
            server.handover(&["upgrade", "--self", "--pid", &pid.to_string()]).exits_with(0);
        }
        if round == 2 {
            // It is asked of a new build, as all is that this one has open; and no longer when that has failed.
            let run = server.upgrade(&["--ready-timeout", "500ms"]).exits_with(1);
            run.complains("was not ready in time: ");
        }
        server.signal(worker, Signal::SIGKILL);
        eventually("another worker", || (*server.wait_for_workers(1) != [worker]).then_some(()));
        eventually("one listener", || is_listed(1));
        assert_eq!(ask(address, "/").answerer().generation, 1);
    }
    assert!(!server.home.log().contains(": it is killed"));
}
