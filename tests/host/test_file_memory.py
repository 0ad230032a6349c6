"""KV of which a part lies in a file."""

import ctypes
import mmap
import os
import resource
import tempfile
import time

import pytest
import torch
from ranks import run_ranks

from cptool.checkpoint import open_checkpoint
from cptool.engine.answers.decode import decode
from cptool.engine.answers.records import AnswerOptions
from cptool.engine.engine import Engine
from cptool.engine.options import EngineOptions
from cptool.engine.setup.types import check_kv_memory
from cptool.engine.weights import load_model
from cptool.errors import OptionError, RunError
from cptool.host import file_memory, scratch
from cptool.host.file_memory import FileMemory
from cptool.variants import names

LAYERS, SLOTS, SHAPE = 7, 3001, (2, 3, 40)
LAYER_BYTES = SLOTS * 2 * 3 * 40 * 4
PAGE, FEW = mmap.PAGESIZE, 32
"""Bytes of a page, and how many more the system may bring in with one that is read."""


on_a_disk = pytest.mark.skipif(
    scratch.in_memory(tempfile.gettempdir()),
    reason="temporary files are in memory",
)


def make(resident):
    return FileMemory((LAYERS, SLOTS, *SHAPE), torch.float32, resident=resident)


def cached_pages(memory, layer):
    """How many pages of a layer the page cache has, once nothing is under way."""
    for worker in (memory._reader, memory._writer):
        worker.submit(lambda *_: None, 0, 0).result()
    start, length = memory.tensor[layer].data_ptr(), SLOTS * memory._slot
    pages = -(-length // PAGE)
    found = (ctypes.c_ubyte * pages)()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(length), found) == 0
    return sum(page & 1 for page in found), pages


@on_a_disk
@pytest.mark.parametrize(("layers", "streamed"), [(2, 7), (3.5, 6), (5, 4), (100, 0)])
def test_what_is_written_is_read_again_and_the_limit_kept(layers, streamed):
    memory = make(int(layers * LAYER_BYTES))
    assert memory.streamed == streamed
    for turn in range(3):
        for layer in (*range(LAYERS), 3, 1):
            memory.visit(layer, SLOTS)
            if turn:
                assert (memory.tensor[layer] == layer + 0.5).all()
            memory.tensor[layer] = layer + 0.5
        for layer in (*range(LAYERS), 0):  # in order, as a model does
            memory.visit(layer, SLOTS)
            assert memory.tensor[layer].sum() != 0
        held = sum(cached_pages(memory, layer)[0] for layer in range(LAYERS))
        assert held <= min(LAYERS, max(2, layers)) * (cached_pages(memory, 0)[1] + FEW)


@on_a_disk
def test_the_next_layer_is_read_ahead_whole():
    memory = make(2 * LAYER_BYTES)
    for layer in (*range(LAYERS), 0):
        memory.visit(layer, SLOTS)
        memory.tensor[layer] = 1
    assert cached_pages(memory, 4)[0] <= FEW
    memory.visit(3, SLOTS)
    deadline = time.monotonic() + 60
    while (found := cached_pages(memory, 4))[0] < found[1]:  # the disk delivers it meanwhile
        assert time.monotonic() < deadline, found


def test_a_slow_disk_takes_time_and_no_more_memory(monkeypatch):
    writing, most = [], []

    def slow(file, start, length):
        writing.append(start)
        time.sleep(0.05)
        writing.remove(start)

    monkeypatch.setattr(file_memory, "_write_back", slow)
    memory = make(2 * LAYER_BYTES)
    for layer in 2 * tuple(range(LAYERS)):
        memory.visit(layer, SLOTS)
        most.append(len(writing))
    assert max(most) <= 1


def test_a_part_of_the_slots():
    memory = make(2 * LAYER_BYTES)
    for layer in (*range(LAYERS), *range(LAYERS)):
        memory.visit(layer, 10)
        memory.tensor[layer, :10] = layer
    assert all((memory.tensor[layer, :10] == layer).all() for layer in range(LAYERS))
    memory.visit(0, 0)


