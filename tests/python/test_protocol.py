"""The protocol of docs/protocol.md, Python against Python: frames, every good path and every fault of both sides."""

from __future__ import annotations

import array
import contextlib
import os
import resource
import signal
import socket
import sys
import tempfile
import threading
import unittest
from typing import Any, Dict, Iterator, List, Optional, Sequence

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import handover_protocol as protocol  # noqa: E402
from handover_protocol import (  # noqa: E402
    Channel,
    ChannelBroken,
    ChannelEnded,
    ControlFailed,
    Deadline,
    DeadlinePassed,
    Kind,
)
from harness import (  # noqa: E402
    LIFETIME_SECONDS,
    LONG_TRIAL,
    NEW_SIDE,
    OLD_SIDE,
    TRIAL_MS,
    ProcessCase,
    Program,
    adopt_orphans,
    ask,
    connect,
    read_answer,
    send_request,
    steady_clients,
    wait_until,
)

IMPATIENT = ("--ready-timeout-ms", "1000")


def setUpModule() -> None:
    adopt_orphans(True)


def tearDownModule() -> None:
    adopt_orphans(False)


# Frames over a socketpair.


def open_fds() -> List[str]:
    # The fd of the listing itself is gone by the time it is looked at.
    return sorted(fd for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}"))


def soon() -> Deadline:
    return Deadline(2.0)


def null_fds(count: int) -> List[int]:
    return [os.open("/dev/null", os.O_RDONLY) for _ in range(count)]


class ChannelCase(unittest.TestCase):
    def setUp(self) -> None:
        self.raw, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sender, self.receiver = Channel(self.raw), Channel(theirs)
        self.addCleanup(self.receiver.close)
        self.addCleanup(self.sender.close)

    def receive(self, *expected: Kind) -> protocol.Frame:
        return self.receiver.receive(expected or list(Kind), soon())

    def assert_breaks(self, why: str, *expected: Kind) -> None:
        before = open_fds()
        with self.assertRaisesRegex(ChannelBroken, why):
            self.receive(*expected)
        self.assertEqual(open_fds(), before)

    def send_rights(self, payload: bytes, fds: Sequence[int]) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.raw.sendmsg([payload], rights)

    @contextlib.contextmanager
    def some_fds(self, count: int) -> Iterator[List[int]]:
        fds = null_fds(count)
        try:
            yield fds
        finally:
            protocol.close_all(fds)


OFFER_BODY: Dict[str, Any] = {"protocol": {"min": 1, "max": 1}}

BODIES: Dict[Kind, Dict[str, Any]] = {
    Kind.OFFER: OFFER_BODY,
    Kind.ADOPTED: {"protocol": 1, "listeners": [{"name": "http", "cookie": 8193}]},
    Kind.REFUSED: {"reason": "too old", "protocol": {"min": 2, "max": 3}},
    Kind.STARTING: {"reason": "wärming"},
    Kind.GAVE_UP: {"reason": "no"},
    Kind.READY: {"kept": ["http"], "added": ["admin2"], "unclaimed": []},
    Kind.COMMIT: {},
    Kind.ACCEPTING: {"listeners": []},
    Kind.SETTLED: {},
    Kind.ABORTED: {"reason": "off"},
    Kind.STOPPING: {},
}


