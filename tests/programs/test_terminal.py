"""A supervisor in a terminal whose output is stopped, as by ^S: it goes on, and says again what it does when it may."""

from __future__ import annotations

import os
import pty
import termios
import unittest

from lab import PATIENCE_SECONDS, Supervised, program, wait_for

UPGRADES = 3


class Terminal(unittest.TestCase):
    def test_a_stopped_terminal_stops_nothing(self) -> None:
        screen, terminal = pty.openpty()
        self.addCleanup(os.close, screen)
        self.addCleanup(os.close, terminal)
        os.set_blocking(screen, False)
        service = Supervised(
            self, ["--workers", "2"], "python3", program("threads.py"), env={"RUST_LOG": "info"}, streams=terminal
        )
        termios.tcflow(terminal, termios.TCOOFF)
        for _ in range(UPGRADES):
            service.upgrade()
        bad = service.ask("upgrade", "--exe", "/bin/false")
        self.assertEqual(bad.returncode, 1, bad.stdout)
        self.assertEqual(service.status()["generation"], 1 + UPGRADES)
        termios.tcflow(terminal, termios.TCOON)
        service.upgrade()
        shown = bytearray()

        def is_shown() -> bool:
            try:
                shown.extend(os.read(screen, 65536))
            except BlockingIOError:
                pass
            return b"generation %d serves" % (2 + UPGRADES) in shown

        wait_for("the log of the last upgrade", is_shown)
        self.assertEqual(service.ask("stop").returncode, 0)
        self.assertEqual(service.process.wait(PATIENCE_SECONDS), 0)


if __name__ == "__main__":
    unittest.main()
