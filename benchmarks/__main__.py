"""``python -m benchmarks``: runs suites, or compares two runs."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from benchmarks import (
    boot,
    bt,
    commands,
    containers,
    images,
    network,
    relay,
    results,
    roots,
    tap,
    vm,
)

SUITES = ("boot", "commands", "vm", "images", "network", "containers", "roots", "bt")


def main() -> int:
    """Does what the command line says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="measure; prints tables, keeps JSON")
    run.add_argument("suites", nargs="*", choices=[*SUITES, []], help="all when none is named")
    run.add_argument("--rounds", type=int, default=3)
    run.add_argument("--quick", action="store_true", help="one round, no whole programs")
    run.add_argument(
        "--engine", choices=["bt", "kvm"], default="bt", help="of boot, commands, vm and network"
    )
    run.add_argument("--out", type=Path)
    compare = verbs.add_parser("compare", help="two runs beside each other")
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    options = parser.parse_args()
    if options.verb == "compare":
        print(results.compare(options.before, options.after))
        return 0
    rounds = 1 if options.quick else options.rounds
    suites = []
    for name in options.suites or SUITES:
        if name == "boot":
            suites += boot.run(rounds, engine=options.engine, log=sys.stderr.write)
        if name == "commands":
            suites += commands.run(rounds, engine=options.engine, log=sys.stderr.write)
        if name == "vm":
            suites += vm.run(rounds, engine=options.engine, log=sys.stderr.write)
        if name == "bt":
            suites += bt.run(rounds, whole=not options.quick, log=sys.stderr.write)
        if name == "network":
            if options.engine == "bt":
                suites += network.run(rounds, log=sys.stderr.write)
                suites += relay.run(rounds, log=sys.stderr.write)
            suites += tap.run(rounds, engine=options.engine, log=sys.stderr.write)
        if name == "containers":
            suites += containers.run(rounds, log=sys.stderr.write)
        if name == "roots":
            suites += roots.run(rounds, engine=options.engine, log=sys.stderr.write)
        if name == "images":
            suites += images.run(rounds, log=sys.stderr.write)
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    out = options.out or results.REPOSITORY / "benchmarks" / "results" / f"{stamp}.json"
    results.write(out, suites)
    print("\n\n".join(suite.table() for suite in suites))
    print(f"\nkept in {out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
