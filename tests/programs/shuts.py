"""A server that ends as many in C and Perl do: it shuts its listener down, so that `accept` fails."""

import os
import signal
import socket
import sys

listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
# Like those it does nothing else about it.
signal.signal(signal.SIGTERM, lambda *_: listener.shutdown(socket.SHUT_RDWR))
while True:
    try:
        client = listener.accept()[0]
    except OSError:
        break
    with client:
        client.recv(4096)
        body = b"gen=%s pid=%d" % (os.environ["HANDOVER_GENERATION"].encode(), os.getpid())
        client.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        client.shutdown(socket.SHUT_RDWR)
