"""The shape of a model, as its checkpoint states it."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context.

    `linear` divides every frequency by `factor`. `llama3` keeps wavelengths under
    `original_context / high_freq_factor`, divides those over `original_context / low_freq_factor`
    by `factor`, and blends in between (Llama 3.1).
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Shape of a model with the structure of a Llama; the names are those of a Hugging Face
    `config.json`. `family` names its table of parameters (`cptool.model.architectures`).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope_scaling: RopeScaling | None = None
    family: str = "llama"
