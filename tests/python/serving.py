"""What both sides need to be servers: a gate, an HTTP answer, signals, and one line of JSON per stage."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import threading
import time
from typing import Any, Dict, List, Optional, Set, Tuple

BACKLOG = 128
MAX_REQUEST = 65_536
CONNECTION_SECONDS = 10.0


def report(side: str, stage: str, **details: Any) -> None:
    """One write per line, since both sides may share one stdout."""
    line = json.dumps({"side": side, "stage": stage, "pid": os.getpid(), **details}) + "\n"
    with contextlib.suppress(OSError):
        os.write(1, line.encode("utf-8"))


def give_up_dead_stderr() -> None:
    """A pipe that the old process read: without it nobody does, and every write would fail."""
    poller = select.poll()
    poller.register(2, 0)
    if any(events & select.POLLERR for _, events in poller.poll(0)):
        null = os.open("/dev/null", os.O_WRONLY)
        os.dup2(null, 2)
        os.close(null)


def complain(message: str) -> None:
    # The reader of this process's stderr may be gone, which must not end a server.
    with contextlib.suppress(OSError):
        os.write(2, (message + "\n").encode("utf-8", "replace"))


class Signals:
    """Signals as a readable fd, so that they can be waited for together with sockets."""

    def __init__(self, *numbers: int) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in numbers:
            signal.signal(number, lambda _number, _frame: None)

    def fileno(self) -> int:
        return self._read

    def take(self) -> Set[int]:
        try:
            return set(os.read(self._read, 512))
        except BlockingIOError:
            return set()


def split_address(address: str) -> Tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def bind_tcp(address: str) -> socket.socket:
    host, port = split_address(address)
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((host, port))
    return listening(sock)


def listening(sock: socket.socket) -> socket.socket:
    # The flag is shared with the other process; without it a lost race for a connection would block in accept.
    sock.setblocking(False)
    sock.listen(BACKLOG)
    return sock


def bind_udp(address: str) -> socket.socket:
    host, port = split_address(address)
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    sock.setblocking(False)
    sock.bind((host, port))
    return sock


def bind_unix(path: str) -> socket.socket:
    unlink_if_dead(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(path)
    return listening(sock)


def unlink_if_dead(path: str) -> None:
    """An old process that was killed leaves its path behind, and nobody listens there."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        except OSError:
            pass


def path_identity(path: str) -> Dict[str, int]:
    status = os.lstat(path)
    return {"device": status.st_dev, "inode": status.st_ino}


def unlink_if_still(path: str, identity: Dict[str, int]) -> None:
    with contextlib.suppress(FileNotFoundError):
        if path_identity(path) == identity:
            os.unlink(path)


def close_inherited_on_exec() -> None:
    """What this process inherited by accident must not reach the process that it spawns."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            with contextlib.suppress(OSError):
                fcntl.fcntl(int(name), fcntl.F_SETFD, fcntl.FD_CLOEXEC)


class GatedServer:
    """Accepts on stream listeners while its gate is open, and answers each connection in a thread."""

    def __init__(self, generation: int, state: Optional[Tuple[int, bytes]] = None) -> None:
        self._generation = generation
        self._state = state
        self._listeners: Dict[str, socket.socket] = {}
        self._gate = threading.Lock()
        self._is_open = False
        self._connections = 0
        self._changed = threading.Condition()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        threading.Thread(target=self._run, daemon=True).start()

    def add(self, name: str, sock: socket.socket) -> None:
        with self._gate:
            self._listeners[name] = sock
        self._wake()

    def names(self) -> List[str]:
        with self._gate:
            return list(self._listeners)

    def open_gate(self) -> None:
        with self._gate:
            self._is_open = True
        self._wake()

    def shut_gate(self) -> None:
        """When this returns no call of accept is under way and none will be."""
        with self._gate:
            self._is_open = False
        self._wake()

    def close_listeners(self) -> None:
        with self._gate:
            self._is_open = False
            for sock in self._listeners.values():
                sock.close()
            self._listeners.clear()
        self._wake()

    def drain(self, seconds: float) -> int:
        """Waits for the open connections and returns how many are left."""
        with self._changed:
            self._changed.wait_for(lambda: self._connections == 0, seconds)
            return self._connections

    def _wake(self) -> None:
        os.write(self._wake_write, b"w")

    def _run(self) -> None:
        while True:
            with self._gate:
                watched = {s.fileno(): s for s in self._listeners.values()} if self._is_open else {}
            poller = select.poll()
            for fd in (self._wake_read, *watched):
                poller.register(fd, select.POLLIN)
            for fd, _ in poller.poll():
                if fd == self._wake_read:
                    os.read(self._wake_read, 4096)
                else:
                    self._accept(watched[fd])

    def _accept(self, listener: socket.socket) -> None:
        with self._gate:
            if not self._is_open:
                return
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            # Within the gate, so that who has shut it sees every connection that came through.
            with self._changed:
                self._connections += 1
        threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection, contextlib.suppress(OSError):
                connection.settimeout(CONNECTION_SECONDS)
                connection.sendall(http_answer(self._content(read_request_path(connection))))
        finally:
            with self._changed:
                self._connections -= 1
                self._changed.notify_all()

    def _content(self, path: str) -> str:
        if path == "/state":
            return "none" if self._state is None else f"version={self._state[0]} hex={self._state[1].hex()}"
        if path.startswith("/slow/"):
            time.sleep(min(int(path[len("/slow/") :]), 10_000) / 1000)
        return f"gen={self._generation} pid={os.getpid()}"


def read_request_path(connection: socket.socket) -> str:
    head = b""
    while b"\r\n\r\n" not in head and len(head) < MAX_REQUEST:
        chunk = connection.recv(4096)
        if not chunk:
            raise ConnectionAbortedError("the client left")
        head += chunk
    words = head.split(b"\r\n", 1)[0].split(b" ")
    return words[1].decode("latin-1") if len(words) > 1 else "/"


def http_answer(content: str) -> bytes:
    body = content.encode("utf-8")
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\n"
    return head.encode("ascii") + body
