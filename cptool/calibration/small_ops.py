"""Measuring small ops around products and attention: copies, reordering, positions."""

from __future__ import annotations

import torch

from cptool.calibration.clock import Clock
from cptool.calibration.examples import EXAMPLE, ROWS
from cptool.ops.elementwise import add_rms_norm_, rms_norm, rotate_, swiglu_
from cptool.planning.cost.forward import Forward
from cptool.planning.cost.layer import elementwise_bytes
from cptool.sharding import balanced, union


def small_op(clock: Clock) -> float:
    """Return the seconds to copy a few bytes."""
    few = torch.zeros(64, device=clock.device)
    return clock(few.clone, calls=64)


def reordering(clock: Clock, size: int) -> float:
    """Return the B/s of repeatedly reordering rows: `size` bytes, half read and half written."""
    width = 256
    rows = size // 2 // 4 // width
    given = torch.zeros(rows, width, device=clock.device)
    order = torch.arange(rows, device=clock.device).view(8, -1).T.flatten()
    made = torch.empty_like(given)
    return 2 * given.nbytes / clock(lambda: torch.index_select(given, 0, order, out=made), calls=4)


def positions(clock: Clock) -> float:
    """Return the seconds per key to put the positions that four ranks hold in order."""
    tokens = 16384
    layout = balanced([tokens], 4)
    placements = [placement.to(clock.device) for placement in layout.placements()]
    return clock(lambda: union(placements)) / tokens


def tokenwise(clock: Clock, name: str) -> float:
    """Return the B/s, read and written, of the steps between a layer's products: norms, rotation,
    storing K and V, activation, residual sums.
    """
    config, device, dtype = EXAMPLE, clock.device, getattr(torch, name)
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    hidden, added = (torch.zeros(ROWS, config.hidden_size, device=device).to(dtype) for _ in "ab")
    weight = torch.ones(config.hidden_size, device=device).to(dtype)
    qkv = torch.zeros(ROWS, heads + 2 * kv_heads, dim, device=device).to(dtype)
    angles = torch.ones(ROWS, 1, dim // 2, device=device)
    kept = torch.empty(ROWS, 2 * kv_heads, dim, device=device, dtype=dtype)
    gate_up = torch.zeros(ROWS, 2 * config.intermediate_size, device=device).to(dtype)

    def steps() -> None:
        rms_norm(hidden, weight, config.rms_norm_eps)
        rotate_(qkv[:, : heads + kv_heads], angles, angles)
        kept.copy_(qkv[:, heads:])
        add_rms_norm_(hidden, added, weight, config.rms_norm_eps)
        swiglu_(*gate_up.chunk(2, dim=-1))
        hidden.add_(added)

    forward = Forward(config=config, dtype=name, new=1, cached=0, ranks=1, active=1)
    return ROWS * elementwise_bytes(forward) / clock(steps, calls=2)
