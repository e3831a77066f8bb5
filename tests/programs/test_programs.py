"""Real programs under `handover exec`, replaced under load."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
import unittest
from typing import Any, Dict

from lab import HERE, Oracle, Supervised, wait_for

UPGRADES = int(os.environ.get("HANDOVER_UPGRADES", "5"))
KEPT = 8
in_ci = os.environ.get("CI") == "true"


def program(name: str) -> str:
    return os.path.join(HERE, name)


class Programs(unittest.TestCase):
    maxDiff = None

    def loses_nothing(self, service: Supervised, *load: str, upgrades: int = UPGRADES) -> Dict[str, Any]:
        cookie = service.status()["listeners"][0]["cookie"]
        oracle = service.oracle(*load)
        for _ in range(upgrades):
            service.upgrade("--wait", "drained")
        report = oracle.stop()
        self.assertEqual(report["failed"], 0, report)
        self.assertEqual(len(report["generations"]), upgrades + 1, report)
        self.assertEqual(service.status()["listeners"][0]["cookie"], cookie)
        return report

    def test_node_that_drains_rightly_loses_nothing(self) -> None:
        service = Supervised(self, ["--workers", "2"], "node", program("drains.js"))
        self.loses_nothing(service, "--new", "4", "--kept", str(KEPT), "--slow", "2:1.5")

    def lost_alone(self) -> int:
        """Kept connections that closes.js loses requests on when it is told to stop, with nobody between."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        alone = subprocess.Popen(["node", program("closes.js"), str(port)])
        self.addCleanup(alone.wait)
        self.addCleanup(alone.kill)

        def listens() -> bool:
            with socket.socket() as client:
                return client.connect_ex(("127.0.0.1", port)) == 0

        wait_for("it listens", listens)
        oracle = Oracle(self, f"127.0.0.1:{port}", "--kept", str(KEPT))
        time.sleep(0.5)
        alone.terminate()
        alone.wait()
        report = oracle.stop()
        # What is refused once it has gone is its absence, not its drain.
        return report["failed"] - report["outcomes"]["refused"]

    def test_node_that_closes_loses_no_new_connection_and_no_more_than_alone_on_kept_ones(self) -> None:
        service = Supervised(self, ["--workers", "2"], "node", program("closes.js"))
        self.loses_nothing(service, "--new", "4")
        oracle = service.oracle("--kept", str(KEPT))
        for _ in range(UPGRADES):
            # One that was busy at that moment is kept open for as long as its client asks, so the deadline may end it.
            done = service.ask("upgrade", "--wait", "drained", "--drain-timeout", "1s")
            self.assertIn(done.returncode, (0, 5), done.stderr)
        report = oracle.stop()
        # At worst each connection once in each upgrade; alone it is that, too, give or take what chance does.
        self.assertLessEqual(report["failed"], UPGRADES * KEPT, report)
        print(f"closes.js: {report['failed']} of {report['requests']} requests on kept connections in {UPGRADES} "
              f"upgrades; alone {self.lost_alone()} of {KEPT} connections at its one end")

    def pm2(self, *options: str) -> Supervised:
        ways = ["--ready", "message", "--stop-message", "shutdown"]
        return Supervised(self, ["--workers", "2", *ways, *options], "node", program("pm2.js"))

    def test_a_program_for_pm2_says_ready_and_is_told_by_message(self) -> None:
        service = self.pm2()
        self.loses_nothing(service, "--new", "4", "--kept", str(KEPT), "--slow", "2:2")
        self.assertNotIn("a signal, where a message was due", service._log())

    def test_the_supervisor_is_replaced_under_a_program_for_pm2(self) -> None:
        service = self.pm2()
        oracle = service.oracle("--new", "4", "--kept", str(KEPT), "--slow", "2:2")
        for _ in range(3):
            done = service.ask("upgrade", "--self")
            self.assertEqual(done.returncode, 0, done.stderr)
            # By messages on channels that the build before has opened.
            service.upgrade("--wait", "drained")
        report = oracle.stop()
        self.assertEqual(report["failed"], 0, report)
        self.assertEqual(service.status()["generation"], 4)
        self.assertNotIn("a signal, where a message was due", service._log())

    def test_what_pm2_gets_wrong(self) -> None:
        service = self.pm2("--ready-timeout", "2s")
        oracle = service.oracle("--new", "4", "--kept", str(KEPT), "--slow", "2:3")
        # A new version that is never ready; one that crashes; one that cannot be parsed.
        for arguments, message in [
            (["--env", "APP_NEVER_READY=1"], "it has not sent `ready`"),
            (["--", "-e", "process.exit(7)"], "exited with status 7 before it was ready"),
            (["--", "-e", "this is no program"], "SyntaxError"),
        ]:
            done = service.ask("upgrade", *arguments)
            self.assertEqual(done.returncode, 1, done.stdout)
            self.assertIn(message, done.stderr)
        report = oracle.stop()
        # The one that is never ready accepts all the same, as it would under pm2; what it has taken it finishes.
        self.assertEqual(report["failed"], 0, report)
        self.assertEqual(service.status()["generation"], 1)
        # A long request at the default timeouts.
        oracle = service.oracle("--slow", "2:5")
        service.upgrade("--wait", "drained")
        self.assertEqual(oracle.stop()["failed"], 0)

    def test_python_s_http_server(self) -> None:
        service = Supervised(self, ["--workers", "2", "--non-blocking"], "python3", program("threads.py"))
        self.loses_nothing(service, "--new", "8", "--slow", "2:1.5")

    def test_perl_by_the_convention_of_server_starter(self) -> None:
        service = Supervised(self, ["--workers", "4", "--ready", "waits"], "perl", program("starter.pl"))
        self.loses_nothing(service, "--new", "4")

    @unittest.skipUnless(in_ci or shutil.which("nginx"), "nginx is not installed")
    def test_nginx(self) -> None:
        service = Supervised(self, ["--stop-signal", "QUIT"], program("nginx.sh"), "@DIR@")
        self.loses_nothing(service, "--new", "8")

    @unittest.skipUnless(in_ci or shutil.which("haproxy"), "haproxy is not installed")
    def test_haproxy(self) -> None:
        service = Supervised(self, ["--stop-signal", "USR1", "--non-blocking"], program("haproxy.sh"), "@DIR@")
        self.loses_nothing(service, "--new", "8", "--kept", str(KEPT))


if __name__ == "__main__":
    unittest.main()
