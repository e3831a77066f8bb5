#!/usr/bin/python
"""Takes a machine out of nginx or HAProxy until nothing is in flight to it, and puts it back."""

from __future__ import annotations

DOCUMENTATION = r"""
module: handover_balancer
short_description: Take a server out of a load balancer, or put it back
description:
  - Runs on the balancer. For nginx it marks the server C(down) in a file and reloads; HAProxy is asked by its socket.
  - An upgrade in place needs none of it. It is for what needs an empty machine, such as a reboot.
options:
  kind:
    description: Which balancer.
    type: str
    choices: [nginx, haproxy]
    required: true
  state:
    description: C(drained) returns when no connection to the server is left, C(serving) when HAProxy calls it up.
    type: str
    choices: [drained, serving]
    required: true
  server:
    description: As the configuration has it; for nginx its address and port, for HAProxy C(backend/server).
    type: str
    required: true
  file:
    description: For nginx the file with the C(upstream) block, for HAProxy the runtime socket.
    type: path
    required: true
  command:
    description: How nginx is called, with the options that it was started with.
    type: list
    elements: str
    default: [nginx]
  pid_file:
    description: That of nginx.
    type: path
    default: /run/nginx.pid
  timeout:
    description: For how many seconds that is waited for.
    type: int
    default: 60
author: handover
"""

EXAMPLES = r"""
- name: Take it out of HAProxy
  handover_balancer:
    kind: haproxy
    state: drained
    server: app/web1
    file: /run/haproxy/admin.sock
"""

RETURN = r"""
waited:
  description: For how many seconds.
  returned: success
  type: float
"""

import contextlib
import csv
import os
import re
import socket
import subprocess
import sys
import time

from ansible.module_utils.basic import AnsibleModule

PAUSE_SECONDS = 0.1
ANSWER_SECONDS = 10
ANSWER_BYTES_MAX = 4 << 20
ESTABLISHED = "01"
# Bits of HAProxy's `srv_admin_state`, for what `set server` has asked for.
FORCED_MAINTENANCE, FORCED_DRAIN = 0x01, 0x08
# Its `srv_op_state` of a server that is sent requests: it may be warming up (`slowstart`).
UP = {"1", "2"}


class Trouble(Exception):
    """Why it was not done, as a sentence for the operator."""


