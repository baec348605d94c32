"""What llama.cpp wants to know of a model: architecture, sizes, rotation, names, vocabulary.

After convert_hf_to_gguf.py of llama.cpp. What that program would write, but llama.cpp would then
compute otherwise than the model, is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optpipe import model
from optpipe.checkpoint import Checkpoint
from optpipe.errors import InputError
from optpipe.family import Decoder
from optpipe.text import has_tokenizer, load_tokenizer, save_fast

ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2",
    "gpt2": "gpt2",
}  # fmt: skip
"""Family -> its name in llama.cpp."""
INTERLEAVED = ("llama",)
"""Architectures that rotate neighbours, where Hugging Face rotates halves of a head."""
ROTARY_FACTORS = "rope_freqs.weight"
PRE_TOKENIZERS = {
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+"
    "[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+": "llama-bpe",
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+"
    "[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+": "qwen2",
}
"""How text is split before merges -> the name of that in llama.cpp."""


def check(checkpoint: Checkpoint) -> None:
    """Raise InputError for a model that llama.cpp would compute otherwise, or not at all."""
    decoder = checkpoint.decoder
    if decoder.family not in ARCHITECTURES:
        raise InputError(
            f"export=gguf knows no family '{decoder.family}'; it knows {', '.join(ARCHITECTURES)}"
        )
    windows = [block.window for block in decoder.blocks if block.window]
    if windows and decoder.family != "gemma2" and min(windows) < decoder.context:
        raise InputError(
            f"llama.cpp gives family '{decoder.family}' no window; this model sees {windows[0]} "
            f"tokens of {decoder.context}"
        )
    if decoder.family == "gemma2" and [bool(b.window) for b in decoder.blocks] != [
        index % 2 == 0 for index in range(len(decoder.blocks))
    ]:
        raise InputError("llama.cpp gives every second block of Gemma-2 a window, from the first")
    if abs(decoder.attn_scale - decoder.head_dim**-0.5) > 1e-6:
        raise InputError(
            f"llama.cpp scales attention by head_dim ** -0.5, this model by {decoder.attn_scale:g}"
        )
    rope = _rope(checkpoint)
    allowed = ("default", "llama3") if _interleaves(decoder) else ("default",)
    if rope.get("rope_type", "default") not in allowed:
        raise InputError(f"rope type '{rope['rope_type']}' of this model; allowed are {allowed}")
    if has_tokenizer(checkpoint.path):
        _vocabulary(checkpoint.path)


def describe(checkpoint: Checkpoint, writer: Any, kind: str) -> None:
    """Put all of that into the file, tensors aside; most of them are ``kind``, as 'Q4_0'."""
    import gguf

    decoder, windows = checkpoint.decoder, [b.window for b in checkpoint.decoder.blocks]
    writer.add_name(decoder.family)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(decoder.vocab)
    writer.add_context_length(decoder.context)
    writer.add_embedding_length(decoder.hidden)
    writer.add_block_count(len(decoder.blocks))
    writer.add_feed_forward_length(decoder.intermediate)
    writer.add_head_count(decoder.heads)
    writer.add_head_count_kv(decoder.kv_heads)
    writer.add_key_length(decoder.head_dim)
    writer.add_value_length(decoder.head_dim)
    if decoder.norm == "rms":
        writer.add_layer_norm_rms_eps(decoder.eps)
    else:
        writer.add_layer_norm_eps(decoder.eps)
    if decoder.rotary is not None:
        writer.add_rope_dimension_count(decoder.head_dim)
        writer.add_rope_freq_base(_rope(checkpoint)["rope_theta"])
    if decoder.attn_softcap or decoder.logit_softcap:
        writer.add_attn_logit_softcapping(decoder.attn_softcap)
        writer.add_final_logit_softcapping(decoder.logit_softcap)
    if decoder.family == "gemma2":
        writer.add_sliding_window(next(window for window in windows if window))
    _add_vocabulary(checkpoint, writer)


def _rope(checkpoint: Checkpoint) -> dict[str, Any]:
    found: dict[str, Any] = getattr(checkpoint.config, "rope_parameters", None) or {}
    return found


def rotary_factors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """What llama.cpp divides the frequencies of a head by, (head_dim / 2); none if by one."""
    decoder = checkpoint.decoder
    if decoder.rotary is None or _rope(checkpoint).get("rope_type", "default") == "default":
        return {}
    scaled = model.empty(checkpoint.config).get_submodule(decoder.rotary).inv_freq
    assert isinstance(scaled, Tensor)
    steps = torch.arange(0, decoder.head_dim, 2).float() / decoder.head_dim
    plain = _rope(checkpoint)["rope_theta"] ** -steps
    return {ROTARY_FACTORS: plain / scaled.float()}


def tensor_name(checkpoint: Checkpoint, name: str) -> str:
    """A parameter's name in the file, such as 'blk.0.attn_q.weight'. Raises InputError."""
    found = _known_name(checkpoint, name)
    if found is None:
        raise InputError(f"llama.cpp has no tensor for '{name}'")
    return found


