//! `handover exec`: the supervisor, and a new worker, whose program uses the library or binds its socket by itself.

use std::net::SocketAddr;

use handover::control::State;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::library::{FDS_MAX, NO_CHANNEL, NO_FRAME, step};
use super::{CLIENTS, Fault, Fired, Matrix, Step, TIMES, address, assert_lost_at_most, load};
use crate::client::ask;
use crate::command::Running;
use crate::exec::plain;
use crate::home::{HANDOVER, Home, fixture};
use crate::server::{Server, fds_of, has_ended};
use crate::wait::{LONG, eventually, eventually_equal};

use Fault as F;

const BEFORE_THE_PROGRAM: (&[Fault], &str) =
    (&[F::Short, F::Count, F::Ended], "the program does not run yet, and what runs says nothing");

const SUPERVISOR: Matrix = Matrix {
    heading: "`handover exec`: the fault comes when …",
    faults: &Fault::ALL,
    steps: &[
        step("exec: asked", "the supervisor is asked", &[NO_FRAME, NO_CHANNEL]),
        step("offer", "… says `offer` to a worker that is not started yet", &[]),
        step("exec: spawned", "… has started it", &[NO_FRAME, NO_CHANNEL]),
        step("exec: ready", "… has heard that it is ready", &[NO_FRAME, NO_CHANNEL]),
        step("commit", "… says `commit`", &[]),
        step("exec: accepting", "… has said it: the trial begins", &[NO_FRAME, NO_CHANNEL]),
        step("settled", "… says `settled`: the trial is over", &[]),
        step("exec: settled", "… has said it", &[NO_FRAME, NO_CHANNEL]),
        step("exec: told to stop", "… has told the old worker to stop", &[NO_FRAME, NO_CHANNEL]),
    ],
};

const WORKER: Matrix = Matrix {
    heading: "`handover exec`: the fault comes when …, in the new worker",
    faults: &Fault::ALL,
    steps: &[
        step("worker: started", "the new worker is about to execute the program", &[BEFORE_THE_PROGRAM]),
        step("new: started", "… looks for the offer", &[NO_FRAME]),
        step("adopted", "… says `adopted`", &[]),
        step("ready", "… says `ready`", &[]),
        step("new: ready", "… has said it", &[NO_FRAME]),
        step("new: commit", "… has read `commit`", &[NO_FRAME]),
        step("accepting", "… has opened its gate, says `accepting`", &[]),
        step("new: accepting", "… has said it", &[NO_FRAME]),
        step("new: settled", "… has read `settled`", &[NO_FRAME, NO_CHANNEL]),
    ],
};

const ITSELF: Matrix = Matrix {
    heading: "`handover upgrade --self`: the fault comes when …",
    faults: &[F::Killed, F::Continued, F::StoppedAndKilled, F::NoFds, F::Delayed],
    steps: &[
        step("rehearsal", "the new build, in a child, is asked whether it could go on", &[]),
        step("exec: rehearsed", "the supervisor is about to execute it", &[]),
        step("exec: replaced", "… has executed it, and has read nothing yet", &[]),
    ],
};

const OF_ANY_PROGRAM: Matrix = Matrix {
    heading: "`handover exec` of any program: the fault comes when …",
    faults: &[F::Killed, F::Continued, F::StoppedAndKilled, F::NoFds, F::Delayed],
    steps: &[
        step("exec: asked", "the supervisor is asked", &[]),
        step("exec: spawned", "… has started the new worker", &[]),
        step("exec: call", "… has read a call of it that waits", &[]),
        step("exec: given", "… has put the kept socket in its hands, and not answered", &[]),
        step("exec: ready", "… sees that it is ready", &[]),
        step("exec: settled", "… ends the trial", &[]),
        step("exec: told to stop", "… has told the old worker to stop", &[]),
    ],
};

const WORKER_OF_ANY_PROGRAM: Matrix = Matrix {
    heading: "`handover exec` of any program: the fault comes when …, in the new worker",
    faults: &[F::Killed, F::Continued, F::StoppedAndKilled, F::NoFds, F::Delayed],
    steps: &[
        step("worker: intercepted", "its calls wait for the supervisor, that does not know it yet", &[]),
        step("worker: started", "it is about to execute the program", &[]),
    ],
};

#[test]
fn in_the_supervisor_of_any_program() {
    OF_ANY_PROGRAM.holds(|step, fault| Cell::start(step, fault, true, Program::Any).run());
}

