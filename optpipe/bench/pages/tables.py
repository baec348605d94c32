"""The report for people: report.md and the table on the screen, from the rows of report.json."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from optpipe.bench.fidelity import gate
from optpipe.bench.pages import bounds, missing, rates, room, served, setups, tasks
from optpipe.bench.pages.view import DASH, breaks, short

Row = list[str]
NONE = "-"
SPEED = ("artifact", "MB", "ppl", "KL", "TTFT ms", "TPOT ms", "tok/s", "peak MB",
         "TTFT x [95 %]", "TPOT x [95 %]", "tok/s x [95 %]", "verdict")  # fmt: skip
ON_SCREEN = (0, 1, 2, 4, 5, 6, 9, 11)
"""Columns of SPEED that fit in 100 characters."""
TITLES = {"ttft_s": "TTFT", "tpot_s": "TPOT", "tokens_per_s": "tok/s", "peak_bytes": "memory"}
PLAIN_WIDTH = 100
FEW = 4
"""Facts for so many layers or blocks are told one by one."""
SIZES = ("artifact", "MB on disk", "MB in memory", "claimed", "found in the files")
NOT_INCLUDED = (
    "Time: tokenizing, detokenizing, sampling other than arg-max, loading and the network. "
    "Cold starts are timed on their own, with files that may already be in the page cache.",
    "Prompts of timed runs are random token ids unless a scenario names a file of them, the same "
    "for all arms; end-of-text does not stop an answer. Speed here does not depend on what the "
    "text says; speculative decoding would.",
    "TTFT is from the request to the first token on the host, TPOT the mean gap between the tokens "
    "after it, tok/s counts output tokens of all rows over the whole iteration.",
    "Peak memory is that of the worker's whole process, runtime libraries included, on a CPU; what "
    "torch allocated on a GPU.",
    "x: how many times better than the baseline in the same block, above 1 is better; in brackets "
    "the interval, which holds for whatever processes of the two may get, not only for those that "
    "were timed, and is wider at each look (97.5 % of two) so that all looks together keep 95 %. "
    "Many ratios are shown: one in twenty intervals misses by chance.",
    "Verdicts are on metrics chosen beforehand (primary of a scenario), FASTER, SLOWER and "
    "EQUIVALENT with an error of at most 5 % for all of a report together (Holm, Shaffer), also "
    "where neighbouring blocks are alike: EQUIVALENT if the "
    "whole interval lies within a negligible difference, "
    "INCONCLUSIVE if the blocks do not decide, INVALID if a check failed that any honest "
    "measurement passes.",
)


def show(report: Mapping[str, Any]) -> None:
    """Print the speed tables on standard error."""
    console = Console(stderr=True, width=None if sys.stderr.isatty() else PLAIN_WIDTH)
    for title, rows in speed_tables(report):
        table = Table(
            title=title, title_justify="left", box=None, padding=(0, 1), collapse_padding=True
        )
        for index in ON_SCREEN:
            table.add_column(SPEED[index], justify="right" if index else "left", no_wrap=True)
        for *row, verdict in rows:
            row.append(verdict.partition(",")[0])  # that of the speed: memory is in report.md
            table.add_row(*(row[index] for index in ON_SCREEN))
        console.print(table)


def markdown(report: Mapping[str, Any]) -> str:
    """The whole of report.md."""
    run = report["run"]
    machine = run["machine"]
    parts = [
        f"# {' '.join(run.get('command', ['optpipe']))}",
        f"{run['started']}, {run['duration_s']:.0f} s, seed {run['seed']}, "
        f"{run['threads']} threads, {machine['cpu']}, {machine['cores_usable']} cores, "
        f"load {machine['load'][0]:.2f}",
        *(f"{broken}." for broken in breaks(report)),
    ]
    for title, rows in speed_tables(report):
        parts += [f"## {title}", _markdown_table(SPEED, rows)]
    for title, rows in served.tables(report):
        parts += [f"## Server, {title}", _markdown_table(served.HEADER, rows), served.READ]
    for title, spent in setups.energy(report):
        parts += [f"## Energy, {title}", _markdown_table(setups.ENERGY, spent), setups.READ]
    parts += [f"## {title}\n\n{text}" for title, text in _conclusions(report) if text]
    if tasked := [*tasks.rows(report)]:
        parts += ["## Tasks", _markdown_table(tasks.HEADER, tasked), tasks.READ]
    parts += _bottlenecks(report)
    parts += ["## How each was run", _markdown_table(setups.RAN, setups.ran(report))]
    parts += ["## What was claimed, what is there", _markdown_table(SIZES, _size_rows(report))]
    parts += [f"## Quality\n\n{_quality_line(run['design']['quality'])}"]
    parts += [_markdown_table(gate.HEADER, gate.rows(report))]
    less = run["design"]["quality"]["reasons"]
    parts += [f"Less text than asked for: {less[k]}." for k in ("window", "windows") if k in less]
    parts += ["## Starts", _markdown_table(room.START, room.starts(report)), room.READ]
    parts += ["## Room", _markdown_table(room.MEMORY, room.memory(report)), room.ROOM]
    parts += [f"## Rates and gaps\n\n{rates.READ}"]
    for title, told in rates.tables(report):
        parts += [f"### {title}", _markdown_table(rates.HEADER, told)]
    if lacking := missing.rows(report):
        lines = (f"- {keys} of {of}{f', {at}' if at != DASH else ''}: {why}"
                 for why, keys, of, at in lacking)  # fmt: skip
        parts += ["## What is missing, and why", "\n".join(lines)]
    parts += ["## What these numbers do not include", "\n".join(f"- {n}" for n in NOT_INCLUDED)]
    return "\n\n".join(parts) + "\n"


def _bottlenecks(report: Mapping[str, Any]) -> Iterator[str]:
    for title, rows in bounds.limits(report):
        yield f"## Bottlenecks, {title}"
        yield _markdown_table(bounds.LIMIT, rows)
    for title, rows in bounds.outcomes(report):
        yield f"## Predicted, and what came true, {title}"
        yield _markdown_table(bounds.OUTCOME, rows)
        yield bounds.READ


def _conclusions(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What to take, what this run can resolve, and what is wrong with it."""
    design = report["run"]["design"]
    advice = (f"- {r['scenario']}: {r['artifact']} ({r['why']})" for r in report["recommendation"])
    yield "Recommendation", "\n".join(advice)
    warned = (
        f"- {one['check']}: {one['found']}; wanted: {one['wanted']}"
        for one in report["run"].get("preflight", ())
        if not one["passed"]
    )
    yield "What was not as it should be before it began", "\n".join(warned)
    yield "What this run can resolve", "\n".join(_resolution_lines(design))
    invalid = (f"- {why}" for why in report["run"]["invalid_reasons"])
    yield "What is INVALID, and why", "\n".join(invalid)


