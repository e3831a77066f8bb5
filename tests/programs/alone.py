"""The same program without handover: two processes on one listening socket, and a signal to the first by hand; or, where
it takes no socket, one after the other."""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import socket
import statistics
import subprocess
import tempfile
import unittest
from typing import List

from lab import PATIENCE_SECONDS, Oracle, connect, wait_for

PROBES = 8

# What a program loses on kept connections when it is told to stop depends on how busy the machine is: of those that wait
# for the processor all may have a request on the way. So the clients pause.
KEPT_CLIENTS = 8
KEPT_WITH_PAUSES = ("--kept", str(KEPT_CLIENTS), "--think", "2ms")


def most_by_chance(lost_alone: List[int]) -> float:
    """How many may be lost in as many rounds by a program that loses as many as this one: four times as many more as two such
    sums differ as a rule. Few rounds may happen to be alike, so they are taken to differ by a connection or two."""
    variance = max(statistics.variance(lost_alone), 2)
    return sum(lost_alone) + 4 * (2 * len(lost_alone) * variance) ** 0.5


class Alone:
    def __init__(self, case: unittest.TestCase, stop_signal: signal.Signals, *program: str) -> None:
        self.directory = tempfile.mkdtemp(prefix="handover-programs-")
        case.addCleanup(shutil.rmtree, self.directory)
        self._log = open(os.path.join(self.directory, "log"), "wb")
        case.addCleanup(self._log.close)
        self._listener = socket.create_server(("127.0.0.1", 0))
        # As the programs do that set it themselves, and as --non-blocking does for the others.
        self._listener.setblocking(False)
        case.addCleanup(self._listener.close)
        self.address = "127.0.0.1:%d" % self._listener.getsockname()[1]
        self._stop_signal = stop_signal
        self._program = [part.replace("@DIR@", self.directory) for part in program]
        self._generation = 0
        self._processes: List[subprocess.Popen[bytes]] = []
        case.addCleanup(self._end)
        self._start()

    def _start(self) -> None:
        self._generation += 1
        env = {
            **os.environ,
            "LISTEN_FDS": "1",
            "SERVER_STARTER_PORT": f"{self.address}=3",
            "HANDOVER_GENERATION": str(self._generation),
            "HANDOVER_WORKER": "0",
        }
        fd = self._listener.fileno()
        command = ["bash", "-c", f'LISTEN_PID=$$ exec "$@" 3<&{fd} {fd}<&-', "bash", *self._program]
        self._processes.append(subprocess.Popen(command, env=env, pass_fds=[fd], stdout=self._log, stderr=self._log))
        wait_for(f"{self._program} answers", self._answers)

    def _answers(self) -> bool:
        """Whether the newest does. Both accept, so several are asked at once."""
        clients = [http.client.HTTPConnection(self.address, timeout=PATIENCE_SECONDS) for _ in range(PROBES)]
        try:
            for client in clients:
                client.request("GET", "/", headers={"Connection": "close"})
            own = b"gen=%d " % self._generation
            return any([client.getresponse().read().startswith(own) for client in clients])
        finally:
            for client in clients:
                client.close()

    def replace(self) -> None:
        self._start()
        self._processes[0].send_signal(self._stop_signal)

    def wait_until_drained(self) -> None:
        self._processes.pop(0).wait(PATIENCE_SECONDS)

    def _end(self) -> None:
        for process in self._processes:
            process.send_signal(self._stop_signal)
            process.wait(PATIENCE_SECONDS)


class Restarted:
    """As it is done without us: the signal, and when it has ended a new one is started."""

    # Some never end as long as a client goes on asking on a kept connection. Most process managers kill them then.
    KILL_AFTER_SECONDS = 2.0

    def __init__(self, case: unittest.TestCase, stop_signal: signal.Signals, address: str, *program: str) -> None:
        self.directory = tempfile.mkdtemp(prefix="handover-programs-")
        case.addCleanup(shutil.rmtree, self.directory)
        self._case = case
        self._log = open(os.path.join(self.directory, "log"), "wb")
        case.addCleanup(self._log.close)
        self._stop_signal = stop_signal
        self.address = address.replace("@DIR@", self.directory)
        self.program = [part.replace("@DIR@", self.directory) for part in program]
        self._generation = 0
        self._start()
        case.addCleanup(self._stop)

    def _start(self) -> None:
        self._generation += 1
        env = {**os.environ, "HANDOVER_GENERATION": str(self._generation), "HANDOVER_WORKER": "0"}
        # Apache httpd ends its whole process group.
        self.process = subprocess.Popen(
            self.program, env=env, stdout=self._log, stderr=self._log, start_new_session=True
        )
        wait_for(f"{self.program} answers", self._answers)

    def _answers(self) -> bool:
        if self.process.poll() is not None:
            with open(self._log.name, encoding="utf-8", errors="replace") as log:
                raise AssertionError(f"{self.program} has ended: {log.read()}")
        try:
            connect(self.address).close()
        except OSError:
            return False
        return True

    def _stop(self) -> None:
        self.process.send_signal(self._stop_signal)
        try:
            self.process.wait(self.KILL_AFTER_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(PATIENCE_SECONDS)

    def replace(self) -> None:
        self._stop()
        self._start()

    def wait_until_drained(self) -> None:
        pass

    def oracle(self, *load: str) -> Oracle:
        return Oracle(self._case, self.address, *load)
