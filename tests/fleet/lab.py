"""Machines behind their balancers, roll-outs to them, and clients that count: what scripts/fleet-test.sh runs."""

from __future__ import annotations

import atexit
import functools
import json
import os
import re
import signal
import subprocess
import time
import unittest
from typing import Any, Dict, List, Optional, Tuple

from balancers import HAPROXY_PORT, NGINX_PORT, Haproxy, Nginx
from base import BALANCER, BIN, LAB, PATIENCE_SECONDS, PORT, run, wait_for, write
from machine import HANDOVER, HERE, Machine, network

BOOKS = os.path.abspath("scripts/ansible")


class Fleet:
    """All of it."""

    def __init__(self, count: int) -> None:
        network()
        self.machines: List[Machine] = []
        self.grow(count)
        self.haproxy = Haproxy(self.machines)
        self.nginx = Nginx(self.machines)

    def grow(self, count: int) -> None:
        new = [Machine(number) for number in range(len(self.machines) + 1, count + 1)]
        for machine in new:
            machine.provision()
        self.machines += new
        self._write_inventory()

    def _write_inventory(self) -> None:
        write(f"{LAB}/known_hosts", "".join(f"{one.address} {one.host_key}\n" for one in self.machines))
        balancers = [
            {"host": "balancer", "kind": "haproxy", "file": Haproxy.SOCKET, "server": "app/{{ inventory_hostname }}"},
            {"host": "balancer", "kind": "nginx", "file": Nginx.UPSTREAM, "server": f"{{{{ ansible_host }}}}:{PORT}",
             "command": Nginx.COMMAND, "pid_file": Nginx.PID_FILE},
        ]
        variables = {
            "ansible_user": "root",
            "ansible_ssh_private_key_file": f"{LAB}/key",
            "ansible_ssh_common_args": f"-o UserKnownHostsFile={LAB}/known_hosts -o ConnectTimeout=3",
            "ansible_python_interpreter": "/usr/bin/python3",
            "handover_artifact": f"{LAB}/artifacts/{{{{ handover_release }}}}/{{{{ artifact }}}}",
            "handover_path": HANDOVER,
            "handover_health": f"{HERE}/files/health",
            "handover_balancers": balancers,
            "handover_work": f"{HERE}/files/hard-restart",
        }
        hosts = {machine.name: machine.variables() for machine in self.machines}
        balancer = {"balancer": {"ansible_connection": "local"}}
        # JSON is YAML.
        self.inventory = write(f"{LAB}/inventory.yml", json.dumps(
            {"all": {"vars": variables, "children": {"web": {"hosts": hosts}, "balancers": {"hosts": balancer}}}}))

    def build(self, release: str, script: Optional[str] = None) -> str:
        """A release to roll out: the programs themselves, or a script in place of them that may call them."""
        for program in ("fixture", "plain"):
            path = f"{LAB}/artifacts/{release}/{program}"
            if script is None:
                os.makedirs(os.path.dirname(path), exist_ok=True)
                run("cp", f"{BIN}/{program}", path)
            else:
                write(path, f"#!/bin/sh\n{script}\n", 0o755)
        run("tar", "-C", f"{LAB}/artifacts/{release}", "-czf", f"{LAB}/artifacts/{release}/plain.tar.gz", "plain")
        return release

    def start_play(self, book: str, *options: str, **variables: str) -> "subprocess.Popen[str]":
        environment = {**os.environ, "HOME": LAB, "ANSIBLE_CONFIG": f"{BOOKS}/ansible.cfg", "ANSIBLE_NOCOLOR": "1",
                       "ANSIBLE_LOCAL_TEMP": f"{LAB}/tmp", "ANSIBLE_HOME": f"{LAB}/ansible"}
        given = [part for name, value in variables.items() for part in ("-e", f"handover_{name}={value}")]
        return subprocess.Popen(
            ["ansible-playbook", "-i", self.inventory, f"{BOOKS}/{book}.yml", *given, *options], env=environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            # So that it can be killed with all that it has started.
            start_new_session=True)

    def play(self, book: str, *options: str, **variables: str) -> "Played":
        process = self.start_play(book, *options, **variables)
        begun = time.monotonic()
        try:
            text, _ = process.communicate(timeout=3 * PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise AssertionError(f"{book} does not end: {process.communicate()[0]}") from None
        return Played(process.returncode, text, time.monotonic() - begun)

    def end(self) -> None:
        for process in (self.haproxy.process, self.nginx.process, *(machine.process for machine in self.machines)):
            process.kill()
            process.wait()

    def releases(self) -> List[str]:
        return [machine.release() for machine in self.machines]

    def links(self) -> List[str]:
        return [machine.linked() for machine in self.machines]

    def generations(self) -> List[int]:
        return [machine.status()["generation"] for machine in self.machines]


class Played:
    """How a play ended, and what it said of each machine."""

    def __init__(self, code: int, text: str, seconds: float) -> None:
        self.code, self.text, self.seconds = code, text, seconds
        self.counts: Dict[str, Dict[str, int]] = {}
        for name, counts in re.findall(r"^(\S+)\s+: (ok=.*)$", text.partition("PLAY RECAP")[2], re.MULTILINE):
            self.counts[name] = {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", counts)}

    def changed(self) -> Dict[str, int]:
        return {name: counts["changed"] for name, counts in self.counts.items()}


class Load:
    """The strict client, once through each balancer; what it and they have counted at the end."""

    def __init__(self, fleet: Fleet, kept_by_nginx: int = 4) -> None:
        self._fleet = fleet
        self._before = self._counts()
        common = ("--new", "4", "--rate", "40", "--slow", "4:0.5", "--post", "1000", "--think", "20ms", "--json")
        self._oracles = {}
        for name, port, kept in (("nginx", NGINX_PORT, kept_by_nginx), ("haproxy", HAPROXY_PORT, 4)):
            kept_clients = ("--kept", str(kept)) if kept else ()
            command = ["nsenter", "--net=/run/netns/clients", f"{BIN}/oracle", "--target", f"{BALANCER}:{port}",
                       *common, *kept_clients]
            self._oracles[name] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def _counts(self) -> Dict[str, Dict[str, int]]:
        return {"nginx": self._fleet.nginx.counts(), "haproxy": self._fleet.haproxy.counts()}

    def end(self) -> Tuple[Dict[str, Dict[str, Any]], Dict[str, Dict[str, int]]]:
        reports = {}
        for name, process in self._oracles.items():
            process.terminate()
            out, error = process.communicate(timeout=PATIENCE_SECONDS)
            assert out, error
            reports[name] = json.loads(out)
        counted = {name: {key: value - self._before[name][key] for key, value in counts.items()}
                   for name, counts in self._counts().items()}
        return reports, counted

    def kill(self) -> None:
        for process in self._oracles.values():
            if process.poll() is None:
                process.kill()
                process.communicate()


@functools.lru_cache(maxsize=None)
def fleet(count: int = 4) -> Fleet:
    """The one of all tests: releases go up, and no test needs a fresh machine."""
    made = Fleet(count)
    atexit.register(made.end)
    return made


class Case(unittest.TestCase):
    maxDiff = None

    def setUp(self) -> None:
        self.fleet = fleet()

    def load(self, **options: int) -> Load:
        load = Load(self.fleet, **options)
        self.addCleanup(load.kill)
        return load

    def settle(self) -> None:
        """A connection that a balancer keeps to a machine which was away may have ended there unheard, and fails once."""
        wait_for("HAProxy takes all machines for up", lambda: set(self.fleet.haproxy.states()) == {"UP"})

        def is_clean() -> bool:
            load = self.load()
            time.sleep(2)
            reports, _ = load.end()
            return not any(report["failed"] for report in reports.values())

        wait_for("no request is lost any more", is_clean, 60)

    def nothing_lost(self, load: Load) -> None:
        """Neither by the clients' count nor by the balancers', which have not even had to try again."""
        reports, counted = load.end()
        for name, report in reports.items():
            self.assertEqual(report["failed"], 0, (name, report["outcomes"], report["failures"][:5]))
            counts = counted[name]
            self.assertGreater(counts.pop("requests"), 100)
            self.assertEqual(set(counts.values()), {0}, (name, counts))
            print(f"\n{name}: {report['requests']} requests, none lost", end=" ")
