"""The first half of report.html: what came out."""

from __future__ import annotations

from collections.abc import Iterator

from optpipe.bench.pages import charts, curves, rates
from optpipe.bench.pages.markup import (
    Safe,
    bullets,
    details,
    figure,
    join,
    note,
    section,
    table,
    tag,
)
from optpipe.bench.pages.view import (
    DASH,
    METRICS,
    Entry,
    breaks,
    interval,
    is_reference,
    names,
    number,
    parent,
    share,
    slower_from,
    where,
)

MARKS = {"FASTER": "\u25b2", "SLOWER": "\u25bc", "EQUIVALENT": "=", "INCONCLUSIVE": "?",
         "INVALID": "!"}  # fmt: skip
QUALITY = ("artifact", "tier", "perplexity", "perplexity ratio [95 %]", "KL mean", "KL p99",
           "KL max", "same top token", "serious flips", "greedy prefix")  # fmt: skip
SPEED = ("artifact", "TTFT ms", "TPOT ms", "tokens/s", "peak MB", "TTFT \u00d7", "TPOT \u00d7",
         "tokens/s \u00d7", "verdicts")  # fmt: skip


def top(report: Entry, title: str) -> Safe:
    """Title, when and where, and what makes the whole run invalid."""
    run = report["run"]
    facts = (
        f"{run['started'].replace('T', ' ')} \u00b7 {run['duration_s']:.0f} s \u00b7 "
        f"artifacts: {len(report['artifacts'])} \u00b7 "
        f"cells: {len(report['artifacts'][0]['cells'])} \u00b7 threads: {run['threads']} \u00b7 "
        f"{run['machine']['cpu'] or 'CPU unknown'}"
    )
    bad = [
        tag("div", tag("strong", "Not all of this run is valid.") + bullets(invalid),
            class_="alarm", role="alert")
    ] if (invalid := run.get("invalid_reasons")) else []  # fmt: skip
    warned = [
        note(f"Before it began: {one['check']}: {one['found']}; wanted: {one['wanted']}.")
        for one in run.get("preflight", ())
        if not one["passed"]
    ]
    warned += [note(f"{broken}.") for broken in breaks(report)]
    return tag("header", join([tag("h1", title), tag("p", facts, class_="facts"), *bad, *warned]))


def headline(report: Entry) -> Safe:
    """One row an artifact: size, quality and the speed of the first cell."""
    header = ("artifact", "MB", "perplexity", "KL", "TTFT ms", "TPOT ms", "verdict")
    rows = []
    for name, artifact in zip(names(report), report["artifacts"], strict=True):
        cell, quality = artifact["cells"][0], artifact["quality"]
        rows.append((
            name,
            number(artifact["bytes"], 1e-6, "{:.1f}"),
            number(quality["perplexity"], 1, "{:.3f}"),
            number(quality["kl_mean"], 1, "{:.2g}"),
            _timed(cell, "ttft_s"),
            _timed(cell, "tpot_s"),
            _verdicts(artifact, report),
        ))  # fmt: skip
    called = dict(zip((a["name"] for a in report["artifacts"]), names(report), strict=True))
    best = [
        join([tag("strong", pick["scenario"]), ": ", called.get(pick["artifact"], DASH),
              f" \u2013 {pick['why']}"])
        for pick in report.get("recommendation", ())
    ]  # fmt: skip
    first = where(report["artifacts"][0]["cells"][0])
    lead = (
        f"Times are medians of {first}. Small print: times faster than the baseline in the same "
        "blocks, with the interval that keeps 95 % over all looks. MB on disk; KL divergence from "
        "the baseline in nats."
    )
    return section(
        "Result",
        *([tag("div", bullets(best), class_="picks")] if best else []),
        note(lead),
        table(header, rows, "result", "cards"),
    )