class Frames(ChannelCase):
    def test_every_kind_survives_the_way(self) -> None:
        for kind in Kind:
            self.sender.send(kind, BODIES[kind], deadline=soon())
            frame = self.receive()
            self.assertEqual((frame.kind, frame.body, frame.fds), (kind, BODIES[kind], []))

    def test_layout_is_that_of_the_page(self) -> None:
        frame = b"HNDO" + b"\x00\x07" + b"\x00\x00" + b"\x00\x00\x00\x02" + b"\x00\x00\x00\x00" + b"{}"
        self.assertEqual(protocol.encode_frame(7, {}), frame)

    def test_reserved_bytes_and_unknown_fields_are_ignored(self) -> None:
        self.raw.sendall(b"HNDO\x00\x04\xff\xff\x00\x00\x00\x19\x00\x00\x00\x00" + b'{"reason":"","more":null}')
        self.assertEqual(self.receive().body, {"reason": "", "more": None})

    def test_fds_arrive_in_order_and_closed_on_exec(self) -> None:
        for count in (0, 1, 253, 254, 507):
            with self.subTest(count=count), self.some_fds(count) as fds:
                for fd in fds:
                    os.set_inheritable(fd, True)
                sending = threading.Thread(target=self.sender.send, args=(Kind.OFFER, OFFER_BODY, fds),
                                           kwargs={"deadline": soon()})  # fmt: skip
                sending.start()
                frame = self.receive()
                sending.join()
                self.assertEqual(len(frame.fds), count)
                self.assertFalse(any(os.get_inheritable(fd) for fd in frame.fds))
                protocol.close_all(frame.fds)

    def test_fds_are_the_ones_sent(self) -> None:
        with tempfile.TemporaryFile() as one, tempfile.TemporaryFile() as two:
            self.sender.send(Kind.OFFER, OFFER_BODY, [one.fileno(), two.fileno()], deadline=soon())
            received = self.receive().fds
            inodes = [os.fstat(fd).st_ino for fd in received]
            protocol.close_all(received)
            self.assertEqual(inodes, [os.fstat(one.fileno()).st_ino, os.fstat(two.fileno()).st_ino])

    def test_a_whole_body_of_the_largest_size_is_taken(self) -> None:
        body = b'{"reason":"' + b"x" * (protocol.MAX_BODY - 13) + b'"}'
        data = protocol.encode_header(Kind.STARTING, len(body), 0) + body
        sending = threading.Thread(target=self.sender.send_bytes, args=(data, soon()))
        sending.start()
        self.assertEqual(len(self.receive().body["reason"]), protocol.MAX_BODY - 13)
        sending.join()

    def test_broken_headers(self) -> None:
        for why, header in {
            "begins with": protocol.encode_header(7, 2, 0, magic=b"HAND"),
            "longer than": protocol.encode_header(7, protocol.MAX_BODY + 1, 0),
            "more than 16384": protocol.encode_header(1, 2, protocol.MAX_FDS + 1),
            "no frame has kind 77": protocol.encode_header(77, 2, 0),
            "no frame has kind 0": protocol.encode_header(0, 2, 0),
            "carries 1 fds": protocol.encode_header(7, 2, 1),
        }.items():
            with self.subTest(why), self.assertRaisesRegex(ChannelBroken, why):
                self.raw.sendall(header)
                self.receive()

    def test_a_kind_that_is_not_expected(self) -> None:
        self.sender.send(Kind.SETTLED, {}, deadline=soon())
        self.assert_breaks("SETTLED is not expected", Kind.COMMIT)

    def test_broken_bodies(self) -> None:
        too_deep = b"[" * 200_000
        for body in (b"", b"[]", b"nul", b"{}", b'{"reason":1}', b'{"reason":"\xff"}', b'{"reason":NaN}', too_deep):
            with self.subTest(body[:20]), self.assertRaises(ChannelBroken):
                self.raw.sendall(protocol.encode_header(Kind.STARTING, len(body), 0))
                sending = threading.Thread(target=self.raw.sendall, args=(body,))
                sending.start()
                try:
                    self.receive()
                finally:
                    sending.join()

    def test_too_few_and_too_many_fds_in_a_message(self) -> None:
        for announced, sent in ((2, 1), (1, 2), (1, 0), (300, 252)):
            with self.subTest(announced=announced, sent=sent), self.some_fds(sent) as fds:
                self.raw.sendall(protocol.encode_frame(Kind.OFFER, OFFER_BODY, announced))
                self.send_rights(b"F", fds)
                self.assert_breaks(f"{sent} fds came instead of")

    def test_a_payload_that_is_not_f(self) -> None:
        with self.some_fds(1) as fds:
            self.raw.sendall(protocol.encode_frame(Kind.OFFER, OFFER_BODY, 1))
            self.send_rights(b"G", fds)
            self.assert_breaks("the fds came with b'G'")

    def test_fds_of_earlier_messages_are_closed_when_a_later_one_breaks(self) -> None:
        with self.some_fds(253) as fds:
            self.raw.sendall(protocol.encode_frame(Kind.OFFER, OFFER_BODY, 255))
            self.send_rights(b"F", fds)
            self.send_rights(b"F", fds[:1])
            self.assert_breaks("1 fds came instead of 2")

    def test_fds_that_the_kernel_cut(self) -> None:
        with self.some_fds(2) as fds:
            self.raw.sendall(protocol.encode_frame(Kind.OFFER, OFFER_BODY, 2))
            self.send_rights(b"F", fds)
            before = open_fds()
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            lowest_free = os.dup(0)
            os.close(lowest_free)
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + 1, hard))
            try:
                with self.assertRaisesRegex(ChannelBroken, "the kernel cut"):
                    self.receive()
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            self.assertEqual(open_fds(), before)

    def test_fds_attached_to_a_header_are_closed(self) -> None:
        before = open_fds()
        with self.some_fds(3) as fds:
            self.send_rights(protocol.encode_frame(Kind.COMMIT, {}), fds)
        self.assertEqual(self.receive().kind, Kind.COMMIT)
        self.assertEqual(open_fds(), before)

    def test_end_of_file_within_each_part(self) -> None:
        frame = protocol.encode_frame(Kind.OFFER, OFFER_BODY, 1)
        for length in (0, 7, protocol.HEADER.size, len(frame) - 1, len(frame)):
            with self.subTest(length=length):
                ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
                receiver = Channel(theirs)
                ours.sendall(frame[:length])
                ours.close()
                with self.assertRaises(ChannelEnded):
                    receiver.receive([Kind.OFFER], soon())
                receiver.close()

    def test_a_reset_counts_as_the_end(self) -> None:
        self.receiver.send(Kind.STARTING, {"reason": "unread"}, deadline=soon())
        self.raw.close()
        with self.assertRaises(ChannelEnded):
            self.receive()

    def test_a_peer_that_stops_within_a_frame_meets_the_deadline(self) -> None:
        self.raw.sendall(b"HND")
        with self.assertRaises(DeadlinePassed):
            self.receiver.receive([Kind.OFFER], Deadline(0.05))

    def test_a_peer_that_does_not_read_meets_the_deadline(self) -> None:
        with self.assertRaises(DeadlinePassed):
            self.sender.send_bytes(b" " * protocol.MAX_BODY, Deadline(0.05))


