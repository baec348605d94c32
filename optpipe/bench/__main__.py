"""``python -m optpipe.bench``: what can be done with reports that are there already."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from optpipe.bench.pages import compare, flat, html, publish, raw, schema
from optpipe.errors import InputError, one_line

OK, UNSOUND, BAD_INPUT, BROKEN = 0, 1, 2, 4
MOST_ERROR = 0.02
"""Largest relative error of the instrument that selftest lets pass."""


def main(argv: Sequence[str]) -> int:
    """Exit code: 0 success, 1 the instrument is off, 2 bad input, 4 broken."""
    given = _parser().parse_args(argv)
    try:
        code: int = given.do(given)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor complain at exit
        return OK
    except InputError as error:
        return _complain(str(error), BAD_INPUT)
    except OSError as error:
        return _complain(one_line(error), BAD_INPUT)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m optpipe.bench", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    two = commands.add_parser("compare", help="what changed between two runs")
    two.add_argument("before", type=Path, help="folder of a report")
    two.add_argument("after", type=Path, help="folder of a report")
    two.add_argument("--json", action="store_true", help="one JSON document instead of text")
    two.set_defaults(do=_compare)
    for name, do, about in (
        ("html", _html, "write report.html again, from report.json"),
        ("csv", _csv, "every artifact in every cell, one row each, on standard output"),
    ):
        one = commands.add_parser(name, help=about)
        one.add_argument("folder", type=Path, help="folder of a report")
        one.set_defaults(do=do)
    for name, do, about in (
        ("schema", _schema, "the JSON Schema of report.json"),
        ("selftest", _selftest, "time known delays: how far off is the instrument here?"),
    ):
        commands.add_parser(name, help=about).set_defaults(do=do)
    return parser


def _compare(given: argparse.Namespace) -> int:
    found = compare.compare(publish.read(given.before), publish.read(given.after))
    print(json.dumps(found, indent=1) if given.json else "\n".join(compare.text(found)))
    return OK


def _html(given: argparse.Namespace) -> int:
    found = publish.read(given.folder)
    page = given.folder / "report.html"
    series = raw.read(given.folder, found["run"].get("jobs", ()))
    page.write_text(html.page(found, series), encoding="utf-8")
    print(page)
    return OK


def _csv(given: argparse.Namespace) -> int:
    flat.write(publish.read(given.folder), sys.stdout)
    return OK


def _schema(given: argparse.Namespace) -> int:
    print(json.dumps(schema.load(), indent=1))
    return OK


def _selftest(given: argparse.Namespace) -> int:
    from optpipe.bench.timed.selftest import LIMITS, selftest

    errors = {name: error for name, error in selftest().items() if name.endswith("_error")}
    for name, error in errors.items():
        print(f"{name} {error:.3%}; verdicts of a run are INVALID beyond {LIMITS[name]:.0%}")
    worst = max(abs(error) for error in errors.values())
    if worst > MOST_ERROR:
        return _complain(f"the instrument is off by {worst:.1%}; at most {MOST_ERROR:.0%}", UNSOUND)
    return OK


def _complain(message: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":  # not in a worker, which imports this again
    sys.exit(main(sys.argv[1:]))
