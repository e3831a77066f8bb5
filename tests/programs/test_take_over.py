"""Servers that run already, started by whomever, brought under `handover exec` under load."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest
from typing import Any, Dict, List

from alone import Restarted
from lab import HANDOVER, PATIENCE_SECONDS, Intercepted, Oracle, built, free_port, needs, program, wait_for
from redis_load import Load
from test_any import AT_ONCE, KEPT, NEVER, NEW, SLOW, WATCHED_SECONDS, all_of, gunicorn
from test_redis import redis


# Not in Python's modules: sys/syscall.h, asm-generic/socket.h.
SYS_PIDFD_GETFD = 438
SO_COOKIE = 57


def cookies_of(pid: int) -> List[int]:
    """Of all that a process listens on."""
    found = []
    process = os.pidfd_open(pid)
    for number in os.listdir(f"/proc/{pid}/fd"):
        try:
            if not os.readlink(f"/proc/{pid}/fd/{number}").startswith("socket:"):
                continue
        except FileNotFoundError:
            continue  # A connection that has just been closed.
        fd = ctypes.CDLL(None, use_errno=True).syscall(SYS_PIDFD_GETFD, process, int(number), 0)
        if fd < 0:
            continue
        with socket.socket(fileno=fd) as copy:
            if copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                found.append(int.from_bytes(copy.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8), sys.byteorder))
    os.close(process)
    return sorted(found)


class TakeOver(unittest.TestCase):
    maxDiff = None

    def server(self, address: str, *command: str, stop: str = "TERM") -> Restarted:
        """One that nobody supervises."""
        return Restarted(self, signal.Signals[f"SIG{stop}"], address, *command)

    def take_over(self, server: Restarted, *options: str) -> Intercepted:
        """By the same program."""
        before = cookies_of(server.process.pid)
        service = Intercepted(self, ["--take-over", str(server.process.pid), *options], *server.program)
        self.assertEqual(sorted(service.cookies().values()), before)
        server.process.wait(PATIENCE_SECONDS)
        return service

    def under_load(self, server: Restarted, options: List[str], *load: str) -> Dict[str, Any]:
        """How the requests ended that were made while it was taken over, and while the new one was upgraded."""
        oracle = server.oracle(*load)
        time.sleep(WATCHED_SECONDS)
        service = self.take_over(server, *options)
        service.upgrade()
        service.wait_until_drained()
        report = oracle.stop()
        print(f"{self.id()}: taken over and upgraded, {report['outcomes']}")
        self.assertEqual(all_of(NEVER, report["outcomes"]), 0, report)
        return report

    def loses_nothing(self, server: Restarted, options: List[str], *load: str) -> None:
        report = self.under_load(server, options, *load)
        self.assertEqual(report["failed"], 0, report)

    def test_node(self) -> None:
        port = str(free_port())
        self.loses_nothing(self.server(f"127.0.0.1:{port}", "node", program("app.js"), port), [], *NEW, *KEPT, *SLOW)

    @needs(built("gunicorn/bin/gunicorn"))
    def test_gunicorn(self) -> None:
        address = f"127.0.0.1:{free_port()}"
        self.loses_nothing(self.server(address, *gunicorn(address)), [], *NEW, *SLOW)

    @needs(built("gunicorn/bin/gunicorn"))
    def test_gunicorn_at_a_path(self) -> None:
        server = self.server("@DIR@/http.sock", *gunicorn("unix:@DIR@/http.sock"))
        oracle = server.oracle(*AT_ONCE, *SLOW)
        time.sleep(WATCHED_SECONDS)
        service = self.take_over(server)
        report = oracle.stop()
        # It removes the path when it ends, and cannot be stopped from that; clients may come before it is put back.
        print(f"{self.id()}: taken over, {report['outcomes']}")
        self.assertEqual(report["failed"], report["outcomes"]["refused"], report)
        oracle = server.oracle(*AT_ONCE)
        service.upgrade()
        service.wait_until_drained()
        report = oracle.stop()
        self.assertEqual(report["failed"], 0, report)

    @needs("nginx")
    def test_nginx(self) -> None:
        port = str(free_port())
        server = self.server(f"127.0.0.1:{port}", program("debian-nginx.sh"), "@DIR@", port, stop="QUIT")
        self.loses_nothing(server, ["--stop-signal", "QUIT"], *NEW)

    def test_python_s_http_server(self) -> None:
        port = str(free_port())
        self.under_load(self.server(f"127.0.0.1:{port}", program("files.sh"), "@DIR@", port), [], *NEW)

    @needs("redis-server")
    def test_redis(self) -> None:
        port = free_port()
        server = self.server(f"127.0.0.1:{port}", *redis(port))
        # Not at the path, which it removes when it ends.
        load = Load([server.address])
        self.addCleanup(load.end)
        time.sleep(WATCHED_SECONDS)
        service = self.take_over(server, "--no-overlap")
        service.upgrade()
        time.sleep(WATCHED_SECONDS)
        load.end()
        print(f"{self.id()}: new {load.new}, kept {load.kept}")
        self.assertEqual(load.lost_data, [])
        self.assertEqual(set(load.new) | set(load.kept) | {"ok", "cut", "reset"}, {"ok", "cut", "reset"})

    @needs(built("node_modules/.bin/pm2"))
    def test_an_app_of_pm2(self) -> None:
        home = tempfile.mkdtemp(prefix="handover-pm2-")
        self.addCleanup(shutil.rmtree, home)
        port = str(free_port())
        env = {**os.environ, "PM2_HOME": home, "HANDOVER_GENERATION": "0", "HANDOVER_WORKER": "0"}

        def pm2(*arguments: str) -> str:
            command = [built("node_modules/.bin/pm2"), *arguments]
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
            self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
            return done.stdout

        self.addCleanup(pm2, "kill")
        pm2("start", program("app.js"), "--name", "app", "--", port)
        pid = int(pm2("pid", "app"))
        wait_for("it listens", lambda: cookies_of(pid))
        before = cookies_of(pid)
        oracle = Oracle(self, f"127.0.0.1:{port}", *NEW, *KEPT, *SLOW)
        time.sleep(WATCHED_SECONDS)
        # pm2 starts another one as soon as this has ended, and that finds its port taken until it is deleted.
        # pm2's channel keeps the old one alive, though it has closed all that it had.
        options = ["--take-over", str(pid), "--drain-timeout", "5s"]
        service = Intercepted(self, options, "node", program("app.js"), port)
        wait_for("it has ended", lambda: not os.path.exists(f"/proc/{pid}"))
        pm2("delete", "app")
        self.assertEqual(list(service.cookies().values()), before)
        service.upgrade()
        service.wait_until_drained()
        report = oracle.stop()
        print(f"{self.id()}: {report['outcomes']}")
        self.assertEqual((report["failed"], report["outcomes"]["client"]), (0, 0), report)


class Refused(unittest.TestCase):
    """What cannot be taken over is left alone."""

    def setUp(self) -> None:
        self.directory = tempfile.mkdtemp(prefix="handover-programs-")
        self.addCleanup(shutil.rmtree, self.directory)
        self.port = str(free_port())

    def exec(self, *arguments: str, **options: Any) -> "subprocess.CompletedProcess[str]":
        env = {**os.environ, "HANDOVER_DIR": os.path.join(self.directory, "control")}
        return subprocess.run([HANDOVER, "exec", *arguments], env=env, capture_output=True, text=True,
                              timeout=PATIENCE_SECONDS, **options)

    def server(self) -> Restarted:
        return Restarted(self, signal.SIGTERM, f"127.0.0.1:{self.port}", "node", program("app.js"), self.port)

    def is_refused(self, arguments: List[str], *why: str, code: int = 1, **options: Any) -> None:
        done = self.exec(*arguments, "--", "node", program("app.js"), self.port, **options)
        self.assertEqual(done.returncode, code, done.stderr)
        for words in why:
            self.assertIn(words, done.stderr)

    def test_no_such_process(self) -> None:
        gone = subprocess.Popen(["true"])
        gone.wait()
        self.is_refused(["--take-over", str(gone.pid)], f"take over process {gone.pid}", "No such process")

    def test_one_that_listens_on_nothing(self) -> None:
        idle = subprocess.Popen(["sleep", "60"])
        self.addCleanup(idle.wait)
        self.addCleanup(idle.kill)
        self.is_refused(["--take-over", str(idle.pid)], "listens on anything", "ss -lnp")

    @unittest.skipUnless(os.geteuid() == 0, "only root can be another user")
    def test_one_of_another_user(self) -> None:
        server = self.server()
        # The control directory is to be its own.
        os.chmod(self.directory, 0o777)
        nobody = 65534
        take_over = ["--take-over", str(server.process.pid)]
        self.is_refused(take_over, "Permission denied", "by root", code=4, user=nobody, group=nobody)

    def test_a_program_that_never_serves_leaves_it_untouched(self) -> None:
        server = self.server()
        cookies = cookies_of(server.process.pid)
        oracle = server.oracle(*NEW, *KEPT)
        time.sleep(WATCHED_SECONDS)
        take_over = ["--take-over", str(server.process.pid), "--ready-timeout", "1s"]
        for command in (["sleep", "60"], ["node", "-e", "process.exit(7)"], ["node", program("app.js"), str(free_port())]):
            done = self.exec(*take_over, "--", *command)
            self.assertEqual(done.returncode, 1, done.stderr)
        report = oracle.stop()
        self.assertEqual((report["failed"], cookies_of(server.process.pid)), (0, cookies), report)

    def test_a_program_that_crashes_in_the_trial_leaves_it_untouched(self) -> None:
        server = self.server()
        oracle = server.oracle(*NEW)
        crashes = f"require('http').createServer().listen({self.port}); setTimeout(() => process.exit(7), 1000)"
        done = self.exec("--take-over", str(server.process.pid), "--trial", "30s", "--", "node", "-e", crashes)
        self.assertEqual(done.returncode, 1, done.stderr)
        report = oracle.stop()
        self.assertEqual((report["outcomes"]["refused"], report["outcomes"]["timed_out"]), (0, 0), report)
        self.assertIsNone(server.process.poll())

    def test_one_of_two_sockets(self) -> None:
        other = str(free_port())
        listens = f"for (const port of [{self.port}, {other}]) require('http').createServer((request, response) => " \
            "response.end('gen=1 pid=1')).listen(port, '127.0.0.1')"
        both = Restarted(self, signal.SIGTERM, f"127.0.0.1:{other}", "node", "-e", listens)
        self.is_refused(["--take-over", str(both.process.pid), "--listen", "127.0.0.1:1"],
                        "does not listen on 127.0.0.1:1", f"127.0.0.1:{self.port}", f"127.0.0.1:{other}")
        options = ["--take-over", str(both.process.pid), "--listen", f"127.0.0.1:{self.port}"]
        service = Intercepted(self, options, "node", "-e", listens.replace(f"[{self.port}, {other}]", f"[{self.port}]"))
        self.assertEqual(list(service.cookies()), [f"127.0.0.1:{self.port}"])


if __name__ == "__main__":
    unittest.main()