def _resolution_lines(design: Mapping[str, Any]) -> Iterator[str]:
    """Two identical workers of the baseline against each other, and the instrument alone."""
    for cell in design["resolution"]:
        shown = [f"{t} x {_ratio(cell[m])}" for m, t in TITLES.items() if cell[m]["ratio"]]
        if shown:
            where = f"{cell['scenario']} {cell['batch']} x {cell['prompt_tokens']}"
            yield f"- {where}, the baseline against itself: {', '.join(shown)}"
    if design["instrument"]:
        told = design["instrument"].items()
        errors = [f"{k[:-6].upper()} {v:+.2%}" for k, v in told if k.endswith("_error")]
        yield f"- known delays, relative error: {', '.join(errors)}"


def speed_tables(report: Mapping[str, Any]) -> Iterator[tuple[str, list[Row]]]:
    """One table a cell: its title, its rows in pipeline order."""
    artifacts = report["artifacts"]
    for index, cell in enumerate(artifacts[0]["cells"]):
        title = (
            f"{cell['scenario']}: {cell['batch']} x {cell['prompt_tokens']} prompt tokens, "
            f"{cell['new_tokens']} new, {cell['blocks']} blocks"
        )
        yield title, [_speed_row(artifact, artifact["cells"][index]) for artifact in artifacts]


