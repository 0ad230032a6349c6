"""What a model family is: its parameters, and the names that files give to it and to them.

All readers, the loader and the model itself work from this table, so a family whose layers have the
same structure is one file in this folder (see `llama.py`).
"""

import enum
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any, Literal

from cptool.model.config import LlamaConfig

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
"""Parameters of the model that a family must have, the second one if embeddings are not tied."""

LAYER = "layers.{}."
"""How the names of a layer's parameters begin."""

Layout = Literal["huggingface", "gguf", "meta"]

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class Size(enum.Enum):
    """The sizes that dimensions of parameters have."""

    VOCABULARY = enum.auto()
    HIDDEN = enum.auto()
    QUERIES = enum.auto()
    """Rows of all query heads."""
    KEYS = enum.auto()
    """Rows of all key heads, or of all value heads."""
    FFN = enum.auto()
    HEAD = enum.auto()
    """Elements of one head."""

    def extent(self, config: LlamaConfig) -> int:
        """Return the size in a model of this configuration."""
        if self is Size.VOCABULARY:
            return config.vocab_size
        if self is Size.HIDDEN:
            return config.hidden_size
        if self is Size.QUERIES:
            return config.num_attention_heads * config.head_dim
        if self is Size.KEYS:
            return config.num_key_value_heads * config.head_dim
        if self is Size.HEAD:
            return config.head_dim
        return config.intermediate_size


OfLayer = Callable[[Mapping[str, Any], int], bool]
"""Something about a layer by the fields of a config.json, with the family's defaults, and its
number."""


def _numbered(name: str) -> tuple[str | None, str]:
    """Return the number of a layer in the name of a tensor, and the name with {} in its place."""
    number = _NUMBER.search(name)
    return (None, name) if number is None else (number[0], _NUMBER.sub("{}", name, count=1))


