//! `--config`: the same options from a file.

use crate::command::{Run, run};
use crate::exec::plain;
use crate::home::{HANDOVER, Home};
use crate::server::Server;

fn refused(text: &str) -> Run {
    let home = Home::new();
    let file = home.file("web.toml", text.as_bytes(), 0o644);
    let mut command = home.command(HANDOVER);
    command.args(["exec", "--config", file.to_str().unwrap()]);
    run(command).exits_with(2).complains("web.toml: ")
}

#[test]
fn a_file_says_what_the_command_line_would() {
    let home = Home::new();
    let text = format!(
        "workers = 3\nlisten = [\"http=127.0.0.1:0\"]\nname = \"from-the-file\"\ntrial = \"100ms\"\nlog-prefix = true\n\
         no-overlap = false\nprogram = [{:?}, \"epoll\"]\n",
        plain()
    );
    let file = home.file("web.toml", text.as_bytes(), 0o644);
    // The command line goes before.
    let command = home.logged(HANDOVER, &["exec", "--config", file.to_str().unwrap(), "--workers", "2"]);
    let server = Server::run(home, command);
    assert_eq!(server.wait_for_workers(2).len(), 2);
    assert_eq!(server.serving().name.as_deref(), Some("from-the-file"));
    assert_eq!(server.get("/args"), "epoll");
    server.upgrade(&["--env", "PLAIN=exit=1", "--wait", "drained"]).exits_with(1);
    let log = server.home.log();
    assert!(log.contains("\n2.0 | plain: no database") || log.contains("\n2.1 | plain: no database"), "{log}");
}

#[test]
fn what_is_wrong_with_a_file_is_told() {
    refused("wokers = 4").complains("there is no option `wokers` (did you mean `workers`?)");
    refused("nothing-like-it = 4").complains("there is no option `nothing-like-it`");
    refused("workers = true").complains("`workers` is a string or a number");
    refused("log-prefix = 1").complains("`log-prefix` is true or false");
    refused("program = \"node\"").complains("`program` is a list of strings");
    refused("config = \"other.toml\"").complains("there is no option `config`");
    refused("workers = \n").complains("1");
    let home = Home::new();
    let mut command = home.command(HANDOVER);
    command.args(["exec", "--config=/no/such/file"]);
    run(command).exits_with(2).complains("/no/such/file: cannot read it: No such file");
    let mut command = home.command(HANDOVER);
    command.args(["exec", "--config=/dev/zero"]);
    run(command).exits_with(2).complains("/dev/zero: cannot read it: it has more than 1048576 bytes");
    // What clap says of a value stands for the file, too.
    let file = home.file("web.toml", b"ready-timeout = \"5\"", 0o644);
    let mut command = home.command(HANDOVER);
    command.args(["exec", "--config", file.to_str().unwrap(), "--", "true"]);
    run(command).exits_with(2).complains("a time needs a unit");
    // Of two the last one counts.
    let mut command = home.command(HANDOVER);
    command.args(["exec", "--config=/no/such/file", "--config", file.to_str().unwrap(), "--", "true"]);
    run(command).exits_with(2).complains("a time needs a unit");
}
