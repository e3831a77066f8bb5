#!/usr/bin/env python3
"""A small HTTP server that hands over to its new build: the old side of the protocol."""

from __future__ import annotations

import argparse
import collections
import contextlib
import fcntl
import os
import queue
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any, Collection, Deque, Dict, List, Optional, Set, Tuple

import handover_protocol as protocol
from handover_protocol import Channel, ChannelBroken, ChannelEnded, ControlFailed, Deadline, DeadlinePassed, Frame, Kind
from serving import (
    GatedServer,
    Signals,
    bind_tcp,
    bind_udp,
    bind_unix,
    close_inherited_on_exec,
    complain,
    path_identity,
    report,
    unlink_if_still,
)

FAULTS = (
    "die-before-offer",
    "die-mid-offer",
    "die-after-offer",
    "die-after-ready",
    "die-in-trial",
    "abort-after-adopted",
    "abort-in-trial",
    "garbage-after-adopted",
    "garbage-in-trial",
    "truncated-fds",
    "wrong-magic",
    "version-99",
    "stale-inode",
    "cookie-mismatch",
    "huge-body",
    "long-state",
    "short-state",
)
GENERATION = 1
CHANNEL_FD = 3
KEPT_STDERR_LINES = 20
LAST_WORD_SECONDS = 0.5
# A process that ends closes its channel a moment earlier; one that declines still has something to say on stderr.
EXIT_SECONDS_AFTER_CHANNEL = 0.2
EXIT_SECONDS_AFTER_DECLINING = 0.5
ACCEPTING_SECONDS = 0.5
# On a busy machine clients wait that long for a good build too.
JUDGED_AFTER_SECONDS = 1.0
JUDGED_EVERY_SECONDS = 0.01
GARBAGE = b"HTTP/1.1 400 Bad Request\r\n\r\n"
EXIT_SECONDS = 5.0
FAULT_EXIT_CODE = 70


class UpgradeFailed(Exception):
    """The upgrade is off, and this process goes on serving."""


class PeerDeclined(Exception):
    """The new process said that it will not take over, and is about to end by itself."""


class ProcessExited(Exception):
    """The new process ended."""


class ToldToStop(Exception):
    """SIGTERM or SIGINT came in the middle of an upgrade."""


class Listener:
    def __init__(self, name: str, kind: str, sock: socket.socket) -> None:
        self.name = name
        self.kind = kind
        self.sock = sock
        self.cookie = protocol.cookie_of(sock)
        self.address = protocol.address_of(sock)
        self.path = path_identity(self.address) if kind == "unix" else None

    def described(self) -> Dict[str, Any]:
        body = {"name": self.name, "kind": self.kind, "address": self.address, "cookie": self.cookie}
        return body if self.path is None else {**body, "path": self.path}


class StderrRelay(threading.Thread):
    """Passes on what the new process writes to fd 2 and keeps the last lines."""

    def __init__(self, fd: int) -> None:
        super().__init__(daemon=True)
        self._fd = fd
        self._lines: Deque[str] = collections.deque(maxlen=KEPT_STDERR_LINES)
        self.start()

    def run(self) -> None:
        with os.fdopen(self._fd, "rb") as pipe:
            for line in pipe:
                self._lines.append(line.decode("utf-8", "replace").rstrip("\n"))
                with contextlib.suppress(OSError):
                    os.write(2, line)

    def last_lines(self) -> List[str]:
        self.join(EXIT_SECONDS)
        return list(self._lines)


class Candidate:
    """The new process as the old one sees it. `pid` is that of a child; one that pulled is only watched."""

    def __init__(self, channel: Channel, pidfd: Optional[int], pid: Optional[int] = None,
                 relay: Optional[StderrRelay] = None) -> None:  # fmt: skip
        self.channel = channel
        self.pid = pid
        self._relay = relay
        self._pidfd = pidfd

    def next_frame(self, expected: Collection[Kind], deadline: Deadline, signals: Signals) -> Frame:
        watched: List[Any] = [self.channel, signals] + ([] if self._pidfd is None else [self._pidfd])
        while True:
            ready = protocol.wait_readable(watched, deadline)
            # What it sent before its end came first and says why it ended.
            if self.channel in ready or protocol.is_readable(self.channel):
                return self.channel.receive(expected, deadline)
            if self._pidfd in ready:
                raise ProcessExited("the new process exited")
            if {signal.SIGTERM, signal.SIGINT} & signals.take():
                raise ToldToStop

    def kill(self) -> None:
        if self._pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def wait_for_exit(self, seconds: float) -> None:
        if self._pidfd is not None:
            with contextlib.suppress(DeadlinePassed):
                protocol.wait_readable([self._pidfd], Deadline(seconds))

    def reap(self) -> Dict[str, Any]:
        if self.pid is None:
            return {}
        _, status = os.waitpid(self.pid, 0)
        return {"exit": os.waitstatus_to_exitcode(status), "stderr": self._relay.last_lines()}