class InheritedChannel(unittest.TestCase):
    def setUp(self) -> None:
        self.ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.addCleanup(self.ours.close)
        self.addCleanup(self.theirs.close)

    def test_the_right_inode_is_taken_and_closed_on_exec(self) -> None:
        fd = os.dup(self.theirs.fileno())
        os.set_inheritable(fd, True)
        channel = protocol.inherited_channel(f"{fd}:{os.fstat(fd).st_ino}")
        self.assertFalse(os.get_inheritable(fd))
        channel.close()

    def test_a_left_over_is_ignored(self) -> None:
        fd = self.theirs.fileno()
        inode = os.fstat(fd).st_ino
        with open("/dev/null", "rb") as no_socket:
            null = f"{no_socket.fileno()}:{os.fstat(no_socket.fileno()).st_ino}"
            for variable in (None, "", "3", f"{fd}:{inode + 1}", "900:1", null, f"+{fd}:{inode}", f"{fd}:{inode}:1"):
                with self.subTest(variable):
                    self.assertIsNone(protocol.inherited_channel(variable))


class Offers(unittest.TestCase):
    """take_offer on frames made by hand."""

    def setUp(self) -> None:
        self.sock = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(self.sock.close)

    def body(self, **changes: Any) -> Dict[str, Any]:
        listener = {
            "name": "http",
            "kind": "tcp",
            "address": protocol.address_of(self.sock),
            "cookie": protocol.cookie_of(self.sock),
        }
        return {**OFFER_BODY, "generation": 2, "pid": 1, "listeners": [listener], "stderr": False, **changes}

    def take(self, body: Dict[str, Any], fds: Optional[List[int]] = None) -> protocol.Offer:
        fds = [os.dup(self.sock.fileno())] if fds is None else fds
        return protocol.take_offer(protocol.Frame(Kind.OFFER, body, fds))

    def assert_refused(self, why: str, body: Dict[str, Any], fds: Optional[List[int]] = None) -> None:
        before = open_fds()
        closed_by_refusal = {str(fd) for fd in fds or ()}
        with self.assertRaisesRegex((protocol.OfferRefused, ChannelBroken), why):
            self.take(body, fds)
        self.assertEqual(set(open_fds()), set(before) - closed_by_refusal)

    def test_a_good_offer(self) -> None:
        offer = self.take(self.body())
        self.assertEqual((offer.protocol, offer.generation, offer.listeners[0].name), (1, 2, "http"))
        offer.listeners[0].sock.close()

    def test_a_wider_range_is_taken_at_the_highest_common_version(self) -> None:
        offer = self.take(self.body(protocol={"min": 0, "max": 7}))
        self.assertEqual(offer.protocol, 1)
        offer.listeners[0].sock.close()

    def test_what_is_refused(self) -> None:
        listener = self.body()["listeners"][0]
        for why, changes in {
            "versions 2 to 3": {"protocol": {"min": 2, "max": 3}},
            "has cookie": {"listeners": [{**listener, "cookie": 1}]},
            "is tcp, not udp": {"listeners": [{**listener, "kind": "udp"}]},
            "1 fds came for 2": {"stderr": True},
            "1 fds came for 0": {"listeners": []},
            "have its shape": {"listeners": [{**listener, "name": "a:b"}]},
            "shape": {"generation": "2"},
        }.items():
            with self.subTest(why):
                self.assert_refused(why, self.body(**changes))

    def test_null_is_absent(self) -> None:
        body = self.body(state=None, draining=None, stderr=None)
        body["listeners"][0].update(path=None, backlog=None)
        self.take(body).listeners[0].sock.close()

    def test_listeners_do_not_block(self) -> None:
        self.sock.setblocking(True)
        with self.take(self.body()).listeners[0].sock as received:
            self.assertFalse(os.get_blocking(received.fileno()))

    def test_two_listeners_of_one_name(self) -> None:
        body = self.body()
        body["listeners"] *= 2
        self.assert_refused("same name", body, [os.dup(self.sock.fileno()), os.dup(self.sock.fileno())])

    def test_an_fd_that_is_no_socket(self) -> None:
        self.assert_refused("no socket", self.body(), null_fds(1))


