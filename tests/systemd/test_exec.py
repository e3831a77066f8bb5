"""`handover exec` as a service: any program, and a main process that never changes."""

from __future__ import annotations

import unittest

from lab import HANDOVER, InFlight, Oracle, Service, ServiceCase, answer_of, lives, queue_of, run, wait_for, who


class Exec(ServiceCase):
    def supervised(self, *changes) -> Service:
        service = self.service()
        service.install("plain")
        service.write_from_page("exec", ("--listen http=", "--trial 300ms --listen http="), *changes)
        service.start()
        return service

    def workers(self, service: Service):
        return sorted(worker["pid"] for worker in service.status()["workers"])

    def test_reloads_under_load_replace_the_workers_and_never_the_main_process(self) -> None:
        service = self.supervised()
        main = service.main_pid()
        self.assertEqual(service.show("StatusText"), "generation 1 serves")
        load = Oracle(self, "--new", "4", "--kept", "4")
        request = InFlight(3.0)
        wait_for("the request is in flight", lambda: service.status()["connections"]["open"] > 4)
        with self.watched(service) as seen:
            for generation in (2, 3):
                old = self.workers(service)
                service.reload_well()
                self.assertFalse(set(old) & {who()[1]})
        self.assertTrue(request.end().answer.startswith("gen=1 "))
        report = load.stop()
        self.assertEqual(report["failed"], 0, report)
        self.assertLessEqual({state for state, _, _ in seen}, {"active", "reloading"})
        self.assertEqual((who()[0], service.main_pid(), service.show("NRestarts")), (3, main, "0"))
        wait_for("the old ones are gone", lambda: service.processes() == sorted([main, *self.workers(service)]))
        service.stop()
        self.assertEqual(service.show("Result"), "success")

    def test_a_reload_that_fails_says_so_and_changes_nothing(self) -> None:
        service = self.supervised()
        before = (service.main_pid(), self.workers(service))
        service.install_script("echo cannot reach the database >&2\nexit 1\n")
        self.assertEqual(service.reload().returncode, 1)
        self.assertIn("of the new build exited with status 1 before it was ready", service.journal())
        self.assertIn("| cannot reach the database", service.journal())
        status = "generation 1 serves; the last upgrade failed: "
        wait_for("the status line tells", lambda: service.show("StatusText").startswith(status))
        self.assertEqual((service.main_pid(), self.workers(service)), before)
        self.assertTrue(service.is_up())

    def test_a_program_that_does_not_start_fails_the_unit(self) -> None:
        service = self.service()
        service.install_script("exit 3\n")
        service.write_from_page("exec", ("Restart=always", "Restart=no"))
        run("systemctl", "daemon-reload")
        started = run("systemctl", "start", service.unit, check=False)
        self.assertNotEqual(started.returncode, 0)
        self.assertIn("it exited with status 3 before it was ready", service.journal())

    def test_a_stop_drains(self) -> None:
        service = self.supervised()
        request = InFlight(2.0)
        wait_for("the request is in flight", lambda: service.status()["connections"]["open"] == 1)
        service.stop()
        self.assertTrue(request.end().answer.startswith("gen=1 "))
        self.assertEqual(service.show("Result"), "success")

    def test_connections_are_counted_where_netlink_is_denied(self) -> None:
        families = "Type=notify\nRestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX"
        service = self.supervised(("Type=notify", families), ("--trial 300ms", "--trial 300ms --drain-timeout 500ms"))
        request = InFlight(60.0)
        wait_for("the request is counted", lambda: service.status()["connections"]["open"] == 1)
        stopped = run(HANDOVER, "stop", "--pid", str(service.main_pid()), check=False)
        self.assertEqual(stopped.returncode, 5, stopped)
        self.assertIn("1 connection was closed before it had ended", stopped.stderr)
        request.end()

    def test_the_supervisor_is_replaced_and_stays_the_main_process(self) -> None:
        service = self.supervised()
        main, workers = service.main_pid(), self.workers(service)
        load = Oracle(self, "--new", "4", "--kept", "4")
        with self.watched(service) as seen:
            for _ in range(3):
                run(HANDOVER, "upgrade", "--self", "--pid", str(main))
            service.reload_well()
        report = load.stop()
        self.assertEqual(report["failed"], 0, report)
        self.assertLessEqual({state for state, _, _ in seen}, {"active", "reloading"})
        self.assertEqual((who()[0], service.main_pid(), service.show("NRestarts")), (2, main, "0"))
        self.assertEqual(service.show("StatusText"), "generation 2 serves")
        self.assertFalse(set(workers) & set(service.processes()))
        # What it has put into the fd store is still there for the next one.
        cookies = service.cookies()
        self.kill(main)
        wait_for("the service is started again", lambda: service.is_up() and service.main_pid() not in (0, main))
        self.assertEqual(service.cookies(), cookies)

    def test_the_listeners_outlive_even_the_supervisor(self) -> None:
        self.they_outlive_the_supervisor(self.supervised())

    def test_what_the_program_has_bound_itself_outlives_even_the_supervisor(self) -> None:
        service = self.service()
        service.install("plain")
        binds = f"{service.program} poll 127.0.0.1:8080"
        service.write_from_page("exec", ("--listen http=8080", "--trial 300ms"), (service.program, binds))
        service.start()
        self.assertEqual([one["source"] for one in service.status()["listeners"]], ["intercepted"])
        self.they_outlive_the_supervisor(service)
        load = Oracle(self, "--new", "4", "--kept", "4")
        for _ in range(3):
            service.reload_well()
        report = load.stop()
        self.assertEqual(report["failed"], 0, report)

    def they_outlive_the_supervisor(self, service: Service) -> None:
        cookies, main = service.cookies(), service.main_pid()
        old = self.workers(service)
        for pid in (main, *old):
            self.freeze(pid)
        clients = queue_of(count=20)
        self.kill(main)
        for client in clients:
            self.assertIn(b"gen=1 pid=", answer_of(client))
        # systemd wakes the old workers to end them, so they may have answered before it is.
        wait_for("the service is started again", lambda: service.is_up() and service.main_pid() not in (0, main))
        self.assertEqual(service.cookies(), cookies)
        self.assertFalse([pid for pid in old if lives(pid)])


if __name__ == "__main__":
    unittest.main()
