//! As process 1 of a container.

use std::fs;
use std::process::Command;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::client::get;
use crate::command::run;
use crate::exec::plain;
use crate::home::{HANDOVER, Home};
use crate::rights::is_root_or_skip;
use crate::wait::eventually;

#[test]
fn it_supervises_and_reaps_whatever_is_left_without_a_parent() {
    if !is_root_or_skip("a supervisor as process 1") {
        return;
    }
    let home = Home::new();
    let name = format!("pid-1-{}", std::process::id());
    let unshare = ["--pid", "--fork", "--mount", "--mount-proc", "--kill-child", HANDOVER, "exec", "--name", &name];
    let mut command = home.logged("unshare", &unshare);
    command.args(["--trial", "100ms", "--listen", "http=127.0.0.1:0", "--"]).arg(plain());
    let mut unshare = command.spawn().unwrap();
    let handover = |arguments: &[&str]| {
        let mut command = Command::new(HANDOVER);
        command.args(arguments).args(["--name", &name]);
        run(command)
    };
    let status = eventually("a service", || {
        let run = handover(&["status", "--json"]);
        (run.code == Some(0) && run.last_json()["state"] == "serving").then(|| run.last_json())
    });
    assert_eq!(status["pid"], 1);
    let address = status["listeners"][0]["address"].as_str().unwrap().parse().unwrap();
    handover(&["upgrade", "--wait", "drained"]).exits_with(0).says("upgraded to generation 2");
    assert!(get(address, "/").starts_with("gen=2 "));
    handover(&["upgrade", "--self"]).exits_with(0).says("process 1 goes on as handover ");
    let seen_from_here = fs::read_to_string(format!("/proc/{0}/task/{0}/children", unshare.id())).unwrap();
    let supervisor = seen_from_here.trim();
    let children = || fs::read_to_string(format!("/proc/{supervisor}/task/{supervisor}/children")).unwrap();
    for _ in 0..3 {
        get(address, "/orphan");
    }
    // They come to process 1, and go.
    eventually("its worker alone", || (children().split_whitespace().count() == 1).then_some(()));
    kill(Pid::from_raw(supervisor.parse().unwrap()), Signal::SIGTERM).unwrap();
    assert_eq!(unshare.wait().unwrap().code(), Some(0));
}