class ControlLines(unittest.TestCase):
    def setUp(self) -> None:
        self.ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.addCleanup(self.ours.close)
        self.addCleanup(self.theirs.close)

    def test_nothing_after_the_line_is_read(self) -> None:
        self.ours.sendall(b'{"event":"accepted"}\nHNDO')
        self.assertEqual(protocol.read_line(self.theirs, soon()), {"event": "accepted"})
        self.assertEqual(self.theirs.recv(10), b"HNDO")

    def test_lines_that_fail(self) -> None:
        for line in (b"[]\n", b"{\n", b'{"event":"acc'):
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            with self.subTest(line), ours, theirs, self.assertRaises(ControlFailed):
                ours.sendall(line)
                ours.shutdown(socket.SHUT_WR)
                protocol.read_line(theirs, soon())

    def test_a_line_is_bounded_in_time(self) -> None:
        self.ours.sendall(b"{")
        with self.assertRaises(DeadlinePassed):
            protocol.read_line(self.theirs, Deadline(0.05))

    def test_a_line_is_bounded_in_length(self) -> None:
        sending = threading.Thread(target=self.ours.sendall, args=(b" " * protocol.MAX_LINE + b"\n",))
        sending.start()
        with self.assertRaisesRegex(ControlFailed, "longer than"):
            protocol.read_line(self.theirs, Deadline(10))
        self.theirs.recv(10)
        sending.join()

    def test_a_process_without_control_socket(self) -> None:
        with self.assertRaisesRegex(ControlFailed, "has no control socket"):
            protocol.find_control_socket(os.getpid())

    def test_paths_of_the_kernels_table(self) -> None:
        table = [
            "Num       RefCount Protocol Flags    Type St Inode Path\n",
            "0000000000000000: 00000002 00000000 00010000 0001 01 1811 /run/hand over/7.sock\n",
            "0000000000000000: 00000003 00000000 00000000 0001 03 1812 /run/handover/7.sock\n",
            "0000000000000000: 00000003 00000000 00000000 0001 03 1813\n",
        ]
        self.assertEqual(list(protocol.listening_paths(table)), [("/run/hand over/7.sock", 1811)])


