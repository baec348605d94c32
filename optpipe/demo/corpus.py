"""The demo's texts: Python sources that every machine with optpipe has; and its tokenizer."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"
"""Stands between two files, in training as in the bundled texts."""

VOCABULARY = 4096
"""Tokens, END included; no other dimension of the model has this size."""

HELD_BYTES = 256 * 1024
"""The held-out and the calibration text stop with the file that reaches this size."""

PACKAGES = ("torch", "transformers", "sympy", "networkx", "numpy", "modelopt", "onnx",
            "huggingface_hub")  # fmt: skip
"""What optpipe installs and whose licences (BSD, Apache-2.0) allow it; for training alone."""

LARGEST_HELD = 32 * 1024
"""A larger file is never held out, bytes: it alone would be a good part of the text."""


@dataclass(frozen=True)
class Corpus:
    """Lists of whole files that share no file; ``dropped`` counts near-duplicates."""

    train: list[str]
    """Of the standard library, as are the two texts that are kept from training."""
    packages: list[str]
    heldout: list[str]
    calibration: list[str]
    dropped: int


def read_sources(stdlib: Path) -> dict[str, str]:
    """Source text by path relative to ``stdlib``, in sorted order; code only, not data."""
    texts: dict[str, str] = {}
    for path in sorted(stdlib.rglob("*.py")):
        name = path.relative_to(stdlib).as_posix()
        if _is_vendored_or_data(name):
            continue
        try:
            text = path.read_text(encoding="utf-8").strip() + "\n"
        except UnicodeDecodeError:  # a test of the interpreter's own decoding
            continue
        if _reads_as_code(text):
            texts[name] = text
    return texts


def read_packages(site: Path) -> dict[str, str]:
    """Source text of PACKAGES, which lie in ``site``, by path relative to it.

    Raises FileNotFoundError if one is not there.
    """
    texts: dict[str, str] = {}
    for package in PACKAGES:
        if not (site / package).is_dir():
            raise FileNotFoundError(f"no package {package} in {site}")
        texts |= {f"{package}/{k}": text for k, text in read_sources(site / package).items()}
    return texts


def _is_vendored_or_data(name: str) -> bool:
    """Installed packages, code pages, generated documentation and folders of test data."""
    folders = name.split("/")[:-1]
    left_out = {"site-packages", "encodings", "pydoc_data"}
    return (
        any(folder in left_out or folder.endswith("data") for folder in folders)
        or name.startswith(("config-", "_sysconfigdata"))  # generated when Python was built
    )


def _reads_as_code(text: str) -> bool:
    """Not a stub, a table of numbers or an escaped blob; thresholds are shares of characters."""
    letters = sum(map(str.isalpha, text)) / len(text)
    digits = sum(map(str.isdigit, text)) / len(text)
    return len(text) >= 1500 and letters >= 0.40 and digits <= 0.10 and END not in text


def split(texts: dict[str, str], packages: dict[str, str], seed: int) -> Corpus:
    """Deals ``texts`` by a seeded hash of their paths: held-out, calibration, training.

    A file that repeats passages of those held out is dropped, so that neither text leaks; so is
    a file of ``packages`` that repeats another one of them.
    """
    names = sorted(texts, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    heldout, rest = _take_first([texts[name] for name in names])
    calibration, rest = _take_first(_unlike(heldout, rest))
    train = _unlike(heldout + calibration, rest)
    others = _distinct(_unlike(heldout + calibration, list(packages.values())))
    kept = len(heldout) + len(calibration) + len(train) + len(others)
    return Corpus(train, others, heldout, calibration, len(texts) + len(packages) - kept)


def _take_first(texts: list[str]) -> tuple[list[str], list[str]]:
    """The first files, none too large, that reach HELD_BYTES; and all others."""
    taken: list[str] = []
    rest: list[str] = []
    size = 0
    for text in texts:
        here = len(text.encode())
        if size < HELD_BYTES and here <= LARGEST_HELD:
            taken.append(text)
            size += here
        else:
            rest.append(text)
    return taken, rest


def _unlike(held: list[str], texts: list[str]) -> list[str]:
    """Those of ``texts`` that share at most a tenth of their passages with ``held``."""
    known = set[int]().union(*map(passages, held))
    shares = ((text, passages(text)) for text in texts)
    return [text for text, own in shares if len(own & known) <= 0.1 * len(own)]


def _distinct(texts: list[str]) -> list[str]:
    """Those that share at most three tenths of their passages with the ones before."""
    known: set[int] = set()
    kept: list[str] = []
    for text in texts:
        own = passages(text)
        if len(own & known) <= 0.3 * len(own):
            kept.append(text)
            known |= own
    return kept


def passages(text: str) -> set[int]:
    """Hashes of every three consecutive non-blank lines: what a near-duplicate shares."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return {hash(passage) for passage in zip(lines, lines[1:], lines[2:], strict=False)}


def joined(texts: list[str]) -> str:
    """One text of many files, END before each but the first."""
    return END.join(texts)


def fingerprint(texts: Corpus) -> str:
    """SHA-256 of all parts: equal when two machines hold the same library and packages."""
    parts = (texts.train, texts.packages, texts.heldout, texts.calibration)
    return hashlib.sha256(END.join(map(joined, parts)).encode()).hexdigest()


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text has tokens and decodes to itself."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer, length=len(texts))
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END, model_max_length=1024
    )
