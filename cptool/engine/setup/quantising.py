"""`--weights auto`: which matrices to quantise, by measuring their products on this processor."""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cptool.errors import UserError
from cptool.files import cache_dir, make_private, parse_json, replace_whole
from cptool.host.processor import cpu_model
from cptool.model.architectures.registry import find_family
from cptool.ops.encodings import BLOCKS, QUANTISED_AS, quantised_bytes
from cptool.ops.processor import instruction_set
from cptool.quantisation import is_known

if TYPE_CHECKING:
    from torch import Tensor

    from cptool.checkpoint import Checkpoint

PROMPT, ANSWER = 512, 128
"""The turn that the choice is made for: tokens that are read together, and tokens one by one."""

_LEAST_GAIN = 0.05
_MOST_ROWS = 2048  # of a matrix that is timed: its rows all take the same time
_COLD_BYTES = 48 << 20  # more than a level-2 cache holds
_SAMPLE_ROWS = 64
_REPEATS = 3


@dataclass(frozen=True, kw_only=True)
class Matrices:
    """Matrices of one kind: how many a model has, their shape, and how its file stores them."""

    kind: str
    count: int
    rows: int
    depth: int
    encoding: str


def chosen(checkpoint: Checkpoint, dtype: str) -> str:
    """Return the `weights` with which a turn of PROMPT and ANSWER tokens takes the shortest time:
    "file", "q8_0", or "q8_0:" and the kinds of matrices that are quantised.

    dtype: what the model would be computed in with its own weights. A kind is quantised if its
    products take at least 5% less time. They are timed on one thread, once for a processor and the
    shapes of a model; the answer is kept in the cache folder. Takes a few seconds then.
    """
    found = matrices(checkpoint)
    seen = [cpu_model(), instruction_set(), dtype, [vars(each) for each in found], PROMPT, ANSWER]
    key = hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:32]
    try:
        path = cache_dir() / "weights" / f"{key}.json"
        kept = parse_json(path.read_bytes())
        if is_known(kept):
            return str(kept)
    except UserError:  # there is nowhere to keep it
        return _measured(found, dtype)
    except (OSError, ValueError):
        pass
    choice = _measured(found, dtype)
    try:
        make_private(path.parent)
        replace_whole(path, json.dumps(choice).encode())
    except OSError:  # a cache that cannot be written to costs the measurement again
        pass
    return choice


def matrices(checkpoint: Checkpoint) -> list[Matrices]:
    """Return the kinds of matrices that products read and that can be quantised."""
    config = checkpoint.config
    family = find_family(config.family)
    found: dict[str, Matrices] = {}
    for weight, layer in family.tensors(config):
        kind = weight.parameter.split(".")[-2]
        stored = checkpoint.stored[weight.huggingface.format(layer)]
        if len(stored.shape) != 2 or layer or quantised_bytes(stored.shape[1]) is None:
            continue
        if kind == "embed_tokens" and not config.tie_word_embeddings:
            continue  # a row of it is read for each token, and nothing is multiplied
        rows = stored.shape[0] + (found[kind].rows if kind in found else 0)
        count = config.num_hidden_layers if weight.in_layers else 1
        found[kind] = Matrices(
            kind=kind,
            count=count,
            rows=rows,
            depth=stored.shape[1],
            encoding=stored.encoding,
        )
    return list(found.values())


def _measured(found: list[Matrices], dtype: str) -> str:
    kinds, mixed, own = [], 0.0, 0.0
    for each in found:
        plain, quantised = _turn(each, each.encoding), _turn(each, QUANTISED_AS)
        if quantised < (1 - _LEAST_GAIN) * plain:
            kinds.append(each.kind)
        mixed += min(plain, quantised)
        own += plain if dtype == "float32" else _turn(each, each.encoding, dtype)
    if not kinds or mixed > (1 - _LEAST_GAIN) * own:
        return "file"
    # Without embeddings, of which only rows are read, the kinds are listed.
    whole = len(kinds) == len(found) and "embed_tokens" in kinds
    return "q8_0" if whole else f"q8_0:{','.join(sorted(kinds))}"


def _turn(each: Matrices, encoding: str, dtype: str = "float32") -> float:
    """Return the seconds of the products of a turn with all matrices of a kind."""
    import torch

    rows = min(each.rows, _MOST_ROWS)
    weights, size = BLOCKS[encoding] if encoding != "F32" else (1, 4)
    bytes_of = rows * each.depth // weights * size
    # Small values, none of them subnormal in any type.
    data = torch.full(
        (max(2, _COLD_BYTES // bytes_of), rows, bytes_of // rows), 0x11, dtype=torch.uint8
    )
    following = itertools.cycle([_product(matrix, encoding, dtype) for matrix in data])
    x = torch.full((_SAMPLE_ROWS, each.depth), 0.5, dtype=getattr(torch, dtype))
    calls = max(1, (8 << 20) // bytes_of)

    def seconds(rows: int, calls: int) -> float:
        begin = time.thread_time()
        for _ in range(calls):
            next(following)(x[:rows])
        return (time.thread_time() - begin) / calls

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            one = min(seconds(1, calls) for _ in range(_REPEATS + 1))
            many = min(seconds(_SAMPLE_ROWS, 1) for _ in range(_REPEATS))
    finally:
        torch.set_num_threads(threads)
    turn = ANSWER * one + PROMPT / _SAMPLE_ROWS * many
    return each.count * each.rows / rows * turn


def _product(matrix: Tensor, encoding: str, dtype: str) -> Callable[[Tensor], Tensor]:
    import torch

    from cptool.ops.linear import linear
    from cptool.ops.stored import Blocks, StoredWeight

    plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    if encoding == "F32" or dtype != "float32":
        weight = matrix.view(plain[encoding]).to(getattr(torch, dtype))
        return lambda x: linear(x, weight)
    stored = StoredWeight([Blocks(matrix, encoding)])
    return lambda x: linear(x, stored)
