"""Rust against Python: each side of the protocol with the other one's, good paths and every fault of both.

The programs of the Rust side are found in $HANDOVER_TARGET, by default target/debug of this repository:
`cargo build --features axum --bins --examples`.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import unittest
from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterable, List, Optional

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import handover_protocol as protocol  # noqa: E402
import new_side  # noqa: E402
import old_side  # noqa: E402
from handover_protocol import ControlFailed, Deadline  # noqa: E402
from harness import (  # noqa: E402
    HERE,
    LIFETIME_SECONDS,
    NEW_SIDE,
    OLD_SIDE,
    PATIENCE_SECONDS,
    READY_TIMEOUT_MS,
    ProcessCase,
    Program,
    adopt_orphans,
    ask,
    connect,
    has_ended,
    kill_orphan,
    steady_clients,
    wait_until,
)

TARGET = os.environ.get("HANDOVER_TARGET") or os.path.join(HERE, "..", "..", "target", "debug")
HANDOVER = os.path.join(TARGET, "handover")
AXUM = os.path.join(TARGET, "examples", "axum")
FIXTURE = os.path.join(TARGET, "examples", "fixture")

TRIAL_MS = "150"
IMPATIENT_MS = "400"
NOBODY = 65534
KILLED = "was killed by SIGKILL"


def setUpModule() -> None:
    missing = [path for path in (HANDOVER, AXUM, FIXTURE) if not os.access(path, os.X_OK)]
    if missing:
        raise FileNotFoundError(f"{', '.join(missing)}: build them, or set HANDOVER_TARGET")
    adopt_orphans(True)


def tearDownModule() -> None:
    adopt_orphans(False)


@dataclass
class Upgrade:
    """What `handover upgrade --json` said."""

    exit_code: int
    stages: List[str]
    result: Dict[str, Any]


@dataclass
class Fault:
    """What the old process says of a new side that misbehaves; `exit` is how it ended in a push."""

    message: str
    exit: str
    stderr: str = ""


EXITED_1 = "exited with status 1"
# The channel ends before the process has; on a busy machine the 200 ms that it is given then may pass.
OR_ONLY_ITS_CHANNEL = "|closed the channel)"
BEFORE_COMMIT = {
    "garbage": Fault(r"sent bytes that are no frame \(\"HTTP/1.1 400 Bad", KILLED),
    "oversized-length": Fault("sent a frame of 4194305 bytes, more than 4194304", KILLED),
    "too-many-fds": Fault("sent a frame of 16385 fds, more than 16384", KILLED),
    "unknown-kind": Fault("sent a frame of kind 77, which version 1 of the protocol does not have", KILLED),
    "gave-up-too-early": Fault("sent `gave-up` out of turn", KILLED),
    "stopping-too-early": Fault("sent `stopping` out of turn", KILLED),
    "wrong-cookie": Fault("adopted other sockets than those that were offered", KILLED),
    "fewer-listeners": Fault("adopted 0 listeners, not the 1 that were offered", KILLED),
    "newer-version": Fault("refused the handover: the offered versions are too old", EXITED_1, "are too old"),
    "close-channel": Fault("closed the channel", KILLED),
    "exit-0": Fault(f"(exited with status 0 before it was ready{OR_ONLY_ITS_CHANNEL}", "exited with status 0"),
    "exit-1": Fault(f"({EXITED_1} before it was ready{OR_ONLY_ITS_CHANNEL}", EXITED_1),
    "hang-before-adopted": Fault("was not ready within 400ms", KILLED),
    "hang-before-ready": Fault("was not ready within 400ms", KILLED),
    "gave-up": Fault("gave up: the database does not answer", EXITED_1, "new_side: the database does not answer"),
}
IN_TRIAL = {
    "die-in-trial": Fault(f"({KILLED} within the trial{OR_ONLY_ITS_CHANNEL}", KILLED),
    "never-accept": Fault("became ready and never accepted on listener `http`, where clients wait", KILLED),
    "no-accepting": Fault("became ready and did not answer the commit", KILLED),
    "gave-up-in-trial": Fault("gave up: the database does not answer", f"{KILLED}|{EXITED_1}"),
    "garbage-in-trial": Fault("sent bytes that are no frame", KILLED),
    "close-channel-in-trial": Fault("closed the channel", KILLED),
}
HARMLESS = {"slow-start"}
# A puller lives on after these until it notices; of the others it is known how it ends.
PULLER_IS_ABORTED = {
    "garbage", "oversized-length", "too-many-fds", "unknown-kind", "gave-up-too-early", "stopping-too-early",
    "wrong-cookie", "fewer-listeners", "hang-before-adopted", "hang-before-ready",
}  # fmt: skip

REFUSED = {
    "truncated-fds": "1 fds in a message instead of 2",
    "wrong-magic": "bytes that are no frame",
    "version-99": "speaks protocol versions 99 to 99, this build speaks 1 to 1",
    "cookie-mismatch": "listener `http`: the socket received has cookie",
    "huge-body": "a frame of 4194305 bytes, more than 4194304",
    "long-state": "a state of 67108865 bytes, more than 67108864",
    "short-state": "a state of 5 bytes instead of 6",
}
ABORTED = {"abort-after-adopted": "failed", "garbage-after-adopted": "failed",
           "abort-in-trial": "rolled-back", "garbage-in-trial": "rolled-back"}  # fmt: skip
DIES_BEFORE_OFFER = {"die-before-offer", "die-mid-offer"}
DIES_LATER = {"die-after-offer", "die-after-ready", "die-in-trial"}
FAULT_EXIT_CODE = 70


class EveryFault(unittest.TestCase):
    def test_every_fault_of_the_new_side_is_expected(self) -> None:
        self.assertEqual({*BEFORE_COMMIT, *IN_TRIAL, *HARMLESS}, set(new_side.FAULTS))

    def test_every_fault_of_the_old_side_is_expected(self) -> None:
        expected = {*REFUSED, *ABORTED, *DIES_BEFORE_OFFER, *DIES_LATER, "stale-inode"}
        self.assertEqual(expected, set(old_side.FAULTS))


def for_each(cases: Iterable[str]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes one test of each case, with a directory of its own, and the case as the argument."""

    def mark(function: Callable[..., None]) -> Callable[..., None]:
        function.cases = list(cases)
        return function

    return mark


