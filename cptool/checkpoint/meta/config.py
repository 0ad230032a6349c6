"""The shape of a model in Meta's layout, out of its params.json and its tensors."""

from pathlib import Path
from typing import Any

from cptool.checkpoint.fields import flag, integer, number
from cptool.checkpoint.tensors import AnyTensor
from cptool.errors import UserError
from cptool.model.architectures.family import Family, Size
from cptool.model.config import LlamaConfig, RopeScaling

# The releases by their rotary base; params.json does not have the context.
_CONTEXTS = {1e4: 4096, 5e5: 8192, 1e6: 16384}
_LLAMA1_CONTEXT, _LLAMA1_EPS = 2048, 1e-6
_SCALED_CONTEXT = 131072

# Meta's code stretches by 8; Llama 3.2's small models are published with 32, by (width, layers).
_SCALING_FACTOR = 8.0
_SCALING_FACTORS = {(2048, 16): 32.0, (3072, 28): 32.0}


def read_config(
    source: Path, params: dict[str, Any], family: Family, found: dict[str, AnyTensor]
) -> LlamaConfig:
    """Return the model's shape; it has not passed `check_config`.

    It is that in params.json and, for what is missing there or may be -1, that of the tensors.
    """
    embedding, head = family.embedding, family.head
    first_ffn = next(weight for weight in family.weights if Size.FFN in weight.shape)
    gate = first_ffn.huggingface.format(0)
    for needed in (embedding, gate):
        if needed not in found:
            raise UserError(
                f"{source}: the weights beside it hold no {needed}, as a Llama's do; use a "
                f"checkpoint of the Llama architecture"
            )
    heads, hidden = integer(source, params, "n_heads"), integer(source, params, "dim")
    layers = integer(source, params, "n_layers")
    # Where the output matrix is the embedding, it is absent or in the same place.
    tied = head not in found or found[head] == found[embedding]
    scaling = _read_scaling(source, params, (hidden, layers))
    vocabulary = found[embedding].shape[:1]
    if (said := params.get("vocab_size")) is not None and said != -1:
        if (integer(source, params, "vocab_size"),) != vocabulary:
            raise UserError(
                f"{source}: vocab_size is {said}, and the embedding beside it has the shape "
                f"{list(found[embedding].shape)}; the two are not of one model"
            )
    theta = number(source, params, "rope_theta", 10000.0)
    eps = number(source, params, "norm_eps")
    switches: dict[str, Any] = {
        name: flag(source, params, name) for name in family.flags if name in params
    }
    return LlamaConfig(
        vocab_size=found[embedding].shape[0],
        hidden_size=hidden,
        intermediate_size=found[gate].shape[0],
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=integer(source, params, "n_kv_heads", heads),
        head_dim=integer(source, params, "head_dim", hidden // heads),
        rms_norm_eps=eps,
        rope_theta=theta,
        max_position_embeddings=_context(source, params, theta, eps),
        tie_word_embeddings=tied,
        rope_scaling=scaling,
        family=family.name,
        **switches,
    )


def _context(source: Path, params: dict[str, Any], theta: float, eps: float) -> int:
    """Return the number of positions that the release was made for.

    It is `max_seq_len`, which no release has and users may add, or follows from the rotary
    embedding.
    """
    if params.get("max_seq_len") is not None:
        return integer(source, params, "max_seq_len")
    if params.get("use_scaled_rope"):
        return _SCALED_CONTEXT
    if theta not in _CONTEXTS:
        raise UserError(
            f"{source}: rope_theta is {theta}, which no Llama of Meta's has, so the context is not "
            f'known; add "max_seq_len" to the file'
        )
    return _LLAMA1_CONTEXT if (theta, eps) == (1e4, _LLAMA1_EPS) else _CONTEXTS[theta]


def _read_scaling(
    source: Path, params: dict[str, Any], shape: tuple[int, int]
) -> RopeScaling | None:
    """Return the rotary scaling of a model of a `shape` (width, layers)."""
    if flag(source, params, "use_scaled_rope"):
        usual = _SCALING_FACTORS.get(shape, _SCALING_FACTOR)
        factor = number(source, params, "rope_scaling_factor", usual)
        high = number(source, params, "rope_high_freq_factor", RopeScaling.high_freq_factor)
        if not (factor > 0 and high > RopeScaling.low_freq_factor):
            raise UserError(
                f"{source}: rope_scaling_factor {factor} and rope_high_freq_factor {high} make no "
                f"sense; they must be over 0 and over {RopeScaling.low_freq_factor}"
            )
        return RopeScaling(kind="llama3", factor=factor, high_freq_factor=high)
    for key in ("rope_scaling_factor", "rope_high_freq_factor"):
        if params.get(key) is not None and number(source, params, key) != 1:
            raise UserError(
                f"{source}: {key} is {number(source, params, key)} without use_scaled_rope, which "
                f"it belongs to; correct the file"
            )
    return None