class Push(ProcessCase):
    def test_stages_come_in_order(self) -> None:
        old = self.start_old()
        self.assert_handed_over(old)
        stages = [s["stage"] for s in old.log.seen() if s["side"] == "old"]
        expected = "listening spawned adopted ready committed accepting healthy settled draining drained".split()
        self.assertEqual(stages, expected)

    def test_on_a_signal_while_clients_come_and_go(self) -> None:
        old = self.start_old("--trial-ms", "1000", now=False)
        with steady_clients(self.address) as answers:
            wait_until(lambda: len(answers) >= 20)
            old.signal(signal.SIGUSR2)
            self.assertEqual(old.exit_code(), 0)
            after_exit = len(answers)
            wait_until(lambda: len(answers) >= after_exit + 20)
        self.assertEqual(set(answers), {f"gen=1 pid={old.pid}", f"gen=2 pid={old.child()}"})

    def test_state_arrives(self) -> None:
        old = self.start_old("--state", "00ff10", "--state-version", "3")
        self.assert_handed_over(old)
        self.assertEqual(ask(self.address, "/state"), "version=3 hex=00ff10")

    def test_no_state(self) -> None:
        self.assert_handed_over(self.start_old())
        self.assertEqual(ask(self.address, "/state"), "none")

    def test_empty_state_is_not_no_state(self) -> None:
        self.assert_handed_over(self.start_old("--state", ""))
        self.assertEqual(ask(self.address, "/state"), "version=1 hex=")

    def test_large_state(self) -> None:
        state = "ab" * 30_000
        self.assert_handed_over(self.start_old("--state", state))
        self.assertEqual(ask(self.address, "/state"), f"version=1 hex={state}")

    def test_unix_path_passes_to_the_last_generation(self) -> None:
        path = self.path("app.sock")
        old = self.start_old("--unix", path)
        self.assert_handed_over(old)
        self.assert_served_by(2, old.child(), path)
        old.terminate_child()
        self.assertTrue(old.child_has_ended())
        self.assertFalse(os.path.exists(path))

    def test_a_path_made_anew_by_another_is_left(self) -> None:
        path = self.path("app.sock")
        old = self.start_old("--unix", path)
        self.assert_handed_over(old)
        # Renamed over it, since a path that is unlinked first may give its inode number to the next.
        with open(self.path("other"), "wb"):
            os.rename(self.path("other"), path)
        old.terminate_child()
        self.assertTrue(old.child_has_ended())
        self.assertTrue(os.path.exists(path))

    def test_more_listeners_than_one_message_carries(self) -> None:
        old = self.start_old("--extra", "300", "--udp", "127.0.0.1:0", "--state", "01")
        addresses = old.log.wait("old", "listening")["addresses"]
        self.assert_handed_over(old)
        self.assert_served_by(2, old.child(), addresses["extra-0"])
        self.assert_served_by(2, old.child(), addresses["extra-299"])

    def test_kept_added_and_unclaimed(self) -> None:
        added = self.path("added.sock")
        old = self.start_old("--unix", self.path("app.sock"), new=["--leave", "unix", "--add", f"more={added}"])
        self.assert_handed_over(old)
        ready = old.log.wait("old", "ready")
        self.assertEqual((ready["kept"], ready["added"], ready["unclaimed"]), (["http"], ["more"], ["unix"]))
        self.assert_served_by(2, old.child(), added)
        wait_until(lambda: not os.path.exists(self.path("app.sock")))

    def test_a_name_moves_to_another_address(self) -> None:
        path, moved = self.path("app.sock"), self.path("moved.sock")
        old = self.start_old("--unix", path, new=["--add", f"unix={moved}"])
        self.assert_handed_over(old)
        ready = old.log.wait("old", "ready")
        self.assertEqual((ready["kept"], ready["added"], ready["unclaimed"]), (["http"], ["unix"], ["unix"]))
        self.assert_served_by(2, old.child(), moved)
        wait_until(lambda: not os.path.exists(path))

    def test_starting_keeps_a_slow_new_process_alive(self) -> None:
        # Together the steps take longer than the timeout, each of them less.
        slow = ["--fault", "slow-start", "--starting-interval-ms", "1200"]
        old = self.start_old("--ready-timeout-ms", "3000", new=slow)
        self.assert_handed_over(old)
        self.assertEqual([s["stage"] for s in old.log.seen()].count("starting"), 3)

    def test_open_connections_are_finished_by_the_old_process(self) -> None:
        old = self.start_old(now=False)
        with connect(self.address) as connection:
            send_request(connection, "/slow/1000")
            old.signal(signal.SIGUSR2)
            old.log.wait("old", "settled")
            self.assert_served_by(2, old.child())
            self.assertEqual(read_answer(connection), f"gen=1 pid={old.pid}")
        self.assertEqual(old.exit_code(), 0)

    def test_settled_new_process_stops_on_sigterm(self) -> None:
        old = self.start_old()
        self.assert_handed_over(old)
        old.terminate_child()
        self.assertTrue(old.child_has_ended())
        with self.assertRaises(ConnectionRefusedError):
            connect(self.address)

    def test_new_process_told_to_stop_in_the_trial_is_not_replaced(self) -> None:
        old = self.start_old("--trial-ms", "30000")
        old.log.wait("old", "accepting")
        old.terminate_child()
        self.assertEqual(old.exit_code(), 0)
        self.assertTrue(old.child_has_ended())
        self.assertIsNotNone(old.log.find("old", "stopping"))
        self.assertIsNotNone(old.log.find("old", "settled"))
        with self.assertRaises(ConnectionRefusedError):
            connect(self.address)

    def test_a_second_attempt_after_a_failed_one(self) -> None:
        script = 'if test -e "$0"; then exec "$@"; fi; : > "$0"; echo first attempt >&2; exit 7'
        old = self.start(OLD_SIDE, "--listen", "127.0.0.1:0", "--trial-ms", TRIAL_MS, "--lifetime-s", LIFETIME_SECONDS,
                         "--", "sh", "-c", script, self.path("marker"), sys.executable, NEW_SIDE,
                         "--lifetime-s", LIFETIME_SECONDS)  # fmt: skip
        self.address = old.log.wait("old", "listening")["address"]
        old.signal(signal.SIGUSR2)
        failed = self.assert_failed(old, "exited|ended")
        self.assertEqual((failed["exit"], failed["stderr"]), (7, ["first attempt"]))
        old.signal(signal.SIGUSR2)
        self.assertEqual(old.exit_code(), 0)
        self.assertRegex(ask(self.address), "^gen=2 ")

    def test_a_program_that_does_not_exist(self) -> None:
        old = self.start(OLD_SIDE, "--listen", "127.0.0.1:0", "--now", "--lifetime-s", LIFETIME_SECONDS,
                         "--", self.path("nothing"))  # fmt: skip
        self.address = old.log.wait("old", "listening")["address"]
        self.assert_failed(old, "cannot be started")

    def test_the_new_process_inherits_only_the_channel(self) -> None:
        listing = 'import os; print(sorted(os.listdir("/proc/self/fd"), key=int), file=__import__("sys").stderr)'
        old = self.start(OLD_SIDE, "--listen", "127.0.0.1:0", "--now", "--lifetime-s", LIFETIME_SECONDS,
                         "--", sys.executable, "-c", listing)  # fmt: skip
        failed = old.log.wait("old", "failed")
        # 4 is the directory that lists them.
        self.assertEqual(failed["stderr"], ["['0', '1', '2', '3', '4']"])


