"""Tasks of lm-evaluation-harness on any artifact that a backend opens.

    python -m optpipe.evaluate outputs/store/build-KEY --tasks next_line

Likelihoods are sums of float64 log-softmax over the whole vocabulary. Generation is greedy.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from math import comb
from pathlib import Path
from typing import Any

import numpy as np

from optpipe.artifact import MANIFEST, Artifact
from optpipe.bench.backend import Backend, Ids, open_backend
from optpipe.bench.machine import usable_cores
from optpipe.errors import InputError, one_line

BUNDLED = Path(__file__).resolve().parent / "demo" / "tasks"
ANSWER_TOKENS = 256
"""Generated where a task does not say how many."""
NO_ERROR = "lm-evaluation-harness gives no standard error of this metric"
Entry = dict[str, Any]
Scored = tuple[float, bool]
Stop = Callable[[list[int]], bool]


@dataclass(kw_only=True)
class EvalConfig:
    """Which tasks, and how much of them."""

    tasks: list[str] = field(default_factory=lambda: ["next_line"])
    """Names from the folder's task files, or of lm-evaluation-harness, which fetch their data."""
    folder: str | None = None
    """Task files; their data files are relative to it. null: the bundled ones."""
    limit: int | None = None
    """Documents of each task; null: all."""

    def __post_init__(self) -> None:
        if not self.tasks:
            raise InputError("eval.tasks=[]: at least one is needed")
        if self.limit is not None and self.limit < 1:
            raise InputError(f"eval.limit={self.limit}: at least 1, or null for all")

    @property
    def path(self) -> Path:
        return Path(self.folder).resolve() if self.folder else BUNDLED


def task_manager(config: EvalConfig) -> Any:
    """An lm_eval TaskManager that knows the tasks. Raises InputError if one is unknown."""
    if find_spec("lm_eval") is None:
        raise InputError("eval needs lm-evaluation-harness: pip install 'optpipe[eval]'")
    if not config.path.is_dir():
        raise InputError(f"eval.folder='{config.folder}' is no folder")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(config.path), include_defaults=False)
    if set(config.tasks) <= set(manager.all_tasks):
        return manager
    here, manager = manager.all_tasks, TaskManager(include_path=str(config.path))  # half a minute
    if unknown := sorted(set(config.tasks) - set(manager.all_tasks)):
        raise InputError(
            f"eval.tasks: no task '{unknown[0]}' in '{config.path}' ({', '.join(here) or 'none'}) "
            "nor in lm-evaluation-harness"
        )
    return manager


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """A command to a worker: run the tasks; ``tokenizer`` is a folder that holds one."""

    config: EvalConfig
    tokenizer: Path

    def __call__(self, backend: Backend) -> Entry:
        from lm_eval import simple_evaluate

        from optpipe.harness import Harness
        from optpipe.text import load_tokenizer

        manager = task_manager(self.config)
        lm = Harness(Scorer(backend), load_tokenizer(self.tokenizer))
        with contextlib.chdir(self.config.path), contextlib.redirect_stderr(io.StringIO()):
            found = simple_evaluate(
                model=lm,
                tasks=list(self.config.tasks),
                task_manager=manager,
                limit=self.config.limit,
                bootstrap_iters=1000,  # of metrics whose standard error has no formula
            )
        return {task: _result(found, task) for task in found["results"]}


