"""A machine with a service on it, and the network that it is in."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
from typing import Any, Dict, List

from base import BALANCER, BIN, LAB, PATIENCE_SECONDS, PORT, run, wait_for, write

GROUP = os.environ["HANDOVER_GROUP"]
PAGE = "docs/systemd.md"
# Inside a machine.
HERE = "/run/handover-lab"
HANDOVER = f"{HERE}/bin/handover"
# For as long as the library does, as a program behind a balancer should.
LINGERS = "PLAIN=linger=5000"
# The ways to run a service, one after the other.
KINDS = ("library", "exec", "unit", "exec-unit")


SSHD_CONFIG = f"""HostKey {HERE}/files/host_key
AuthorizedKeysFile {HERE}/files/authorized_keys
Subsystem sftp internal-sftp
PermitRootLogin prohibit-password
UsePAM no
StrictModes no
PidFile none
MaxStartups 100
"""
SSH_SERVICE = f"""[Unit]
DefaultDependencies=no
[Service]
ExecStart=/usr/sbin/sshd -D -e -f {HERE}/files/sshd_config
RuntimeDirectory=sshd
KillMode=process
"""
HEALTH = f"""#!/bin/bash
exec 3<>/dev/tcp/127.0.0.1/{PORT}
printf 'GET / HTTP/1.1\\r\\nHost: lab\\r\\nConnection: close\\r\\n\\r\\n' >&3
grep -q gen= <&3
"""


def unit_of_page(name: str) -> str:
    with open(PAGE, encoding="utf-8") as page:
        found = re.search(rf"^```ini\n# {name}: \S+\n(.*?)^```$", page.read(), re.MULTILINE | re.DOTALL)
    assert found, f"{PAGE} has no unit `{name}`"
    return found[1].replace("/usr/local/bin/handover", HANDOVER).replace("/srv/app/server", "/srv/app/current/server")


def network() -> None:
    """A bridge, which is the balancers', and a namespace for the clients."""
    run("ip", "link", "add", "bridge0", "type", "bridge")
    run("ip", "address", "add", f"{BALANCER}/24", "dev", "bridge0")
    run("ip", "link", "set", "bridge0", "up")
    join("clients", "10.77.0.2")
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{LAB}/key")


def join(name: str, address: str) -> None:
    run("ip", "netns", "add", name)
    run("ip", "link", "add", f"to-{name}", "type", "veth", "peer", "name", "eth0", "netns", name)
    run("ip", "link", "set", f"to-{name}", "master", "bridge0", "up")
    within = ("ip", "-n", name)
    run(*within, "address", "add", f"{address}/24", "dev", "eth0")
    run(*within, "link", "set", "eth0", "up")
    run(*within, "link", "set", "lo", "up")


