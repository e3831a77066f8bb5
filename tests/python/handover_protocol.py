"""The handover protocol, version 1, written from docs/protocol.md alone."""

from __future__ import annotations

import array
import contextlib
import enum
import json
import os
import re
import select
import socket
import stat
import struct
import time
from dataclasses import dataclass, field
from typing import Any, Callable, Collection, Dict, Iterable, Iterator, List, Optional, Sequence, Set, Tuple

MAGIC = b"HNDO"
HEADER = struct.Struct(">4sHHII")
MAX_BODY = 4 * 1024 * 1024
MAX_FDS = 16_384
FDS_PER_MESSAGE = 253
FD_PAYLOAD = b"F"
MAX_STATE = 64 * 1024 * 1024
MAX_NAME = 255
MAX_LINE = 262_144
REQUEST_SECONDS = 5.0
SPOKEN = {"min": 1, "max": 1}

SO_PROTOCOL = 38
SO_DOMAIN = 39
SO_COOKIE = 57

UNIX_LISTENING_FLAG = 0x10000  # __SO_ACCEPTCON in /proc/net/unix


class Kind(enum.IntEnum):
    OFFER = 1
    ADOPTED = 2
    REFUSED = 3
    STARTING = 4
    GAVE_UP = 5
    READY = 6
    COMMIT = 7
    ACCEPTING = 8
    SETTLED = 9
    ABORTED = 10
    STOPPING = 11


class ChannelBroken(Exception):
    """The peer sent what the protocol does not allow."""


class ChannelEnded(Exception):
    """The peer closed the channel, or died."""


class DeadlinePassed(Exception):
    """The peer was silent for too long."""


class OfferRefused(Exception):
    """The offer is well-formed and cannot be taken."""

    def __init__(self, reason: str, protocol: Optional[Dict[str, int]] = None) -> None:
        super().__init__(reason)
        self.protocol = protocol

    def body(self) -> Dict[str, Any]:
        body: Dict[str, Any] = {"reason": str(self)}
        if self.protocol is not None:
            body["protocol"] = self.protocol
        return body


class Deadline:
    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def remaining(self) -> float:
        left = self._end - time.monotonic()
        if left <= 0:
            raise DeadlinePassed("the deadline has passed")
        return left


def wait_readable(watched: Iterable[Any], deadline: Optional[Deadline]) -> List[Any]:
    """Those of `watched` that are readable or at their end; raises DeadlinePassed when none is in time."""
    by_fd = {item if isinstance(item, int) else item.fileno(): item for item in watched}
    poller = select.poll()
    for fd in by_fd:
        poller.register(fd, select.POLLIN)
    timeout = None if deadline is None else deadline.remaining() * 1000
    ready = [by_fd[fd] for fd, _ in poller.poll(timeout)]
    if not ready:
        raise DeadlinePassed("nothing came in time")
    return ready


def is_readable(item: Any) -> bool:
    poller = select.poll()
    poller.register(item, select.POLLIN)
    return bool(poller.poll(0))


def close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)


# Shapes of bodies.

