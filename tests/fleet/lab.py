"""Machines, their network, the balancers in front and the clients: scripts/fleet-test.sh makes the namespace of it all."""

from __future__ import annotations

import atexit
import contextlib
import csv
import functools
import json
import os
import re
import signal
import socket
import subprocess
import time
import unittest
from typing import Any, Callable, Dict, List, Optional, Tuple

LAB = os.environ["HANDOVER_LAB"]
GROUP = os.environ["HANDOVER_GROUP"]
BIN = os.path.join(LAB, "bin")
BOOKS = os.path.abspath("scripts/ansible")
PAGE = "docs/systemd.md"
# Inside a machine.
HERE = "/run/handover-lab"
HANDOVER = f"{HERE}/bin/handover"
BALANCER = "10.77.0.1"
PORT = 8080
NGINX_PORT, HAPROXY_PORT = 8081, 8082
# Generous, since other work may slow the machine down; what passes takes a fraction of it.
PATIENCE_SECONDS = 60.0
# For as long as the library does, as a program behind a balancer should.
LINGERS = "PLAIN=linger=5000"
# The ways to run a service, one after the other.
KINDS = ("library", "exec", "unit", "exec-unit")


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
        write(f"{files}/sshd_config", f"HostKey {HERE}/files/host_key\nAuthorizedKeysFile {HERE}/files/authorized_keys\n"
              "Subsystem sftp internal-sftp\nPermitRootLogin prohibit-password\nUsePAM no\nStrictModes no\nPidFile none\nMaxStartups 100\n")
        write(f"{files}/ssh.service", "[Unit]\nDefaultDependencies=no\n[Service]\nRuntimeDirectory=sshd\nKillMode=process\n"
              f"ExecStart=/usr/sbin/sshd -D -e -f {HERE}/files/sshd_config\n")
        write(f"{files}/health", "#!/bin/bash\nexec 3<>/dev/tcp/127.0.0.1/8080\n"
              "printf 'GET / HTTP/1.1\\r\\nHost: lab\\r\\nConnection: close\\r\\n\\r\\n' >&3\ngrep -q gen= <&3\n", 0o755)
        options = "--trial 300ms"
        if self.kind == "library":
            start = f"/srv/app/current/server --listen 0.0.0.0:{PORT} --pid-file /run/app.pid {options}"
        elif self.kind == "exec":
            start = f"env {LINGERS} {HANDOVER} exec --name app --listen http=0.0.0.0:{PORT} --workers 2 {options} -- /srv/app/current/server"
        else:
            unit = unit_of_page("library" if self.kind == "unit" else "exec")
            unit = unit.replace("[Service]\n", f"[Service]\nEnvironment={LINGERS}\n")
            after = "exec" if self.kind == "exec-unit" else f"--listen 0.0.0.0:{PORT}"
            write(f"{files}/app.service", unit.replace(after, f"{after} {options}", 1))
            start = ""
        start = f"setsid --fork systemd-run --quiet --scope --unit=app {start}" if start else "systemctl start app.service"
        write(f"{files}/start", f"#!/bin/sh\nexec {start} </dev/null >/dev/null 2>&1\n", 0o755)
        # As a power failure would, or a reboot that waits for nothing.
        write(f"{files}/hard-restart", f"#!/bin/sh\nsystemctl kill --signal=KILL {self.scope}\nsystemctl stop {self.scope}\n"
              f"systemctl reset-failed {self.scope} 2>/dev/null\nexec {HERE}/files/start\n", 0o755)

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
        return {"ansible_host": self.address, "program": self.program, name: value}

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
        found = re.search(r"/releases/([^/]+)/", self.ask("/exe"))
        return found[1] if found else ""

    def linked(self) -> str:
        return os.path.basename(self.inside("readlink", "/srv/app/current").stdout.strip())

    def connect(self, up: bool) -> None:
        run("ip", "link", "set", f"to-{self.name}", "up" if up else "down")


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
            "handover_artifact": f"{LAB}/artifacts/{{{{ handover_release }}}}/{{{{ program }}}}",
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
        return release

    def start_play(self, book: str, *options: str, **variables: str) -> "subprocess.Popen[str]":
        environment = {**os.environ, "HOME": LAB, "ANSIBLE_CONFIG": f"{BOOKS}/ansible.cfg", "ANSIBLE_NOCOLOR": "1",
                       "ANSIBLE_LOCAL_TEMP": f"{LAB}/tmp", "ANSIBLE_HOME": f"{LAB}/ansible"}
        given = [part for name, value in variables.items() for part in ("-e", f"handover_{name}={value}")]
        return subprocess.Popen(
            ["ansible-playbook", "-i", self.inventory, f"{BOOKS}/{book}.yml", *given, *options], env=environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)

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


