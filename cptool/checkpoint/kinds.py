"""Sound model files of other kinds, named for what they are: adapters, quantised weights, encoders.

A refusal that says "a tensor is missing, fetch the checkpoint again" sends a user to fetch it for
ever. Names of files, fields and tensors tell most kinds apart.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cptool.checkpoint.base import CONVERT
from cptool.checkpoint.fields import mapping, shown
from cptool.checkpoint.lookalikes import absent, dangling
from cptool.errors import UserError

_UNQUANTISED = "use its unquantised checkpoint, or a GGUF of it"
_MERGE = "merge it into its base model first, with peft's merge_and_unload, and give the result"

# What the name of a tensor gives away, in the order in which it is looked for.
_TENSORS: tuple[tuple[re.Pattern[str], str, str], ...] = tuple(
    (re.compile(pattern), what, remedy)
    for pattern, what, remedy in (
        (
            r"\.lora_[AB]\b|\.lora_[ab]\b|\.lora_(?:embedding|magnitude)|\bada_|\.ia3_l\b|\.hada_w",
            "weights of an adapter",
            _MERGE,
        ),
        (r"^base_model\.model\.", "weights of an adapter", _MERGE),
        (r"\.(?:qweight|qzeros|g_idx)$", "quantised weights (GPTQ or AWQ)", _UNQUANTISED),
        (
            r"\.(?:absmax|quant_map|quant_state\.[\w.]+|SCB|weight_format|nested_absmax)$",
            "quantised weights (bitsandbytes)",
            _UNQUANTISED,
        ),
        (
            r"\.weight_(?:packed|shape|zero_point|global_scale)$",
            "quantised weights (compressed-tensors)",
            _UNQUANTISED,
        ),
        (
            r"\.(?:weight_scale|weight_scale_inv|input_scale|output_scale|k_scale|v_scale"
            r"|activation_scale|scale_inv|act_scale)$",
            "quantised weights (FP8 or INT8 with scales)",
            _UNQUANTISED,
        ),
        (r"\.(?:W_q|W_nbits|meta\.scale|meta\.zero)$", "quantised weights (HQQ)", _UNQUANTISED),
        (r"\.(?:codes|codebooks|Qidxs|trellis|SV|SU)$", "quantised weights", _UNQUANTISED),
        (r"\.(?:scales|biases|zeros|qscales)$", "quantised weights", _UNQUANTISED),
        (
            r"(?:^|\.)(?:score|classifier|cls|v_head\.\w+|value_head|reward_head|regression_head)\.",
            "a head that scores or classifies, as reward models have",
            "use a checkpoint that generates text",
        ),
        (
            r"\.(?:experts|block_sparse_moe|shared_expert)\.|_exps\.",
            "a mixture of experts",
            "use a checkpoint of a dense Llama",
        ),
        (
            r"(?:^|\.)(?:vision_tower|vision_model|multi_modal_projector|mm_projector|image_newline"
            r"|audio_tower|cross_attn)",
            "a model of images or sound with a Llama inside",
            "use a checkpoint of the Llama alone",
        ),
        (
            r"\.(?:qkv_proj|gate_up_proj|W_pack|query_key_value|wqkv|Wqkv|c_attn)\.",
            "projections joined into one matrix, as other architectures have",
            "use a checkpoint of the Llama architecture",
        ),
        (
            r"^(?:module|_orig_mod|_fsdp_wrapped_module|transformer|gpt_neox|decoder)\.",
            "names of another library or of a training run",
            CONVERT,
        ),
    )
)

_QUANTISERS = ("quantize_config.json", "quant_config.json", "hqq_config.json", "qmodel.pt")


def check_kind(path: Path) -> None:
    """Refuses a directory that is no Hugging Face checkpoint, for what it is."""
    config = path / "config.json"
    adapter = path / "adapter_config.json"
    if adapter.is_file():
        if config.is_file():
            raise UserError(
                f"{path}: an adapter ({adapter.name}) lies beside a model ({config.name}), and "
                f"cptool computes no adapters; {_MERGE}, or move it away to use the model alone"
            )
        raise UserError(f"{path}: an adapter (LoRA or the like), not a model; {_MERGE}")
    if not config.is_file():
        raise UserError(f"{path}: {_why_no_config(path)}")


def check_quantization(path: Path, fields: dict[str, Any]) -> None:
    """Refuses weights that a configuration says are quantised, by the method's name."""
    for key in ("quantization_config", "compression_config"):
        if fields.get(key) is not None:
            details = mapping(path / "config.json", fields, key)
            method = details.get("quant_method", details.get("quant_library"))
            named = f" by {shown(method)}" if method is not None else ""
            raise UserError(
                f"{path}: {key} says that the weights are quantised{named}, which cptool reads "
                f"from GGUF files alone; {_UNQUANTISED}, or remove the field if "
                f"the weights are plain"
            )
    # MLX puts it under a key of its own.
    if isinstance(fields.get("quantization"), dict):
        raise UserError(
            f"{path}: the weights are quantised (MLX), which cptool reads from GGUF files alone; "
            f"{_UNQUANTISED}"
        )


