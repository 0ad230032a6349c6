"""GPUs that are not there: what cptool uses of torch's CUDA, played on the CPU.

    python fake_cuda.py ARGUMENT... [+ ARGUMENT...]     # as `cptool ARGUMENT...`, one after another
    python fake_cuda.py --selftest cuda KERNEL apart

Environment: FAKE_GPUS, how many there are; FAKE_FREE, bytes of theirs that are free; FAKE_WRONG, a
kernel that fails; FAKE_LOG, a file for what was asked of them, a line of JSON each.

Tensors of the fake are tensors of the CPU that report to be on the process's GPU; operations that
mix them with others fail, as on a GPU. A graph holds the operations between its begin and its end,
and repeats them on the same memory; what would wait for the device meanwhile fails. CUDA kernels
are those of the CPU. So every line of the package for a GPU is run, by ranks too, while nothing
is said of the kernels or of the order of streams.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

_here = [torch.device("cuda", 0)]
_DEVICE, _IS_CUDA, _IS_CPU = (
    getattr(torch.Tensor, name).__get__ for name in ("device", "is_cuda", "is_cpu")
)
_WAITS = {"item", "tolist", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__"}
_MIXES = {"copy_", "to", "cuda", "cpu", "__getitem__", "__setitem__", "type_as", "set_"}
_ops: dict[str, object] = {}


def log(**fields: object) -> None:
    if path := os.environ.get("FAKE_LOG"):
        with open(path, "a") as file:
            file.write(json.dumps(fields) + "\n")


class CudaTensor(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return call(func, args, kwargs or {})


class Mode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return call(func, args, kwargs or {})


MODE = Mode()


def on_gpu(value: object) -> bool:
    return isinstance(value, CudaTensor)


def plain(value):
    """The same memory as a tensor of the CPU."""
    with torch._C.DisableTorchFunctionSubclass():
        return tree_map(lambda x: x.as_subclass(torch.Tensor) if on_gpu(x) else x, value)


def _moved(func, args, kwargs):
    """The arguments with devices replaced by the CPU, and whether the result is to be on a GPU:
    None if nothing says so.
    """
    onto, name, args, kwargs = None, getattr(func, "__name__", ""), list(args), dict(kwargs)
    kwargs.pop("pin_memory", None)
    if name in ("cuda", "cpu") and args and isinstance(args[0], torch.Tensor):
        return torch.Tensor.to, [args[0], "cpu"], {}, name == "cuda"
    places = [(kwargs, "device")] if kwargs.get("device") is not None else []
    places += [(args, i) for i, value in enumerate(args) if isinstance(value, torch.device)]
    if name == "to" and len(args) > 1 and isinstance(args[1], str):
        places.append((args, 1))
    for holder, key in places:
        device = torch.device(holder[key])
        onto = device.type == "cuda"
        holder[key] = "cpu" if onto else device
    return func, args, kwargs, onto


def call(func, args, kwargs):
    """Carry out one function of torch."""
    if func == _DEVICE:
        return _here[0] if on_gpu(args[0]) else _DEVICE(*args)
    if func in (_IS_CUDA, _IS_CPU):
        if on_gpu(args[0]):
            return func == _IS_CUDA
        return func(*args)
    if isinstance(func, torch._ops.OpOverload) and func.namespace == "cptool":
        with MODE:
            return _ops[func._schema.name.partition("::")[2]](*args, **kwargs)
    if func is torch.device:
        return func(*args, **kwargs)
    name = getattr(func, "__name__", "")
    if name == "pin_memory":
        return args[0]
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    here = [on_gpu(x) for x in tensors]
    if any(here) and name == "numpy":
        raise TypeError("can't convert cuda:0 device type tensor to numpy")
    if any(here) and Graph.recording is not None and name in _WAITS:
        raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
    func, args, kwargs, onto = _moved(func, args, kwargs)
    with torch._C.DisableTorchFunctionSubclass():
        mixed = any(here) and not all(x for x, t in zip(here, tensors, strict=True) if t.dim())
        if mixed and onto is None and name not in _MIXES and name != "__get__":
            raise RuntimeError(
                f"{name}: Expected all tensors to be on the same device, but found cuda:0 and cpu"
            )
        moves = onto is not None and tensors and here[0] != onto
        result = func(*args, **kwargs)
        to_gpu = onto if onto is not None else any(here)

        def placed(x):
            if not isinstance(x, torch.Tensor) or _DEVICE(x).type == "meta":
                return x
            if moves and any(x is t for t in tensors):  # `to` copies from device to device
                x = x.as_subclass(torch.Tensor).clone()
            if to_gpu and not on_gpu(x):
                return x.as_subclass(CudaTensor)
            return x.as_subclass(torch.Tensor) if not to_gpu and on_gpu(x) else x

        placed_result = tree_map(placed, result)
        if Graph.recording is not None and name != "__get__":
            Graph.recording.calls.append((func, args, kwargs, placed_result))
    return placed_result


class Graph:
    """torch.cuda.CUDAGraph."""

    recording: Graph | None = None

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def replay(self) -> None:
        log(event="replay", calls=len(self.calls))
        with torch._C.DisableTorchFunction():
            for func, args, kwargs, result in self.calls:
                again = func(*args, **kwargs)
                pairs = zip(tree_flatten(result)[0], tree_flatten(again)[0], strict=True)
                for kept, new in pairs:
                    if isinstance(kept, torch.Tensor) and kept.data_ptr() != new.data_ptr():
                        kept.copy_(new)


@contextlib.contextmanager
def graph(of: Graph, **options):
    log(event="capture", **options)
    Graph.recording = of
    try:
        yield
    finally:
        Graph.recording = None


class Event:
    def __init__(self, enable_timing: bool = False, **_) -> None:
        self.timed, self.at = enable_timing, 0.0

    def record(self, stream: object = None) -> None:
        self.at = time.perf_counter()

    def wait(self, stream: object = None) -> None: ...

    def synchronize(self) -> None:
        if Graph.recording is not None:
            raise RuntimeError("operation not permitted when stream is capturing")

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Event) -> float:
        assert self.timed and other.timed
        return 1e3 * (other.at - self.at)


class Stream:
    cuda_stream = 7

    def __init__(self, device: object = None, priority: int = 0) -> None: ...

    def wait_stream(self, stream: Stream) -> None: ...

    def wait_event(self, event: Event) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record()
        return event


class Extension:
    """The extension with CUDA functions that call those of the CPU."""

    cuda_archs = "80 90a"
    cuda_kernels_compiled = ("simt", "sm80", "sm90")
    limit = "sm90"

    def __init__(self, real: object) -> None:
        self.real = real
        for name in ("merge_partials", "rms_norm", "rotate", "swiglu"):
            setattr(self, f"{name}_cuda", self._on_the_cpu(name, 1))
        self.attention_partial_cuda = self._on_the_cpu("attention_partial", 2)

    def __getattr__(self, name: str):
        return getattr(self.real, name)

    def _on_the_cpu(self, name: str, last: int):
        run = getattr(self.real, f"{name}_cpu")

        def function(*arguments):
            assert arguments[-1] == Stream.cuda_stream
            if name == "attention_partial":
                log(event="attention", sm_margin=arguments[28], limit=self.limit)
            mine = (*arguments[:-last], 1)
            if name == "attention_partial" and self.limit == os.environ.get("FAKE_WRONG"):
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            run(*mine)
            if Graph.recording is not None:
                Graph.recording.calls.append((run, mine, {}, None))

        return function

    def attention_workspace_cuda(self, *arguments) -> int:
        return 1024

    def cuda_kernels(self) -> list[str]:
        return list(self.cuda_kernels_compiled)

    def cuda_kernel(self, *arguments) -> str:
        return self.limit

    def force_cuda_kernel(self, name: str | None) -> bool:
        self.limit = name or "sm90"
        return self.limit in self.cuda_kernels_compiled


def _unwrapped(function):
    """A function of torch.distributed, which carries tensors of the CPU, in graphs too."""

    def carried(*args, **kwargs):
        args, kwargs = plain(args), plain(kwargs)
        if Graph.recording is not None:
            Graph.recording.calls.append((function, args, kwargs, None))
        return function(*args, **kwargs)

    return carried


class NcclOptions:
    """torch.distributed.ProcessGroupNCCL.Options."""

    def __init__(self, is_high_priority_stream: bool = False) -> None:
        self.is_high_priority_stream, self._timeout = is_high_priority_stream, None
        self.config = SimpleNamespace(max_ctas=-(2**31))


def fake_nccl() -> None:
    """Have gloo's groups take and show the options of NCCL's."""
    dist.ProcessGroupNCCL = SimpleNamespace(Options=NcclOptions)
    real_new, real_backend = dist.new_group, dist.ProcessGroup._get_backend
    given: dict[str, NcclOptions] = {}

    def new_group(ranks=None, timeout=None, *, pg_options=None, **others):
        group = real_new(ranks, timeout, **others)
        if isinstance(group, dist.ProcessGroup):
            options = given[group.group_name] = pg_options or NcclOptions()
            assert pg_options is None or options._timeout == timeout
            blocks = max(0, options.config.max_ctas)
            high = options.is_high_priority_stream
            log(event="subgroup", ranks=ranks, blocks=blocks, high=high)
        return group

    def get_backend(self, device):
        if device.type == "cuda" and self.group_name in given:
            return SimpleNamespace(options=given[self.group_name])
        return real_backend(self, device)

    dist.new_group = dist.distributed_c10d.new_group = new_group
    dist.ProcessGroup._get_backend = get_backend


def set_device(device: torch.device) -> None:
    log(event="device", index=device.index)
    _here[0] = device


def install(gpus: int) -> None:
    """Have this process find `gpus` GPUs, before it imports what uses them."""
    from cptool.distributed import devices
    from cptool.ops import extension

    free = int(os.environ.get("FAKE_FREE") or 8 << 30)
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: gpus,
        "set_device": set_device,
        "current_device": lambda: 0,
        "get_device_name": lambda index=0: "Fake GPU",
        "mem_get_info": lambda device=None: (free, 16 << 30),
        "memory_reserved": lambda device=None: 0,
        "memory_allocated": lambda device=None: 1 << 20,
        "max_memory_allocated": lambda device=None: 1 << 20,
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
        "synchronize": lambda device=None: None,
        "current_stream": lambda device=None: Stream(),
        "is_current_stream_capturing": lambda: Graph.recording is not None,
        "stream": lambda stream: contextlib.nullcontext(),
        "device": lambda device: contextlib.nullcontext(),
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": graph,
    }.items():
        setattr(torch.cuda, name, value)

    real_init = dist.init_process_group

    def init_process_group(backend, **options):
        log(event="group", backend=backend)
        return real_init("gloo", **options)

    dist.init_process_group = init_process_group
    fake_nccl()
    for name in (
        "all_reduce",
        "all_gather",
        "all_gather_into_tensor",
        "all_gather_single",
        "P2POp",
    ):
        if hasattr(dist, name):
            setattr(dist, name, _unwrapped(getattr(dist, name)))

    real_impl = torch.library.Library.impl

    def impl(self, name, function, *rest, **options):
        if self.ns == "cptool":
            _ops[name] = function
        return real_impl(self, name, function, *rest, **options)

    torch.library.Library.impl = impl
    loaded = Extension(extension.load())
    extension.load = lambda: loaded
    devices._gpus = lambda: gpus
    MODE.__enter__()
    from cptool.ops import trials

    trials.command = lambda device, kernel: [
        *(sys.executable, __file__, "--selftest"),
        *(device, kernel, trials.APART),
    ]


def main(arguments: list[str]) -> int:
    install(int(os.environ["FAKE_GPUS"]))
    if arguments[:1] == ["--selftest"]:
        from cptool.exactness import selftest

        os.environ.pop("FAKE_LOG", None)
        return selftest.main(arguments[1:])
    from multiprocessing import forkserver

    preload = forkserver.set_forkserver_preload
    forkserver.set_forkserver_preload = lambda names: preload(["fake_cuda_ranks", *names])
    from cptool.cli.main import main as cptool

    commands = [list(words) for last, words in itertools.groupby(arguments, "+".__ne__) if last]
    for command in commands:
        log(event="command", arguments=command)
        try:
            cptool(command, prog_name="cptool")
        except SystemExit as end:
            log(event="end", code=end.code or 0)
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.modules["fake_cuda"] = sys.modules["__main__"]
    sys.exit(main(sys.argv[1:]))
