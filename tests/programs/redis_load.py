"""Clients of redis, as strict as the oracle is for HTTP: each command is counted by how it ended, and what was acknowledged
must be there afterwards."""

from __future__ import annotations

import collections
import itertools
import select
import socket
import threading
import time
from typing import Counter, List, Optional

from lab import PATIENCE_SECONDS, connect


class Ended(Exception):
    """Why a command got no answer."""


def _send(client: socket.socket, *words: str) -> str:
    """The answer to one command; of a simple or integer reply what follows its first byte."""
    request = b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word.encode()) for word in words)
    answer = b""
    try:
        client.sendall(request)
        while not answer.endswith(b"\r\n"):
            part = client.recv(4096)
            if not part:
                raise Ended("cut")
            answer += part
    except TimeoutError:
        raise Ended("timed_out")
    except OSError:
        raise Ended("reset")
    if answer[:1] not in b"+:":
        raise Ended("wrong: " + answer.decode())
    return answer[1:-2].decode()


def _is_closed(client: socket.socket) -> bool:
    return bool(select.select([client], [], [], 0)[0])


class Load:
    """A connection for each command, and connections that are kept, at every address; each client counts with a key of its
    own."""

    def __init__(self, addresses: List[str]) -> None:
        self.new: Counter[str] = collections.Counter()
        self.kept: Counter[str] = collections.Counter()
        self.lost_data: List[str] = []
        self._over = threading.Event()
        clients = itertools.product(addresses, (self._on_new, self._on_kept))
        self._threads = [
            threading.Thread(target=run, args=(address, f"key-{number}")) for number, (address, run) in enumerate(clients)
        ]
        for thread in self._threads:
            thread.start()

    def _on_new(self, address: str, key: str) -> None:
        self._run(address, key, self.new, keep=False)

    def _on_kept(self, address: str, key: str) -> None:
        self._run(address, key, self.kept, keep=True)

    def _run(self, address: str, key: str, ended: Counter[str], keep: bool) -> None:
        client: Optional[socket.socket] = None
        # What the counter is, as far as it is known: a command that got no answer may have been done or not.
        least = most = 0
        while not self._over.is_set():
            if client and _is_closed(client):
                # Between two commands: nothing is lost by it.
                client.close()
                client = None
            try:
                client = client or connect(address)
            except TimeoutError:
                ended["timed_out"] += 1
                continue
            except OSError:
                ended["refused"] += 1
                time.sleep(0.001)
                continue
            most += 1
            try:
                value: Optional[int] = int(_send(client, "INCR", key))
            except Ended as error:
                ended[str(error)] += 1
                value = None
            if value is not None:
                ended["ok"] += 1
                if not least < value <= most:
                    self.lost_data.append(f"{key} is {value}, and was between {least} and {most - 1}")
                least = most = value
            if value is None or not keep:
                client.close()
                client = None
            time.sleep(0.002)
        if client:
            client.close()

    def end(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(2 * PATIENCE_SECONDS)
