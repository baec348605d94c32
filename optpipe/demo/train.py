"""Trains the bundled model from the running interpreter's standard library and packages.

``python -m optpipe.demo.train --out DIR`` writes everything the folder of a Hugging Face model
needs, the two texts and the model card; ``--help`` lists the rest.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import shlex
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from optpipe.demo import corpus
from optpipe.demo.muon import Muon

CONTEXT = 1024
"""Tokens the model sees at once, and the length of an evaluation window."""


def build_model() -> LlamaForCausalLM:
    """7.3 M random weights; residual branches start at zero, so depth costs no stability."""
    config = LlamaConfig(
        vocab_size=corpus.VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config)
    # Named here alone: in the configuration it would keep END's embedding from training.
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.zeros_(weight)
    return model


def token_loss(model: LlamaForCausalLM, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood, nats, of ``targets`` after ``inputs``, both (rows, length)."""
    hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
    return F.cross_entropy(model.lm_head(hidden).flatten(0, 1).float(), targets.flatten())


@torch.inference_mode()
def perplexity(model: LlamaForCausalLM, ids: Tensor, count: int | None = None) -> float:
    """Over the first ``count`` whole windows of CONTEXT tokens of ``ids`` (tokens,), or all."""
    windows = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)[:count].long().to(model.device)
    losses = [token_loss(model, w[:, :-1], w[:, 1:]).item() for w in windows.split(1)]
    return math.exp(sum(losses) / len(losses))


def epoch_windows(files: list[Tensor], seed: int) -> Tensor:
    """All tokens of ``files``, shuffled by file, cut at a random phase, shuffled: (rows, 1025)."""
    random = torch.Generator().manual_seed(seed)
    stream = torch.cat([files[i] for i in torch.randperm(len(files), generator=random).tolist()])
    phase = int(torch.randint(CONTEXT, (1,), generator=random))
    # The same number whatever the phase, so that a row's number alone says where it is.
    count = (len(stream) - CONTEXT - 1) // CONTEXT
    rows = stream[phase:].unfold(0, CONTEXT + 1, CONTEXT)[:count]
    return rows[torch.randperm(count, generator=random)]


@dataclass
class Plan:
    """What a run may spend and how; progress is the larger share of the two budgets."""

    minutes: float
    tokens: float
    batch: int
    lr: float
    weight_decay: float
    report: float
    compile: bool
    seed: int

    def progress(self, seconds: float, tokens: int) -> float:
        """0 at the start, 1 when the time or the tokens are spent."""
        return max(seconds / (60 * self.minutes), tokens / self.tokens)

    def rate(self, progress: float) -> float:
        """Learning rate as a share of its peak: 3 % warm-up, then a line to zero."""
        return min(progress / 0.03 + 0.01, 1 - progress)


