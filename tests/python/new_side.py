#!/usr/bin/env python3
"""A small HTTP server that takes over from a running one: the new side of the protocol."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import time
from typing import Any, Callable, Collection, Dict, List, Optional, Tuple

import handover_protocol as protocol
from handover_protocol import (
    Channel,
    ChannelBroken,
    ChannelEnded,
    Deadline,
    DeadlinePassed,
    Frame,
    Kind,
    Offer,
    OfferedListener,
    OfferRefused,
)
from serving import (
    GatedServer,
    Signals,
    bind_tcp,
    bind_unix,
    complain,
    give_up_dead_stderr,
    path_identity,
    report,
    unlink_if_still,
)

FAULTS = (
    "garbage",
    "oversized-length",
    "too-many-fds",
    "unknown-kind",
    "wrong-cookie",
    "fewer-listeners",
    "newer-version",
    "close-channel",
    "exit-0",
    "exit-1",
    "hang-before-adopted",
    "hang-before-ready",
    "die-in-trial",
    "never-accept",
    "no-accepting",
    "gave-up",
    "gave-up-in-trial",
    "gave-up-too-early",
    "stopping-too-early",
    "slow-start",
    "garbage-in-trial",
    "close-channel-in-trial",
)
SEND_SECONDS = 5.0
LINGER_SECONDS = 60.0
DRAIN_SECONDS = 10.0
DEATH_SECONDS = 2.0
KILL_SECONDS = 10.0


class Aborted(Exception):
    """The old process goes on serving."""


class ToldToStop(Exception):
    """SIGTERM or SIGINT came."""


class NewSide:
    def __init__(self, options: argparse.Namespace, signals: Signals) -> None:
        self.options = options
        self.signals = signals
        self.channel: Optional[Channel] = None
        self.offer: Optional[Offer] = None
        self.has_adopted = False
        self.old_process: Optional[int] = None
        self.added: List[Tuple[str, socket.socket]] = []
        self.bound_paths: List[Tuple[str, Dict[str, int]]] = []

    # The way to a running server.

    def run(self) -> int:
        pulling = self.options.pull_pid is not None or self.options.pull_socket is not None
        try:
            self.channel = self.pulled_channel() if pulling else self.pushed_channel()
        except (protocol.ControlFailed, DeadlinePassed, OSError) as error:
            return self.fail(f"the pull failed: {error}")
        if self.channel is None:
            return self.first_generation("started without an old process")
        try:
            return self.take_over(pulling)
        except (OfferRefused, ChannelBroken) as error:
            # Once the listeners are adopted it is too late to refuse: closing the channel has to do.
            return self.fail(f"the channel broke: {error}") if self.has_adopted else self.refuse(error)
        except Aborted as error:
            report("new", "aborted", reason=str(error))
            return self.fail(f"aborted by the old process: {error}")
        except DeadlinePassed:
            return self.fail("the old process was silent for too long")
        except ToldToStop:
            return self.decline()

    def pushed_channel(self) -> Optional[Channel]:
        return protocol.inherited_channel(os.environ.pop("HANDOVER_FD", None))

    def pulled_channel(self) -> Channel:
        if self.options.pull_pid is not None:
            return protocol.take_over(protocol.connect_to_process(self.options.pull_pid))
        return protocol.take_over(protocol.connect_to_path(self.options.pull_socket, protocol.REQUEST_SECONDS))

    def take_over(self, pulling: bool) -> int:
        try:
            self.offer = self.receive_offer()
        except ChannelEnded:
            if pulling:
                return self.fail("the old process ended before its offer was whole")
            protocol.wait_for_death(self.channel, DEATH_SECONDS)
            give_up_dead_stderr()
            return self.first_generation("the old process ended before its offer was whole")
        report("new", "offered", generation=self.offer.generation)
        self.misbehave_at("offered")
        self.adopt()
        if self.offer.restart is not None and not self.options.knows_no_restart:
            return self.restart()
        self.misbehave_at("adopted")
        self.start_up()
        self.announce_ready()
        self.await_commit()
        return self.serve_as_successor()

    def first_generation(self, why: str) -> int:
        if not self.options.listen:
            return self.fail(f"{why}, and there is no --listen", code=2)
        self.drop_channel()
        server = GatedServer(generation=1)
        addresses = {}
        for name, address in self.options.listen:
            try:
                sock = self.bind(address)
            except OSError as error:
                return self.fail(f"cannot listen on {address}: {error}")
            addresses[name] = protocol.address_of(sock)
            server.add(name, sock)
        server.open_gate()
        report("new", "listening", generation=1, addresses=addresses, why=why)
        return self.serve_until_told(server)

    def fail(self, message: str, code: int = 1) -> int:
        complain(f"new_side: {message}")
        self.drop_channel()
        for path, identity in self.bound_paths:
            unlink_if_still(path, identity)
        return code

    def decline(self) -> int:
        reason = "it was told to stop"
        try:
            self.send(Kind.GAVE_UP if self.has_adopted else Kind.REFUSED, {"reason": reason})
        except (Aborted, DeadlinePassed, ChannelBroken):
            pass
        return self.fail(reason)

    def refuse(self, error: Exception) -> int:
        body = error.body() if isinstance(error, OfferRefused) else {"reason": str(error)}
        try:
            self.send(Kind.REFUSED, body)
        except (Aborted, DeadlinePassed, ChannelBroken):
            pass  # the refusal is a courtesy; closing the channel says the same
        return self.fail(f"refused: {error}")

    # The steps, in the order of section 4.

    def receive_offer(self) -> Offer:
        channel, deadline = self.channel, Deadline(self.options.offer_timeout_ms / 1000)
        ready = protocol.wait_readable([channel, self.signals], deadline)
        if channel not in ready:
            raise ToldToStop
        frame = channel.receive({Kind.OFFER, Kind.ABORTED}, deadline)
        if frame.kind is Kind.ABORTED:
            raise Aborted(frame.body["reason"])
        return protocol.take_offer(frame)

    def adopt(self) -> None:
        listeners = [{"name": l.name, "cookie": protocol.cookie_of(l.sock)} for l in self.offer.listeners]
        if self.options.fault == "wrong-cookie":
            listeners[0]["cookie"] += 1
        if self.options.fault == "fewer-listeners":
            listeners.pop()
        body = {"protocol": self.offer.protocol, "listeners": listeners}
        if self.offer.restart is not None and not self.options.knows_no_restart:
            self.old_process = self.channel.pidfd_of_peer()
            if self.old_process is None:
                raise OfferRefused("the end of the old process cannot be waited for")
            body["restart"] = True
        self.has_adopted = True
        self.send(Kind.ADOPTED, body)
        report("new", "adopted")

    # A restart.

    def restart(self) -> int:
        self.put_stderr_in_place()
        killed = self.wait_for_the_end(self.offer.restart["kill_after_ms"] / 1000)
        self.drop_channel()
        self.tell_asker("stage", stage="gone", **({"reason": "it was killed"} if killed else {}))
        server = self.successor_server()
        server.open_gate()
        self.tell_asker("stage", stage="ready", kept=server.names(), added=[], unclaimed=[])
        generation = self.offer.generation
        message = f"restarted as generation {generation} (pid {os.getpid()})"
        self.tell_asker("result", result="restarted", message=message, pid=os.getpid(), generation=generation)
        if self.offer.asker is not None:
            self.offer.asker.close()
        report("new", "accepting", listeners=server.names(), generation=generation)
        return self.serve_until_told(server)

    def wait_for_the_end(self, kill_after: float) -> bool:
        """Of the old process: whether it had to be killed."""
        killed, deadline = False, Deadline(kill_after)
        while True:
            watched = [item for item in (self.old_process, self.signals, self.channel) if item is not None]
            try:
                ready = protocol.wait_readable(watched, deadline)
            except DeadlinePassed:
                if killed:
                    raise
                signal.pidfd_send_signal(self.old_process, signal.SIGKILL)
                killed, deadline = True, Deadline(KILL_SECONDS)
                continue
            if self.old_process in ready:
                os.close(self.old_process)
                return killed
            if self.channel is not None and self.channel in ready:
                self.receive(())
            if {signal.SIGTERM, signal.SIGINT} & self.signals.take():
                raise ToldToStop

    def tell_asker(self, event: str, **more: Any) -> None:
        if self.offer.asker is not None:
            now = time.clock_gettime(time.CLOCK_MONOTONIC) * 1e6
            line = {"event": event, "at_ms": (now - self.offer.restart["asked_us"]) / 1e3, **more}
            protocol.send_line(self.offer.asker, line, Deadline(SEND_SECONDS))

    def start_up(self) -> None:
        for number in range(self.options.starting_frames):
            self.send(Kind.STARTING, {"reason": f"warming up, step {number + 1}"})
            self.stay_attentive(self.options.starting_interval_ms / 1000)

    def stay_attentive(self, seconds: float) -> None:
        deadline = Deadline(seconds)
        try:
            while True:
                self.next_frame((), deadline)
        except DeadlinePassed:
            pass

    def announce_ready(self) -> None:
        self.added = [(name, self.bind(address)) for name, address in self.options.add]
        self.send(
            Kind.READY,
            {
                "kept": [l.name for l in self.offer.listeners if self.keeps(l)],
                "added": [name for name, _ in self.added],
                "unclaimed": [l.name for l in self.offer.listeners if not self.keeps(l)],
            },
        )
        report("new", "ready")

    def keeps(self, listener: OfferedListener) -> bool:
        """A name that is bound afresh has moved; what was offered under it is not wanted."""
        return listener.name not in self.options.leave and all(listener.name != name for name, _ in self.added)

    def await_commit(self) -> None:
        # Without a deadline: while the old process lives it decides, and when it dies the channel ends.
        while self.channel is not None:
            frame = self.next_frame({Kind.COMMIT}, None)
            if frame is not None:
                report("new", "committed")
                return

    def serve_as_successor(self) -> int:
        self.put_stderr_in_place()
        server = self.successor_server()
        names = server.names()
        if self.options.fault in ("never-accept", "no-accepting"):
            names = []
        else:
            server.open_gate()
        try:
            if self.options.fault != "no-accepting":
                self.send(Kind.ACCEPTING, {"listeners": names})
            report("new", "accepting", listeners=names, generation=self.offer.generation)
            self.misbehave_at("accepting")
            return self.serve_until_told(server)
        except (Aborted, ChannelBroken, DeadlinePassed):
            server.shut_gate()
            self.drop_channel()
            server.drain(DRAIN_SECONDS)
            raise

    def put_stderr_in_place(self) -> None:
        if self.offer.stderr is not None:
            os.dup2(self.offer.stderr, 2)
            os.close(self.offer.stderr)
            self.offer.stderr = None

    def successor_server(self) -> GatedServer:
        state = None if self.offer.state is None else (self.offer.state_version, self.offer.state)
        server = GatedServer(self.offer.generation, state)
        for listener in self.offer.listeners:
            if self.keeps(listener) and is_accepted_on(listener):
                server.add(listener.name, listener.sock)
        for name, sock in self.added:
            server.add(name, sock)
        return server

    def let_go_of_unclaimed(self) -> None:
        for listener in self.offer.listeners:
            if not self.keeps(listener) and listener.sock.fileno() >= 0:
                listener.sock.close()
                if listener.path is not None:
                    unlink_if_still(listener.address, listener.path)

    def serve_until_told(self, server: GatedServer) -> int:
        try:
            while True:
                frame = self.next_frame({Kind.SETTLED}, None)
                if frame is not None:
                    report("new", "settled")
                    self.drop_channel()
                if self.channel is None:
                    # The old process does not accept again.
                    self.let_go_of_unclaimed()
        except ToldToStop:
            self.send(Kind.STOPPING, {})
            report("new", "stopping")
        server.close_listeners()
        server.drain(DRAIN_SECONDS)
        for path, identity in self.bound_paths + self.kept_paths():
            unlink_if_still(path, identity)
        return 0

    def kept_paths(self) -> List[Tuple[str, Dict[str, int]]]:
        listeners = [] if self.offer is None else self.offer.listeners
        return [(l.address, l.path) for l in listeners if l.path is not None and self.keeps(l)]

    # The channel.

    def next_frame(self, expected: Collection[Kind], deadline: Optional[Deadline]) -> Optional[Frame]:
        """A frame, or None when the channel ended. It is then None in self.channel as well."""
        channel = self.channel
        watched = [self.signals] if channel is None else [channel, self.signals]
        ready = protocol.wait_readable(watched, deadline)
        # Before the signal: what the old process said last decides what stopping means.
        if channel is not None and channel in ready:
            return self.receive(expected)
        if {signal.SIGTERM, signal.SIGINT} & self.signals.take():
            raise ToldToStop
        return None

    def receive(self, expected: Collection[Kind]) -> Optional[Frame]:
        try:
            frame = self.channel.receive({*expected, Kind.ABORTED}, Deadline(SEND_SECONDS))
        except ChannelEnded as ending:
            self.become_orphan(str(ending))
            return None
        if frame.kind is Kind.ABORTED:
            raise Aborted(frame.body["reason"])
        return frame

    def send(self, kind: Kind, body: Dict[str, Any]) -> None:
        if self.channel is None:
            return
        try:
            self.channel.send(kind, body, deadline=Deadline(SEND_SECONDS))
        except ChannelEnded:
            self.hear_last_words()

    def hear_last_words(self) -> None:
        """Whoever closed the channel may have said before that the upgrade is off, or that it is done."""
        every_kind = {Kind.COMMIT, Kind.SETTLED}
        while self.channel is not None:
            self.receive(every_kind)

    def become_orphan(self, why: str) -> None:
        report("new", "orphaned", why=why)
        self.drop_channel()
        # What fd 2 was until now the old process read.
        self.put_stderr_in_place()

    def drop_channel(self) -> None:
        if self.channel is not None:
            self.channel.close()
            self.channel = None

    def bind(self, address: str) -> socket.socket:
        if "/" not in address:
            return bind_tcp(address)
        sock = bind_unix(address)
        self.bound_paths.append((address, path_identity(address)))
        return sock

    # Misbehaviour.

    def misbehave_at(self, point: str) -> None:
        action = MISBEHAVIOUR.get((self.options.fault, point))
        if action is not None:
            action(self)

    def send_bytes_and_linger(self, data: bytes) -> None:
        if self.channel is not None:
            self.channel.send_bytes(data, Deadline(SEND_SECONDS))
        self.linger()

    def linger(self) -> None:
        """Does nothing until the old process ends the upgrade."""
        deadline = Deadline(LINGER_SECONDS)
        while self.channel is not None:
            self.next_frame({Kind.COMMIT, Kind.SETTLED}, deadline)
        raise SystemExit(1)

    def close_channel_and_linger(self) -> None:
        self.drop_channel()
        self.next_frame((), Deadline(LINGER_SECONDS))

    def close_channel_and_serve(self) -> None:
        self.drop_channel()

    def refuse_as_newer(self) -> None:
        self.send(Kind.REFUSED, {"reason": "the offered versions are too old", "protocol": {"min": 99, "max": 99}})
        raise SystemExit(self.fail("the offered versions are too old"))

    def give_up(self) -> None:
        self.send(Kind.GAVE_UP, {"reason": "the database does not answer"})
        raise SystemExit(self.fail("the database does not answer"))

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def leave_with(code: int) -> Callable[[NewSide], None]:
    def leave(_: NewSide) -> None:
        # Not by way of the interpreter, which closes the channel long before the process is gone.
        os._exit(code)

    return leave


def sending(data: bytes) -> Callable[[NewSide], None]:
    return lambda side: side.send_bytes_and_linger(data)


GARBAGE = b"HTTP/1.1 400 Bad Request\r\n\r\n"

MISBEHAVIOUR: Dict[Tuple[str, str], Callable[[NewSide], None]] = {
    ("garbage", "offered"): sending(GARBAGE),
    ("oversized-length", "offered"): sending(protocol.encode_header(Kind.ADOPTED, protocol.MAX_BODY + 1, 0)),
    ("too-many-fds", "offered"): sending(protocol.encode_header(Kind.ADOPTED, 2, protocol.MAX_FDS + 1) + b"{}"),
    ("unknown-kind", "offered"): sending(protocol.encode_header(77, 2, 0) + b"{}"),
    ("gave-up-too-early", "offered"): sending(protocol.encode_frame(Kind.GAVE_UP, {"reason": "no"})),
    ("stopping-too-early", "adopted"): sending(protocol.encode_frame(Kind.STOPPING, {})),
    ("newer-version", "offered"): NewSide.refuse_as_newer,
    ("close-channel", "offered"): NewSide.close_channel_and_linger,
    ("exit-0", "offered"): leave_with(0),
    ("exit-1", "offered"): leave_with(1),
    ("hang-before-adopted", "offered"): NewSide.linger,
    ("hang-before-ready", "adopted"): NewSide.linger,
    ("gave-up", "adopted"): NewSide.give_up,
    ("gave-up-in-trial", "accepting"): NewSide.give_up,
    ("die-in-trial", "accepting"): NewSide.die,
    ("garbage-in-trial", "accepting"): sending(GARBAGE),
    ("close-channel-in-trial", "accepting"): NewSide.close_channel_and_serve,
}


def is_accepted_on(listener: OfferedListener) -> bool:
    return listener.kind in ("tcp", "unix")


def named_address(default: str) -> Callable[[str], Tuple[str, str]]:
    def parse(text: str) -> Tuple[str, str]:
        name, equals, address = text.rpartition("=")
        return (name, address) if equals else (default, text)

    return parse


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--listen", action="append", default=[], type=named_address("http"), metavar="[NAME=]ADDR",
        help="what a first generation binds: ip:port or a path")  # fmt: skip
    add("--pull-pid", type=int, metavar="N", help="take over from process N")
    add("--pull-socket", metavar="PATH", help="take over through this control socket")
    add("--add", action="append", default=[], type=named_address("added"), metavar="NAME=ADDR",
        help="bind this afresh besides what is offered")  # fmt: skip
    add("--leave", action="append", default=[], metavar="NAME", help="an offered listener to leave unclaimed")
    add("--fault", choices=FAULTS, default=os.environ.get("NEW_SIDE_FAULT") or None,
        help="misbehave; the default is $NEW_SIDE_FAULT")  # fmt: skip
    add("--starting-frames", type=int, default=0, help="how often to send starting before ready")
    add("--starting-interval-ms", type=int, default=100)
    add("--knows-no-restart", action="store_true", help="take an offer of a restart for one of an upgrade")
    add("--offer-timeout-ms", type=int, default=30_000)
    add("--lifetime-s", type=int, default=300, help="end by SIGALRM after this time, against left-overs of tests")
    options = parser.parse_args()
    if options.fault is not None and options.fault not in FAULTS:
        parser.error(f"no fault is called {options.fault}")
    if options.fault == "slow-start":
        options.starting_frames = options.starting_frames or 3
    return options


def main() -> int:
    options = parse_options()
    signal.alarm(options.lifetime_s)
    return NewSide(options, Signals(signal.SIGTERM, signal.SIGINT)).run()


if __name__ == "__main__":
    sys.exit(main())
