"""Makes the bundled evaluation task: which of four lines comes next in a Python file.

    python -m optpipe.demo.next_line      # writes tasks/next_line.jsonl beside this file

Contexts and lines are those of the held-out text. The three wrong lines are others of the same
file with the indentation of the right one, so that neither style nor depth gives it away.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from optpipe.demo.corpus import END

HERE = Path(__file__).resolve().parent
FILE = HERE / "tasks" / "next_line.jsonl"
QUESTIONS = 120
CONTEXT = 10
"""Lines before the one in question."""
SHORTEST, LONGEST = 12, 76
"""Characters of a line, without its indentation."""


def main() -> None:
    """Write the questions."""
    text = (HERE / "heldout.txt").read_text(encoding="utf-8")
    FILE.write_text("\n".join(questions(text, seed=0)) + "\n", encoding="ascii")


def questions(text: str, seed: int) -> Iterator[str]:
    """One JSON object a line: context, four choices, index of the right one."""
    rng = random.Random(seed)
    found = [q for part in text.split(END) for q in _of_file(part.strip().split("\n"), rng)]
    for context, right, wrong in sorted(rng.sample(found, QUESTIONS)):
        choices = [right, *wrong]
        rng.shuffle(choices)
        row = {"context": context, "choices": choices, "answer": choices.index(right)}
        yield json.dumps(row)


def _of_file(lines: list[str], rng: random.Random) -> Iterator[tuple[str, str, list[str]]]:
    """(context, next line, three others) wherever a file allows it."""
    usable = [line for line in lines if SHORTEST <= len(line.strip()) <= LONGEST]
    for number in range(CONTEXT, len(lines)):
        right, before = lines[number], lines[number - CONTEXT : number]
        if right not in usable or not before[-1].strip():
            continue
        others = {line for line in usable if _indent(line) == _indent(right)} - {right, *before}
        if len(others) >= 3:
            yield "\n".join(before) + "\n", right, rng.sample(sorted(others), 3)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


if __name__ == "__main__":
    main()
