"""docs/systemd.md: its units are the ones that the other tests run."""

from __future__ import annotations

import unittest

from lab import HANDOVER, ServiceCase, run, units_of_page, who

SERVICES = {
    "library": (),
    "signal": (),
    "socket-service": (),
    "store": (),
    "hardened": (),
    "user": (("User=app", "User=daemon"),),
    "exec": (),
}


class Page(ServiceCase):
    def test_there_are_these_units_and_no_others(self) -> None:
        self.assertEqual(set(units_of_page()), {*SERVICES, "socket"})

    def test_check_finds_nothing_wrong_with_them(self) -> None:
        for block, changes in SERVICES.items():
            if block == "signal":
                continue  # It says what the page says: that nobody is answered.
            with self.subTest(block):
                service = self.started(block, *changes)
                checked = run(HANDOVER, "check", "--unit", service.unit, check=False)
                self.assertEqual(checked.returncode, 0, checked.stdout + checked.stderr)
                self.assertNotIn("warning", checked.stdout)
                service.stop()

    def finds(self, *findings: str, block: str = "library", change=("Restart=always", "Restart=always")) -> None:
        with self.subTest(findings):
            service = self.started(block, change)
            checked = run(HANDOVER, "check", "--unit", service.unit, check=False)
            for finding in findings:
                self.assertRegex(checked.stdout, finding)
            service.stop()

    def test_check_finds_what_the_page_warns_of(self) -> None:
        self.finds("warning +unit +ExecReload=.*kill -USR2", block="signal")
        self.finds("warning +unit +OOMPolicy=stop", change=("OOMPolicy=continue", ""))
        changes = {
            "TimeoutStartSec=5s": ["problem +unit +TimeoutStartSec=5s"],
            "TimeoutStopSec=20s": ["warning +unit +TimeoutStopSec=20s"],
            "Restart=on-failure\nKillMode=mixed": [
                "warning +unit +Restart=on-failure",
                "warning +unit +KillMode=mixed",
            ],
            "ExecStop=": ["warning +unit +no ExecStop="],
            "ExecStop=\nExecStop=" + HANDOVER + " stop --pid $MAINPID": ["warning +unit +ExecStop=.*is a failed one"],
        }
        for settings, findings in changes.items():
            self.finds(*findings, change=("Restart=always", f"Restart=always\n{settings}"))

    def test_the_user_sees_the_service_in_its_own_words(self) -> None:
        service = self.started("library")
        self.assertEqual(who(), (1, service.main_pid()))
        shown = run("systemctl", "status", "--no-pager", service.unit).stdout
        self.assertIn('Status: "generation 1 serves"', shown)


if __name__ == "__main__":
    unittest.main()
