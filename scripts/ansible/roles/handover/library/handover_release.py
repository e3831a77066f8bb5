#!/usr/bin/python
"""Makes a release the one that serves on this machine, or leaves everything as it was.

One module and not a list of tasks, so that a machine is never left half-way: what was begun here is finished here, or
taken back, also when the controller is killed or the connection lost in the middle.
"""

from __future__ import annotations

DOCUMENTATION = r"""
module: handover_release
short_description: Upgrade a service to a release that is staged, or leave it as it was
description:
  - Switches the link C(current), asks the service to hand over to its new build, and looks at who serves then.
  - After any failure the link leads where it led before, and the build that served before is confirmed to serve.
options:
  root:
    description: Where C(releases/) and the link C(current) are.
    type: path
    required: true
  release:
    description: A directory below C(releases/).
    type: str
    required: true
  program:
    description:
      - The program, seen from the release. Empty if the service is C(interpreter script); then C(current) is made its
        working directory, and that tells which release serves.
    type: str
    default: ''
  pid_file:
    description: The pid file of a server with the library.
    type: path
  name:
    description: The name that C(handover exec --name) gave the service.
    type: str
  unit:
    description: The systemd unit of the service.
    type: str
  how:
    description: C(restart) ends the old build first, for services of which two must never run at once.
    type: str
    choices: [upgrade, restart]
    default: upgrade
  options:
    description: Further options of C(handover upgrade) or C(handover restart).
    type: list
    elements: str
    default: []
  health:
    description: A shell command that must succeed once the new build serves.
    type: str
    default: ''
  health_timeout:
    description: For how many seconds it is tried.
    type: int
    default: 10
  busy_timeout:
    description: For how many seconds an upgrade that is under way already is waited for.
    type: int
    default: 60
  timeout:
    description: For how many seconds one upgrade may take.
    type: int
    default: 600
  handover:
    description: The command.
    type: path
    default: /usr/local/bin/handover
author: handover
"""

EXAMPLES = r"""
- name: Upgrade
  handover_release:
    root: /srv/app
    release: "42"
    program: server
    unit: app.service
"""

RETURN = r"""
serving:
  description: Who serves now.
  returned: always
  type: dict
stages:
  description: When the upgrade reached which stage, in milliseconds.
  returned: when something was done
  type: dict
"""

import fcntl
import json
import os
import signal
import subprocess
import time

from ansible.module_utils.basic import AnsibleModule

FAILED, BUSY, NOTHING_SERVES, CUT = 1, 3, 8, 5
LINES_SHOWN = 20
PAUSE_SECONDS = 0.5


class Trouble(Exception):
    """Why it was not done, as a sentence for the operator."""


class Service:
    """What is asked of the command."""

    def __init__(self, parameters):
        self.handover = parameters["handover"]
        self.unit = parameters["unit"]
        self.pid_file = parameters["pid_file"]
        self.name = parameters["name"]
        self.timeout = parameters["timeout"]

    def target(self):
        if self.pid_file:
            return ["--pid-file", self.pid_file]
        if self.name:
            return ["--name", self.name]
        pid = run(["systemctl", "show", "--property", "MainPID", "--value", self.unit], 30).stdout.strip()
        if pid in ("", "0"):
            raise Trouble(f"the unit {self.unit} is not running: start it once by hand, then it can be upgraded")
        return ["--pid", pid]

    def ask(self, verb, *options):
        return run([self.handover, verb, *self.target(), "--json", *options], self.timeout)

    def status(self):
        """Of the build that serves."""
        asked = self.ask("status")
        if asked.returncode != 0:
            raise Trouble(f"no service to upgrade: {with_mend(last_word(asked))}")
        return objects(asked.stdout)[-1]

    def check(self, program):
        """What is wrong with the new build, the process or the unit, before anything is changed."""
        options = ["--exe", program] if program else []
        if self.unit:
            options += ["--unit", self.unit]
        checked = self.ask("check", *options)
        findings = objects(checked.stdout)
        problems = [with_mend(finding) for finding in findings if finding.get("level") == "problem"]
        if checked.returncode != 0:
            raise Trouble("; ".join(problems) or f"handover check: {with_mend(last_word(checked))}")

    def replace(self, how, options, busy_timeout):
        """The events of an upgrade or restart, once nobody else is at it, and its exit code."""
        deadline = time.monotonic() + busy_timeout
        while True:
            asked = self.ask(how, *options)
            if asked.returncode != BUSY or time.monotonic() > deadline:
                break
            time.sleep(PAUSE_SECONDS)
        events = objects(asked.stdout)
        if asked.returncode in (0, CUT):
            return events
        result = last_word(asked)
        raise Trouble("\n".join([with_mend(result), *result.get("stderr", [])[-LINES_SHOWN:]]))