Check = Callable[[Any], bool]


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def is_natural(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_name(value: Any) -> bool:
    if not isinstance(value, str) or not 1 <= len(value.encode("utf-8", "surrogatepass")) <= MAX_NAME:
        return False
    return ":" not in value and not any(ord(c) < 0x20 or 0x7F <= ord(c) < 0xA0 for c in value)


def one_of(*allowed: str) -> Check:
    return lambda value: value in allowed


def list_of(item: Check) -> Check:
    return lambda value: isinstance(value, list) and all(item(v) for v in value)


def fields(required: Dict[str, Check], optional: Optional[Dict[str, Check]] = None) -> Check:
    def check(value: Any) -> bool:
        if not isinstance(value, dict) or not required.keys() <= value.keys():
            return False
        if not all(accepts(value[key]) for key, accepts in required.items()):
            return False
        # A null where a field may be absent is as good as absent.
        return all(accepts(value[key]) for key, accepts in (optional or {}).items() if value.get(key) is not None)

    return check


RANGE = fields({"min": is_natural, "max": is_natural})
OFFERED_LISTENER = fields(
    {
        "name": is_name,
        "kind": one_of("tcp", "unix", "udp", "unix-datagram"),
        "address": is_text,
        "cookie": is_natural,
    },
    {
        "path": fields({"device": is_natural, "inode": is_natural}),
        "backlog": is_natural,
        "activated": is_flag,
    },
)
OFFER_VERSION_1 = fields(
    {
        "protocol": RANGE,
        "generation": is_natural,
        "pid": is_natural,
        "listeners": list_of(OFFERED_LISTENER),
    },
    {
        "stderr": is_flag,
        "state": fields({"version": is_natural, "length": is_natural}),
        "draining": list_of(fields({"pid": is_natural, "generation": is_natural})),
        "ready_timeout_ms": is_natural,
        "trial_ms": is_natural,
        "restart": fields({"kill_after_ms": is_natural, "asked_us": is_natural}, {"asker": is_flag}),
    },
)
REASON = fields({"reason": is_text})
NAMES = list_of(is_name)

SHAPES: Dict[Kind, Check] = {
    # An offer of another version may have another shape; only its range can be relied on until the ranges overlap.
    Kind.OFFER: fields({"protocol": RANGE}),
    Kind.ADOPTED: fields(
        {"protocol": is_natural, "listeners": list_of(fields({"name": is_name, "cookie": is_natural}))},
        {"restart": is_flag},
    ),
    Kind.REFUSED: fields({"reason": is_text}, {"protocol": RANGE}),
    Kind.STARTING: REASON,
    Kind.GAVE_UP: REASON,
    Kind.READY: fields({"kept": NAMES, "added": NAMES, "unclaimed": NAMES}),
    Kind.COMMIT: fields({}),
    Kind.ACCEPTING: fields({"listeners": NAMES}),
    Kind.SETTLED: fields({}),
    Kind.ABORTED: REASON,
    Kind.STOPPING: fields({}),
}


# Frames.


@dataclass
class Frame:
    kind: Kind
    body: Dict[str, Any]
    fds: List[int] = field(default_factory=list)


def encode_header(kind: int, body_length: int, fd_count: int, magic: bytes = MAGIC) -> bytes:
    return HEADER.pack(magic, kind, 0, body_length, fd_count)


def encode_body(body: Dict[str, Any]) -> bytes:
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8")


def encode_frame(kind: int, body: Dict[str, Any], fd_count: int = 0) -> bytes:
    encoded = encode_body(body)
    if len(encoded) > MAX_BODY or fd_count > MAX_FDS:
        raise ValueError("the frame is larger than the protocol allows")
    return encode_header(kind, len(encoded), fd_count) + encoded


def decode_header(header: bytes) -> Tuple[Kind, int, int]:
    magic, number, _, body_length, fd_count = HEADER.unpack(header)
    if magic != MAGIC:
        raise ChannelBroken(f"the frame begins with {magic!r}, not {MAGIC!r}")
    if body_length > MAX_BODY:
        raise ChannelBroken(f"a body of {body_length} bytes is longer than {MAX_BODY}")
    if fd_count > MAX_FDS:
        raise ChannelBroken(f"{fd_count} fds are more than {MAX_FDS}")
    try:
        return Kind(number), body_length, fd_count
    except ValueError:
        raise ChannelBroken(f"no frame has kind {number}") from None


def refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def decode_body(kind: Kind, encoded: bytes) -> Dict[str, Any]:
    try:
        body = json.loads(encoded.decode("utf-8"), parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ChannelBroken(f"the body of {kind.name} is not JSON: {error}") from None
    if not isinstance(body, dict) or not SHAPES[kind](body):
        raise ChannelBroken(f"the body of {kind.name} does not have its shape")
    return body


class Channel:
    """One end of the stream socket between the two processes."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        self._sock.close()

    def pidfd_of_peer(self) -> Optional[int]:
        return pidfd_of_peer(self._sock)

    def send(self, kind: Kind, body: Dict[str, Any], fds: Sequence[int] = (), *, deadline: Deadline) -> None:
        self.send_bytes(encode_frame(kind, body, len(fds)), deadline)
        self.send_fds(fds, deadline)

    def send_bytes(self, data: bytes, deadline: Deadline) -> None:
        with self._bounded(deadline):
            self._sock.sendall(data)

    def send_fds(self, fds: Sequence[int], deadline: Deadline) -> None:
        for start in range(0, len(fds), FDS_PER_MESSAGE):
            rights = array.array("i", fds[start : start + FDS_PER_MESSAGE])
            with self._bounded(deadline):
                self._sock.sendmsg([FD_PAYLOAD], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])

    def receive(self, expected: Collection[Kind], deadline: Deadline) -> Frame:
        kind, body_length, fd_count = decode_header(self._read_exactly(HEADER.size, deadline))
        if kind not in expected:
            raise ChannelBroken(f"{kind.name} is not expected now")
        if fd_count and kind is not Kind.OFFER:
            raise ChannelBroken(f"{kind.name} carries {fd_count} fds")
        body = decode_body(kind, self._read_exactly(body_length, deadline))
        return Frame(kind, body, self._receive_fds(fd_count, deadline))

    def _read_exactly(self, size: int, deadline: Deadline) -> bytes:
        data = bytearray()
        while len(data) < size:
            with self._bounded(deadline):
                chunk = self._sock.recv(min(size - len(data), 65_536))
            if not chunk:
                raise ChannelEnded("end of file")
            data += chunk
        return bytes(data)

    def _receive_fds(self, count: int, deadline: Deadline) -> List[int]:
        fds: List[int] = []
        try:
            while len(fds) < count:
                fds += self._receive_fd_message(min(FDS_PER_MESSAGE, count - len(fds)), deadline)
        except BaseException:
            close_all(fds)
            raise
        return fds

    def _receive_fd_message(self, expected: int, deadline: Deadline) -> List[int]:
        with self._bounded(deadline):
            payload, ancillary, flags, _ = self._sock.recvmsg(
                1, socket.CMSG_SPACE(FDS_PER_MESSAGE * 4), socket.MSG_CMSG_CLOEXEC
            )
        fds = fds_of(ancillary)
        fault = fd_message_fault(payload, flags, len(fds), expected)
        if fault is not None:
            close_all(fds)
            raise fault
        return fds

    @contextlib.contextmanager
    def _bounded(self, deadline: Deadline) -> Iterator[None]:
        self._sock.settimeout(deadline.remaining())
        try:
            yield
        except socket.timeout:
            raise DeadlinePassed("the channel was silent") from None
        except (ConnectionResetError, BrokenPipeError) as error:
            # A peer that dies with unread bytes in its queue leaves a reset where one expects the end of file.
            raise ChannelEnded(str(error)) from None


def fds_of(ancillary: Iterable[Tuple[int, int, bytes]]) -> List[int]:
    fds = array.array("i")
    for level, message_type, data in ancillary:
        if (level, message_type) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return list(fds)


def fd_message_fault(payload: bytes, flags: int, received: int, expected: int) -> Optional[Exception]:
    if not payload:
        return ChannelEnded("end of file among the fds")
    if flags & socket.MSG_CTRUNC:
        return ChannelBroken("the kernel cut the fds of a message")
    if payload != FD_PAYLOAD:
        return ChannelBroken(f"the fds came with {payload!r}, not {FD_PAYLOAD!r}")
    if received != expected:
        return ChannelBroken(f"{received} fds came instead of {expected}")
    return None


# The inherited channel.


def wait_for_death(channel: Channel, seconds: float) -> None:
    """The peer's end of the channel is closed before its listeners are, whose addresses are wanted."""
    pidfd = channel.pidfd_of_peer()
    if pidfd is not None:
        with contextlib.suppress(DeadlinePassed):
            wait_readable([pidfd], Deadline(seconds))
        os.close(pidfd)


def inherited_channel(variable: Optional[str]) -> Optional[Channel]:
    """The channel that HANDOVER_FD names, or None when the variable is a left-over of an ancestor."""
    match = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,20})", variable or "", re.ASCII)
    if match is None:
        return None
    fd, inode = int(match.group(1)), int(match.group(2))
    try:
        status = os.fstat(fd)
    except OSError:
        return None
    if not stat.S_ISSOCK(status.st_mode) or status.st_ino != inode:
        return None
    os.set_inheritable(fd, False)
    return Channel(socket.socket(fileno=fd))