def has_head(checkpoint: Checkpoint) -> bool:
    """Whether the architecture may have an output projection of its own."""
    return _known_name(checkpoint, f"{checkpoint.decoder.head}.weight") is not None


def _known_name(checkpoint: Checkpoint, name: str) -> str | None:
    import gguf

    decoder = checkpoint.decoder
    wanted = ARCHITECTURES[decoder.family]
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == wanted)
    names = gguf.get_tensor_name_map(arch, len(decoder.blocks))
    found: str | None = names.get_name(name, try_suffixes=(".weight", ".bias"))
    return found


def _interleaves(decoder: Decoder) -> bool:
    return ARCHITECTURES[decoder.family] in INTERLEAVED


def row_order(decoder: Decoder, layer: str) -> Tensor | None:
    """Where the rows of a layer are taken from; None: they keep their places."""
    if not _interleaves(decoder):
        return None
    for block in decoder.blocks:
        if layer in block.qkv[:2]:
            heads = decoder.heads if layer == block.qkv[0] else decoder.kv_heads
            rows = torch.arange(heads * decoder.head_dim)
            return rows.reshape(heads, 2, -1).transpose(1, 2).reshape(-1)
    return None


def norm_offset(decoder: Decoder, layer: str) -> float:
    """What is added to a vector: llama.cpp multiplies with the whole weight of a norm."""
    return decoder.norm_offset if layer.endswith("norm") else 0.0


def _vocabulary(folder: Path) -> tuple[list[str], list[int], str]:
    """Tokens, their types and how text is split first. Raises InputError if not byte-level BPE."""
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        save_fast(folder, Path(scratch) / "tokenizer.json")
        content = json.loads((Path(scratch) / "tokenizer.json").read_text())
    pre = _pre_tokenizer(content)
    if content["model"]["type"] != "BPE" or content["model"].get("byte_fallback") or pre is None:
        raise InputError(
            f"export=gguf writes byte-level BPE split as in GPT-2, Llama-3 or Qwen2; the tokenizer "
            f"of '{folder}' is another"
        )
    vocabulary = {index: token for token, index in content["model"]["vocab"].items()}
    kinds = dict.fromkeys(vocabulary, NORMAL)
    for token in content["added_tokens"]:
        vocabulary[token["id"]] = token["content"]
        kinds[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    size = max(vocabulary) + 1
    tokens = [vocabulary.get(index, f"[PAD{index}]") for index in range(size)]
    return tokens, [kinds.get(index, UNUSED) for index in range(size)], pre


NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Types of tokens in llama.cpp."""


def _pre_tokenizer(content: dict[str, Any]) -> str | None:
    """The name of how this tokenizer splits text first; None if it is none known here."""
    whole = content.get("pre_tokenizer") or {}
    parts = whole.get("pretokenizers", [whole])
    if not parts or parts[-1].get("type") != "ByteLevel":
        return None
    if len(parts) == 1:
        return "gpt-2" if parts[0].get("use_regex") else None
    return PRE_TOKENIZERS.get(str(parts[0].get("pattern", {}).get("Regex")))


def _add_vocabulary(checkpoint: Checkpoint, writer: Any) -> None:
    import gguf

    if not has_tokenizer(checkpoint.path):
        writer.add_tokenizer_model("no_vocab")
        return
    tokens, kinds, pre = _vocabulary(checkpoint.path)
    missing = range(len(tokens), checkpoint.decoder.vocab)  # rows of the embedding without a token
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*tokens, *(f"[PAD{index}]" for index in missing)])
    writer.add_token_types([*kinds, *(UNUSED for _ in missing)])
    writer.add_add_bos_token(bool(load_tokenizer(checkpoint.path)("")["input_ids"]))
    gguf.SpecialVocab(
        checkpoint.path, load_merges=True, n_vocab=checkpoint.decoder.vocab
    ).add_to_gguf(writer, quiet=True)
