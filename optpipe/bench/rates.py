"""Rates of a cell without a server: other words for its times, by which other tools call them.

With B rows of n tokens in and m out, all of which decode from the first token to the last:

    a user's rate        1 / TPOT; m / E2E with the wait for the first token in it
    decode               B / TPOT: B (m - 1) tokens from the first to the last
    requests, all tokens B / E2E; B (n + m) / E2E
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import sub

from optpipe.bench.evidence.statistics import median
from optpipe.bench.scenario import Cell
from optpipe.bench.timed.clock import NO_STAMPS, ONE_TOKEN
from optpipe.bench.timed.samples import Sample

Values = dict[str, float | None]
OF_DECODING = ("user_tokens_per_s", "decode_tokens_per_s", "icl_max_s")
NAMES = (*OF_DECODING, "user_e2e_tokens_per_s", "requests_per_s", "total_tokens_per_s",
         "prefill_tokens_per_s")  # fmt: skip


def entry(
    samples: Sequence[Sample], cell: Cell, values: Mapping[str, float | None], why: str
) -> tuple[Values, dict[str, str]]:
    """NAMES, from the published ``values`` of a cell; ``why`` there is nothing, if so.

    ``icl_max_s`` is the longest wait for a token, the median over iterations; prompt tokens are
    counted by the device's own time where it has events.
    """
    tpot_s, tokens_per_s, e2e_s = (values[k] for k in ("tpot_s", "tokens_per_s", "e2e_s"))
    prefills = [s.device_s[0] if s.device_s else s.metrics["prefill_s"] for s in samples]
    waits = [max(map(sub, s.token_ns[1:], s.token_ns)) / 1e9 for s in samples if s.token_ns[1:]]
    fed, new = cell.batch * cell.prompt_tokens, cell.new_tokens
    found: Values = {
        "user_tokens_per_s": 1 / tpot_s if tpot_s else None,
        "decode_tokens_per_s": cell.batch / tpot_s if tpot_s else None,
        "icl_max_s": median(waits) if waits else None,
        "user_e2e_tokens_per_s": new / e2e_s if e2e_s else None,
        "requests_per_s": tokens_per_s / new if tokens_per_s else None,
        "total_tokens_per_s": tokens_per_s * cell.tokens / new if tokens_per_s else None,
        "prefill_tokens_per_s": median([fed / t for t in prefills if t]) if any(prefills) else None,
    }
    reasons = dict.fromkeys(NAMES, why or NO_STAMPS)
    if new == 1:
        reasons |= dict.fromkeys(OF_DECODING, why or ONE_TOKEN)
    return found, {name: reasons[name] for name, value in found.items() if value is None}