def check_names(path: Path, names: Iterable[str]) -> None:
    """Refuses tensors whose names belong to a known kind that is not a plain Llama."""
    for pattern, what, remedy in _TENSORS:
        if name := next((name for name in names if pattern.search(name)), None):
            beside = next((file for file in _QUANTISERS if (path / file).is_file()), None)
            said = f", as {beside} says" if beside and "quantised" in what else ""
            raise UserError(
                f"{path}: {what} ({shown(name)}{said}), which cptool does not read; {remedy}"
            )


def why_no_weights(path: Path) -> str:
    """Why a directory with a config.json has no weights that cptool reads."""
    for file in sorted(path.glob("*.safetensors*")):
        if (why := dangling(file)) is not None:
            return f"{file.name} is {why}"
    for pattern, kind in (
        ("*.bin", "pickled weights"),
        ("*.pth", "pickled weights"),
        ("*.pt", "pickled weights"),
        ("*.ckpt", "pickled weights"),
        ("*.h5", "TensorFlow weights"),
        ("*.msgpack", "Flax weights"),
        ("*.onnx", "an ONNX graph"),
        ("onnx/*.onnx", "ONNX graphs"),
        ("*.npz", "NumPy weights"),
        ("*.nemo", "a NeMo archive"),
        ("*.engine", "TensorRT engines"),
    ):
        if file := next(iter(sorted(path.glob(pattern))), None):
            if any(path.glob("*.safetensors")):
                break
            return f"only {kind} ({file.name}), which cptool never loads; {CONVERT}"
    if gguf := sorted(path.glob("*.gguf")):
        return f"no safetensors in it; to use a GGUF file give its path, such as {gguf[0]}"
    if parts := sorted(path.glob("model-*.safetensors")):
        return f"model.safetensors.index.json is missing beside {parts[0].name}; fetch it too"
    if others := sorted(path.glob("*.safetensors")):
        return (
            f"its weights are in {others[0].name}, cptool reads model.safetensors or the parts "
            f"that model.safetensors.index.json names; rename or convert it"
        )
    return "neither model.safetensors nor model.safetensors.index.json in it; fetch them"


def _why_no_config(path: Path) -> str:
    if (path / "config.json").is_symlink() or (path / "config.json").exists():
        return f"config.json is {absent(path / 'config.json')}"
    if (path / "original" / "params.json").is_file():
        return f"no config.json in it; for Meta's own weights give {path}/original"
    if gguf := sorted(path.glob("*.gguf")):
        return f"no config.json in it; to use a GGUF file give its path, such as {gguf[0]}"
    if (path / "manifest.json").is_file() and any(path.glob("*.safetensors")):
        return "a saved session, not a model; go on in it with: cptool decode or cptool chat"
    if (path / "model_index.json").is_file():
        return "a pipeline of diffusers, not a language model; give a Llama checkpoint"
    if (path / "modules.json").is_file():
        return "a sentence-transformers model, which embeds texts; give a LlamaForCausalLM"
    if (path / "snapshots").is_dir():
        return "the cache folder of a hub repository; give one of the directories in snapshots/"
    for pattern, kind in (
        ("*.onnx", "an ONNX graph"),
        ("*.h5", "TensorFlow weights"),
        ("*.msgpack", "Flax weights"),
        ("*.nemo", "a NeMo archive"),
        ("*.npz", "MLX weights"),
    ):
        if file := next(iter(sorted(path.glob(pattern))), None):
            return f"no config.json in it but {kind} ({file.name}), not supported; {CONVERT}"
    if any(path.glob("*.safetensors")) or any(path.glob("*.bin")):
        return "weights without a config.json; fetch it too"
    if any(path.glob("tokenizer*")):
        return "a tokenizer alone, without config.json and weights; fetch them too"
    if not any(path.iterdir()):
        return "an empty directory; give a Hugging Face model directory or a .gguf file"
    if nested := sorted(path.glob("*/config.json")):
        return f"no config.json in it; did you mean {nested[0].parent}?"
    return "no config.json in it; give a Hugging Face model directory or a .gguf file"
