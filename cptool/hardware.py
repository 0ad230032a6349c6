"""What the ranks and the links between them can do: the numbers that the cost model reads.

`cptool bench calibrate` measures a profile and keeps it in the user's cache; without one there are
defaults of the right order. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cptool.errors import UserError
from cptool.paths import cache_dir, expanded
from cptool.row_rates import RowRates

if TYPE_CHECKING:
    from cptool.distributed import World

FORMAT = 3
REMEDY = "measure it again with `cptool bench calibrate`, or remove the file"
PROFILES = Path(__file__).parent / "data" / "hardware"
MEASURED = "measured on "
"""How the name of a profile of `cptool bench calibrate` begins."""
_DEFAULTS = {"cpu": "cpu-core", "cuda": "h100-sxm"}


@dataclass(frozen=True)
class Link:
    """What joins the ranks of one host, or those of different hosts; every rank uses it at once.

    bandwidth: B/s one way of a rank that sends to one other.
    fan_out: B/s one way of a rank that sends to several at once.
    latency_s: of a message, from the call to its end; compute does not hide it.
    message_overhead_s: of each further message of the same batch.
    collective_latency_s: of an all-reduce or an exchange of few bytes.
    """

    bandwidth: float
    fan_out: float
    latency_s: float
    message_overhead_s: float
    collective_latency_s: float


Beyond = dict[str, dict[str, tuple[float, float]]]
"""By number of ranks, then by variant: seconds for one new token, and for some on each rank."""


@dataclass(frozen=True)
class HardwareProfile:
    """Rates of one rank, seconds and bytes; all that run at the same time reach them together.

    peak_flops: FLOP/s by dtype name that the maker states, where known; nothing depends on it.
    linear_flops, attention_flops: FLOP/s by dtype name, where rows are many; attention counts
        visible pairs only, `4 D_H` a pair and head. "float8" is for feed-forward layers alone.
    attention_ramp: keys that a query costs beyond those it sees, in each call: the tiles that the
        mask cuts, filling and draining the pipeline. Shorter blocks run slower by it.
    row_rates: by dtype name what linear layers reach from one row to many, alone and beside other
        ranks, where it was measured; else products reach `linear_flops` and read their weights at
        `memory_bandwidth`.
    memory_bytes: of a rank. memory_bandwidth: B/s at which linear layers read weights and small
        ops read and write. cache_bandwidth: B/s at which attention reads keys and values, as it
        does once a call.
    few_query_rows: rows of a KV head up to which a CPU reads keys and values while it computes, at
        `few_query_rate` times the FLOP/s of many.
    block_bandwidth: the rate of reading them for a block of more queries than one and than these
        rows, for which a CPU packs them first; None for that of one query.
    touch_bandwidth: B/s at which a step reads and writes what it has just made or been sent, a few
        megabytes; None for `memory_bandwidth`.
    host_link, network: between ranks of one host, and of different hosts.
    feed_forward: dtype in which the cluster runs gate, up and down, None for that of the rest.
    ranks_per_host: None where a host holds any number.
    call_overhead_s: of one call of attention. op_overhead_s: of a copy or another small op.
    layer_overhead_s: of what else a layer does whatever its tokens (projections, norms, the host's
        share): on a device with a queue, of the host alone, which runs ahead while the device
        computes. forward_overhead_s: of a prefill, once. step_overhead_s: of a decode step on a
        device with a queue, once. wait_s: of a layer of a prefill,
        for each CP rank, beside compute and transfers. skew_s: how far apart ranks come to an
        exchange in a prefill.
    position_s: of bringing the position of one key into sequence order among those of all ranks,
        once a forward.
    transfer_steals: of a transfer's time, the part that compute loses meanwhile: 0 where copy
        engines move it, up to 1 where the cores that compute do.
    ranks_at_once: how many ranks the processors serve at the full rate, None for one device a rank;
        beyond it, ranks take turns.
    threads: CPU threads of a rank that the rates hold for; 0 for another device.
    residual_s: by number of ranks, then by variant: what a layer costs beyond what all else here
        says where it has next to nothing to compute, for one new token and for some on each rank.
        Where it was measured it makes the small costs of messages and calls right for these ranks.
    start_s: likewise, what a forward costs once beyond `forward_overhead_s`: ranks do not come to
        the first layer together, and variants wait for each other differently.
    rule: (alpha, beta, gamma) of the fitted rule of `cptool.strategy`, None if nothing was fitted.
    notes: where each number comes from, by field.
    """

    name: str
    device: str
    linear_flops: dict[str, float] = field(hash=False)
    attention_flops: dict[str, float] = field(hash=False)
    attention_ramp: float
    memory_bytes: float
    memory_bandwidth: float
    cache_bandwidth: float
    host_link: Link
    network: Link
    call_overhead_s: float
    op_overhead_s: float
    layer_overhead_s: float
    forward_overhead_s: float
    step_overhead_s: float
    position_s: float
    wait_s: float = 0.0
    skew_s: float = 0.0
    transfer_steals: float = 0.0
    block_bandwidth: float | None = None
    touch_bandwidth: float | None = None
    row_rates: dict[str, tuple[RowRates, ...]] = field(default_factory=dict, hash=False)
    few_query_rows: int = 0
    few_query_rate: float = 1.0
    feed_forward: str | None = None
    ranks_per_host: int | None = None
    ranks_at_once: int | None = None
    threads: int = 0
    residual_s: Beyond = field(default_factory=dict, hash=False)
    start_s: Beyond = field(default_factory=dict, hash=False)
    rule: tuple[float, float, float] | None = None
    peak_flops: dict[str, float] = field(default_factory=dict, hash=False)
    notes: dict[str, str] = field(default_factory=dict, hash=False, compare=False)

    def ceiling(self, dtype: str) -> float | None:
        """FLOP/s above which a rank did not do what it is said to have done; None where unknown.

        What the maker states; else half as much again as the best that was measured here, which
        another day's clock may reach.
        """
        if dtype in self.peak_flops:
            return self.peak_flops[dtype]
        if not self.name.startswith(MEASURED):
            return None
        return 1.5 * max(self.linear_flops[dtype], self.attention_flops[dtype])

    def link(self, span: int) -> Link:
        """What joins a group of ranks whose first and last lie `span` ranks apart, both counted."""
        inside = self.ranks_per_host is None or span <= self.ranks_per_host
        return self.host_link if inside else self.network

    def residual(self, variant: str, ranks: int, sources: int) -> float:
        """Of a layer on `ranks` ranks of which `sources` have queries."""
        return _beyond(self.residual_s, variant, ranks, sources)

    def start(self, variant: str, ranks: int, sources: int) -> float:
        """Of a forward, once."""
        return _beyond(self.start_s, variant, ranks, sources)

    def for_ranks(self, threads: int, processors: int) -> HardwareProfile:
        """The same processors with `threads` for each rank, of `processors` for all ranks."""
        if not self.threads:
            return self
        scale = threads / self.threads
        scaled = self.scaled(scale)
        # As many threads compute at the same time in fewer ranks.
        row_rates = {
            dtype: tuple(dataclasses.replace(m, ranks=m.ranks / scale) for m in measured)
            for dtype, measured in scaled.row_rates.items()
        }
        return dataclasses.replace(
            scaled,
            row_rates=row_rates,
            memory_bytes=scale * self.memory_bytes,
            ranks_at_once=max(1, processors // threads),
            threads=threads,
        )

    def scaled(self, factor: float) -> HardwareProfile:
        """With compute and memory that many times as fast."""
        names = [f.name for f in dataclasses.fields(self) if f.name.endswith("_bandwidth")]
        rates = {name: getattr(self, name) for name in names}
        return dataclasses.replace(
            self,
            linear_flops={name: factor * rate for name, rate in self.linear_flops.items()},
            attention_flops={name: factor * rate for name, rate in self.attention_flops.items()},
            row_rates={
                dtype: tuple(m.scaled(factor) for m in measured)
                for dtype, measured in self.row_rates.items()
            },
            **{name: rate and factor * rate for name, rate in rates.items()},
        )


PARTS = (HardwareProfile, Link, RowRates)
"""The dataclasses that a profile is made of."""


def _beyond(measured: Beyond, variant: str, ranks: int, sources: int) -> float:
    """As on the nearest number of ranks that was measured, in proportion to the other ranks."""
    if ranks == 1 or not measured:
        return 0.0
    nearest = min(map(int, measured), key=lambda n: abs(math.log(n / ranks)))
    one, each = measured[str(nearest)].get(variant, (0.0, 0.0))
    between = one + (each - one) * (sources - 1) / (ranks - 1)
    return between * (ranks - 1) / (nearest - 1)


@lru_cache
def default_profile(device: str) -> HardwareProfile:
    """A plausible machine: ranks of one CPU core each, or of one H100 each over NVLink."""
    profile = find_profile(_DEFAULTS["cpu" if device == "cpu" else "cuda"])
    if device != "cpu":
        return profile
    return dataclasses.replace(profile, ranks_at_once=os.cpu_count() or 1)


def known_profiles() -> list[str]:
    """Names that `find_profile` knows."""
    return sorted(path.stem for path in PROFILES.glob("*.json"))


def find_profile(name: str) -> HardwareProfile:
    """The profile of a name, or of a JSON file with the fields of `HardwareProfile`.

    "measured" is what `cptool bench calibrate` measured on this machine. Raises UserError, one
    line, where there is none, or it is damaged.
    """
    if name == "measured":
        devices = _saved()
        if not devices:
            raise UserError(
                "--hardware measured: nothing was measured yet; run `cptool bench calibrate`, or "
                f"name one of {', '.join(known_profiles())}"
            )
        return devices["cuda" if "cuda" in devices else "cpu"]
    path = PROFILES / f"{name}.json"
    if name not in known_profiles():
        path = expanded(name)
        if not path.is_file():
            raise UserError(
                f"--hardware {name}: no such profile; name one of {', '.join(known_profiles())}, "
                "measured, or a JSON file"
            )
    try:
        return _parse(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} is no hardware profile ({type(error).__name__}: {error}); "
            f"compare it with those in {PROFILES}"
        ) from None


def world_profile(world: World) -> HardwareProfile:
    """The profile that all ranks of `world` go by: rank 0's, for the threads that ranks have.

    Collective. Raises UserError if the file is damaged.
    """
    import torch

    profile = load_profile(world.device.type).for_ranks(
        torch.get_num_threads(), usable_processors(world) // world.tp
    )
    # The threads too are those of rank 0: ranks whose profiles differ would choose differently.
    return world.gather(profile, *PARTS)[0]


def usable_processors(world: World) -> int:
    """Processors that the ranks of `world` may run on, all together; each may be bound to some.

    Collective.
    """
    from cptool.host import affinity

    return affinity.processors(affinity.places(world.gather))


def profile_path() -> Path:
    """Where the measured profile of this machine lies."""
    return cache_dir() / "hardware.json"


def check_place() -> None:
    """UserError where a profile could not be kept, which is known before minutes of measuring."""
    path = profile_path()
    place = next(p for p in path.parents if os.path.exists(p))
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{path}: {place} cannot be written to; set CPTOOL_CACHE to a directory")


def load_profile(device: str) -> HardwareProfile:
    """The measured profile if there is one of this device ("cpu" or "cuda"), else the default.

    Raises UserError if the file is damaged.
    """
    return _saved().get(device) or default_profile(device)


def is_measured() -> bool:
    """Whether `cptool bench calibrate` measured this machine. UserError if the file is damaged."""
    return bool(_saved())


def _saved() -> dict[str, HardwareProfile]:
    """Measured profiles by device. Raises UserError if the file is damaged."""
    try:
        path = profile_path()
    except UserError:  # a user without a home has no cache
        return {}
    try:
        text = path.read_text()
    except (FileNotFoundError, NotADirectoryError, PermissionError):  # or one in another's home
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); {REMEDY}") from None
    try:
        profiles = json.loads(text)
        if profiles["format"] != FORMAT:
            raise UserError(f"{path} has format {profiles['format']}, not {FORMAT}; {REMEDY}")
        return {device: _parse(fields) for device, fields in profiles["devices"].items()}
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); {REMEDY}") from None


def save_profile(profile: HardwareProfile) -> Path:
    """Keeps a measured profile, beside those of other devices, and returns the path."""
    path = profile_path()
    try:
        devices = _saved()
    except UserError:
        devices = {}  # what could not be read is what this replaces
    devices[profile.device] = profile
    fields = {device: dataclasses.asdict(kept) for device, kept in devices.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}")
    draft.write_text(json.dumps({"format": FORMAT, "devices": fields}, indent=2) + "\n")
    draft.replace(path)
    return path


def _parse(fields: dict[str, Any]) -> HardwareProfile:
    """Raises TypeError, ValueError or KeyError for what no measurement gives."""
    links = {name: Link(**fields[name]) for name in ("host_link", "network")}
    row_rates = {
        dtype: tuple(
            RowRates(**{name: tuple(v) if isinstance(v, list) else v for name, v in m.items()})
            for m in measured
        )
        for dtype, measured in fields.get("row_rates", {}).items()
    }
    profile = HardwareProfile(**{**fields, **links, "row_rates": row_rates})
    rates = {
        "memory_bytes": profile.memory_bytes,
        "few_query_rate": profile.few_query_rate,
        "memory_bandwidth": profile.memory_bandwidth,
        "cache_bandwidth": profile.cache_bandwidth,
        **{f"linear_flops.{dtype}": rate for dtype, rate in profile.linear_flops.items()},
        **{f"attention_flops.{dtype}": rate for dtype, rate in profile.attention_flops.items()},
    }
    for name in ("block_bandwidth", "touch_bandwidth"):
        if getattr(profile, name) is not None:
            rates[name] = getattr(profile, name)
    names = [f.name for f in dataclasses.fields(profile) if f.name.endswith("_s")]
    tables = ("residual_s", "start_s")  # may be negative
    names = [name for name in names if name not in tables]
    costs = {name: getattr(profile, name) for name in (*names, "attention_ramp", "transfer_steals")}
    for name, link in links.items():
        for key, value in dataclasses.asdict(link).items():
            (costs if key.endswith("_s") else rates)[f"{name}.{key}"] = value
    for name, rate in rates.items():
        if not 0 < rate < float("inf"):
            raise ValueError(f"{name} is {rate}; it must be positive")
    for name, cost in costs.items():
        if not 0 <= cost < float("inf"):
            raise ValueError(f"{name} is {cost}; it must not be negative")
    if not profile.linear_flops or not profile.attention_flops:
        raise ValueError("no dtype has a rate")
    for name in tables:
        seconds = {
            str(int(ranks)): {v: (float(one), float(each)) for v, (one, each) in found.items()}
            for ranks, found in getattr(profile, name).items()
        }
        profile = dataclasses.replace(profile, **{name: seconds})
    if profile.rule is None:
        return profile
    alpha, beta, gamma = map(float, profile.rule)
    return dataclasses.replace(profile, rule=(alpha, beta, gamma))
