"""How tensor parallelism divides a model's parameters (Shoeybi et al., Megatron-LM, 2019).

Rows of queries, keys, values and of the feed-forward network are divided over the ranks (column
parallel in the paper's transposed terms), the columns of the products that follow likewise (row
parallel). Embedding, norms and output matrix are replicated.
"""

from cptool.errors import OptionError
from cptool.model.architectures.family import LAYER, Size, Weight
from cptool.model.architectures.registry import find_family
from cptool.model.config import LlamaConfig

Bounds = tuple[int, int]
"""[start, stop)."""


def check(config: LlamaConfig, tp: int) -> None:
    """Raise UserError unless the model divides into `tp` equal parts.

    Query heads and feed-forward width must be multiples of `tp`. Key-value heads must be too, or
    divide it: each is then replicated on tp / Hkv ranks, so that every rank's queries find theirs.
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    possible = [
        n
        for n in range(1, heads + 1)
        if heads % n == 0
        and config.intermediate_size % n == 0
        and (kv_heads % n == 0 or n % kv_heads == 0)
    ]
    if tp not in possible:
        raise OptionError(
            "tp",
            tp,
            f"this model's {heads} query heads, {kv_heads} key-value heads and feed-forward width "
            f"{config.intermediate_size} do not divide into {tp} equal parts",
            f"use `tp` {' or '.join(map(str, possible))}",
        )


def share(config: LlamaConfig, tp_rank: int, tp: int) -> dict[Size, Bounds]:
    """Return what rank `tp_rank` of `tp` holds of each size that is divided.

    `check` accepts the model and `tp`.
    """
    kv_heads = max(1, config.num_key_value_heads // tp)
    first_kv_head = tp_rank * config.num_key_value_heads // tp
    queries, ffn = (size.extent(config) // tp for size in (Size.QUERIES, Size.FFN))
    return {
        Size.QUERIES: (tp_rank * queries, (tp_rank + 1) * queries),
        Size.KEYS: (first_kv_head * config.head_dim, (first_kv_head + kv_heads) * config.head_dim),
        Size.FFN: (tp_rank * ffn, (tp_rank + 1) * ffn),
    }


def divided(weight: Weight, held: dict[Size, Bounds]) -> tuple[int, Bounds | None]:
    """Return the dimension along which a weight is divided and what a rank holds of it.

    `held` is the rank's `share`. The bounds are None if the rank holds the whole weight.
    """
    for dim, size in enumerate(weight.shape):
        if size in held:
            return dim, held[size]
    return 0, None


def layer_shapes(config: LlamaConfig, tp: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter of a layer, by its name within the layer.

    With `tp` > 1 the shapes are those of each rank's share.
    """
    held = share(config, 0, tp)
    shapes: dict[str, tuple[int, ...]] = {}
    for weight in find_family(config.family).weights:
        if not (weight.in_layers and weight.needed(config)):
            continue
        shape = list(weight.extents(config))
        dim, bounds = divided(weight, held)
        if bounds is not None:
            shape[dim] = bounds[1] - bounds[0]
        name = weight.parameter.removeprefix(LAYER)
        if name in shapes:
            shape[0] += shapes[name][0]
        shapes[name] = tuple(shape)
    return shapes
