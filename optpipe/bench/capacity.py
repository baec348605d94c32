"""What the KV cache of an arm has room for, by itself in the memory that was free at the start."""

from __future__ import annotations

from typing import Any

from optpipe.bench.scenario import Cell
from optpipe.bench.worker import Loaded

UNTOLD = "this runtime does not tell how it stores keys and values"
ON_CPU = "it runs on the CPU"
NO_DRIVER = "the driver tells no memory that is taken"


def entry(told: Loaded | None, free_bytes: int, why: str) -> dict[str, Any]:
    """``host_bytes``, ``device_bytes`` and ``kv_cache`` of an artifact; ``why``: it was not loaded.

    ``room_bytes``: of the ``free_bytes``, what loading leaves; null where a pool is part of that.
    """
    kv = None if told is None else told.kv
    empty = dict.fromkeys(("bytes_per_token", "capacity_tokens", "room_bytes"))
    host, device = (None, None) if told is None else (told.host_bytes, told.device_bytes)
    no_device = ON_CPU if told and told.gpu is None else NO_DRIVER
    nulls = {"host_bytes": why or UNTOLD, "device_bytes": why or no_device}
    found: dict[str, Any] = {"host_bytes": host, "device_bytes": device}
    reasons = {key: reason for key, reason in nulls.items() if found[key] is None}
    if told is None or kv is None:
        return {**found, "kv_cache": {**empty, "reasons": dict.fromkeys(empty, why or UNTOLD)},
                "reasons": reasons}  # fmt: skip
    room = None if kv.pool_tokens is not None else room_bytes(told, free_bytes)
    cache = {
        "bytes_per_token": kv.token_bytes,
        "capacity_tokens": kv.capacity_tokens(room or 0),
        "room_bytes": room,
        "reasons": {} if room is not None else {"room_bytes": "its memory was taken at loading"},
    }
    return {**found, "kv_cache": cache, "reasons": reasons}


def sequences(
    told: Loaded | None, cell: Cell, free_bytes: int, why: str
) -> tuple[int | None, dict[str, str]]:
    """Most rows of the length of a cell at once, or why that is not known."""
    if told is None or told.kv is None:
        return None, {"max_sequences": why or UNTOLD}
    if (refusal := told.refuses(1, cell.tokens)) is not None:
        return None, {"max_sequences": refusal}
    return told.kv.sequences(cell.tokens, room_bytes(told, free_bytes), told.max_batch), {}


def room_bytes(told: Loaded, free_bytes: int) -> int:
    """What is left once it is loaded: of the memory of the device it runs on."""
    held = told.host_bytes if told.gpu is None else told.device_bytes
    return max(free_bytes - (told.weight_bytes if held is None else held), 0)
