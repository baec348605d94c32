"""The gate: which tier an arm's numbers make, and that what was judged is what was timed.

A number is held against a tier by the unfavourable end of its 95 % interval.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from optpipe.artifact import Artifact
from optpipe.bench.fidelity.quality import BUNDLED, TIERS, QualityConfig
from optpipe.bench.scenario import Cell
from optpipe.bench.worker import Arm
from optpipe.errors import GateError

DEGRADED, NONE = "degraded", "-"
ENGINE = "engine.json"
"""Where build/generate.py reads the end tokens."""
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt",
              "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")  # fmt: skip
PROBE = 20_000
"""Characters that two tokenizers are compared on."""
LENGTH = 0.1
"""Outputs longer or shorter than the baseline's by more than this share are a failure."""


class Limits(NamedTuple):
    """The worst that a tier allows."""

    kl: float
    top1: float
    ln_ppl: float


_WORST = (Limits(1e-3, 0.99, 1e-3), Limits(1e-2, 0.97, 1e-2), Limits(0.1, 0.9, 0.05))
LIMITS = dict(zip(TIERS, _WORST, strict=True))


def tier(kl: float, top1: float, ln_ppl: float, floor_kl: float) -> str:
    """The best tier these allow: upper bounds of KL and of the rise of ln PPL, lower of top-1."""
    lossless = LIMITS["lossless"]._replace(kl=max(3 * floor_kl, LIMITS["lossless"].kl))
    for name, limits in {**LIMITS, "lossless": lossless}.items():
        if kl <= limits.kl and top1 >= limits.top1 and ln_ppl <= limits.ln_ppl:
            return name
    return DEGRADED


def content_hash(artifact: Artifact) -> str:
    """SHA-256 over the names and the bytes of every file of an artifact."""
    total = hashlib.sha256()
    for file in artifact.contents:
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        total.update(f"{file.relative_to(artifact.path).as_posix()}\0{digest}\n".encode())
    return total.hexdigest()


def content_hashes(arms: Sequence[Arm]) -> dict[str, str]:
    """Of the files of every arm; arms of the same files are hashed once."""
    artifacts = {arm.artifact.path: arm.artifact for arm in arms}
    found = {path: content_hash(artifact) for path, artifact in artifacts.items()}
    return {arm.name: found[arm.artifact.path] for arm in arms}


def stop_tokens(folder: Path) -> frozenset[int]:
    """What ends a text, by the file that whoever runs this artifact reads; empty if none does."""
    if (folder / ENGINE).is_file():
        return frozenset(json.loads((folder / ENGINE).read_text())["stop_tokens"])
    if not (folder / "config.json").is_file():
        return frozenset()
    from optpipe.checkpoint import Checkpoint  # imports torch

    return frozenset(Checkpoint(folder).stop_tokens)


def file_faults(folder: Path, baseline: Path) -> list[str]:
    """What an artifact would get wrong with the best of weights: its tokenizer, its end token."""
    from optpipe.text import has_tokenizer, tokenize  # imports transformers

    found = []
    own, wanted = stop_tokens(folder), stop_tokens(baseline)
    if own != wanted:
        found.append(f"its texts end at tokens {sorted(own)}, the baseline's at {sorted(wanted)}")
    if not has_tokenizer(baseline) or _same_files(folder, baseline):
        return found
    if not has_tokenizer(folder):
        return [*found, "it lost the tokenizer of the baseline"]
    probe = BUNDLED.read_text(encoding="utf-8")[:PROBE]
    if tokenize(folder, probe) != tokenize(baseline, probe):
        found.append("its tokenizer makes other tokens than the baseline's")
    return found


def _same_files(folder: Path, baseline: Path) -> bool:
    """Whether the files of the tokenizer are equal byte for byte, which is most often so."""
    files = [p for n in TOKENIZERS for f in (folder, baseline) if (p := f / n).is_file()]
    return all(
        (folder / f.name).is_file()
        and (baseline / f.name).is_file()
        and (folder / f.name).read_bytes() == (baseline / f.name).read_bytes()
        for f in files
    )


def changed(judged: Mapping[str, str], now: Mapping[str, str]) -> dict[str, str]:
    """Why the timings of an arm are invalid: its files are no longer those that were judged."""
    return {
        name: f"artifact_changed: '{name}' was edited after the quality gate: its files hash to "
        f"{now[name][:16]}, those that were judged to {before[:16]}"
        for name, before in judged.items()
        if now[name] != before
    }


