"""Python's own HTTP server on a socket from systemd or whoever speaks its convention."""

import os
import re
import signal
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        slow = re.match(r"/slow/([\d.]+)", self.path)
        if slow:
            time.sleep(float(slow[1]))
        body = f"gen={os.environ['HANDOVER_GENERATION']} pid={os.getpid()}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    # So that server_close() waits for them.
    daemon_threads = False


assert os.environ["LISTEN_PID"] == str(os.getpid()) and os.environ["LISTEN_FDS"] == "1"
server = Server(("", 0), Handler, bind_and_activate=False)
server.socket = socket.socket(fileno=3)
# shutdown() waits for the loop, which runs in this thread.
signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
server.serve_forever(poll_interval=0.05)
server.server_close()
