//! A service under test: its generations, from the first process on.

use std::fs;
use std::net::SocketAddr;
use std::process::{Child, Command};

use handover::control::{Client, State, Status, Target};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::client::get;
use crate::command::{Run, Running, run};
use crate::home::{HANDOVER, Home};
use crate::oracle::{Answer, Load};
use crate::wait::{LONG, eventually, eventually_equal};

/// Times that suit a test: no trial of a second, no lingering of five.
pub(crate) const SOON: [&str; 4] = ["--trial", "200ms", "--linger", "200ms"];

pub(crate) struct Server {
    /// Before the home, which kills what is left.
    first: Child,
    pub(crate) home: Home,
}

/// What a process has: the same before and after an upgrade that failed.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Holdings {
    fds: Vec<String>,
    threads: usize,
    /// Living and dead.
    children: Vec<String>,
    processes: Vec<i32>,
    sockets: Vec<String>,
}

impl Server {
    /// With one TCP listener, `http`.
    pub(crate) fn http() -> Self {
        Self::start(&["--tcp", "http=127.0.0.1:0"])
    }

    pub(crate) fn start(arguments: &[&str]) -> Self {
        Self::start_in(Home::new(), arguments)
    }

    pub(crate) fn start_in(home: Home, arguments: &[&str]) -> Self {
        let command = home.fixture(&[&SOON, arguments].concat());
        Self::run(home, command)
    }

    /// Starts `command` and waits until it serves.
    pub(crate) fn run(home: Home, mut command: Command) -> Self {
        let first = command.spawn().unwrap();
        let server = Self { first, home };
        server.wait_until(server.first_pid(), State::Serving);
        server
    }

    /// A process that was started otherwise.
    pub(crate) fn adopt(home: Home, first: Child) -> Self {
        Self { first, home }
    }

    pub(crate) fn first_pid(&self) -> i32 {
        self.first.id().cast_signed()
    }

    /// Of the first process.
    pub(crate) fn try_wait(&mut self) -> Option<std::process::ExitStatus> {
        self.first.try_wait().unwrap()
    }

    pub(crate) fn try_status(&self, pid: i32) -> Result<Status, handover::Error> {
        let socket = self.home.control().join(format!("{pid}.sock"));
        Client::connect(&Target::Socket(socket)).and_then(Client::status)
    }

    #[track_caller]
    pub(crate) fn status(&self, pid: i32) -> Status {
        self.try_status(pid).unwrap()
    }

    #[track_caller]
    pub(crate) fn wait_until(&self, pid: i32, state: State) {
        eventually(&format!("process {pid} to be {state}"), || {
            self.try_status(pid).ok().filter(|status| status.state == state)
        });
    }

    /// The process that serves.
    #[track_caller]
    pub(crate) fn serving(&self) -> Status {
        eventually("a process that serves", || self.status_of_serving())
    }

    /// None while an upgrade is under way.
    pub(crate) fn status_of_serving(&self) -> Option<Status> {
        let pids = self.home.sockets().into_iter().filter_map(|name| name.strip_suffix(".sock")?.parse().ok());
        let statuses = pids.filter_map(|pid: i32| self.try_status(pid).ok());
        statuses.filter(|status| status.state == State::Serving).max_by_key(|status| status.generation)
    }

    #[track_caller]
    pub(crate) fn pid(&self) -> i32 {
        self.serving().pid
    }

    #[track_caller]
    pub(crate) fn generation(&self) -> u64 {
        self.serving().generation
    }

    /// Of the listener `name`, as the serving process says.
    #[track_caller]
    pub(crate) fn address_of(&self, name: &str) -> String {
        let status = self.serving();
        let listener = status.listeners.iter().find(|listener| listener.name == name);
        listener.unwrap_or_else(|| panic!("no `{name}` in {status:?}")).address.clone()
    }

    #[track_caller]
    pub(crate) fn address(&self) -> SocketAddr {
        self.address_of("http").parse().unwrap()
    }

    #[track_caller]
    pub(crate) fn get(&self, path: &str) -> String {
        get(self.address(), path)
    }

    /// Who answers a request.
    #[track_caller]
    pub(crate) fn answerer(&self) -> Answer {
        Answer::parse(self.get("/").as_bytes()).unwrap().0
    }

    pub(crate) fn handover(&self, arguments: &[&str]) -> Run {
        run(self.handover_command(arguments))
    }

    pub(crate) fn handover_command(&self, arguments: &[&str]) -> Command {
        // Not of the home: its processes are the servers.
        let mut command = Command::new(HANDOVER);
        command.args(arguments);
        command
    }

    /// `handover upgrade` of the process that serves.
    #[track_caller]
    pub(crate) fn upgrade(&self, arguments: &[&str]) -> Run {
        self.begin_upgrade(arguments).finish()
    }

    #[track_caller]
    pub(crate) fn begin_upgrade(&self, arguments: &[&str]) -> Running {
        let pid = self.pid().to_string();
        Running::start(self.handover_command(&[&["upgrade", "--pid", &pid], arguments].concat()))
    }

    /// So many upgrades under load, with that trial, until the last build has answered.
    #[track_caller]
    pub(crate) fn upgrade_again_and_again(&self, times: u32, trial: &str, load: &crate::oracle::Running) {
        // As many as may drain at a time, and slow requests take theirs.
        const DRAINING_MAX: usize = 4;
        for generation in (2..).take(times as usize) {
            load.wait_for_more(50, LONG).unwrap();
            self.upgrade(&["--trial", trial]).exits_with(0);
            load.wait_for_generation(generation, LONG).unwrap();
            eventually("room for one more", || (self.serving().draining.len() < DRAINING_MAX).then_some(()));
        }
    }