# The offer.


@dataclass
class OfferedListener:
    name: str
    kind: str
    address: str
    cookie: int
    path: Optional[Dict[str, int]]
    sock: socket.socket


@dataclass
class Offer:
    protocol: int
    generation: int
    listeners: List[OfferedListener]
    state_version: Optional[int]
    state: Optional[bytes]
    stderr: Optional[int]
    restart: Optional[Dict[str, Any]] = None
    asker: Optional[socket.socket] = None


def cookie_of(sock: socket.socket) -> int:
    return struct.unpack("=Q", sock.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8))[0]


def kind_of(sock: socket.socket) -> str:
    family = sock.getsockopt(socket.SOL_SOCKET, SO_DOMAIN)
    is_stream = sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) == socket.SOCK_STREAM
    is_datagram = sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) == socket.SOCK_DGRAM
    if family == socket.AF_UNIX:
        return "unix" if is_stream else "unix-datagram" if is_datagram else "other"
    if family in (socket.AF_INET, socket.AF_INET6):
        return "tcp" if is_stream else "udp" if is_datagram else "other"
    return "other"


def address_of(sock: socket.socket) -> str:
    name = sock.getsockname()
    if isinstance(name, bytes):
        return "@" + name[1:].decode("utf-8")
    if isinstance(name, str):
        return name
    host, port = name[0], name[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def chosen_version(offered: Dict[str, int]) -> int:
    version = min(offered["max"], SPOKEN["max"])
    if version < max(offered["min"], SPOKEN["min"]):
        raise OfferRefused(
            f"versions {offered['min']} to {offered['max']} are offered, {SPOKEN['min']} to {SPOKEN['max']} are spoken",
            SPOKEN,
        )
    return version


def take_offer(frame: Frame) -> Offer:
    """Checks everything that the page requires; the fds of an offer that is refused are closed."""
    unowned = list(frame.fds)
    listeners: List[OfferedListener] = []
    try:
        version = chosen_version(frame.body["protocol"])
        check_offer_body(frame.body, len(frame.fds))
        for described in frame.body["listeners"]:
            listeners.append(take_listener(described, unowned.pop(0)))
        state = frame.body.get("state")
        content = None if state is None else take_state(state["length"], unowned.pop(0))
        stderr = unowned.pop(0) if frame.body.get("stderr") else None
        return Offer(
            protocol=version,
            generation=frame.body["generation"],
            listeners=listeners,
            state_version=None if state is None else state["version"],
            state=content,
            stderr=stderr,
            restart=frame.body.get("restart"),
            asker=socket.socket(fileno=unowned.pop(0)) if has_asker(frame.body) else None,
        )
    except BaseException:
        close_all(unowned)
        for listener in listeners:
            listener.sock.close()
        raise


def has_asker(offer: Dict[str, Any]) -> bool:
    return bool((offer.get("restart") or {}).get("asker"))


def check_offer_body(body: Dict[str, Any], fd_count: int) -> None:
    if not OFFER_VERSION_1(body):
        raise ChannelBroken("the body of OFFER does not have its shape")
    names = [listener["name"] for listener in body["listeners"]]
    if len(set(names)) != len(names):
        raise ChannelBroken("two listeners have the same name")
    described = len(names) + (body.get("state") is not None) + bool(body.get("stderr")) + has_asker(body)
    if fd_count != described:
        raise OfferRefused(f"{fd_count} fds came for {described} described")


def take_listener(described: Dict[str, Any], fd: int) -> OfferedListener:
    name = described["name"]
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:
        os.close(fd)
        raise OfferRefused(f"the fd of listener {name} is no socket: {error}") from None
    try:
        check_listener(described, sock)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    kind, address, cookie = described["kind"], described["address"], described["cookie"]
    return OfferedListener(name, kind, address, cookie, described.get("path"), sock)


def check_listener(described: Dict[str, Any], sock: socket.socket) -> None:
    kind, cookie = kind_of(sock), cookie_of(sock)
    if kind != described["kind"]:
        raise OfferRefused(f"listener {described['name']} is {kind}, not {described['kind']}")
    if cookie != described["cookie"]:
        raise OfferRefused(f"listener {described['name']} has cookie {cookie}, not {described['cookie']}")


def take_state(length: int, fd: int) -> bytes:
    try:
        if length > MAX_STATE:
            raise OfferRefused(f"a state of {length} bytes is longer than {MAX_STATE}")
        content = read_from_start(fd, length)
    except OSError as error:
        raise OfferRefused(f"the state cannot be read: {error}") from None
    finally:
        os.close(fd)
    if len(content) != length:
        raise OfferRefused(f"the state has {len(content)} bytes, not {length}")
    return content


def read_from_start(fd: int, length: int) -> bytes:
    content = bytearray()
    while len(content) < length:
        # The offset of the memfd is shared with the sender, so only pread can be trusted.
        chunk = os.pread(fd, min(length - len(content), 1 << 20), len(content))
        if not chunk:
            break
        content += chunk
    return bytes(content)


# The control socket.


class ControlFailed(Exception):
    """The control socket cannot be found, is not that of the process, or answers something else."""


def control_directory() -> str:
    for variable, below in (("HANDOVER_DIR", ""), ("RUNTIME_DIRECTORY", "handover")):
        if os.environ.get(variable):
            return os.path.join(os.environ[variable], below).rstrip("/")
    if os.getuid() == 0:
        return "/run/handover"
    if os.environ.get("XDG_RUNTIME_DIR"):
        return os.path.join(os.environ["XDG_RUNTIME_DIR"], "handover")
    return f"/tmp/handover-{os.getuid()}"


def prepare_control_directory() -> str:
    directory = control_directory()
    os.makedirs(directory, mode=0o700, exist_ok=True)
    status = os.lstat(directory)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise ControlFailed(f"{directory} is no directory of this user alone")
    return directory


def find_control_socket(pid: int) -> str:
    """The path of the control socket of a process, as that process sees it."""
    try:
        ending = f"/{innermost_pid(pid)}.sock"
        inodes = socket_inodes(pid)
        with open(f"/proc/{pid}/net/unix", encoding="utf-8", errors="surrogateescape") as table:
            candidates = [path for path, inode in listening_paths(table) if inode in inodes]
    except OSError as error:
        raise ControlFailed(f"process {pid} cannot be looked at: {error}") from None
    for path in candidates:
        if path.endswith(ending):
            return path
    raise ControlFailed(f"process {pid} has no control socket")


def innermost_pid(pid: int) -> int:
    with open(f"/proc/{pid}/status", encoding="utf-8") as status:
        for line in status:
            if line.startswith("NSpid:"):
                return int(line.split()[-1])
    return pid


def socket_inodes(pid: int) -> Set[int]:
    inodes = set()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            match = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(f"/proc/{pid}/fd/{fd}"))
            if match:
                inodes.add(int(match.group(1)))
    return inodes


