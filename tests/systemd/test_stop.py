"""Ends, wanted and not: stop, crash, watchdog, timeouts."""

from __future__ import annotations

import subprocess
import signal
import unittest

from lab import HANDOVER, InFlight, ServiceCase, lives, run, wait_for, who


class Stop(ServiceCase):
    def stopped_well(self, service, pids, results=("success",)) -> None:
        self.assertIn(service.show("Result"), results, service.journal())
        self.assertEqual([pid for pid in pids if lives(pid)], [])
        self.assertEqual(service.show("NRestarts"), "0")

    def upgraded_with_a_request(self, *changes):
        service = self.started("library", *changes)
        old = service.main_pid()
        service.reload_well()
        wait_for("the old process ends", lambda: not lives(old))
        request = InFlight(1.5)
        wait_for("the request is in flight", lambda: service.status()["connections"]["open"] == 1)
        return service, service.main_pid(), request

    def test_after_an_upgrade(self) -> None:
        service, pid, request = self.upgraded_with_a_request()
        service.stop()
        self.assertEqual(request.end().answer, f"gen=2 pid={pid}")
        self.stopped_well(service, [pid])

    def test_a_restart_after_an_upgrade(self) -> None:
        service, pid, request = self.upgraded_with_a_request()
        run("systemctl", "restart", service.unit)
        self.assertEqual(request.end().answer, f"gen=2 pid={pid}")
        self.assertEqual(who(), (1, service.main_pid()))

    def test_why_there_is_an_exec_stop(self) -> None:
        """systemd does not wait for a main process that was not its child when it became the main one."""
        service, _pid, request = self.upgraded_with_a_request(
            (f"ExecStop=-{HANDOVER} stop --pid $MAINPID\n", "")
        )
        service.stop()
        if request.end().answer is None:
            self.assertIn("with signal SIGKILL", service.journal())
        else:
            self.skipTest("this systemd waits")

    def test_during_a_drain_every_generation_finishes_its_requests(self) -> None:
        service = self.started("library")
        old = service.main_pid()
        requests = [InFlight(4.0)]
        wait_for("the request is in flight", lambda: service.status()["connections"]["open"] == 1)
        service.reload_well()
        new = service.main_pid()
        # Of the two the main process is done first.
        requests.append(InFlight(1.0))
        wait_for("the request is in flight", lambda: service.status()["connections"]["open"] == 1)
        service.stop()
        self.assertEqual([request.end().answer for request in requests], [f"gen=1 pid={old}", f"gen=2 pid={new}"])
        self.stopped_well(service, [old, new])

    def while_upgrading(self, fault: str, options: str = "") -> None:
        service = self.started("library", options=options)
        request = InFlight(1.5)
        wait_for("the request is in flight", lambda: service.status()["connections"]["open"] == 1)
        service.install_with_fault(fault)
        old = service.main_pid()
        reload = subprocess.Popen(
            ["systemctl", "reload", service.unit], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        stage = "trial" if fault == "none" else "upgrading"
        wait_for("the upgrade is under way", lambda: len(service.processes()) == 3 and service.status()["state"] == stage)
        pids = service.processes()
        service.stop()
        self.assertNotEqual(reload.wait(30), 0)
        self.assertEqual(request.end().answer, f"gen=1 pid={old}")
        # That of the command, where it did not see its upgrade succeed; the server has exited as it should. A stop in the
        # trial is no failure, and the command may or may not hear of it before its own SIGTERM.
        results = ("exit-code", "signal", "success") if stage == "trial" else ("exit-code", "signal")
        self.stopped_well(service, pids, results)
        self.assertEqual((service.show("ExecMainCode"), service.show("ExecMainStatus")), ("1", "0"))

    def test_while_the_new_build_starts(self) -> None:
        self.while_upgrading("hang-after-adopted")

    def test_while_the_new_build_starts_and_has_no_handlers_yet(self) -> None:
        self.while_upgrading("hang")

    def test_in_the_trial(self) -> None:
        self.while_upgrading("none", "--trial 20s")


class Restart(ServiceCase):
    def test_on_failure_and_only_then(self) -> None:
        service = self.started("library", ("Restart=always", "Restart=on-failure"))
        service.reload_well()
        old = service.main_pid()
        self.kill(old)
        wait_for("it is restarted", lambda: service.is_up() and service.main_pid() not in (0, old))
        self.assertEqual((service.show("NRestarts"), who()), ("1", (1, service.main_pid())))
        service.reload_well()
        self.kill(service.main_pid(), signal.SIGTERM)
        wait_for("it ends", lambda: service.show("ActiveState") == "inactive")
        self.assertEqual(service.show("Result"), "success")
        self.assertEqual(service.processes(), [])

    def test_the_death_of_a_draining_process_is_no_failure(self) -> None:
        service = self.started("library")
        old = service.main_pid()
        InFlight(20.0)
        wait_for("the request is in flight", lambda: service.status()["connections"]["open"] == 1)
        service.reload_well()
        new = service.main_pid()
        self.kill(old)
        wait_for("that is told", lambda: service.show("StatusText") == "generation 2 serves")
        self.assertTrue(service.is_up())
        self.assertEqual((service.main_pid(), service.show("NRestarts")), (new, "0"))

    def test_a_crash_while_an_older_generation_drains(self) -> None:
        """systemd is not told of the death of a process whose parent is another than itself."""
        service = self.started("library")
        old = service.main_pid()
        request = InFlight(4.0)
        wait_for("the request is in flight", lambda: service.status()["connections"]["open"] == 1)
        service.reload_well()
        new = service.main_pid()
        self.kill(new)
        wait_for("it is restarted", lambda: service.is_up() and service.main_pid() not in (0, old, new))
        self.assertEqual(request.end().answer, f"gen=1 pid={old}")
        self.assertEqual(who(), (1, service.main_pid()))

    def test_the_death_of_the_old_process_in_the_trial(self) -> None:
        """The new process would take over; systemd, whose main process died, starts the service anew."""
        service = self.started("library", options="--trial 20s")
        old = service.main_pid()
        run("systemctl", "reload", "--no-block", service.unit)
        wait_for("the trial runs", lambda: service.status()["state"] == "trial")
        self.kill(old)
        wait_for("it is restarted", lambda: service.is_up() and service.main_pid() not in (0, old))
        self.assertEqual(who(), (1, service.main_pid()))


class Watchdog(ServiceCase):
    WITH = ("Restart=always", "Restart=no\nWatchdogSec=2s")

    def test_it_is_answered_by_every_generation(self) -> None:
        service = self.started("library", self.WITH, options="--watchdog true --trial 2500ms")
        for generation in (2, 3):
            # The trial is longer than the watchdog waits.
            service.reload_well()
            self.assertEqual(who(), (generation, service.main_pid()))
        pings = {service.show("WatchdogTimestampMonotonic")}
        wait_for("the last generation answers it", lambda: pings.add(service.show("WatchdogTimestampMonotonic")) or len(pings) > 3)
        self.assertTrue(service.is_up())

    def test_without_an_answer_the_service_is_killed(self) -> None:
        service = self.started("library", self.WITH)
        wait_for("it is killed", lambda: service.show("Result") == "watchdog")


class Timeouts(ServiceCase):
    def test_a_reload_that_systemd_does_not_wait_for(self) -> None:
        """TimeoutStartSec= shorter than the ready timeout: the command is killed, the upgrade goes on."""
        service = self.started("library", ("Restart=", "TimeoutStartSec=2s\nRestart="), options="--ready-timeout 6s")
        old = service.main_pid()
        service.install_with_fault("hang-after-adopted")
        self.assertNotEqual(service.reload().returncode, 0)
        self.assertIn("Reload operation timed out", service.journal())
        self.assertEqual(who(), (1, old))
        wait_for("it is given up", lambda: "was not ready within 6s" in service.show("StatusText"))
        wait_for("the unit is up", service.is_up)
        service.install("fixture")
        service.reload_well()
        self.assertEqual(who(), (2, service.main_pid()))


if __name__ == "__main__":
    unittest.main()
