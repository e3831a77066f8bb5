//! Processes in namespaces of their own, found and asked from outside by their pid.

use std::process::Child;

use handover::control::{Service, services};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::command::{Run, Running};
use crate::home::{HANDOVER, Home, fixture};
use crate::rights::is_root_or_skip;
use crate::wait::eventually;

/// A fixture below `unshare`, which listens on a Unix socket of the abstract namespace.
struct Contained {
    unshare: Child,
    home: Home,
}

impl Contained {
    fn start(unshare: &[&str], prepare: &str) -> Self {
        let home = Home::new();
        let script = format!("{prepare}exec {} --unix http=@it --trial 100ms", fixture().display());
        let mut command = home.logged("unshare", &[unshare, &["/bin/sh", "-c", &script]].concat());
        // The default place of root, which is private here.
        command.env_remove("HANDOVER_DIR").env_remove("RUNTIME_DIRECTORY");
        Self { unshare: command.spawn().unwrap(), home }
    }

    /// In another pid namespace, whose process 1 is a shell that stays: its end is the end of all.
    fn below_init(name: &str) -> Self {
        let serves = format!("{} --unix http=@it-{name}-{} --trial 100ms", fixture().display(), std::process::id());
        let script = format!("mount -t tmpfs none /run; {serves} & wait; sleep 60; ");
        Self::start(&["-p", "-f", "-m", "--mount-proc"], &script)
    }

    /// The serving one, as it is seen from here.
    fn service(&self, generation: u64) -> Service {
        eventually(&format!("generation {generation}"), || {
            let own = self.home.processes();
            services().into_iter().filter(|service| own.contains(&service.pid)).find(|service| {
                let run = self.handover(&["status", "--json", "--pid", &service.pid.to_string()]);
                run.code == Some(0) && {
                    let status = run.last_json();
                    status["generation"] == generation && status["state"] == "serving"
                }
            })
        })
    }

    fn handover(&self, arguments: &[&str]) -> Run {
        self.begin(arguments).finish()
    }

    fn begin(&self, arguments: &[&str]) -> Running {
        let mut command = std::process::Command::new(HANDOVER);
        command.args(arguments);
        Running::start(command)
    }
}

impl Drop for Contained {
    fn drop(&mut self) {
        for pid in self.home.processes() {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        let _ = self.unshare.wait();
    }
}

#[track_caller]
fn is_upgraded(contained: &Contained, private: bool) {
    let first = contained.service(1);
    let outside = std::path::Path::new("/run/handover").join(first.socket.file_name().unwrap());
    assert_eq!(!outside.exists(), private, "{}", outside.display());
    let pid = first.pid.to_string();
    contained.handover(&["upgrade", "--pid", &pid]).exits_with(0).says("upgraded to generation 2");
    let second = contained.service(2);
    assert_ne!(second.pid, first.pid);
    contained.handover(&["ps"]).exits_with(0).says(&second.pid.to_string());
    // The old one is gone by the time that the new one tells how it went: whose pid is another here than there.
    let restarted = contained.handover(&["restart", "--pid", &second.pid.to_string()]).exits_with(0);
    restarted.says("restarted as generation 3");
    contained.handover(&["stop", "--pid", &contained.service(3).pid.to_string()]).exits_with(0);
}

#[test]
fn in_another_mount_and_network_namespace() {
    if is_root_or_skip("a process in another mount and network namespace") {
        is_upgraded(&Contained::start(&["-m", "-n"], "mount -t tmpfs none /run && "), true);
    }
}

/// What is there for the command may be hidden from the process, and the other way around.
#[test]
fn check_looks_where_the_process_looks() {
    if is_root_or_skip("a process in another mount namespace") {
        let hidden = Home::new();
        let here = hidden.copy_of_fixture("server");
        let directory = here.parent().unwrap().display().to_string();
        let prepare = format!("mount -t tmpfs none /run && mount -t tmpfs none {directory} && ");
        let contained = Contained::start(&["-m", "-n"], &prepare);
        let pid = contained.service(1).pid.to_string();
        let check = |exe: &str| contained.handover(&["check", "--pid", &pid, "--exe", exe]);
        let run = check(here.to_str().unwrap()).exits_with(1);
        assert!(run.stdout.contains("is not there as the process sees it"), "{run:?}");
        let there = format!("/proc/{pid}/root{directory}/script");
        std::fs::write(&there, "#!/only/here\n").unwrap();
        std::fs::set_permissions(&there, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let script = format!("{directory}/script");
        let run = check(&script).exits_with(1);
        assert!(run.stdout.contains("needs the interpreter /only/here, which does not exist"), "{run:?}");
        std::fs::write(&there, format!("#!{directory}/script\n")).unwrap();
        check(&script).exits_with(0).says("is a script for");
    }
}

/// It is process 1 there, and its new build another number than here.
#[test]
fn in_another_pid_namespace() {
    if is_root_or_skip("a process in another pid namespace") {
        is_upgraded(&Contained::below_init("upgraded"), true);
    }
}

/// It is known from the old one, by the number that it has there.
#[test]
fn when_the_old_process_dies_the_new_one_is_found_in_another_pid_namespace() {
    if is_root_or_skip("a process in another pid namespace") {
        let contained = Contained::below_init("dies");
        let first = contained.service(1);
        let hold = contained.home.fifo("hold");
        let pid = first.pid.to_string();
        let upgrade = contained.begin(&["upgrade", "--pid", &pid, "--env", &hold.fault("hold-before-ready")]);
        let held = hold.reached();
        kill(Pid::from_raw(first.pid), Signal::SIGKILL).unwrap();
        held.let_go();
        let run = upgrade.finish().exits_with(0);
        run.says(&format!("process {} has taken over", contained.service(2).pid));
    }
}

#[test]
fn as_process_1_it_is_not_restarted() {
    if is_root_or_skip("process 1 of another pid namespace") {
        let unshare = ["-p", "-f", "-m", "--mount-proc"];
        let contained = Contained::start(&unshare, "mount -t tmpfs none /run; ");
        let pid = contained.service(1).pid.to_string();
        contained.handover(&["restart", "--pid", &pid]).exits_with(1).complains("this is process 1 of its container");
        assert_eq!(contained.service(1).pid.to_string(), pid);
    }
}