def one_case(function: Callable[..., None], case: str) -> Callable[..., None]:
    return lambda self: function(self, case)


class InteropCase(ProcessCase):
    def __init_subclass__(cls) -> None:
        for name, function in list(vars(cls).items()):
            for case in getattr(function, "cases", ()):
                setattr(cls, f"test_{name}_{case.replace('-', '_')}", one_case(function, case))

    def setUp(self) -> None:
        super().setUp()
        self.environment["RUST_BACKTRACE"] = "0"

    # The Rust side as the old one.

    def start_rust(self, program: str, *arguments: str) -> Program:
        rust = self.start_program(program, *arguments, name=os.path.basename(program))
        self.wait_until_serving(rust)
        self.address = status_of(rust.pid)["listeners"][0]["address"]
        # Its runtime has opened what it needs once it has answered.
        self.assert_served_by(1, rust.pid)
        self.fds_before = fds_of_process(rust.pid)
        return rust

    def start_axum(self) -> Program:
        return self.start_rust(AXUM, "--listen", "127.0.0.1:0")

    def start_fixture(self, *arguments: str) -> Program:
        return self.start_rust(FIXTURE, "--tcp", "http=127.0.0.1:0", *arguments)

    def wait_until_serving(self, program: Program) -> None:
        def is_serving() -> bool:
            self.assertIsNone(program.process.poll(), program.stderr())
            with contextlib.suppress(ControlFailed, OSError):
                return status_of(program.pid)["state"] == "serving"
            return False

        wait_until(is_serving)

    def upgrade(self, rust: Program, *new: str, ready_timeout: str = "15s", trial: str = f"{TRIAL_MS}ms",
                wait: str = "healthy") -> Upgrade:  # fmt: skip
        command = [HANDOVER, "upgrade", "--pid", str(rust.pid), "--exe", NEW_SIDE, "--json", "--wait", wait,
                   "--ready-timeout", ready_timeout, "--trial", trial,
                   "--", "--lifetime-s", LIFETIME_SECONDS, *new]  # fmt: skip
        return self.follow(self.asking(command))

    def asking(self, command: List[str]) -> subprocess.Popen:
        environment = {**os.environ, **self.environment}
        asking = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        self.addCleanup(asking.stdout.close)
        self.addCleanup(asking.wait)
        self.addCleanup(asking.kill)
        return asking

    def follow(self, asking: subprocess.Popen) -> Upgrade:
        events = []
        for line in asking.stdout:
            events.append(json.loads(line))
            if events[-1].get("stage") == "spawned":
                self.hold(events[-1]["pid"])
        exit_code = asking.wait(PATIENCE_SECONDS)
        self.assertEqual(events[-1]["event"], "result", events)
        self.assertEqual(events[-1]["exit_code"], exit_code)
        return Upgrade(exit_code, [e["stage"] for e in events if e["event"] == "stage"], events[-1])

    def hold(self, pid: int) -> None:
        self.new_pid, self.new_pidfd = pid, None
        with contextlib.suppress(ProcessLookupError):
            self.new_pidfd = os.pidfd_open(pid)
            self.addCleanup(os.close, self.new_pidfd)
            self.addCleanup(kill_orphan, pid, self.new_pidfd)

    # What became of it.

    def assert_nothing_is_left_over(self, rust: Program) -> None:
        wait_until(lambda: not children_of(rust.pid))
        self.assertEqual(os.listdir(self.environment["HANDOVER_DIR"]), [f"{rust.pid}.sock"])
        # What was open for a moment when they were counted before may be gone now; nothing may have come.
        wait_until(lambda: not fds_of_process(rust.pid) - self.fds_before)
        self.assertEqual(status_of(rust.pid)["state"], "serving")
        self.stop(rust)

    def stop(self, rust: Program) -> None:
        rust.signal(signal.SIGTERM)
        self.assertEqual(rust.exit_code(), 0, rust.stderr())
        self.assertEqual(os.listdir(self.environment["HANDOVER_DIR"]), [])
        with self.assertRaises(ConnectionRefusedError):
            connect(self.address)

    def assert_ends_with(self, program: Program, code: int, *stderr: str) -> None:
        self.assertEqual(program.exit_code(), code, program.stderr())
        for text in stderr:
            self.assertIn(text, program.stderr())


