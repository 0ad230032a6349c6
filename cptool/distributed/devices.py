"""Which device ranks compute on, and how messages travel between such devices."""

from __future__ import annotations

import ctypes
import datetime
import os
import sys
from typing import TYPE_CHECKING, Any

from cptool.errors import OptionError, UserError

if TYPE_CHECKING:
    import torch.distributed as dist


def resolve_device(device: str, local_size: int = 1) -> str:
    """Resolve "auto", "cpu" or "cuda" to "cpu" or "cuda" on a machine that runs `local_size` ranks.

    "auto" is CUDA if every rank has a GPU of its own. With "cuda", ranks share GPUs if there are
    fewer GPUs than ranks. Raises UserError for "cuda" if the build has no CUDA kernels or the
    machine has no GPU.
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


def transport(device: str, local_size: int, requested: str = "auto") -> str:
    """Return how messages travel, "direct" or "staged".

    "direct": by NCCL from GPU to GPU; from memory to memory between the CPU ranks of a machine
    (`cptool.parallel.shared_ring`, or gloo if "direct" is requested); by gloo from machine to
    machine. "staged": through host memory, if ranks share a GPU, which NCCL does not support, or
    if it is requested.

    requested: "auto", "direct" or "staged" (CPTOOL_TRANSPORT). Raises UserError for an unknown
        value, and for "direct" if ranks share a GPU.
    """
    if requested not in ("auto", "direct", "staged"):
        raise UserError(f"CPTOOL_TRANSPORT is {requested!r}; it must be auto, direct or staged")
    shared = device == "cuda" and _gpus() < local_size
    if shared and requested == "direct":
        raise UserError(
            f"CPTOOL_TRANSPORT is 'direct', but {local_size} ranks share {_gpus()} GPUs and NCCL "
            "takes one rank per GPU; unset it, or use fewer ranks"
        )
    return "staged" if shared or requested == "staged" else "direct"


def settle_kernels(index: int, *, tell: bool) -> None:
    """Limit this process to the kernels that are right on GPU `index` (`cptool.ops.trials`).

    tell: whether to print a line if some are not.
    """
    from cptool.ops.trials import settle

    complaint = settle(index)
    if complaint and tell:
        print(f"cptool: {complaint}", file=sys.stderr, flush=True)


NCCL_BLOCKS = 8
"""Most thread blocks of a transfer in a ring by NCCL, each of which fills a multiprocessor.

Attention leaves as many multiprocessors free while a transfer is under way, 6% of an H100: its
kernel otherwise takes every register of the device, and transfers would begin when it ends. Eight
carry the bandwidth of a network adapter; over NVLink more would be faster, but what they carry is
hidden under attention all the same.
"""


def nccl_options(timeout: datetime.timedelta) -> Any:
    """Return options for a group of NCCL whose transfers start beside kernels that fill the rest of
    the device: on streams of high priority, by few thread blocks.
    """
    import torch.distributed as dist

    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options.config.max_ctas = NCCL_BLOCKS
    options._timeout = timeout  # torch warns of another one than its argument's
    return options


def nccl_blocks(group: dist.ProcessGroup) -> int:
    """Return the thread blocks that a transfer of an NCCL group takes at most: by the environment,
    which NCCL prefers, or by the group's options. 0 if neither says.
    """
    import torch

    most = os.environ.get("NCCL_MAX_CTAS", "")
    if most.isdecimal() and int(most):
        return int(most)
    try:
        options: Any = group._get_backend(torch.device("cuda")).options
        return max(0, options.config.max_ctas)  # negative where it is not set
    except (AttributeError, RuntimeError):  # not NCCL, or a torch that does not show them
        return 0


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
    """Return the number of threads that this process can keep busy; see `cptool.host.affinity`."""
    from cptool.host import affinity

    return affinity.cores()
