"""Directories that are not Hugging Face checkpoints: adapters, encoders, saved sessions.

A refusal such as "a tensor is missing, fetch the checkpoint again" would send a user to fetch it
forever. Names of files and fields tell most kinds apart.
"""

from pathlib import Path
from typing import Any

from cptool.checkpoint.fields import mapping, shown
from cptool.checkpoint.lookalikes import absent, dangling
from cptool.checkpoint.tensor_names import CONVERT, MERGE, UNQUANTISED
from cptool.errors import UserError


def check_kind(path: Path) -> None:
    """Refuse a directory that is not a Hugging Face checkpoint, for what it is."""
    config = path / "config.json"
    adapter = path / "adapter_config.json"
    if adapter.is_file():
        if config.is_file():
            raise UserError(
                f"{path}: an adapter ({adapter.name}) is beside a model ({config.name}), and "
                f"cptool does not apply adapters; {MERGE}, or move it away to use only the model"
            )
        raise UserError(f"{path}: an adapter (LoRA or the like), not a model; {MERGE}")
    if not config.is_file():
        raise UserError(f"{path}: {_why_no_config(path)}")


def check_quantization(path: Path, fields: dict[str, Any]) -> None:
    """Refuse weights that are quantised by the configuration, by the method's name."""
    for key in ("quantization_config", "compression_config"):
        if fields.get(key) is not None:
            details = mapping(path / "config.json", fields, key)
            method = details.get("quant_method", details.get("quant_library"))
            named = f" by {shown(method)}" if method is not None else ""
            raise UserError(
                f"{path}: {key} states that the weights are quantised{named}, which cptool reads "
                f"only from GGUF files; {UNQUANTISED}, or remove the field if "
                f"the weights are plain"
            )
    # MLX puts it under a key of its own.
    if isinstance(fields.get("quantization"), dict):
        raise UserError(
            f"{path}: the weights are quantised (MLX), which cptool reads only from GGUF files; "
            f"{UNQUANTISED}"
        )


def why_no_weights(path: Path) -> str:
    """Return why a directory with a config.json has no weights that cptool reads."""
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
        if found := sorted(path.glob(pattern)):
            if any(path.glob("*.safetensors")):
                break
            return f"only {kind} ({found[0].name}), which cptool never loads; {CONVERT}"
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
        return "only a tokenizer, without config.json and weights; fetch them too"
    if not any(path.iterdir()):
        return "an empty directory; give a Hugging Face model directory or a .gguf file"
    if nested := sorted(path.glob("*/config.json")):
        return f"no config.json in it; did you mean {nested[0].parent}?"
    return "no config.json in it; give a Hugging Face model directory or a .gguf file"
