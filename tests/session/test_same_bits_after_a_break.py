"""What follows a break has the bits of a run without it where as many ranks wrote equal parts of
every sequence.
"""

import pytest
import torch
from ranks import run_ranks
from test_session_crash import IDENTITY, tiny_llama

from cptool.engine import saving
from cptool.engine.engine import Engine
from cptool.engine.options import EngineOptions
from cptool.session import store

CHUNKS = [[[7 * i % 31 for i in range(n)], [3] * (n // 2)] for n in (70, 33, 41)]


def next_logits(world, directory, variant, *, breaks):
    """The logits after all chunks, with a break after each if `breaks`."""
    model, saved = tiny_llama(), None
    options = EngineOptions(variant=variant)
    engine = Engine(model, world, batch=2, options=options)
    for chunk in CHUNKS:
        if breaks and saved is not None:
            engine = Engine(model, world, batch=2, options=options)
            saving.restore(engine, directory, store.load(directory))
        engine.extend(chunk)
        if breaks:
            saved = saving.save(engine, directory, saved, IDENTITY)
    return dict(engine.logits)


@pytest.mark.parametrize("variant", ["pass-kv", "pass-q"])
@pytest.mark.parametrize("cp", [1, 2, 3])
def test_the_same_chunks_have_the_same_bits_with_breaks(variant, cp, tmp_path):
    unbroken, broken = (
        {
            b: row
            for each in run_ranks(cp, next_logits, tmp_path, variant, breaks=breaks)
            for b, row in each.items()
        }
        for breaks in (False, True)
    )
    assert unbroken.keys() == broken.keys() == {0, 1}
    assert all(torch.equal(broken[b], unbroken[b]) for b in unbroken)