def _always(config: LlamaConfig) -> bool:
    return True


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A tensor of a family's checkpoints; `{}` in a name is the number of its layer.

    `parameter` is the model's parameter that it becomes, or a part of: those with the same one are
    stacked along dimension 0 in the order of the table. `shape` tells how tensor parallelism
    divides it, too: along `QUERIES`, `KEYS` or `FFN` (`cptool.model.shares`). `rotated` marks rows
    to which the rotary embedding applies. `meta` is None if Meta's layout does not have the tensor.
    `by_head` marks a tensor of one dimension that files have as [heads, elements of a head];
    in Meta's layout each file has the elements of a head, which all its heads share.
    `needed` says whether a model of a configuration has it. `added` is what the model adds to every
    element that a file in the Hugging Face layout stores, the 1 of (1 + w).
    """

    parameter: str
    shape: tuple[Size, ...]
    huggingface: str
    gguf: str
    meta: str | None = None
    rotated: bool = False
    by_head: bool = False
    needed: Callable[[LlamaConfig], bool] = _always
    added: float = 0.0

    @property
    def in_layers(self) -> bool:
        """Whether every layer has one."""
        return self.parameter.startswith(LAYER)

    def extents(self, config: LlamaConfig) -> tuple[int, ...]:
        """Return the shape in a model of this configuration."""
        return tuple(size.extent(config) for size in self.shape)

    def heads(self, config: LlamaConfig) -> int:
        """Return the number of heads that its rows make up."""
        return self.shape[0].extent(config) // config.head_dim


@dataclass(frozen=True, kw_only=True)
class Fused:
    """A tensor in which a family's checkpoints hold several matrices, one below the other.

    `parts` are the Hugging Face names of these in the table.
    """

    huggingface: str
    gguf: str
    parts: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Number:
    """A number that a family's files state, and the field of `LlamaConfig` that it is.

    `default` counts if a config.json lacks it, `gguf_default` if a GGUF file does; with None the
    field is that of a Llama. `convert` makes the field's value of what a config.json states.
    """

    field: str
    huggingface: str
    gguf: str | None
    default: float | None = None
    gguf_default: float | None = None
    convert: Callable[[float], float] | None = None

    def converted(self, value: float) -> float:
        """Return the field's value for what a config.json states."""
        return value if self.convert is None else self.convert(value)


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family. What its attention and MLP compute follows from the table.

    A projection has a bias, and queries, keys and blocks have norms, if the table has them.
    `architectures` and `model_type` name the family in a config.json, `gguf` in GGUF metadata; None
    if GGUF files of it name another family. `gguf_interleaved` says whether rotated rows are in
    interleaved rotary order there; in the Hugging Face layout they are half-split, in Meta's
    interleaved. `defaults` are transformers' values of fields that a config.json lacks; null is a
    value of its own. `neutral_fields` are values of its other fields under which a model computes
    what this table says, if they differ from those of a Llama. `numbers` are read from the files.
    `flags` are fields of a config.json, true or false, that `LlamaConfig` has by the same names.

    `used_fields` are further ones that this record reads itself.

    gguf_mark: the field of GGUF metadata that only this one has of the families of that name there.
    is_windowed: whether a layer attends to `sliding_window` tokens only; None: a family without
        windows.
    is_unrotated: whether a layer has no rotary embedding. Fields are empty for a GGUF file.
    partial_rotary: whether `partial_rotary_factor` may leave a part of each head unrotated.
    default_theta: base of the rotary embedding if no file states it.
    grows_queries: whether yarn may come with a `query_beta` (`cptool.model.config.RopeScaling`).
    window_theta: base of the rotary embedding of layers with a window, which is not scaled, if no
        file states it; None: all layers have the same rotary embedding.
    gguf_scale: `score_scale` of a GGUF file, which does not state it.
    gguf_window: the window of a GGUF file that states none; 0 for no window.
    embeds_by_root: whether the embedding is multiplied by the square root of its width, rounded to
        the type of the model.
    rope_aliases: other names of types of rotary scaling.
    fused: matrices that files hold as one.
    image_tokens: how the names of tokens that stand for parts of images begin in `vocabulary_map`;
        they are never chosen in an answer.
    image_ends: the tokens before and after those of an image.
    chat_template: that of models whose files have none.
    other_tensors: how the names of tensors begin in the Hugging Face layout that are not the
        language model's.
    activation: of the gate of the feed-forward network.
    float32_norms: whether norms multiply with their weight before they round.
    published: shapes of published models by name, as what `cptool.model.shapes.llama_config` takes.
    members: releases of the family, for users.
    refused: what models of the family may have that cptool does not compute, for users.
    """

    name: str
    title: str
    architectures: tuple[str, ...]
    model_type: str
    gguf: str | None
    gguf_interleaved: bool
    weights: tuple[Weight, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    neutral_fields: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    numbers: tuple[Number, ...] = ()
    flags: tuple[str, ...] = ()
    used_fields: tuple[str, ...] = ()
    gguf_mark: str | None = None
    is_windowed: OfLayer | None = None
    is_unrotated: OfLayer | None = None
    partial_rotary: bool = False
    grows_queries: bool = False
    default_theta: float = 10000.0
    window_theta: float | None = None
    gguf_scale: Callable[[LlamaConfig], float | None] | None = None
    gguf_window: int = 0
    embeds_by_root: bool = False
    rope_aliases: Mapping[str, str] = field(default_factory=dict)
    fused: tuple[Fused, ...] = ()
    image_tokens: str | None = None
    image_ends: tuple[str, str] | None = None
    chat_template: str | None = None
    other_tensors: str | None = None
    activation: Literal["silu", "gelu_tanh"] = "silu"
    float32_norms: bool = False
    published: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    members: str = ""
    refused: str = ""

    def tensors(self, config: LlamaConfig) -> Iterator[tuple[Weight, int]]:
        """Yield every tensor of a model with the number of its layer (0 outside of layers).

        They come in the order of the table, layer after layer.
        """
        for in_layers, group in groupby(self.weights, key=lambda weight: weight.in_layers):
            weights = [weight for weight in group if weight.needed(config)]
            for layer in range(config.num_hidden_layers if in_layers else 1):
                for weight in weights:
                    yield weight, layer

    def shapes(self, config: LlamaConfig) -> dict[str, tuple[int, ...]]:
        """Return Hugging Face name and shape of every tensor of a model."""
        return {
            weight.huggingface.format(layer): weight.extents(config)
            for weight, layer in self.tensors(config)
        }

    def find(self, name: str, layout: Layout) -> tuple[Weight, str] | None:
        """Return the weight that a layout calls `name`, and its Hugging Face name; None if there is
        no such weight.
        """
        number, key = _numbered(name)
        weight = self._by_name[layout].get(key)
        return None if weight is None else (weight, weight.huggingface.format(number))

    def huggingface_name(self, name: str, layout: Layout) -> str:
        """Return the Hugging Face name of a tensor; a name that no model has stays as it is."""
        number, key = _numbered(name)
        for fused in self.fused:
            if key == getattr(fused, layout, None):
                return fused.huggingface.format(number)
        found = self.find(name, layout)
        return name if found is None else found[1]

    def knows(self, name: str) -> bool:
        """Return whether a tensor in the Hugging Face layout is one of the family's."""
        fused = any(_numbered(name)[1] == each.huggingface for each in self.fused)
        return fused or self.find(name, "huggingface") is not None

    def weight(self, parameter: str) -> Weight:
        """Return the only weight that the model's `parameter` consists of."""
        (found,) = (weight for weight in self.weights if weight.parameter == parameter)
        return found

    @property
    def embedding(self) -> str:
        """The Hugging Face name of the embedding."""
        return self.weight(EMBEDDING).huggingface

    @property
    def head(self) -> str:
        """The Hugging Face name of the output matrix."""
        return self.weight(HEAD).huggingface

    @cached_property
    def _by_name(self) -> dict[Layout, dict[str | None, Weight]]:
        return {
            "huggingface": {weight.huggingface: weight for weight in self.weights},
            "gguf": {weight.gguf: weight for weight in self.weights},
            "meta": {weight.meta: weight for weight in self.weights},
        }
