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

    score_scale: factor of the attention scores; None for head_dim^-1/2.
    score_cap: scaled scores s become cap tanh(s / cap) before the softmax; None for no cap.
    windows: for each layer, how many keys a query sees, its own among them; None for all. A query
        at position p sees positions p - window + 1 to p. None if no layer has a window.
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
    score_scale: float | None = None
    score_cap: float | None = None
    windows: tuple[int | None, ...] | None = None

    @property
    def scale(self) -> float:
        """Factor of the attention scores."""
        return self.head_dim**-0.5 if self.score_scale is None else self.score_scale

    def window(self, layer: int) -> int | None:
        """Return how many keys a query of the layer sees, its own among them; None for all."""
        return None if self.windows is None else self.windows[layer]