def audit(
    emitted: Collection[tuple[str, Cell, str]], expected: Mapping[tuple[str, Cell], str]
) -> dict[str, str]:
    """Arms whose timed tokens are not those of their gate (MLPerf's TEST01), and where.

    Both: arm, cell and hash of the greedy tokens for the same prompts; of every process that was
    timed, and of the one that was judged.
    """
    return {
        arm: f"other_answers: '{arm}' gave other tokens in '{cell}' than when it was judged"
        for arm, cell, tokens in sorted(emitted)
        if expected.get((arm, cell), tokens) != tokens
    }


def check(report: Mapping[str, Any], config: QualityConfig, other: Sequence[str]) -> None:
    """Raise GateError if something other than what was judged was timed, or it is not good enough.

    ``other`` says what. Only what the pipeline made is held to ``config``; a failure is one
    whoever it belongs to.
    """
    if other:
        raise GateError(f"INVALID: {other[0]}")
    base, *_ = report["artifacts"]
    for artifact in report["artifacts"]:
        if failures := artifact["quality"]["failures"]:
            raise GateError(f"'{artifact['name']}' FAILS the quality gate: {failures[0]}")
    for artifact in (entry for entry in report["artifacts"] if entry["role"] == "artifact"):
        _hold_tier(artifact, config.required)
        _hold_perplexity(artifact, base, config.max_perplexity_increase)


def _hold_tier(artifact: Mapping[str, Any], required: str | None) -> None:
    if required is None:
        return
    name, quality = artifact["name"], artifact["quality"]
    if (found := quality["tier"]) is None:
        raise GateError(
            f"'{name}' has no tier, '{required}' is required: {quality['reasons']['tier']}"
        )
    order = [*TIERS, DEGRADED]
    if order.index(found) > order.index(required):
        raise GateError(
            f"'{name}' is {found}, '{required}' is required: at the end of its intervals it has "
            f"KL {quality['kl']['ci'][1]:.2g}, top-1 {quality['top1_ci'][0]:.1%}, "
            f"ln PPL {quality['ppl_ratio']['ln_ci'][1]:+.2g}"
        )


def _hold_perplexity(
    artifact: Mapping[str, Any], base: Mapping[str, Any], limit: float | None
) -> None:
    if limit is None:
        return
    before, after = base["quality"]["perplexity"], artifact["quality"]["perplexity"]
    if before is None or after is None:
        raise GateError(f"'{artifact['name']}' has no perplexity to hold against the limit")
    if after > before * (1 + limit):
        raise GateError(
            f"'{artifact['name']}' has perplexity {after:.3f}, {after / before - 1:.1%} over "
            f"the baseline's {before:.3f}; bench.quality.max_perplexity_increase={limit:g}"
        )


HEADER = ("artifact", "tier", "ppl x [95 %]", "KL [95 %]", "KL p99", "top-1 [95 %]",
          "serious flips", "greedy prefix", "floor KL")  # fmt: skip


def rows(report: Mapping[str, Any]) -> list[list[str]]:
    """One row of HEADER for every arm; what is undefined is a dash, its reason is in the report."""
    return [[str(arm["name"]), *_row(arm["quality"])] for arm in report["artifacts"]]


def _row(quality: Mapping[str, Any]) -> list[str]:
    tier = "FAIL" if quality["failures"] else quality["tier"] or NONE
    if quality["kl"] is None:
        return [tier, *[NONE] * (len(HEADER) - 2)]
    kl, rise, prefix = quality["kl"], quality["ppl_ratio"], quality["greedy_prefix"]
    return [
        tier,
        _estimate(rise["ratio"], rise["ci"], "{:.4f}"),
        _estimate(quality["kl_mean"], kl["ci"], "{:.2g}"),
        NONE if kl["p99"] is None else f"{kl['p99']:.2g}",
        _estimate(quality["top1_agreement"], quality["top1_ci"], "{:.2%}"),
        f"{quality['serious_flips']:.2%}",
        f"{prefix['mean']:.1f} of {prefix['tokens']}" if prefix else NONE,
        f"{quality['floor']['kl_mean']:.2g}" if quality["floor"] else NONE,
    ]


def _estimate(value: float | None, ci: Sequence[float | None] | None, pattern: str) -> str:
    if value is None or ci is None or None in ci:
        return NONE if value is None else pattern.format(value)
    return f"{pattern.format(value)} [{', '.join(pattern.format(bound) for bound in ci)}]"
