"""Units that may do little, and that run as others."""

from __future__ import annotations

import json
import pwd
import subprocess
import sys
import unittest

from lab import HANDOVER, PATIENCE_SECONDS, Oracle, ServiceCase, get, run, who

ASK = "from urllib.request import urlopen; print(urlopen('http://127.0.0.1:8080/').read().decode())"


class Hardened(ServiceCase):
    def upgrades(self, service, ask) -> None:
        cookies = service.cookies()
        self.assertEqual(ask(), f"gen=1 pid={service.main_pid()}")
        # As the unit does it, from inside its sandbox.
        service.reload_well()
        self.assertEqual(ask(), f"gen=2 pid={service.main_pid()}")
        # As root does it, from outside.
        run(HANDOVER, "upgrade", "--pid", str(service.main_pid()))
        self.assertEqual(ask(), f"gen=3 pid={service.main_pid()}")
        self.assertIn(str(service.main_pid()), run(HANDOVER, "ps").stdout)
        # And a failure says why.
        service.install_script("echo no database >&2\nexit 1\n")
        self.assertEqual(service.reload().returncode, 1)
        self.assertIn("no database", service.journal())
        self.assertEqual(ask(), f"gen=3 pid={service.main_pid()}")
        self.assertTrue(service.is_up())
        self.assertEqual(service.cookies(), cookies)
        service.stop()
        self.assertEqual(service.show("Result"), "success", service.journal())

    def test_with_a_dynamic_user_and_next_to_no_rights(self) -> None:
        service = self.started("hardened")
        with open(f"/proc/{service.main_pid()}/status", encoding="ascii") as status:
            fields = dict(line.rstrip("\n").split(":\t", 1) for line in status)
        self.assertNotIn("0", fields["Uid"].split())
        self.assertEqual((fields["NoNewPrivs"], int(fields["CapBnd"], 16), fields["Seccomp"]), ("1", 0, "2"))
        self.upgrades(service, get)

    def test_with_a_network_of_its_own(self) -> None:
        service = self.started("hardened", ("PrivateTmp=yes", "PrivateTmp=yes\nPrivateNetwork=yes"))
        with self.assertRaises(OSError):
            get()

        def ask() -> str:
            target = str(service.main_pid())
            return run("nsenter", "--target", target, "--net", sys.executable, "-c", ASK).stdout.strip()

        self.upgrades(service, ask)

    def test_without_a_runtime_directory(self) -> None:
        service = self.started("hardened", ("RuntimeDirectory=app\n", ""))
        self.upgrades(service, get)

    def test_with_several_runtime_directories(self) -> None:
        service = self.started("hardened", ("RuntimeDirectory=app\n", "RuntimeDirectory=app app/more\n"))
        self.upgrades(service, get)

    def test_axum_under_load(self) -> None:
        service = self.service()
        service.install("axum")
        service.write_from_page("hardened")
        service.start()
        load = Oracle("--new", "4", "--kept", "4", "--monotonic")
        service.reload_well()
        service.reload_well()
        report = load.stop()
        self.assertEqual((report["failed"], len(report["generations"])), (0, 3), report)


class AnotherUser(ServiceCase):
    def begin(self, *changes):
        # A user that every system has.
        return self.started("user", ("User=app", "User=daemon"), *changes)

    def upgrade_as(self, user: str, pid: int) -> "subprocess.CompletedProcess[str]":
        command = [HANDOVER, "upgrade", "--pid", str(pid), "--json"]
        group = pwd.getpwnam(user).pw_gid
        return subprocess.run(
            command, user=user, group=group, extra_groups=[], capture_output=True, text=True, timeout=PATIENCE_SECONDS
        )

    def test_the_user_itself_reloads(self) -> None:
        service = self.begin()
        self.assertEqual(who(80), (1, service.main_pid()))
        service.reload_well()
        self.assertEqual(who(80), (2, service.main_pid()))

    def test_root_reloads(self) -> None:
        service = self.begin(("ExecReload=", "ExecReload=+"))
        service.reload_well()
        self.assertEqual(who(80), (2, service.main_pid()))
        with open(f"/proc/{service.main_pid()}/status", encoding="ascii") as status:
            self.assertNotIn("Uid:\t0", status.read())

    def test_who_may_upgrade(self) -> None:
        service = self.begin(("AmbientCapabilities=CAP_NET_BIND_SERVICE\n", ""), (":80", ":8080"))
        refused = self.upgrade_as("nobody", service.main_pid())
        self.assertEqual(refused.returncode, 4, refused)
        done = self.upgrade_as("daemon", service.main_pid())
        self.assertEqual(done.returncode, 0, done)
        self.assertEqual(json.loads(done.stdout.splitlines()[-1])["generation"], 2)
        run(HANDOVER, "upgrade", "--pid", str(service.main_pid()))
        self.assertEqual(who(), (3, service.main_pid()))


if __name__ == "__main__":
    unittest.main()
