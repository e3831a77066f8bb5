"""A WSGI application for gunicorn."""

import os
import re
import time


def application(environ, start_response):  # type: ignore[no-untyped-def]
    slow = re.match(r"/slow/([\d.]+)", environ["PATH_INFO"])
    if slow:
        time.sleep(float(slow[1]))
    body = f"gen={os.environ['HANDOVER_GENERATION']} pid={os.getpid()}".encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]
