"""Which device ranks compute on, and how messages travel between such devices."""

from __future__ import annotations

import ctypes

from cptool.errors import OptionError, UserError


def resolve_device(device: str, local_size: int = 1) -> str:
    """What "auto", "cpu" or "cuda" is, "cpu" or "cuda", where a machine runs `local_size` ranks.

    "auto" is CUDA where every rank has a GPU of its own; asked for by name, ranks share GPUs where
    there are fewer. Raises UserError when CUDA is asked for and the build has no CUDA kernels, or
    the machine no GPU.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise OptionError("device", device, "it must be auto, cpu or cuda")
    gpus = 0 if device == "cpu" else _gpus()
    if gpus and not _cuda_kernels():
        if device == "cuda":
            raise OptionError(
                "device",
                device,
                "cptool was built without CUDA kernels",
                "reinstall where nvcc is found, or use `device` cpu",
            )
        return "cpu"
    if device == "cuda" and not gpus:
        raise OptionError("device", device, "torch sees no GPU here", "use `device` cpu")
    return "cuda" if gpus >= local_size or device == "cuda" else "cpu"


def transport(device: str, local_size: int, asked: str = "auto") -> str:
    """How messages travel: "direct", by NCCL from GPU to GPU, from memory to memory between the CPU
    ranks of a machine (`cptool.parallel.shared_ring`; by gloo where "direct" is asked for) and by
    gloo from machine to machine; "staged" through host memory where ranks share a GPU, which NCCL
    does not support, or where that is asked for.

    asked: "auto", or one of these (CPTOOL_TRANSPORT). Raises UserError for a value that is unknown,
    or cannot be.
    """
    if asked not in ("auto", "direct", "staged"):
        raise UserError(f"CPTOOL_TRANSPORT is {asked!r}; it must be auto, direct or staged")
    shared = device == "cuda" and _gpus() < local_size
    if shared and asked == "direct":
        raise UserError(
            f"CPTOOL_TRANSPORT is 'direct', but {local_size} ranks share {_gpus()} GPUs and NCCL "
            "takes one rank a GPU; unset it, or use fewer ranks"
        )
    return "staged" if shared or asked == "staged" else "direct"


def _gpus() -> int:
    try:
        ctypes.CDLL("libcuda.so.1")  # spares machines without a driver the import of torch
    except OSError:
        return 0
    import torch

    return torch.cuda.device_count()


def _cuda_kernels() -> bool:
    from cptool.ops.kernels import build_info

    return bool(build_info()["cuda_archs"])


def cores() -> int:
    """Threads that this process can keep busy: see `cptool.host.affinity`."""
    from cptool.host import affinity

    return affinity.cores()
