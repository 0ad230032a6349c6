"""Row-wise scaled FP8, widened where the device has no such products, against float64."""

import pytest
import torch

from cptool.ops import fp8
from cptool.ops.fp8 import LARGEST, Fp8Weight, packed, scaled
from cptool.ops.rows import independent_rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def numbers() -> torch.Tensor:
    """All finite numbers of e4m3 in float64, by its definition: 4 bits of exponent with a bias of
    7, 3 of mantissa, subnormal numbers, and no infinity.
    """
    found = []
    for code in range(128):
        exponent, mantissa = code >> 3, code & 7
        if code < 127:
            found.append(
                2.0 ** (exponent - 7) * (1 + mantissa / 8) if exponent else 2.0**-6 * mantissa / 8
            )
    values = torch.tensor(found, dtype=torch.float64)
    return torch.cat([values, -values[1:]])


def random(*shape: int, dtype=torch.float32, seed: int = 1) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (x * torch.logspace(-2, 1, shape[0])[:, None]).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_rounded_to_the_nearest_number_times_their_scale(dtype):
    x = random(9, 200, dtype=dtype)
    values, scale = scaled(x)
    assert scale.shape == (9, 1) and scale.dtype == torch.float32
    whole = x.double()
    largest = whole.abs().amax(1, keepdim=True)
    unit = torch.finfo(dtype).eps
    assert ((scale.double() * LARGEST / largest - 1).abs() <= 2 * unit).all()
    # The nearest number is as near, but for the rounding of the row by its factor before.
    grid = numbers()
    best = (whole[..., None] / scale.double()[..., None] - grid).abs().amin(-1)
    ours = (whole / scale.double() - values.double()).abs()
    assert (ours <= best + unit * LARGEST).all()


def test_rows_of_zeros_and_of_one_large_number():
    x = torch.zeros(3, 32)
    x[1, 3], x[2] = 1e30, 1e-30
    values, scale = scaled(x)
    found = values.double() * scale.double()
    assert torch.isfinite(found).all() and not found[0].any()
    assert found[1, 3] == pytest.approx(1e30, rel=1e-6)


def test_a_packed_matrix_is_what_was_rounded():
    matrix = random(7, 40)
    values, scale = scaled(matrix)
    weight = Fp8Weight(packed(matrix), torch.float32)
    assert torch.equal(weight.widened(), values.float() * scale)
    assert weight.shape == (7, 40) and weight.nbytes == 7 * (40 + 4)
    assert torch.equal(weight.gather(torch.tensor([[3], [0]]))[1, 0], weight.widened()[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_a_product_is_that_of_rounded_rows_and_weights(monkeypatch, dtype, rows):
    monkeypatch.setattr(fp8, "_PIECE", 1000)
    weight, x = Fp8Weight(packed(random(33, 130)), dtype), random(rows, 130, dtype=dtype, seed=2)
    values, scale = scaled(x)
    truth = (values.double() * scale.double()) @ weight.widened().double().T
    terms = (values.double() * scale.double()).abs() @ weight.widened().double().abs().T
    found = weight.linear(x)
    assert found.dtype == dtype
    bound = 130 * torch.finfo(torch.float32).eps * terms
    if dtype != torch.float32:
        bound = bound + torch.finfo(dtype).eps * truth.abs() + torch.finfo(dtype).tiny
    assert ((found.double() - truth).abs() <= bound).all()


def test_rows_do_not_depend_on_each_other():
    weight = Fp8Weight(packed(random(48, 96)), torch.float32)
    most = independent_rows(torch.float32, [weight])
    assert most >= 4
    x = random(most, 96, seed=3)
    together = weight.linear(x)
    for n in range(most):
        assert torch.equal(weight.linear(x[n : n + 1])[0], together[n])


def test_wrong_rows_are_refused():
    weight = Fp8Weight(packed(random(8, 32)), torch.float32)
    for x in (torch.ones(2, 31), torch.ones(2, 32, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match=r"it must be torch.float32 \[rows, 32\]"):
            weight.linear(x)


@pytest.mark.parametrize("shape", [(1, 30), (1, 31), (2, 30), (1, 32)])
def test_a_scale_lies_at_any_place(shape):
    matrix = random(*shape)
    values, scale = scaled(matrix)
    weight = Fp8Weight(packed(matrix), torch.float32)
    assert torch.equal(weight.scale, scale) and torch.equal(
        weight.widened(), values.float() * scale
    )


def test_words_are_those_of_the_matrices(monkeypatch):
    cuda, dtype = torch.device("cuda"), torch.bfloat16
    monkeypatch.setattr(fp8, "_multiplies", lambda *_: True)
    ways = {
        (16, 32): "feed-forward in FP8, multiplied as it is",
        (48, 30): "feed-forward in FP8, widened for each product, which is slow: "
        "rows and depth must be multiples of 16, not 96 x 30 and 30 x 48",
        (24, 32): "feed-forward in FP8, of which 32 x 24 is widened for each product, which is "
        "slow: rows and depth must be multiples of 16, not 32 x 24",
    }
    for (inner, hidden), words in ways.items():
        shapes = [(2 * inner, hidden), (hidden, inner)]
        assert fp8.how_multiplied(cuda, dtype, shapes) == words
        for shape in shapes:
            own = Fp8Weight(packed(random(*shape)), dtype)._own
            assert own != (f"{shape[0]} x {shape[1]}" in words)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("rows", [1, 17, 300])
def test_a_device_multiplies_the_same_numbers(rows):
    cuda = torch.device("cuda")
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no FP8 products before compute capability 8.9")
    matrix = packed(random(64, 256))
    x = random(rows, 256, dtype=torch.bfloat16, seed=2)
    weight = Fp8Weight(matrix.to(cuda), torch.bfloat16)
    assert weight._own and "multiplied as it is" in fp8.how_multiplied(cuda, torch.bfloat16)
    values, scale = scaled(x.to(cuda))
    truth = (values.double() * scale.double()) @ weight.widened().double().T
    terms = (values.double() * scale.double()).abs() @ weight.widened().double().abs().T
    # Fast accumulation keeps 14 bits of sums (DeepSeek-V3, section 3.5.2).
    bound = 2.0**-8 * truth.abs() + 256 * 2.0**-14 * terms
    assert ((weight.linear(x.to(cuda)).double() - truth).abs() <= bound).all()
