"""Services under the systemd that is process 1 here: scripts/systemd-test.sh starts it, and these tests inside."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
import unittest
from typing import Any, Callable, Dict, Iterator, List, Optional, Set, Tuple

LAB = os.environ["HANDOVER_LAB"]
BIN = os.path.join(LAB, "bin")
HANDOVER = os.path.join(BIN, "handover")
PAGE = os.path.join(LAB, "docs", "systemd.md")
UNITS = os.path.join(LAB, "units")
WANTED = os.path.join(UNITS, "mini.target.wants")
PORT = 8080
# Generous, since other work may slow the machine down; what passes takes a fraction of it.
PATIENCE_SECONDS = 30.0


def run(*command: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * PATIENCE_SECONDS)
    if check and done.returncode != 0:
        raise AssertionError(f"{' '.join(command)}: exit {done.returncode}: {done.stdout}{done.stderr}")
    return done


def wait_for(what: str, condition: Callable[[], Any], seconds: float = PATIENCE_SECONDS) -> Any:
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what}")
        time.sleep(0.01)


def units_of_page(name: str = PAGE) -> Dict[str, Tuple[str, str]]:
    """The fenced `ini` blocks of docs/systemd.md, or of another page, by their names: file name and text. A first line
    `# NAME: FILE` names one."""
    with open(name, encoding="utf-8") as page:
        blocks = re.findall(r"^```ini\n# ([\w-]+): (\S+)\n(.*?)^```$", page.read(), re.MULTILINE | re.DOTALL)
    return {name: (file, text) for name, file, text in blocks}


def lives(pid: int) -> bool:
    """Any of its threads, which have its sockets: the main thread may end first."""
    with contextlib.suppress(FileNotFoundError):
        return bool(states(pid) - {"Z", "X"})
    return False


def catches(pid: int, number: int) -> bool:
    """Whether it has a handler for a signal."""
    with open(f"/proc/{pid}/status", encoding="ascii") as status:
        masks = dict(line.split(":", 1) for line in status)
    return bool(int(masks["SigCgt"], 16) >> (number - 1) & 1)


def states(pid: int) -> Set[str]:
    """Of its threads."""
    found = set()
    for thread in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{thread}/stat", encoding="ascii") as stat:
            found.add(stat.read().rpartition(")")[2].split()[0])
    return found


def get(path: str = "/", port: int = PORT, seconds: float = PATIENCE_SECONDS) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=seconds)
    try:
        connection.request("GET", path, headers={"Connection": "close"})
        return connection.getresponse().read().decode()
    finally:
        connection.close()


def who(port: int = PORT) -> Tuple[int, int]:
    """Generation and pid of whoever answers."""
    found = re.fullmatch(r"gen=(\d+) pid=(\d+)", get("/", port))
    assert found, "not an answer of ours"
    return int(found[1]), int(found[2])


class InFlight:
    """A request that takes its time, in a thread."""

    def __init__(self, seconds: float, port: int = PORT) -> None:
        self.answer: Optional[str] = None
        self.error: Optional[Exception] = None
        self._thread = threading.Thread(target=self._ask, args=(seconds, port), daemon=True)
        self._thread.start()

    def _ask(self, seconds: float, port: int) -> None:
        try:
            self.answer = get(f"/slow/{seconds}", port)
        except (OSError, http.client.HTTPException) as error:
            self.error = error

    def end(self) -> "InFlight":
        self._thread.join(PATIENCE_SECONDS)
        assert not self._thread.is_alive(), "the request does not end"
        return self


class Oracle:
    """The load client; its report at the end."""

    def __init__(self, case: unittest.TestCase, *load: str, port: int = PORT) -> None:
        command = [os.path.join(BIN, "oracle"), "--target", f"127.0.0.1:{port}", *load, "--json"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        case.addCleanup(self._end)

    def _end(self) -> None:
        self._process.kill()
        self._process.communicate()

    def stop(self) -> Dict[str, Any]:
        self._process.terminate()
        out, error = self._process.communicate(timeout=2 * PATIENCE_SECONDS)
        assert out, error
        return json.loads(out)


class Service:
    """A unit, its program and its directory."""

    def __init__(self, case: unittest.TestCase, name: str) -> None:
        self.case, self.name = case, name
        self.unit = f"{name}.service"
        self.directory = os.path.join(LAB, "srv", name)
        os.makedirs(self.directory)
        self.program = os.path.join(self.directory, "server")
        self.files: List[str] = []
        self.install("fixture")
        case.addCleanup(self._remove)

    def _remove(self) -> None:
        for file in self.files:
            run("systemctl", "stop", "--no-block", os.path.basename(file), check=False)
        for file in self.files:
            unit = os.path.basename(file)
            end = time.monotonic() + 5
            while self.show("ActiveState", unit) not in ("inactive", "failed") and time.monotonic() < end:
                time.sleep(0.01)
            run("systemctl", "kill", "--signal=KILL", unit, check=False)
            wait_for(f"{unit} ends", lambda unit=unit: self.show("ActiveState", unit) in ("inactive", "failed"))
            run("systemctl", "reset-failed", unit, check=False)
            os.unlink(file)
            os.unlink(os.path.join(WANTED, unit))
        shutil.rmtree(self.directory)
        run("systemctl", "daemon-reload")

    def install(self, program: str) -> None:
        """Puts a new build in place, as one should: at once."""
        self._put(lambda path: os.symlink(os.path.join(BIN, program), path))

    def install_script(self, text: str) -> None:
        def write(path: str) -> None:
            with open(path, "w", encoding="utf-8") as script:
                script.write("#!/bin/sh\n" + text)
            os.chmod(path, 0o755)

        self._put(write)

    def install_with_fault(self, fault: str, program: str = "fixture") -> None:
        self.install_script(f"FIXTURE_FAULT={fault} exec {os.path.join(BIN, program)} \"$@\"\n")

    def _put(self, make: Callable[[str], None]) -> None:
        beside = self.program + ".new"
        make(beside)
        os.rename(beside, self.program)

    def write(self, text: str, file: Optional[str] = None) -> None:
        path = os.path.join(UNITS, file or self.unit)
        with open(path, "w", encoding="utf-8") as unit:
            unit.write(text)
        if path not in self.files:
            self.files.append(path)
            # systemd forgets how a unit has ended well, unless another one names it.
            os.symlink(path, os.path.join(WANTED, os.path.basename(path)))

    def write_from_page(self, block: str, *changes: Tuple[str, str], options: str = "") -> None:
        """The unit as docs/systemd.md has it, with paths of the lab."""
        file, text = units_of_page()[block]
        text = text.replace("/srv/app/server", self.program).replace("/usr/local/bin/handover", HANDOVER)
        if options:
            text = re.sub(r"^(ExecStart=.*)$", rf"\1 {options}", text, flags=re.MULTILINE)
        for old, new in changes:
            assert old in text, f"{block} has no {old}"
            text = text.replace(old, new)
        self.write(text, file.replace("app", self.name, 1))

    def start(self, unit: Optional[str] = None) -> None:
        run("systemctl", "daemon-reload")
        started = run("systemctl", "start", unit or self.unit, check=False)
        assert started.returncode == 0, f"{started.stderr}{self.journal()}"

    def reload(self) -> "subprocess.CompletedProcess[str]":
        return run("systemctl", "reload", self.unit, check=False)

    def reload_well(self) -> None:
        reloaded = self.reload()
        self.case.assertEqual(reloaded.returncode, 0, self.journal())

    def stop(self) -> None:
        run("systemctl", "stop", self.unit)

    def show(self, name: str, unit: Optional[str] = None) -> str:
        return run("systemctl", "show", "--property", name, "--value", unit or self.unit).stdout.strip()

    def main_pid(self) -> int:
        return int(self.show("MainPID"))

    def status(self) -> Dict[str, Any]:
        return json.loads(run(HANDOVER, "status", "--pid", str(self.main_pid()), "--json").stdout)

    def cookies(self) -> Dict[str, int]:
        return {one["name"]: one["cookie"] for one in self.status()["listeners"]}

    def journal(self) -> str:
        run("journalctl", "--sync")
        return run("journalctl", "--unit", self.unit, "--output=cat", "--no-pager").stdout

    def processes(self) -> List[int]:
        group = self.show("ControlGroup")
        with contextlib.suppress(OSError):
            with open(f"/sys/fs/cgroup{group}/cgroup.procs", encoding="ascii") as procs:
                return [int(line) for line in procs]
        return []

    def is_up(self) -> bool:
        return self.show("ActiveState") == "active" and self.show("SubState") == "running"


class ServiceCase(unittest.TestCase):
    maxDiff = None
    count = 0

    def service(self) -> Service:
        ServiceCase.count += 1
        return Service(self, f"app{ServiceCase.count}")

    def started(self, block: str, *changes: Tuple[str, str], options: str = "--trial 300ms") -> Service:
        service = self.service()
        service.write_from_page(block, *changes, options=options)
        service.start()
        return service

    @contextlib.contextmanager
    def watched(self, service: Service) -> Iterator[List[Tuple[str, ...]]]:
        """Every state that the unit is seen in meanwhile: ActiveState, MainPID and whether that process lives."""
        seen: List[Tuple[str, ...]] = []
        over = threading.Event()

        def watch() -> None:
            while not over.is_set():
                shown = run("systemctl", "show", "--property=ActiveState,MainPID,NRestarts", service.unit).stdout
                fields = dict(line.split("=", 1) for line in shown.splitlines())
                pid = int(fields["MainPID"])
                # It may have gone since; then systemd must know of another by now.
                good = lives(pid) or service.main_pid() not in (0, pid)
                seen.append((fields["ActiveState"], fields["NRestarts"], "lives" if good else f"{pid} is gone"))

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield seen
        finally:
            over.set()
            thread.join()

    def kill(self, pid: int, number: int = signal.SIGKILL) -> None:
        os.kill(pid, number)

    def freeze(self, pid: int) -> None:
        """Returns when no thread of it runs any more."""
        os.kill(pid, signal.SIGSTOP)
        wait_for("it is stopped", lambda: states(pid) == {"T"})


def queue_of(port: int = PORT, count: int = 1) -> List[socket.socket]:
    """Clients that have asked, whether or not anybody has accepted them."""
    clients = []
    for _ in range(count):
        client = socket.create_connection(("127.0.0.1", port), PATIENCE_SECONDS)
        client.sendall(b"GET / HTTP/1.1\r\nHost: lab\r\nConnection: close\r\n\r\n")
        clients.append(client)
    return clients


def answer_of(client: socket.socket) -> bytes:
    with client:
        return b"".join(iter(lambda: client.recv(65536), b""))
