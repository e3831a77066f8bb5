"""The modules by themselves, as Ansible runs them on a machine, and without one."""

from __future__ import annotations

import csv
import functools
import json
import os
import shutil
import socket
import subprocess
import tempfile
import unittest
from typing import Any, Dict

from base import BIN, LAB, run, wait_for, write

LIBRARY = os.path.abspath("scripts/ansible/roles/handover/library")


@functools.lru_cache(maxsize=None)
def python() -> str:
    """The one that knows of Ansible, which need not be this one."""
    book = shutil.which("ansible-playbook")
    assert book
    with open(book, encoding="utf-8") as file:
        return file.readline().lstrip("#!").strip()


def module(which: str, **parameters: Any) -> Dict[str, Any]:
    """What it answers."""
    done = run(python(), f"{LIBRARY}/{which}.py", check=False, input=json.dumps({"ANSIBLE_MODULE_ARGS": parameters}))
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


class Case(unittest.TestCase):
    def setUp(self) -> None:
        self.directory = tempfile.mkdtemp(dir=LAB)

    def file(self, name: str, text: str, mode: int = 0o644) -> str:
        return write(os.path.join(self.directory, name), text, mode)


class Release(Case):
    def test_why_no_service_was_found_is_told(self) -> None:
        with subprocess.Popen("true") as ended:
            pass
        answer = module("handover_release", root=self.directory, release="1", handover=f"{BIN}/handover",
                        pid_file=self.file("pid", f"{ended.pid}\n"))
        self.assertTrue(answer.get("failed"), answer)
        self.assertIn("there is no such process", answer["msg"])

    def test_why_an_upgrade_was_not_begun_is_told(self) -> None:
        status = {"generation": 1, "pid": 1, "state": "serving", "build": {"path": "/old", "device": 0, "inode": 0}}
        command = self.file("handover", f"""#!/bin/sh
case $1 in
    status) echo '{json.dumps(status)}' ;;
    upgrade) echo '{{"event":"error","exit_code":4,"message":"two is too many"}}'; exit 4 ;;
esac
""", 0o755)
        self.file("releases/1/server", "")
        answer = module("handover_release", root=self.directory, release="1", program="server", name="app",
                        handover=command)
        self.assertTrue(answer.get("failed"), answer)
        self.assertRegex(answer["msg"], "^two is too many\nThe link is back")


# Logs how it is called; a reload ends as the line behind this has it.
NGINX = """#!/bin/sh
echo "$*" >>"$0.log"
test "$*" = "-s reload" || exit 0
"""


class Nginx(Case):
    """The file that marks its servers, and a fake command."""

    def setUp(self) -> None:
        super().setUp()
        self.upstream = self.file("upstream", "upstream app {\n    server 10.0.0.1:80;\n}\n")
        # A process with no child that is called a worker: there is none to wait for.
        self.pid_file = self.file("pid", f"{os.getpid()}\n")

    def text(self) -> str:
        with open(self.upstream, encoding="utf-8") as file:
            return file.read()

    def play(self, state: str, reload: str, file: str = "") -> Dict[str, Any]:
        """And how a reload ends then."""
        command = self.file("nginx", f"{NGINX}{reload}\n", 0o755)
        return module("handover_balancer", kind="nginx", state=state, server="10.0.0.1:80", timeout=1,
                      file=file or self.upstream, command=[command], pid_file=self.pid_file)

    def reloads(self) -> int:
        with open(f"{self.directory}/nginx.log", encoding="utf-8") as file:
            return file.read().count("-s reload")

    def test_a_reload_that_fails_leaves_the_file_as_it_was(self) -> None:
        before = self.text()
        answer = self.play("drained", "echo no such process; exit 1")
        self.assertIn("no such process", answer["msg"])
        self.assertEqual(self.text(), before)
        self.assertTrue(self.play("drained", "exit 0")["changed"])
        self.assertIn("server 10.0.0.1:80 down;", self.text())

        answer = self.play("serving", "exit 1")
        self.assertTrue(answer.get("failed"), answer)
        self.assertRegex(answer["msg"], "nginx -s reload: exit 1$")
        self.assertTrue(self.play("serving", "exit 0")["changed"])
        self.assertEqual(self.text(), before)

    def test_a_reload_that_is_late_is_followed_by_one_with_the_file_as_it_was(self) -> None:
        before = self.text()
        worker = subprocess.Popen(["bash", "-c", "exec -a 'nginx: worker process' sleep 60"])
        self.addCleanup(worker.wait)
        self.addCleanup(worker.kill)
        title = f"/proc/{worker.pid}/cmdline"
        wait_for("it is called so", lambda: run("cat", title).stdout.startswith("nginx"))
        answer = self.play("drained", "exit 0")
        self.assertIn("has not taken its configuration", answer["msg"])
        self.assertEqual((self.text(), self.reloads()), (before, 2))

    def test_one_that_is_killed_before_the_reload_is_not_taken_for_done(self) -> None:
        with self.assertRaises(AssertionError, msg="no answer"):
            self.play("drained", "kill -9 $PPID")
        self.assertIn("server 10.0.0.1:80 down;", self.text())
        for changed in (True, False):
            self.assertEqual(self.play("drained", "exit 0")["changed"], changed)
        self.assertEqual(self.reloads(), 2)

    def test_a_link_to_the_file_stays_a_link(self) -> None:
        link = f"{self.directory}/enabled"
        os.symlink("upstream", link)
        self.assertTrue(self.play("drained", "exit 0", file=link)["changed"])
        self.assertTrue(os.path.islink(link))
        self.assertIn("server 10.0.0.1:80 down;", self.text())


