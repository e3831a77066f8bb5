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
                service.stop()

    def test_check_finds_what_the_page_warns_of(self) -> None:
        warnings = {
            "signal": (),
            "library": (("RuntimeDirectory", "TimeoutStartSec=5s\nRuntimeDirectory"),),
        }
        for block, changes in warnings.items():
            with self.subTest(block):
                service = self.started(block, *changes)
                checked = run(HANDOVER, "check", "--unit", service.unit, check=False)
                self.assertNotEqual(checked.stdout.count("unit"), 0, checked.stdout)
                self.assertRegex(checked.stdout, "kill -USR2|TimeoutStartSec|5 ?s")
                service.stop()

    def test_the_user_sees_the_service_in_its_own_words(self) -> None:
        service = self.started("library")
        self.assertEqual(who(), (1, service.main_pid()))
        shown = run("systemctl", "status", "--no-pager", service.unit).stdout
        self.assertIn('Status: "generation 1 serves"', shown)


if __name__ == "__main__":
    unittest.main()
