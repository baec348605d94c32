"""What every arm is asked before anything is timed: the same text, the same prompts, twice.

Reference logits go from the baseline's worker to the others through one memory-mapped file, a
window at a time; what the answers are worth is in gate.py. Without a tokenizer the windows are
sampled from the baseline, so that perplexity means something with no text at all.

Shapes: W windows of S tokens, N = S - 1 predicted positions of a window, V vocabulary, P prompts.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from optpipe.bench.backend import Ids
from optpipe.bench.fidelity.divergence import Positions
from optpipe.bench.fidelity.questions import Compare, Greedy, Reference, Steadiness, Steady, Write
from optpipe.bench.fidelity.reference import references
from optpipe.bench.scenario import Cell, hash_ids, prompts
from optpipe.bench.worker import Command, Loaded, Worker
from optpipe.errors import InputError, StageError
from optpipe.stage import Progress

BUNDLED = Path(__file__).resolve().parents[2] / "demo" / "heldout.txt"
WINDOW, SAMPLED = 1024, 128
"""Tokens of a window: of text, and sampled from the baseline, which takes a step for each."""
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 8, 32, 32
"""What is continued greedily; all rows at once."""
FLOOR_TOKENS = 128
GREEDY_S = 8.0
"""An arm that takes longer for its greedy tokens is judged on those it has."""
TIERS = ("lossless", "near", "compressed")
NO_TEXT = "the model has no tokenizer, so there is no text it could predict"
LEAST_CHARACTERS = 64
ANSWER_S = 600.0
"""An arm that takes longer than this for one window has no quality."""


@dataclass(kw_only=True)
class QualityConfig:
    """On what text, how much of it, and what is asked of every artifact."""

    text: str | None = None
    """A UTF-8 file of held-out text; null: the one bundled with the demo model."""
    windows: int = 16
    """Windows of min(context, 1024) tokens, spread evenly over the text, not overlapping."""
    budget_s: float = 60.0
    """No further window is begun after this time; every arm always sees the same windows."""
    cache: str | None = None
    """Folder that keeps the baseline's logits for later runs, as of a sweep; null: none does."""
    required: str | None = None
    """The tier every artifact must reach, 'lossless', 'near' or 'compressed'; else exit code 3."""
    max_perplexity_increase: float | None = None
    """Largest accepted rise over the baseline, 0.1 for 10 %; more makes the exit code 3."""

    def __post_init__(self) -> None:
        least = 2 if self.required else 1  # a tier is shown by intervals; one window has none
        if self.windows < least:
            why = f"needed with bench.quality.required={self.required}"
            raise InputError(f"bench.quality.windows={self.windows}: at least {least} is {why}")
        if self.text is not None:
            _check_text(Path(self.text))
        if self.required is not None and self.required not in TIERS:
            raise InputError(
                f"bench.quality.required='{self.required}': allowed are null, {', '.join(TIERS)}"
            )
        if not 0 <= self.budget_s < math.inf:
            raise InputError(f"bench.quality.budget_s={self.budget_s}: at least 0 is needed")
        limit = self.max_perplexity_increase
        if limit is not None and not 0 <= limit < math.inf:
            raise InputError(f"bench.quality.max_perplexity_increase={limit}: at least 0 is needed")


@dataclass(frozen=True, kw_only=True)
class Windows:
    """The token ids all arms are judged on, (windows, tokens), and where they come from."""

    ids_WS: Ids
    source: Mapping[str, Any]
    is_text: bool
    """False: random ids, of which perplexity would mean nothing."""


@dataclass(kw_only=True)
class Judged:
    """The outcome for every arm."""

    scored: dict[str, list[Positions]] = field(default_factory=dict)
    """One entry a window."""
    steady: dict[str, Steadiness] = field(default_factory=dict)
    greedy: dict[str, Ids] = field(default_factory=dict)
    """Greedy tokens (steps, prompts) of the held-out prompts; end-of-text does not stop them."""
    missing: dict[str, str] = field(default_factory=dict)
    """Arms without quality, and why."""
    windows: int = 0
    """Windows every arm has seen."""
    stops: dict[str, frozenset[int]] = field(default_factory=dict)
    """The tokens that end a text, as each arm's own files name them."""
    faults: dict[str, list[str]] = field(default_factory=dict)
    """What is wrong with an arm's files beside its weights."""
    expected: dict[tuple[str, Cell], str] = field(default_factory=dict)
    """Hash of what an arm answers to the prompts of a cell that is timed later."""

    def add(self, later: Judged) -> None:
        """Take over another session; an arm that was in both keeps what it had."""
        self.windows = self.windows or later.windows
        for item in fields(self):
            mine, theirs = getattr(self, item.name), getattr(later, item.name)
            if isinstance(mine, dict):
                setattr(self, item.name, {**theirs, **mine})


