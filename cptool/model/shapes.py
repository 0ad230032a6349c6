"""Shapes of models without a checkpoint, for planning, emulating and measuring: published ones by
name, others by their widths.
"""

from __future__ import annotations

from cptool.errors import UserError
from cptool.files import expanded
from cptool.model.config import LlamaConfig, RopeScaling

_LLAMA3_1 = RopeScaling("llama3", 8.0)
_LLAMA3_2 = RopeScaling("llama3", 32.0)


def llama_config(
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int,
    intermediate: int,
    *,
    vocab: int = 32000,
    theta: float = 1e4,
    context: int = 4096,
    head_dim: int = 128,
    scaling: RopeScaling | None = None,
    tied: bool = False,
) -> LlamaConfig:
    """A Llama 2 but for what is given; `context` is its `max_position_embeddings`."""
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=1e-5,
        rope_theta=theta,
        max_position_embeddings=context,
        tie_word_embeddings=tied,
        rope_scaling=scaling,
    )


_LLAMA3 = {"vocab": 128256, "theta": 5e5, "context": 131072, "scaling": _LLAMA3_1}
_LLAMA3_SMALL = {**_LLAMA3, "scaling": _LLAMA3_2, "tied": True}
_CODE = {"theta": 1e6, "context": 16384}

SHAPES: dict[str, LlamaConfig] = {
    "llama2-7b": llama_config(4096, 32, 32, 32, 11008),
    "llama2-13b": llama_config(5120, 40, 40, 40, 13824),
    "llama2-70b": llama_config(8192, 80, 64, 8, 28672),
    "llama3-1b": llama_config(2048, 16, 32, 8, 8192, head_dim=64, **_LLAMA3_SMALL),
    "llama3-3b": llama_config(3072, 28, 24, 8, 8192, **_LLAMA3_SMALL),
    "llama3-8b": llama_config(4096, 32, 32, 8, 14336, **_LLAMA3),
    "llama3-70b": llama_config(8192, 80, 64, 8, 28672, **_LLAMA3),
    "llama3-405b": llama_config(16384, 126, 128, 8, 53248, **_LLAMA3),
    "codellama-7b": llama_config(4096, 32, 32, 32, 11008, vocab=32016, **_CODE),
    "codellama-13b": llama_config(5120, 40, 40, 40, 13824, vocab=32016, **_CODE),
    "codellama-34b": llama_config(8192, 48, 64, 8, 22016, **_CODE),
    "codellama-70b": llama_config(8192, 80, 64, 8, 28672, vocab=32016, **_CODE),
}
"""Llama 3 by its 3.1 and 3.2 releases: 131072 positions, stretched rotary frequencies."""


def find_shape(name: str, notes: list[str] | None = None) -> LlamaConfig:
    """The shape of a name in `SHAPES`, of a `config.json` or a directory with one, or of any model
    that `open_checkpoint` takes.

    Reads no weights and imports no torch. `notes` takes what the user should know of the files, a
    line each. Raises UserError, one line, for anything else.
    """
    notes = [] if notes is None else notes
    if name in SHAPES:
        return SHAPES[name]
    path = expanded(name)
    if path.is_dir() and (path / "config.json").is_file():
        path /= "config.json"
    if path.suffix == ".json" and path.is_file():
        from cptool.checkpoint.huggingface import read_shape

        try:
            return read_shape(path, notes)
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error}); give a config.json") from None
    from cptool.checkpoint import open_checkpoint

    try:
        checkpoint = open_checkpoint(name)
    except UserError as error:
        if path.exists() or "/" in name:
            raise
        raise UserError(f"{error}; or one of the shapes {', '.join(SHAPES)}") from None
    notes += checkpoint.notes
    return checkpoint.config
