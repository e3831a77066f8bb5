"""`handover restart` of a unit: what the service manager sees of it."""

from __future__ import annotations

import json
import subprocess
import unittest
from typing import Any, Dict

from lab import HANDOVER, InFlight, Oracle, Service, ServiceCase, lives, run, wait_for, who


def restart(service: Service, *options: str) -> "subprocess.CompletedProcess[str]":
    return run(HANDOVER, "restart", "--pid", str(service.main_pid()), "--json", *options, check=False)


def last(done: "subprocess.CompletedProcess[str]") -> Dict[str, Any]:
    return json.loads(done.stdout.splitlines()[-1])


class Restart(ServiceCase):
    def test_the_unit_stays_up_and_the_main_pid_moves(self) -> None:
        service = self.started("library", options="--lock /run/lock-of-restart")
        old, cookies = service.main_pid(), service.cookies()
        with self.watched(service) as seen:
            done = restart(service)
            self.assertEqual(done.returncode, 0, done.stdout + service.journal())
            self.assertFalse(lives(old))
            wait_for("the unit is up", service.is_up)
        self.assertEqual(who(), (2, service.main_pid()))
        self.assertEqual(last(done)["pid"], service.main_pid())
        self.assertEqual(service.cookies(), cookies)
        self.assertEqual(service.show("StatusText"), "generation 2 serves")
        self.assertLessEqual({state for state, _, _ in seen}, {"active", "reloading"})
        self.assertEqual({restarts for _, restarts, _ in seen}, {"0"})
        # From here on it is a unit like any other.
        self.assertEqual(service.processes(), [service.main_pid()])
        service.stop()
        self.assertEqual(service.show("Result"), "success")

    def test_five_in_a_row_under_load(self) -> None:
        for program in ("axum", "fixture"):
            with self.subTest(program):
                service = self.service()
                service.install(program)
                service.write_from_page("library")
                service.start()
                load = Oracle(self, "--new", "4", "--rate", "300", "--kept", "8", "--slow", "2:1", "--monotonic")
                cut = 0
                for generation in range(2, 7):
                    wait_for("somebody is answered", lambda: service.status()["connections"]["open"] > 8)
                    done = restart(service)
                    self.assertEqual((done.returncode, last(done)["generation"]), (0, generation), done.stdout)
                    cut += last(done).get("cut", 0)
                report = load.stop()
                self.assertEqual(report["outcomes"]["refused"], 0, report)
                self.assertGreater(cut, 0)
                self.assertLessEqual(report["failed"], cut, report)
                self.assertEqual(service.show("NRestarts"), "0")
                service.stop()

    def test_the_watchdog_is_answered_while_connections_are_finished(self) -> None:
        service = self.started(
            "library", ("Restart=always", "Restart=always\nWatchdogSec=1s"), options="--watchdog true"
        )
        request = InFlight(3.0)
        wait_for("the request is in flight", lambda: service.status()["connections"]["open"] == 1)
        done = restart(service, "--drain", "30s")
        self.assertEqual(done.returncode, 0, done.stdout + service.journal())
        self.assertRegex(request.end().answer or str(request.error), "^gen=1 ")
        self.assertEqual(who(), (2, service.main_pid()))
        self.assertEqual(service.show("NRestarts"), "0")

    def test_the_watchdog_is_answered_while_the_new_build_starts_up(self) -> None:
        service = self.started(
            "library", ("Restart=always", "Restart=always\nWatchdogSec=1s"), options="--watchdog true"
        )
        done = restart(service, "--env", "FIXTURE_FAULT=still-starting=12")
        self.assertEqual(done.returncode, 0, done.stdout + service.journal())
        self.assertEqual(who(), (2, service.main_pid()))
        self.assertEqual(service.show("NRestarts"), "0")

    def test_a_build_that_fails_when_the_old_one_is_gone_is_started_again_by_systemd(self) -> None:
        service = self.started("library")
        old = service.main_pid()
        done = restart(service, "--env", "FIXTURE_FAULT=exit-after-adopted")
        self.assertEqual(done.returncode, 8, done.stdout)
        wait_for("systemd starts it again", lambda: service.main_pid() not in (0, old) and service.is_up())
        self.assertEqual(who(), (1, service.main_pid()))
        self.assertEqual(service.show("NRestarts"), "1")

    def test_a_build_that_does_not_start_changes_nothing(self) -> None:
        service = self.started("library")
        before = who()
        done = restart(service, "--env", "FIXTURE_FAULT=exit-1")
        self.assertEqual(done.returncode, 1, done.stdout)
        self.assertEqual(who(), before)
        self.assertTrue(service.is_up())
        self.assertRegex(service.show("StatusText"), "^generation 1 serves; the last restart failed: ")


if __name__ == "__main__":
    unittest.main()
