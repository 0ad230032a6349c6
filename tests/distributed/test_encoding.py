"""Values between processes: what goes in comes out; a stranger's bytes become data or an error."""

import json
import struct
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks

from cptool.distributed.encoding import decode, encode
from cptool.distributed.gathering import gather_values

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.binary(max_size=5)
)
KEYS = st.integers() | st.text(max_size=3) | st.tuples(st.integers(), st.text(max_size=3))
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=3)
    ),
    max_leaves=8,
)


@dataclass(frozen=True, kw_only=True)
class Point:
    x: float
    label: tuple[str, ...] = ()


class Other:
    pass


@given(VALUES)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_what_goes_in_comes_out(value):
    back = decode(encode(value))
    assert back == value and repr(back) == repr(value)  # repr: True is not 1


def test_sets_keep_their_kind():
    for value in ({3, -1}, frozenset(), frozenset({"b", "a"})):
        back = decode(encode(value))
        assert back == value and type(back) is type(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 4), (3, 2)])
def test_tensors_come_out_bit_for_bit(dtype, shape):
    tensor = torch.arange(torch.Size(shape).numel()).view(shape).to(dtype)
    strided = torch.stack([tensor, tensor], -1)[..., 1]
    first, [second], last = decode(encode((tensor, [strided], 7)))
    assert last == 7
    for found in (first, second):
        assert found.dtype == dtype and found.shape == tensor.shape and found.equal(tensor)


def test_dataclasses_are_those_that_the_receiver_lists():
    point = Point(x=float("inf"), label=("a",))
    data = encode({point: [point]}, [Point])
    assert decode(data, [Point]) == {point: [point]}
    with pytest.raises(ValueError, match="Point"):
        decode(data)
    with pytest.raises(TypeError, match=r"^a Point cannot be sent to another process$"):
        encode(point)
    for value in (Other(), ValueError("x"), print, 1j):
        with pytest.raises(TypeError, match="cannot be sent to another process"):
            encode(value, [Point])


def framed(plain, rest=b""):
    text = json.dumps(plain).encode()
    return struct.pack("<Q", len(text)) + text + rest


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 7,
        struct.pack("<Q", 2**63) + b"null",
        framed(None, b"rest"),
        framed({"Point": [1]}),
        framed({"Point": [1, [], 3]}),
        framed({"os.system": ["id"]}),
        framed({}),
        framed({"tuple": [], "list": []}),
        framed({"tuple": 3}),
        framed({"dict": [1]}),
        framed({"dict": [[[], 1]]}),
        framed({"bytes": "xy"}),
        framed({"bytes": 3}),
        framed({"tensor": ["object", [1]]}),
        framed({"tensor": ["int8", [2**62, 2**62]]}),
        framed({"tensor": ["int8", [-1]]}),
        framed({"tensor": ["float32", [2]]}, b"1234567"),
        framed({"tensor": 3}),
        framed({"set": [[]]}),
        struct.pack("<Q", 200_000) + b"[" * 100_000 + b"]" * 100_000,
    ],
)
def test_other_bytes_are_refused(data):
    with pytest.raises(ValueError):
        decode(data, [Point])


def gathered(world):
    """Values of all lengths around that of a frame, different on every rank."""
    for size in (0, 1, 400, 484, 485, 486, 487, 488, 489, 2000):
        values = gather_values("x" * (size + world.rank), group=world.cp_group.process_group)
        assert values == ["x" * (size + rank) for rank in range(world.size)]
    only = gather_values(
        "y" * 5000 if world.rank == 1 else None, group=world.cp_group.process_group
    )
    assert only == [None, "y" * 5000, *[None] * (world.size - 2)]
    point, row = Point(x=world.rank), torch.full((300,), world.rank, dtype=torch.bfloat16)
    found = gather_values((point, row), [Point], world.cp_group.process_group)
    assert [p.x for p, _ in found] == list(range(world.size))
    assert all(r.equal(torch.full_like(row, rank)) for rank, (_, r) in enumerate(found))


def test_every_rank_gets_the_values_of_all():
    run_ranks(3, gathered)
