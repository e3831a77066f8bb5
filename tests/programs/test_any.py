"""Programs that nobody here wrote and that know nothing of all this: they bind their sockets by themselves, and are
replaced under load. Nobody is refused or waits in vain. What a program cuts off when it is told to stop it cuts off alone,
too; docs/any-program.md has the table that these tests print."""

from __future__ import annotations

import os
import signal
import time
import unittest
from typing import Any, Dict, List, Union

from alone import KEPT_WITH_PAUSES, Restarted, most_by_chance
from lab import HERE, Intercepted, Oracle, built, connect, free_port, needs, program, wait_for

UPGRADES = int(os.environ.get("HANDOVER_UPGRADES", "10"))
# Of what is compared, each alone and with us.
ROUNDS = max(UPGRADES // 2, 2)
# Not as much as the machine can do, because that would only slow the programs' own start.
NEW = ("--new", "4", "--rate", "300")
# Each client connects again as soon as it has its answer.
AT_ONCE = ("--new", "2")
KEPT = ("--kept", "16", "--think", "2ms")
SLOW = ("--slow", "2:1.5")
# None of a well-known service.
PRIVILEGED = range(700, 1000)
COMPARED = (*NEW, *KEPT_WITH_PAUSES)
# What a program loses it loses as soon as it has the signal; the clients go on for so long.
WATCHED_SECONDS = 0.3
# What may become of a request that the program has taken, and what of one that nobody has.
ITS_OWN = ("cut", "reset")
NEVER = ("refused", "timed_out", "wrong", "client")


def gunicorn(bind: str) -> List[str]:
    return [
        built("gunicorn/bin/gunicorn"), "--no-control-socket", "--worker-class", "gthread", "--threads", "8",
        "--chdir", HERE, "--bind", bind, "wsgi",
    ]


def starman(workers: int, port: str) -> List[str]:
    return ["starman", "--workers", str(workers), "--listen", f"127.0.0.1:{port}", program("app.psgi")]


def answers(address: str) -> bool:
    try:
        connect(address).close()
    except OSError:
        return False
    return True


def all_of(kinds: Any, counts: Dict[str, int]) -> int:
    return sum(counts[kind] for kind in kinds)


class AnyProgram(unittest.TestCase):
    maxDiff = None

    def upgraded(self, service: Intercepted, *load: str) -> Dict[str, Any]:
        """How the requests ended that were made during the upgrades."""
        cookies = service.cookies()
        oracle = service.oracle(*load)
        for _ in range(UPGRADES):
            service.upgrade()
        service.wait_until_drained()
        report = oracle.stop()
        print(f"{self.id()}: {UPGRADES} upgrades, {report['outcomes']}")
        self.assertEqual(all_of(NEVER, report["outcomes"]), 0, report)
        self.assertEqual(len(report["generations"]), UPGRADES + 1, report)
        self.assertEqual(service.cookies(), cookies)
        return report

    def loses_nothing(self, service: Intercepted, *load: str) -> None:
        report = self.upgraded(service, *load)
        self.assertEqual(report["failed"], 0, report)

    def lost(self, service: Union[Intercepted, Restarted]) -> Dict[str, Dict[str, int]]:
        """In one replacement, by the kind of connection."""
        oracle = service.oracle(*COMPARED)
        time.sleep(WATCHED_SECONDS)
        service.replace()
        time.sleep(WATCHED_SECONDS)
        report = oracle.stop()
        service.wait_until_drained()
        return report["kinds"]

    def loses_no_more_than_alone(self, stop: str, service: Intercepted, alone: Restarted) -> None:
        # In turns, so that whatever else the machine does is the same for both.
        pairs = [(self.lost(service), self.lost(alone)) for _ in range(ROUNDS)]
        row = [f"{self.id()}: {ROUNDS} times SIG{stop}"]
        for kind in ("new", "kept"):
            here, there = ([round[kind] for round in rounds] for rounds in zip(*pairs))
            own, own_alone = ([all_of(ITS_OWN, counts) for counts in rounds] for rounds in (here, there))
            refused = sum(all_of(NEVER, counts) for counts in there)
            row.append(f"{kind} connections: {sum(own)} cut; alone {sum(own_alone)} cut, {refused} refused")
            self.assertEqual([all_of(NEVER, counts) for counts in here], [0] * ROUNDS, pairs)
            self.assertLessEqual(sum(own), most_by_chance(own_alone), pairs)
        print("; ".join(row))

    def compared(self, stop: str, options: List[str], *command: str) -> None:
        """@PORT@ in the command is a port of its own."""

        def with_port() -> "tuple[str, List[str]]":
            port = str(free_port())
            return f"127.0.0.1:{port}", [part.replace("@PORT@", port) for part in command]

        service = Intercepted(self, ["--stop-signal", stop, *options], *with_port()[1])
        address, program = with_port()
        alone = Restarted(self, signal.Signals[f"SIG{stop}"], address, *program)
        self.loses_no_more_than_alone(stop, service, alone)

    def test_node(self) -> None:
        service = Intercepted(self, ["--workers", "2"], "node", program("app.js"), str(free_port()))
        self.loses_nothing(service, *NEW, *KEPT, *SLOW)

    def test_node_that_closes_kept_connections(self) -> None:
        service = Intercepted(self, ["--workers", "2"], "node", program("closes.js"), str(free_port()))
        self.loses_nothing(service, *NEW)
        self.compared("TERM", [], "node", program("closes.js"), "@PORT@")

    def test_node_without_a_handler(self) -> None:
        self.upgraded(Intercepted(self, [], "node", program("plain.js"), str(free_port())), *NEW, *KEPT)
        self.compared("TERM", [], "node", program("plain.js"), "@PORT@")

    @needs(built("served"))
    def test_go(self) -> None:
        service = Intercepted(self, ["--workers", "2"], built("served"), "announces", f":{free_port()}")
        self.loses_nothing(service, *NEW, *KEPT, *SLOW)

    @needs(built("served"))
    def test_go_that_closes_kept_connections(self) -> None:
        self.loses_nothing(Intercepted(self, [], built("served"), "closes", f":{free_port()}"), *NEW, *SLOW)
        self.compared("TERM", [], built("served"), "closes", ":@PORT@")

    @needs(built("gunicorn/bin/gunicorn"))
    def test_gunicorn(self) -> None:
        self.loses_nothing(Intercepted(self, [], *gunicorn(f"127.0.0.1:{free_port()}")), *NEW, *SLOW)
        self.compared("TERM", [], *gunicorn("127.0.0.1:@PORT@"))

    @needs(built("gunicorn/bin/gunicorn"))
    def test_gunicorn_at_a_path(self) -> None:
        service = Intercepted(self, [], *gunicorn("unix:@DIR@/http.sock"))
        self.loses_nothing(service, *AT_ONCE, *SLOW)

    @needs(built("gunicorn/bin/gunicorn"))
    def test_a_path_that_is_bound_after_the_program_was_ready(self) -> None:
        # gunicorn's control socket, a moment after READY=1. The old build removes the path when it ends.
        own = ["--control-socket", "@DIR@/control.sock", "--bind", f"127.0.0.1:{free_port()}", "--chdir", HERE, "wsgi"]
        service = Intercepted(self, ["--trial", "2s"], built("gunicorn/bin/gunicorn"), *own)
        path = os.path.join(service.directory, "control.sock")
        wait_for("the path is there", lambda: answers(path))
        for _ in range(ROUNDS):
            service.upgrade()
            service.wait_until_drained()
            wait_for("the path is there", lambda: answers(path))
        self.assertNotIn("Control server error", service.written())

    @needs(built("gunicorn/bin/gunicorn"))
    def test_a_path_that_a_later_build_adds(self) -> None:
        first = gunicorn(f"127.0.0.1:{free_port()}")
        service = Intercepted(self, [], *first)
        path = os.path.join(service.directory, "http.sock")
        service.upgrade("--", *first[1:-1], "--bind", f"unix:{path}", "wsgi")
        oracle = Oracle(self, path, *AT_ONCE)
        for _ in range(2):
            service.upgrade()
            service.wait_until_drained()
        report = oracle.stop()
        self.assertEqual(report["failed"], 0, report)

    def test_python_s_http_server(self) -> None:
        self.upgraded(Intercepted(self, [], program("files.sh"), "@DIR@", str(free_port())), *NEW)
        self.compared("TERM", [], program("files.sh"), "@DIR@", "@PORT@")

    @needs("nginx")
    def test_nginx(self) -> None:
        options = ["--stop-signal", "QUIT"]
        service = Intercepted(self, options, program("debian-nginx.sh"), "@DIR@", str(free_port()))
        self.assertEqual(len(service.cookies()), 2)
        # For IPv6 alone, beside one for IPv4: nothing to warn of.
        self.assertNotIn("overlaps", service.written())
        self.loses_nothing(service, *NEW)
        self.compared("QUIT", [], program("debian-nginx.sh"), "@DIR@", "@PORT@")

    @needs("nginx")
    def test_nginx_at_a_path(self) -> None:
        options = ["--stop-signal", "QUIT"]
        service = Intercepted(self, options, program("debian-nginx.sh"), "@DIR@", "unix:@DIR@/http.sock")
        self.loses_nothing(service, *AT_ONCE)

    @needs("apache2")
    @unittest.skipUnless(os.geteuid() == 0, "only root may give its processes another user")
    def test_apache(self) -> None:
        service = Intercepted(self, ["--stop-signal", "WINCH"], program("apache.sh"), "@DIR@", str(free_port()))
        self.loses_nothing(service, *NEW)
        self.compared("WINCH", [], program("apache.sh"), "@DIR@", "@PORT@")

    @needs("java")
    def test_java(self) -> None:
        self.loses_nothing(Intercepted(self, [], "java", program("Served.java"), str(free_port())), *NEW)
        self.compared("TERM", [], "java", program("Served.java"), "@PORT@")

    @needs("starman")
    def test_starman(self) -> None:
        service = Intercepted(self, ["--stop-signal", "QUIT"], *starman(4, str(free_port())))
        self.upgraded(service, *NEW, *SLOW)
        self.compared("QUIT", [], *starman(4, "@PORT@"))

    @needs("starman")
    def test_a_program_whose_processes_are_all_busy_is_ready(self) -> None:
        service = Intercepted(self, ["--stop-signal", "QUIT"], *starman(1, str(free_port())))
        # One is served by each generation, and the others wait.
        oracle = service.oracle("--kept", "4")
        wait_for("a connection is accepted", lambda: oracle.is_accepted(1))
        service.upgrade("--ready-timeout", "10s")
        oracle.stop()

    def test_a_listener_that_is_shut_down_serves_on_for_the_others(self) -> None:
        service = Intercepted(self, ["--workers", "2"], "python3", program("shuts.py"), str(free_port()))
        self.loses_nothing(service, *NEW)

    @unittest.skipUnless(os.geteuid() == 0, "only root may give a program another user")
    def test_a_privileged_port_for_a_program_that_may_not_bind_it(self) -> None:
        port = str(free_port(PRIVILEGED))
        listen = ["--listen", f"127.0.0.1:{port}", "--intercept", "on", "--user", "nobody"]
        server = "require('http').createServer((_, response) => response.end(" \
            "`gen=${process.env.HANDOVER_GENERATION} pid=${process.pid}`)).listen(%s, '127.0.0.1')" % port
        service = Intercepted(self, listen, "node", "-e", server)
        self.upgraded(service, *NEW)
        self.assertEqual(list(service.cookies()), [f"127.0.0.1:{port}"])


if __name__ == "__main__":
    unittest.main()