    /// `handover restart` of the process that serves.
    #[track_caller]
    pub(crate) fn restart(&self, arguments: &[&str]) -> Run {
        self.begin_restart(arguments).finish()
    }

    #[track_caller]
    pub(crate) fn begin_restart(&self, arguments: &[&str]) -> Running {
        let pid = self.pid().to_string();
        Running::start(self.handover_command(&[&["restart", "--pid", &pid], arguments].concat()))
    }

    /// With a fault in the new build.
    #[track_caller]
    pub(crate) fn upgrade_with_fault(&self, fault: &str, arguments: &[&str]) -> Run {
        let fault = format!("FIXTURE_FAULT={fault}");
        self.upgrade(&[&["--env", &fault], arguments].concat())
    }

    /// A load that a busy machine can carry, and that finds each kind of loss.
    pub(crate) fn load(&self) -> Load {
        Load::new(self.address()).new_connections(2).kept(2)
    }

    pub(crate) fn holdings(&self, pid: i32) -> Holdings {
        Holdings {
            fds: fds_of(pid),
            threads: fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count),
            children: children_of(pid),
            processes: self.home.processes(),
            sockets: self.home.sockets(),
        }
    }

    /// Holdings once all that belongs to earlier requests is gone: nothing but its listeners is open.
    #[track_caller]
    pub(crate) fn settled_holdings(&self, pid: i32) -> Holdings {
        eventually("no open connection", || (self.status(pid).connections.open == 0).then_some(()));
        // The threads of connections, and what an upgrade has left, go a moment later, and nobody says when.
        let mut looks = vec![self.holdings(pid)];
        eventually("the same five times", || {
            let now = self.holdings(pid);
            looks.retain(|look| *look == now);
            looks.push(now);
            if looks.len() < 5 { None } else { looks.pop() }
        })
    }

    /// No fd, thread, zombie, process or file more than before.
    #[track_caller]
    pub(crate) fn assert_holds(&self, pid: i32, before: &Holdings) {
        eventually_equal("what is held", before, || self.holdings(pid));
    }

    /// One process is left, nothing is open in it but its own, and nothing lies in the control directory but its socket.
    #[track_caller]
    pub(crate) fn assert_only(&self, pid: i32) {
        eventually_equal("the processes of the test", &vec![pid], || {
            self.reap_first();
            self.home.processes()
        });
        eventually_equal("the control directory", &vec![format!("{pid}.sock")], || self.home.sockets());
        eventually_equal("its children", &vec![], || children_of(pid));
    }

    fn reap_first(&self) {
        let _ = nix::sys::wait::waitpid(
            Pid::from_raw(self.first_pid()),
            Some(nix::sys::wait::WaitPidFlag::WNOHANG | nix::sys::wait::WaitPidFlag::__WNOTHREAD),
        );
    }

    /// Waits until a process is gone; a zombie is.
    #[track_caller]
    pub(crate) fn wait_for_end(&self, pid: i32) {
        eventually(&format!("the end of process {pid}"), || has_ended(pid).then_some(()));
    }

    #[track_caller]
    pub(crate) fn signal(&self, pid: i32, signal: Signal) {
        kill(Pid::from_raw(pid), signal).unwrap();
    }

    /// Stops the process as SIGSTOP does, and returns when all its threads stand still.
    #[track_caller]
    pub(crate) fn freeze(&self, pid: i32) {
        self.signal(pid, Signal::SIGSTOP);
        eventually("a process that stands still", || {
            let threads = fs::read_dir(format!("/proc/{pid}/task")).ok()?;
            let mut states = threads.flatten().map(|thread| state_of(&thread.path().join("stat")));
            states.all(|state| state == Some('T')).then_some(())
        });
    }

    pub(crate) fn thaw(&self, pid: i32) {
        self.signal(pid, Signal::SIGCONT);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.first.kill();
        let _ = self.first.wait();
    }
}

/// What the fds of a process lead to, without the numbers that differ.
pub(crate) fn fds_of(pid: i32) -> Vec<String> {
    let Ok(directory) = fs::read_dir(format!("/proc/{pid}/fd")) else { return vec![] };
    let links = directory.flatten().filter_map(|entry| fs::read_link(entry.path()).ok());
    let mut names: Vec<String> = links.map(|link| link.display().to_string()).collect();
    names.sort();
    names
}

pub(crate) fn children_of(pid: i32) -> Vec<String> {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { return vec![] };
    let of = |path: std::path::PathBuf| fs::read_to_string(path.join("children")).unwrap_or_default();
    let children = threads.flatten().map(|thread| of(thread.path()));
    children.flat_map(|text| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>()).collect()
}

pub(crate) fn state_of(stat: &std::path::Path) -> Option<char> {
    fs::read_to_string(stat).ok()?.rsplit_once(") ")?.1.chars().next()
}

/// With all its threads: one that lives has the sockets still, and the main thread of one that is killed may end first.
pub(crate) fn has_ended(pid: i32) -> bool {
    let is_over = |stat: &std::path::Path| matches!(state_of(stat), None | Some('Z' | 'X'));
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    threads.map(|thread| thread.path().join("stat")).all(|stat| is_over(&stat))
}
