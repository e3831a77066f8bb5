"""The modules by themselves, as Ansible runs them on a machine, and without one."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import tempfile
import unittest
from typing import Any, Dict

from base import BIN, LAB, run, write

LIBRARY = os.path.abspath("scripts/ansible/roles/handover/library")


@functools.lru_cache(maxsize=None)
def python() -> str:
    """The one that knows of Ansible, which need not be this one."""
    book = shutil.which("ansible-playbook")
    assert book
    with open(book, encoding="utf-8") as file:
        return file.readline().lstrip("#!").strip()


def module(which: str, **parameters: Any) -> Dict[str, Any]:
    """What it answers."""
    done = run(python(), f"{LIBRARY}/{which}.py", check=False, input=json.dumps({"ANSIBLE_MODULE_ARGS": parameters}))
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


class Case(unittest.TestCase):
    def setUp(self) -> None:
        self.directory = tempfile.mkdtemp(dir=LAB)

    def file(self, name: str, text: str, mode: int = 0o644) -> str:
        return write(os.path.join(self.directory, name), text, mode)


class Release(Case):
    def test_why_no_service_was_found_is_told(self) -> None:
        with subprocess.Popen("true") as ended:
            pass
        answer = module("handover_release", root=self.directory, release="1", handover=f"{BIN}/handover",
                        pid_file=self.file("pid", f"{ended.pid}\n"))
        self.assertTrue(answer.get("failed"), answer)
        self.assertIn("there is no such process", answer["msg"])

    def test_why_an_upgrade_was_not_begun_is_told(self) -> None:
        status = {"generation": 1, "pid": 1, "state": "serving", "build": {"path": "/old", "device": 0, "inode": 0}}
        command = self.file("handover", f"""#!/bin/sh
case $1 in
    status) echo '{json.dumps(status)}' ;;
    upgrade) echo '{{"event":"error","exit_code":4,"message":"two is too many"}}'; exit 4 ;;
esac
""", 0o755)
        self.file("releases/1/server", "")
        answer = module("handover_release", root=self.directory, release="1", program="server", name="app",
                        handover=command)
        self.assertTrue(answer.get("failed"), answer)
        self.assertRegex(answer["msg"], "^two is too many\nThe link is back")


if __name__ == "__main__":
    unittest.main()
