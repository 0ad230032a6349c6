"""Damage to files: what a disk does, and what somebody who knows the format does."""

import io
import json
import random
import struct
import zipfile
from collections.abc import Callable

NUMBERS = (
    0,
    -1,
    1,
    2,
    3,
    7,
    255,
    65535,
    2**31 - 1,
    2**31,
    2**32,
    2**53 + 1,
    2**62,
    2**63 - 1,
    2**64,
    10**40,
    -(2**63),
    0.0,
    -0.5,
    0.5,
    1e-30,
    1e30,
    1e308,
    float("inf"),
    float("nan"),
)
VALUES = (
    None,
    True,
    False,
    "",
    "x",
    "\u0000",
    "a" * 70000,
    [],
    [[]],
    {},
    [0, 0],
    [1] * 5000,
    "../../etc/passwd",
    "{{ 0 }}",
)
WORDS = (0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)


def flip(data: bytes, rng: random.Random) -> bytes:
    """One to three bits."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 3))):
        changed[_place(data, rng)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def overwrite(data: bytes, rng: random.Random) -> bytes:
    """A byte, or a little-endian number of 4 or 8 bytes."""
    at, word = _place(data, rng), rng.choice(WORDS)
    size = rng.choice((1, 4, 8))
    put = struct.pack("<Q", word)[:size]
    return data[:at] + put + data[at + size :]


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: _place(data, rng)]


def insert(data: bytes, rng: random.Random) -> bytes:
    at = _place(data, rng)
    return data[:at] + rng.randbytes(rng.choice((1, 8, 300))) + data[at:]


def remove(data: bytes, rng: random.Random) -> bytes:
    at = _place(data, rng)
    return data[:at] + data[at + rng.choice((1, 8, 300)) :]


def repeat(data: bytes, rng: random.Random) -> bytes:
    at = _place(data, rng)
    return data[:at] + data[at : at + rng.choice((8, 300))] * 2 + data[at:]


BYTES = (flip, flip, overwrite, overwrite, truncate, insert, remove, repeat)


def _place(data: bytes, rng: random.Random) -> int:
    """A place in the file, four times of five in its first 4 KiB, where headers are."""
    size = max(len(data), 1)
    return rng.randrange(min(size, 4096) if rng.random() < 0.8 else size)


def edit_value(found, rng: random.Random):
    """Edits one place in a tree of JSON; returns the tree."""
    places = []

    def walk(value):
        if isinstance(value, dict):
            for key in value:
                places.append((value, key))
                walk(value[key])
        elif isinstance(value, list):
            for i in range(min(len(value), 20)):
                places.append((value, i))
                walk(value[i])

    walk(found)
    if not places:
        return rng.choice(VALUES)
    holder, key = rng.choice(places)
    other, other_key = rng.choice(places)
    kind = rng.randrange(6)
    if kind == 0:
        del holder[key]
    elif kind == 1:
        holder[key], other[other_key] = _copy(other[other_key]), _copy(holder[key])
    elif kind == 2:
        holder[key] = rng.choice(VALUES)
    elif kind == 3 and isinstance(holder, dict):
        holder[f"{key}_{rng.randrange(9)}"] = holder.pop(key)
    elif kind == 4 and type(holder[key]) is int:
        holder[key] += rng.choice((-2, -1, 1, 2))
    else:
        holder[key] = rng.choice(NUMBERS)
    return found


def _copy(value):
    return json.loads(json.dumps(value))


def edit_json(data: bytes, rng: random.Random) -> bytes:
    found = json.loads(data)
    for _ in range(rng.choice((1, 1, 2))):
        found = edit_value(found, rng)
    return json.dumps(found).encode()


def edit_safetensors(data: bytes, rng: random.Random) -> bytes:
    (size,) = struct.unpack("<Q", data[:8])
    header = edit_json(data[8 : 8 + size], rng)
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def edit_zip(data: bytes, rng: random.Random) -> bytes:
    """Damages one member, most often the pickle, and packs all again, with sound checksums."""
    source = zipfile.ZipFile(io.BytesIO(data))
    names = source.namelist()
    pickle = next(name for name in names if name.endswith(".pkl"))
    chosen = pickle if rng.random() < 0.8 else rng.choice(names)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as target:
        for name in names:
            content = source.read(name)
            target.writestr(name, rng.choice(BYTES)(content, rng) if name == chosen else content)
    return packed.getvalue()


def of_format(structured: Callable[[bytes, random.Random], bytes] | None) -> Callable:
    """Damage of both kinds, half of it by the function that knows the format, if there is one."""

    def mutate(data: bytes, rng: random.Random) -> bytes:
        if structured is not None and rng.random() < 0.5:
            return structured(data, rng)
        return rng.choice(BYTES)(data, rng)

    return mutate
