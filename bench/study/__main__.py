"""python -m bench.study: prepares, runs and publishes the study under docs/study."""

import argparse
import sys
from collections.abc import Sequence

from bench.study.page import write_tables
from bench.study.publish import RESULTS_FOLDER, publish
from bench.study.run import COMPARISONS, prepare, run
from fused_route.training.cli import positive


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand; what cannot be used is one line on standard error and exit status 2."""
    parser = argparse.ArgumentParser(prog="python -m bench.study", description=__doc__)
    parser.add_argument("command", choices=("prepare", "run", "publish", "all"))
    parser.add_argument("--only", action="append", choices=COMPARISONS, help="again for another")
    parser.add_argument("--jobs", type=positive, default=2, help="comparisons at once (default: 2)")
    told = parser.parse_args(argv)
    names = told.only or COMPARISONS
    try:
        if told.command in ("prepare", "all"):
            prepare()
        failed = run(names, told.jobs) if told.command in ("run", "all") else 0
        if told.command in ("publish", "all"):
            publish(names)
            write_tables(RESULTS_FOLDER)
    except (ValueError, OSError, ImportError) as error:
        print(f"bench.study: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench.study: interrupted; the same command goes on", file=sys.stderr)
        return 130
    print(NEXT[told.command])
    return int(failed > 0)


NEXT = {
    "prepare": "next: python -m bench.study run",
    "run": "next: python -m bench.study publish",
    "publish": f"next: read {RESULTS_FOLDER}/*/report.md",
    "all": f"next: read {RESULTS_FOLDER}/*/report.md",
}

if __name__ == "__main__":
    sys.exit(main())