@dataclass(frozen=True)
class Scorer:
    """What evaluation asks of a backend, on token ids."""

    backend: Backend

    def loglikelihood(self, context: Sequence[int], continuation: Sequence[int]) -> Scored:
        """ln P(continuation | context), and whether greedy decoding would give it.

        Where both do not fit, the beginning of the context is cut off. The context must hold a
        token. Raises InputError for a continuation that does not fit by itself.
        """
        assert context
        if len(continuation) > self.backend.capacity:
            raise InputError(
                f"a continuation of {len(continuation)} tokens does not fit in the context of "
                f"{self.backend.capacity}"
            )
        if not continuation:
            return 0.0, True
        ids = [*context, *continuation][-(self.backend.capacity + 1) :]
        targets_N: Ids = np.asarray(continuation, dtype=np.int64)
        given = np.array([ids[:-1]], dtype=np.int64)
        logits_NV = self.backend.score(given)[0, -len(targets_N) :].astype(np.float64)
        greedy = bool((logits_NV.argmax(-1) == targets_N).all())
        logits_NV -= logits_NV.max(-1, keepdims=True)
        log_z_N = np.log(np.exp(logits_NV).sum(-1))
        return float((logits_NV[np.arange(len(targets_N)), targets_N] - log_z_N).sum()), greedy

    def generate(self, context: Sequence[int], most: int, stop: Stop) -> list[int]:
        """Greedy tokens, at most ``most``, up to and with the one after which ``stop`` says so."""
        room = self.backend.capacity - most
        if room < 1:
            raise InputError(
                f"{most} new tokens leave no room for a prompt in the context of "
                f"{self.backend.capacity}; give the task a smaller max_gen_toks"
            )
        given = np.array([context[-room:]], dtype=np.int64)
        logits_BV = self.backend.prefill(given, np.array([given.shape[1]]))
        tokens = [int(logits_BV[0].argmax())]
        while len(tokens) < most and not stop(tokens):
            logits_BV = self.backend.decode(np.array([tokens[-1]], dtype=np.int64))
            tokens.append(int(logits_BV[0].argmax()))
        return tokens


def compare(base: Mapping[str, Entry], own: Mapping[str, Entry]) -> Entry:
    """For each metric of each task the documents that became right and wrong, and McNemar's p.

    It tests that both kinds of change are equally likely, on the documents that changed alone.
    Metrics that are not right or wrong for a document, such as F1, have none.
    """
    return {
        task: {metric: _changes(base[task]["correct"][metric], now) for metric, now in of.items()}
        for task, of in ((task, told["correct"]) for task, told in own.items())
    }


def _changes(before: Sequence[float], now: Sequence[float]) -> Entry:
    pairs = [*zip(before, now, strict=True)]
    better, worse = sum(b < n for b, n in pairs), sum(b > n for b, n in pairs)
    return {"became_right": better, "became_wrong": worse, "mcnemar_p": mcnemar(better, worse)}


def mcnemar(better: int, worse: int) -> float:
    """Two-sided exact p-value of so many changes either way (McNemar 1947, binomial form)."""
    changes = better + worse
    tail = sum(comb(changes, k) for k in range(min(better, worse) + 1))
    return min(2 * tail / (1 << changes), 1.0)


def _result(found: Mapping[str, Any], task: str) -> Entry:
    """The metrics of one task with standard errors, and by which of them a document was right."""
    metrics: Entry = {}
    correct: Entry = {}
    rows = found["samples"].get(task, [])
    for key, value in found["results"][task].items():
        name, _, filtered = key.partition(",")
        if not filtered or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = found["results"][task].get(f"{name}_stderr,{filtered}")
        known = isinstance(error, int | float)
        shown = name if filtered == "none" else key
        metrics[shown] = {
            "value": value,
            "stderr": error if known else None,
            "reasons": {} if known else {"stderr": NO_ERROR},
        }
        each = [row[name] for row in rows if row["filter"] == filtered and name in row]
        if each and set(each) <= {0, 1}:
            correct[shown] = [float(one) for one in each]
    documents = len({row["doc_id"] for row in rows})
    return {"metrics": metrics, "documents": documents, "correct": correct}


def main() -> int:
    """Evaluate one artifact and print the results as JSON; 2 for wrong input."""
    parser = argparse.ArgumentParser(prog="python -m optpipe.evaluate", description=__doc__)
    parser.add_argument("artifact", type=Path, help="its folder in the store, or a model's")
    parser.add_argument("--tasks", nargs="+", default=["next_line"], metavar="NAME")
    parser.add_argument("--folder", help="of task files; default: the bundled ones")
    parser.add_argument("--limit", type=int, help="documents of each task")
    parser.add_argument("--dtype", default="float32", help="of a torch artifact")
    given = parser.parse_args()
    try:
        config = EvalConfig(tasks=given.tasks, folder=given.folder, limit=given.limit)
        task_manager(config)
        artifact = (
            Artifact.load(given.artifact) if _made(given.artifact) else _model(given.artifact)
        )
        with open_backend(artifact, usable_cores(), given.dtype) as backend:
            found = Evaluate(config=config, tokenizer=artifact.path.resolve())(backend)
    except (InputError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=1, allow_nan=False))
    return 0


def _made(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def _model(folder: Path) -> Artifact:
    return Artifact(path=folder, format="hf", key="")


if __name__ == "__main__":
    sys.exit(main())
