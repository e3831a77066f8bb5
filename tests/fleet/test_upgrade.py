"""Upgrades in place: one machine after another, none of them taken out of a balancer."""

from __future__ import annotations

import unittest

from lab import Fleet, Load, fleet

FLEET: Fleet


def setUpModule() -> None:
    global FLEET
    FLEET = fleet()


class Upgrade(unittest.TestCase):
    maxDiff = None

    def load(self, **options: int) -> Load:
        load = Load(FLEET, **options)
        self.addCleanup(load.kill)
        return load

    def nothing_lost(self, load: Load) -> None:
        reports, counted = load.end()
        for name, report in reports.items():
            self.assertEqual(report["failed"], 0, (name, report["outcomes"], report["failures"][:5]))
            self.assertGreater(counted[name]["requests"], 100)
            print(name, report["requests"], "requests", counted[name])
            others = {key: value for key, value in counted[name].items() if key != "requests"}
            self.assertEqual(set(others.values()), {0}, (name, others))

    def test_every_machine_and_no_request_is_lost(self) -> None:
        release = FLEET.build("2")
        load = self.load()
        played = FLEET.play("rollout", release=release)
        self.assertEqual(played.code, 0, played.text)
        print(played.text, played.seconds)
        self.nothing_lost(load)
        self.assertEqual(FLEET.releases(), [release] * 4)


if __name__ == "__main__":
    unittest.main()
