"""Which kernels the extension has, which one takes a call, and how to force another."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from cptool.errors import UserError
from cptool.ops import extension
from cptool.ops.checks import (
    SCALAR_TYPES,
)
from cptool.ops.encodings import ENCODINGS

EXTENSION = _C = extension.load()
"""The compiled extension, kept to the kernels that CPTOOL_ISA and CPTOOL_CUDA_KERNEL name."""


def cpu_isas() -> list[str]:
    """Return the instruction sets whose CPU kernels this build has and this machine runs, each
    after those that it extends.
    """
    return _C.cpu_isas()


def cpu_slow_isas() -> list[str]:
    """Return those of :func:`cpu_isas` whose kernels are slower on this processor than those of the
    sets that they extend. They run only if CPTOOL_ISA or :func:`force_cpu_isa` names them.
    """
    return _C.cpu_slow_isas()


def cpu_isa(dtype: torch.dtype, head_dim: int = 128, kv_dtype: torch.dtype | None = None) -> str:
    """Return the instruction set whose kernel takes CPU calls of this dtype and head dimension,
    with keys and values of `kv_dtype` if that differs.
    """
    return _C.cpu_isa(SCALAR_TYPES[dtype], SCALAR_TYPES[kv_dtype or dtype], head_dim)


def cpu_stream_rows(
    dtype: torch.dtype, head_dim: int = 128, kv_dtype: torch.dtype | None = None
) -> int:
    """Return the rows of a KV head (query tokens times query heads that share it) up to which CPU
    calls of this dtype and head dimension read keys and values as they lie, without packing them; 0
    where the kernel in use has one way to read them.
    """
    return _C.cpu_stream_rows(SCALAR_TYPES[dtype], SCALAR_TYPES[kv_dtype or dtype], head_dim)


def cpu_linear_isa(dtype: torch.dtype) -> str:
    """Return the instruction set of the kernel that multiplies few rows of this dtype."""
    return _C.cpu_linear_isa(SCALAR_TYPES[dtype])


def cpu_stored_isa(encoding: str) -> str:
    """Return the instruction set of the kernel that multiplies few rows with weights as they are
    stored. encoding: one of `ENCODINGS`.
    """
    return _C.cpu_stored_isa(ENCODINGS[encoding])


def cpu_product_isa() -> str:
    """Return the instruction set of the kernel for float32 products of many rows with weights as
    they are stored; empty where they are widened for torch.
    """
    return _C.cpu_product_isa()


def cpu_dense_isa() -> str:
    """Return the same for weights in float32; empty where they are left to torch.

    That is so with AVX-512: measured on a Xeon, oneDNN takes 0.9 of the kernel's time for 64 and
    128 rows, and as long for 1,024.
    """
    isa = cpu_product_isa()
    return "" if isa == "avx512" else isa


@contextmanager
def force_cpu_isa(name: str) -> Iterator[None]:
    """Use no CPU kernel beyond `name` inside the context, in all threads.

    The environment's CPTOOL_ISA does so for a whole process. A kernel that doesn't take a dtype or
    head dimension leaves the call to the next slower one (:func:`cpu_isa` tells). Raises ValueError
    for a name that isn't in :func:`cpu_isas`.
    """
    global _forced_isa
    previous = _forced_isa
    if not _C.force_cpu_isa(name):
        raise ValueError(
            f"CPU instruction set is {name!r}; it must be one of {', '.join(cpu_isas())}"
        )
    _forced_isa = name
    try:
        yield
    finally:
        _forced_isa = previous
        _C.force_cpu_isa(previous)


def cuda_kernels() -> list[str]:
    """Return the CUDA attention kernels that this build has and the current device runs, slowest
    first: "simt", "sm80", "sm90". Empty without a device or without CUDA kernels.
    """
    return _C.cuda_kernels() if _C.cuda_archs else []


def cuda_kernel(
    dtype: torch.dtype,
    head_dim: int = 128,
    tokens: int = 4096,
    *,
    window: int | None = None,
    cap: float | None = None,
) -> str:
    """Return the CUDA attention kernel that takes a call of this dtype and head dimension,
    contiguous, of one sequence with `tokens` queries and keys of 8 heads; on the current device.
    window, cap: as for `attention_partial`.
    """
    stride = 8 * head_dim, head_dim
    return _C.cuda_kernel(
        *(0, *stride) * 3,
        0,
        0,
        0,
        0,
        1,
        tokens,
        tokens,
        8,
        8,
        head_dim,
        1.0,
        SCALAR_TYPES[dtype],
        SCALAR_TYPES[dtype],
        SCALAR_TYPES[torch.float32],
        0,
        0,
        False,
        *(window or 0, cap or 0.0, 0, 0.0),  # no margin, softmax
    )


@contextmanager
def force_cuda_kernel(name: str) -> Iterator[None]:
    """Use no CUDA attention kernel beyond `name` inside the context, in all threads.

    The environment's CPTOOL_CUDA_KERNEL does so for a whole process. A kernel that doesn't take a
    call (its dtype, head dimension or alignment) leaves it to the next slower one. Raises
    ValueError for a name that isn't in :func:`cuda_kernels`.
    """
    global _forced_cuda_kernel
    if name not in cuda_kernels():
        raise ValueError(
            f"CUDA kernel is {name!r}; it must be one of {', '.join(cuda_kernels()) or 'none'}"
        )
    previous = _forced_cuda_kernel
    _C.force_cuda_kernel(name)
    _forced_cuda_kernel = name
    try:
        yield
    finally:
        _forced_cuda_kernel = previous
        _C.force_cuda_kernel(previous)


def limit_cuda_kernels(name: str) -> None:
    """Use no CUDA attention kernel beyond `name` in this process from now on."""
    global _forced_cuda_kernel
    if not _C.force_cuda_kernel(name):
        raise ValueError(f"CUDA kernel is {name!r}; it is not in this build")
    _forced_cuda_kernel = name


def build_info() -> dict[str, Any]:
    """Return what was built: ``compiler``, CPU ``isas``, ``cuda_archs`` (empty: no CUDA kernels),
    ``cuda_kernels``, and ``watchdog``: whether a kernel that would hang ends in an error.
    """
    return {
        "compiler": _C.compiler,
        "isas": _C.isas_compiled,
        "cuda_archs": _C.cuda_archs.split(),
        "cuda_kernels": _C.cuda_kernels_compiled if _C.cuda_archs else [],
        "watchdog": _C.watchdog,
    }


_forced_isa: str | None = os.environ.get("CPTOOL_ISA") or None
if _forced_isa and not _C.force_cpu_isa(_forced_isa):
    raise UserError(
        f"CPTOOL_ISA is {_forced_isa!r}; "
        f"it must be one of {', '.join(cpu_isas())} on this machine: unset it"
    )

# Asking the device would start its driver, so whether it runs the kernel is not checked here.
_forced_cuda_kernel: str | None = os.environ.get("CPTOOL_CUDA_KERNEL") or None
if _forced_cuda_kernel and not (_C.cuda_archs and _C.force_cuda_kernel(_forced_cuda_kernel)):
    raise UserError(
        f"CPTOOL_CUDA_KERNEL is {_forced_cuda_kernel!r}; it must be one of "
        f"{', '.join(build_info()['cuda_kernels']) or 'none, for there are none in this build'}: "
        "unset it"
    )