class Haproxy:
    """Its own counts are asked for by its runtime socket."""

    SOCKET = os.path.join(LAB, "haproxy.sock")

    def __init__(self, machines: List[Machine]) -> None:
        servers = "".join(f"    server {one.name} {one.address}:{PORT} check inter 500ms\n" for one in machines)
        file = write(os.path.join(LAB, "haproxy.cfg"), f"""global
    stats socket {self.SOCKET} level admin
defaults
    mode http
    option redispatch
    timeout connect 2s
    timeout client 60s
    timeout server 60s
frontend clients
    bind {BALANCER}:{HAPROXY_PORT}
    default_backend app
backend app
{servers}""")
        with open(f"{LAB}/haproxy.log", "wb") as log:
            self.process = subprocess.Popen(["haproxy", "-db", "-f", file], stdout=log, stderr=log)
        wait_for("HAProxy serves", lambda: os.path.exists(self.SOCKET))

    def ask(self, command: str) -> str:
        with socket.socket(socket.AF_UNIX) as stream:
            stream.connect(self.SOCKET)
            stream.sendall(command.encode() + b"\n")
            return b"".join(iter(lambda: stream.recv(65536), b"")).decode()

    def rows(self) -> List[Dict[str, str]]:
        return [row for row in csv.DictReader(self.ask("show stat").lstrip("# ").splitlines()) if row["pxname"] == "app"]

    def states(self) -> List[str]:
        return [row["status"] for row in self.rows() if row["svname"] != "BACKEND"]

    def counts(self) -> Dict[str, int]:
        """Requests, answers that were errors, and what it had to try again."""
        row = next(row for row in self.rows() if row["svname"] == "BACKEND")
        names = {"requests": "req_tot", "errors": "hrsp_5xx", "connects failed": "econ", "answers failed": "eresp",
                 "tried again": "wretr", "sent elsewhere": "wredis"}
        return {name: int(row[key] or 0) for name, key in names.items()}


class Nginx:
    """Its own counts are those of its log."""

    DIRECTORY = os.path.join(LAB, "nginx")
    UPSTREAM = os.path.join(DIRECTORY, "upstream.conf")
    PID_FILE = os.path.join(DIRECTORY, "pid")
    COMMAND = ["nginx", "-p", DIRECTORY, "-c", os.path.join(DIRECTORY, "nginx.conf"), "-e", "stderr"]
    LOG = os.path.join(DIRECTORY, "access.log")

    def __init__(self, machines: List[Machine]) -> None:
        servers = "".join(f"    server {one.address}:{PORT};\n" for one in machines)
        # A silent connection is to be closed here before an old build does it (`linger`): docs/fleet.md.
        write(self.UPSTREAM, f"upstream app {{\n{servers}    keepalive 16;\n    keepalive_timeout 2s;\n}}\n")
        write(os.path.join(self.DIRECTORY, "nginx.conf"), f"""user root;
worker_processes 2;
pid {self.PID_FILE};
events {{ worker_connections 512; }}
http {{
    log_format counts '$status $request_method $upstream_addr';
    access_log {self.LOG} counts;
    client_body_temp_path {self.DIRECTORY}/body;
    proxy_temp_path {self.DIRECTORY}/proxy;
    fastcgi_temp_path {self.DIRECTORY}/fastcgi;
    uwsgi_temp_path {self.DIRECTORY}/uwsgi;
    scgi_temp_path {self.DIRECTORY}/scgi;
    include {self.UPSTREAM};
    server {{
        listen {BALANCER}:{NGINX_PORT};
        location / {{
            proxy_pass http://app;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
        }}
    }}
}}
""")
        with open(f"{LAB}/nginx.log", "wb") as log:
            self.process = subprocess.Popen([*self.COMMAND, "-g", "daemon off;"], stdout=log, stderr=log)
        wait_for("nginx serves", lambda: os.path.exists(self.PID_FILE))

    def marked_down(self) -> int:
        with open(self.UPSTREAM, encoding="utf-8") as file:
            return file.read().count(" down;")

    def counts(self) -> Dict[str, int]:
        with open(self.LOG, encoding="utf-8") as log:
            lines = log.readlines()
        return {"requests": len(lines), "errors": sum(line[0] == "5" for line in lines),
                "tried again": sum("," in line for line in lines)}


class Load:
    """The strict client, once through each balancer; what it and they have counted at the end."""

    def __init__(self, fleet: Fleet, kept_by_nginx: int = 4) -> None:
        self._fleet = fleet
        self._before = self._counts()
        common = ("--new", "4", "--rate", "40", "--slow", "4:0.5", "--post", "1000", "--think", "20ms", "--json")
        self._oracles = {}
        for name, port, kept in (("nginx", NGINX_PORT, kept_by_nginx), ("haproxy", HAPROXY_PORT, 4)):
            kept_clients = ("--kept", str(kept)) if kept else ()
            command = ["nsenter", "--net=/run/netns/clients", f"{BIN}/oracle", "--target", f"{BALANCER}:{port}", *common,
                       *kept_clients]
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

    def nothing_lost(self, load: Load) -> None:
        """Neither by the clients' count nor by the balancers', which have not even had to try again."""
        reports, counted = load.end()
        for name, report in reports.items():
            self.assertEqual(report["failed"], 0, (name, report["outcomes"], report["failures"][:5]))
            counts = counted[name]
            self.assertGreater(counts.pop("requests"), 100)
            self.assertEqual(set(counts.values()), {0}, (name, counts))
            print(f"\n{name}: {report['requests']} requests, none lost", end=" ")