#[test]
fn in_a_worker_of_any_program() {
    WORKER_OF_ANY_PROGRAM.holds(|step, fault| Cell::start(step, fault, false, Program::Any).run());
}

#[test]
fn in_a_supervisor_that_replaces_itself() {
    ITSELF.holds(|step, fault| Cell::start(step, fault, true, Program::OfTheLibrary).run_itself());
}

#[test]
fn in_the_supervisor() {
    SUPERVISOR.holds(|step, fault| Cell::start(step, fault, true, Program::OfTheLibrary).run());
}

#[test]
fn in_a_worker() {
    WORKER.holds(|step, fault| {
        let outcome = Cell::start(step, fault, false, Program::OfTheLibrary).run();
        // Whether another frame follows, that is taken for the rest, depends on when its threads come to wait.
        let is_chance = step.point == "accepting" && fault == F::Short && ["old", "new"].contains(&outcome);
        if is_chance { "either" } else { outcome }
    });
}

#[derive(Clone, Copy)]
enum Program {
    OfTheLibrary,
    /// Under interception.
    Any,
}

struct Cell {
    program: Program,
    server: Server,
    fault: Fault,
    fired: Fired,
    /// For the upgrade in which it happens.
    arguments: Vec<String>,
    address: String,
    supervisor: i32,
}

impl Cell {
    fn start(step: Step, fault: Fault, in_supervisor: bool, program: Program) -> Self {
        let (home, address) = (Home::new(), address());
        let fired = Fired::new(&home);
        let variable = fired.variable(&step, fault);
        let mut command = program.command(&home, &address);
        let mut arguments = TIMES.map(str::to_owned).to_vec();
        match in_supervisor {
            true => drop(command.env("HANDOVER_FAULT", variable)),
            false => arguments.extend(["--env".to_owned(), format!("HANDOVER_FAULT={variable}")]),
        }
        let server = Server::run(home, command);
        let supervisor = server.first_pid();
        Self { program, server, fault, fired, arguments, address, supervisor }
    }

    fn upgrade(&self, supervisor: i32, arguments: &[String]) -> Running {
        let pid = supervisor.to_string();
        let mut command = self.server.handover_command(&["upgrade", "--json", "--pid", &pid]);
        command.args(arguments);
        Running::start(command)
    }

    /// Generations of the workers that serve, once no other is left.
    #[track_caller]
    fn generations(&self) -> Vec<u64> {
        eventually("every worker to serve", || {
            let pids = self.server.home.processes().into_iter().filter(|pid| *pid != self.supervisor);
            let mut generations: Vec<u64> = pids.map(|pid| self.generation(pid)).collect::<Option<_>>()?;
            generations.sort();
            (!generations.is_empty()).then_some(generations)
        })
    }

    /// None: it does not serve, or not yet.
    fn generation(&self, pid: i32) -> Option<u64> {
        match self.program {
            Program::OfTheLibrary => {
                let status = self.server.try_status(pid).ok()?;
                (status.state == State::Serving).then_some(status.generation)
            }
            Program::Any => {
                let environment = std::fs::read_to_string(format!("/proc/{pid}/environ")).ok()?;
                let of_it = environment.split('\0').find_map(|line| line.strip_prefix("HANDOVER_GENERATION="));
                let socket = format!("socket:[{}]", inode_at(&self.address)?);
                fds_of(pid).iter().any(|fd| fd.contains(&socket)).then(|| of_it?.parse().ok()).flatten()
            }
        }
    }

