"""In which order methods may change one layer, and why in no other: declared once, for all stages.

    structure -> factorize -> prune -> rotate, fold -> quantize -> correct

Published results and ours agree on it: what is removed is removed before it is rounded (Harma et
al. 2024, arXiv:2405.20935), and a correction comes last. Recovery keeps every form, so it may stand
after any of them; it trains a pruned layer best before that is quantized. A correction makes up for
what was lost since weights were last folded, trained or cut. Layers are judged one by one: some may
be pruned while others are factorized.
"""

from __future__ import annotations

from collections.abc import Container

from optpipe.linear import Form, Layers

FACTOR, PRUNED, QUANTIZED, CORRECTED = "factor", "pruned", "quantized", "corrected"
_FIRST = "structured pruning comes before everything else, on a dense model"
_LAST = "the correction is that of the weight as it was, so correct last"

REASONS: dict[str, dict[str, str]] = {
    "structure": dict.fromkeys((FACTOR, PRUNED, QUANTIZED, CORRECTED), _FIRST),
    "factorize": {
        FACTOR: "factorize once",
        PRUNED: "two factors would lose its mask, so factorize before that",
        QUANTIZED: "factorize before that",
        CORRECTED: _LAST,
    },
    "prune": {PRUNED: "prune once", QUANTIZED: "prune before that", CORRECTED: _LAST},
    "rotate": {
        PRUNED: "a rotation would fill its zeros, so rotate before pruning or leave one out",
        QUANTIZED: "rotate before that",
        CORRECTED: _LAST,
    },
    "fold": {QUANTIZED: "fold before that", CORRECTED: _LAST},
    "quantize": {QUANTIZED: "quantize once", CORRECTED: _LAST},
    "correct": {CORRECTED: "correct once"},
}
"""What each step refuses to find a layer as, and why. All else it takes."""


def check(step: str, layers: Layers, names: Container[str] | None = None) -> None:
    """Raise ValueError if ``step`` may not change one of these layers, all by default, any more."""
    for name in layers:
        if names is not None and name not in names:
            continue
        for state, words in states(name, layers[name], layers):
            if (reason := REASONS[step].get(state)) is not None:
                raise ValueError(f"layer '{name}' is {words}; {reason}")


def states(name: str, form: Form, layers: Layers) -> list[tuple[str, str]]:
    """What was done to a layer so far, each with words for a message."""
    found = []
    if form.bits is not None:
        found.append((QUANTIZED, f"quantized already, to {form.bits} bits"))
    if form.pattern is not None:
        found.append((PRUNED, f"pruned already ({form.pattern})"))
    if name.endswith((".left", ".right")):
        found.append((FACTOR, "a factor already"))
    if f"{layer_of(name)}.residual.left" in layers or ".residual." in name:
        found.append((CORRECTED, "corrected already"))
    return found


def layer_of(name: str) -> str:
    """The layer that a factor, or a layer that is none, belongs to."""
    return name.removesuffix(".right").removesuffix(".left")


def check_lost(planned: Layers, layers: Layers, rewritten: Layers, stage: str) -> None:
    """Raise ValueError if a layer that is to be corrected is as ``stage`` left it.

    What it lost before is not known any more: that stage folded, trained or cut its weight.
    """
    for name, form in layers.items():
        added = f"{layer_of(name)}.residual.left"
        if added in planned and added not in layers and rewritten.get(name) == form:
            raise ValueError(
                f"layer '{name}' is as stage '{stage}' left it, which rewrites weights, so that "
                "what it lost before is not known; correct before that, or compress after it"
            )
