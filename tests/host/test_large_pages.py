from pathlib import Path

import pytest
import torch

from cptool.host import large_pages


@pytest.mark.parametrize("shape", [(0, 3), (5,), (3, 700_001), (2, 0, 4), (1 << 21, 2)])
def test_like_torch_empty(shape):
    for dtype in (torch.bfloat16, torch.float32):
        tensor = large_pages.empty(shape, dtype)
        assert tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous()
        assert torch.equal(tensor.fill_(2), torch.full(shape, 2, dtype=dtype))


def test_elsewhere_it_is_torchs():
    assert large_pages.empty((1 << 22,), torch.float32, "meta").is_meta


def test_memory_lives_as_long_as_a_view():
    view = large_pages.empty((1 << 22,), torch.float32).fill_(3)[-5:]
    assert view.tolist() == [3] * 5


def test_what_is_worth_copying(monkeypatch):
    monkeypatch.setattr(large_pages, "there_are", lambda: True)
    assert large_pages.worth_copying(0)
    assert not large_pages.worth_copying(1 << 60)
    monkeypatch.setattr(large_pages, "there_are", lambda: False)
    assert not large_pages.worth_copying(0)


def test_no_room_is_told_in_bytes(monkeypatch):
    monkeypatch.setattr(large_pages, "there_are", lambda: True)
    with pytest.raises(MemoryError, match="1,152,921,504,606,846,976 bytes cannot be allocated"):
        large_pages.empty((1 << 60,), torch.uint8)


@pytest.mark.skipif(not large_pages.there_are(), reason="the system has no large pages")
def test_pages_are_asked_to_be_large():
    tensor = large_pages.empty((8 << 20,), torch.uint8)
    flags = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, last = line.split(" ")[0].partition("-")
        if last and all(c in "0123456789abcdef" for c in first):
            inside = int(first, 16) <= tensor.data_ptr() < int(last, 16)
        elif line.startswith("VmFlags:") and inside:
            flags = line.split()
    assert "hg" in flags