class Releases:
    """The directories, and the link that says which of them is meant."""

    def __init__(self, root, release, program):
        self.link = os.path.join(root, "current")
        self.directory = os.path.join(root, "releases", release)
        self.program = os.path.join(self.directory, program) if program else None
        # Relative, so that the whole tree can be moved or seen from a container.
        self.leads_to = os.path.join("releases", release)

    def before(self, status):
        """Where the link leads back to: to the build that serves, also if somebody was killed behind the switch."""
        directory = os.path.realpath(os.path.dirname(self.directory))
        path = self.served_from(status)
        if os.path.commonpath([directory, path]) == directory and path != directory:
            return os.path.join("releases", os.path.relpath(path, directory).split(os.sep)[0])
        return os.readlink(self.link) if os.path.islink(self.link) else None

    def is_linked(self):
        return os.path.realpath(self.link) == os.path.realpath(self.directory)

    def switch(self, leads_to):
        """At once: whoever starts the service at this instant finds one release or the other."""
        beside = f"{self.link}.{os.getpid()}"
        os.symlink(leads_to, beside)
        os.replace(beside, self.link)

    def served_from(self, status):
        if self.program:
            return os.path.realpath(status["build"]["path"])
        newest = max(status.get("workers") or [status], key=lambda process: process["generation"])
        return os.path.realpath(f"/proc/{newest.get('pid')}/cwd")

    def runs_in(self, status):
        """Whether the release is what serves, and not only what the link says."""
        if self.program:
            file, build = os.stat(self.program), status["build"]
            return (build["device"], build["inode"]) == (file.st_dev, file.st_ino)
        return self.served_from(status) == os.path.realpath(self.directory)


def run(command, timeout):
    try:
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
                              universal_newlines=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired as late:
        raise Trouble(f"`{' '.join(command)}` has not ended within {timeout} s; what it asked for goes on") from late
    except OSError as error:
        raise Trouble(f"cannot run {command[0]}: {error.strerror} (is it installed? see `handover_path`)") from error


def objects(text):
    """One a line."""
    try:
        return [json.loads(line) for line in text.splitlines()]
    except ValueError as error:
        raise Trouble(f"the command answered what this module does not understand: {text[:200]}") from error


def last_word(asked):
    """Why it was not done. Only what is no answer of the command itself is on stderr: with --json that is silent."""
    said = [event for event in objects(asked.stdout) if event.get("event") in ("result", "error")]
    return said[-1] if said else {"message": asked.stderr.strip()}


def with_mend(said):
    mend = said.get("mend")
    return said.get("message", "") + (f" ({mend})" if mend else "")


def short(status):
    keys = ("generation", "pid", "state")
    return {**{key: status[key] for key in keys}, "build": status["build"]["path"]}


def prove_health(command, seconds):
    deadline = time.monotonic() + seconds
    while command:
        left = max(1.0, deadline - time.monotonic())
        try:
            asked = run(["/bin/sh", "-c", command], left)
            said = (asked.stderr or asked.stdout).strip()[-300:]
            if asked.returncode == 0:
                return
        except Trouble as trouble:
            said = str(trouble)
        if time.monotonic() > deadline:
            raise Trouble(f"the health command has not succeeded within {seconds} s: {said or command}")
        time.sleep(PAUSE_SECONDS)


def lock(root, seconds):
    """Two roll-outs of one service would take turns with the link. Held until this process ends."""
    file = open(os.path.join(root, ".handover.lock"), "w", encoding="ascii")  # pylint: disable=consider-using-with
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except OSError:
            if time.monotonic() > deadline:
                raise Trouble(f"another roll-out has been at work on this machine for {seconds} s") from None
            time.sleep(PAUSE_SECONDS)


