"""Very many connections that ask once and then wait to be closed: the clients of scripts/idle.sh.

Prints how many are left at each second, and fails if one was reset or closed too early, or if a new client was not answered.
"""

import select
import socket
import sys
import time

REQUEST = b"GET / HTTP/1.1\r\nHost: idle\r\n\r\n"
AT_ONCE = 500
# Ports are few: each source address has its own.
PER_SOURCE = 20_000
LINGER_S = 5


def connect(address, number):
    connection = socket.socket()
    # The port is chosen when the destination is known.
    connection.setsockopt(socket.IPPROTO_IP, 24, 1)
    connection.bind((f"127.1.0.{number // PER_SOURCE + 1}", 0))
    connection.settimeout(30)
    connection.connect(address)
    connection.sendall(REQUEST)
    return connection


def open_all(address, count):
    connections = {}
    for start in range(0, count, AT_ONCE):
        batch = [connect(address, number) for number in range(start, min(start + AT_ONCE, count))]
        for connection in batch:
            answer = connection.recv(4096)
            assert answer.startswith(b"HTTP/1.1 200") and b"gen=1" in answer, answer
            connection.setblocking(False)
            connections[connection.fileno()] = connection
    return connections


def answer_of_a_new_client(address):
    with socket.create_connection(address, timeout=10) as connection:
        connection.sendall(REQUEST.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        answer = b""
        while part := connection.recv(4096):
            answer += part
    assert b"200 OK" in answer, answer
    return b"gen=2" in answer


def main():
    host, port = sys.argv[1].rsplit(":", 1)
    address, count, longest_s, mark = (host, int(port)), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    connections = open_all(address, count)
    open(mark, "w").close()
    poll = select.epoll()
    for number in connections:
        poll.register(number, select.EPOLLIN)
    while not answer_of_a_new_client(address):
        time.sleep(0.01)
    replaced = time.monotonic()
    first = last = None
    shown, resets = 0, 0
    while connections:
        for number, _ in poll.poll(0.1, 4096):
            try:
                rest = connections[number].recv(4096)
                assert rest == b"", f"an answer that nobody asked for: {rest}"
            except ConnectionError:
                resets += 1
            connections.pop(number).close()
            last = time.monotonic() - replaced
            first = first or last
        now = time.monotonic() - replaced
        if now >= shown:
            print(f"  {now:5.0f} s   {len(connections):7d} open", flush=True)
            assert answer_of_a_new_client(address)
            shown = now + 1
        assert now < longest_s, f"{len(connections)} are still open"
    print(f"  the first was closed after {first:.1f} s, the last after {last:.1f} s; {resets} were reset")
    assert resets == 0, "reset"
    # The drain begins with the end of the trial; it may be seen a little late.
    assert first >= LINGER_S, "too early"


if __name__ == "__main__":
    main()