def spawn(program: List[str], inode_error: int) -> Candidate:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    stderr_read, stderr_write = os.pipe()
    # Far above CHANNEL_FD, so that no file action overwrites what a later one needs.
    source = fcntl.fcntl(theirs, fcntl.F_DUPFD_CLOEXEC, CHANNEL_FD + 10)
    inode = os.fstat(source).st_ino + inode_error
    try:
        pid = os.posix_spawnp(
            program[0],
            program,
            {**os.environ, "HANDOVER_FD": f"{CHANNEL_FD}:{inode}"},
            file_actions=[(os.POSIX_SPAWN_DUP2, stderr_write, 2), (os.POSIX_SPAWN_DUP2, source, CHANNEL_FD)],
            setsigmask=[],
            setsigdef=[signal.SIGPIPE, signal.SIGTERM, signal.SIGUSR2],
        )
    except OSError as error:
        ours.close()
        os.close(stderr_read)
        raise UpgradeFailed(f"{program[0]} cannot be started: {error}") from None
    finally:
        theirs.close()
        os.close(source)
        os.close(stderr_write)
    return Candidate(Channel(ours), os.pidfd_open(pid), pid, StderrRelay(stderr_read))


@dataclass
class State:
    version: int
    content: bytes

    def memfd(self) -> int:
        fd = os.memfd_create("handover-state", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        view = memoryview(self.content)
        while view:
            view = view[os.write(fd, view) :]
        seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        return fd


class Upgrade:
    """One attempt to hand over, from the offer to settled or back."""

    def __init__(self, options: argparse.Namespace, server: GatedServer, listeners: List[Listener],
                 candidate: Candidate, signals: Signals) -> None:  # fmt: skip
        self.signals = signals
        self.told_to_stop = False
        self.options = options
        self.fault = options.fault
        self.server = server
        self.listeners = listeners
        self.candidate = candidate
        self.committed = False
        self.stopping = False
        self.accepting: Optional[Set[str]] = None
        self.kept: Set[str] = set()

    def run(self) -> bool:
        try:
            self.hand_over()
            return True
        except DeadlinePassed:
            self.roll_back("the new process was silent for too long")
        except ChannelEnded as error:
            self.candidate.wait_for_exit(EXIT_SECONDS_AFTER_CHANNEL)
            self.roll_back(self.last_word() or f"the channel ended: {error}")
        except PeerDeclined as error:
            self.candidate.wait_for_exit(EXIT_SECONDS_AFTER_DECLINING)
            self.roll_back(str(error))
        except ToldToStop:
            self.told_to_stop = True
            self.roll_back("the old process was told to stop")
        except (UpgradeFailed, ProcessExited, ChannelBroken) as error:
            self.roll_back(str(error))
        return False

    def hand_over(self) -> None:
        self.die_if("die-before-offer")
        self.send_offer()
        self.die_if("die-after-offer")
        self.await_adopted()
        if self.restarts():
            # What comes now is this process's end, and the new one's affair.
            self.server.shut_gate()
            report("old", "released")
            return
        if self.fault == "abort-after-adopted":
            raise UpgradeFailed("the operator changed their mind")
        if self.fault == "garbage-after-adopted":
            self.send_garbage()
        self.await_ready()
        self.die_if("die-after-ready")
        self.commit()
        self.run_trial()
        self.settle()

    # The steps, in the order of section 4.

    def send_offer(self) -> None:
        state = self.offered_state()
        state_fd = None if state is None else state.memfd()
        fds = [listener.sock.fileno() for listener in self.listeners]
        if state_fd is not None:
            fds.append(state_fd)
        if self.offers_stderr():
            fds.append(2)
        try:
            self.send_offer_frame(self.offer_body(state), fds)
        finally:
            if state_fd is not None:
                os.close(state_fd)

    def restarts(self) -> bool:
        return self.options.restart_ms is not None

    def offers_stderr(self) -> bool:
        return self.candidate.pid is not None

    def offered_state(self) -> Optional[State]:
        if self.options.state is None and self.fault in ("long-state", "short-state"):
            return State(1, b"short")
        if self.options.state is None:
            return None
        return State(self.options.state_version, self.options.state)

    def offer_body(self, state: Optional[State]) -> Dict[str, Any]:
        body: Dict[str, Any] = {
            "protocol": {"min": 99, "max": 99} if self.fault == "version-99" else protocol.SPOKEN,
            "generation": GENERATION + 1,
            "pid": os.getpid(),
            "listeners": [listener.described() for listener in self.listeners],
            "stderr": self.offers_stderr(),
            "draining": [],
            "ready_timeout_ms": self.options.ready_timeout_ms,
            "trial_ms": self.options.trial_ms,
        }
        if self.restarts():
            body["restart"] = {"kill_after_ms": self.options.restart_ms, "asked_us": time.monotonic_ns() // 1000}
        if state is not None:
            body["state"] = {"version": state.version, "length": self.offered_length(state)}
        if self.fault == "cookie-mismatch":
            body["listeners"][0]["cookie"] += 1
        return body

    def offered_length(self, state: State) -> int:
        if self.fault == "long-state":
            return protocol.MAX_STATE + 1
        return len(state.content) + (1 if self.fault == "short-state" else 0)

    def send_offer_frame(self, body: Dict[str, Any], fds: List[int]) -> None:
        channel, deadline = self.candidate.channel, self.ready_deadline()
        if self.fault == "die-mid-offer":
            frame = protocol.encode_frame(Kind.OFFER, body, len(fds))
            channel.send_bytes(frame[: protocol.HEADER.size + (len(frame) - protocol.HEADER.size) // 2], deadline)
            self.die_if("die-mid-offer")
        elif self.fault == "wrong-magic":
            frame = protocol.encode_frame(Kind.OFFER, body, len(fds))
            channel.send_bytes(b"HAND" + frame[4:], deadline)
            channel.send_fds(fds, deadline)
        elif self.fault == "huge-body":
            channel.send_bytes(protocol.encode_header(Kind.OFFER, protocol.MAX_BODY + 1, len(fds)), deadline)
            channel.send_bytes(b" " * (protocol.MAX_BODY + 1), deadline)
        elif self.fault == "truncated-fds":
            channel.send_bytes(protocol.encode_frame(Kind.OFFER, body, len(fds)), deadline)
            channel.send_fds(fds[:-1], deadline)
        else:
            channel.send(Kind.OFFER, body, fds, deadline=deadline)

    def await_adopted(self) -> None:
        # Its limit runs on to ready, because only starting begins it anew.
        self.silence_limit = self.ready_deadline()
        frame = self.candidate.next_frame({Kind.ADOPTED, Kind.REFUSED}, self.silence_limit, self.signals)
        if frame.kind is Kind.REFUSED:
            raise PeerDeclined(f"refused: {frame.body['reason']}")
        check_adopted(frame.body, self.listeners)
        if self.restarts() and not frame.body.get("restart"):
            raise UpgradeFailed("the new process knows nothing of restarts")
        report("old", "adopted")

    def await_ready(self) -> None:
        while True:
            frame = self.frame_after_adopted({Kind.STARTING, Kind.READY}, self.silence_limit)
            if frame.kind is Kind.READY:
                break
            report("old", "starting", reason=frame.body["reason"])
            self.silence_limit = self.ready_deadline()
        check_ready(frame.body, self.listeners)
        self.kept = set(frame.body["kept"])
        report("old", "ready", **frame.body)

    def commit(self) -> None:
        self.server.shut_gate()
        self.committed = True
        self.earliest_judgement = time.monotonic() + JUDGED_AFTER_SECONDS
        self.candidate.channel.send(Kind.COMMIT, {}, deadline=self.ready_deadline())
        report("old", "committed")

    def run_trial(self) -> None:
        deadline = Deadline(self.options.trial_ms / 1000)
        try:
            with contextlib.suppress(DeadlinePassed):
                while not self.stopping:
                    self.hear_in_trial(deadline)
                    self.misbehave_in_trial()
            if self.stopping:
                return
            self.judge()
        except ToldToStop:
            # It wants no server any more that would accept again.
            return
        report("old", "healthy")

    def hear_in_trial(self, deadline: Deadline) -> None:
        frame = self.frame_after_adopted({Kind.ACCEPTING, Kind.STOPPING}, deadline)
        if frame.kind is Kind.STOPPING:
            # Whoever told the new process to stop wants no server: from here on nothing makes this one accept again.
            self.stopping = True
            report("old", "stopping")
        else:
            self.accepting = set(frame.body["listeners"])
            report("old", "accepting", listeners=sorted(self.accepting))

    def judge(self) -> None:
        """Whether the new process serves, now that the trial is over."""
        if self.accepting is None:
            self.hear_more(ACCEPTING_SECONDS)
        while not self.stopping:
            fault = self.why_it_does_not_serve()
            if fault is None:
                return
            if time.monotonic() >= self.earliest_judgement:
                raise UpgradeFailed(fault)
            self.hear_more(JUDGED_EVERY_SECONDS)

    def hear_more(self, seconds: float) -> None:
        with contextlib.suppress(DeadlinePassed):
            self.hear_in_trial(Deadline(seconds))

    def why_it_does_not_serve(self) -> Optional[str]:
        if self.accepting is None:
            return "the new process did not answer the commit"
        for listener in self.listeners:
            # This process itself never waited on datagram sockets.
            is_served = listener.kind == "udp" or listener.name in self.accepting
            if listener.name in self.kept and not is_served and protocol.is_readable(listener.sock):
                return f"connections wait on {listener.name}, where the new process never waited"
        return None

    def misbehave_in_trial(self) -> None:
        self.die_if("die-in-trial")
        if self.fault == "garbage-in-trial":
            self.send_garbage()
        if self.fault == "abort-in-trial":
            self.candidate.channel.send(Kind.ABORTED, {"reason": "the operator changed their mind"},
                                        deadline=self.ready_deadline())  # fmt: skip
            self.watch_it_end()

    def send_garbage(self) -> None:
        self.candidate.channel.send_bytes(GARBAGE, self.ready_deadline())
        self.watch_it_end()

    def watch_it_end(self) -> None:
        """To see what it does by itself."""
        self.candidate.wait_for_exit(EXIT_SECONDS)
        raise UpgradeFailed("the operator changed their mind")

    def settle(self) -> None:
        with contextlib.suppress(ChannelEnded):
            self.candidate.channel.send(Kind.SETTLED, {}, deadline=self.ready_deadline())
        self.candidate.channel.close()
        report("old", "settled")

    # The way back.

    def roll_back(self, reason: str) -> None:
        if self.committed:
            # It may be accepting: it must be dead, whoever started it, before this process accepts again.
            self.candidate.kill()
            self.candidate.wait_for_exit(EXIT_SECONDS)
        else:
            self.call_off(reason)
        ending = self.candidate.reap()
        self.candidate.channel.close()
        if not self.told_to_stop:
            self.server.open_gate()
        report("old", "rolled-back" if self.committed else "failed", reason=reason, **ending)

    def call_off(self, reason: str) -> None:
        with contextlib.suppress(ChannelEnded, DeadlinePassed):
            self.candidate.channel.send(Kind.ABORTED, {"reason": reason}, deadline=Deadline(LAST_WORD_SECONDS))
        if self.fault == "abort-after-adopted":
            # To see what it does by itself about the frame.
            self.candidate.wait_for_exit(EXIT_SECONDS)
        if self.candidate.pid is not None:
            self.candidate.kill()

    def last_word(self) -> Optional[str]:
        """Why the new process closed the channel, if it said so before and this process was busy sending."""
        with contextlib.suppress(ChannelEnded, ChannelBroken, DeadlinePassed):
            frame = self.candidate.channel.receive({Kind.REFUSED, Kind.GAVE_UP}, Deadline(LAST_WORD_SECONDS))
            return f"{'refused' if frame.kind is Kind.REFUSED else 'gave up'}: {frame.body['reason']}"
        return None

    # Small helpers.

    def frame_after_adopted(self, expected: Set[Kind], deadline: Deadline) -> Frame:
        frame = self.candidate.next_frame(expected | {Kind.GAVE_UP}, deadline, self.signals)
        if frame.kind is Kind.GAVE_UP:
            raise PeerDeclined(f"the new process gave up: {frame.body['reason']}")
        return frame

    def ready_deadline(self) -> Deadline:
        return Deadline(self.options.ready_timeout_ms / 1000)

    def die_if(self, fault: str) -> None:
        if self.fault == fault:
            os._exit(FAULT_EXIT_CODE)


def check_adopted(body: Dict[str, Any], listeners: List[Listener]) -> None:
    if not protocol.SPOKEN["min"] <= body["protocol"] <= protocol.SPOKEN["max"]:
        raise ChannelBroken(f"version {body['protocol']} was not offered")
    adopted = sorted((entry["name"], entry["cookie"]) for entry in body["listeners"])
    if adopted != sorted((listener.name, listener.cookie) for listener in listeners):
        raise UpgradeFailed("the new process adopted other listeners than were offered")


def check_ready(body: Dict[str, Any], listeners: List[Listener]) -> None:
    if not set(body["kept"] + body["unclaimed"]) <= {listener.name for listener in listeners}:
        raise ChannelBroken("the new process names listeners that were not offered")


class ControlSocket:
    """Answers take-over by handing the connection to the main thread, and status by itself."""

    def __init__(self) -> None:
        self.path = os.path.join(protocol.prepare_control_directory(), f"{os.getpid()}.sock")
        before = os.umask(0o177)
        try:
            self._sock = bind_unix(self.path)
        finally:
            os.umask(before)
        self._sock.setblocking(True)
        self._busy = threading.Lock()
        self._taken: "queue.Queue[socket.socket]" = queue.Queue()
        self._wake_read, self._wake_write = os.pipe()
        threading.Thread(target=self._run, daemon=True).start()

    def fileno(self) -> int:
        return self._wake_read

    def take(self) -> socket.socket:
        os.read(self._wake_read, 1)
        return self._taken.get_nowait()

    def try_begin(self) -> bool:
        return self._busy.acquire(blocking=False)

    def end(self) -> None:
        self._busy.release()

    def remove(self) -> None:
        os.unlink(self.path)

    def _run(self) -> None:
        while True:
            connection, _ = self._sock.accept()
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        deadline = Deadline(protocol.REQUEST_SECONDS)
        handed_on = False
        try:
            with contextlib.suppress(OSError, ControlFailed, DeadlinePassed):
                handed_on = self._answer_request(connection, deadline)
        finally:
            if not handed_on:
                connection.close()

    def _answer_request(self, connection: socket.socket, deadline: Deadline) -> bool:
        _, uid, _ = protocol.peer_credentials(connection)
        if uid not in (0, os.getuid()):
            return refuse_request(connection, deadline, "not-permitted", f"uid {uid} may not ask")
        request = protocol.read_line(connection, deadline).get("request")
        if request == "status":
            protocol.send_line(connection, {"event": "status", "pid": os.getpid(), "generation": GENERATION}, deadline)
            return False
        if request != "take-over":
            return refuse_request(connection, deadline, "bad-request", f"{request!r} is not known here")
        if not self.try_begin():
            return refuse_request(connection, deadline, "busy", "another upgrade is under way")
        protocol.send_line(connection, {"event": "accepted", "pid": os.getpid(), "generation": GENERATION}, deadline)
        self._taken.put(connection)
        os.write(self._wake_write, b"t")
        return True


def refuse_request(connection: socket.socket, deadline: Deadline, result: str, message: str) -> bool:
    protocol.send_line(connection, {"event": "result", "result": result, "message": message}, deadline)
    return False


class OldSide:
    def __init__(self, options: argparse.Namespace, signals: Signals) -> None:
        self.options = options
        self.signals = signals
        self.listeners = [Listener(*bound) for bound in bind_everything(options)]
        self.server = GatedServer(GENERATION)
        for listener in self.listeners:
            if listener.kind in ("tcp", "unix"):
                self.server.add(listener.name, listener.sock)
        self.control = ControlSocket() if options.control else None
        self.told_to_stop = False

    def run(self) -> int:
        self.server.open_gate()
        addresses = {listener.name: listener.address for listener in self.listeners}
        first = next((listener.address for listener in self.listeners if listener.kind == "tcp"), None)
        report("old", "listening", address=first, addresses=addresses, generation=GENERATION)
        try:
            handed_over = self.serve()
            if not handed_over:
                self.unlink_paths()
            return self.drain(handed_over)
        finally:
            if self.control is not None:
                self.control.remove()

    def serve(self) -> bool:
        """Until another process serves (True) or this one is told to stop (False)."""
        if self.options.now and self.push():
            return True
        while not self.told_to_stop:
            watched = [self.signals] if self.control is None else [self.signals, self.control]
            ready = protocol.wait_readable(watched, None)
            if self.control is not None and self.control in ready and self.hand_to_puller():
                return True
            caught = self.signals.take() if self.signals in ready else set()
            if signal.SIGUSR2 in caught and self.push():
                return True
            if {signal.SIGTERM, signal.SIGINT} & caught:
                return False
        return False

    def push(self) -> bool:
        if self.control is not None and not self.control.try_begin():
            report("old", "failed", reason="another upgrade is under way")
            return False
        return self.end_attempt(self.spawn_and_upgrade())

    def upgrade(self, candidate: Candidate) -> bool:
        attempt = Upgrade(self.options, self.server, self.listeners, candidate, self.signals)
        handed_over = attempt.run()
        self.told_to_stop = attempt.told_to_stop
        # In a restart the channel stays open to the end.
        self.last_attempt = attempt
        return handed_over

    def end_attempt(self, handed_over: bool) -> bool:
        # Whoever has handed over and drains stays busy.
        if self.control is not None and not handed_over:
            self.control.end()
        return handed_over

    def spawn_and_upgrade(self) -> bool:
        try:
            candidate = spawn(self.program(), 1 if self.options.fault == "stale-inode" else 0)
        except UpgradeFailed as error:
            report("old", "failed", reason=str(error))
            return False
        report("old", "spawned", child=candidate.pid)
        return self.upgrade(candidate)

    def program(self) -> List[str]:
        address = next((listener.address for listener in self.listeners if listener.kind == "tcp"), "")
        return [word.replace("{address}", address) for word in self.options.program]

    def hand_to_puller(self) -> bool:
        report("old", "pulled")
        connection = self.control.take()
        return self.end_attempt(self.upgrade(Candidate(Channel(connection), protocol.pidfd_of_peer(connection))))

    def unlink_paths(self) -> None:
        for listener in self.listeners:
            if listener.path is not None:
                unlink_if_still(listener.address, listener.path)

    def drain(self, handed_over: bool) -> int:
        if self.control is not None and not handed_over:
            self.control.try_begin()
        self.server.close_listeners()
        for listener in self.listeners:
            listener.sock.close()
        report("old", "draining")
        left = self.server.drain(self.options.drain_ms / 1000)
        report("old", "drained", left=left)
        if self.options.never_exit:
            threading.Event().wait()
        return 0


def bind_everything(options: argparse.Namespace) -> List[Tuple[str, str, socket.socket]]:
    bound = [(name, "tcp", bind_tcp(address)) for name, address in options.listen]
    bound += [(name, "unix", bind_unix(path)) for name, path in options.unix]
    bound += [(name, "udp", bind_udp(address)) for name, address in options.udp]
    return bound + [(f"extra-{n}", "tcp", bind_tcp("127.0.0.1:0")) for n in range(options.extra)]


def named(default: str) -> Any:
    def parse(text: str) -> Tuple[str, str]:
        name, equals, address = text.rpartition("=")
        return (name, address) if equals else (default, text)

    return parse


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="{address} in ARGS becomes the address of the first tcp listener"
    )
    add = parser.add_argument
    add("--listen", action="append", default=[], type=named("http"), metavar="[NAME=]IP:PORT")
    add("--unix", action="append", default=[], type=named("unix"), metavar="[NAME=]PATH")
    add("--udp", action="append", default=[], type=named("udp"), metavar="[NAME=]IP:PORT")
    add("--extra", type=int, default=0, metavar="N", help="that many more tcp listeners, named extra-0 and so on")
    add("--state", type=bytes.fromhex, metavar="HEX", help="the state to hand over")
    add("--state-version", type=int, default=1)
    add("--control", action="store_true", help="have a control socket, which answers status and take-over")
    add("--now", action="store_true", help="spawn PROGRAM at once and not only on SIGUSR2")
    add("--fault", choices=FAULTS)
    add("--ready-timeout-ms", type=int, default=30_000)
    add("--trial-ms", type=int, default=1_000)
    add("--restart-ms", type=int, metavar="N",
        help="restart: the new process runs when this one has ended, by force after N")  # fmt: skip
    add("--never-exit", action="store_true", help="hang when everything is done")
    add("--drain-ms", type=int, default=10_000)
    add("--lifetime-s", type=int, default=300, help="end by SIGALRM after this time, against left-overs of tests")
    add("program", nargs="*", metavar="PROGRAM ARGS", help="the new build, after --")
    return parser.parse_args()


def main() -> int:
    options = parse_options()
    close_inherited_on_exec()
    signal.alarm(options.lifetime_s)
    if not options.listen + options.unix + options.udp:
        complain("old_side: nothing to listen on")
        return 2
    return OldSide(options, Signals(signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)).run()


if __name__ == "__main__":
    sys.exit(main())
