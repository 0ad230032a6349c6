"""What a forward must compute and move, and how long that takes on given hardware.

`counts` are exact numbers of operations and bytes. `layer` predicts one decoder layer on the
busiest rank, `exchange` the attention in it, variant by variant; `forward` puts layers, embedding,
logits and overheads together to the time to the first token and between tokens; `memory` says what
a rank must hold. All of it is arithmetic on a `cptool.hardware.HardwareProfile`; no torch.
"""

from cptool.cost.counts import (
    attention_flops,
    kv_bytes,
    linear_flops,
    matrix_parameters,
    weight_bytes,
)
from cptool.cost.exchange import VARIANTS
from cptool.cost.forward import Estimate, decode_step, prefill
from cptool.cost.layer import predict
from cptool.cost.memory import memory_per_rank
from cptool.cost.rates import all_reduce
from cptool.cost.sizes import ELEMENT_BYTES, Forward, Prediction

__all__ = [
    "ELEMENT_BYTES",
    "VARIANTS",
    "Estimate",
    "Forward",
    "Prediction",
    "all_reduce",
    "attention_flops",
    "decode_step",
    "kv_bytes",
    "linear_flops",
    "matrix_parameters",
    "memory_per_rank",
    "predict",
    "prefill",
    "weight_bytes",
]
