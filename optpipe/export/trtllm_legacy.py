"""The checkpoint that trtllm-build made engines of, up to TensorRT-LLM 1.2.1: one file a GPU.

docs/source/legacy/architecture/checkpoint.md of TensorRT-LLM. As Model-Optimizer writes it, and
with what that leaves out under transformers 5: rotary_base, rotary_scaling, qwen_type. Layers that
read the same input are one (q, k and v) or carry old names (mlp.fc is the gate, mlp.gate is up);
qkv, fc, gate, the embedding and the head are split by rows among the ranks, dense and proj by
columns. Weights and scales of a layer are as in :mod:`optpipe.export.trtllm`, under other names.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from safetensors.torch import save_file

from optpipe import __version__, model
from optpipe.artifact import Artifact, Stats
from optpipe.cache.static import number_after
from optpipe.checkpoint import Checkpoint, copy_side_files
from optpipe.errors import InputError
from optpipe.export import trtllm
from optpipe.export.folder import (
    DTYPES,
    check_dtype,
    check_head,
    check_layers,
    check_scales,
    write_json,
)
from optpipe.export.ranks import Shard, padding
from optpipe.linear import Layers
from optpipe.stage import Progress, Stage

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
RANKS = (1, 2, 4, 8)
BUILD = """\
#!/bin/sh
# Needs TensorRT-LLM 1.2.1 or older; more options as arguments.
exec trtllm-build --checkpoint_dir "$(dirname "$0")" --output_dir engine \\
    --gemm_plugin auto{more} "$@"
