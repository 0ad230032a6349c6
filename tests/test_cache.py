"""The cache against lists: whatever is appended to it, every view shows just that."""

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cptool.cache import NEVER, KVCache
from cptool.sharding import Placement

steps = st.integers(1, 4).flatmap(
    lambda batch: st.lists(
        st.lists(st.integers(0, 5), min_size=batch, max_size=batch), min_size=1, max_size=6
    )
)


def placement(lengths: list[int], starts: list[int]) -> Placement:
    return Placement.of(
        [torch.arange(s, s + n, dtype=torch.int32) for s, n in zip(starts, lengths, strict=True)]
    )


@settings(deadline=None, max_examples=60)
@given(steps, st.lists(st.integers(0, 30), min_size=4, max_size=4))
def test_views_show_what_was_stored(steps, reserved):
    batch = len(steps[0])
    cache = KVCache(
        layers=2, kv_heads=3, head_dim=4, batch=batch, dtype=torch.float32, device="cpu"
    )
    cache.reserve(reserved[:batch])
    expected = [torch.empty(2, 0, 2, 3, 4) for _ in range(batch)]
    for lengths in steps:
        cache.extend(placement(lengths, cache.lengths))
        new = [torch.randn(2, n, 2, 3, 4) for n in lengths]
        for layer in range(2):
            kv = torch.cat([x[layer] for x in new])
            cache.store(layer, kv[:, 0], kv[:, 1])
        expected = [torch.cat([old, x], dim=1) for old, x in zip(expected, new, strict=True)]
    assert cache.lengths == [x.shape[1] for x in expected]
    for layer in range(2):
        view = cache.layer(layer)
        assert torch.equal(view.packed(), torch.cat([x[layer] for x in expected]))
        assert view.packed().is_contiguous()
        k, v, k_pos, cu_k = view.local
        for b, (start, stop) in enumerate(itertools.pairwise(cu_k.tolist())):
            held = expected[b].shape[1]
            assert torch.equal(k[start : start + held], expected[b][layer, :, 0])
            assert torch.equal(v[start : start + held], expected[b][layer, :, 1])
            assert k_pos[start : start + held].tolist() == list(range(held))
            assert (k_pos[start + held : stop] == NEVER).all()
            assert torch.equal(
                cache.tokens_from(layer, b, held // 2), expected[b][layer, held // 2 :]
            )


def test_one_sequence_is_sent_without_a_copy():
    cache = KVCache(layers=1, kv_heads=1, head_dim=2, batch=1, dtype=torch.bfloat16, device="cpu")
    cache.reserve([8])
    cache.extend(placement([3], [0]))
    assert cache.layer(0).packed().data_ptr() == cache.layer(0).slab.data_ptr()
    assert len(cache.layer(0).packed()) == 3


@settings(deadline=None, max_examples=60)
@given(steps, st.lists(st.integers(0, 15), min_size=4, max_size=4), st.integers(2, 3))
def test_truncate_drops_positions_and_what_follows_takes_their_place(steps, limits, stride):
    batch = len(steps[0])
    cache = KVCache(
        layers=2, kv_heads=1, head_dim=2, batch=batch, dtype=torch.float32, device="cpu"
    )
    kept = [torch.empty(0, dtype=torch.int32)] * batch

    def append(lengths: list[int]) -> None:
        # A rank among several holds only some of the positions.
        starts = [int(row[-1]) + 1 if len(row) else 1 for row in kept]
        new = [
            torch.arange(n, dtype=torch.int32) * stride + start
            for n, start in zip(lengths, starts, strict=True)
        ]
        cache.extend(Placement.of(new))
        for layer in range(2):
            kv = torch.cat(new)[:, None, None].expand(-1, 1, 2) + 100.0 * layer
            cache.store(layer, kv, -kv)
        kept[:] = map(torch.cat, zip(kept, new, strict=True))

    for lengths in steps:
        append(lengths)
    cache.truncate(limits[:batch])
    kept = [row[row < limit] for row, limit in zip(kept, limits[:batch], strict=True)]
    for _ in range(2):
        assert cache.lengths == list(map(len, kept))
        assert [row.tolist() for row in cache.held.sequences()] == [row.tolist() for row in kept]
        for layer in range(2):
            expected = torch.cat(kept) + 100.0 * layer
            assert torch.equal(cache.layer(layer).packed()[:, 0, 0, 1], expected)
            assert torch.equal(cache.layer(layer).packed()[:, 1, 0, 0], -expected)
        append(steps[0])
