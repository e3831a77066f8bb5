"""What is said to a service manager, word by word: it need not be systemd, and not one that knows all of it."""

from __future__ import annotations

import array
import os
import queue
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
import unittest
from typing import Dict, List, NamedTuple

from lab import BIN, HANDOVER, PATIENCE_SECONDS, catches, lives, run, wait_for, who

QUIET_SECONDS = 0.5
CREDENTIALS = struct.Struct("3i")


class Message(NamedTuple):
    pid: int
    lines: Dict[str, str]
    fds: List[int]

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)


class Manager:
    """A notify socket."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.socket.bind(path)
        self.messages: "queue.Queue[Message]" = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while True:
            text, ancillary, flags, _ = self.socket.recvmsg(4096, socket.CMSG_SPACE(64) * 2)
            assert not flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC)
            pid, fds = 0, array.array("i")
            for _level, kind, data in ancillary:
                if kind == socket.SCM_CREDENTIALS:
                    pid = CREDENTIALS.unpack(data)[0]
                else:
                    fds.frombytes(data)
            lines = dict(line.split("=", 1) for line in text.decode().split("\n"))
            self.messages.put(Message(pid, lines, list(fds)))

    def next(self) -> Message:
        return self.messages.get(timeout=PATIENCE_SECONDS)

    def silent(self) -> bool:
        try:
            raise AssertionError(self.messages.get(timeout=QUIET_SECONDS))
        except queue.Empty:
            return True


class Notify(unittest.TestCase):
    def setUp(self) -> None:
        self.directory = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.directory)
        path = os.path.join(self.directory, "notify")
        self.manager = Manager(path)
        self.program = os.path.join(self.directory, "server")
        os.symlink(os.path.join(BIN, "fixture"), self.program)
        self.environment = {**os.environ, "NOTIFY_SOCKET": path, "HANDOVER_DIR": os.path.join(self.directory, "control")}

    def start(self, *options: str) -> int:
        command = [self.program, "--listen", "127.0.0.1:8080", "--trial", "200ms", *options]
        process = subprocess.Popen(command, env=self.environment, stderr=subprocess.DEVNULL)
        self.addCleanup(process.wait)
        self.last = process.pid
        self.addCleanup(self.end)
        self.assertEqual(self.manager.next(), (process.pid, {"READY": "1", "STATUS": "generation 1 serves"}, []))
        return process.pid

    def end(self) -> None:
        if lives(self.last):
            os.kill(self.last, signal.SIGKILL)
            wait_for("it ends", lambda: not lives(self.last))

    def reloading(self, pid: int, generation: int, since: int) -> None:
        """RELOADING=1 and MONOTONIC_USEC in one message is what Type=notify-reload asks for."""
        message = self.manager.next()
        self.assertEqual((message.pid, message.lines["RELOADING"]), (pid, "1"))
        self.assertEqual(message.lines["STATUS"], f"upgrading to generation {generation}")
        self.assertEqual(set(message.lines), {"RELOADING", "MONOTONIC_USEC", "STATUS"})
        self.assertTrue(since <= int(message.lines["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000)

    def upgrade(self, pid: int, generation: int, number: int = signal.SIGHUP) -> int:
        """By the signal that systemd sends for Type=notify-reload."""
        since = time.monotonic_ns() // 1000
        os.kill(pid, number)
        self.reloading(pid, generation, since)
        ready = self.manager.next()
        self.assertEqual((ready.pid, ready.lines["READY"]), (pid, "1"))
        new = self.last = int(ready.lines["MAINPID"])
        self.assertEqual(ready.lines["STATUS"], f"generation {generation} serves, generation {generation - 1} drains")
        # `ExecReload=kill -USR2 $MAINPID` must not kill it.
        self.assertTrue(catches(new, signal.SIGUSR2) and catches(new, signal.SIGTERM))
        barrier = self.manager.next()
        self.assertEqual((barrier.pid, barrier.lines, len(barrier.fds)), (pid, {"BARRIER": "1"}, 1))
        # Until the barrier is down the new process says nothing, and the old one does not exit.
        self.assertTrue(self.manager.silent())
        self.assertTrue(lives(pid))
        barrier.close()
        told = self.manager.next()
        self.assertEqual((told.pid, told.lines["READY"]), (new, "1"))
        self.assertTrue(told.lines["STATUS"].startswith(f"generation {generation} serves"), told)
        wait_for("the old process ends", lambda: not lives(pid))
        return new

    def test_a_start_that_takes_long(self) -> None:
        self.environment["FIXTURE_FAULT"] = "still-starting=2"
        command = [self.program, "--listen", "127.0.0.1:8080", "--ready-timeout", "7s"]
        process = subprocess.Popen(command, env=self.environment, stderr=subprocess.DEVNULL)
        self.addCleanup(process.wait)
        self.last = process.pid
        self.addCleanup(self.end)
        for step in (1, 2):
            lines = {"EXTEND_TIMEOUT_USEC": "7000000", "STATUS": f"generation 1 starts: step {step}"}
            self.assertEqual(self.manager.next(), (process.pid, lines, []))
        self.assertEqual(self.manager.next().lines["READY"], "1")

    def test_an_upgrade_and_a_stop(self) -> None:
        pid = self.start()
        for generation in (2, 3):
            new = self.upgrade(pid, generation)
            # That the older one is gone is told by the new one: STOPPING=1 by nobody.
            message = self.manager.next()
            self.assertEqual(message, (new, {"STATUS": f"generation {generation} serves"}, []))
            self.assertTrue(self.manager.silent())
            pid = new
        os.kill(pid, signal.SIGTERM)
        self.assertEqual(self.manager.next(), (pid, {"STOPPING": "1", "STATUS": "draining 0 connections"}, []))
        wait_for("it ends", lambda: not lives(pid))
        self.assertTrue(self.manager.silent())

    def test_an_upgrade_that_fails(self) -> None:
        pid = self.start()
        os.unlink(self.program)
        with open(self.program, "w", encoding="utf-8") as script:
            script.write("#!/bin/sh\nexit 1\n")
        os.chmod(self.program, 0o755)
        since = time.monotonic_ns() // 1000
        os.kill(pid, signal.SIGHUP)
        self.reloading(pid, 2, since)
        failed = self.manager.next()
        self.assertEqual((failed.pid, failed.lines["READY"]), (pid, "1"))
        self.assertRegex(failed.lines["STATUS"], "^generation 1 serves; the last upgrade failed: the new build exited")
        self.assertTrue(self.manager.silent())
        self.assertEqual(who(), (1, pid))

    def test_a_manager_that_does_not_answer_the_barrier(self) -> None:
        pid = self.start()
        begun = time.monotonic()
        os.kill(pid, signal.SIGUSR2)
        messages = [self.manager.next() for _ in range(3)]
        self.last = int(messages[1].lines["MAINPID"])
        told = self.manager.next()
        self.assertEqual(told.pid, self.last)
        self.assertTrue(1.5 < time.monotonic() - begun < PATIENCE_SECONDS)
        messages[2].close()
        self.assertEqual(who(), (2, self.last))

    def test_a_refused_upgrade_by_signal(self) -> None:
        """systemd waits for an answer to its signal."""
        pid = self.start("--max-draining", "0")
        since = time.monotonic_ns() // 1000
        os.kill(pid, signal.SIGHUP)
        self.reloading(pid, 2, since)
        refused = self.manager.next()
        self.assertEqual(refused.lines["READY"], "1")
        self.assertIn("older generations", refused.lines["STATUS"])

    def test_a_second_signal_during_an_upgrade(self) -> None:
        """The end of the one under way answers both."""
        pid = self.start("--trial", "2s")
        os.kill(pid, signal.SIGHUP)
        self.reloading(pid, 2, 0)
        since = time.monotonic_ns() // 1000
        os.kill(pid, signal.SIGHUP)
        self.reloading(pid, 2, since)
        ready = self.manager.next()
        self.last = int(ready.lines["MAINPID"])
        self.assertEqual(ready.lines["READY"], "1")
        self.manager.next().close()

    def test_listeners_for_the_store(self) -> None:
        self.start("--fd-store", "true")
        message = self.manager.next()
        self.assertEqual((message.lines, len(message.fds)), ({"FDSTORE": "1", "FDNAME": "handover.http"}, 1))
        message.close()

    def test_a_manager_that_does_not_read(self) -> None:
        """Each listener is a message, and each could wait for it."""
        room = int(run("sysctl", "-n", "net.unix.max_dgram_qlen").stdout)
        self.environment["NOTIFY_SOCKET"] = os.path.join(self.directory, "deaf")
        deaf = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.addCleanup(deaf.close)
        deaf.bind(self.environment["NOTIFY_SOCKET"])
        listeners = [f"--tcp=l{number}=127.0.0.1:0".split("=", 1) for number in range(room + 80)]
        command = [self.program, "--listen", "127.0.0.1:8080", "--fd-store", "true", *sum(listeners, [])]
        process = subprocess.Popen(command, env=self.environment, stderr=subprocess.DEVNULL)
        self.addCleanup(process.wait)
        self.last = process.pid
        self.addCleanup(self.end)
        control = os.path.join(self.directory, "control", f"{process.pid}.sock")
        status = [HANDOVER, "status", "--socket", control]
        wait_for("it serves", lambda: os.path.exists(control) and who() == (1, process.pid))
        begun = time.monotonic()
        self.assertEqual(subprocess.run(status, capture_output=True).returncode, 0)
        self.assertLess(time.monotonic() - begun, 9)

    def test_a_watchdog_of_somebody_else(self) -> None:
        self.environment.update(WATCHDOG_USEC="100000", WATCHDOG_PID="1")
        self.start("--watchdog", "true")
        self.assertTrue(self.manager.silent())

    def test_a_socket_that_nobody_listens_on(self) -> None:
        self.environment["NOTIFY_SOCKET"] = os.path.join(self.directory, "nobody")
        command = [self.program, "--listen", "127.0.0.1:8080", "--trial", "200ms"]
        process = subprocess.Popen(command, env=self.environment, stderr=subprocess.DEVNULL)
        self.addCleanup(process.wait)
        self.last = process.pid
        self.addCleanup(self.end)
        control = os.path.join(self.directory, "control", f"{process.pid}.sock")
        wait_for("it serves", lambda: subprocess.run([HANDOVER, "status", "--socket", control], capture_output=True).returncode == 0)
        run(HANDOVER, "stop", "--pid", str(process.pid))


if __name__ == "__main__":
    unittest.main()