def status_of(pid: int) -> Dict[str, Any]:
    with protocol.connect_to_process(pid) as sock:
        protocol.send_line(sock, {"request": "status"}, Deadline(PATIENCE_SECONDS))
        return protocol.read_line(sock, Deadline(PATIENCE_SECONDS))


def fds_of_process(pid: int) -> "collections.Counter[str]":
    links: "collections.Counter[str]" = collections.Counter()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            links[os.readlink(f"/proc/{pid}/fd/{fd}")] += 1
    return links


def children_of(pid: int) -> List[str]:
    children = []
    for thread in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(FileNotFoundError), open(f"/proc/{pid}/task/{thread}/children") as file:
            children += file.read().split()
    return children


class RustOldPushes(InteropCase):
    def assert_upgraded(self, rust: Program, upgrade: Upgrade) -> None:
        self.assertEqual((upgrade.exit_code, upgrade.result["result"]), (0, "upgraded"), upgrade)
        self.assertEqual((upgrade.result["pid"], upgrade.result["generation"]), (self.new_pid, 2))
        self.assertEqual(upgrade.result["message"], f"upgraded to generation 2 (pid {self.new_pid})")
        self.assertEqual(rust.exit_code(), 0, rust.stderr())
        self.assert_served_by(2, self.new_pid)
        self.assertEqual(os.listdir(self.environment["HANDOVER_DIR"]), [])

    def test_stages_come_in_order(self) -> None:
        rust = self.start_axum()
        upgrade = self.upgrade(rust)
        self.assert_upgraded(rust, upgrade)
        self.assertEqual(upgrade.stages, "spawned adopted ready committed healthy".split())
        signal.pidfd_send_signal(self.new_pidfd, signal.SIGTERM)
        self.assertTrue(has_ended(self.new_pidfd, PATIENCE_SECONDS))
        with self.assertRaises(ConnectionRefusedError):
            connect(self.address)

    def test_clients_come_and_go(self) -> None:
        rust = self.start_axum()
        with steady_clients(self.address) as answers:
            wait_until(lambda: len(answers) >= 20)
            self.assert_upgraded(rust, self.upgrade(rust, wait="drained"))
            after_exit = len(answers)
            wait_until(lambda: len(answers) >= after_exit + 20)
        self.assertEqual(set(answers), {f"gen=1 pid={rust.pid}", f"gen=2 pid={self.new_pid}"})

    def test_state_unix_path_and_udp(self) -> None:
        path = self.path("app.sock")
        rust = self.start_fixture("--unix", f"unix={path}", "--udp", "udp=127.0.0.1:0", "--state", "abc",
                                  "--state-version", "7")  # fmt: skip
        self.assert_upgraded(rust, self.upgrade(rust))
        self.assertEqual(ask(self.address, "/state"), "version=7 hex=616263")
        self.assert_served_by(2, self.new_pid, path)
        signal.pidfd_send_signal(self.new_pidfd, signal.SIGTERM)
        self.assertTrue(has_ended(self.new_pidfd, PATIENCE_SECONDS))
        self.assertFalse(os.path.exists(path))

    def test_more_listeners_than_one_message_carries(self) -> None:
        more = [word for number in range(300) for word in ("--tcp", f"more-{number}=127.0.0.1:0")]
        rust = self.start_fixture(*more)
        last = {l["name"]: l["address"] for l in status_of(rust.pid)["listeners"]}["more-299"]
        self.assert_upgraded(rust, self.upgrade(rust))
        self.assert_served_by(2, self.new_pid, last)

    def test_kept_added_and_unclaimed(self) -> None:
        path, added = self.path("app.sock"), self.path("added.sock")
        rust = self.start_fixture("--unix", f"unix={path}")
        self.assert_upgraded(rust, self.upgrade(rust, "--leave", "unix", "--add", f"more={added}"))
        self.assert_served_by(2, self.new_pid, added)
        self.assertFalse(os.path.exists(path))

    def test_slow_start_outlasts_the_timeout(self) -> None:
        rust = self.start_axum()
        upgrade = self.upgrade(rust, "--fault", "slow-start", "--starting-interval-ms", "1200", ready_timeout="3s")
        self.assert_upgraded(rust, upgrade)
        self.assertEqual(upgrade.stages.count("starting"), 3)

    def restart(self, rust: Program, *new: str, kill_after: str = "10s") -> Upgrade:
        command = [HANDOVER, "restart", "--pid", str(rust.pid), "--exe", NEW_SIDE, "--json",
                   "--kill-after", kill_after, "--", "--lifetime-s", LIFETIME_SECONDS, *new]  # fmt: skip
        return self.follow(self.asking(command))

    def test_restart(self) -> None:
        rust = self.start_fixture("--state", "abc")
        with steady_clients(self.address) as answers:
            wait_until(lambda: len(answers) >= 20)
            restart = self.restart(rust)
            after_exit = len(answers)
            wait_until(lambda: len(answers) >= after_exit + 20)
        self.assertEqual((restart.exit_code, restart.result["result"]), (0, "restarted"), restart)
        self.assertEqual(restart.stages, "spawned adopted draining drained gone ready".split())
        self.assertEqual(rust.exit_code(), 0, rust.stderr())
        self.assert_served_by(2, self.new_pid)
        self.assertEqual(ask(self.address, "/state"), "none")
        failed = [answer for answer in answers if answer.startswith("failed")]
        self.assertLessEqual(len(failed), restart.result.get("cut", 0), failed)

    def test_restart_of_one_that_does_not_exit(self) -> None:
        self.environment["FIXTURE_FAULT"] = "never-exits"
        rust = self.start_fixture()
        restart = self.restart(rust, kill_after="500ms")
        self.assertEqual(restart.exit_code, 0, restart)
        self.assertEqual(rust.exit_code(), -signal.SIGKILL)
        self.assert_served_by(2, self.new_pid)

    def test_restart_with_a_build_that_knows_of_none(self) -> None:
        rust = self.start_fixture()
        restart = self.restart(rust, "--knows-no-restart")
        self.assertEqual((restart.exit_code, restart.result["result"]), (1, "failed"), restart)
        self.assertIn("knows nothing of restarts", restart.result["message"])
        self.assert_served_by(1, rust.pid)
        self.assert_nothing_is_left_over(rust)

    def test_told_to_stop_before_commit(self) -> None:
        rust = self.start_axum()
        asking = self.ask_in_background(rust, "--fault", "hang-before-ready")
        wait_until(lambda: status_of(rust.pid)["state"] == "upgrading" and bool(children_of(rust.pid)))
        rust.log.wait("new", "adopted")
        os.kill(int(children_of(rust.pid)[0]), signal.SIGTERM)
        upgrade = self.follow(asking)
        self.assert_failed_upgrade(rust, upgrade, "failed", Fault("gave up: it was told to stop", EXITED_1))

    def test_told_to_stop_in_the_trial(self) -> None:
        rust = self.start_axum()
        asking = self.ask_in_background(rust, trial="15s")
        new = rust.log.wait("new", "accepting")["pid"]
        os.kill(new, signal.SIGTERM)
        upgrade = self.follow(asking)
        self.assertEqual((upgrade.exit_code, upgrade.result["result"]), (0, "upgraded"))
        self.assertEqual(rust.exit_code(), 0)
        self.assertTrue(has_ended(self.new_pidfd, PATIENCE_SECONDS))
        with self.assertRaises(ConnectionRefusedError):
            connect(self.address)

    def ask_in_background(self, rust: Program, *new: str, trial: str = "1s") -> subprocess.Popen:
        command = [HANDOVER, "upgrade", "--pid", str(rust.pid), "--exe", NEW_SIDE, "--json", "--trial", trial,
                   "--", "--lifetime-s", LIFETIME_SECONDS, *new]  # fmt: skip
        return self.asking(command)

    # Faults.

    def assert_failed_upgrade(self, rust: Program, upgrade: Upgrade, result: str, fault: Fault) -> None:
        verdict, serves = {"failed": ("not upgraded", "serves on"), "rolled-back": ("rolled back", "accepts again")}[result]
        self.assertEqual((upgrade.exit_code, upgrade.result["result"]), (1, result), upgrade)
        self.assertRegex(upgrade.result["message"], f"^{verdict}: the new build {fault.message}")
        self.assertTrue(upgrade.result["message"].endswith(f"; process {rust.pid} (generation 1) {serves}"))
        self.assertRegex(upgrade.result["failure"], f"^the new build {fault.message}")
        self.assertRegex(upgrade.result["exit"], f"^({fault.exit})$")
        self.assertIn(fault.stderr, "\n".join(upgrade.result.get("stderr", [])))
        self.assertEqual((upgrade.result["pid"], upgrade.result["generation"]), (rust.pid, 1))
        self.assertTrue(has_ended(self.new_pidfd, 0))
        self.assert_served_by(1, rust.pid)
        self.assert_nothing_is_left_over(rust)

    @for_each(BEFORE_COMMIT)
    def faults_before_commit(self, name: str) -> None:
        fault = BEFORE_COMMIT[name]
        rust = self.start_axum()
        ready_timeout = f"{IMPATIENT_MS}ms" if name.startswith("hang") else "15s"
        upgrade = self.upgrade(rust, "--fault", name, ready_timeout=ready_timeout)
        self.assert_failed_upgrade(rust, upgrade, "failed", fault)
        self.assertNotIn("ready", upgrade.stages)

    @for_each(IN_TRIAL.keys() - {"never-accept"})
    def faults_in_the_trial(self, name: str) -> None:
        fault = IN_TRIAL[name]
        rust = self.start_axum()
        upgrade = self.upgrade(rust, "--fault", name, trial="300ms" if name == "no-accepting" else "15s")
        self.assert_failed_upgrade(rust, upgrade, "rolled-back", fault)
        self.assertEqual(upgrade.stages, "spawned adopted ready committed".split())

    def test_never_accept_while_somebody_waits(self) -> None:
        rust = self.start_axum()
        asking = self.ask_in_background(rust, "--fault", "never-accept", trial="500ms")
        rust.log.wait("new", "accepting")
        self.assert_served_by(1, rust.pid)
        self.assert_failed_upgrade(rust, self.follow(asking), "rolled-back", IN_TRIAL["never-accept"])

    def test_never_accept_while_nobody_waits_is_not_noticed(self) -> None:
        rust = self.start_axum()
        upgrade = self.upgrade(rust, "--fault", "never-accept")
        self.assertEqual((upgrade.exit_code, upgrade.result["result"]), (0, "upgraded"))
        self.assertEqual(rust.exit_code(), 0)
        self.assertFalse(has_ended(self.new_pidfd, 0))

    def test_many_failures_and_then_a_good_one(self) -> None:
        rust = self.start_axum()
        for name in ("gave-up", "garbage", "die-in-trial", "close-channel"):
            self.assertEqual(self.upgrade(rust, "--fault", name).exit_code, 1)
        self.assert_upgraded(rust, self.upgrade(rust))