class FaultsOfTheNewSide(ProcessCase):
    def push_fault(self, fault: str, why: str, *old_arguments: str, stage: str = "failed") -> Dict[str, Any]:
        self.environment["NEW_SIDE_FAULT"] = fault
        old = self.start_old(*LONG_TRIAL, *old_arguments)
        failed = self.assert_failed(old, why, stage)
        self.assertTrue(old.child_has_ended())
        return failed

    def test_garbage(self) -> None:
        self.push_fault("garbage", "begins with b'HTTP'")

    def test_oversized_length(self) -> None:
        self.push_fault("oversized-length", "longer than 4194304")

    def test_too_many_fds(self) -> None:
        self.push_fault("too-many-fds", "more than 16384")

    def test_unknown_kind(self) -> None:
        self.push_fault("unknown-kind", "kind 77")

    def test_gave_up_too_early(self) -> None:
        self.push_fault("gave-up-too-early", "GAVE_UP is not expected")

    def test_stopping_too_early(self) -> None:
        self.push_fault("stopping-too-early", "STOPPING is not expected")

    def test_wrong_cookie(self) -> None:
        self.push_fault("wrong-cookie", "adopted other listeners")

    def test_fewer_listeners(self) -> None:
        self.push_fault("fewer-listeners", "adopted other listeners")

    def test_newer_version(self) -> None:
        self.push_fault("newer-version", "refused: the offered versions are too old")

    def test_close_channel(self) -> None:
        failed = self.push_fault("close-channel", "the channel ended")
        self.assertEqual(failed["exit"], -signal.SIGKILL)

    def test_exit_0(self) -> None:
        self.assertEqual(self.push_fault("exit-0", "exited|ended")["exit"], 0)

    def test_exit_1(self) -> None:
        self.assertEqual(self.push_fault("exit-1", "exited|ended")["exit"], 1)

    def test_hang_before_adopted(self) -> None:
        self.push_fault("hang-before-adopted", "silent for too long", *IMPATIENT)

    def test_hang_before_ready(self) -> None:
        self.push_fault("hang-before-ready", "silent for too long", *IMPATIENT)

    def test_gave_up(self) -> None:
        failed = self.push_fault("gave-up", "gave up: the database does not answer")
        self.assertIn("new_side: the database does not answer", failed["stderr"])

    def test_gave_up_in_trial(self) -> None:
        failed = self.push_fault("gave-up-in-trial", "gave up: the database does not answer", stage="rolled-back")
        self.assertEqual(failed["exit"], 1)

    def test_no_answer_to_the_commit(self) -> None:
        self.push_fault("no-accepting", "did not answer the commit", "--trial-ms", "50", stage="rolled-back")

    def test_die_in_trial(self) -> None:
        self.assertEqual(self.push_fault("die-in-trial", "exited|ended", stage="rolled-back")["exit"], -signal.SIGKILL)

    def test_garbage_in_trial(self) -> None:
        self.push_fault("garbage-in-trial", "begins with b'HTTP'", stage="rolled-back")

    def test_close_channel_in_trial(self) -> None:
        failed = self.push_fault("close-channel-in-trial", "the channel ended", stage="rolled-back")
        self.assertEqual(failed["exit"], -signal.SIGKILL)

    def test_never_accept_while_somebody_waits(self) -> None:
        self.environment["NEW_SIDE_FAULT"] = "never-accept"
        old = self.start_old("--trial-ms", "2000")
        old.log.wait("new", "accepting")
        with connect(self.address) as connection:
            send_request(connection)
            self.assertEqual(read_answer(connection), f"gen=1 pid={old.pid}")
        self.assert_failed(old, "connections wait on http", "rolled-back")
        self.assertTrue(old.child_has_ended())

    def test_never_accept_while_nobody_waits_is_not_noticed(self) -> None:
        self.environment["NEW_SIDE_FAULT"] = "never-accept"
        old = self.start_old()
        self.assertEqual(old.exit_code(), 0)
        self.assertTrue(old.child_is_running())