def stages(report: Entry) -> Safe:
    """Four charts of what every stage changed."""
    wanted = (
        ("ttft_s", "Time to first token, ms", 1e3, "ms"),
        ("tpot_s", "Time per output token, ms", 1e3, "ms"),
        ("bytes", "Size on disk, MB", 1e-6, "MB"),
        ("kl_mean", "KL divergence, nats", 1, "nats"),
    )
    drawn = [
        figure(title, svg)
        for key, title, scale, unit in wanted
        if (svg := charts.waterfall(report, key, title, scale, unit))
    ]
    read = (
        f"Each bar reaches its own value, in {where(report['artifacts'][0]['cells'][0])}. The "
        "coloured part is what this stage changed against the artifact it was made from: blue "
        "less, orange more. Shorter is better in all four."
    )
    return section(
        "Stage by stage",
        note(read),
        tag("div", join(drawn), class_="grid") if drawn else note("Nothing was measured."),
        details("Numbers", table(_STAGE, _stage_rows(report), "stage by stage")),
    )


_STAGE = ("artifact", "made from", "TTFT ms", "TPOT ms", "MB", "KL, nats")


def _stage_rows(report: Entry) -> Iterator[tuple[str, ...]]:
    called = dict(zip(map(id, report["artifacts"]), names(report), strict=True))
    for artifact in report["artifacts"]:
        if is_reference(report, artifact):
            continue
        cell, before = artifact["cells"][0], parent(report, artifact)
        yield (
            called[id(artifact)],
            DASH if before is None else called[id(before)],
            number(cell["ttft_s"], 1e3),
            number(cell["tpot_s"], 1e3),
            number(artifact["bytes"], 1e-6),
            number(artifact["quality"]["kl_mean"]),
        )


def speedups(report: Entry) -> Safe:
    """A forest plot and a table of every cell."""
    drawn, folded = [], []
    for index, (cell, rated) in enumerate(rates.tables(report)):
        title = f"Speed-up: {cell}"
        if svg := charts.forest(report, index, title):
            drawn.append(figure(title, svg))
        shown = table(SPEED, _speed_rows(report, index), title)
        more = table(rates.HEADER, rated, f"rates: {cell}")
        folded.append(details(f"Numbers: {cell}", join([shown, more])))
    read = (
        "Right of the line is faster than the baseline. Filled: time per output token (TPOT), with "
        "its number at the right; hollow: time to first token (TTFT). A bar is the interval "
        "over paired blocks; grey where it reaches 1 or where there is none."
    )
    return section(
        "Speed-ups", note(read),
        tag("div", join(drawn), class_="grid") if drawn else note("There is nothing to compare."),
        *folded, details("How to read rates and gaps", note(rates.READ)),
    )  # fmt: skip


def _speed_rows(report: Entry, index: int) -> Iterator[tuple[str, ...]]:
    for name, artifact in zip(names(report), report["artifacts"], strict=True):
        cell = artifact["cells"][index]
        speedup = cell["speedup"]
        yield (
            name,
            number(cell["ttft_s"], 1e3),
            number(cell["tpot_s"], 1e3),
            number(cell["tokens_per_s"]),
            number(cell["peak_bytes"], 1e-6, "{:.0f}"),
            interval(speedup["ttft_s"]),
            interval(speedup["tpot_s"]),
            interval(speedup["tokens_per_s"]),
            "; ".join(_verdict_line(key, entry) for key, entry in judged(cell)) or DASH,
        )


def tradeoff(report: Entry) -> Safe:
    """Speed against quality, and all that is known of quality."""
    title = "Speed against divergence"
    svg = curves.pareto(report, 0, title)
    read = (
        "Up is faster, left is closer to the baseline (0: no difference). Filled points on the "
        "line: nothing beats them in both; hollow grey ones are dominated."
    )
    none = "Fewer than two artifacts have both a speed and a divergence."
    rows = [
        (name, *_quality_row(artifact["quality"]))
        for name, artifact in zip(names(report), report["artifacts"], strict=True)
    ]
    return section(
        "What speed costs",
        tag("div", figure(title, svg, read), class_="one") if svg else note(none),
        details("Numbers", table(QUALITY, rows, "quality")),
    )


