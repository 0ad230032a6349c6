"""The CUDA token-wise kernels against float64: emulated on the CPU (cuda_emulator.py), and on a
device where there is one.
"""

import ctypes
import math
from ctypes import c_float, c_int32, c_int64, c_uint64, c_void_p

import cuda_emulator
import pytest
import torch
from test_tokenwise import DTYPES, UNIT, random, rms_norm_bound, unit

from cptool.ops import elementwise
from cptool.ops.checks import SCALAR_TYPES
from cptool.ops.kernels import build_info

# The structures of csrc/tokenwise.h.
FIELDS = {
    "rms_norm": [
        *[(name, c_void_p) for name in ("hidden", "added", "weight", "out")],
        *[(name, c_int64) for name in ("hidden_stride", "rows", "width")],
        ("eps", c_float),
        ("dtype", c_int32),
    ],
    "rotate": [
        ("heads", c_void_p),
        *[(name, c_int64) for name in ("token_stride", "head_stride")],
        *[(name, c_void_p) for name in ("cos", "sin")],
        *[(name, c_int64) for name in ("tokens", "num_heads", "head_dim")],
        ("dtype", c_int32),
    ],
    "swiglu": [
        *[(name, c_void_p) for name in ("gate", "up")],
        *[(name, c_int64) for name in ("gate_stride", "up_stride", "rows", "width")],
        ("dtype", c_int32),
    ],
}


class Emulated:
    """The functions of `cptool.ops.elementwise` on tensors of the CPU."""

    device = "cpu"

    def __init__(self, library):
        self._library = ctypes.CDLL(str(library))
        self._structures = {
            name: type(name, (ctypes.Structure,), {"_fields_": fields})
            for name, fields in FIELDS.items()
        }

    def _run(self, name, *arguments):
        function = getattr(self._library, f"emulated_{name}")
        function.restype = ctypes.c_char_p
        told = function(ctypes.byref(self._structures[name](*arguments)), c_uint64(1))
        if told is not None:
            raise RuntimeError(told.decode())

    def rms_norm(self, x, weight, eps):
        return self.add_rms_norm_(x, None, weight, eps)

    def add_rms_norm_(self, hidden, added, weight, eps):
        out = torch.full(hidden.shape, torch.nan, dtype=hidden.dtype)
        self._run(
            "rms_norm",
            hidden.data_ptr(),
            None if added is None else added.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            hidden.stride(0),
            *hidden.shape,
            eps,
            SCALAR_TYPES[hidden.dtype],
        )
        return out

    def rotate_(self, heads, cos, sin):
        self._run(
            "rotate",
            heads.data_ptr(),
            *heads.stride()[:2],
            cos.data_ptr(),
            sin.data_ptr(),
            *heads.shape,
            SCALAR_TYPES[heads.dtype],
        )

    def swiglu_(self, gate, up):
        self._run(
            "swiglu",
            gate.data_ptr(),
            up.data_ptr(),
            gate.stride(0),
            up.stride(0),
            *gate.shape,
            SCALAR_TYPES[gate.dtype],
        )
        return gate


class OnDevice:
    """The same on a GPU, by way of the package."""

    device = "cuda"

    def __getattr__(self, name):
        return getattr(elementwise, name)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if cuda_emulator.compiler() is None:
        pytest.skip("no C++ compiler")
    sources = [
        cuda_emulator.ROOT / "csrc" / "cuda" / "tokenwise.cu",
        cuda_emulator.EMULATION / "tokenwise_driver.cpp",
    ]
    return cuda_emulator.build(tmp_path_factory.mktemp("emulated"), sources, "tokenwise")


@pytest.fixture(params=["emulated", pytest.param("device", marks=pytest.mark.gpu)])
def cuda(request):
    if request.param == "emulated":
        return Emulated(request.getfixturevalue("library"))
    if not torch.cuda.is_available() or not build_info()["cuda_archs"]:
        pytest.skip("no CUDA device, or built without CUDA kernels")
    return OnDevice()


