"""Requests that programs lose on kept connections when they are told to stop: never more under `handover exec` than
alone."""

from __future__ import annotations

import os
import signal
import statistics
import time
import unittest
from typing import List, Union

from alone import Alone
from lab import Oracle, Supervised, built, needs, program, wait_for
from test_programs import GUNICORN, UPGRADES

ROUNDS = max(UPGRADES // 4, 2)
CLIENTS = 8
# What a program loses it loses as soon as it has the signal; the clients go on for so long.
WATCHED_SECONDS = 0.3


class Kept(unittest.TestCase):
    def lost(self, service: Union[Supervised, Alone]) -> int:
        """In one replacement."""
        oracle = Oracle(self, service.address, "--kept", str(CLIENTS))
        wait_for("all connections are accepted", lambda: oracle.is_accepted(CLIENTS))
        service.replace()
        time.sleep(WATCHED_SECONDS)
        report = oracle.stop()
        service.wait_until_drained()
        self.assertEqual(report["outcomes"]["refused"], 0, report)
        return report["failed"]

    def loses_no_more_than_alone(self, name: str, options: List[str], *command: str, stop: str = "TERM") -> None:
        service = Supervised(self, ["--stop-signal", stop, *options], *command)
        alone = Alone(self, signal.Signals[f"SIG{stop}"], *command)
        # In turns, so that whatever else the machine does is the same for both.
        pairs = [(self.lost(service), self.lost(alone)) for _ in range(ROUNDS)]
        here, there = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        where = f"lost on {CLIENTS} kept connections in {ROUNDS} upgrades"
        print(f"{name}: {sum(here)} requests {where}; alone {sum(there)}")
        # Which connection is just idle is chance: five times as far apart as two such sums are as a rule.
        chance = 5 * (ROUNDS * (statistics.variance(here) + statistics.variance(there))) ** 0.5
        self.assertLessEqual(sum(here), sum(there) + chance, pairs)

    def test_node(self) -> None:
        self.loses_no_more_than_alone("closes.js", [], "node", program("closes.js"))

    @needs(built("served"))
    def test_go(self) -> None:
        self.loses_no_more_than_alone("Go's Shutdown", [], built("served"), "closes")

    @needs(built("gunicorn/bin/gunicorn"))
    def test_gunicorn(self) -> None:
        self.loses_no_more_than_alone("gunicorn", [], *GUNICORN)

    @needs("nginx")
    def test_nginx(self) -> None:
        self.loses_no_more_than_alone("nginx", ["--non-blocking"], program("nginx.sh"), "@DIR@", stop="QUIT")

    @needs("haproxy")
    def test_haproxy(self) -> None:
        self.loses_no_more_than_alone("HAProxy", ["--non-blocking"], program("haproxy.sh"), "@DIR@", stop="USR1")


if __name__ == "__main__":
    unittest.main()