class Machine:
    """A systemd with an sshd, and a service in one of the ways."""

    def __init__(self, number: int) -> None:
        self.name = f"web{number}"
        self.address = f"10.77.0.{10 + number}"
        self.kind = KINDS[(number - 1) % len(KINDS)]
        self.program = "plain" if "exec" in self.kind else "fixture"
        # As for `node server.js`, the program stays the same and the release is its directory.
        self.is_interpreted = self.kind == "exec"
        self.directory = os.path.join(LAB, self.name)
        self.scope = "app.scope" if self.kind in ("library", "exec") else "app.service"
        self._init_file = os.path.join(self.directory, "init")
        self._write_files()
        join(self.name, self.address)
        group = os.path.join(GROUP, self.name)
        os.mkdir(group)
        with open(f"{self.directory}/boot.log", "wb") as log:
            self.process = subprocess.Popen(
                ["nsenter", f"--net=/run/netns/{self.name}", "scripts/machine.sh", self.name, group, self._init_file,
                 f"{BIN}:bin", f"{self.directory}/files:files"], stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def _write_files(self) -> None:
        files = os.path.join(self.directory, "files")
        os.makedirs(files)
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{files}/host_key")
        with open(f"{files}/host_key.pub", encoding="ascii") as key:
            self.host_key = key.read().strip()
        with open(f"{LAB}/key.pub", encoding="ascii") as key:
            write(f"{files}/authorized_keys", key.read())
        write(f"{files}/sshd_config", SSHD_CONFIG)
        write(f"{files}/ssh.service", SSH_SERVICE)
        write(f"{files}/health", HEALTH, 0o755)
        options = "--trial 300ms"
        if self.kind == "library":
            start = f"/srv/app/current/server --listen 0.0.0.0:{PORT} --pid-file /run/app.pid {options}"
        elif self.kind == "exec":
            start = (f"env {LINGERS} {HANDOVER} exec --name app --listen http=0.0.0.0:{PORT} --workers 2 {options} "
                     f"-- {HERE}/bin/plain")
        else:
            unit = unit_of_page("library" if self.kind == "unit" else "exec")
            unit = unit.replace("[Service]\n", f"[Service]\nEnvironment={LINGERS}\n")
            after = "exec" if self.kind == "exec-unit" else f"--listen 0.0.0.0:{PORT}"
            write(f"{files}/app.service", unit.replace(after, f"{after} {options}", 1))
            start = ""
        scoped = f"setsid --fork systemd-run --quiet --scope --unit=app {start}"
        start = scoped if start else "systemctl start app.service"
        write(f"{files}/start", f"#!/bin/sh\ncd /srv/app/current\nexec {start} </dev/null >/dev/null 2>&1\n", 0o755)
        # As a power failure would, or a reboot that waits for nothing.
        ends = [f"systemctl {verb} {self.scope} 2>/dev/null" for verb in ("kill --signal=KILL", "stop", "reset-failed")]
        write(f"{files}/hard-restart", "\n".join(["#!/bin/sh", *ends, f"exec {HERE}/files/start\n"]), 0o755)

    def inside(self, *command: str, check: bool = True, **options: Any) -> "subprocess.CompletedProcess[str]":
        with open(self._init_file, encoding="ascii") as file:
            init = file.read().strip()
        return run("nsenter", "--target", init, "--mount", "--pid", "--uts", "--ipc", "--net", "--cgroup", "--",
                   *command, check=check, **options)

    def is_booted(self) -> bool:
        if self.process.poll() is not None:
            with open(f"{self.directory}/boot.log", encoding="utf-8") as log:
                raise AssertionError(f"{self.name} ended: {log.read()}")
        if not os.path.exists(self._init_file) or os.path.getsize(self._init_file) == 0:
            return False
        return self.inside("systemctl", "is-active", "--quiet", "mini.target", check=False).returncode == 0

    def provision(self) -> None:
        """What whoever sets up machines does: accounts, sshd, and the first release."""
        wait_for(f"{self.name} boots", self.is_booted)
        script = f"""set -e
mount -t tmpfs -o mode=700 tmpfs /root
mount -t tmpfs -o mode=755 tmpfs /srv
usermod --password '*' root
cp {HERE}/files/*.service {HERE}/units/
mkdir -p /srv/app/releases/1
cp {HERE}/bin/{self.program} /srv/app/releases/1/server
ln -s releases/1 /srv/app/current
systemctl daemon-reload
systemctl start ssh.service
{HERE}/files/start
"""
        self.inside("sh", "-c", script)
        wait_for(f"{self.name} serves", lambda: self.release() == "1")

    def target(self) -> List[str]:
        if self.kind == "library":
            return ["--pid-file", "/run/app.pid"]
        if self.kind == "exec":
            return ["--name", "app"]
        return ["--pid", self.inside("systemctl", "show", "-P", "MainPID", "app.service").stdout.strip()]

    def variables(self) -> Dict[str, str]:
        own = {"library": ("handover_pid_file", "/run/app.pid"), "exec": ("handover_name", "app")}
        name, value = own.get(self.kind, ("handover_unit", "app.service"))
        if self.is_interpreted:
            return {"ansible_host": self.address, "artifact": "plain.tar.gz", "handover_program": "", name: value}
        return {"ansible_host": self.address, "artifact": self.program, name: value}

    def status(self) -> Dict[str, Any]:
        return json.loads(self.inside(HANDOVER, "status", *self.target(), "--json").stdout)

    def ask(self, path: str) -> str:
        """Of whoever answers."""
        with contextlib.suppress(OSError):
            with socket.create_connection((self.address, PORT), PATIENCE_SECONDS) as stream:
                stream.sendall(f"GET {path} HTTP/1.1\r\nHost: lab\r\nConnection: close\r\n\r\n".encode())
                answer = b"".join(iter(lambda: stream.recv(65536), b""))
            return answer.partition(b"\r\n\r\n")[2].decode()
        return ""

    def release(self) -> str:
        """That which answers, by its own word."""
        found = re.search(r"/releases/([^/]+)", self.ask("/cwd" if self.is_interpreted else "/exe"))
        return found[1] if found else ""

    def linked(self) -> str:
        return os.path.basename(self.inside("readlink", "/srv/app/current").stdout.strip())

    def connect(self, up: bool) -> None:
        run("ip", "link", "set", f"to-{self.name}", "up" if up else "down")