class FaultsOfTheOldSide(ProcessCase):
    def push_fault(self, fault: str, *old_arguments: str, new: Sequence[str] = ()) -> Program:
        return self.start_old("--fault", fault, *LONG_TRIAL, *old_arguments, new=new)

    def assert_new_serves(self, old: Program, generation: int) -> None:
        self.assertEqual(old.exit_code(), 70)
        old.log.wait("new", "accepting", "listening")
        self.assert_served_by(generation, old.child())

    def assert_refused(self, fault: str, why: str, *old_arguments: str) -> None:
        old = self.push_fault(fault, *old_arguments)
        failed = self.assert_failed(old, why)
        self.assertTrue(old.child_has_ended())
        self.assertIn(failed["exit"], (1, -signal.SIGKILL))

    def test_die_before_offer(self) -> None:
        self.assert_new_serves(self.push_fault("die-before-offer", new=["--listen", "{address}"]), generation=1)

    def test_die_mid_offer(self) -> None:
        self.assert_new_serves(self.push_fault("die-mid-offer", new=["--listen", "{address}"]), generation=1)

    def test_die_before_offer_leaving_a_unix_path(self) -> None:
        path = self.path("app.sock")
        old = self.push_fault("die-before-offer", "--unix", path, new=["--listen", f"unix={path}"])
        old.log.wait("new", "listening")
        self.assert_served_by(1, old.child(), path)

    def test_die_before_offer_without_a_known_address(self) -> None:
        old = self.push_fault("die-before-offer")
        self.assertEqual(old.exit_code(), 70)
        self.assertTrue(old.child_has_ended())

    def test_die_after_offer(self) -> None:
        self.assert_new_serves(self.push_fault("die-after-offer"), generation=2)

    def test_die_after_offer_while_the_new_process_warms_up(self) -> None:
        old = self.push_fault("die-after-offer", new=["--starting-frames", "2", "--starting-interval-ms", "200"])
        self.assert_new_serves(old, generation=2)

    def test_die_after_ready(self) -> None:
        self.assert_new_serves(self.push_fault("die-after-ready"), generation=2)

    def test_die_in_trial(self) -> None:
        self.assert_new_serves(self.push_fault("die-in-trial"), generation=2)

    def test_orphan_has_its_state_and_stops_on_sigterm(self) -> None:
        old = self.push_fault("die-after-ready", "--state", "77")
        self.assert_new_serves(old, generation=2)
        self.assertEqual(ask(self.address, "/state"), "version=1 hex=77")
        old.terminate_child()
        self.assertTrue(old.child_has_ended())

    def test_a_connection_waits_until_the_orphan_is_ready(self) -> None:
        old = self.push_fault("die-after-offer", new=["--starting-frames", "1", "--starting-interval-ms", "1000"])
        self.assertEqual(old.exit_code(), 70)
        # The new process must hold the listener before anybody can wait there.
        old.log.wait("new", "adopted")
        self.assert_served_by(2, old.child())

    def test_abort_after_adopted(self) -> None:
        old = self.push_fault("abort-after-adopted")
        failed = self.assert_failed(old, "the operator changed their mind")
        self.assertEqual(failed["exit"], 1)
        self.assertIsNotNone(old.log.find("new", "aborted"))

    def test_abort_in_trial(self) -> None:
        old = self.push_fault("abort-in-trial")
        self.assertEqual(self.assert_failed(old, "changed their mind", "rolled-back")["exit"], 1)
        self.assertIsNotNone(old.log.find("new", "aborted"))

    def test_garbage_from_a_living_old_process_is_an_abort(self) -> None:
        for fault, stage in (("garbage-after-adopted", "failed"), ("garbage-in-trial", "rolled-back")):
            with self.subTest(fault):
                old = self.push_fault(fault)
                self.assertEqual(self.assert_failed(old, "changed their mind", stage)["exit"], 1)
                self.assertIn("the channel broke: the frame begins with", old.stderr())

    def test_an_aborted_process_unlinks_only_what_it_bound(self) -> None:
        path, added = self.path("app.sock"), self.path("added.sock")
        old = self.push_fault("abort-in-trial", "--unix", path, new=["--add", f"more={added}"])
        self.assert_failed(old, "changed their mind", "rolled-back")
        self.assert_served_by(1, old.pid, path)
        self.assertFalse(os.path.exists(added))

    def test_told_to_stop_before_commit(self) -> None:
        old = self.start_old(new=["--fault", "hang-before-ready"])
        old.log.wait("new", "adopted")
        old.signal(signal.SIGTERM)
        self.assertEqual(old.exit_code(), 0)
        self.assertEqual(old.log.wait("old", "failed")["reason"], "the old process was told to stop")
        self.assertTrue(old.child_has_ended())

    def test_told_to_stop_in_the_trial(self) -> None:
        old = self.start_old(*LONG_TRIAL)
        old.log.wait("old", "accepting")
        old.signal(signal.SIGTERM)
        self.assertEqual(old.exit_code(), 0)
        old.log.wait("new", "settled")
        self.assert_served_by(2, old.child())

    def test_truncated_fds(self) -> None:
        self.assert_refused("truncated-fds", "refused: 1 fds came instead of 2")

    def test_truncated_fds_beyond_one_message(self) -> None:
        self.assert_refused("truncated-fds", "refused: 252 fds came instead of 253", "--extra", "251")

    def test_wrong_magic(self) -> None:
        self.assert_refused("wrong-magic", "refused: the frame begins with b'HAND'")

    def test_version_99(self) -> None:
        self.assert_refused("version-99", "refused: versions 99 to 99")

    def test_cookie_mismatch(self) -> None:
        self.assert_refused("cookie-mismatch", "refused: listener http has cookie")

    def test_huge_body(self) -> None:
        self.assert_refused("huge-body", "refused: a body of 4194305 bytes")

    def test_long_state(self) -> None:
        self.assert_refused("long-state", "refused: a state of 67108865 bytes")

    def test_short_state(self) -> None:
        self.assert_refused("short-state", "refused: the state has 5 bytes, not 6")

    def test_stale_inode_starts_a_first_generation(self) -> None:
        old = self.push_fault("stale-inode", "--ready-timeout-ms", "3000", new=["--listen", "127.0.0.1:0"])
        first = old.log.wait("new", "listening")
        self.assertEqual(first["generation"], 1)
        self.assertNotEqual(first["addresses"]["http"], self.address)
        self.assert_failed(old, "silent for too long")
        self.assertTrue(old.child_has_ended())

    def test_stale_inode_without_an_address(self) -> None:
        old = self.push_fault("stale-inode")
        self.assertEqual(self.assert_failed(old, "exited|ended")["exit"], 2)