class RustOldIsPulledFrom(InteropCase):
    def start_pullable(self, trial_ms: str = TRIAL_MS, ready_timeout_ms: str = READY_TIMEOUT_MS) -> Program:
        return self.start_fixture("--trial", f"{trial_ms}ms", "--ready-timeout", f"{ready_timeout_ms}ms")

    def pull(self, rust: Program, *arguments: str) -> Program:
        return self.start_puller("--pull-pid", str(rust.pid), *arguments)

    def assert_pulled(self, rust: Program, new: Program) -> None:
        self.assertEqual(rust.exit_code(), 0, rust.stderr())
        new.log.wait("new", "settled")
        self.assert_served_by(2, new.pid)
        self.assertEqual(os.listdir(self.environment["HANDOVER_DIR"]), [])

    def assert_pull_failed(self, rust: Program, result: str, message: str) -> None:
        wait_until(lambda: "last_upgrade" in status_of(rust.pid))
        last = status_of(rust.pid)["last_upgrade"]
        self.assertEqual(last["result"], result, last)
        self.assertRegex(last["message"], f"the new build {message}")
        self.assert_served_by(1, rust.pid)
        self.assert_nothing_is_left_over(rust)

    def test_puller_that_cannot_be_killed_is_told(self) -> None:
        if os.geteuid() != 0:
            self.skipTest("it takes root to be two users")
        # Where the other user can execute it.
        os.chmod(self.directory, 0o711)
        program = shutil.copy(FIXTURE, self.path("fixture"))
        os.mkdir(self.environment["HANDOVER_DIR"], 0o700)
        os.chown(self.environment["HANDOVER_DIR"], NOBODY, NOBODY)
        rust = self.start_rust("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups",
                               program, "--tcp", "http=127.0.0.1:0", "--trial", "300ms")  # fmt: skip
        new = self.pull(rust, "--fault", "never-accept")
        new.log.wait("new", "accepting")
        self.assert_served_by(1, rust.pid)
        self.assert_ends_with(new, 1, "aborted by the old process: the upgrade is rolled back")
        self.assert_nothing_is_left_over(rust)

    def test_by_pid(self) -> None:
        rust = self.start_pullable()
        self.assert_pulled(rust, self.pull(rust))

    def test_by_socket_while_clients_come_and_go(self) -> None:
        rust = self.start_pullable()
        path = os.path.join(self.environment["HANDOVER_DIR"], f"{rust.pid}.sock")
        with steady_clients(self.address) as answers:
            wait_until(lambda: len(answers) >= 20)
            new = self.start_puller("--pull-socket", path)
            self.assert_pulled(rust, new)
            after_exit = len(answers)
            wait_until(lambda: len(answers) >= after_exit + 20)
        self.assertEqual(set(answers), {f"gen=1 pid={rust.pid}", f"gen=2 pid={new.pid}"})

    def test_slow_start(self) -> None:
        rust = self.start_pullable(ready_timeout_ms="3000")
        self.assert_pulled(rust, self.pull(rust, "--fault", "slow-start", "--starting-interval-ms", "1200"))

    def test_two_pullers_at_once(self) -> None:
        rust = self.start_pullable()
        first = self.pull(rust, "--starting-frames", "1", "--starting-interval-ms", "30000")
        first.log.wait("new", "adopted")
        second = self.pull(rust)
        self.assert_ends_with(second, 1, "busy: another upgrade is under way")
        first.signal(signal.SIGTERM)
        self.assert_ends_with(first, 1)
        self.assert_pull_failed(rust, "failed", "gave up: it was told to stop")

    @for_each(BEFORE_COMMIT)
    def faults_before_commit(self, name: str) -> None:
        fault = BEFORE_COMMIT[name]
        timeout = IMPATIENT_MS if name.startswith("hang") else READY_TIMEOUT_MS
        rust = self.start_pullable(ready_timeout_ms=timeout)
        new = self.pull(rust, "--fault", name)
        if name in PULLER_IS_ABORTED:
            self.assert_ends_with(new, 1, "aborted by the old process: the upgrade is off")
        elif name == "close-channel":
            wait_until(lambda: "last_upgrade" in status_of(rust.pid))
            self.assertIsNone(new.process.poll(), "one that pulled and never accepted is not killed")
            new.signal(signal.SIGTERM)
            self.assert_ends_with(new, 1)
        else:
            self.assert_ends_with(new, 0 if name == "exit-0" else 1, fault.stderr)
        # How the process of another ended nobody tells.
        ended = f"(ended before it was ready{OR_ONLY_ITS_CHANNEL}"
        message = ended if name.startswith("exit") else fault.message
        self.assert_pull_failed(rust, "failed", message)

    @for_each(IN_TRIAL)
    def faults_in_the_trial(self, name: str) -> None:
        fault = IN_TRIAL[name]
        rust = self.start_pullable(trial_ms="500" if "accept" in name else "15000")
        new = self.pull(rust, "--fault", name)
        new.log.wait("new", "accepting")
        if name == "never-accept":
            self.assert_served_by(1, rust.pid)
        message = f"(ended within the trial{OR_ONLY_ITS_CHANNEL}" if name == "die-in-trial" else fault.message
        self.assert_pull_failed(rust, "rolled-back", message)
        allowed = (1, -signal.SIGKILL) if name == "gave-up-in-trial" else (-signal.SIGKILL,)
        self.assertIn(new.exit_code(), allowed)


