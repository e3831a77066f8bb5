"""TCP connections as the kernel tells them (/proc/net/tcp)."""

from __future__ import annotations

import os
from typing import Dict, Iterator, NamedTuple

ESTABLISHED = "01"
LISTENING = "0A"
# What waits in the queue of a listener belongs to nobody yet.
NOBODY = "0"


class Row(NamedTuple):
    local: str
    remote: str
    state: str
    inode: str


def _rows() -> Iterator[Row]:
    with open("/proc/net/tcp", encoding="ascii") as table:
        next(table)
        for line in table:
            words = line.split()
            yield Row(words[1], words[2], words[3], words[9])


def _sockets(pid: int) -> Dict[str, str]:
    """The sockets of a process: their inodes, and its fd for each."""
    found: Dict[str, str] = {}
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            link = os.readlink(f"/proc/{pid}/fd/{fd}")
        except FileNotFoundError:
            continue
        if link.startswith("socket:["):
            found[link[len("socket:["):-1]] = fd
    return found


def listens_non_blocking(pid: int) -> bool:
    """Whether all listeners of this process are in that mode, which they have for every process that holds them."""
    listeners = {row.inode for row in _rows() if row.state == LISTENING}
    fds = [fd for inode, fd in _sockets(pid).items() if inode in listeners]
    return bool(fds) and all(_flags(pid, fd) & os.O_NONBLOCK for fd in fds)


def _flags(pid: int, fd: str) -> int:
    with open(f"/proc/{pid}/fdinfo/{fd}", encoding="ascii") as lines:
        return next(int(line.split()[1], 8) for line in lines if line.startswith("flags:"))


def accepted_of(client: int) -> int:
    """How many connections of this process their server has accepted."""
    rows = [row for row in _rows() if row.state == ESTABLISHED]
    mine = _sockets(client)
    ends = {(row.local, row.remote) for row in rows if row.inode in mine}
    return sum(1 for row in rows if (row.remote, row.local) in ends and row.inode != NOBODY)
