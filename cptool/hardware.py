"""What the ranks and the links between them can do: the numbers that the cost model reads.

`cptool bench calibrate` measures a profile and keeps it in the user's cache; without one there are
defaults of the right order. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cptool.errors import UserError
from cptool.paths import cache_dir

if TYPE_CHECKING:
    from cptool.distributed import World

FORMAT = 1
REMEDY = "measure it again with `cptool bench calibrate`, or remove the file"


@dataclass(frozen=True)
class HardwareProfile:
    """Rates of one rank, seconds and bytes; all that run at the same time reach them together.

    linear_flops, attention_flops: FLOP/s by dtype name, where rows are many; attention counts
        visible pairs only, `4 D_H` a pair and head.
    memory_bandwidth: B/s at which linear layers read weights and copies read and write.
    cache_bandwidth: B/s at which attention reads keys and values, as it does once a call.
    link_bandwidth: B/s one way. link_latency_s: of a message, from the call to its end.
    message_overhead_s: of each further message of the same batch.
    call_overhead_s: of one call of attention. op_overhead_s: of a copy or another small op.
    layer_overhead_s: of what else a layer does whatever its tokens (projections, norms, the host's
        share). position_s: of bringing the position of one key into sequence order among those of
        all ranks, once a forward.
    transfer_steals: of a transfer's time, the part that compute loses meanwhile: 0 where copy
        engines move it, up to 1 where the cores that compute do.
    ranks_at_once: how many ranks the processors serve at the full rate, None for one device a rank;
        beyond it, ranks take turns.
    threads: CPU threads of a rank that the rates hold for; 0 for another device.
    rule: (alpha, beta, gamma) of the fitted rule of `cptool.strategy`, None if nothing was fitted.
    """

    name: str
    device: str
    linear_flops: dict[str, float] = field(hash=False)
    attention_flops: dict[str, float] = field(hash=False)
    memory_bandwidth: float
    cache_bandwidth: float
    link_bandwidth: float
    link_latency_s: float
    message_overhead_s: float
    call_overhead_s: float
    op_overhead_s: float
    layer_overhead_s: float
    position_s: float
    transfer_steals: float
    ranks_at_once: int | None = None
    threads: int = 0
    rule: tuple[float, float, float] | None = None

    def for_ranks(self, threads: int, processors: int) -> HardwareProfile:
        """The same processors with `threads` for each rank, of `processors` for all ranks."""
        if not self.threads:
            return self
        scale = threads / self.threads
        return dataclasses.replace(
            self,
            linear_flops={name: scale * rate for name, rate in self.linear_flops.items()},
            attention_flops={name: scale * rate for name, rate in self.attention_flops.items()},
            memory_bandwidth=scale * self.memory_bandwidth,
            cache_bandwidth=scale * self.cache_bandwidth,
            ranks_at_once=max(1, processors // threads),
            threads=threads,
        )


def default_profile(device: str) -> HardwareProfile:
    """A plausible machine: ranks of one CPU core each, or of one H100 each over NVLink."""
    if device == "cpu":
        return HardwareProfile(
            name="default CPU core",
            device="cpu",
            linear_flops={"float32": 0.18e12, "bfloat16": 1.4e12, "float16": 0.18e12},
            attention_flops={"float32": 0.16e12, "bfloat16": 0.65e12, "float16": 0.16e12},
            memory_bandwidth=16e9,
            cache_bandwidth=9e9,
            link_bandwidth=1.5e9,
            link_latency_s=150e-6,
            message_overhead_s=50e-6,
            call_overhead_s=20e-6,
            op_overhead_s=3e-6,
            layer_overhead_s=100e-6,
            position_s=60e-9,
            transfer_steals=1.0,
            ranks_at_once=os.cpu_count() or 1,
            threads=1,
        )
    return HardwareProfile(
        name="default H100, NVLink",
        device="cuda",
        linear_flops={"float32": 40e12, "bfloat16": 600e12, "float16": 600e12},
        attention_flops={"float32": 30e12, "bfloat16": 450e12, "float16": 450e12},
        memory_bandwidth=2.5e12,
        cache_bandwidth=2.5e12,
        link_bandwidth=200e9,
        link_latency_s=15e-6,
        message_overhead_s=5e-6,
        call_overhead_s=8e-6,
        op_overhead_s=3e-6,
        layer_overhead_s=60e-6,
        position_s=1e-9,
        transfer_steals=0.05,
    )


def world_profile(world: World) -> HardwareProfile:
    """The profile that all ranks of `world` go by: rank 0's, for the threads that ranks have.

    Collective. Raises UserError if the file is damaged.
    """
    import torch

    machines = world.size // world.local_size
    profile = load_profile(world.device.type).for_ranks(
        torch.get_num_threads(), machines * usable_processors() // world.tp
    )
    # The threads too are those of rank 0: ranks whose profiles differ would choose differently.
    return world.gather(profile)[0]


def usable_processors() -> int:
    """Processors of this machine that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def profile_path() -> Path:
    """Where the measured profile of this machine lies."""
    return cache_dir() / "hardware.json"


def load_profile(device: str) -> HardwareProfile:
    """The measured profile if there is one of this device ("cpu" or "cuda"), else the default.

    Raises UserError if the file is damaged.
    """
    path = profile_path()
    try:
        text = path.read_text()
    except FileNotFoundError:
        return default_profile(device)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); {REMEDY}") from None
    try:
        profiles = json.loads(text)
        if profiles["format"] != FORMAT:
            raise UserError(f"{path} has format {profiles['format']}, not {FORMAT}; {REMEDY}")
        if device not in profiles["devices"]:
            return default_profile(device)
        return _parse(profiles["devices"][device])
    except UserError:
        raise
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); {REMEDY}") from None


def save_profile(profile: HardwareProfile) -> Path:
    """Keeps a measured profile, beside those of other devices, and returns the path."""
    path = profile_path()
    try:
        devices = json.loads(path.read_text())["devices"]
    except (OSError, ValueError, TypeError, KeyError):
        devices = {}  # what could not be read is what this replaces
    devices[profile.device] = dataclasses.asdict(profile)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}")
    draft.write_text(json.dumps({"format": FORMAT, "devices": devices}, indent=2) + "\n")
    draft.replace(path)
    return path


def _parse(fields: dict[str, Any]) -> HardwareProfile:
    """Raises TypeError or ValueError for what no measurement gives."""
    profile = HardwareProfile(**fields)
    rates = [*profile.linear_flops.values(), *profile.attention_flops.values()]
    rates += [profile.memory_bandwidth, profile.cache_bandwidth, profile.link_bandwidth]
    costs = [profile.link_latency_s, profile.message_overhead_s, profile.call_overhead_s]
    costs += [profile.op_overhead_s, profile.layer_overhead_s, profile.position_s]
    costs += [profile.transfer_steals]
    if not rates[:-3] or any(not 0 < rate < float("inf") for rate in rates):
        raise ValueError("a rate is not positive")
    if any(not 0 <= cost < float("inf") for cost in costs):
        raise ValueError("an overhead is negative")
    if profile.rule is None:
        return profile
    alpha, beta, gamma = map(float, profile.rule)
    return dataclasses.replace(profile, rule=(alpha, beta, gamma))