class RustNewIsPushed(InteropCase):
    def push(self, *arguments: str, trial_ms: str = TRIAL_MS, ready_timeout_ms: str = READY_TIMEOUT_MS,
             program: str = AXUM, new: Optional[List[str]] = None) -> Program:  # fmt: skip
        new = ["--listen", "{address}"] if new is None else new
        old = self.start(OLD_SIDE, "--listen", "127.0.0.1:0", "--now", "--ready-timeout-ms", ready_timeout_ms,
                         "--trial-ms", trial_ms, "--lifetime-s", LIFETIME_SECONDS, *arguments,
                         "--", program, *new)  # fmt: skip
        self.address = old.log.wait("old", "listening")["address"]
        return old

    def assert_new_stops_cleanly(self, old: Program) -> None:
        self.assertEqual(os.listdir(self.environment["HANDOVER_DIR"]), [f"{old.child()}.sock"])
        old.terminate_child()
        self.assertTrue(old.child_has_ended())
        self.assertEqual(os.waitpid(old.child(), 0)[1], 0)
        self.assertEqual(os.listdir(self.environment["HANDOVER_DIR"]), [])
        with self.assertRaises(ConnectionRefusedError):
            connect(self.address)

    def test_stages_come_in_order(self) -> None:
        old = self.push()
        self.assert_handed_over(old)
        stages = [s["stage"] for s in old.log.seen() if s["side"] == "old"]
        first, *_, last = stages
        self.assertEqual((first, last), ("listening", "drained"))
        others = [stage for stage in stages if stage != "accepting"]
        self.assertEqual(others, "listening spawned adopted ready committed healthy settled draining drained".split())
        self.assertIn("http", [s for s in old.log.seen() if s["stage"] == "accepting"][-1]["listeners"])
        self.assert_new_stops_cleanly(old)

    def test_clients_come_and_go(self) -> None:
        old = self.start(OLD_SIDE, "--listen", "127.0.0.1:0", "--trial-ms", "500", "--lifetime-s", LIFETIME_SECONDS,
                         "--", AXUM, "--listen", "{address}")  # fmt: skip
        self.address = old.log.wait("old", "listening")["address"]
        with steady_clients(self.address) as answers:
            wait_until(lambda: len(answers) >= 20)
            old.signal(signal.SIGUSR2)
            self.assert_handed_over(old)
            after_exit = len(answers)
            wait_until(lambda: len(answers) >= after_exit + 20)
        self.assertEqual(set(answers), {f"gen=1 pid={old.pid}", f"gen=2 pid={old.child()}"})

    def test_state_unix_path_and_udp(self) -> None:
        path = self.path("app.sock")
        old = self.push("--unix", path, "--udp", "127.0.0.1:0", "--state", "616263", "--state-version", "7",
                        program=FIXTURE, new=["--tcp", "http={address}", "--unix", f"unix={path}"])  # fmt: skip
        self.assert_handed_over(old)
        ready = old.log.wait("old", "ready")
        self.assertEqual((ready["kept"], ready["added"], ready["unclaimed"]), (["http", "unix"], [], ["udp"]))
        self.assertRegex(ask(self.address, "/state"), "^version=7 length=3 ")
        self.assert_served_by(2, old.child(), path)
        self.assert_new_stops_cleanly(old)
        self.assertFalse(os.path.exists(path))

    def test_empty_and_large_state(self) -> None:
        for state, length in (("", 0), ("ab" * 30_000, 30_000)):
            with self.subTest(length=length):
                old = self.push("--state", state, program=FIXTURE, new=["--tcp", "http={address}"])
                self.assert_handed_over(old)
                self.assertRegex(ask(self.address, "/state"), f"^version=1 length={length} ")

    def test_an_unclaimed_path_is_unlinked(self) -> None:
        path = self.path("app.sock")
        old = self.push("--unix", path)
        self.assert_handed_over(old)
        wait_until(lambda: not os.path.exists(path))

    def test_more_listeners_than_one_message_carries(self) -> None:
        old = self.push("--extra", "300", "--state", "01")
        self.assert_handed_over(old)
        self.assertEqual(len(old.log.wait("old", "ready")["unclaimed"]), 300)

    def test_restart(self) -> None:
        old = self.push("--restart-ms", "15000", program=FIXTURE, new=["--tcp", "http={address}"])
        self.assert_handed_over(old)
        stages = [s["stage"] for s in old.log.seen() if s["side"] == "old"]
        self.assertEqual(stages, "listening spawned adopted released draining drained".split())
        self.assert_new_stops_cleanly(old)

    def test_restart_of_one_that_does_not_exit(self) -> None:
        old = self.push("--restart-ms", "500", "--never-exit", program=FIXTURE, new=["--tcp", "http={address}"])
        old.log.wait("old", "drained")
        self.assertEqual(old.exit_code(), -signal.SIGKILL)
        self.assert_served_by(2, old.child())
        self.assert_new_stops_cleanly(old)

    def test_the_new_build_is_upgraded_in_turn(self) -> None:
        old = self.push()
        self.assert_handed_over(old)
        command = [HANDOVER, "upgrade", "--pid", str(old.child()), "--exe", NEW_SIDE, "--json", "--trial", "150ms",
                   "--wait", "drained", "--", "--lifetime-s", LIFETIME_SECONDS]  # fmt: skip
        done = subprocess.run(command, env={**os.environ, **self.environment}, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, timeout=PATIENCE_SECONDS, check=True)  # fmt: skip
        result = json.loads(done.stdout.splitlines()[-1])
        self.hold(result["pid"])
        self.assert_served_by(3, result["pid"])

    def test_told_to_stop_in_the_trial(self) -> None:
        old = self.push(trial_ms="15000")
        old.log.wait("old", "accepting")
        old.terminate_child()
        self.assertEqual(old.exit_code(), 0)
        self.assertTrue(old.child_has_ended())
        self.assertIsNotNone(old.log.find("old", "stopping"))
        with self.assertRaises(ConnectionRefusedError):
            connect(self.address)

    # Faults.

    def assert_taken_over(self, old: Program, generation: int) -> None:
        self.assertEqual(old.exit_code(), FAULT_EXIT_CODE)
        self.wait_until_child_serves(old)
        self.assert_served_by(generation, old.child())
        self.assertEqual(status_of(old.child())["generation"], generation)
        self.assert_new_stops_cleanly(old)

    def wait_until_child_serves(self, old: Program) -> None:
        def is_serving() -> bool:
            self.assertTrue(old.child_is_running(), old.stderr())
            with contextlib.suppress(ControlFailed, OSError):
                return status_of(old.child())["state"] == "serving"
            return False

        wait_until(is_serving)

    def assert_old_is_alone(self, old: Program) -> None:
        self.assertTrue(old.child_has_ended())
        self.assertEqual(children_of(old.pid), [])
        # The directory is made by the first Rust process that gets so far.
        with contextlib.suppress(FileNotFoundError):
            self.assertEqual(os.listdir(self.environment["HANDOVER_DIR"]), [])

    @for_each(DIES_BEFORE_OFFER)
    def old_process_that_dies_before_its_offer_is_whole(self, fault: str) -> None:
        self.assert_taken_over(self.push("--fault", fault), generation=1)

    def test_old_process_that_dies_before_its_offer_leaves_a_unix_path(self) -> None:
        path = self.path("app.sock")
        old = self.push("--fault", "die-before-offer", "--unix", path, program=FIXTURE,
                        new=["--tcp", "http={address}", "--unix", f"unix={path}"])  # fmt: skip
        self.wait_until_child_serves(old)
        self.assert_served_by(1, old.child(), path)

    @for_each(DIES_LATER)
    def old_process_that_dies_later(self, fault: str) -> None:
        self.assert_taken_over(self.push("--fault", fault, trial_ms="15000"), generation=2)

    @for_each(DIES_BEFORE_OFFER | DIES_LATER)
    def stderr_of_an_orphan(self, fault: str) -> None:
        old = self.push("--fault", fault, trial_ms="15000")
        self.wait_until_child_serves(old)
        where = os.readlink(f"/proc/{old.child()}/fd/2")
        self.assertEqual(where, "/dev/null" if fault in DIES_BEFORE_OFFER else old.stderr_path)

    @for_each(ABORTED)
    def aborts(self, fault: str) -> None:
        stage = ABORTED[fault]
        old = self.push("--fault", fault, trial_ms="15000")
        failed = self.assert_failed(old, "the operator changed their mind", stage)
        # It ended by itself, in good time.
        self.assertNotEqual(failed["exit"], -signal.SIGKILL)
        if stage == "failed":
            self.assertEqual(failed["exit"], 1)
        self.assert_old_is_alone(old)

    @for_each(ABORTED)
    def paths_of_an_aborted_build(self, fault: str) -> None:
        path, added = self.path("app.sock"), self.path("added.sock")
        old = self.push("--unix", path, "--fault", fault, trial_ms="15000", program=FIXTURE,
                        new=["--tcp", "http={address}", "--unix", f"unix={path}", "--unix", f"more={added}"])  # fmt: skip
        self.assert_failed(old, "the operator changed their mind", ABORTED[fault])
        self.assert_served_by(1, old.pid, path)
        self.assertFalse(os.path.exists(added))

    @for_each(REFUSED)
    def offers_that_are_refused(self, fault: str) -> None:
        why = REFUSED[fault]
        old = self.push("--fault", fault)
        failed = self.assert_failed(old, f"refused: .*{why}")
        self.assertEqual(failed["exit"], 1)
        self.assertRegex("\n".join(failed["stderr"]), why)
        self.assert_old_is_alone(old)

    def test_truncated_fds_beyond_one_message(self) -> None:
        old = self.push("--fault", "truncated-fds", "--extra", "251")
        self.assert_failed(old, "refused: .*252 fds in a message instead of 253")

    @for_each(ABORTED)
    def manager_hears_nothing_of_an_aborted_build(self, fault: str) -> None:
        self.environment["NOTIFY_SOCKET"] = self.path("notify")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.bind(self.environment["NOTIFY_SOCKET"])
            manager.setblocking(False)
            old = self.push("--fault", fault, trial_ms="15000")
            self.assert_failed(old, "the operator changed their mind", ABORTED[fault])
            with self.assertRaises(BlockingIOError):
                manager.recv(4096)

    def test_stale_inode_starts_a_first_generation(self) -> None:
        old = self.push("--fault", "stale-inode", ready_timeout_ms="3000", new=["--listen", "127.0.0.1:0"])
        self.wait_until_child_serves(old)
        status = status_of(old.child())
        self.assertEqual(status["generation"], 1)
        self.assertNotEqual(status["listeners"][0]["address"], self.address)
        self.assert_failed(old, "silent for too long")
        self.assertTrue(old.child_has_ended())


