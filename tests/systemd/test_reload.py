"""`systemctl reload`: an upgrade that says the truth."""

from __future__ import annotations

import unittest

from lab import InFlight, Oracle, ServiceCase, lives, run, wait_for, who


class Reload(ServiceCase):
    def test_it_returns_0_when_the_new_build_serves(self) -> None:
        service = self.started("library")
        generation, old = who()
        self.assertEqual((generation, old), (1, service.main_pid()))
        self.assertEqual(service.show("StatusText"), "generation 1 serves")
        service.reload_well()
        generation, new = who()
        self.assertEqual((generation, new), (2, service.main_pid()))
        self.assertNotEqual(old, new)
        self.assertTrue(service.is_up())

    def fails(self, *reasons: str, options: str, break_it) -> None:
        service = self.started("library", options=f"--trial 300ms {options}")
        before = who()
        break_it(service)
        reloaded = service.reload()
        self.assertEqual(reloaded.returncode, 1, reloaded.stderr)
        self.assertEqual(who(), before)
        self.assertEqual(service.main_pid(), before[1])
        self.assertTrue(service.is_up())
        self.assertEqual(service.processes(), [before[1]])
        journal = service.journal()
        for reason in reasons:
            self.assertIn(reason, journal)
        self.assertRegex(service.show("StatusText"), "^generation 1 serves; the last upgrade failed: ")
        # Nothing is left of it.
        service.install("fixture")
        service.reload_well()
        self.assertEqual(who(), (2, service.main_pid()))
        self.assertEqual(service.show("NRestarts"), "0")

    def test_a_build_that_exits(self) -> None:
        self.fails(
            "not upgraded: the new build exited with status 1 before it was ready",
            "cannot reach the database",
            options="",
            break_it=lambda service: service.install_script("echo cannot reach the database >&2\nexit 1\n"),
        )

    def test_a_build_that_is_missing(self) -> None:
        self.fails("No such file", options="", break_it=lambda service: run("rm", service.program))

    def test_a_build_that_hangs(self) -> None:
        self.fails(
            "was not ready within 500ms",
            options="--ready-timeout 500ms",
            break_it=lambda service: service.install_with_fault("hang-after-adopted"),
        )

    def test_a_build_that_dies_in_its_trial(self) -> None:
        self.fails(
            "rolled back: the new build was killed by SIGKILL within the trial",
            options="",
            break_it=lambda service: service.install_with_fault("dies-in-trial"),
        )

    def test_the_main_pid_is_the_new_one_before_the_old_one_exits(self) -> None:
        service = self.started("library")
        old = service.main_pid()
        request = InFlight(2.0)
        wait_for("the request is in flight", lambda: service.status()["connections"]["open"] == 1)
        with self.watched(service) as seen:
            service.reload_well()
            self.assertTrue(lives(old))
            new = service.main_pid()
            self.assertNotEqual(new, old)
            self.assertEqual(service.show("StatusText"), "generation 2 serves, 1 older drain")
            request.end()
            self.assertEqual(request.answer, f"gen=1 pid={old}")
            wait_for("the old process ends", lambda: not lives(old))
            wait_for("that is told", lambda: service.show("StatusText") == "generation 2 serves")
        self.assertEqual(service.main_pid(), new)
        self.only_up(seen)

    def only_up(self, seen) -> None:
        self.assertGreater(len(seen), 3)
        self.assertLessEqual(set(seen), {("active", "0", "lives"), ("reloading", "0", "lives")})

    def test_ten_in_a_row_under_load(self) -> None:
        for program in ("axum", "fixture"):
            with self.subTest(program):
                service = self.service()
                service.install(program)
                service.write_from_page("library")
                service.start()
                cookies = service.cookies()
                load = Oracle("--new", "4", "--rate", "300", "--kept", "8", "--slow", "2:1", "--monotonic")
                with self.watched(service) as seen:
                    for generation in range(2, 12):
                        wait_for("few drain", lambda: len(service.status()["draining"]) < 4)
                        service.reload_well()
                        self.assertRegex(
                            service.show("StatusText"), rf"^generation {generation} serves(, [1-9] older drain)?$"
                        )
                report = load.stop()
                self.assertEqual(report["failed"], 0, report)
                self.assertEqual(len(report["generations"]), 11, report)
                self.assertGreater(report["requests"], 1000)
                self.only_up(seen)
                self.assertEqual(service.cookies(), cookies)
                wait_for("all have drained", lambda: service.show("StatusText") == "generation 11 serves")
                self.assertEqual(service.processes(), [service.main_pid()])
                service.stop()

    def test_a_signal_as_the_trigger(self) -> None:
        service = self.started("signal")
        old = service.main_pid()
        service.reload_well()
        wait_for("the new build is the main process", lambda: service.main_pid() not in (0, old))
        wait_for("the old process ends", lambda: not lives(old))
        wait_for("the unit is up", service.is_up)
        self.assertEqual(who(), (2, service.main_pid()))
        # It answers nobody: the reload succeeds, the upgrade does not.
        service.install_script("exit 1\n")
        service.reload_well()
        wait_for("the reason is told", lambda: "the last upgrade failed" in service.show("StatusText"))
        wait_for("the unit is up", service.is_up)
        self.assertEqual(who(), (2, service.main_pid()))


if __name__ == "__main__":
    unittest.main()