def windows(folder: Path, config: QualityConfig, capacity: int, vocab: int, seed: int) -> Windows:
    """Windows of held-out text in the model's own tokens; random ids if it has no tokenizer."""
    from optpipe.text import has_tokenizer, leading, tokenize  # imports transformers

    if not has_tokenizer(folder):
        size = min(SAMPLED, capacity)
        ids_WS = np.random.default_rng([seed, size]).integers(0, vocab, (config.windows, size))
        reasons = dict.fromkeys(("text", "bos"), NO_TEXT)
        nothing = {"text": None, "bos": None, "reasons": reasons}
        return Windows(ids_WS=ids_WS, source={**_about(ids_WS), **nothing}, is_text=False)
    size = min(WINDOW, capacity)
    text_file = Path(config.text) if config.text else BUNDLED
    content = text_file.read_bytes()
    bos = leading(folder)
    ids_WS = cut(tokenize(folder, content.decode()), bos, size, config.windows)
    if ids_WS.max() >= vocab:
        raise InputError(
            f"the tokenizer in '{folder}' makes token {ids_WS.max()}, but the model's vocabulary "
            f"ends at {vocab - 1}"
        )
    source = {
        **_about(ids_WS),
        "text": text_file.name,
        "text_sha256": hashlib.sha256(content).hexdigest(),
        "bos": bos[0] if bos else None,
        "reasons": {} if bos else {"bos": "its tokenizer puts no token before a text"},
    }
    return Windows(ids_WS=ids_WS, source=source, is_text=True)


def prepare(
    workers: Mapping[str, Worker],
    loaded: Mapping[str, Loaded],
    folder: Path,
    config: QualityConfig,
    seed: int,
) -> Windows:
    """The windows of a run; the arm that holds the fewest tokens sets their size for all.

    ``workers``: the baseline first, if it is there; it writes the text where there is none.
    """
    smallest = min(loaded, key=lambda name: loaded[name].capacity)
    capacity, largest = loaded[smallest].capacity, max(told.capacity for told in loaded.values())
    vocab = min(told.vocab for told in loaded.values())
    found = windows(folder, config, capacity, vocab, seed)
    first = next(iter(workers.values()))
    if not found.is_text and not first.arm.artifact.lineage:
        found = sampled(first, found, seed)
    wanted = min(WINDOW if found.source["text"] else SAMPLED, largest)
    if found.ids_WS.shape[1] < wanted and capacity < wanted:
        why = f"'{smallest}' holds no more than {capacity} tokens, so no arm is judged on more"
        reasons = {**found.source["reasons"], "window": why}
        found = replace(found, source={**found.source, "reasons": reasons})
    return found


def sampled(worker: Worker, given: Windows, seed: int) -> Windows:
    """The same windows, but what follows their first token is the baseline's own text."""
    size = given.ids_WS.shape[1]
    command = Write(ids_BS=given.ids_WS[:, :1], tokens=size, seed=seed)
    ids_WS: Ids = worker.ask(command, "sampling text", ANSWER_S)
    source = {**given.source, **_about(ids_WS), "sampled_from": worker.arm.name}
    return replace(given, ids_WS=ids_WS, source=source, is_text=True)


def shortened(given: Windows, count: int) -> Windows:
    """The windows that all arms had time for, and the reason if they are not all."""
    if count == len(given.ids_WS):
        return given
    why = f"bench.quality.budget_s ended it after {count} of {len(given.ids_WS)} windows"
    reasons = {**given.source.get("reasons", {}), "windows": why}
    source = {**given.source, "reasons": reasons}
    return replace(given, ids_WS=given.ids_WS[:count], source=source)