def replace(service, releases, parameters):
    """From the switch of the link on everything is either done or taken back."""
    before = service.status()
    linked = releases.before(before)
    releases.switch(releases.leads_to)
    try:
        events = service.replace(parameters["how"], parameters["options"], parameters["busy_timeout"])
        status = service.status()
        if not releases.runs_in(status):
            raise Trouble(f"the service has been replaced, but by {releases.served_from(status)}: "
                          f"it is not started through {releases.link}")
        prove_health(parameters["health"], parameters["health_timeout"])
        return status, events
    except Exception as trouble:  # pylint: disable=broad-except
        # Whatever it is, the link may not stay on a build that has not been proved.
        raise Trouble(f"{trouble}\n{put_back(service, releases, parameters, linked, before)}") from trouble


def put_back(service, releases, parameters, linked, before):
    """What became of the old build, as a sentence."""
    if linked is None:
        os.unlink(releases.link)
    else:
        releases.switch(linked)
    try:
        status = service.status()
        if releases.runs_in(status) and linked is not None:
            service.replace(parameters["how"], parameters["options"], parameters["busy_timeout"])
            status = service.status()
        same = [before["build"][key] == status["build"][key] for key in ("device", "inode")]
        if status["state"] not in ("serving", "trial") or not all(same):
            raise Trouble(f"generation {status['generation']} is {status['state']} with {status['build']['path']}")
        return f"The link is back, and the build that served before serves: generation {status['generation']}, " \
               f"pid {status['pid']}."
    except Trouble as trouble:
        return f"The link is back, but the build that served before DOES NOT SERVE: {trouble}"


def main():
    module = AnsibleModule(
        argument_spec={
            "root": {"type": "path", "required": True},
            "release": {"type": "str", "required": True},
            "program": {"type": "str", "default": ""},
            "pid_file": {"type": "path"},
            "name": {"type": "str"},
            "unit": {"type": "str"},
            "how": {"type": "str", "choices": ["upgrade", "restart"], "default": "upgrade"},
            "options": {"type": "list", "elements": "str", "default": []},
            "health": {"type": "str", "default": ""},
            "health_timeout": {"type": "int", "default": 10},
            "busy_timeout": {"type": "int", "default": 60},
            "timeout": {"type": "int", "default": 600},
            "handover": {"type": "path", "default": "/usr/local/bin/handover"},
        },
        supports_check_mode=True,
        mutually_exclusive=[("pid_file", "name", "unit")],
        required_one_of=[("pid_file", "name", "unit")],
    )
    # What was begun is finished, also when the connection to the controller, or sudo's terminal, is gone.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    parameters = module.params
    service = Service(parameters)
    releases = Releases(parameters["root"], parameters["release"], parameters["program"])
    if not parameters["program"]:
        # Whoever started the service may have resolved the link.
        parameters["options"] = ["--cwd", releases.link, *parameters["options"]]
    try:
        if module.check_mode:
            act(module, service, releases)
        with lock(parameters["root"], parameters["busy_timeout"]):
            act(module, service, releases)
    except Trouble as trouble:
        module.fail_json(msg=str(trouble))


def act(module, service, releases):
    parameters = module.params
    status = service.status()
    if not os.path.exists(releases.program or releases.directory):
        if module.check_mode:
            module.exit_json(changed=True, serving=short(status), msg="the release would be staged, then upgraded to")
        raise Trouble(f"{releases.program or releases.directory} is not there: stage the release first")
    if releases.is_linked() and releases.runs_in(status):
        prove_health(parameters["health"], parameters["health_timeout"])
        module.exit_json(changed=False, serving=short(status))
    if releases.runs_in(status):
        # Somebody was killed before the switch of the link, or has put it elsewhere.
        if not module.check_mode:
            releases.switch(releases.leads_to)
        module.exit_json(changed=True, serving=short(status), msg="only the link was elsewhere")
    service.check(releases.program)
    if module.check_mode:
        module.exit_json(changed=True, serving=short(status))
    status, events = replace(service, releases, parameters)
    stages = {event["stage"]: event["at_ms"] for event in events if event.get("event") == "stage"}
    module.exit_json(changed=True, serving=short(status), stages=stages)


if __name__ == "__main__":
    main()