def _speed_row(artifact: Mapping[str, Any], cell: Mapping[str, Any]) -> Row:
    quality, speedup = artifact["quality"], cell["speedup"]
    return [
        short(artifact),
        _number(artifact["bytes"], 1e-6, "{:.1f}"),
        _number(quality["perplexity"], 1, "{:.3f}"),
        _number(quality["kl_mean"], 1, "{:.2g}"),
        _number(cell["ttft_s"], 1e3, "{:.1f}"),
        _number(cell["tpot_s"], 1e3, "{:.2f}"),
        _number(cell["tokens_per_s"], 1, "{:.1f}"),
        _number(cell["peak_bytes"], 1e-6, "{:.0f}"),
        _ratio(speedup["ttft_s"]),
        _ratio(speedup["tpot_s"]),
        _ratio(speedup["tokens_per_s"]),
        _verdict(speedup),
    ]


def _verdict(speedup: Mapping[str, Any]) -> str:
    """Of every metric that has one here: 'TPOT FASTER, memory EQUIVALENT'."""
    told = {k: v["verdict"] for k, v in speedup.items() if v.get("verdict")}
    if {*told.values()} == {"INVALID"}:
        return "INVALID"
    found = (f"{TITLES[k]} {verdict}" for k, verdict in told.items())
    return ", ".join(found) or NONE


def _size_rows(report: Mapping[str, Any]) -> list[Row]:
    return [
        [
            short(artifact),
            _number(artifact["bytes"], 1e-6, "{:.1f}"),
            _number(artifact["weight_bytes"], 1e-6, "{:.1f}"),
            _facts({k: v for k, v in artifact["stats"].items() if k != "verified"}),
            _facts(artifact["stats"].get("verified", {})),
        ]
        for artifact in report["artifacts"]
    ]


def _facts(stats: Mapping[str, Any]) -> str:
    """Stats in one cell of a table; a value for every layer or block becomes their range."""
    return ", ".join(f"{key} {_fact(value)}" for key, value in stats.items() if value != {}) or NONE


def _fact(value: Any) -> str:
    if isinstance(value, Mapping):
        if len(value) > FEW:
            return f"{_range([*value.values()])}{len(value)} layers"
        return "; ".join(f"{key} {_fact(inner)}" for key, inner in value.items())
    if isinstance(value, list) and len(value) > FEW and not all(isinstance(v, int) for v in value):
        return f"{_range(value)}{len(value)} values"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _range(values: list[Any]) -> str:
    """Of numbers; nothing of words."""
    numbers = all(isinstance(value, int | float) for value in values)
    return f"{min(values):.4g} to {max(values):.4g} in " if numbers else ""


def _quality_line(about: Mapping[str, Any]) -> str:
    if not about["windows"]:
        return "No arm was left to judge."
    sampled = "text sampled from the baseline" if "sampled_from" in about else "random token ids"
    source = f"`{about['text']}`" if about["text"] else sampled
    return (
        f"{about['windows']} windows of {about['window']} tokens of {source}, not overlapping; "
        "perplexity of every token but the first of a window; KL(baseline || artifact) over the "
        f"whole vocabulary in {about['dtype']}, mean over the same tokens, in nats."
    )


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def _ratio(speedup: Mapping[str, Any]) -> str:
    if speedup["ratio"] is None:
        return NONE
    ci = speedup["ci"]
    return f"{speedup['ratio']:.2f}" + (f" [{ci[0]:.2f}, {ci[1]:.2f}]" if ci else "")


def _number(value: float | None, scale: float, pattern: str) -> str:
    return NONE if value is None else pattern.format(value * scale)