"""

NEWER = (trtllm.FP4, trtllm.FP4_WEIGHTS, trtllm.INT4_FP8)


@dataclass(frozen=True, kw_only=True)
class TrtllmLegacy(Stage):
    """Write the checkpoint and the command that builds it. Needs memory for one rank's weights."""

    produces: ClassVar[str] = "trtllm_legacy"

    dtype: str = "float16"
    """Of all that is not quantized, and what it runs in: float16 or bfloat16."""
    tensor_parallel: int = 1
    """GPUs that share the model: 1, 2, 4 or 8."""

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        if self.tensor_parallel not in RANKS:
            raise ValueError(f"tensor_parallel must be one of {RANKS}, got {self.tensor_parallel}")

    def plan(self, layers: Layers) -> Layers:
        check_layers(layers, "TensorRT-LLM", trtllm.algorithm, sparse=True)
        told = trtllm.common_algorithm(layers) or {}
        for name, form in layers.items():
            if form.bits is not None and name.endswith((".o_proj", ".down_proj")):
                part = form.cols // self.tensor_parallel
                if form.group_size > 0 and part % form.group_size:
                    raise ValueError(
                        f"{self.tensor_parallel} ranks get {part} inputs of '{name}' each, which "
                        f"groups of {form.group_size} do not divide"
                    )
        check_head(layers)
        if (algorithm := told.get("quant_algo")) in NEWER:
            raise ValueError(f"export=trtllm_legacy writes no {algorithm}; export=trtllm does")
        if algorithm == trtllm.FP8_TOKEN:
            raise ValueError("trtllm-build took fp8 by layer (group_size=0), not by channel")
        return layers

    def inputs(self, model: Checkpoint) -> None:
        decoder, ranks = model.decoder, self.tensor_parallel
        if decoder.family not in FAMILIES:
            raise InputError(f"family '{decoder.family}' is not one of {', '.join(FAMILIES)}")
        if any(block.window and block.window < decoder.context for block in decoder.blocks):
            raise InputError("a sliding window is no part of such a checkpoint")
        if decoder.kv_heads % ranks and ranks % decoder.kv_heads:
            raise InputError(f"{decoder.kv_heads} key heads do not share {ranks} ranks")
        for what in ("heads", "intermediate", "vocab"):
            if getattr(decoder, what) % (2 * ranks if what == "intermediate" else ranks):
                raise InputError(f"{what} {getattr(decoder, what)} cannot be split among {ranks}")

    def follow(self, earlier: Sequence[Stage], model: Checkpoint) -> None:
        if number_after(earlier, model) is not None:
            raise InputError(
                "export=trtllm_legacy writes no scales of a KV cache; export=trtllm does"
            )

    def run(self, source: Artifact, out: Path, progress: Progress) -> Stats:
        checkpoint, ranks = Checkpoint(source.path), self.tensor_parallel
        self.follow([], checkpoint)
        layers = model.layers(checkpoint)
        check_scales(checkpoint, layers)
        told = trtllm.common_algorithm(layers)
        for rank in range(ranks):
            progress(f"rank {rank}", rank, ranks)
            shard = Shard(checkpoint=checkpoint, rank=rank, ranks=ranks, dtype=DTYPES[self.dtype])
            tensors = {key: t.contiguous() for key, t in shard.tensors().items()}
            save_file(tensors, out / f"rank{rank}.safetensors")
        copy_side_files(source.path, out)
        (out / "config.json").rename(out / "hf_config.json")
        write_json(out / "config.json", self._config(checkpoint, layers))
        sparse = any(form.pattern not in (None, "row") for form in layers.values())
        more = " --weight_sparsity" if sparse else ""
        (out / "build.sh").write_text(BUILD.format(more=more))
        (out / "build.sh").chmod(0o755)
        return {"dtype": self.dtype, "tensor_parallel": ranks, **(told or {"quant_algo": None})}

    def _config(self, checkpoint: Checkpoint, layers: Layers) -> dict[str, Any]:
        decoder, told = checkpoint.decoder, trtllm.common_algorithm(layers)
        logits = "float16" if self.dtype == "bfloat16" else self.dtype
        return {
            "producer": {"name": "optpipe", "version": __version__},
            "architecture": type(model.empty(checkpoint.config)).__name__,
            "dtype": self.dtype,
            "logits_dtype": logits,
            "num_hidden_layers": len(decoder.blocks),
            "num_attention_heads": decoder.heads,
            "num_key_value_heads": decoder.kv_heads,
            "hidden_size": decoder.hidden,
            "norm_epsilon": decoder.eps,
            "vocab_size": decoder.vocab + padding(decoder, told),
            "max_position_embeddings": decoder.context,
            "hidden_act": decoder.activation,
            "use_parallel_embedding": True,
            "embedding_sharding_dim": 0,
            "head_size": decoder.head_dim,
            "intermediate_size": decoder.intermediate,
            "position_embedding_type": "rope_gpt_neox",
            "share_embedding_table": False,
            "mapping": {"world_size": self.tensor_parallel, "tp_size": self.tensor_parallel,
                        "pp_size": 1},
            "quantization": {"quant_algo": None, **(told or {}), "kv_cache_quant_algo": None,
                             **({"exclude_modules": ["lm_head"]} if told else {})},
            **_family_settings(checkpoint),
        }  # fmt: skip


def _family_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """Rotation and biases; 'qwen_type' is how TensorRT-LLM tells the generations of Qwen apart."""
    decoder = checkpoint.decoder

    def biased(names: Iterable[str]) -> bool:
        return any(f"{name}.bias" in checkpoint.files for name in names)

    attention = biased(name for block in decoder.blocks for name in block.qkv)
    mlp = biased(name for block in decoder.blocks for name in (*block.mlp_in, block.mlp_out))
    rope = dict(checkpoint.config.rope_parameters)
    found: dict[str, Any] = {"rotary_base": rope.pop("rope_theta"), "attn_bias": attention}
    if mlp:  # it drops biases that no setting names
        found["mlp_bias"] = True
    kind = rope.get("rope_type", "default")
    if kind != "default":
        found["rotary_scaling"] = {**rope, "type": kind}
    if decoder.family.startswith("qwen"):
        found["qwen_type"] = decoder.family
    return found
