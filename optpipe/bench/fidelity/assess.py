"""The quality of one arm as the report has it: null with a reason where a number is undefined.

The noise floor is the baseline against itself, alone and in a batch, and in the dtype that the arm
computes in: below it nothing can be told apart.

Shapes: N positions of all windows; (steps, prompts) for greedy tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from optpipe.bench.backend import Ids
from optpipe.bench.fidelity.divergence import (
    LEVEL,
    Floats,
    Mean,
    Positions,
    clustered,
    concatenate,
    quantile,
    wilson,
)
from optpipe.bench.fidelity.gate import LENGTH, LIMITS, tier
from optpipe.bench.fidelity.quality import NO_TEXT, Judged

Entry = dict[str, Any]
OWN = ("perplexity", "nll", "positions", "deterministic")
PAIRED = ("kl_mean", "top1_agreement", "kl", "kl_topk_lower", "ppl_ratio", "delta_p", "top1_ci",
          "top5_overlap", "flips", "serious_flips", "greedy_prefix", "output_length", "floor",
          "excess", "tier")  # fmt: skip
"""What an arm has only beside the baseline."""
SERIOUS = 0.1
"""A flip is serious where the baseline gave its first choice this much more than its second."""
CURVE = 8
"""Parts of a window that have a mean KL each."""
NOT_FINITE = "its logits are not all finite"
BASE_NOT_FINITE = "the baseline's logits are not all finite"
NOT_REPEATED = "the same input gave other logits the second time"
ITSELF = "the baseline itself: it has nothing to lose"
ONE_WINDOW = "one window: no interval, for its tokens depend on each other"
FEW = "too few positions for this percentile: 299 for p99, 2995 for p999"
TOO_LARGE = "it is too large for a number"


@dataclass(frozen=True, kw_only=True)
class Context:
    """What an arm is held against."""

    references: Sequence[str]
    """The baseline in each of its dtypes, the one that all are compared with first."""
    dtypes: Mapping[str, str]
    """What each arm computes in."""
    is_text: bool
    unpaired: str | None
    """Why there is no baseline to compare with, if there is none."""


def entry(name: str, judged: Judged, context: Context) -> Entry:
    """All metrics of one arm, its tier, and its failures, which leave it none."""
    all_N, failures = concatenate(judged.scored[name]), [*_failures(name, judged, context)]
    if not (_finite(name, judged) and all_N.finite):
        return {**without(failures[0]), "positions": len(all_N.nll), "failures": failures}
    nll = float(all_N.nll.mean())
    own: Entry = {
        "perplexity": _exp(nll) if context.is_text else None,
        "nll": nll if context.is_text else None,
        "positions": len(all_N.nll),
        "deterministic": judged.steady[name].repeats if name in judged.steady else None,
        "failures": failures,
        "reasons": {} if context.is_text else dict.fromkeys(("perplexity", "nll"), NO_TEXT),
    }
    if own["deterministic"] is None:
        own["reasons"]["deterministic"] = judged.missing.get(name, "it was not asked")
    if context.is_text and own["perplexity"] is None:
        own["reasons"]["perplexity"] = TOO_LARGE
    if context.unpaired:
        return _join(_nothing(context.unpaired), own)
    compared = _compared(judged.scored[name], all_N)
    found = _join(compared, _greedy(name, judged, context), own)
    found = _join(found, _floor(found, name, judged, context))
    return _join(found, _tier(found, name == context.references[0]))


def without(reason: str) -> Entry:
    """The quality of an arm that was not judged."""
    own: Entry = {**dict.fromkeys(OWN), "failures": [], "reasons": dict.fromkeys(OWN, reason)}
    return _join(_nothing(reason), own)


def _nothing(reason: str) -> Entry:
    return {**dict.fromkeys(PAIRED), "reasons": dict.fromkeys(PAIRED, reason)}


def _join(*entries: Entry) -> Entry:
    joined = {key: value for entry in entries for key, value in entry.items()}
    return {**joined, "reasons": {k: v for e in entries for k, v in e["reasons"].items()}}


def _compared(scored: Sequence[Positions], all_N: Positions) -> Entry:
    """What needs the baseline beside it."""
    delta = clustered([w.nll - w.reference_nll for w in scored])
    delta_p_N = np.exp(-all_N.nll) - np.exp(-all_N.reference_nll)
    agreed, count = int(all_N.agrees.sum()), len(all_N.agrees)
    serious = ~all_N.agrees & (all_N.margin > SERIOUS)
    return {
        "kl_mean": float(all_N.kl.mean()),
        "top1_agreement": agreed / count,
        "kl": _kl(scored, all_N),
        "kl_topk_lower": float(all_N.kl_topk.mean()),
        "ppl_ratio": _ratio(delta),
        "delta_p": {
            "mean": float(delta_p_N.mean()),
            "rms": float(np.sqrt((delta_p_N**2).mean())),
        },
        "top1_ci": list(wilson(agreed, count)),
        "top5_overlap": float(all_N.top5.mean()),
        "flips": 1 - agreed / count,
        "serious_flips": float(serious.mean()),
        "reasons": {},
    }


def _kl(scored: Sequence[Positions], all_N: Positions) -> Entry:
    mean = clustered([w.kl for w in scored])
    parts = np.array_split(np.mean([w.kl for w in scored], axis=0), CURVE)
    found: Entry = {
        "p50": float(np.median(all_N.kl)),
        "p99": quantile(all_N.kl, 0.99),
        "p999": quantile(all_N.kl, 0.999),
        "max": float(all_N.kl.max()),
        "ci": None if mean.ci is None else [max(mean.ci[0], 0.0), mean.ci[1]],
        "by_position": [float(part.mean()) for part in parts if len(part)],
    }
    reasons = {key: FEW for key in ("p99", "p999") if found[key] is None}
    return {**found, "reasons": {**reasons, **({} if mean.ci else {"ci": ONE_WINDOW})}}


def _ratio(delta: Mean) -> Entry:
    """exp of the paired rise of ln PPL, which is far better known than either perplexity."""
    undefined = ("ci", "ln_ci", "se_ln") if delta.ci is None else ()
    ratio, reasons = _exp(delta.value), dict.fromkeys(undefined, ONE_WINDOW)
    return {
        "ratio": ratio,
        "ci": None if delta.ci is None else [_exp(bound) for bound in delta.ci],
        "ln": delta.value,
        "ln_ci": None if delta.ci is None else list(delta.ci),
        "se_ln": delta.error,
        "reasons": reasons if ratio is not None else {**reasons, "ratio": TOO_LARGE},
    }


def _exp(value: float) -> float | None:
    """None where it is no number of float64."""
    return math.exp(value) if value < 700 else None


def _greedy(name: str, judged: Judged, context: Context) -> Entry:
    """How long the greedy tokens are those of the baseline, and how long its own texts are."""
    base = context.references[0]
    if name not in judged.greedy or base not in judged.greedy:
        keys = ("greedy_prefix", "output_length")
        why = judged.missing.get(name) or judged.missing.get(base, "no tokens were generated")
        return {**dict.fromkeys(keys), "reasons": dict.fromkeys(keys, why)}
    own_NP, base_NP = _common(judged.greedy[name], judged.greedy[base])
    steps = len(own_NP)
    prefix_P = np.where((own_NP == base_NP).all(0), steps, (own_NP != base_NP).argmax(0))
    first = int(prefix_P.min())
    prefix = {
        "mean": float(prefix_P.mean()),
        "tokens": steps,
        "prompts": len(prefix_P),
        "first_divergence": first if first < steps else None,
        "exact_share": float((prefix_P == steps).mean()),
        "reasons": {} if first < steps else {"first_divergence": "no output diverged"},
    }
    return {"greedy_prefix": prefix, "output_length": _lengths(name, base, judged), "reasons": {}}


def _common(own_NP: Ids, base_NP: Ids) -> tuple[Ids, Ids]:
    steps = min(len(own_NP), len(base_NP))
    return own_NP[:steps], base_NP[:steps]


def _lengths(name: str, base: str, judged: Judged) -> Entry:
    """Mean tokens up to the end-of-text token, those without one cut off at as many as all have."""
    own_NP, base_NP = _common(judged.greedy[name], judged.greedy[base])
    own_P, own_ends = _natural(own_NP, judged.stops.get(name, frozenset()))
    base_P, base_ends = _natural(base_NP, judged.stops.get(base, frozenset()))
    ended = own_ends or base_ends
    why = f"no output ended within {len(own_NP)} tokens"
    change = clustered([*((own_P - base_P) / base_P.mean())[:, None]])
    ci = [1 + bound for bound in change.ci] if ended and change.ci else None
    reasons = {} if ended else dict.fromkeys(("ratio", "ci"), why)
    return {
        "mean": float(own_P.mean()),
        "baseline_mean": float(base_P.mean()),
        "ratio": float(own_P.mean() / base_P.mean()) if ended else None,
        "ci": ci,
        "reasons": reasons if ci or reasons else {"ci": "one prompt"},
    }


def _natural(tokens_NP: Ids, stops: frozenset[int]) -> tuple[Floats, bool]:
    """Length of each output, (P), and whether any ended by itself."""
    ends_NP = np.isin(tokens_NP, list(stops))
    length_P = np.where(ends_NP.any(0), ends_NP.argmax(0) + 1, len(tokens_NP))
    return length_P.astype(np.float64), bool(ends_NP.any())


def _failures(name: str, judged: Judged, context: Context) -> Iterator[str]:
    """What makes an arm wrong, whatever its numbers."""
    base = context.references[0]
    if not _finite(name, judged):
        alone = context.unpaired or _finite(base, judged)
        yield NOT_FINITE if alone or name == base else BASE_NOT_FINITE
    if name in judged.steady and not judged.steady[name].repeats:
        yield NOT_REPEATED
    yield from judged.faults.get(name, [])
    if context.unpaired or not {name, base} <= judged.greedy.keys():
        return
    lengths = _lengths(name, base, judged)
    ratio, ci = lengths["ratio"], lengths["ci"]
    # a few prompts: one that ends early is no evidence yet
    if ratio is not None and ci is not None and not (ci[0] <= 1 + LENGTH and ci[1] >= 1 - LENGTH):
        yield f"its outputs are {ratio:.2f} times as long as the baseline's, {LENGTH:.0%} allowed"


def _finite(name: str, judged: Judged) -> bool:
    again = name not in judged.steady or judged.steady[name].floor.finite
    return again and all(window.finite for window in judged.scored[name])


def _floor(found: Entry, name: str, judged: Judged, context: Context) -> Entry:
    """What the baseline differs from itself by, and how much more the arm does."""
    base, *others = context.references
    if base not in judged.steady or not _finite(base, judged):
        keys = ("floor", "excess")
        why = BASE_NOT_FINITE if base in judged.steady else "the baseline was not asked twice"
        return {**dict.fromkeys(keys), "reasons": dict.fromkeys(keys, why)}
    seen, reasons = [judged.steady[base].floor], {}
    if context.dtypes[name] != context.dtypes[base]:
        same = [r for r in others if context.dtypes[r] == context.dtypes[name]]
        same = [r for r in same if judged.scored.get(r) and r in judged.steady]
        same = [r for r in same if _finite(r, judged)]  # float16 may overflow
        for other in same:
            seen += [judged.steady[other].floor, concatenate(judged.scored[other])]
        if not same:
            reasons["dtype"] = f"no baseline in {context.dtypes[name]} ran: the batch's effect only"
    floor = {
        "kl_mean": max(float(s.kl.mean()) for s in seen),
        "top1_agreement": min(float(s.agrees.mean()) for s in seen),
    }
    excess = {key: found[key] - value for key, value in floor.items()}
    return {"floor": {**floor, "reasons": reasons}, "excess": excess, "reasons": {}}


def _tier(found: Entry, itself: bool) -> Entry:
    """By the unfavourable end of every interval; of the baseline against ``itself`` none."""
    kl, ln_ppl = found["kl"]["ci"], found["ppl_ratio"]["ln_ci"]
    if found["failures"]:
        return {"tier": None, "reasons": {"tier": f"FAIL: {found['failures'][0]}"}}
    if itself:
        return {"tier": None, "reasons": {"tier": ITSELF}}
    if kl is None or ln_ppl is None:
        return {"tier": None, "reasons": {"tier": ONE_WINDOW}}
    floor_kl = found["floor"]["kl_mean"] if found["floor"] else 0.0
    made = tier(kl[1], found["top1_ci"][0], ln_ppl[1], floor_kl)
    provable = tier(kl[1], wilson(found["positions"], found["positions"])[0], ln_ppl[1], floor_kl)
    better = tier(kl[1], found["top1_agreement"], ln_ppl[1], floor_kl)
    few = better != made and better != provable
    return {"tier": made, "reasons": {"tier": _too_few(found, better)} if few else {}}


def _too_few(found: Entry, better: str) -> str:
    """What would be shown by more text, if all else stayed."""
    z2, share = NormalDist().inv_cdf((1 + LEVEL) / 2) ** 2, LIMITS[better].top1
    return (
        f"{found['positions']} positions cannot prove {better}: even without a difference it takes "
        f"{math.ceil(z2 * share / (1 - share))}"
    )
