"""What tables of parameters have beside those of a Llama."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from cptool.model.architectures.family import OfLayer, Size, Weight
from cptool.model.config import LlamaConfig


def with_biases(
    weights: Iterable[Weight], product: str, needed: Callable[[LlamaConfig], bool] | None = None
) -> tuple[Weight, ...]:
    """Return the table with a bias after each matrix of the products whose names contain `product`.

    needed: which models have them; None: all.
    """
    table: list[Weight] = []
    for weight in weights:
        table.append(weight)
        if product in weight.parameter and len(weight.shape) == 2:
            table.append(_bias(weight, needed or weight.needed))
    return tuple(table)


def with_optional_biases(weights: Iterable[Weight]) -> tuple[Weight, ...]:
    """Return the table with the biases that `attention_bias` and `mlp_bias` of a configuration
    switch on.
    """
    attention = with_biases(weights, ".self_attn.", lambda config: config.attention_bias)
    return with_biases(attention, ".mlp.", lambda config: config.mlp_bias)


def _bias(weight: Weight, needed: Callable[[LlamaConfig], bool]) -> Weight:
    names = {
        field: getattr(weight, field).removesuffix("weight") + "bias"
        for field in ("parameter", "huggingface", "gguf")
    }
    return replace(weight, shape=weight.shape[:1], meta=None, needed=needed, **names)


QUERY_KEY_NORMS = tuple(
    Weight(
        parameter=f"layers.{{}}.self_attn.{name}_norm.weight",
        shape=(Size.HEAD,),
        huggingface=f"model.layers.{{}}.self_attn.{name}_norm.weight",
        gguf=f"blk.{{}}.attn_{name}_norm.weight",
    )
    for name in "qk"
)
"""Norms of each head of queries and keys on its own."""


def with_query_key_norms(
    weights: Iterable[Weight], norms: Iterable[Weight] = QUERY_KEY_NORMS
) -> tuple[Weight, ...]:
    """Return the table with `norms` of queries and keys in every layer, after `o_proj`."""
    table: list[Weight] = []
    for weight in weights:
        table.append(weight)
        if weight.parameter.endswith(".o_proj.weight"):
            table += norms
    return tuple(table)


def norm(parameter: str, huggingface: str, gguf: str) -> Weight:
    """Return the weight of a norm of rows of the residual stream in every layer, by its names
    within the layer.
    """
    return Weight(
        parameter=f"layers.{{}}.{parameter}.weight",
        shape=(Size.HIDDEN,),
        huggingface=f"model.layers.{{}}.{huggingface}.weight",
        gguf=f"blk.{{}}.{gguf}.weight",
    )


def with_norms(weights: Iterable[Weight], norms: Iterable[Weight]) -> tuple[Weight, ...]:
    """Return the table with these norms in every layer in place of those that it has."""
    rest = [w for w in weights if not (w.in_layers and w.shape == (Size.HIDDEN,))]
    last = max(index for index, weight in enumerate(rest) if weight.in_layers)
    return (*rest[: last + 1], *norms, *rest[last + 1 :])


def with_one_added(weights: Iterable[Weight]) -> tuple[Weight, ...]:
    """Return the table of a family whose norms multiply with 1 + w, of which files in the Hugging
    Face layout store w, and GGUF files the sum.
    """
    return tuple(
        replace(weight, added=1.0) if "norm" in weight.parameter else weight for weight in weights
    )


def windowed_by_kind(pattern: OfLayer) -> OfLayer:
    """Return whether a layer has a window by `layer_types`, or by `pattern` without that field."""

    def is_windowed(fields: Mapping[str, Any], layer: int) -> bool:
        kinds = fields.get("layer_types")
        return pattern(fields, layer) if kinds is None else kinds[layer] == "sliding_attention"

    return is_windowed