class Trainer:
    """The model, its two optimizers and what has been spent so far."""

    def __init__(self, plan: Plan, device: str, checkpoint: Path):
        torch.manual_seed(plan.seed)
        self.plan, self.device, self.checkpoint = plan, torch.device(device), checkpoint
        self.model = build_model()
        torch.nn.Module.to(self.model, self.device)
        matrices = [p for p in self.model.model.layers.parameters() if p.ndim == 2]
        others = [p for p in self.model.parameters() if all(p is not m for m in matrices)]
        self.muon = Muon(matrices, plan.weight_decay)
        self.adam = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0)
        self.tokens, self.seconds = 0, 0.0
        self.loss: Callable[..., Tensor] = token_loss
        if plan.compile:
            self.loss = torch.compile(token_loss, dynamic=False)

    def save(self) -> None:
        """Replaces the checkpoint in one move, so that a kill leaves a whole one."""
        state = {
            "model": self.model.state_dict(),
            "adam": self.adam.state_dict(),
            "muon": self.muon.buffers,
            "spent": (self.tokens, self.seconds),
        }
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.checkpoint)

    def load(self) -> None:
        """Continues from the checkpoint."""
        state = torch.load(self.checkpoint, map_location=self.device)
        self.model.load_state_dict(state["model"])
        self.adam.load_state_dict(state["adam"])
        self.muon.buffers = state["muon"]
        self.tokens, self.seconds = state["spent"]

    def step(self, rows: Tensor, progress: float) -> float:
        """One update on ``rows`` (n, CONTEXT + 1); the loss."""
        rows = rows.long().to(self.device)
        inputs, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = self.loss(self.model, inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        lr = self.plan.lr * self.plan.rate(progress)
        self.adam.param_groups[0]["lr"] = 0.5 * lr
        self.adam.step()
        self.muon.step(lr)
        self.model.zero_grad()
        return loss.item()

    def run(self, files: list[Tensor], validation: Tensor) -> None:
        """Trains on ``files`` (token numbers, END last) until a budget is spent."""
        rows = self.plan.batch // CONTEXT
        per_epoch = (sum(map(len, files)) - CONTEXT - 1) // CONTEXT // rows
        start = shown = time.monotonic()
        start -= self.seconds
        epoch, windows = -1, torch.empty(0)
        while (progress := self.plan.progress(self.seconds, self.tokens)) < 1:
            wanted, index = divmod(self.tokens // self.plan.batch, per_epoch)
            if wanted != epoch:
                epoch, windows = wanted, epoch_windows(files, self.plan.seed + wanted)
            loss = self.step(windows[index * rows : (index + 1) * rows], progress)
            self.tokens += self.plan.batch
            self.seconds = time.monotonic() - start
            if time.monotonic() - shown > self.plan.report:
                shown = time.monotonic()
                self.save()
                score = perplexity(self.model, validation, 16)
                print(
                    f"{progress:6.1%} {self.tokens:11,} tokens {self.seconds:6.0f} s"
                    f" loss {loss:.3f} calibration-text perplexity {score:.2f}",
                    flush=True,
                )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[Tensor]:
    """The token numbers of each text, in parallel."""
    encoded = tokenizer.backend_tokenizer.encode_batch(texts)
    return [torch.tensor(one.ids, dtype=torch.int32) for one in encoded]


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Writes float16 weights, configuration and tokenizer, each file in one move."""
    with tempfile.TemporaryDirectory(dir=out) as partial:
        model.half().save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        for path in Path(partial).iterdir():
            path.chmod(0o644)  # safetensors writes for the owner alone
            os.replace(path, out / path.name)


def write_card(facts: dict[str, Any], out: Path) -> None:
    """Puts ``facts`` into the front matter of the model card: the only place that holds them."""
    text = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    for key, value in facts.items():
        line = re.search(rf"(?m)^{key}: .*$", text)
        if line is None:
            raise ValueError(f"the model card has no front-matter line {key!r}")
        text = f"{text[: line.start()]}{key}: {json.dumps(value)}{text[line.end() :]}"
    (out / "README.md").write_text(text, encoding="utf-8")


def hardware(device: torch.device) -> str:
    """What the run's speed depends on, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} threads of {platform.machine()} CPU"


def parse_arguments() -> argparse.Namespace:
    """The command line; whichever of the two budgets is spent first ends the run."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("outputs/demo"))
    add("--stdlib", type=Path, default=Path(sysconfig.get_path("stdlib")))
    add("--site", type=Path, default=Path(sysconfig.get_path("purelib")), help="where packages lie")
    add("--repeat", type=int, default=3, help="times the library is shown for once the packages")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--minutes", type=float, default=math.inf, help="of training, compilation included")
    add("--tokens", type=float, default=400e6, help="shown to the model, repeats included")
    add("--batch", type=int, default=16384, help="tokens per step, a multiple of 1024")
    add("--lr", type=float, default=0.01, help="peak for matrices; half of it for the rest")
    add("--weight-decay", type=float, default=0.1, help="of matrices")
    add("--report", type=float, default=60, help="seconds between checkpoints and progress lines")
    add("--compile", action=argparse.BooleanOptionalAction, default=True)
    add("--seed", type=int, default=0)
    add("--resume", action="store_true", help="continue from the checkpoint in --out, if any")
    return parser.parse_args()


def main() -> None:
    """Texts, tokenizer, training, export, evaluation of what was exported, model card."""
    arguments = parse_arguments()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    packages = corpus.read_packages(arguments.site)
    texts = corpus.split(corpus.read_sources(arguments.stdlib), packages, arguments.seed)
    tokenizer = corpus.train_tokenizer(texts.train)
    tokenizer.save_pretrained(out)
    held = {"heldout": texts.heldout, "calibration": texts.calibration}
    for name, files in held.items():
        (out / f"{name}.txt").write_text(corpus.joined(files), encoding="utf-8", newline="\n")
    heldout, calibration = encode(tokenizer, [corpus.joined(files) for files in held.values()])

    plan = Plan(**{field.name: getattr(arguments, field.name) for field in fields(Plan)})
    trainer = Trainer(plan, arguments.device, out / "checkpoint.pt")
    if arguments.resume and trainer.checkpoint.exists():
        trainer.load()
    library, others = (
        encode(tokenizer, [text + corpus.END for text in part])
        for part in (texts.train, texts.packages)
    )
    trainer.run(library * arguments.repeat + others, calibration)

    export(trainer.model, tokenizer, out)
    model = trainer.model.float()  # from the float16 values just written
    facts = {
        "heldout_perplexity": round(perplexity(model, heldout), 4),
        "heldout_perplexity_4_windows": round(perplexity(model, heldout, 4), 4),
        "heldout_bytes_per_token": round(len(corpus.joined(texts.heldout)) / len(heldout), 4),
        "training_tokens": sum(map(len, library + others)),
        "tokens_seen": trainer.tokens,
        "training_minutes": round(trainer.seconds / 60, 1),
        "hardware": hardware(trainer.device),
        "texts_sha256": corpus.fingerprint(texts),
        "command": shlex.join(["python", "-m", "optpipe.demo.train", *sys.argv[1:]]),
    }
    write_card(facts, out)
    trainer.checkpoint.unlink(missing_ok=True)
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
