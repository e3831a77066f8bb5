"""Sockets that systemd holds: those of a .socket unit, and those in the fd store."""

from __future__ import annotations

import os
import signal
import socket
import unittest

from lab import BIN, HANDOVER, PORT, InFlight, Oracle, Service, ServiceCase, answer_of, lives, queue_of, run, wait_for, who

STORED = "--fd-store true --trial 300ms"


def refused(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) != 0


class SocketActivation(ServiceCase):
    def activated(self, options: str = "--trial 300ms", *changes) -> Service:
        service = self.service()
        service.write_from_page("socket")
        service.write_from_page("socket-service", *changes, options=options)
        service.start(f"{service.name}.socket")
        return service

    def test_the_first_generation_and_upgrades(self) -> None:
        service = self.activated()
        self.assertEqual(service.show("ActiveState"), "inactive")
        self.assertEqual(who(), (1, service.main_pid()))
        (listener,) = service.status()["listeners"]
        self.assertEqual((listener["name"], listener["source"]), ("http", "activated"))
        load = Oracle(self, "--new", "4", "--kept", "4", "--monotonic")
        for _ in range(3):
            service.reload_well()
        report = load.stop()
        self.assertEqual(report["failed"], 0, report)
        self.assertEqual(who(), (4, service.main_pid()))
        self.assertEqual(service.cookies(), {"http": listener["cookie"]})
        # The socket is the manager's: it outlives the service, and the next one is given it again.
        service.stop()
        self.assertEqual(who(), (1, service.main_pid()))
        self.assertEqual(service.cookies(), {"http": listener["cookie"]})

    def test_a_crash_after_an_upgrade(self) -> None:
        service = self.activated()
        who()
        service.reload_well()
        cookies, old = service.cookies(), service.main_pid()
        self.freeze(old)
        clients = queue_of(count=20)
        self.kill(old)
        for client in clients:
            self.assertIn(b"gen=1 pid=", answer_of(client))
        self.assertNotEqual(service.main_pid(), old)
        self.assertEqual(service.cookies(), cookies)

    def test_with_a_store_as_well_no_socket_comes_twice(self) -> None:
        service = self.activated(STORED, ("RuntimeDirectory", "FileDescriptorStoreMax=8\nRuntimeDirectory"))
        who()
        cookies = service.cookies()
        for generation in (1, 1):
            old = service.main_pid()
            self.kill(old)
            wait_for("it is restarted", lambda old=old: service.is_up() and service.main_pid() != old)
            self.assertEqual(who(), (generation, service.main_pid()))
            self.assertEqual(service.cookies(), cookies)
        self.assertNotIn("not wanted any more", service.journal())


