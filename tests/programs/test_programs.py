"""Real programs under `handover exec`, replaced under load. New connections are never lost; kept ones only if the
program loses them itself, and then test_kept.py has it."""

from __future__ import annotations

import os
import unittest
from typing import Any, Dict

import connections
from lab import HERE, Supervised, built, needs, program

UPGRADES = int(os.environ.get("HANDOVER_UPGRADES", "20"))
# Not as much as the machine can do, because that would only slow the programs' own start.
NEW = ("--new", "4", "--rate", "500")
KEPT = ("--kept", "16", "--think", "2ms")
SLOW = ("--slow", "2:1.5")
GUNICORN = [
    built("gunicorn/bin/gunicorn"), "--no-control-socket", "--worker-class", "gthread", "--threads", "8",
    "--chdir", HERE, "wsgi",
]


class Programs(unittest.TestCase):
    maxDiff = None

    def sets_non_blocking(self, service: Supervised) -> None:
        """As docs/exec.md says of this program; one that does not hangs in `accept` when another process was faster."""
        self.assertTrue(connections.listens_non_blocking(service.process.pid))

    def loses_nothing(self, service: Supervised, *load: str) -> Dict[str, Any]:
        cookie = service.status()["listeners"][0]["cookie"]
        oracle = service.oracle(*load)
        for _ in range(UPGRADES):
            service.upgrade()
        # Under load to the end: one that blocks in `accept` when it is told to stop needs a connection to notice.
        service.wait_until_drained()
        report = oracle.stop()
        self.assertEqual(report["failed"], 0, report)
        self.assertEqual(report["outcomes"]["client"], 0, report)
        self.assertEqual(len(report["generations"]), UPGRADES + 1, report)
        self.assertEqual(service.status()["listeners"][0]["cookie"], cookie)
        return report

    def test_node(self) -> None:
        service = Supervised(self, ["--workers", "2"], "node", program("app.js"))
        self.sets_non_blocking(service)
        self.loses_nothing(service, *NEW, *KEPT, *SLOW)

    def test_node_that_closes_kept_connections(self) -> None:
        service = Supervised(self, ["--workers", "2"], "node", program("closes.js"))
        self.loses_nothing(service, *NEW)

    @needs(built("node_modules/express"))
    def test_express(self) -> None:
        there = {"EXPRESS": built("node_modules/express")}
        service = Supervised(self, ["--workers", "2"], "node", program("express.js"), env=there)
        self.loses_nothing(service, *NEW, *KEPT, *SLOW)

    def test_node_written_for_pm2(self) -> None:
        ways = ["--ready", "message", "--stop-message", "shutdown"]
        service = Supervised(self, ["--workers", "2", *ways], "node", program("pm2.js"))
        self.loses_nothing(service, *NEW, *KEPT, *SLOW)
        self.assertNotIn("a signal, where a message was due", service.written())

    @needs(built("served"))
    def test_go(self) -> None:
        service = Supervised(self, ["--workers", "2"], built("served"), "announces")
        self.sets_non_blocking(service)
        self.loses_nothing(service, *NEW, *KEPT, *SLOW)

    @needs(built("served"))
    def test_go_that_closes_kept_connections(self) -> None:
        service = Supervised(self, ["--workers", "2"], built("served"), "closes")
        self.loses_nothing(service, *NEW, *SLOW)

    @needs(built("gunicorn/bin/gunicorn"))
    def test_gunicorn(self) -> None:
        service = Supervised(self, [], *GUNICORN)
        self.sets_non_blocking(service)
        self.loses_nothing(service, *NEW, *SLOW)

    def test_python_s_http_server(self) -> None:
        service = Supervised(self, ["--workers", "2", "--non-blocking"], "python3", program("threads.py"))
        self.loses_nothing(service, *NEW, *SLOW)

    def test_perl_by_the_convention_of_server_starter(self) -> None:
        service = Supervised(self, ["--workers", "4", "--ready", "waits"], "perl", program("starter.pl"))
        self.loses_nothing(service, *NEW)

    @needs("nginx")
    def test_nginx(self) -> None:
        service = Supervised(self, ["--stop-signal", "QUIT", "--non-blocking"], program("nginx.sh"), "@DIR@")
        self.loses_nothing(service, *NEW)

    @needs("haproxy")
    def test_haproxy(self) -> None:
        service = Supervised(self, ["--stop-signal", "USR1", "--non-blocking"], program("haproxy.sh"), "@DIR@")
        self.loses_nothing(service, *NEW)


if __name__ == "__main__":
    unittest.main()
