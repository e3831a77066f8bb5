"""Upgrades in place: one machine after another, none of them taken out of a balancer."""

from __future__ import annotations

import json
import os
import shutil
import signal
import unittest

from base import LAB, wait_for, write
from lab import Case

BAD = "echo cannot reach the database >&2; exit 1"


class Upgrade(Case):
    def test_every_machine_and_no_request_is_lost(self) -> None:
        release = self.fleet.build("every")
        load = self.load()
        played = self.fleet.play("rollout", release=release)
        self.assertEqual(played.code, 0, played.text)
        self.nothing_lost(load)
        self.assertEqual((self.fleet.releases(), self.fleet.links()), ([release] * 4, [release] * 4))
        # One machine first: its batch is a play of its own.
        batches = [part.count("changed: [") for part in played.text.split("PLAY [Upgrade]")[1:]]
        self.assertEqual(batches, [1, 1, 2], played.text)

        generations = self.fleet.generations()
        again = self.fleet.play("rollout", release=release)
        self.assertEqual((again.code, set(again.changed().values())), (0, {0}), again.text)
        self.assertEqual(self.fleet.generations(), generations)

    def test_check_mode_changes_nothing_and_says_what_would_be(self) -> None:
        before = (self.fleet.releases(), self.fleet.links(), self.fleet.generations())
        release = self.fleet.build("checked")
        played = self.fleet.play("rollout", "--check", release=release)
        self.assertEqual(played.code, 0, played.text)
        self.assertNotIn(0, played.changed().values(), played.text)
        self.assertEqual((self.fleet.releases(), self.fleet.links(), self.fleet.generations()), before)
        for machine in self.fleet.machines:
            self.assertNotIn(release, machine.inside("ls", "-A", "/srv/app/releases").stdout)

    def test_a_bad_build_stops_at_the_first_machine(self) -> None:
        before = (self.fleet.releases(), self.fleet.links(), self.fleet.generations())
        attempts = [machine.status().get("last_upgrade") for machine in self.fleet.machines]
        release = self.fleet.build("bad", script=BAD)
        load = self.load()
        played = self.fleet.play("rollout", release=release)
        self.nothing_lost(load)
        self.assertEqual(played.code, 2, played.text)
        self.assertEqual({name: counts["failed"] for name, counts in played.counts.items()},
                         {"web1": 1, "web2": 0, "web3": 0, "web4": 0})
        # Where and why.
        self.assertRegex(played.text, r"fatal: \[web1\]: FAILED!.*exited with status 1 before it was ready.*"
                                      r"cannot reach the database.*the build that served before serves")
        self.assertEqual((self.fleet.releases(), self.fleet.links(), self.fleet.generations()), before)
        now = [machine.status().get("last_upgrade") for machine in self.fleet.machines]
        self.assertIn("not upgraded", now[0]["message"])
        self.assertEqual(now[1:], attempts[1:])

    def test_a_build_that_is_not_healthy_is_taken_back(self) -> None:
        before = (self.fleet.releases(), self.fleet.links())
        release = self.fleet.build("unhealthy")
        load = self.load()
        healthy = f"test $(readlink /srv/app/current) != releases/{release} || (echo the answer is wrong; false)"
        played = self.fleet.play("rollout", release=release, health=f"'{healthy}'", health_timeout="1")
        self.nothing_lost(load)
        self.assertEqual(played.code, 2, played.text)
        self.assertRegex(played.text, r"\[web1\]: FAILED!.*the answer is wrong.*the build that served before serves")
        self.assertEqual((self.fleet.releases(), self.fleet.links()), before)

    def test_an_unreachable_machine_stops_it_before_anything_is_upgraded(self) -> None:
        before = (self.fleet.releases(), self.fleet.links(), self.fleet.generations())
        release = self.fleet.build("unreachable")
        self.fleet.machines[2].connect(False)
        try:
            played = self.fleet.play("rollout", release=release)
        finally:
            self.fleet.machines[2].connect(True)
        self.assertNotEqual(played.code, 0, played.text)
        self.settle()
        self.assertEqual(played.counts["web3"]["unreachable"], 1, played.text)
        self.assertEqual((self.fleet.releases(), self.fleet.links(), self.fleet.generations()), before)

    def test_a_machine_that_dies_while_it_is_upgraded_stops_the_next_batches(self) -> None:
        dies, beside, last = self.fleet.machines[1:]
        before = last.release()
        release = self.fleet.build("died")
        # It stops answering in the middle of the module.
        health = f"ip address show eth0 | grep -q {dies.address}/ || exit 0; ip link set eth0 down"
        try:
            played = self.fleet.play("rollout", release=release, serial="[1,2,1]", health=f"'{health}'")
        finally:
            dies.inside("ip", "link", "set", "eth0", "up")
        self.settle()
        self.assertNotEqual(played.code, 0, played.text)
        self.assertEqual(played.counts[dies.name]["failed"], 1, played.text)
        self.assertIn("cannot be reached any more", played.text)
        # The batch has ended.
        self.assertEqual((beside.release(), last.release()), (release, before), played.text)
        self.assertEqual(played.text.count("PLAY [Upgrade]"), 2, played.text)

    def test_a_play_that_is_killed_half_way_is_run_again(self) -> None:
        release = self.fleet.build("killed")
        load = self.load()
        first, last = self.fleet.machines[0], self.fleet.machines[-1]
        play = self.fleet.start_play("rollout", release=release)
        try:
            wait_for("the first machine is upgraded", lambda: first.release() == release, 180)
        finally:
            os.killpg(play.pid, signal.SIGKILL)
            play.communicate()
        self.assertNotEqual(last.release(), release)
        played = self.fleet.play("rollout", release=release)
        self.assertEqual(played.code, 0, played.text)
        self.nothing_lost(load)
        self.assertEqual((self.fleet.releases(), self.fleet.links()), ([release] * 4, [release] * 4))
        self.assertGreater(played.changed()["web4"], 0)

    def test_another_build_under_the_same_name_is_refused(self) -> None:
        release = self.fleet.build("taken")
        options = ("--limit", "web1")
        self.assertEqual(self.fleet.play("rollout", *options, release=release).code, 0)
        self.fleet.build("taken", script="exit 1")
        played = self.fleet.play("rollout", *options, release=release)
        self.assertEqual(played.code, 2, played.text)
        self.assertIn("give this release another name", played.text)
        self.assertEqual(self.fleet.machines[0].release(), release)

    def without_artifact(self) -> None:
        """Until the end of the test: an inventory that does not name one."""
        named = self.fleet.inventory
        with open(named, encoding="utf-8") as file:
            hosts = json.load(file)
        del hosts["all"]["vars"]["handover_artifact"]
        self.addCleanup(setattr, self.fleet, "inventory", named)
        self.fleet.inventory = write(f"{LAB}/without-artifact.yml", json.dumps(hosts))

    def test_a_staged_release_is_gone_back_to_without_its_artifact(self) -> None:
        first, second = self.fleet.build("first"), self.fleet.build("second")
        options = ("--limit", "web1")
        for release in (first, second):
            played = self.fleet.play("rollout", *options, release=release)
            self.assertEqual(played.code, 0, played.text)
        shutil.rmtree(f"{LAB}/artifacts/{first}")
        self.without_artifact()
        played = self.fleet.play("rollout", *options, release=first)
        self.assertEqual(played.code, 0, played.text)
        self.assertEqual((self.fleet.machines[0].release(), self.fleet.machines[0].linked()), (first, first))

        for more in ((), ("--check",)):
            played = self.fleet.play("rollout", *options, *more, release="never-staged")
            self.assertEqual(played.code, 2, played.text)
            self.assertIn("name its artifact", played.text)
        self.assertEqual((self.fleet.machines[0].release(), self.fleet.machines[0].linked()), (first, first))

    def test_a_service_of_which_two_must_never_run_at_once_is_restarted(self) -> None:
        release = self.fleet.build("restarted")
        played = self.fleet.play("rollout", "--limit", "web1", release=release, how="restart")
        self.assertEqual(played.code, 0, played.text)
        status = self.fleet.machines[0].status()
        self.assertEqual((self.fleet.machines[0].release(), status["draining"]), (release, []))
        self.assertIn("restarted", status["last_upgrade"]["message"])


if __name__ == "__main__":
    unittest.main()