class Nginx:
    """It has no runtime interface: the server is marked in its configuration."""

    def __init__(self, parameters):
        self.file, self.server, self.command = parameters["file"], parameters["server"], parameters["command"]
        self.pid_file, self.timeout = parameters["pid_file"], parameters["timeout"]
        # A link, as in sites-enabled, stays one.
        self.path = os.path.realpath(self.file)
        # Is there from before the file is changed until nginx has taken it. Hidden, so that no `include` finds it.
        self.mark = self.beside("not-reloaded")

    def beside(self, name):
        directory, file = os.path.split(self.path)
        return os.path.join(directory, f".{file}.{name}")

    def set(self, drained, check_mode):
        with open(self.file, encoding="utf-8") as file:
            before = file.read()
        line = re.compile(rf"^(\s*server\s+{re.escape(self.server)})((?:\s[^;#]*)?);", re.MULTILINE)
        if not line.search(before):
            raise Trouble(f"{self.file} has no `server {self.server}`")
        down = " down" if drained else ""
        after = line.sub(lambda found: f"{found[1]}{re.sub(r'[ ]+down(?![^ ])', '', found[2])}{down};", before)
        if after == before and not os.path.exists(self.mark):
            return False
        if not check_mode:
            with open(self.mark, "w", encoding="ascii"):
                pass
            self.write(after)
            try:
                self.run("-t")
            except Trouble:
                self.write(before)
                raise
            try:
                self.reload()
            except Trouble:
                self.write(before)
                # It may have been late only.
                with contextlib.suppress(Trouble):
                    self.run("-s", "reload")
                raise
            os.remove(self.mark)
        return True

    def reload(self):
        """Returns when the new workers are at work: until then the old ones go on sending requests to the server."""
        old = self.workers()
        self.run("-s", "reload")
        deadline = time.monotonic() + self.timeout
        while old & self.workers():
            if time.monotonic() > deadline:
                raise Trouble(f"nginx has not taken its configuration within {self.timeout} s: look at its error log")
            time.sleep(PAUSE_SECONDS)

    def workers(self):
        """Without those that are shutting down."""
        titles = {pid: title_of(pid) for pid in self.children()}
        return {pid for pid, title in titles.items()
                if title.startswith("nginx: worker process") and "is shutting down" not in title}

    def children(self):
        try:
            with open(self.pid_file, encoding="ascii") as file:
                master = file.read().strip()
            with open(f"/proc/{master}/task/{master}/children", encoding="ascii") as file:
                return file.read().split()
        except OSError as error:
            raise Trouble(f"cannot find nginx by {self.pid_file}: {error.strerror} (is it running?)") from error

    def write(self, text):
        new = self.beside(os.getpid())
        with open(new, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(new, os.stat(self.path).st_mode & 0o7777)
        os.replace(new, self.path)

    def run(self, *options):
        try:
            done = subprocess.run([*self.command, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                  stdin=subprocess.DEVNULL, universal_newlines=True, timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Trouble(f"cannot run {self.command[0]}: {error}") from error
        if done.returncode != 0:
            why = done.stdout.strip() or f"exit {done.returncode}"
            raise Trouble(f"{' '.join([*self.command, *options])}: {why}")

    def in_flight(self):
        """Workers of before the reload finish what they have; only the kernel knows with which server."""
        address, _, port = self.server.rpartition(":")
        own = {inode for child in self.children() for inode in sockets_of(child)}
        return len(own.intersection(connections_to(address.strip("[]"), int(port))))

    def is_up(self):
        """It finds out by sending requests."""
        return True


class Haproxy:
    """Told and asked by its runtime socket."""

    def __init__(self, parameters):
        self.file, self.server = parameters["file"], parameters["server"]

    def set(self, drained, check_mode):
        forced = self.forced()
        if forced & FORCED_MAINTENANCE:
            raise Trouble(f"{self.server} is in maintenance, and whoever has put it there may be at work on it: "
                          f"`set server {self.server} state ready` puts it back")
        if bool(forced & FORCED_DRAIN) == drained:
            return False
        if not check_mode:
            answer = self.ask(f"set server {self.server} state {'drain' if drained else 'ready'}")
            if answer.strip():
                raise Trouble(f"{self.file}: {answer.strip()}")
        return True

    def in_flight(self):
        return int(self.row()["scur"]) + int(self.row()["qcur"])

    def is_up(self):
        return self.state()["srv_op_state"] in UP

    def forced(self):
        """What it was told to do with the server. The status does not show a drain while the server is down."""
        return int(self.state()["srv_admin_state"])

    def state(self):
        backend = self.server.partition("/")[0]
        # The first line is the version of the format.
        lines = [line.lstrip("# ") for line in self.ask(f"show servers state {backend}").splitlines()[1:]]
        return self.own(csv.DictReader(lines, delimiter=" "), "be_name", "srv_name")

    def row(self):
        return self.own(csv.DictReader(self.ask("show stat").lstrip("# ").splitlines()), "pxname", "svname")

    def own(self, rows, backend, server):
        for row in rows:
            if f"{row[backend]}/{row[server]}" == self.server:
                return row
        raise Trouble(f"{self.file} knows of no server `{self.server}` (write backend/server)")

    def ask(self, command):
        try:
            with socket.socket(socket.AF_UNIX) as stream:
                stream.settimeout(ANSWER_SECONDS)
                stream.connect(self.file)
                stream.sendall(command.encode() + b"\n")
                answer = b""
                while len(answer) < ANSWER_BYTES_MAX:
                    more = stream.recv(65536)
                    if not more:
                        break
                    answer += more
        except OSError as error:
            raise Trouble(f"cannot ask HAProxy at {self.file}: {error} "
                          "(it needs `stats socket … level admin`)") from error
        return answer.decode()


def title_of(pid):
    try:
        with open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def sockets_of(pid):
    with contextlib.suppress(OSError):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                yield os.readlink(f"/proc/{pid}/fd/{fd}")


def connections_to(address, port):
    """The sockets that are connected to it from this machine, as they are called in /proc."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    numbers = socket.inet_pton(family, address)
    words = [numbers[at:at + 4] for at in range(0, len(numbers), 4)]
    # The kernel writes each word as a number of its own byte order.
    wanted = "".join(f"{int.from_bytes(word, sys.byteorder):08X}" for word in words) + f":{port:04X}"
    with open("/proc/net/tcp6" if family == socket.AF_INET6 else "/proc/net/tcp", encoding="ascii") as table:
        for line in table:
            fields = line.split()
            if fields[2] == wanted and fields[3] == ESTABLISHED:
                yield f"socket:[{fields[9]}]"


def lack(balancer, drained):
    """What it still lacks of that state; empty if nothing."""
    if drained:
        left = balancer.in_flight()
        return f"{left} requests or connections to {balancer.server} are still open" if left else ""
    return "" if balancer.is_up() else f"{balancer.server} is put back, but HAProxy calls it down: its check fails"


def wait(balancer, drained, seconds):
    begun = time.monotonic()
    while True:
        lacks = lack(balancer, drained)
        waited = time.monotonic() - begun
        if not lacks:
            return waited
        if waited > seconds:
            raise Trouble(f"{lacks} (looked for {seconds} s)")
        time.sleep(PAUSE_SECONDS)


def main():
    module = AnsibleModule(
        argument_spec={
            "kind": {"type": "str", "choices": ["nginx", "haproxy"], "required": True},
            "state": {"type": "str", "choices": ["drained", "serving"], "required": True},
            "server": {"type": "str", "required": True},
            "file": {"type": "path", "required": True},
            "command": {"type": "list", "elements": "str", "default": ["nginx"]},
            "pid_file": {"type": "path", "default": "/run/nginx.pid"},
            "timeout": {"type": "int", "default": 60},
        },
        supports_check_mode=True,
    )
    balancer = {"nginx": Nginx, "haproxy": Haproxy}[module.params["kind"]](module.params)
    drained = module.params["state"] == "drained"
    changed, waited = False, 0.0
    try:
        changed = balancer.set(drained, module.check_mode)
        if not module.check_mode:
            waited = wait(balancer, drained, module.params["timeout"])
    except (Trouble, OSError) as trouble:
        module.fail_json(msg=str(trouble), changed=changed)
    module.exit_json(changed=changed, waited=round(waited, 3))


if __name__ == "__main__":
    main()