def listening_paths(table: Iterable[str]) -> Iterator[Tuple[str, int]]:
    for line in table:
        columns = line.rstrip("\n").split(None, 7)
        if len(columns) == 8 and columns[0] != "Num" and int(columns[3], 16) & UNIX_LISTENING_FLAG:
            yield columns[7], int(columns[6])


def pidfd_of_peer(sock: socket.socket) -> Optional[int]:
    """Of whoever connected; None when it is gone."""
    try:
        return os.pidfd_open(peer_credentials(sock)[0])
    except OSError:
        return None


def peer_credentials(sock: socket.socket) -> Tuple[int, int, int]:
    return struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))


def connect_to_path(path: str, seconds: float) -> socket.socket:
    # Through the directory's fd, because a path below /proc/N/root may be too long for a socket address.
    directory = os.open(os.path.dirname(path) or ".", os.O_PATH | os.O_DIRECTORY)
    try:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(seconds)
            sock.connect(f"/proc/self/fd/{directory}/{os.path.basename(path)}")
        except BaseException:
            sock.close()
            raise
        return sock
    finally:
        os.close(directory)


def connect_to_process(pid: int, seconds: float = REQUEST_SECONDS) -> socket.socket:
    path = find_control_socket(pid)
    try:
        sock = connect_to_path(f"/proc/{pid}/root{path}", seconds)
    except OSError as error:
        raise ControlFailed(f"cannot connect to {path} of process {pid}: {error}") from None
    answering, _, _ = peer_credentials(sock)
    if answering != pid:
        sock.close()
        raise ControlFailed(f"process {answering} answers for process {pid}")
    return sock


