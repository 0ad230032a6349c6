"""Products of many rows in float32 by the kernels that pack the matrix, of AVX2, AVX-512
and AMX.
"""

import pytest
import torch
from test_stored import depth_of, matrix

from cptool.ops.encodings import ENCODINGS, FLOAT32
from cptool.ops.kernels import EXTENSION, cpu_isas, cpu_product_isa, force_cpu_isa
from cptool.ops.linear import FEW_ROWS, linear
from cptool.ops.stored import Blocks, StoredWeight, product_arguments

UNIT = torch.finfo(torch.float32).eps / 2
FEWEST = FEW_ROWS[torch.float32] + 1


ROUNDINGS = {"avx2": 1, "avx512": 1, "amx": 6}
"""Of a sum per term: AMX adds up to six products of pieces."""


@pytest.fixture(autouse=True, params=ROUNDINGS)
def isa(request):
    if request.param not in cpu_isas():
        pytest.skip(f"this processor has no {request.param}")
    with force_cpu_isa(request.param):
        assert cpu_product_isa() == request.param
        yield request.param


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.manual_seed(seed))


def product(x, weight):
    """By the kernel, where `linear` leaves weights in float32 to torch too."""
    out = torch.empty(len(x), len(weight))
    place = weight.data_ptr(), 4 * weight.stride(0), *weight.shape, 0, FLOAT32
    EXTENSION.product_cpu(*product_arguments(x, place, out))
    return out


def check(out, x, weight):
    """Hold `out` against float64, with the bound of a float32 sum of `depth` terms. Those of AMX
    lack one rounding each (amx_product.h).
    """
    roundings = ROUNDINGS[cpu_product_isa()]
    exact = x.double() @ weight.double().T
    magnitude = x.double().abs() @ weight.double().abs().T
    bound = (roundings * x.shape[1] + 1) * UNIT * magnitude + torch.finfo(torch.float32).tiny
    assert out.shape == exact.shape and ((out.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("rows", [*range(FEWEST, FEWEST + 6), 144, 151, 600])
@pytest.mark.parametrize(
    ("depth", "columns"), [(1, 1), (7, 15), (64, 16), (255, 33), (257, 130), (576, 1029)]
)
def test_of_float32(rows, depth, columns):
    x = random(rows, depth + 3)[:, 1 : depth + 1]
    weight = random(columns, depth + 5, seed=1)[:, 2 : depth + 2]
    check(product(x, weight), x, weight)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_of_every_stored_type(encoding):
    """They have the bits of the product with the widened matrix, in rotary order too."""
    depth = depth_of(encoding, 3)
    upper, above = matrix(encoding, 48, depth, head_dim=24)
    lower, below = matrix(encoding, 37, depth, seed=1)
    x, values = random(FEWEST + 2, depth), torch.cat([above, below])
    out = StoredWeight([upper, lower]).linear(x)
    check(out, x, values)
    assert torch.equal(out, product(x, values))
    wide = random(FEWEST + 2, 2 * depth)[:, ::2]
    check(StoredWeight([upper]).linear(wide), wide, above)


def test_a_result_depends_on_its_row_and_column_alone():
    x, weight = random(451, 700), random(1200, 700, seed=1)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = product(x, weight)
        torch.set_num_threads(3)
        assert torch.equal(product(x, weight), whole)
    finally:
        torch.set_num_threads(threads)
    for first, rows in ((0, FEWEST), (3, 150), (301, 150)):
        assert torch.equal(product(x[first : first + rows], weight), whole[first : first + rows])
    assert torch.equal(product(x, weight[1021:1060]), whole[:, 1021:1060])


def test_values_that_are_not_finite_stay_where_they_are(isa):
    """With AMX, a sum with an infinite value is not a number."""
    x, weight = torch.ones(FEWEST, 70), torch.ones(9, 70)
    x[1, 69], weight[4, 3], weight[5, 68] = float("inf"), float("nan"), -float("inf")
    x.view(torch.int32)[2, 7] = weight.view(torch.int32)[6, 9] = 0x7FFFFFFF  # a rare NaN
    exact = torch.nn.functional.linear(x.double(), weight.double())
    if isa == "amx":
        exact[exact.isinf()] = float("nan")
    torch.testing.assert_close(product(x, weight).double(), exact, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-12, 1e12, 1e30])
def test_values_of_any_magnitude(magnitude):
    x, weight = magnitude * random(FEWEST, 300), random(40, 300, seed=1)
    weight *= torch.logspace(-6, 6, 300)[torch.randperm(300, generator=torch.manual_seed(2))]
    check(product(x, weight), x, weight)


def test_nothing_to_multiply():
    x = random(20 + FEWEST, 64)
    assert linear(x, random(0, 64)).shape == (20 + FEWEST, 0)
    empty = Blocks(torch.zeros(0, 36, dtype=torch.uint8), "Q4_0")
    assert StoredWeight([empty]).linear(x).shape == (20 + FEWEST, 0)
    assert torch.equal(linear(x[:, :0], random(5, 0)), torch.zeros(20 + FEWEST, 5))


def test_operands_that_the_kernel_does_not_take():
    x, weight = random(64, 2 * FEWEST).T, random(33, 64)
    check(linear(x, weight), x, weight)
    check(linear(x.contiguous(), weight.T.contiguous().T), x, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_registered_op_takes_any_dtype_under_any_cap(isa, dtype):
    x, weight = random(2 * FEWEST, 64).to(dtype), random(33, 64, seed=1).to(dtype)
    exact = x.double() @ weight.double().T
    for cap in (isa, "portable"):
        with force_cpu_isa(cap):
            out = torch.ops.cptool.linear(x, weight)
        torch.testing.assert_close(out.double(), exact, rtol=2e-2, atol=2e-2)


def test_it_is_compiled_without_a_break():
    compiled = torch.compile(linear, fullgraph=True, backend="eager")
    for rows in (4, FEWEST, 2 * FEWEST):
        x, weight = random(rows, 64), random(33, 64, seed=1)
        assert torch.equal(compiled(x, weight), linear(x, weight))
