"""The token-wise steps against float64, on every instruction set: each value may be off by its own
roundings, in the dtype where the contract says so and in float32 before.
"""

import math

import pytest
import torch

from cptool.ops.elementwise import add_rms_norm_, rms_norm, rotate_, swiglu_
from cptool.ops.kernels import cpu_isas, force_cpu_isa
from cptool.ops.linear import FEW_ROWS, linear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
UNIT = torch.finfo(torch.float32).eps / 2


@pytest.fixture(params=cpu_isas())
def isa(request):
    with force_cpu_isa(request.param):
        yield request.param


def unit(dtype):
    return torch.finfo(dtype).eps / 2


def random(*shape, dtype, seed=0):
    return torch.randn(*shape, generator=torch.manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 13, 16])
@pytest.mark.parametrize(("depth", "columns"), [(1, 1), (7, 5), (64, 3), (576, 163), (1030, 17)])
def test_linear(isa, rows, depth, columns, dtype):
    x = random(rows, depth + 3, dtype=dtype)[:, 1 : depth + 1]
    weight = random(columns, depth + 5, dtype=dtype, seed=1)[:, 2 : depth + 2]
    out = linear(x, weight)
    exact = x.double() @ weight.double().T
    # Products and sums in float32, lane by lane: fewer additions in a row than `depth`.
    magnitude = x.double().abs() @ weight.double().abs().T
    bound = (depth + 1) * UNIT * magnitude + unit(dtype) * exact.abs() + torch.finfo(dtype).tiny
    assert out.dtype == dtype and ((out.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("depth", [96, 1030])
def test_a_row_of_few_does_not_depend_on_the_others(isa, depth, dtype):
    most = FEW_ROWS[dtype]
    x = random(min(most, 300), depth, dtype=dtype)
    weight = random(219, depth, dtype=dtype, seed=1)
    alone = torch.cat([linear(row, weight) for row in x.split(1)])
    for rows in {*range(1, min(most, 14)), len(x)}:
        assert torch.equal(linear(x[:rows], weight), alone[:rows])
    # Nor a column on the others.
    assert torch.equal(linear(x, weight[7:30]), alone[:, 7:30])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_keeps_what_is_not_finite(isa, dtype):
    x, weight = torch.ones(3, 70, dtype=dtype), torch.ones(9, 70, dtype=dtype)
    x[1, 69], weight[4, 3], weight[5, 68] = float("inf"), float("nan"), -float("inf")
    out = linear(x, weight)
    exact = torch.nn.functional.linear(x.double(), weight.double())
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [0, 5, 16, 17, 300])
def test_linear_of_any_number_of_rows_is_the_same_product(rows, dtype):
    x, weight = random(rows, 96, dtype=dtype), random(40, 96, dtype=dtype, seed=1)
    exact = x.double() @ weight.double().T
    out = linear(x, weight)
    bound = 97 * UNIT * (x.double().abs() @ weight.double().abs().T) + unit(dtype) * exact.abs()
    assert out.shape == (rows, 40) and ((out.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_do_not_depend_on_threads(dtype):
    x, weight = random(13, 1024, dtype=dtype), random(3000, 1024, dtype=dtype, seed=1)
    rows = random(2000, 1024, dtype=dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            gate = rows.clone()
            swiglu_(gate, rows)
            norm = rms_norm(rows, weight[0], 1e-5)
            results.append((linear(x, weight), gate, norm))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def rms_norm_bound(x, weight, eps, dtype):
    scaled = x.double() / (x.double().square().mean(-1, keepdim=True) + eps).sqrt()
    exact = scaled * weight.double()
    # A relative error of the sum of squares counts half; root, quotient and product one unit each.
    relative = (x.shape[-1] / 2 + 4) * UNIT + 2 * unit(dtype)
    return exact, relative * exact.abs() * 1.01 + torch.finfo(dtype).smallest_normal


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 24, 63, 576, 1024])
def test_rms_norm(isa, width, dtype):
    x = random(7, width + 2, dtype=dtype)[:, :width]
    weight = random(width, dtype=dtype, seed=1)
    exact, bound = rms_norm_bound(x, weight, 1e-5, dtype)
    out = rms_norm(x, weight, 1e-5)
    assert out.dtype == dtype and ((out.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_rms_norm(isa, dtype):
    wide, added = random(9, 100, dtype=dtype), random(9, 77, dtype=dtype, seed=1)
    hidden, weight = wide[:, 3:80], random(77, dtype=dtype, seed=2)
    expected = hidden + added
    untouched = wide.clone()
    out = add_rms_norm_(hidden, added, weight, 1e-6)
    assert torch.equal(hidden, expected)
    assert torch.equal(out, rms_norm(expected, weight, 1e-6))
    untouched[:, 3:80] = expected
    assert torch.equal(wide, untouched)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 80, 128])
def test_rotation_rounds_once(isa, head_dim, dtype):
    wide = random(17, 5, 3 * head_dim, dtype=dtype)
    heads = wide[:, :3, head_dim : 2 * head_dim]  # a strided view, as in a fused projection
    angles = 1000 * torch.rand(17, 1, head_dim // 2, generator=torch.manual_seed(1))
    a, b = heads.double().chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    exact = torch.cat((a * cos.double() - b * sin, b * cos.double() + a * sin), dim=-1)
    untouched = wide.clone()
    rotate_(heads, cos, sin)
    # Three float32 operations of at most half a unit each, then one rounding to the dtype.
    magnitude = torch.cat((a.abs() + b.abs(),) * 2, dim=-1)
    bound = 3 * UNIT * magnitude + unit(dtype) * exact.abs() + torch.finfo(dtype).tiny
    assert ((heads.double() - exact).abs() <= bound).all()
    untouched[:, :3, head_dim : 2 * head_dim] = heads
    assert torch.equal(wide, untouched)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglu(isa, dtype):
    gate_up = 8 * random(6, 2 * 333, dtype=dtype)
    gate_up[0, :9] = torch.tensor([0, -0.0, -87, -89, -200, 88, 200, -20, 1e-4]).to(dtype)
    gate, up = gate_up.chunk(2, dim=-1)
    exact = torch.nn.functional.silu(gate.double()) * up.double()
    up_before = up.clone()
    out = swiglu_(gate, up)
    # The exponential is good to two units, sum and quotient to half a unit each.
    bound = (8 * UNIT + 2.02 * unit(dtype)) * exact.abs()
    # Where e^-gate is infinite in float32, at gate < -88.7, the result is 0 as it is in torch.
    overflow = 89 * math.exp(-88.7)
    bound += max(overflow, torch.finfo(dtype).smallest_normal) * (1 + up.double().abs())
    assert ((out.double() - exact).abs() <= bound).all()
    assert out is gate and torch.equal(up, up_before)


def test_swiglu_keeps_what_is_not_finite(isa):
    gate = torch.tensor([[float("nan"), float("inf"), float("-inf")] * 11])
    swiglu_(gate, torch.ones_like(gate))
    # silu(-inf) is -inf / inf, as in torch
    assert torch.equal(gate.isnan(), torch.tensor([[True, False, True] * 11]))
    assert (gate[0, 1::3] == float("inf")).all()


ONES = torch.ones


@pytest.mark.parametrize(
    ("function", "arguments", "named"),
    [
        (linear, (ONES(1, 4), ONES(3, 5)), "weight"),
        (linear, (ONES(1, 4), ONES(3, 4).bfloat16()), "weight"),
        (linear, (ONES(8, 4).T[:2], ONES(3, 8)), "x"),
        (rms_norm, (ONES(2, 4), ONES(3), 1e-5), "weight"),
        (add_rms_norm_, (ONES(2, 4), ONES(3, 4), ONES(4), 0), "added"),
        (rotate_, (ONES(2, 1, 4), ONES(2, 1, 4), ONES(2, 1, 2)), "cos"),
        (rotate_, (ONES(2, 4), ONES(2, 1, 2), ONES(2, 1, 2)), "heads"),
        (swiglu_, (ONES(2, 4), ONES(2, 3)), "up"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(function, arguments, named):
    with pytest.raises(ValueError, match=named):
        function(*arguments)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("linear", lambda: (torch.ones(2, 8), torch.ones(3, 8))),
        ("rms_norm", lambda: (torch.ones(2, 8), torch.ones(8), 1e-5)),
        (
            "add_rms_norm_",
            lambda: (torch.ones(2, 8), torch.ones(2, 8), torch.ones(8), 1e-5),
        ),
        (
            "rotate_",
            lambda: (torch.ones(2, 3, 8), torch.ones(2, 1, 4), torch.ones(2, 1, 4)),
        ),
        ("swiglu_", lambda: (torch.ones(2, 8), torch.ones(2, 8))),
    ],
)
def test_ops_are_as_their_schemas_and_fakes_say(name, arguments):
    op = getattr(torch.ops.cptool, name).default
    torch.library.opcheck(op, arguments(), test_utils=("test_schema", "test_faketensor"))
