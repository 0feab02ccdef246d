"""``python -m tests.fuzz [TARGET ...]``: hunt for so many seconds a target, and save what was found.

A finding's file goes into ``fuzz-out/TARGET/``; once it is fixed, it moves to ``tests/fuzz/corpus/TARGET/``, which
every run of the tests replays.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

from tests.fuzz import seeds
from tests.fuzz.hunt import corpus, hunt

OUT = Path("fuzz-out")


def main() -> int:
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", default=seeds.NAMES, help=f"of: {', '.join(seeds.NAMES)}")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each target")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30), help="the same seed, the same inputs")
    given = parser.parse_args()
    found = 0
    print(f"seed {given.seed}, {given.seconds:g} s a target")
    for name in given.targets:
        inputs = corpus(name) | seeds.made(name)
        report = hunt(name, given.seconds, seeds=inputs, packets=name in ("ts", "stream"), seed=given.seed)
        print(report, flush=True)
        for each in report.findings:
            print(f"  {each.kind}: {each.save(OUT / name)}\n    " + each.detail[-1500:].strip().replace("\n", "\n    "))
        found += len(report.findings)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
