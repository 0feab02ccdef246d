"""``gpu-byoc bench``: measure this machine, and write what was found as a file, tables, pictures and a page."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from gpu_byoc.errors import EXIT_INTERRUPTED, EXIT_USAGE, ConfigError

from . import compare, report, runner
from .harness import Size
from .registry import GROUPS, Group

OUT = Path("bench-out")
UNASKED = "only when asked for, because it installs other servers: gpu-byoc bench --peers"
ALSO = """\
also:
  gpu-byoc bench compare A.json B.json [--fail-under R] [--figures NAMES] [--different-machines]
  gpu-byoc bench report FILE.json [--output FOLDER] [--readme README.md]
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 when every row that this machine can run was measured. OperatorError is for the caller."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands = {"compare": compare.main, "report": report.main}
    if arguments and arguments[0] in commands:
        return commands[arguments[0]](arguments[1:])
    return _measure(arguments)


def _parser() -> argparse.ArgumentParser:
    names = ", ".join(each.name for each in GROUPS)
    parser = argparse.ArgumentParser(
        prog="gpu-byoc bench",
        allow_abbrev=False,
        description="Measure what this machine can run; the rest is skipped by name and reason.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=ALSO,
    )
    parser.add_argument("--quick", action="store_true", help="fewer and shorter windows: a look, under two minutes")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # sees that it runs; no figures to keep
    parser.add_argument("--only", metavar="GROUPS", help=f"comma list of {names}")
    parser.add_argument("--peers", action="store_true", help="other servers too, each installed in a venv of its own")
    parser.add_argument(
        "--output",
        type=Path,
        default=OUT,
        help="folder for everything, or FILE.json for that alone (default: %(default)s)",
    )
    return parser


def _chosen(given: argparse.Namespace) -> tuple[list[Group], dict[str, str]]:
    """Those asked for, else all; and why some of these are left out.

    Raises:
        ConfigError: a name that is none.
    """
    peers = [each.name for each in GROUPS if each.asked]
    asked = given.only.split(",") if given.only else [each.name for each in GROUPS]
    left_out = {} if given.only or given.peers else dict.fromkeys(peers, UNASKED)
    asked += peers if given.peers else []
    if unknown := [name for name in asked if name not in {each.name for each in GROUPS}]:
        raise ConfigError(f"no benchmark {', '.join(unknown)}; there are {', '.join(each.name for each in GROUPS)}")
    return [each for each in GROUPS if each.name in asked], left_out


def _measure(arguments: Sequence[str]) -> int:
    given = _parser().parse_args(arguments)
    groups, left_out = _chosen(given)
    report.check(given.output)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what was measured is kept
    size = Size.TINY if given.tiny else Size.QUICK if given.quick else Size.FULL
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    with runner.bars(console, groups) as progress:
        watch: runner.Watch = runner.Bars(progress, groups) if progress else runner.Quiet()
        result = runner.measure(groups, size, watch, left_out, lambda told: report.save(told, given.output))
    report.save(result, given.output)
    report.show(console, result)
    for path in report.write(result, given.output):
        console.print(f"written: {path}", soft_wrap=True)
    return int(_failed(result))


def _failed(result: dict[str, Any]) -> bool:
    return any("failed" in row for group in result["groups"].values() for row in group["rows"])


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except ConfigError as error:
        print(f"gpu-byoc bench: {error}", file=sys.stderr)
        raise SystemExit(EXIT_USAGE) from None
    except KeyboardInterrupt:
        raise SystemExit(EXIT_INTERRUPTED) from None