    fn run(self) -> &'static str {
        let server = &self.server;
        let cookie = server.status(self.supervisor).listeners[0].cookie;
        let load = load(&self.address).start();
        load.wait_for_more(5, LONG).unwrap();
        let upgrade = self.upgrade(self.supervisor, &self.arguments);
        let failed = self.fired.take_its_course(self.fault);
        let run = upgrade.finish();
        let is_alone = has_ended(self.supervisor);
        if !is_alone {
            server.wait_until(self.supervisor, State::Serving);
            eventually_equal("its workers", &1, || server.status(self.supervisor).workers.len());
        }
        let generations = self.generations();
        load.wait_for_more(20, LONG).unwrap();
        // Nobody is killed who has accepted anything but a new worker.
        let worker_was_killed = failed != self.supervisor && has_ended(failed);
        assert_lost_at_most(if worker_was_killed { CLIENTS } else { 0 }, &load.stop());
        if is_alone {
            self.is_started_again();
        } else {
            assert_eq!(server.status(self.supervisor).listeners[0].cookie, cookie);
            let exit = if generations == [1] { 1 } else { 0 };
            run.exits_with(exit);
            eventually("fds again", || (fds_of(self.supervisor).len() < FDS_MAX / 2).then_some(()));
            self.upgrade(self.supervisor, &[]).finish().exits_with(0);
            assert_eq!(server.status(self.supervisor).generation, generations[0] + 1);
            server.assert_supervises(1);
        }
        match (generations.as_slice(), is_alone) {
            ([1], false) => "old",
            ([2], false) => "new",
            ([1], true) => "old, alone",
            ([2], true) => "new, alone",
            ([1, 2], true) => "both, alone",
            other => panic!("{other:?}"),
        }
    }

    /// Which build the supervisor is in the end. The worker serves all the time.
    fn run_itself(self) -> &'static str {
        let (server, pid) = (&self.server, self.supervisor.to_string());
        let (workers, listeners) = (server.worker_pids(), server.status(self.supervisor).listeners);
        let load = load(&self.address).start();
        load.wait_for_more(5, LONG).unwrap();
        let itself = ["upgrade", "--self", "--json", "--ready-timeout", "4s", "--pid", &pid];
        let upgrade = Running::start(server.handover_command(&itself));
        self.fired.take_its_course(self.fault);
        let run = upgrade.finish();
        load.wait_for_more(20, LONG).unwrap();
        assert_lost_at_most(0, &load.stop());
        if has_ended(self.supervisor) {
            assert_eq!(self.generations(), [1]);
            self.is_started_again();
            return "old worker, alone";
        }
        server.wait_until(self.supervisor, State::Serving);
        assert_eq!(server.worker_pids(), workers);
        assert_eq!(server.status(self.supervisor).listeners[0].cookie, listeners[0].cookie);
        eventually("fds again", || (fds_of(self.supervisor).len() < FDS_MAX / 2).then_some(()));
        Running::start(server.handover_command(&itself)).finish().exits_with(0);
        self.upgrade(self.supervisor, &[]).finish().exits_with(0);
        server.assert_supervises(1);
        match run.code {
            Some(0) => "new build",
            Some(1) => "old build",
            code => panic!("{code:?}: {run:?}"),
        }
    }

    /// What a service manager does, or somebody at night: end what is left, and start the service.
    fn is_started_again(&self) {
        let home = &self.server.home;
        let mut killed = vec![];
        eventually("nobody", || {
            for pid in home.processes() {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
                killed.push(pid);
            }
            // One whose memory has gone is in no list any more, and may still have its sockets.
            killed.iter().all(|pid| has_ended(*pid)).then_some(())
        });
        let mut again = self.program.command(home, &self.address).spawn().unwrap();
        let pid = again.id().cast_signed();
        self.server.wait_until(pid, State::Serving);
        self.upgrade(pid, &[]).finish().exits_with(0);
        let address: SocketAddr = self.address.parse().unwrap();
        eventually("generation 2 alone", || (ask(address, "/").answerer().generation == 2).then_some(()));
        again.kill().unwrap();
        again.wait().unwrap();
    }
}

impl Program {
    fn command(self, home: &Home, address: &str) -> std::process::Command {
        let program = match self {
            Self::OfTheLibrary => fixture(),
            Self::Any => plain(),
        };
        let (program, http) = (program.to_str().unwrap(), format!("http={address}"));
        let script = format!("ulimit -n {FDS_MAX}; exec {HANDOVER} exec --trial 100ms \"$@\"");
        let worker = match self {
            Self::OfTheLibrary => vec!["--listen", &http, "--", program, "--tcp", &http, "--linger", "100ms"],
            Self::Any => vec!["--", program, "epoll", address],
        };
        home.logged("/bin/sh", &[&["-c", &script, "sh"], &worker[..]].concat())
    }
}

/// Of the socket that listens there (proc_pid_net(5)).
fn inode_at(address: &str) -> Option<String> {
    const LISTENS: &str = "0A";
    let SocketAddr::V4(address) = address.parse().unwrap() else { return None };
    let local = format!("{:08X}:{:04X}", u32::from_ne_bytes(address.ip().octets()), address.port());
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let mut lines = table.lines().map(|line| line.split_ascii_whitespace().collect::<Vec<_>>());
    lines.find(|line| line[1] == local && line[3] == LISTENS).map(|line| line[9].to_owned())
}
