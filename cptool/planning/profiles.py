"""Hardware profiles by name and by file, and the one that was measured on this machine.

`cptool bench calibrate` measures a profile and saves it in the user's cache; without it, defaults
of the right order of magnitude are used.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from cptool.errors import OptionError, UserError
from cptool.files import cache_dir, expanded
from cptool.planning.hardware import HardwareProfile, Link, Measurement
from cptool.planning.linear_rates import RowRates, StoredRates

FORMAT = 4
REMEDY = "measure it again with `cptool bench calibrate`, or remove the file"
PROFILES = Path(__file__).parents[1] / "data" / "hardware"
INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512bf16", "amx")
"""Kinds of processors that have default figures, those of `cptool.ops.kernels.cpu_isas`."""
_GPU = "h100-sxm"
DEFAULTS = (*(f"cpu-{isa}" for isa in INSTRUCTION_SETS), _GPU)
"""Names of the profiles that stand in for machines that were not measured."""


@lru_cache
def default_profile(device: str, isa: str = "avx2") -> HardwareProfile:
    """Return a plausible profile: one CPU core per rank, or one H100 per rank over NVLink.

    isa: the instruction set of a CPU, of `INSTRUCTION_SETS`.
    """
    if device != "cpu":
        return find_profile(_GPU)
    return dataclasses.replace(find_profile(f"cpu-{isa}"), ranks_at_once=os.cpu_count() or 1)


def known_profiles() -> list[str]:
    """Return the names that `find_profile` accepts."""
    return sorted(path.stem for path in PROFILES.glob("*.json"))


def find_profile(name: str) -> HardwareProfile:
    """Return the profile by name, or from a JSON file with the fields of `HardwareProfile`.

    "measured" is what `cptool bench calibrate` measured on this machine. Raises UserError, one
    line, if there is none or it is damaged.
    """
    if name == "measured":
        devices = _saved()
        if not devices:
            raise OptionError(
                "hardware",
                name,
                "nothing has been measured yet",
                f"run `cptool bench calibrate`, or name one of {', '.join(known_profiles())}",
            )
        return devices["cuda" if "cuda" in devices else "cpu"]
    path = PROFILES / f"{name}.json"
    if name not in known_profiles():
        path = expanded(name)
        if not path.is_file():
            raise OptionError(
                "hardware",
                name,
                "no such profile",
                f"name one of {', '.join(known_profiles())}, measured, or a JSON file",
            )
    try:
        return _parse(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} is not a hardware profile ({type(error).__name__}: {error}); "
            f"compare it with those in {PROFILES}"
        ) from None


def profile_path() -> Path:
    """Return the path of the measured profile of this machine."""
    return cache_dir() / "hardware.json"


def load_profile(device: str, isa: str = "avx2") -> HardwareProfile:
    """Return the measured profile of `device` ("cpu" or "cuda") if there is one, else the default;
    `isa` as in `default_profile`.

    Raises UserError if the file is damaged.
    """
    return _saved().get(device) or default_profile(device, isa)


def _saved() -> dict[str, HardwareProfile]:
    """Return the measured profiles by device. Raise UserError if the file is damaged."""
    try:
        path = profile_path()
    except UserError:  # a user without a home has no cache
        return {}
    try:
        text = path.read_text()
    except (
        FileNotFoundError,
        NotADirectoryError,
        PermissionError,
    ):  # or a cache in another user's home
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); {REMEDY}") from None
    try:
        profiles = json.loads(text)
        if profiles["format"] != FORMAT:
            raise UserError(f"{path} has format {profiles['format']}, not {FORMAT}; {REMEDY}")
        kept = {device: _parse(fields) for device, fields in profiles["devices"].items()}
        return {device: _dated(profile, path) for device, profile in kept.items()}
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); {REMEDY}") from None


def _dated(profile: HardwareProfile, path: Path) -> HardwareProfile:
    """Return the profile with a measurement; one that states none is as old as its file."""
    if profile.measurement is not None:
        return profile
    date = datetime.date.fromtimestamp(path.stat().st_mtime).isoformat()
    return dataclasses.replace(profile, measurement=Measurement(date=date))


def kept_measurement(device: str) -> Measurement | None:
    """Return how the profile of `device` that is kept was measured, None without one."""
    try:
        profile = _saved().get(device)
    except UserError:  # a file that cannot be read is replaced
        return None
    return profile.measurement if profile else None


def save_profile(profile: HardwareProfile) -> Path:
    """Save a measured profile beside those of other devices, and return the path."""
    path = profile_path()
    try:
        devices = _saved()
    except UserError:
        devices = {}  # a file that cannot be read is replaced
    devices[profile.device] = profile
    fields = {device: dataclasses.asdict(kept) for device, kept in devices.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}")
    draft.write_text(json.dumps({"format": FORMAT, "devices": fields}, indent=2) + "\n")
    draft.replace(path)
    return path


def _parse(fields: dict[str, Any]) -> HardwareProfile:
    """Return the profile. Raise TypeError, ValueError or KeyError for values that no measurement
    gives.
    """
    links = {name: Link(**fields[name]) for name in ("host_link", "network")}
    row_rates = {
        dtype: tuple(_row_rates(columns) for columns in measured)
        for dtype, measured in fields.get("row_rates", {}).items()
    }
    measured = fields.get("measurement")
    measurement = measured and Measurement(
        **{**measured, "dtypes": tuple(measured.get("dtypes", ()))}
    )
    stored = fields.get("stored")
    parts = {
        **links,
        "row_rates": row_rates,
        "stored": stored and StoredRates(**stored),
        "measurement": measurement,
    }
    profile = HardwareProfile(**{**fields, **parts})
    rates = {
        "memory_bytes": profile.memory_bytes,
        "few_query_rate": profile.few_query_rate,
        "memory_bandwidth": profile.memory_bandwidth,
        "cache_bandwidth": profile.cache_bandwidth,
        **{f"linear_flops.{dtype}": rate for dtype, rate in profile.linear_flops.items()},
        **{f"attention_flops.{dtype}": rate for dtype, rate in profile.attention_flops.items()},
        **{f"tokenwise_bandwidth.{d}": rate for d, rate in profile.tokenwise_bandwidth.items()},
    }
    for name in ("block_bandwidth", "touch_bandwidth", "moving_bandwidth"):
        if getattr(profile, name) is not None:
            rates[name] = getattr(profile, name)
    names = [f.name for f in dataclasses.fields(profile) if f.name.endswith("_s")]
    tables = ("residual_s", "start_s")  # may be negative
    names = [name for name in names if name not in tables]
    costs = {name: getattr(profile, name) for name in (*names, "attention_ramp", "transfer_steals")}
    for name, link in links.items():
        for key, value in dataclasses.asdict(link).items():
            free = key.endswith("_s") or key == "spread"
            (costs if free else rates)[f"{name}.{key}"] = value
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
        replaced: dict[str, Any] = {name: seconds}
        profile = dataclasses.replace(profile, **replaced)
    if profile.rule is None:
        return profile
    alpha, beta, gamma = map(float, profile.rule)
    return dataclasses.replace(profile, rule=(alpha, beta, gamma))


def _row_rates(columns: dict[str, Any]) -> RowRates:
    """Return the `RowRates` of the fields that `save_profile` wrote: JSON has lists for tuples."""
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in columns.items()
    }
    return RowRates(**fields)


def check_place() -> None:
    """Raise UserError if a profile could not be saved, before minutes of measuring."""
    path = profile_path()
    place = next(p for p in path.parents if os.path.exists(p))
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{path}: {place} cannot be written to; set CPTOOL_CACHE to a directory")


def is_measured() -> bool:
    """Return whether this machine has a measured profile. Raise UserError if it is damaged."""
    return bool(_saved())
