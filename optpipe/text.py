"""Text to token ids, with the tokenizer that lies in a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from optpipe.errors import InputError, one_line


def has_tokenizer(folder: Path) -> bool:
    kinds = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
    return any(all((folder / name).is_file() for name in kind) for kind in kinds)


def no_tokenizer(folder: Path) -> str:
    return f"model '{folder}' has no tokenizer"


def tokenize(folder: Path, text: str) -> list[int]:
    """Token ids without special tokens. Raises InputError if the folder has no tokenizer."""
    if not has_tokenizer(folder):
        raise InputError(no_tokenizer(folder))
    tokenizer = load_tokenizer(folder)
    # a whole text is longer than any context; we cut it into windows ourselves
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def leading(folder: Path) -> list[int]:
    """What the tokenizer puts before every text: the begin-of-text token, or nothing."""
    tokenizer = load_tokenizer(folder)
    ids: list[int] = tokenizer("")["input_ids"]
    bos: int | None = tokenizer.bos_token_id
    return ids[:1] if bos is not None and ids[:1] == [bos] else []


def save_fast(folder: Path, file: Path) -> None:
    """Write the tokenizer of ``folder`` as a tokenizer.json, which needs no transformers."""
    load_tokenizer(folder).backend_tokenizer.save(str(file))


def load_tokenizer(folder: Path) -> Any:
    """The transformers tokenizer of a model folder. Raises InputError."""
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise InputError(f"cannot read the tokenizer in '{folder}': {one_line(error)}") from error
