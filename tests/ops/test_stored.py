"""Weights as files store them: GGML's blocks, bfloat16 and float16."""

from concurrent.futures import ThreadPoolExecutor

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from cptool.ops import stored
from cptool.ops.encodings import ENCODINGS
from cptool.ops.kernels import EXTENSION, cpu_isas, cpu_stored_isa, force_cpu_isa
from cptool.ops.linear import linear
from cptool.ops.stored import Blocks, StoredWeight

HALVES = {
    **{"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q6_K": (208,)},
    **{"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "IQ4_NL": (0,)},
    "IQ4_XS": (0,),
}
"""Where the float16 scales of a block are; any other byte may have any value."""

SPECIAL_HALVES = (0, 0x8000, 1, 0x83FF, 0x0400, 0x7BFF, 0x7C00, 0xFC00, 0x7C01, 0x7E00, 0xFFFF)
"""Zeros, subnormal and extreme values, infinities, and what is no number, signalling and quiet."""

PLAIN = {"BF16": torch.bfloat16, "F16": torch.float16}

SHIFTS = {"Q4_1": 4, "Q5_1": 4, "Q4_K": 16, "Q5_K": 16}
"""Types of which weights are scale * integer + shift, and the bytes of a block before integers."""

UNSCALED = set(ENCODINGS) - {"BF16", "F16", "Q2_K", "Q3_K"}
"""Types of which AVX2 multiplies the integers, and then scales their sums."""

ISAS = [isa for isa in cpu_isas() if isa in ("portable", "avx2", "avx512")]


def matrix(encoding, rows, depth, *, seed=0, head_dim=0):
    """Return random blocks, and the float32 values that the `gguf` package reads in them."""
    rng = np.random.default_rng(seed)
    if encoding in PLAIN:
        values = torch.from_numpy(rng.standard_normal((rows, depth))).to(PLAIN[encoding])
        data, values = values.view(torch.uint8), values.float()
    else:
        kind = gguf.GGMLQuantizationType[encoding]
        weights, size = gguf.GGML_QUANT_SIZES[kind]
        raw = rng.integers(0, 256, (rows, depth // weights, size), dtype=np.uint8)
        for at in HALVES[encoding]:
            scales = rng.standard_normal((rows, depth // weights, 1)) * 0.02
            raw[..., at : at + 2] = scales.astype(np.float16).view(np.uint8)
        raw = raw.reshape(rows, -1)
        data, values = torch.from_numpy(raw), torch.from_numpy(dequantize(raw, kind))
    if head_dim:  # the file has the pairs (2j, 2j + 1)
        pairs = values.view(-1, head_dim // 2, 2, depth)
        values = pairs.transpose(1, 2).reshape(rows, depth)
    return Blocks(data, encoding, head_dim), values


def check(weight, x, values):
    """The product is that of float32 sums."""
    assert near(weight.linear(x), x, values, values.double().abs())


def near(out, x, values, terms):
    """Whether `out` is a float32 sum for x W^T, of terms as large as |x| times `terms`."""
    exact = x.double() @ values.double().T
    scale = x.double().abs() @ terms.T
    return ((out - exact).abs() <= scale * x.shape[1] * 2**-24).all()


def terms_of(part, values):
    """Sizes of what is summed for each weight: of the weight, or of its two terms."""
    values, head = values.double(), SHIFTS.get(part.encoding)
    if head is None:
        return values.abs()
    kind = _kind(part.encoding)
    raw = part.data.numpy().reshape(len(values), -1, gguf.GGML_QUANT_SIZES[kind][1]).copy()
    raw[..., head:] = 0  # the integers, so that the shifts are left
    shifts = torch.from_numpy(dequantize(raw.reshape(len(values), -1), kind)).double()
    return (values - shifts).abs() + shifts.abs()


def right(out, x, part, values):
    """Whether few rows have the bits of the product with the widened weights, or where sums are
    scaled are as near to it as a float32 sum, and no number where a weight is none.
    """
    if cpu_stored_isa(part.encoding) != "avx2" or part.encoding not in UNSCALED:
        return same_bits(out, linear(x, values))
    finite = values.isfinite().all(1)
    terms = terms_of(part, values)
    return near(out[:, finite], x, values[finite], terms[finite]) and not (
        out[:, ~finite].isfinite().any()
    )


def same_bits(found, expected):
    """Equal to the bit, the sign of 0 included; anything that is no number equals any other."""
    equal = found.view(torch.int32) == expected.view(torch.int32)
    return (equal | (found.isnan() & expected.isnan())).all()


def depth_of(encoding, blocks):
    return blocks * max(32, gguf.GGML_QUANT_SIZES[_kind(encoding)][0])


def _kind(encoding):
    return gguf.GGMLQuantizationType[encoding]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_weights_have_the_bits_of_the_gguf_package(encoding, isa):
    """Widened they are equal, and few rows give the product with the widened ones."""
    for number, (rows, blocks) in enumerate(((37, 2), (5, 11), (1, 1), (128, 1))):
        part, values = matrix(encoding, rows, depth_of(encoding, blocks), seed=number)
        weight = StoredWeight([part])
        with force_cpu_isa(isa):
            assert torch.equal(weight.widened(), values)
            for count in (0, 1, 2, 3, 4, 5, 6):
                x = torch.randn(count, values.shape[1])
                out = torch.empty(count, rows)
                EXTENSION.stored_linear_cpu(*stored.product_arguments(x, part.place, out))
                assert right(out, x, part, values), count


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("encoding", ENCODINGS)
@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 9), offset=st.integers(0, 3))
def test_any_bytes_are_widened_like_the_gguf_package(encoding, isa, seed, rows, offset):
    """Scales that are infinite, no numbers, subnormal or -0, at odd addresses, and nothing behind
    the last block (the sanitizers see a read there).
    """
    rng, kind = np.random.default_rng(seed), _kind(encoding)
    depth = depth_of(encoding, 2)
    weights, size = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (rows, depth // weights, size), dtype=np.uint8)
    for at in HALVES.get(encoding, ()):
        special = rng.choice(SPECIAL_HALVES, raw.shape[:2])
        any_half = rng.integers(0, 1 << 16, raw.shape[:2])
        halves = np.where(rng.random(raw.shape[:2]) < 0.5, special, any_half).astype("<u2")
        raw[..., at : at + 2] = halves[..., None].view(np.uint8)
    raw = raw.reshape(rows, -1)
    with np.errstate(all="ignore"):
        values = torch.from_numpy(dequantize(raw, kind))
    memory = torch.empty(offset + raw.size, dtype=torch.uint8)
    memory[offset:] = torch.from_numpy(raw).flatten()
    part = Blocks(memory[offset:].view(raw.shape), encoding)
    weight, x = StoredWeight([part]), torch.randn(5, depth)
    with force_cpu_isa(isa):
        assert same_bits(weight.widened(), values)
        out = torch.empty(5, rows)
        EXTENSION.stored_linear_cpu(*stored.product_arguments(x, part.place, out))
        assert right(out, x, part, values)
        indices = torch.arange(rows).flip(0)
        assert same_bits(weight.gather(indices), values[indices])


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_rows_result_does_not_depend_on_the_others(encoding):
    part, values = matrix(encoding, 70, depth_of(encoding, 2))
    weight = StoredWeight([part])
    x = torch.randn(stored.FEW_ROWS, values.shape[1])
    alone = torch.cat([weight.linear(row) for row in x.split(1)])
    for count in range(1, len(x) + 1):
        assert torch.equal(weight.linear(x[:count]), alone[:count]), count


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_rows_of_16_bits_are_widened_and_results_rounded_once(encoding, dtype):
    part, values = matrix(encoding, 37, depth_of(encoding, 2))
    weight, exact = StoredWeight([part], dtype), StoredWeight([part])
    for rows in (0, 1, 3, 17, 40):
        x = torch.randn(values.shape[1], rows).to(dtype).T
        found = weight.linear(x)
        assert found.dtype == dtype
        assert torch.equal(found, exact.linear(x.float()).to(dtype))
    indices = torch.tensor([[3, 0], [36, 3]])
    assert torch.equal(weight.gather(indices), values[indices].to(dtype))
    with pytest.raises(ValueError, match=f"it must be {dtype}"):
        weight.linear(torch.randn(1, values.shape[1]))


def test_many_rows_are_as_near_to_float64_as_a_float32_product(monkeypatch):
    """Panels that divide nothing, and parts of different types below each other."""
    monkeypatch.setattr(stored, "_PANEL_BYTES", 4 * 512 * 32)
    parts, values = zip(
        *(matrix(e, n, 512, seed=n) for e, n in (("Q4_K", 70), ("Q6_K", 33), ("Q8_0", 1))),
        strict=True,
    )
    weight, whole = StoredWeight(parts), torch.cat(values)
    for rows in (1, 7, 40, 300):
        check(weight, torch.randn(rows, 512), whole)


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("encoding", ["Q4_0", "Q6_K", "BF16"])
def test_rows_in_interleaved_rotary_order(encoding, rows):
    part, values = matrix(encoding, 4 * 24, depth_of(encoding, 1), head_dim=24)
    weight = StoredWeight([part])
    assert torch.equal(weight.widened(), values)
    check(weight, torch.randn(rows, values.shape[1]), values)
    indices = torch.tensor([[0, 95], [13, 12]])
    assert torch.equal(weight.gather(indices), values[indices])


def test_a_part_of_the_columns_is_a_view():
    part, values = matrix("Q4_1", 33, 512)
    right = Blocks(part.data[:, 10 * 20 :], "Q4_1")
    check(StoredWeight([right]), torch.randn(3, 192), values[:, 320:])


def test_threads_do_not_change_the_bits():
    part, values = matrix("Q4_K", 4096, 512)
    weight = StoredWeight([part])
    x, before = torch.randn(2, 512), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = weight.linear(x)
        torch.set_num_threads(3)
        assert torch.equal(weight.linear(x), one)
    finally:
        torch.set_num_threads(before)
    assert right(one, x, part, values)


def test_callers_in_several_threads_do_not_disturb_each_other():
    """Each has its own panel, in inference mode and out of it."""
    part, values = matrix("Q4_0", 257, 512)
    weight = StoredWeight([part])

    def call(number):
        x = torch.randn(40 + number, 512, generator=torch.Generator().manual_seed(number))
        for inference in (True, False, True):
            with torch.inference_mode(inference):
                check(weight, x, values)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(call, range(16)))


def test_what_does_not_fit_is_refused():
    part, _ = matrix("Q4_0", 4, 64)
    with pytest.raises(ValueError, match=r"whole blocks of 18 bytes \(32 weights of Q4_0\)"):
        Blocks(part.data[:, 1:], "Q4_0")
    with pytest.raises(ValueError, match="whole heads of 6 rows"):
        Blocks(part.data, "Q4_0", 6)
    weight = StoredWeight([part])
    with pytest.raises(ValueError, match=r"must be torch.float32 \[rows, 64\]"):
        weight.linear(torch.zeros(1, 32))
    with pytest.raises(ValueError, match=r"must be torch\.float32"):
        weight.linear(torch.zeros(1, 64, dtype=torch.bfloat16))
    for index in (4, -1):
        with pytest.raises(IndexError, match="from 0 to 3"):
            weight.gather(torch.tensor([0, index]))
    with pytest.raises(ValueError, match=r"indices are torch.int32; they must be int64"):
        weight.gather(torch.tensor([0], dtype=torch.int32))
    with pytest.raises(ValueError, match="depths"):
        StoredWeight([part, matrix("Q4_0", 4, 96)[0]])
