"""What needs an empty machine: hard restarts, with the machine taken out of both balancers, and without."""

from __future__ import annotations

import unittest

from base import wait_for
from lab import Case
from machine import HERE


class OneByOne(Case):
    def all_are_back(self) -> None:
        self.assertEqual(self.fleet.nginx.marked_down(), 0)
        # While a server is down its status does not tell whether it is drained.
        wait_for("none is down any more", lambda: "DOWN" not in "".join(self.fleet.haproxy.states()))
        self.assertNotIn("DRAIN", "".join(self.fleet.haproxy.states()))

    def test_hard_restarts_lose_nothing_of_an_empty_machine(self) -> None:
        # A reload of nginx closes connections of clients that are silent at the moment: docs/fleet.md.
        load = self.load(kept_by_nginx=0)
        played = self.fleet.play("one-by-one")
        self.assertEqual(played.code, 0, played.text)
        self.nothing_lost(load)
        self.all_are_back()
        self.assertEqual(self.fleet.generations(), [1] * 4)

    def test_hard_restarts_without_it_lose_requests(self) -> None:
        load = self.load()
        played = self.fleet.play("one-by-one", balancers="[]")
        self.assertEqual(played.code, 0, played.text)
        reports, counted = load.end()
        for name in ("nginx", "haproxy"):
            print(f"\n{name}: lost {reports[name]['failed']} of {reports[name]['requests']}; {counted[name]}")
        self.assertGreater(sum(report["failed"] for report in reports.values()), 0)

    def test_the_machine_is_put_back_after_a_failure(self) -> None:
        before = self.fleet.generations()
        played = self.fleet.play("one-by-one", work="'echo no space left; exit 1'")
        self.assertEqual(played.code, 2, played.text)
        self.assertIn("no space left", played.text)
        self.assertEqual(sorted(played.counts), ["web1"], played.text)
        self.assertEqual(played.text.count("changed: [web1 -> balancer]"), 4, "out of two balancers and back")
        self.all_are_back()
        self.assertEqual(self.fleet.generations(), before)

    def test_a_machine_that_dies_meanwhile_is_put_back_too(self) -> None:
        try:
            played = self.fleet.play("one-by-one", work="'ip link set eth0 down'", up_timeout="1")
        finally:
            self.fleet.machines[0].inside("ip", "link", "set", "eth0", "up")
        self.assertEqual(played.code, 2, played.text)
        self.assertIn("cannot be reached any more", played.text)
        self.assertEqual(sorted(played.counts), ["web1"], played.text)
        self.all_are_back()
        self.settle()

    def test_a_machine_that_its_balancer_takes_for_down_is_put_back_too(self) -> None:
        machine = self.fleet.machines[0]
        stop = f"systemctl kill --signal=KILL {machine.scope}; systemctl stop {machine.scope}; sleep 3"
        try:
            played = self.fleet.play("one-by-one", "--limit", machine.name, work=f"'{stop}'", health="''", up_timeout="1")
            state = self.fleet.haproxy.states()[0]
        finally:
            machine.inside(f"{HERE}/files/hard-restart")
        # Or the next one would be taken out while this one is not there.
        self.assertEqual(played.code, 2, played.text)
        self.assertIn("app/web1 is put back, but HAProxy calls it down", played.text)
        self.assertEqual(state, "DOWN")
        self.all_are_back()

    def test_the_next_machine_is_left_alone_until_haproxy_calls_the_last_one_up(self) -> None:
        # Down by the time that it comes back, when nothing else looks whether it serves.
        away = f"ip link set eth0 down; sleep 3; ip link set eth0 up; {HERE}/files/hard-restart"
        played = self.fleet.play("one-by-one", "--limit", "web1,web2", work=f"'{away}'", health="''")
        self.assertEqual(played.code, 0, played.text)
        self.assertEqual(sorted(played.counts), ["web1", "web2"], played.text)
        self.assertNotIn("DOWN", "".join(self.fleet.haproxy.states()))
        self.settle()


if __name__ == "__main__":
    unittest.main()
