"""What every part of the lab needs: its places, running commands, and waiting."""

from __future__ import annotations

import os
import subprocess
import time
from typing import Any, Callable

LAB = os.environ["HANDOVER_LAB"]
BIN = os.path.join(LAB, "bin")
BALANCER = "10.77.0.1"
PORT = 8080
# Generous, since other work may slow the machine down; what passes takes a fraction of it.
PATIENCE_SECONDS = 60.0


def run(*command: str, check: bool = True, **options: Any) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False, **options)
    if check and done.returncode != 0:
        raise AssertionError(f"{' '.join(command)}: exit {done.returncode}: {done.stdout}{done.stderr}")
    return done


def wait_for(what: str, condition: Callable[[], Any], seconds: float = PATIENCE_SECONDS) -> Any:
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what}")
        time.sleep(0.02)


def write(path: str, text: str, mode: int = 0o644) -> str:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
    os.chmod(path, mode)
    return path
