"""The extension's threads without torch, for ThreadSanitizer: run by sanitizers.py.

Several Python threads call at once, each on several of the pool's threads; results are those of one
thread, bit for bit.
"""

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from cptool.ops import extension

_C = extension.load()
FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2
CALLERS = 3


def values(shape, dtype: int, seed: int) -> np.ndarray:
    found = np.random.default_rng(seed).standard_normal(shape, np.float32)
    if dtype == FLOAT16:
        return found.astype(np.float16)
    if dtype == BFLOAT16:
        return (found.view(np.uint32) >> 16).astype(np.uint16)
    return found


def attention(queries: int, keys: int, heads: int, kv_heads: int, dtype: int, threads: int):
    """`queries` at the end of `keys` positions, and a sequence of one token."""
    dim = 64
    q = values((queries + 1, heads, dim), dtype, 0)
    k, v = (values((keys + 1, kv_heads, dim), dtype, seed) for seed in (1, 2))
    q_pos = np.array([*range(keys - queries, keys), 0], np.int32)
    k_pos = np.array([*range(keys), 0], np.int32)
    cu_q = np.array([0, queries, queries + 1], np.int32)
    cu_k = np.array([0, keys, keys + 1], np.int32)
    out = np.full(q.shape, np.nan, np.float32)
    lse = np.full(q.shape[:2], -np.inf, np.float32)
    for accumulate in (False, True):  # the second time into the first result
        _C.attention_partial_cpu(
            q.ctypes.data,
            heads * dim,
            dim,
            k.ctypes.data,
            kv_heads * dim,
            dim,
            v.ctypes.data,
            kv_heads * dim,
            dim,
            q_pos.ctypes.data,
            k_pos.ctypes.data,
            cu_q.ctypes.data,
            cu_k.ctypes.data,
            2,
            queries + 1,
            keys + 1,
            heads,
            kv_heads,
            dim,
            dim**-0.5,
            dtype,
            dtype,
            FLOAT32,
            out.ctypes.data,
            lse.ctypes.data,
            accumulate,
            0,
            0.0,
            0,
            threads,
        )
    merged, total = np.empty_like(out), np.empty_like(lse)
    _C.merge_partials_cpu(
        [out.ctypes.data] * 3,
        [lse.ctypes.data] * 3,
        lse.size,
        dim,
        FLOAT32,
        FLOAT32,
        merged.ctypes.data,
        total.ctypes.data,
        threads,
    )
    return out, lse, merged, total


def product(rows: int, dtype: int, threads: int):
    depth, columns = 512, 1536
    x, w = values((rows, depth), dtype, 3), values((columns, depth), dtype, 4)
    out = np.zeros((rows, columns), x.dtype)
    _C.linear_cpu(
        x.ctypes.data,
        depth,
        w.ctypes.data,
        depth,
        out.ctypes.data,
        rows,
        columns,
        depth,
        dtype,
        threads,
    )
    return (out,)


def norm(rows: int, dtype: int, threads: int):
    width = 2048
    hidden, weight = values((rows, width), dtype, 5), values((width,), dtype, 6)
    out = np.zeros_like(hidden)
    _C.rms_norm_cpu(
        hidden.ctypes.data,
        width,
        0,
        weight.ctypes.data,
        out.ctypes.data,
        rows,
        width,
        1e-5,
        dtype,
        threads,
    )
    return (out,)


CALLS = [
    *[(attention, shape) for shape in ((1, 5000, 8, 2), (33, 700, 4, 4), (200, 200, 6, 2))],
    *[(product, (rows,)) for rows in (1, 7)],
    (norm, (300,)),
]


def check(caller: int) -> None:
    for number in range(len(CALLS)):
        function, shape = CALLS[(number + caller) % len(CALLS)]
        for dtype in (FLOAT32, BFLOAT16, FLOAT16):
            one = function(*shape, dtype, 1)
            for threads in (2, 5):
                for a, b in zip(one, function(*shape, dtype, threads), strict=True):
                    assert np.array_equal(a.view(np.uint8), b.view(np.uint8)), (shape, dtype)


def words() -> None:
    """Two threads in turn: each signals a word after its message and waits for the other's."""
    word, message = np.zeros(2, np.uint32), np.zeros(1, np.int64)
    here, there = word.ctypes.data, word.ctypes.data + 4

    def answer() -> None:
        for value in range(1, 100):
            assert _C.wait_word(here, value, 10, 60_000)
            message[0] += 1
            _C.signal_word(there, value)

    with ThreadPoolExecutor(1) as pool:
        answering = pool.submit(answer)
        for value in range(1, 100):
            message[0] += 1
            _C.signal_word(here, value)
            assert _C.wait_word(there, value, 10, 60_000)
        answering.result()
    assert message[0] == 198


def main() -> None:
    assert "torch" not in sys.modules
    for isa in _C.cpu_isas():
        assert _C.force_cpu_isa(isa)
        with ThreadPoolExecutor(CALLERS) as pool:
            list(pool.map(check, range(CALLERS)))
        print(f"{isa}: {CALLERS} callers of {len(CALLS)} calls, no race", flush=True)
    words()


if __name__ == "__main__":
    main()
