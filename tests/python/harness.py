"""What tests need that run whole processes: starting and ending them, their stages, and clients."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence

HERE = os.path.dirname(os.path.abspath(__file__))
OLD_SIDE = os.path.join(HERE, "old_side.py")
NEW_SIDE = os.path.join(HERE, "new_side.py")
PATIENCE_SECONDS = 15.0
LIFETIME_SECONDS = "60"
# Where a deadline is not what is tested it is generous, since other work may slow the machine down.
READY_TIMEOUT_MS = "15000"
TRIAL_MS = "250"
LONG_TRIAL = ("--trial-ms", "10000")
PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans(adopt: bool) -> None:
    """New processes outlive the old ones that spawned them; they are to come to this process to be reaped."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(adopt), 0, 0, 0)


class StageLog:
    """The lines of JSON that a process and its children write, waited for with a deadline."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._changed = threading.Condition()
        self._stages: List[Dict[str, Any]] = []
        self._ended = False
        self.pidfds: Dict[int, int] = {}
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        for line in self._pipe:
            stage = json.loads(line)
            with self._changed:
                if stage["stage"] == "spawned":
                    # Held from the start, so that no later process of the same pid is meant.
                    self._hold(stage["child"])
                self._stages.append(stage)
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _hold(self, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.pidfds[pid] = os.pidfd_open(pid)

    def seen(self) -> List[Dict[str, Any]]:
        with self._changed:
            return list(self._stages)

    def find(self, side: str, *names: str) -> Optional[Dict[str, Any]]:
        return next((s for s in self._stages if s["side"] == side and s["stage"] in names), None)

    def wait(self, side: str, *names: str) -> Dict[str, Any]:
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self.find(side, *names), PATIENCE_SECONDS)
            found = self.find(side, *names)
            if found is None:
                raise AssertionError(f"no stage {names} of the {side} side came; there were {self._stages}")
            return found

    def close(self) -> None:
        self._thread.join(PATIENCE_SECONDS)
        self._pipe.close()
        for pidfd in self.pidfds.values():
            os.close(pidfd)


class Program:
    def __init__(self, command: List[str], environment: Dict[str, str], stderr_path: str) -> None:
        self.stderr_path = stderr_path
        with open(stderr_path, "ab") as stderr:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
            )
        self.log = StageLog(self.process.stdout)

    @property
    def pid(self) -> int:
        return self.process.pid

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def exit_code(self) -> int:
        return self.process.wait(PATIENCE_SECONDS)

    def stderr(self) -> str:
        with open(self.stderr_path, encoding="utf-8") as file:
            return file.read()

    def child(self) -> int:
        return self.log.wait("old", "spawned")["child"]

    def child_has_ended(self) -> bool:
        return has_ended(self.log.pidfds.get(self.child()), PATIENCE_SECONDS)

    def child_is_running(self) -> bool:
        return not has_ended(self.log.pidfds.get(self.child()), 0)

    def terminate_child(self) -> None:
        signal.pidfd_send_signal(self.log.pidfds[self.child()], signal.SIGTERM)

    def clean_up(self) -> None:
        self.process.kill()
        self.process.wait()
        for pid, pidfd in self.log.pidfds.items():
            kill_orphan(pid, pidfd)
        self.log.close()


def kill_orphan(pid: int, pidfd: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    has_ended(pidfd, PATIENCE_SECONDS)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)


def has_ended(pidfd: Optional[int], seconds: float) -> bool:
    return pidfd is None or bool(select.select([pidfd], [], [], seconds)[0])


def connect(address: str) -> socket.socket:
    if "/" in address:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(PATIENCE_SECONDS)
        sock.connect(address)
        return sock
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), PATIENCE_SECONDS)


def send_request(connection: socket.socket, path: str = "/") -> None:
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n".encode("ascii"))


def read_answer(connection: socket.socket) -> str:
    data = b""
    while True:
        chunk = connection.recv(4096)
        if not chunk:
            break
        data += chunk
    head, _, body = data.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise AssertionError(f"the answer is {data!r}")
    return body.decode("utf-8")


def ask(address: str, path: str = "/") -> str:
    with connect(address) as connection:
        send_request(connection, path)
        return read_answer(connection)


class ProcessCase(unittest.TestCase):
    def setUp(self) -> None:
        self.directory = tempfile.mkdtemp(prefix="handover-test-")
        self.addCleanup(shutil.rmtree, self.directory)
        self.started = 0
        self.environment = {"HANDOVER_DIR": os.path.join(self.directory, "control"), "NEW_SIDE_FAULT": ""}

    def path(self, name: str) -> str:
        return os.path.join(self.directory, name)

    def start(self, *arguments: str) -> Program:
        return self.start_program(sys.executable, *arguments, name=os.path.basename(arguments[0]))

    def start_program(self, *command: str, name: str) -> Program:
        self.started += 1
        program = Program(list(command), self.environment, self.path(f"{name}-{self.started}.stderr"))
        self.addCleanup(program.clean_up)
        return program

    def start_old(self, *arguments: str, new: Sequence[str] = (), now: bool = True) -> Program:
        old = self.start(OLD_SIDE, "--listen", "127.0.0.1:0", *(["--now"] if now else []),
                         "--ready-timeout-ms", READY_TIMEOUT_MS, "--trial-ms", TRIAL_MS,
                         "--lifetime-s", LIFETIME_SECONDS, *arguments,
                         "--", sys.executable, NEW_SIDE, "--lifetime-s", LIFETIME_SECONDS, *new)  # fmt: skip
        self.address = old.log.wait("old", "listening")["address"]
        return old

    def start_puller(self, *arguments: str) -> Program:
        return self.start(NEW_SIDE, "--lifetime-s", LIFETIME_SECONDS, *arguments)

    def assert_served_by(self, generation: int, pid: int, address: Optional[str] = None) -> None:
        self.assertEqual(ask(address or self.address), f"gen={generation} pid={pid}")

    def assert_old_serves(self, old: Program) -> None:
        self.assert_served_by(1, old.pid)
        self.assertIsNone(old.process.poll())

    def assert_handed_over(self, old: Program) -> None:
        last = old.log.wait("old", "drained", "failed", "rolled-back")
        self.assertEqual(last["stage"], "drained", last)
        self.assertEqual(old.exit_code(), 0)
        self.assert_served_by(2, old.child())

    def assert_failed(self, old: Program, why: str, stage: str = "failed") -> Dict[str, Any]:
        failed = old.log.wait("old", "failed", "rolled-back", "healthy")
        self.assertEqual(failed["stage"], stage, failed)
        self.assertRegex(failed["reason"], why)
        self.assert_old_serves(old)
        return failed


@contextlib.contextmanager
def steady_clients(address: str) -> Iterator[List[str]]:
    """One client after the other until the block ends; what went wrong is among the answers."""
    answers: List[str] = []
    done = threading.Event()

    def run() -> None:
        while not done.wait(0.002):
            try:
                answers.append(ask(address))
            except (OSError, AssertionError) as error:
                answers.append(f"failed: {error!r}")

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield answers
    finally:
        done.set()
        thread.join(PATIENCE_SECONDS)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError("the condition did not become true in time")
        time.sleep(0.005)
