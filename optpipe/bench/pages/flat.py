"""A report as one flat table for spreadsheets: a row for every artifact in every cell."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from typing import IO, Any

from optpipe.bench.pages import tasks
from optpipe.bench.serving.request import LIMITS

FROM_ARTIFACT = ("name", "stage", "format", "dtype", "device", "key", "bytes", "weight_bytes",
                 "load_s", "made_s", "host_bytes", "device_bytes")  # fmt: skip
FROM_COLD = ("starts", "import_s", "first_request_s")
FROM_KV = ("bytes_per_token", "capacity_tokens")
FROM_QUALITY = ("perplexity", "kl_mean", "top1_agreement", "tier")
FROM_CELL = ("scenario", "batch", "prompt_tokens", "new_tokens", "blocks", "ttft_s", "queue_s",
             "prefill_s", "tpot_s", "e2e_s", "tokens_per_s", "peak_bytes", "cpu_s", "device_s",
             "prefill_device_s", "host_gap_s", "user_tokens_per_s", "user_e2e_tokens_per_s",
             "decode_tokens_per_s",
             "steady_tokens_per_s", "total_tokens_per_s", "prefill_tokens_per_s", "requests_per_s",
             "icl_max_s", "max_sequences", "arrivals", "rate_per_s", "goodput_per_s", "good_share",
             "failed", "ttft_sched_s")  # fmt: skip
FROM_ENERGY = ("j_per_token", "j_per_request", "j_per_token_above_idle",
               "j_per_request_above_idle")  # fmt: skip
SPEEDUPS = ("ttft_s", "tpot_s", "e2e_s", "tokens_per_s", "goodput_per_s", "peak_bytes", "bytes")
Row = dict[str, Any]


def rows(report: Mapping[str, Any]) -> Iterator[Row]:
    """What is missing is None, an empty field in CSV."""
    measured = {key: None for artifact in report["artifacts"] for key in tasks.values(artifact)}
    for artifact in report["artifacts"]:
        for cell in artifact["cells"]:
            yield {
                **{key: artifact.get(key) for key in FROM_ARTIFACT},
                **{key: (artifact.get("cold") or {}).get(key) for key in FROM_COLD},
                **{f"kv_{key}": (artifact.get("kv_cache") or {}).get(key) for key in FROM_KV},
                **{key: artifact["quality"].get(key) for key in FROM_QUALITY},
                **{key: cell.get(key) for key in FROM_CELL},
                **{key: (cell.get("energy") or {}).get(key) for key in FROM_ENERGY},
                **{
                    f"kept_{key}": ((cell.get("slo_kept") or {}).get(key) or {}).get("share")
                    for key in LIMITS
                },
                **_speedups(cell["speedup"]),
                **measured,
                **tasks.values(artifact),
            }


def write(report: Mapping[str, Any], stream: IO[str]) -> None:
    """CSV with a header."""
    given = [*rows(report)]
    writer = csv.DictWriter(stream, fieldnames=[*given[0]], lineterminator="\n")
    writer.writeheader()
    writer.writerows(given)


def _speedups(speedup: Mapping[str, Any]) -> Row:
    found: Row = {}
    for key in SPEEDUPS:
        entry = speedup.get(key) or {}
        low, high = entry.get("ci") or (None, None)
        found |= {f"{key}_speedup": entry.get("ratio"), f"{key}_speedup_low": low,
                  f"{key}_speedup_high": high, f"{key}_verdict": entry.get("verdict")}  # fmt: skip
    return found
