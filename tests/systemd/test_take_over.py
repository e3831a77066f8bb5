"""A plain service is moved under `handover exec`, by the second unit that docs/any-program.md has."""

from __future__ import annotations

import os
import unittest

from lab import HANDOVER, LAB, PORT, Oracle, ServiceCase, run, units_of_page, wait_for, who

PAGE = os.path.join(LAB, "docs", "any-program.md")
PLAIN = """\
[Service]
Environment=HANDOVER_GENERATION=7
ExecStart={program}
Restart=on-failure
"""


def answers() -> bool:
    """A plain service counts as started before it listens."""
    try:
        who()
    except OSError:
        return False
    return True


class TakeOver(ServiceCase):
    def test_a_unit_is_moved_without_losing_a_request(self) -> None:
        before, after = self.service(), self.service()
        serves = os.path.join(before.directory, "serves")
        before.install("plain")
        with open(serves, "w", encoding="utf-8") as script:
            script.write(f"#!/bin/sh\nexec {before.program} poll 127.0.0.1:{PORT}\n")
        os.chmod(serves, 0o755)
        before.write(PLAIN.format(program=serves))
        before.start()
        wait_for("it answers", answers)
        self.assertEqual(who()[0], 7)
        file, text = units_of_page(PAGE)["take-over"]
        for old, new in [
            ("app.service", before.unit), ("/srv/app/server", serves), ("/usr/local/bin/handover", HANDOVER),
        ]:
            self.assertIn(old, text)
            text = text.replace(old, new)
        after.write(text)
        load = Oracle(self, "--new", "4", "--kept", "4")
        after.start()
        wait_for("the first unit is over", lambda: before.show("ActiveState") == "inactive")
        self.assertEqual((before.show("Result"), who()[0]), ("success", 1))
        after.reload_well()
        report = load.stop()
        self.assertEqual((report["failed"], who()[0]), (0, 2), report)
        # From then on it starts by itself.
        after.stop()
        after.start()
        self.assertEqual(who()[0], 1)
        after.stop()


if __name__ == "__main__":
    unittest.main()
