"""nginx and HAProxy in front of the machines, and what they have counted."""

from __future__ import annotations

import csv
import os
import socket
import subprocess
from typing import Dict, List

from base import BALANCER, LAB, PORT, wait_for, write
from machine import Machine

NGINX_PORT, HAPROXY_PORT = 8081, 8082


class Haproxy:
    """Its own counts are asked for by its runtime socket."""

    SOCKET = os.path.join(LAB, "haproxy.sock")

    def __init__(self, machines: List[Machine]) -> None:
        servers = "".join(f"    server {one.name} {one.address}:{PORT} check inter 500ms\n" for one in machines)
        file = write(os.path.join(LAB, "haproxy.cfg"), f"""global
    stats socket {self.SOCKET} level admin
defaults
    mode http
    option redispatch
    timeout connect 2s
    timeout client 60s
    timeout server 60s
frontend clients
    bind {BALANCER}:{HAPROXY_PORT}
    default_backend app
backend app
{servers}""")
        with open(f"{LAB}/haproxy.log", "wb") as log:
            self.process = subprocess.Popen(["haproxy", "-db", "-f", file], stdout=log, stderr=log)
        wait_for("HAProxy serves", lambda: os.path.exists(self.SOCKET))

    def ask(self, command: str) -> str:
        with socket.socket(socket.AF_UNIX) as stream:
            stream.connect(self.SOCKET)
            stream.sendall(command.encode() + b"\n")
            return b"".join(iter(lambda: stream.recv(65536), b"")).decode()

    def rows(self) -> List[Dict[str, str]]:
        rows = csv.DictReader(self.ask("show stat").lstrip("# ").splitlines())
        return [row for row in rows if row["pxname"] == "app"]

    def states(self) -> List[str]:
        return [row["status"] for row in self.rows() if row["svname"] != "BACKEND"]

    def counts(self) -> Dict[str, int]:
        """Requests, answers that were errors, and what it had to try again."""
        row = next(row for row in self.rows() if row["svname"] == "BACKEND")
        names = {"requests": "req_tot", "errors": "hrsp_5xx", "connects failed": "econ", "answers failed": "eresp",
                 "tried again": "wretr", "sent elsewhere": "wredis"}
        return {name: int(row[key] or 0) for name, key in names.items()}


class Nginx:
    """Its own counts are those of its log."""

    DIRECTORY = os.path.join(LAB, "nginx")
    UPSTREAM = os.path.join(DIRECTORY, "upstream.conf")
    PID_FILE = os.path.join(DIRECTORY, "pid")
    COMMAND = ["nginx", "-p", DIRECTORY, "-c", os.path.join(DIRECTORY, "nginx.conf"), "-e", "stderr"]
    LOG = os.path.join(DIRECTORY, "access.log")

    def __init__(self, machines: List[Machine]) -> None:
        servers = "".join(f"    server {one.address}:{PORT};\n" for one in machines)
        # A silent connection is to be closed here before an old build does it (`linger`): docs/fleet.md.
        write(self.UPSTREAM, f"upstream app {{\n{servers}    keepalive 16;\n    keepalive_timeout 2s;\n}}\n")
        write(os.path.join(self.DIRECTORY, "nginx.conf"), f"""user root;
worker_processes 2;
pid {self.PID_FILE};
events {{ worker_connections 512; }}
http {{
    log_format counts '$status $request_method $upstream_addr';
    access_log {self.LOG} counts;
    client_body_temp_path {self.DIRECTORY}/body;
    proxy_temp_path {self.DIRECTORY}/proxy;
    fastcgi_temp_path {self.DIRECTORY}/fastcgi;
    uwsgi_temp_path {self.DIRECTORY}/uwsgi;
    scgi_temp_path {self.DIRECTORY}/scgi;
    include {self.UPSTREAM};
    server {{
        listen {BALANCER}:{NGINX_PORT};
        location / {{
            proxy_pass http://app;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
        }}
    }}
}}
""")
        with open(f"{LAB}/nginx.log", "wb") as log:
            self.process = subprocess.Popen([*self.COMMAND, "-g", "daemon off;"], stdout=log, stderr=log)
        wait_for("nginx serves", lambda: os.path.exists(self.PID_FILE))

    def marked_down(self) -> int:
        with open(self.UPSTREAM, encoding="utf-8") as file:
            return file.read().count(" down;")

    def counts(self) -> Dict[str, int]:
        with open(self.LOG, encoding="utf-8") as log:
            lines = log.readlines()
        return {"requests": len(lines), "errors": sum(line[0] == "5" for line in lines),
                "tried again": sum("," in line for line in lines)}