def _quality_row(quality: Entry) -> tuple[str, ...]:
    kl = quality.get("kl") or {}
    ratio, prefix = quality.get("ppl_ratio"), quality.get("greedy_prefix")
    return (
        quality.get("tier") or DASH,
        number(quality["perplexity"], 1, "{:.3f}"),
        interval(ratio, "{:.4f}") if ratio else DASH,
        number(quality["kl_mean"], 1, "{:.2g}"),
        number(kl.get("p99"), 1, "{:.2g}"),
        number(kl.get("max"), 1, "{:.2g}"),
        share(quality["top1_agreement"]),
        share(quality.get("serious_flips")),
        number(prefix.get("mean") if isinstance(prefix, dict) else prefix),
    )


def batches(report: Entry) -> Safe:
    """Throughput over the batch size, for every scenario that sweeps it."""
    cells = report["artifacts"][0]["cells"]
    sweeps = [
        name for name in dict.fromkeys(cell["scenario"] for cell in cells)
        if len({cell["batch"] for cell in cells if cell["scenario"] == name}) > 1
    ]  # fmt: skip
    drawn = [
        figure(title, svg)
        for scenario in sweeps
        if (svg := curves.scaling(report, scenario, title := f"Throughput over batch: {scenario}"))
    ]
    if not drawn:
        return section("Batch scaling", note("No scenario of this run sweeps the batch size."))
    found = [
        (name, scenario, number(slower_from(artifact, scenario)), _no_crossover(artifact))
        for name, artifact in zip(names(report), report["artifacts"], strict=True)
        for scenario in sweeps
        if artifact.get("crossover")
    ]
    read = (
        "Both axes are logarithmic; black is the baseline, a number stands for its artifact. An "
        "orange diamond is the crossover: from that batch size on the artifact is slower than "
        "the baseline."
    )
    header = ("artifact", "scenario", "crossover at batch", "why")
    return section(
        "Batch scaling", note(read), tag("div", join(drawn), class_="grid"),
        *([details("Numbers", table(header, found, "crossover"))] if found else []),
    )  # fmt: skip


def _no_crossover(artifact: Entry) -> str:
    return (artifact.get("crossover") or {}).get("reason") or DASH


def judged(cell: Entry) -> Iterator[tuple[str, Entry]]:
    """The metrics of a cell that got a verdict."""
    return ((key, entry) for key, entry in cell["speedup"].items() if entry.get("verdict"))


def _verdicts(artifact: Entry, report: Entry) -> Safe:
    """One line for each verdict: what it holds for, over all cells."""
    if artifact is report["artifacts"][0]:
        return tag("span", "baseline", class_="quiet")
    found: dict[str, dict[str, list[str]]] = {}
    for cell in artifact["cells"]:
        for key, entry in judged(cell):
            what = f"{METRICS.get(key, key)} {cell['scenario']}"
            found.setdefault(entry["verdict"], {}).setdefault(what, []).append(str(cell["batch"]))
    lines = [
        join([
            tag("span", f"{MARKS[verdict]} {verdict.lower()}", class_=f"verdict {verdict.lower()}"),
            " " + "; ".join(f"{what} \u00d7 {', '.join(sizes)}" for what, sizes in places.items()),
        ])
        for verdict, places in found.items()
    ]  # fmt: skip
    return join(tag("div", line) for line in lines) if lines else Safe(DASH)


def _verdict_line(key: str, entry: Entry) -> str:
    """TPOT FASTER (p 0.0078), TTFT INCONCLUSIVE (wide; 40 blocks needed)."""
    facts = [
        f"p {entry['p_holm']:.2g}" if entry.get("p_holm") is not None else "",
        entry.get("reason") or "",
        f"{entry['blocks_needed']} blocks needed" if entry.get("blocks_needed") else "",
        f"smallest effect it could see {entry['mde']:.1%}" if entry.get("mde") else "",
    ]
    told = "; ".join(fact for fact in facts if fact)
    return f"{METRICS.get(key, key)} {entry['verdict']}" + (f" ({told})" if told else "")


def _timed(cell: Entry, key: str) -> Safe:
    """A time in ms with its ratio in small print."""
    speedup = cell["speedup"][key]
    small = interval(speedup) if speedup["ci"] else ""
    return join([number(cell[key], 1e3), *([" ", tag("small", small)] if small else [])])
