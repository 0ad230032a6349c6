"""One decoder layer on the busiest rank."""

from dataclasses import fields, replace

from cptool.planning.cost.counts import layers_by_window
from cptool.planning.cost.exchange import attention_cost
from cptool.planning.cost.forward import Forward, Prediction
from cptool.planning.cost.rates import Rates
from cptool.planning.hardware import HardwareProfile
from cptool.variants import find

SMALL_OPS, QUANTISING_OPS = 8, 2
"""Kernels per layer beside products and attention: two norms, rotation, storing K and V,
activation, a residual sum, a copy of attention's result; and those that quantise the inputs of FP8
products."""


def predict(variant: str, forward: Forward, profile: HardwareProfile) -> Prediction:
    """Predict one layer under a variant of `cptool.parallel.attention`, on the busiest rank; if
    their windows differ, the mean of all layers.

    Linear layers and attention are counted as `linear_flops` and `attention_flops` do, each plus
    its bytes at the memory's rate. Transfers are those of the variant's code, and hide where it
    hides them (paper, section 3.3).
    """
    if forward.window is None and forward.config.windows is not None:
        windows = layers_by_window(forward.config).items()
        return _mean(
            [(_predict_one(variant, replace(forward, window=w), profile), n) for w, n in windows]
        )
    return _predict_one(variant, forward, profile)


def _predict_one(variant: str, forward: Forward, profile: HardwareProfile) -> Prediction:
    """Predict one layer with the window that `forward` states."""
    rates = Rates(forward, profile)
    computing, rows = forward.sources, forward.queries
    if find(variant).static:
        computing, rows = forward.ranks, forward.new
    crowd = rates.crowd(computing)
    linear = sum(rates.product(*matrix, rows, computing) for matrix in forward.linear_layers())
    linear += rates.in_panels(rows)
    elementwise = rates.tokenwise(elementwise_bytes(forward) * rows)
    overhead = rates.layer_overhead(rows, computing)
    if rates.queued:
        ops = SMALL_OPS + QUANTISING_OPS * (forward.feed_forward == "float8")
        elementwise += ops * profile.op_overhead_s
    stream = rows * forward.config.hidden_size * forward.element
    reduced, reduced_bytes = rates.all_reduce(stream)
    attention = attention_cost(variant, rates)
    overhead_s = crowd * overhead
    if rates.queued:
        # The host launches a layer while the device still computes the one before.
        busy = crowd * (linear + elementwise) + attention.now + 2 * reduced
        overhead_s = 0.0 if forward.graph else max(0.0, overhead - busy)
    return Prediction(
        linear_s=crowd * linear,
        elementwise_s=crowd * elementwise,
        attention_s=attention.attention_s,
        merge_s=attention.merge_s,
        tensor_parallel_s=2 * reduced,
        exposed_s=attention.exposed_s,
        overhead_s=overhead_s
        + attention.overhead_s
        + profile.residual(variant, forward.ranks, forward.sources),
        hidden_s=attention.hidden_s,
        bytes=attention.bytes,
        tensor_parallel_bytes=2 * reduced_bytes,
    )


def _mean(layers: list[tuple[Prediction, int]]) -> Prediction:
    """Return the mean of predictions, each of so many layers."""
    count = sum(n for _, n in layers)
    means = {
        field.name: sum(n * getattr(one, field.name) for one, n in layers) / count
        for field in fields(Prediction)
    }
    return Prediction(**means)


def elementwise_bytes(forward: Forward) -> float:
    """Return the bytes that a token's norms, rotation, activation and residual sums read and write.

    One pass each (`cptool.ops.elementwise`). What has the width of the residual stream is not
    divided over tensor-parallel ranks.
    """
    config, e = forward.config, forward.element
    feed_forward = config.intermediate_size / forward.tp
    rotated = forward.query_width + forward.kv_width / 2
    moved: float = (e + forward.kv_element) * forward.kv_width  # K and V into the cache
    # A norm; a residual sum with the norm after it; a sum. Rotation; silu(gate) * up.
    moved += e * config.hidden_size * (2 + 4 + 3) + e * rotated * 2 + e * feed_forward * 3
    if forward.feed_forward == "float8":
        # Rows are scaled by their largest element: read, and written in one byte.
        moved += (e + 1) * (config.hidden_size + feed_forward)
    return moved
