"""Programs under `handover exec`, and the load client on them."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import unittest
from typing import Any, Callable, Dict, List, Optional, Set

import connections

HERE = os.path.dirname(os.path.abspath(__file__))
BIN = os.environ["HANDOVER_BIN"]
HANDOVER = os.path.join(BIN, "handover")
ORACLE = os.path.join(BIN, "examples", "oracle")
# What scripts/test.sh has put there: gunicorn, Express, the Go server.
BUILT = os.environ["HANDOVER_PROGRAMS"]
PATIENCE_SECONDS = 60.0
MAX_DRAINING = 4
in_ci = os.environ.get("CI") == "true"


def program(name: str) -> str:
    return os.path.join(HERE, name)


def built(name: str) -> str:
    return os.path.join(BUILT, name)


def needs(path: str) -> Callable[[Any], Any]:
    """For a test of a program that is elsewhere than here perhaps not installed."""
    return unittest.skipUnless(in_ci or shutil.which(path) or os.path.exists(path), f"{path} is not there")


def wait_for(what: str, condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"in vain: {what}")
        time.sleep(0.01)


class Oracle:
    """Load, and at its end how every request ended."""

    def __init__(self, case: unittest.TestCase, address: str, *load: str) -> None:
        command = [ORACLE, "--target", address, *load, "--json"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        case.addCleanup(self._end)

    def _end(self) -> None:
        self._process.kill()
        self._process.communicate()

    def is_accepted(self, count: int) -> bool:
        return connections.accepted_of(self._process.pid) == count

    def finish(self) -> Dict[str, Any]:
        """The report of a load that ends by itself."""
        out, _ = self._process.communicate(timeout=PATIENCE_SECONDS)
        return json.loads(out)

    def stop(self) -> Dict[str, Any]:
        self._process.terminate()
        return self.finish()


class Supervised:
    """A service of `handover exec`."""

    LISTEN = ["--listen", "127.0.0.1:0"]

    def __init__(
        self,
        case: unittest.TestCase,
        options: List[str],
        *program: str,
        env: Dict[str, str] = {},
        streams: Optional[int] = None,
    ) -> None:
        self.case = case
        self.directory = tempfile.mkdtemp(prefix="handover-programs-")
        self.env = {**os.environ, "HANDOVER_DIR": os.path.join(self.directory, "control"), **env}
        command = [HANDOVER, "exec", *self.LISTEN, "--trial", "100ms", *options, "--", *program]
        command = [part.replace("@DIR@", self.directory) for part in command]
        self.log = open(os.path.join(self.directory, "log"), "w+", encoding="utf-8")
        self.process = subprocess.Popen(command, env=self.env, stdout=streams or self.log, stderr=streams or self.log)
        case.addCleanup(self._remove)
        wait_for(f"{program} serves", self._serves)
        self.address = self.status()["listeners"][0]["address"]

    def _serves(self) -> bool:
        if self.process.poll() is not None:
            raise AssertionError(f"it ended: {self.written()}")
        done = self.ask("status", "--json")
        return done.returncode == 0 and json.loads(done.stdout)["state"] == "serving"

    def written(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def _remove(self) -> None:
        for _ in range(2):
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGTERM)
                time.sleep(0.1)
        self.process.wait(PATIENCE_SECONDS)
        self.log.close()
        shutil.rmtree(self.directory)

    def ask(self, verb: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [HANDOVER, verb, "--pid", str(self.process.pid), *arguments]
        return subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=2 * PATIENCE_SECONDS)

    def status(self) -> Dict[str, Any]:
        return json.loads(self.ask("status", "--json").stdout)

    def draining(self) -> Set[int]:
        return {generation["generation"] for generation in self.status()["draining"]}

    def wait_until_drained(self) -> None:
        wait_for("older generations end", lambda: not self.draining())

    def may_upgrade(self) -> None:
        wait_for("not too many drain", lambda: len(self.draining()) < MAX_DRAINING)

    def upgrade(self, *arguments: str) -> None:
        self.may_upgrade()
        done = self.ask("upgrade", *arguments)
        self.case.assertEqual(done.returncode, 0, done.stdout + done.stderr + self.written())

    def replace(self) -> None:
        self.upgrade()

    def oracle(self, *load: str) -> Oracle:
        return Oracle(self.case, self.address, *load)

    def in_flight(self, seconds: float) -> Oracle:
        """Two requests that take so long, and that the program has accepted."""
        oracle = self.oracle("--slow", f"2:{seconds}", "--requests", "2")
        wait_for("requests in flight", lambda: oracle.is_accepted(2))
        return oracle


class Intercepted(Supervised):
    """One whose program binds its sockets by itself."""

    LISTEN = []

    def cookies(self) -> Dict[str, int]:
        return {listener["address"]: listener["cookie"] for listener in self.status()["listeners"]}


def free_port(among: range = range(10000, 30000)) -> int:
    """One that no client is given meanwhile: those of the kernel's choice are higher."""
    while True:
        port = random.choice(among)
        with socket.socket(socket.AF_INET6) as probe:
            try:
                probe.bind(("::", port))
                return port
            except OSError:
                pass


def connect(address: str) -> socket.socket:
    """To HOST:PORT, or to the path of a Unix socket."""
    if address.startswith("/"):
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(PATIENCE_SECONDS)
        try:
            client.connect(address)
        except OSError:
            client.close()
            raise
        return client
    host, port = address.rsplit(":", 1)
    return socket.create_connection((host.strip("[]"), int(port)), PATIENCE_SECONDS)