def test_it_grows_in_place_as_far_as_there_is_room():
    memory = make(3 * LAYER_BYTES)
    for layer in range(LAYERS):
        memory.visit(layer, SLOTS)
        memory.tensor[layer] = layer
    before = memory.tensor.data_ptr()
    assert memory.grow(SLOTS + 500) and memory.grow(2 * SLOTS) and not memory.grow(2 * SLOTS + 1)
    assert memory.tensor.shape == (LAYERS, 2 * SLOTS, *SHAPE)
    assert memory.tensor.data_ptr() == before and memory.streamed == LAYERS
    for layer in range(LAYERS):
        assert (memory.tensor[layer, :SLOTS] == layer).all()
        memory.tensor[layer, SLOTS:] = -layer


def test_a_directory_without_room_is_refused():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LAYER_BYTES, before[1]))
    try:
        with pytest.raises(RunError, match=r"20.2 MB for KV: File too large; set TMPDIR"):
            make(2 * LAYER_BYTES)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_files_in_memory_are_refused_beforehand(monkeypatch):
    assert scratch.in_memory("/dev/shm") and not scratch.in_memory("/proc")
    monkeypatch.setattr(scratch, "in_memory", lambda place: True)
    with pytest.raises(OptionError, match=r"are in memory too; set TMPDIR to a directory on a"):
        check_kv_memory(1 << 20, "cpu")
    with pytest.raises(OptionError, match=r"on a CPU alone, not on cuda"):
        check_kv_memory(1 << 20, "cuda")


def test_a_layer_that_cannot_be_written_back_is_told(monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(file_memory, "_write_back", fail)
    memory = make(2 * LAYER_BYTES)
    with pytest.raises(RunError, match="the file of KV: Input/output error; use another disk"):
        for layer in range(4):
            memory.visit(layer, SLOTS)


def test_its_descriptors_end_with_it():
    before = len(os.listdir("/proc/self/fd"))
    tensor = make(2 * LAYER_BYTES).tensor  # which keeps the memory, and that the file
    tensor[0] = 1
    deadline = time.monotonic() + 60
    while len(os.listdir("/proc/self/fd")) > before + 1:  # that of the mapping
        assert time.monotonic() < deadline
    del tensor


def turns(model, world, **options):
    engine = Engine(model, world, batch=2, options=EngineOptions(**options))
    engine.extend([[7 * i % 97 for i in range(90)], [11 * i % 97 for i in range(33)]])
    first = decode(engine, AnswerOptions(limit=6)).token_ids
    engine.extend([[5, 3, 1], [2]])
    return engine, (first, decode(engine, AnswerOptions(limit=6)).token_ids)


def answers(world, path):
    """Tokens with all in memory, and with all but one of the three layers under each variant."""
    model = load_model(open_checkpoint(str(path)), torch.float32, "cpu", world)
    whole, tokens = turns(model, world)
    found = [tokens]
    for variant in names(baselines=True):
        resident = whole.cache.nbytes * 5 // 6
        engine, tokens = turns(model, world, variant=variant, kv_memory=resident)
        assert isinstance(engine.cache._memory, FileMemory)
        found.append(tokens)
    return found


def test_an_engine_gives_the_same_tokens(mqa_path):
    found = [tokens for n in (1, 2) for rank in run_ranks(n, answers, mqa_path) for tokens in rank]
    assert all(tokens == found[0] for tokens in found)


def test_graphs_need_it_in_memory(mqa_path):
    from test_weights import without_the_others

    world = without_the_others(0, 1)
    model = load_model(open_checkpoint(str(mqa_path)), torch.float32, "cpu", world)
    with pytest.raises(OptionError, match="kv_memory"):
        Engine(model, world, options=EngineOptions(kv_memory=1 << 20, static=True))
