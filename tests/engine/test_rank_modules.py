"""Ranks import nothing by themselves, or each of them would spend the time of it."""

import sys

import pytest

from cptool.distributed.launch import run
from cptool.distributed.options import RankOptions
from cptool.engine import turn
from cptool.engine.rank_modules import rank_modules


def imported_by(world, asked):
    """What of cptool a turn imports on a rank."""
    before = set(sys.modules)
    turn.run(world, asked)
    return {name for name in sys.modules if name.startswith("cptool")} - before


@pytest.mark.parametrize("model", ["tiny_model", "smollm2_path"])
def test_a_rank_has_all_modules_of_a_turn(request, tmp_path, model):
    asked = turn.Turn(
        model=str(request.getfixturevalue(model)),
        prompts=((1, 2, 3),),
        dtype="float32",
        max_new_tokens=2,
        session=str(tmp_path / "s"),
    )
    ranks = RankOptions(cp=2, device="cpu", threads=1)
    assert run(imported_by, asked, ranks=ranks, preload=rank_modules()) == set()


def test_only_readers_of_checkpoints_that_are_used_are_imported(monkeypatch):
    gguf = "cptool.checkpoint.gguf.reader"
    assert gguf in rank_modules()
    monkeypatch.delitem(sys.modules, gguf)
    assert gguf not in rank_modules()