def placed(x, cuda, shift=0):
    """A copy on the kernels' device whose first element lies `shift` elements from an aligned
    address."""
    storage = torch.empty(x.numel() + shift, dtype=x.dtype, device=cuda.device)
    return storage[shift:].view(x.shape).copy_(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("width", [8, 576, 2048 + 8, 16384 + 24])
def test_rms_norm(cuda, width, shift, dtype):
    rows = 5 if width < 1000 else 2
    x, weight = random(rows, width, dtype=dtype), random(width, dtype=dtype, seed=1)
    exact, bound = rms_norm_bound(x, weight, 1e-5, dtype)
    out = cuda.rms_norm(placed(x, cuda, shift), placed(weight, cuda, shift), 1e-5).cpu()
    assert out.dtype == dtype and ((out.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [80, 2048 + 8, 16384 + 24])
def test_add_rms_norm(cuda, width, dtype):
    wide, added = random(3, width + 16, dtype=dtype), random(3, width, dtype=dtype, seed=1)
    weight = placed(random(width, dtype=dtype, seed=2), cuda)
    expected = wide.clone()
    expected[:, 8 : 8 + width] += added
    there = placed(wide, cuda)
    hidden = there[:, 8 : 8 + width]
    out = cuda.add_rms_norm_(hidden, placed(added, cuda), weight, 1e-6)
    assert torch.equal(there.cpu(), expected)  # what lies around it, too
    assert torch.equal(out, cuda.rms_norm(hidden.contiguous(), weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(("tokens", "head_dim"), [(1, 128), (17, 16), (5, 80), (3, 8)])
def test_rotation_rounds_once(cuda, tokens, head_dim, shift, dtype):
    wide = random(tokens, 5, 3 * head_dim, dtype=dtype)
    angles = 1000 * torch.rand(tokens, 1, head_dim // 2, generator=torch.manual_seed(1))
    a, b = wide[:, :3, head_dim : 2 * head_dim].double().chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    exact = torch.cat((a * cos.double() - b * sin, b * cos.double() + a * sin), dim=-1)
    there = placed(wide, cuda, shift)
    cuda.rotate_(there[:, :3, head_dim : 2 * head_dim], placed(cos, cuda), placed(sin, cuda))
    got = there.cpu()
    magnitude = torch.cat((a.abs() + b.abs(),) * 2, dim=-1)
    bound = 3 * UNIT * magnitude + unit(dtype) * exact.abs() + torch.finfo(dtype).tiny
    assert ((got[:, :3, head_dim : 2 * head_dim].double() - exact).abs() <= bound).all()
    got[:, :3, head_dim : 2 * head_dim] = wide[:, :3, head_dim : 2 * head_dim]
    assert torch.equal(got, wide)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(("rows", "width"), [(6, 328), (1, 8), (300, 16)])
def test_swiglu(cuda, rows, width, shift, dtype):
    gate_up = 8 * random(rows, 2 * width, dtype=dtype)
    gate_up[0, :8] = torch.tensor([0, -0.0, -87, -89, -200, 88, 200, 1e-4]).to(dtype)
    gate, up = gate_up.chunk(2, dim=-1)
    exact = torch.nn.functional.silu(gate.double()) * up.double()
    there = placed(gate_up, cuda, shift)
    ours, theirs = there.chunk(2, dim=-1)
    out = cuda.swiglu_(ours, theirs)
    bound = (8 * UNIT + 2.02 * unit(dtype)) * exact.abs()
    overflow = 89 * math.exp(-88.7)  # where e^-gate is infinite in float32
    bound += max(overflow, torch.finfo(dtype).smallest_normal) * (1 + up.double().abs())
    assert ((out.cpu().double() - exact).abs() <= bound).all()
    assert torch.equal(theirs.cpu(), up)


def test_nothing_to_do(cuda):
    empty = torch.empty(0, 64, device=cuda.device)
    assert cuda.rms_norm(empty, torch.ones(64, device=cuda.device), 1e-5).shape == (0, 64)
    cuda.swiglu_(empty, empty)
    none = torch.empty(0, 1, 8, device=cuda.device)
    cuda.rotate_(torch.empty(0, 3, 16, device=cuda.device), none, none)


def test_widths_that_the_kernels_do_not_take(library):
    with pytest.raises(RuntimeError, match="width that is a multiple of 8; it is 12"):
        Emulated(library).rms_norm(torch.ones(2, 12), torch.ones(12), 1e-5)
