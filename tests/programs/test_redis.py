"""redis under `handover exec`: two of it cannot have the same data, so the old one ends first. TCP and a Unix socket at once;
nobody is refused, and what it has acknowledged is there in its next generation."""

from __future__ import annotations

import os
import signal
import time
import unittest
from typing import List, Union

from alone import Restarted
from lab import Intercepted, free_port, needs
from redis_load import Load

UPGRADES = int(os.environ.get("HANDOVER_UPGRADES", "10"))
# Between two upgrades.
LOADED_SECONDS = 0.3


def redis(port: int) -> List[str]:
    # It writes its data when it is told to stop, if it has a rule for when to write at all.
    return [
        "redis-server", "--bind", "127.0.0.1", "--port", str(port), "--unixsocket", "@DIR@/redis.sock",
        "--dir", "@DIR@", "--save", "3600 1",
    ]


@needs("redis-server")
class Redis(unittest.TestCase):
    def loaded(self, service: Union[Intercepted, Restarted], addresses: List[str]) -> Load:
        load = Load(addresses)
        self.addCleanup(load.end)
        for _ in range(UPGRADES):
            time.sleep(LOADED_SECONDS)
            service.replace()
        time.sleep(LOADED_SECONDS)
        load.end()
        self.assertEqual(load.lost_data, [])
        return load

    def test_redis(self) -> None:
        port = free_port()
        service = Intercepted(self, ["--no-overlap"], *redis(port))
        cookies = service.cookies()
        path = os.path.join(service.directory, "redis.sock")
        self.assertEqual(sorted(cookies), sorted([path, f"127.0.0.1:{port}"]))
        here = self.loaded(service, [f"127.0.0.1:{port}", path])
        self.assertEqual(service.cookies(), cookies)
        port = free_port()
        alone = Restarted(self, signal.SIGTERM, f"127.0.0.1:{port}", *redis(port))
        there = self.loaded(alone, [f"127.0.0.1:{port}", os.path.join(alone.directory, "redis.sock")])
        for kind in ("new", "kept"):
            print(f"redis, {UPGRADES} upgrades, {kind} connections: {getattr(here, kind)}; alone {getattr(there, kind)}")
        # A command that it has taken may be lost; the client asks again on a new connection.
        for kind, each in (("new", here.new), ("kept", here.kept)):
            self.assertEqual({name for name in each} - {"ok", "cut", "reset"}, set(), each)
            self.assertLessEqual(each["cut"] + each["reset"], 2 * UPGRADES, each)
        self.assertGreater(there.new["refused"] + there.kept["refused"], 0)


if __name__ == "__main__":
    unittest.main()
