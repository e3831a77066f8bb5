"""pm2's ways, and that of Node's cluster, on the same programs: restart, reload (test_programs.py), gracefulReload,
SIGUSR2; and what pm2 gets wrong."""

from __future__ import annotations

import json
import os
import signal
import unittest
from typing import Set

from lab import Oracle, Supervised, built, needs, program, wait_for
from test_programs import GUNICORN, KEPT, NEW

ROUNDS = int(os.environ.get("HANDOVER_LONG_ROUNDS", "1"))
RESTARTS = 5
SELF_UPGRADES = 3
LONG_SECONDS = 15
# As many as may drain at once.
UPGRADES_IN_A_ROW = 4
BY_MESSAGE = ["--ready", "message", "--stop-message", "shutdown"]


def workers(service: Supervised) -> Set[int]:
    return {worker["pid"] for worker in service.status()["workers"] if worker["state"] == "serving"}


class Pm2(unittest.TestCase):
    maxDiff = None

    def upgrade_by_signal(self, service: Supervised) -> None:
        """What `kill -USR2` does to a cluster: all its workers are replaced."""
        service.may_upgrade()
        before, generation = workers(service), service.status()["generation"]
        service.process.send_signal(signal.SIGUSR2)

        def is_replaced() -> bool:
            status = service.status()
            return status["generation"] == generation + 1 and status["state"] == "serving"

        wait_for("upgraded by a signal", is_replaced)
        after = workers(service)
        self.assertEqual((len(before), len(after), before & after), (4, 4, set()))

    def is_answered(self, oracle: Oracle, generation: int) -> None:
        """Both requests, by the generation that they were sent to."""
        report = oracle.finish()
        self.assertEqual((report["failed"], report["generations"]), (0, {str(generation): 2}), report)

    @needs(built("node_modules/express"))
    @needs(built("gunicorn/bin/gunicorn"))
    @needs(built("served"))
    def test_a_request_of_15_s_is_answered_in_each_upgrade(self) -> None:
        # At the default timeouts.
        services = {
            "node": Supervised(self, [], "node", program("app.js")),
            "pm2 gracefulReload": Supervised(self, BY_MESSAGE, "node", program("pm2.js")),
            "express": Supervised(self, [], "node", program("express.js"),
                                  env={"EXPRESS": built("node_modules/express")}),
            "go": Supervised(self, [], built("served"), "announces"),
            "gunicorn": Supervised(self, [], *GUNICORN),
            "python": Supervised(self, ["--non-blocking"], "python3", program("threads.py")),
        }
        cluster = Supervised(self, ["--workers", "4"], "node", program("app.js"))
        for _ in range(ROUNDS):
            asked = []
            for service in services.values():
                asked.append((service.in_flight(LONG_SECONDS), service.status()["generation"]))
                service.upgrade()
            for _ in range(UPGRADES_IN_A_ROW):
                asked.append((cluster.in_flight(LONG_SECONDS), cluster.status()["generation"]))
                self.upgrade_by_signal(cluster)
            for oracle, generation in asked:
                self.is_answered(oracle, generation)
            for service in services.values():
                service.wait_until_drained()
            cluster.wait_until_drained()
        self.assertIn("its own drain code runs", services["pm2 gracefulReload"].written())

    def test_restart_cuts_what_is_in_flight_and_refuses_nobody(self) -> None:
        service = Supervised(self, ["--workers", "2"], "node", program("app.js"))
        load = service.oracle(*NEW, *KEPT)
        told = 0
        for _ in range(RESTARTS):
            long = service.in_flight(LONG_SECONDS)
            done = service.ask("restart", "--kill-after", "2s", "--json")
            self.assertEqual(done.returncode, 0, done.stderr)
            told += json.loads(done.stdout.splitlines()[-1])["cut"]
            outcomes = long.finish()["outcomes"]
            self.assertEqual(outcomes["cut"] + outcomes["reset"], 2, outcomes)
        report = load.stop()
        self.assertEqual(report["outcomes"]["refused"], 0, report)
        # The others have 2 s to be answered, and kept connections to hear of the close; if the machine is too busy for
        # that, it is told.
        self.assertGreaterEqual(told, 2 * RESTARTS)
        self.assertLessEqual(report["failed"], told - 2 * RESTARTS, report)
        self.assertEqual(len(report["generations"]), RESTARTS + 1, report)

    def test_what_pm2_gets_wrong(self) -> None:
        service = Supervised(self, ["--workers", "2", *BY_MESSAGE], "node", program("pm2.js"))
        oracle = service.oracle(*NEW, *KEPT, "--slow", "2:3")
        # A new version that is never ready; one that crashes; one that cannot be parsed.
        for arguments, message in [
            (["--ready-timeout", "2s", "--env", "APP_NEVER_READY=1"], "it has not sent `ready`"),
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

    def test_the_supervisor_is_replaced_where_pm2_update_refuses_clients(self) -> None:
        service = Supervised(self, ["--workers", "2", *BY_MESSAGE], "node", program("pm2.js"))
        oracle = service.oracle(*NEW, *KEPT, "--slow", "2:2")
        for _ in range(SELF_UPGRADES):
            done = service.ask("upgrade", "--self")
            self.assertEqual(done.returncode, 0, done.stderr)
            # By messages on channels that the build before has opened.
            service.upgrade()
        service.wait_until_drained()
        report = oracle.stop()
        self.assertEqual(report["failed"], 0, report)
        self.assertEqual(service.status()["generation"], 1 + SELF_UPGRADES)
        self.assertNotIn("a signal, where a message was due", service.written())


if __name__ == "__main__":
    unittest.main()
