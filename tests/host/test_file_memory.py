"""KV of which a part lies in a file."""

import re
import resource
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from cptool.checkpoint import open_checkpoint
from cptool.engine.answers.decode import decode
from cptool.engine.answers.records import AnswerOptions
from cptool.engine.engine import Engine
from cptool.engine.options import EngineOptions
from cptool.engine.weights import load_model
from cptool.errors import OptionError, RunError
from cptool.host import file_memory
from cptool.host.file_memory import FileMemory
from cptool.variants import names

LAYERS, SLOTS, SHAPE = 7, 3001, (2, 3, 40)
LAYER_BYTES = SLOTS * 2 * 3 * 40 * 4


@pytest.fixture(autouse=True)
def on_a_disk(monkeypatch):
    """Wherever tests run, their files count as being on a disk."""
    monkeypatch.setattr(file_memory, "in_memory", lambda folder: False)


def make(resident):
    return FileMemory((LAYERS, SLOTS, *SHAPE), torch.float32, resident=resident)


def resident_bytes(memory):
    """What the system says of the mapping."""
    start = f"{memory.tensor.data_ptr():x}-"
    entry = Path("/proc/self/smaps").read_text().split(start, 1)[1]
    return int(re.search(r"^Rss: +(\d+) kB", entry, re.M)[1]) << 10


@pytest.mark.parametrize(("layers", "streamed"), [(2, 7), (3.5, 6), (5, 4), (100, 0)])
def test_what_is_written_is_read_again_and_no_more_stays_resident(layers, streamed):
    memory = make(int(layers * LAYER_BYTES))
    assert memory.streamed == streamed
    kept = min(LAYERS, layers) * (LAYER_BYTES + 4096) + 4096
    for turn in range(3):
        for layer in (*range(LAYERS), 3, 1):
            memory.visit(layer, SLOTS)
            if turn:
                assert (memory.tensor[layer] == layer + 0.5).all()
            memory.tensor[layer] = layer + 0.5
            assert resident_bytes(memory) <= kept


def test_a_part_of_the_slots():
    memory = make(2 * LAYER_BYTES)
    for layer in (*range(LAYERS), *range(LAYERS)):
        memory.visit(layer, 10)
        memory.tensor[layer, :10] = layer
        assert resident_bytes(memory) < 8 * 4096
    assert all((memory.tensor[layer, :10] == layer).all() for layer in range(LAYERS))


def test_too_little_is_refused():
    with pytest.raises(OptionError, match=r"kv_memory.*two layers of KV take 5.76 MB per rank"):
        make(2 * LAYER_BYTES - 1)


def test_a_folder_without_room_or_in_memory_is_refused(monkeypatch):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LAYER_BYTES, before[1]))
    try:
        with pytest.raises(RunError, match=r"20.2 MB for KV: File too large; set TMPDIR"):
            make(2 * LAYER_BYTES)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    monkeypatch.setattr(file_memory, "in_memory", lambda folder: True)
    with pytest.raises(RunError, match="is in memory itself; set TMPDIR to a directory on a disk"):
        make(2 * LAYER_BYTES)


def test_a_page_that_cannot_be_written_back_is_told(monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(file_memory, "_give_up", fail)
    memory = make(2 * LAYER_BYTES)
    with pytest.raises(RunError, match="the file of KV: Input/output error; use another disk"):
        for layer in 50 * tuple(range(LAYERS)):
            memory.visit(layer, SLOTS)


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