class Haproxy(Case):
    """A real one, whose servers nobody is at first: its health checks fail."""

    def setUp(self) -> None:
        super().setUp()
        self.socket = f"{self.directory}/socket"
        self.server = socket.socket()
        self.addCleanup(self.server.close)
        self.server.bind(("127.0.0.1", 0))
        configuration = self.file("configuration", f"""global
    stats socket {self.socket} level admin
defaults
    mode http
    timeout connect 1s
    timeout client 1s
    timeout server 1s
backend app
    server web1 127.0.0.1:{self.server.getsockname()[1]} check inter 50ms rise 40
    server web2 127.0.0.1:1 check inter 50ms disabled
""")
        process = subprocess.Popen(["haproxy", "-db", "-f", configuration], stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        wait_for("HAProxy serves", lambda: os.path.exists(self.socket))

    def ask(self, command: str) -> str:
        with socket.socket(socket.AF_UNIX) as stream:
            stream.connect(self.socket)
            stream.sendall(command.encode() + b"\n")
            return b"".join(iter(lambda: stream.recv(65536), b"")).decode()

    def status(self, server: str = "web1") -> str:
        rows = csv.DictReader(self.ask("show stat").lstrip("# ").splitlines())
        return next(row["status"] for row in rows if row["svname"] == server)

    def is_drained(self) -> bool:
        """By the flag itself, which the status does not show while the server is down."""
        head, row = [line.split() for line in self.ask("show servers state app").splitlines()[1:3]]
        return bool(int(row[head.index("srv_admin_state") - 1]) & 0x08)

    def play(self, state: str, server: str = "web1", **more: Any) -> Dict[str, Any]:
        return module("handover_balancer", kind="haproxy", state=state, server=f"app/{server}", file=self.socket,
                      **more)

    def test_a_server_that_is_down_is_put_back(self) -> None:
        wait_for("it is down", lambda: self.status() == "DOWN")
        for state, drained in (("drained", True), ("serving", False)):
            self.assertTrue(self.play(state, _ansible_check_mode=True)["changed"])
            self.assertEqual(self.is_drained(), not drained)
            answer = self.play(state, timeout=1)
            self.assertEqual((answer["changed"], answer.get("failed", False)), (True, not drained), answer)
            self.assertEqual((self.status(), self.is_drained()), ("DOWN", drained))
            self.assertFalse(self.play(state, timeout=1)["changed"])
        self.assertIn("HAProxy calls it down", answer["msg"])

    def test_it_serves_when_haproxy_says_so(self) -> None:
        wait_for("it is down", lambda: self.status() == "DOWN")
        self.assertTrue(self.play("drained")["changed"])
        self.server.listen(64)
        # Its health checks take two seconds to say that it is up.
        self.assertTrue(self.play("serving")["changed"])
        self.assertEqual(self.status(), "UP")

    def test_a_server_in_maintenance_is_left_there(self) -> None:
        self.ask("set server app/web1 state maint")
        for server in ("web1", "web2"):
            for state in ("drained", "serving"):
                answer = self.play(state, server)
                self.assertTrue(answer.get("failed"), answer)
                self.assertIn("is in maintenance", answer["msg"])
            self.assertEqual(self.status(server), "MAINT")

    def test_a_server_that_is_not_there_is_told(self) -> None:
        for server, of in (("web7", "app"), ("web1", "other")):
            answer = module("handover_balancer", kind="haproxy", state="drained", server=f"{of}/{server}",
                            file=self.socket)
            self.assertIn(f"knows of no server `{of}/{server}`", answer["msg"])


if __name__ == "__main__":
    unittest.main()