class Store(ServiceCase):
    def stored(self) -> str:
        return self.app.show("NFileDescriptorStore")

    def begin(self, *changes, options: str = STORED) -> Service:
        self.app = self.started("store", *changes, options=options)
        wait_for("the listeners are stored", lambda: self.stored() != "0")
        return self.app

    def crash(self, number: int = signal.SIGKILL) -> None:
        old = self.app.main_pid()
        self.kill(old, number)
        wait_for("it is restarted", lambda: self.app.is_up() and self.app.main_pid() not in (0, old))

    def test_clients_that_wait_in_the_queue_are_answered_after_a_crash(self) -> None:
        service = self.begin()
        service.reload_well()
        self.assertEqual(self.stored(), "1")
        cookies, old = service.cookies(), service.main_pid()
        accepted = [InFlight(20.0) for _ in range(3)]
        wait_for("they are accepted", lambda: service.status()["connections"]["open"] == 3)
        self.freeze(old)
        clients = queue_of(count=50)
        self.crash()
        new = service.main_pid()
        # Lost is what had been accepted, and nothing else.
        for client in clients:
            self.assertIn(f"gen=1 pid={new}".encode(), answer_of(client))
        for request in accepted:
            self.assertIsNotNone(request.end().error)
        self.assertEqual(service.cookies(), cookies)
        self.assertEqual(self.stored(), "1")
        # And it can be upgraded, and crash again.
        service.reload_well()
        self.assertEqual(who(), (2, service.main_pid()))
        self.crash()
        self.assertEqual((who()[0], service.cookies(), self.stored()), (1, cookies, "1"))

    def test_a_crash_under_load_refuses_nobody(self) -> None:
        service = self.begin()
        cookies = service.cookies()
        new, kept = 4, 8
        load = Oracle(self, "--new", str(new), "--kept", str(kept), "--patience", "20s")
        for _ in range(3):
            first = service.status()["connections"]["accepted"]
            wait_for("the load runs", lambda f=first: service.status()["connections"]["accepted"] > f + 50)
            self.crash()
        wait_for("it is answered again", lambda: service.status()["connections"]["accepted"] > 50)
        report = load.stop()
        outcomes = {name: count for name, count in report["outcomes"].items() if count and name != "ok"}
        self.assertLessEqual(set(outcomes), {"reset", "cut"}, report)
        self.assertLessEqual(report["failed"], 3 * (new + kept), report)
        self.assertEqual(service.cookies(), cookies)
        print(f"lost of {report['requests']} in 3 crashes: {outcomes}; ", end="", flush=True)

    def test_a_listener_that_is_removed_leaves_the_store(self) -> None:
        service = self.begin(options=f"{STORED} --tcp admin=127.0.0.1:9090")
        wait_for("both are stored", lambda: self.stored() == "2")
        service.install_script(
            f"exec {os.path.join(BIN, 'fixture')} --listen 0.0.0.0:{PORT} --fd-store true --trial 300ms\n"
        )
        service.reload_well()
        wait_for("it has left the store", lambda: self.stored() == "1")
        wait_for("nobody listens any more", lambda: refused(9090))
        self.crash()
        self.assertEqual(list(service.cookies()), ["http"])

    def test_a_listener_whose_address_changes_in_an_upgrade(self) -> None:
        service = self.begin()
        service.install_script(f"exec {os.path.join(BIN, 'fixture')} --listen 0.0.0.0:8081 --fd-store true\n")
        service.reload_well()
        wait_for("the old one has left the store", lambda: refused(PORT))
        cookies = service.cookies()
        self.assertEqual(self.stored(), "1")
        self.crash()
        self.assertEqual((service.cookies(), self.stored()), (cookies, "1"))
        self.assertEqual(who(8081)[0], 1)

    def test_a_restart_with_another_address_does_not_keep_the_old_one(self) -> None:
        service = self.begin()
        service.write_from_page("store", ("0.0.0.0:8080", "0.0.0.0:8081"), options=STORED)
        run("systemctl", "daemon-reload")
        run("systemctl", "restart", service.unit)
        self.assertEqual(who(8081)[0], 1)
        wait_for("the old one is closed", lambda: refused(PORT))
        self.assertEqual(self.stored(), "1")

    def test_a_restart_with_an_address_that_overlaps(self) -> None:
        service = self.begin()
        for before, after in (("0.0.0.0", "127.0.0.1"), ("127.0.0.1", "0.0.0.0")):
            service.write_from_page("store", ("0.0.0.0:8080", f"{after}:8080"), options=STORED)
            run("systemctl", "daemon-reload")
            run("systemctl", "restart", service.unit)
            self.assertEqual(service.status()["listeners"][0]["address"], f"{after}:8080", f"after {before}")
            wait_for("only the new one is stored", lambda: self.stored() == "1")
            cookies = service.cookies()
            self.crash()
            self.assertEqual((service.cookies(), self.stored()), (cookies, "1"))

    def test_a_unix_listener_keeps_its_queue_and_its_path(self) -> None:
        path = "/run/handover-lab/store.sock"
        service = self.begin(options=f"{STORED} --unix admin={path}")
        wait_for("both are stored", lambda: self.stored() == "2")
        cookies = service.cookies()
        self.freeze(service.main_pid())
        client = socket.socket(socket.AF_UNIX)
        client.connect(path)
        client.sendall(b"GET / HTTP/1.0\r\nConnection: close\r\n\r\n")
        self.crash()
        self.assertIn(b"gen=1 pid=", answer_of(client))
        self.assertEqual(service.cookies(), cookies)
        service.stop()
        self.assertFalse(os.path.exists(path))

    def test_nothing_is_stored_unasked(self) -> None:
        service = self.started("store")
        service.reload_well()
        self.assertEqual(service.show("NFileDescriptorStore"), "0")


if __name__ == "__main__":
    unittest.main()
