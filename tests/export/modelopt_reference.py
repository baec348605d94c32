"""What nvidia-modelopt's own exporters write for tiny models on known grids, as JSON.

python tests/export/modelopt_reference.py tests/export/modelopt_reference.json   (a few minutes)

The weights are codes times scales, and the largest code is in every group, so that the scale which
modelopt computes from the largest weight is the one the weights were made with, to the last bit.
"""

import copy
import hashlib
import json
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 288,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
THETA = {"rope_type": "default", "rope_theta": 1e6}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, rope_parameters=THETA),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=32, rope_parameters=THETA),
}
ARCHITECTURES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}
GROUP = {"int4": 64, "w4a8": 64, "int8": None, "fp8": None, "none": None}
INPUT_SCALE, KV_SCALE = 0.0125732421875, 0.03125
"""Exact in float16."""
CASES = [
    ("llama", "int4"), ("llama", "int8"), ("llama", "fp8"), ("llama", "none"),
    ("qwen2", "int4"), ("qwen3", "int8"),
    ("llama", "w4a8"),
]  # fmt: skip
TOP = {"int4": 7, "w4a8": 7, "int8": 127, "fp8": 448}


def on_grid(rows, cols, kind, generator):
    """A weight (R, C) made of codes and scales; float32."""
    if kind == "none":
        return torch.randn(rows, cols, generator=generator).half().float() * 0.0625
    width = GROUP[kind] or cols
    shape = (rows, cols // width, width)
    if kind == "fp8":
        codes = (torch.randn(shape, generator=generator) * 100).clamp(-448, 448)
        codes = codes.to(torch.float8_e4m3fn).float()
        scales = torch.full((1, 1, 1), 0.0003662109375)
    else:
        codes = torch.randint(-TOP[kind], TOP[kind] + 1, shape, generator=generator).float()
        scales = torch.rand((*shape[:2], 1), generator=generator) * 0.02 + 0.01
        scales = scales.half().float() / (1 if GROUP[kind] else 16)
    codes[..., 0] = TOP[kind]
    return (codes * scales.half().float()).reshape(rows, cols)


def make(family, kind):
    """The model in float32: linear layers of the blocks on the grid, all else exact in float16."""
    generator = torch.Generator().manual_seed(7)
    config = CONFIGS[family]()
    config.architectures = [f"{ARCHITECTURES[family]}ForCausalLM"]
    lm = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if parameter.dim() == 2 and ".layers." in name:
                parameter.copy_(on_grid(*parameter.shape, kind, generator))
            else:
                around = 1.0 if "norm" in name else 0.0
                noise = torch.randn(parameter.shape, generator=generator) * 0.0625
                parameter.copy_((noise + around).half().float())
    return lm.eval()


def described(folder):
    """Every tensor of the safetensors files, by file and name."""
    found = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        tensors = {name: plain(name, t).contiguous() for name, t in load_file(file).items()}
        found[file.name] = {name: facts(t) for name, t in sorted(tensors.items())}
    return found


def plain(name, tensor):
    """What is no scale in float16, in which it is exact: the models are float32 for their grids."""
    is_scale = name.endswith(("_scale", "_scale_2", "_factor"))
    return tensor.half() if tensor.dtype == torch.float32 and not is_scale else tensor


def facts(tensor):
    """Its type, shape and the hash of its bytes, in words."""
    data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{dtype} {list(tensor.shape)} {hashlib.sha256(data).hexdigest()[:16]}"


def config_of(kind):
    """modelopt's preset with our groups, without any search, which would leave the grid."""
    import modelopt.torch.quantization as mtq

    names = {"int4": "INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "int8": "INT8_WEIGHT_ONLY_CFG",
             "w4a8": "W4A8_AWQ_BETA_CFG"}  # fmt: skip
    config = copy.deepcopy(getattr(mtq, names.get(kind, "FP8_DEFAULT_CFG")))
    if kind == "w4a8":
        config["algorithm"] = "max"
    for entry in config["quant_cfg"] if GROUP[kind] else []:
        cfg = entry.get("cfg") or {}
        for part in cfg if isinstance(cfg, list) else [cfg]:
            if "block_sizes" in part:
                part["block_sizes"][-1] = GROUP[kind]
    return config


def quantized(lm, kind, kv):
    """``lm`` with the quantizers of modelopt, their input and cache scales set by hand."""
    import modelopt.torch.quantization as mtq

    config = config_of(kind)
    if kv:
        entries = [*config["quant_cfg"], *mtq.FP8_KV_CFG["quant_cfg"]]
        config = {**config, "quant_cfg": entries}
    ids = torch.arange(3, 40)[None]
    lm = mtq.quantize(lm, config, lambda m: m(ids))
    for name, module in lm.named_modules():
        amax = None
        if name.endswith("input_quantizer") and module.is_enabled:
            amax = 448 * INPUT_SCALE
        if name.endswith(("k_bmm_quantizer", "v_bmm_quantizer")) and module.is_enabled:
            amax = 448 * KV_SCALE
        if amax is not None:
            module.amax = torch.tensor(amax)
    return lm


def export(family, kind):
    from modelopt.torch.export import export_hf_checkpoint, export_tensorrt_llm_checkpoint

    found = {}
    for kv in (False, True) if kind == "fp8" else (False,):
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            lm = make(family, kind)
            lm = lm if kind == "none" else quantized(lm, kind, kv)
            export_hf_checkpoint(lm, dtype=torch.float16, export_dir=folder)
            config = json.loads((Path(folder) / "config.json").read_text())
            file = Path(folder) / "hf_quant_config.json"
            found[f"unified{'_kv' if kv else ''}"] = {
                "quantization_config": config.get("quantization_config"),
                "hf_quant_config": json.loads(file.read_text()) if file.is_file() else None,
                "tensors": described(folder),
            }
    for ranks in () if kind == "w4a8" else (1, 2):
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            lm = make(family, kind)
            lm = lm if kind == "none" else quantized(lm, kind, kind == "fp8")
            decoder = "llama" if family == "llama" else "qwen"
            export_tensorrt_llm_checkpoint(
                lm, decoder, torch.float16, folder, inference_tensor_parallel=ranks
            )
            config = json.loads((Path(folder) / "config.json").read_text())
            found[f"legacy_tp{ranks}"] = {"config": config, "tensors": described(folder)}
    return found


def written(content, where=()):
    """As JSON, a line for every tensor and one for all settings of a checkpoint."""
    open_here = len(where) < 3 or (where[2] == "tensors" and len(where) < 5)
    if not (open_here and isinstance(content, dict)):
        return json.dumps(content, sort_keys=True)
    inner = [f"{json.dumps(k)}: {written(v, (*where, k))}" for k, v in sorted(content.items())]
    return "{\n" + ",\n".join(inner) + "\n}"


if __name__ == "__main__":
    record = {}
    for family, kind in CASES:
        try:
            record[f"{family}_{kind}"] = export(family, kind)
        except Exception as error:  # noqa: BLE001  to be read by whoever runs it
            import traceback

            traceback.print_exc()
            print(f"{family} {kind}: {error!r}", flush=True)
    Path(sys.argv[1]).write_text(written(record) + "\n")
