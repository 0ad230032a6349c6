"""The shape of a model, as its checkpoint states it."""

from dataclasses import dataclass
from typing import Literal

RopeKind = Literal["linear", "llama3", "yarn", "dynamic", "longrope"]


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context.

    `linear` divides every frequency by `factor`. `llama3` keeps wavelengths under
    `original_context / high_freq_factor`, divides those over `original_context / low_freq_factor`
    by `factor`, and blends in between (Llama 3.1). `yarn` (Peng et al., 2023) keeps the pairs that
    turn more than `beta_fast` times within `original_context`, divides those that turn less than
    `beta_slow` times by `factor`, and blends in between; `truncate` rounds the limits to whole
    pairs. `longrope` (Ding et al., 2024) divides each frequency by one of `short_factors`, or of
    `long_factors` in a context longer than `original_context`. `dynamic` changes nothing within
    `original_context`, and longer contexts are refused.

    attention_factor: what cosines and sines are multiplied by, of yarn and longrope.
    query_beta: rotated queries at position p are multiplied by 1 + query_beta ln(1 + floor(p /
        original_context)), of yarn; None: they are not.
    """

    kind: RopeKind
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    query_beta: float | None = None
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def factors(self, context: int) -> tuple[float, ...]:
        """Return longrope's factors for sequences in a context of so many positions. One set serves
        all of them, however short they are, so that keys in a cache stay right as they grow.
        """
        return self.long_factors if context > self.original_context else self.short_factors


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Shape of a model with the structure of a Llama; the names are those of a Hugging Face
    `config.json`. `family` names its table of parameters (`cptool.model.architectures`).

    score_scale: factor of the attention scores; None for head_dim^-1/2.
    score_cap: scaled scores s become cap tanh(s / cap) before the softmax; None for no cap.
    windows: for each layer, how many keys a query sees, its own among them; None for all. A query
        at position p sees positions p - window + 1 to p. None if no layer has a window.
    attention_bias, mlp_bias: whether products of attention and of the feed-forward network have
        biases, in families where that is not settled.
    rotary_dim: how many elements of a head are rotated, its first ones; None: all.
    unrotated_layers: numbers of the layers without a rotary embedding.
    embedding_multiplier, residual_multiplier: factors of the embedding, and of what a block adds to
        the residual stream.
    logits_divisor: what logits are divided by.
    logits_cap: logits l become cap tanh(l / cap); None for no cap.
    swin_norm: whether the norms of a layer, in a family where that is not settled, come after the
        blocks and not before them.
    image_ids: ranges [first, last + 1) of the tokens that stand for parts of images, which no
        answer has.
    window_rope_theta: base of the rotary embedding of layers with a window, where `rope_scaling`
        does not apply; None: it is that of all other layers.
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
    attention_bias: bool = False
    mlp_bias: bool = False
    swin_norm: bool = False
    image_ids: tuple[tuple[int, int], ...] = ()
    rotary_dim: int | None = None
    unrotated_layers: tuple[int, ...] = ()
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0
    logits_cap: float | None = None
    window_rope_theta: float | None = None

    @property
    def scale(self) -> float:
        """Factor of the attention scores."""
        return self.head_dim**-0.5 if self.score_scale is None else self.score_scale

    def window(self, layer: int) -> int | None:
        """Return how many keys a query of the layer sees, its own among them; None for all."""
        return None if self.windows is None else self.windows[layer]

    def hiding_window(self, layer: int) -> int | None:
        """Return the window of the layer if it hides any key within the model's context, else None,
        for then the layer sees all keys.
        """
        window = self.window(layer)
        return None if window is None or window >= self.max_position_embeddings else window
