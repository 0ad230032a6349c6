"""The CUDA kernels on the CPU: csrc/cuda compiled by g++ against tests/cuda_emulation.

Every CUDA thread is a fiber, scheduled in an order drawn from a seed (fibers.h): what a kernel
computes, its barriers and its asynchronous copies are tested without a GPU, its speed is not.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from cptool.ops.checks import SCALAR_TYPES

ROOT = Path(__file__).resolve().parents[2]
EMULATION = ROOT / "tests" / "cuda_emulation"
FLAGS = "-std=c++17 -O2 -fPIC -w".split()
REPORTED = ["-fsanitize=thread"]  # loads and stores, to tests/cuda_emulation/races.cpp
_PROCESSOR = Path("/proc/cpuinfo")
if _PROCESSOR.exists() and " fma " in _PROCESSOR.read_text():
    FLAGS += ["-mfma", "-ffp-contract=fast"]  # like nvcc, which fuses products into sums


class _AttentionArgs(ctypes.Structure):
    """csrc/attention.h."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in "qkv"],
        *[(f"{name}_{of}_stride", ctypes.c_int64) for name in "qkv" for of in ("token", "head")],
        *[(name, ctypes.c_void_p) for name in ("q_pos", "k_pos", "cu_q", "cu_k")],
        *[
            (name, ctypes.c_int64)
            for name in ("batch", "q_tokens", "k_tokens", "q_heads", "kv_heads", "head_dim")
        ],
        ("scale", ctypes.c_float),
        ("q_dtype", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("out_dtype", ctypes.c_int32),
        ("out", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
        ("accumulate", ctypes.c_bool),
        ("window", ctypes.c_int64),
        ("cap", ctypes.c_float),
        ("sm_margin", ctypes.c_int32),
        ("max_len", ctypes.c_float),
    ]


def _arguments(q, k, v, q_pos, k_pos, cu_q, cu_k, scale, out, lse, accumulate) -> _AttentionArgs:
    return _AttentionArgs(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        q_pos.data_ptr(),
        k_pos.data_ptr(),
        cu_q.data_ptr(),
        cu_k.data_ptr(),
        len(cu_q) - 1,
        len(q),
        len(k),
        q.shape[1],
        k.shape[1],
        q.shape[2],
        scale,
        SCALAR_TYPES[q.dtype],
        SCALAR_TYPES[k.dtype],
        SCALAR_TYPES[out.dtype],
        out.data_ptr(),
        lse.data_ptr(),
        accumulate,
    )


class _MergeArgs(ctypes.Structure):
    _fields_ = [
        ("outs", ctypes.POINTER(ctypes.c_void_p)),
        ("lses", ctypes.POINTER(ctypes.c_void_p)),
        *[(name, ctypes.c_int64) for name in ("partials", "rows", "head_dim")],
        ("dtype", ctypes.c_int32),
        ("out_dtype", ctypes.c_int32),
        ("out", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
    ]


class Counters(ctypes.Structure):
    """What launches did: emulation::Counters in fibers.h."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in ("blocks", "switches", "collectives", "bank_conflicts", "votes_won")
    ]


class Emulator:
    """The ops on tensors of the CPU, as the CUDA kernels compute them.

    `entries`: functions of the library's driver that return a text, a mistake or a name.
    """

    entries: tuple[str, ...] = ("emulated_attention", "emulated_merge", "emulated_kernel")

    def __init__(self, library: Path):
        self._library = ctypes.CDLL(str(library))
        for name in self.entries:
            getattr(self._library, name).restype = ctypes.c_char_p
        self._library.emulated_force.restype = ctypes.c_bool

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_pos: Tensor,
        k_pos: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        scale: float,
        into: tuple[Tensor, Tensor] | None = None,
        out_dtype: torch.dtype = torch.float32,
        seed: int = 0,
        kernel: str | None = None,
        readable: Sequence[Tensor] = (),
        workspace: bool = True,
        window: int | None = None,
        cap: float | None = None,
        sm_margin: int = 0,
        max_len: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """`kernel`: the fastest that may take the call, None for any. `readable`: the rows of
        memory, each a contiguous tensor, that asynchronous copies may touch; none: all.
        `workspace`: whether the call gets the one it needs. `max_len`: of SiLU attention, which
        leaves lse alone. Raises RuntimeError for what is wrong.
        """
        out, lse = into or (
            torch.full(q.shape, torch.nan, dtype=out_dtype),
            torch.full(q.shape[:2], torch.nan),
        )
        arguments = _arguments(q, k, v, q_pos, k_pos, cu_q, cu_k, scale, out, lse, into is not None)
        arguments.window, arguments.cap, arguments.max_len = window or 0, cap or 0.0, max_len
        arguments.sm_margin = sm_margin
        assert self._library.emulated_force(kernel and kernel.encode()), kernel
        ends = [(x.data_ptr(), x.data_ptr() + x.nbytes) for x in readable]
        ranges = (ctypes.c_void_p * (2 * len(ends)))(*[end for pair in ends for end in pair])
        self._library.emulated_readable(ranges, len(ends))
        self._run("emulated_attention", arguments, seed, ctypes.c_bool(workspace))
        return out, lse

    def kernel(
        self, *arguments, window: int | None = None, cap: float | None = None, max_len: int = 0
    ) -> str:
        """The kernel that takes such a call of :meth:`attention`."""
        q = arguments[0]
        out, lse = torch.empty(q.shape), torch.empty(q.shape[:2])
        assert self._library.emulated_force(None)
        call = _arguments(*arguments, out, lse, False)
        call.window, call.cap, call.max_len = window or 0, cap or 0.0, max_len
        return self._library.emulated_kernel(ctypes.byref(call)).decode()

    def merge(
        self,
        outs: Sequence[Tensor],
        lses: Sequence[Tensor],
        out_dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> tuple[Tensor, Tensor]:
        out = torch.full(outs[0].shape, torch.nan, dtype=out_dtype)
        lse = torch.full(lses[0].shape, torch.nan)
        pointers = [
            (ctypes.c_void_p * len(tensors))(*[x.data_ptr() for x in tensors])
            for tensors in (outs, lses)
        ]
        arguments = _MergeArgs(
            *pointers,
            len(outs),
            lse.numel(),
            out.shape[-1],
            SCALAR_TYPES[outs[0].dtype],
            SCALAR_TYPES[out_dtype],
            out.data_ptr(),
            lse.data_ptr(),
        )
        self._run("emulated_merge", arguments, seed)
        return out, lse

    @contextlib.contextmanager
    def unwatched(self) -> Iterator[None]:
        """No race is looked for, for calls whose rows overlap."""
        self._library.emulated_races(ctypes.c_bool(False))
        try:
            yield
        finally:
            self._library.emulated_races(ctypes.c_bool(True))

    def counters(self) -> Counters:
        """Since the last call."""
        counters = Counters()
        self._library.emulated_counters(ctypes.byref(counters))
        return counters

    def _run(self, name: str, arguments: ctypes.Structure, seed: int, *others) -> None:
        run = getattr(self._library, name)
        message = run(ctypes.byref(arguments), ctypes.c_uint64(seed), *others)
        if message is not None:
            raise RuntimeError(message.decode())


def compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


def _compile(directory: Path, sources: Sequence[Path], options: Sequence) -> list[Path]:
    objects, running = [], []
    for source in sources:
        objects.append(directory / f"{source.parent.name}-{source.stem}.o")
        command = [compiler(), *options, "-x", "c++", "-c", source, "-o", objects[-1]]
        running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    for process in running:
        errors = process.communicate()[1]
        assert process.returncode == 0, errors[:4000]
    return objects


@functools.cache
def _own_objects() -> list[Path]:
    """What every library holds of the emulation, compiled once."""
    directory = Path(tempfile.mkdtemp(prefix="cuda_emulation-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    sources = [EMULATION / "fibers.cpp", EMULATION / "races.cpp"]
    return _compile(directory, sources, [*FLAGS, "-I", EMULATION])


def build(
    directory: Path,
    sources: Sequence[Path],
    name: str = "emulated",
    *,
    csrc: Path = ROOT / "csrc",
    flags: Sequence[str] = (),
) -> Path:
    """The shared library of `sources` (.cu or .cpp) and the emulation, compiled in parallel.

    csrc: where the headers of the kernels are.
    """
    options = [*FLAGS, *flags, *REPORTED, "-I", EMULATION, "-I", csrc]
    objects = _compile(directory, sources, options)
    # Of an inline function the first definition is linked: the emulation's own is not reported.
    objects = [*_own_objects(), *objects]
    library = directory / f"lib{name}.so"
    subprocess.run([compiler(), "-shared", *objects, "-o", library], check=True)
    return library


def build_mistakes(directory: Path, source: str) -> Callable[..., str | None]:
    """What the emulation says of a program of `source` (.cpp) in the order of a seed, if anything:
    call it with the program's name, the seed and whether to look for races.
    """
    library = ctypes.CDLL(str(build(directory, [EMULATION / f"{source}.cpp"], source)))

    def run(name: str, seed: int = 0, races: bool = False) -> str | None:
        library.look_for_races(ctypes.c_bool(races))
        function = getattr(library, name)
        function.restype = ctypes.c_char_p
        message = function(ctypes.c_uint64(seed))
        return message and message.decode()

    return run


def build_kernels(
    directory: Path, *, csrc: Path = ROOT / "csrc", flags: Sequence[str] = ()
) -> Emulator:
    """All of csrc/cuda but sm90."""
    sources = sorted([*csrc.glob("cuda/*.cu"), *csrc.glob("cuda/sm80/*.cu")])
    driver = EMULATION / "driver.cpp"
    return Emulator(build(directory, [*sources, driver], csrc=csrc, flags=flags))