def send_line(sock: socket.socket, message: Dict[str, Any], deadline: Deadline) -> None:
    sock.settimeout(deadline.remaining())
    sock.sendall(encode_body(message) + b"\n")


def read_line(sock: socket.socket, deadline: Deadline) -> Dict[str, Any]:
    """One line and not a byte more, since what follows it may carry fds."""
    line = bytearray()
    while not line.endswith(b"\n"):
        if len(line) >= MAX_LINE:
            raise ControlFailed(f"a line is longer than {MAX_LINE} bytes")
        sock.settimeout(deadline.remaining())
        try:
            byte = sock.recv(1)
        except socket.timeout:
            raise DeadlinePassed("no whole line came in time") from None
        except ConnectionResetError:
            byte = b""
        if not byte:
            raise ControlFailed("the connection ended within a line")
        line += byte
    return parse_line(bytes(line))


def parse_line(line: bytes) -> Dict[str, Any]:
    try:
        message = json.loads(line.decode("utf-8"), parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ControlFailed(f"a line is not JSON: {error}") from None
    if not isinstance(message, dict):
        raise ControlFailed("a line is not a JSON object")
    return message


def take_over(sock: socket.socket, seconds: float = REQUEST_SECONDS) -> Channel:
    """Turns a connection to a control socket into the channel of a pull."""
    deadline = Deadline(seconds)
    try:
        send_line(sock, {"request": "take-over"}, deadline)
    except (BrokenPipeError, ConnectionResetError):
        pass  # a refusal may have been sent before the request was read
    answer = read_line(sock, deadline)
    if answer.get("event") != "accepted":
        raise ControlFailed(f"{answer.get('result')}: {answer.get('message')}")
    return Channel(sock)
