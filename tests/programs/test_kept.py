"""Requests that programs lose on kept connections when they are told to stop: never more under `handover exec` than
alone."""

from __future__ import annotations

import os
import signal
import time
import unittest
from typing import List, Union

from alone import KEPT_CLIENTS, KEPT_WITH_PAUSES, Alone, most_by_chance
from lab import Oracle, Supervised, built, needs, program, wait_for
from test_programs import GUNICORN, UPGRADES

ROUNDS = max(UPGRADES // 2, 2)
# What a program loses it loses as soon as it has the signal; the clients go on for so long.
WATCHED_SECONDS = 0.3


class Kept(unittest.TestCase):
    def lost(self, service: Union[Supervised, Alone]) -> int:
        """In one replacement."""
        oracle = Oracle(self, service.address, *KEPT_WITH_PAUSES)
        wait_for("all connections are accepted", lambda: oracle.is_accepted(KEPT_CLIENTS))
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
        where = f"lost on {KEPT_CLIENTS} kept connections in {ROUNDS} upgrades"
        print(f"{name}: {sum(here)} requests {where}; alone {sum(there)}")
        self.assertLessEqual(sum(here), most_by_chance(there), pairs)

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
