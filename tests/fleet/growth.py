"""How long a roll-out takes, for more and more machines. Not a test."""

from __future__ import annotations

import resource
import sys

from lab import Fleet, Played


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measured(fleet: Fleet, release: str, **variables: str) -> "tuple[Played, float]":
    before = cpu_seconds()
    played = fleet.play("rollout", release=release, **variables)
    assert played.code == 0, played.text
    return played, cpu_seconds() - before


def main() -> None:
    counts = sorted(int(count) for count in sys.argv[1:]) or [2, 4, 8, 16]
    fleet = Fleet(counts[0])
    print("machines  batches  the controller's processor  one after the other  nothing to do", flush=True)
    for count in counts:
        fleet.grow(count)
        batches, processor = measured(fleet, fleet.build(f"batches-{count}"))
        single, _ = measured(fleet, fleet.build(f"single-{count}"), serial="1")
        nothing, _ = measured(fleet, f"single-{count}")
        print(f"{count:8}  {batches.seconds:5.1f} s  {processor:24.1f} s  {single.seconds:17.1f} s  "
              f"{nothing.seconds:11.1f} s", flush=True)
    fleet.end()


if __name__ == "__main__":
    main()