class Pull(ProcessCase):
    def start_pullable(self, *arguments: str) -> Program:
        return self.start_old("--control", *arguments, now=False)

    def control_path(self, old: Program) -> str:
        return os.path.join(self.environment["HANDOVER_DIR"], f"{old.pid}.sock")

    def assert_pulled(self, old: Program, new: Program) -> None:
        self.assertEqual(old.exit_code(), 0)
        new.log.wait("new", "settled")
        self.assert_served_by(2, new.pid)

    def test_by_pid(self) -> None:
        old = self.start_pullable("--state", "0a")
        new = self.start_puller("--pull-pid", str(old.pid))
        self.assert_pulled(old, new)
        self.assertEqual(ask(self.address, "/state"), "version=1 hex=0a")
        self.assertFalse(os.path.exists(self.control_path(old)))

    def test_by_socket(self) -> None:
        old = self.start_pullable()
        self.assert_pulled(old, self.start_puller("--pull-socket", self.control_path(old)))

    def test_control_socket_is_private(self) -> None:
        old = self.start_pullable()
        self.assertEqual(os.stat(self.control_path(old)).st_mode & 0o777, 0o600)
        self.assertEqual(os.stat(self.environment["HANDOVER_DIR"]).st_mode & 0o777, 0o700)

    def test_nobody_to_pull_from(self) -> None:
        new = self.start_puller("--pull-pid", str(os.getpid()))
        self.assertEqual(new.exit_code(), 1)
        self.assertIn("has no control socket", new.stderr())

    def test_two_pullers_at_once(self) -> None:
        old = self.start_pullable("--ready-timeout-ms", "30000")
        slowly = ["--starting-frames", "1", "--starting-interval-ms", "20000"]
        first = self.start_puller("--pull-pid", str(old.pid), *slowly)
        first.log.wait("new", "adopted")
        second = self.start_puller("--pull-pid", str(old.pid))
        self.assertEqual(second.exit_code(), 1)
        self.assertIn("busy: another upgrade", second.stderr())
        first.signal(signal.SIGTERM)
        self.assertEqual(first.exit_code(), 1)
        self.assert_failed(old, "gave up: it was told to stop")

    def test_unknown_request_and_status(self) -> None:
        old = self.start_pullable()
        for request, event in (("status", "status"), ("dance", "result")):
            with protocol.connect_to_process(old.pid) as sock:
                protocol.send_line(sock, {"request": request}, soon())
                self.assertEqual(protocol.read_line(sock, soon())["event"], event)

    def test_refused_by_a_newer_build(self) -> None:
        old = self.start_pullable()
        new = self.start_puller("--pull-pid", str(old.pid), "--fault", "newer-version")
        self.assertEqual(new.exit_code(), 1)
        self.assert_failed(old, "refused: the offered versions are too old")

    def test_silent_puller_is_told_that_it_is_off(self) -> None:
        old = self.start_pullable(*IMPATIENT)
        new = self.start_puller("--pull-pid", str(old.pid), "--fault", "hang-before-ready")
        self.assert_failed(old, "silent for too long")
        self.assertEqual(new.exit_code(), 1)
        self.assertIn("aborted by the old process", new.stderr())

    def test_puller_that_closes_the_channel_is_not_killed(self) -> None:
        old = self.start_pullable()
        new = self.start_puller("--pull-pid", str(old.pid), "--fault", "close-channel")
        self.assert_failed(old, "the channel ended")
        self.assertIsNone(new.process.poll())

    def test_puller_that_dies_in_the_trial(self) -> None:
        old = self.start_pullable(*LONG_TRIAL)
        self.start_puller("--pull-pid", str(old.pid), "--fault", "die-in-trial")
        self.assert_failed(old, "exited|the channel ended", "rolled-back")

    def test_puller_that_fails_in_the_trial_is_killed(self) -> None:
        for fault, why in {
            "never-accept": "connections wait on http",
            "no-accepting": "did not answer the commit",
            "garbage-in-trial": "begins with b'HTTP'",
            "gave-up-in-trial": "gave up",
        }.items():
            with self.subTest(fault):
                old = self.start_pullable("--trial-ms", "500")
                new = self.start_puller("--pull-pid", str(old.pid), "--fault", fault)
                new.log.wait("new", "accepting")
                if fault == "never-accept":
                    self.assert_served_by(1, old.pid)
                self.assert_failed(old, why, "rolled-back")
                self.assertEqual(new.exit_code(), 1 if fault == "gave-up-in-trial" else -signal.SIGKILL)

    def test_old_process_that_dies_before_its_offer(self) -> None:
        old = self.start_pullable("--fault", "die-before-offer")
        new = self.start_puller("--pull-pid", str(old.pid), "--listen", self.address)
        self.assertEqual(new.exit_code(), 1)
        self.assertIn("before its offer was whole", new.stderr())

    def test_old_process_that_dies_later(self) -> None:
        for fault in ("die-after-offer", "die-after-ready", "die-in-trial"):
            with self.subTest(fault):
                old = self.start_pullable("--fault", fault, *LONG_TRIAL)
                new = self.start_puller("--pull-pid", str(old.pid))
                self.assertEqual(old.exit_code(), 70)
                new.log.wait("new", "accepting")
                self.assert_served_by(2, new.pid)

    def test_old_process_that_aborts(self) -> None:
        old = self.start_pullable("--fault", "abort-after-adopted")
        new = self.start_puller("--pull-pid", str(old.pid))
        self.assertEqual(new.exit_code(), 1)
        self.assert_failed(old, "changed their mind")

    def test_clients_come_and_go(self) -> None:
        old = self.start_pullable("--trial-ms", "1000")
        with steady_clients(self.address) as answers:
            wait_until(lambda: len(answers) >= 20)
            new = self.start_puller("--pull-pid", str(old.pid))
            self.assertEqual(old.exit_code(), 0)
            after_exit = len(answers)
            wait_until(lambda: len(answers) >= after_exit + 20)
        self.assertEqual(set(answers), {f"gen=1 pid={old.pid}", f"gen=2 pid={new.pid}"})


if __name__ == "__main__":
    unittest.main()