def cut(ids: list[int], bos: list[int], size: int, most: int) -> Ids:
    """Up to ``most`` windows of ``size`` tokens, spread evenly, each beginning with ``bos``."""
    body = min(size - len(bos), len(ids))
    if body < 2:
        raise InputError(f"the held-out text has {len(ids)} tokens: nothing to predict")
    whole = len(ids) // body
    count = min(most, whole)
    starts = [index * whole // count * body for index in range(count)]
    return np.array([[*bos, *ids[start : start + body]] for start in starts], dtype=np.int64)


def judge(
    workers: Mapping[str, Worker],
    baseline: str | None,
    given: Windows,
    budget_s: float,
    progress: Progress,
    kept: Path | None = None,
) -> Judged:
    """Every arm on every window; ``baseline`` None: no arm to compare with. ``kept``: `keep_in`."""
    found = Judged(scored={name: [] for name in workers})
    started_s, total = time.perf_counter(), len(given.ids_WS)
    with references(kept) as files:
        for number, ids_S in enumerate(given.ids_WS):
            if number and time.perf_counter() - started_s > budget_s:
                break
            progress("benchmark: quality", number, total)
            with files.file(ids_S) as file:
                _window(workers, baseline, ids_S, file, found)
            found.windows += 1
    for number, name in enumerate(workers):
        progress("benchmark: greedy tokens", number, len(workers))
        if name not in found.missing:
            _behaviour(workers[name], name, given.ids_WS, found)
    progress("benchmark: quality", total, total)
    return found


def expect(workers: Mapping[str, Worker], cell: Cell, vocab: int, seed: int, found: Judged) -> None:
    """What each arm answers in a cell, so that the timed runs can be held against it."""
    ids_BS = prompts(cell, vocab, seed)
    greedy = Greedy(ids_BS=ids_BS, new_tokens=cell.new_tokens, limit_s=GREEDY_S)
    for name, worker in workers.items():
        if name in found.missing:
            continue
        made = _ask(worker, greedy, [name], found)
        if made is not None and len(made) == cell.new_tokens:
            found.expected[name, cell] = hash_ids(made)


def _window(
    workers: Mapping[str, Worker], baseline: str | None, ids_S: Ids, file: Path, found: Judged
) -> None:
    """Ask the baseline first, then the others."""
    for name in sorted(workers, key=lambda name: name != baseline):
        if name in found.missing:
            continue
        command = (
            Reference(ids_S=ids_S, file=file)
            if name == baseline
            else Compare(ids_S=ids_S, file=file if baseline else None)
        )
        lost = [*workers] if name == baseline else [name]  # no reference, no comparison
        answer = _ask(workers[name], command, lost, found)
        if answer is not None:
            found.scored[name].append(answer)


def _behaviour(worker: Worker, name: str, ids_WS: Ids, found: Judged) -> None:
    """Whether an arm repeats itself, and what it generates."""
    rows_BS = ids_WS[:PROMPTS, :FLOOR_TOKENS]
    prompts_PS = ids_WS[:PROMPTS, : min(PROMPT_TOKENS, ids_WS.shape[1] // 2)]
    new_tokens = min(NEW_TOKENS, ids_WS.shape[1] - prompts_PS.shape[1])
    # a batch of the baseline, in each dtype, is a floor; of other arms one row shows the repeat
    steady = Steady(ids_BS=rows_BS[:1] if worker.arm.artifact.lineage else rows_BS)
    greedy = Greedy(ids_BS=prompts_PS, new_tokens=new_tokens, limit_s=GREEDY_S)
    if (repeated := _ask(worker, steady, [name], found)) is not None:
        found.steady[name] = repeated
    if name not in found.missing and (made := _ask(worker, greedy, [name], found)) is not None:
        found.greedy[name] = made


def _ask(worker: Worker, command: Command, lost: Sequence[str], found: Judged) -> Any:
    """The answer; None if the arm did not give one, which costs those in ``lost`` their quality."""
    try:
        return worker.ask(command, "quality", ANSWER_S)
    except (TimeoutError, StageError) as error:
        worker.kill()
        why = f"'{worker.arm.name}' was ended as its quality was measured: {error}"
        found.missing |= dict.fromkeys(lost, why)
        return None


def _about(ids_WS: Ids) -> dict[str, Any]:
    size = ids_WS.shape[1]
    return {"window": size, "stride": size, "dtype": "float64", "ids_hash": hash_ids(ids_WS)}


def _check_text(file: Path) -> None:
    try:
        if len(file.read_text(encoding="utf-8")) < LEAST_CHARACTERS:
            raise InputError(f"bench.quality.text='{file}' is too short to predict anything")
    except UnicodeDecodeError as error:
        raise InputError(f"bench.quality.text='{file}' is not UTF-8 text") from error
    except OSError as error:
        raise InputError(f"bench.quality.text='{file}': {error.strerror}") from error