class RustNewPulls(InteropCase):
    def start_pullable(self, *arguments: str, trial_ms: str = TRIAL_MS) -> Program:
        old = self.start(OLD_SIDE, "--listen", "127.0.0.1:0", "--control", "--trial-ms", trial_ms,
                         "--ready-timeout-ms", READY_TIMEOUT_MS, "--lifetime-s", LIFETIME_SECONDS, *arguments)  # fmt: skip
        self.address = old.log.wait("old", "listening")["address"]
        return old

    def pull(self, old: Program, *arguments: str) -> Program:
        return self.start_program(FIXTURE, "--take-over", str(old.pid), "--tcp", f"http={self.address}", *arguments,
                                  name="fixture")  # fmt: skip

    def test_good_path(self) -> None:
        old = self.start_pullable("--state", "616263")
        new = self.pull(old)
        self.assertEqual(old.exit_code(), 0)
        self.assert_served_by(2, new.pid)
        self.assertRegex(ask(self.address, "/state"), "^version=1 length=3 ")
        self.wait_until_serving(new)
        self.assertEqual(os.listdir(self.environment["HANDOVER_DIR"]), [f"{new.pid}.sock"])
        self.stop(new)

    def test_clients_come_and_go(self) -> None:
        old = self.start_pullable("--trial-ms", "500")
        with steady_clients(self.address) as answers:
            wait_until(lambda: len(answers) >= 20)
            new = self.pull(old)
            self.assertEqual(old.exit_code(), 0)
            after_exit = len(answers)
            wait_until(lambda: len(answers) >= after_exit + 20)
        self.assertEqual(set(answers), {f"gen=1 pid={old.pid}", f"gen=2 pid={new.pid}"})

    def test_refused_while_another_upgrade_is_under_way(self) -> None:
        old = self.start_pullable()
        first = self.start_puller("--pull-pid", str(old.pid), "--fault", "hang-before-ready")
        first.log.wait("new", "adopted")
        self.assert_ends_with(self.pull(old), 1, "another upgrade is under way")
        first.signal(signal.SIGTERM)
        self.assert_failed(old, "gave up: it was told to stop")

    @for_each(DIES_BEFORE_OFFER)
    def old_process_that_dies_before_its_offer_is_whole(self, fault: str) -> None:
        old = self.start_pullable("--fault", fault)
        self.assert_ends_with(self.pull(old), 1, "it died before it had handed over its listeners")
        with self.assertRaises(ConnectionRefusedError):
            connect(self.address)

    @for_each(DIES_LATER)
    def old_process_that_dies_later(self, fault: str) -> None:
        old = self.start_pullable("--fault", fault, trial_ms="15000")
        new = self.pull(old)
        self.assertEqual(old.exit_code(), FAULT_EXIT_CODE)
        self.wait_until_serving(new)
        self.assert_served_by(2, new.pid)

    @for_each(ABORTED)
    def aborts(self, fault: str) -> None:
        stage = ABORTED[fault]
        old = self.start_pullable("--fault", fault, trial_ms="15000")
        new = self.pull(old)
        self.assert_failed(old, "the operator changed their mind", stage)
        self.assertNotEqual(new.exit_code(), -signal.SIGKILL)
        self.assertEqual(os.listdir(self.environment["HANDOVER_DIR"]), [f"{old.pid}.sock"])

    @for_each(REFUSED)
    def offers_that_are_refused(self, fault: str) -> None:
        why = REFUSED[fault]
        # There is no stderr in a pull, so it takes another listener to have two fds.
        old = self.start_pullable("--fault", fault, "--extra", "1" if fault == "truncated-fds" else "0")
        new = self.pull(old)
        self.assert_failed(old, f"refused: .*{why}")
        self.assertEqual(new.exit_code(), 1)
        self.assertRegex(new.stderr(), why)


if __name__ == "__main__":
    unittest.main()
