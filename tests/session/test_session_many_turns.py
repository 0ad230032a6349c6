"""A session of many turns stays small: segments are merged as turns are saved, and hold the same KV
as if they had not been.
"""

import pytest
import torch
from test_session_crash import IDENTITY, tiny_llama, world_of

from cptool.engine import saving
from cptool.engine.engine import Engine
from cptool.session import maintenance, manifest, store


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def engine_of(model) -> Engine:
    return Engine(model, world_of(0, 1), batch=2)


def kv_of(engine: Engine) -> list[torch.Tensor]:
    rows = [engine.cache.tokens_from(i, b, 0) for i in range(engine.cache.layers) for b in range(2)]
    return rows


@pytest.mark.parametrize("anew", [False, True], ids=["one engine", "restored for each turn"])
def test_many_turns_have_few_segments(model, tmp_path, monkeypatch, anew):
    monkeypatch.setattr(manifest, "MANY_REVISIONS", 4)
    whole, engine, saved = engine_of(model), engine_of(model), None
    written = 0
    for turn in range(30):
        new = [[turn % 31] * (1 + turn % 3), [] if turn % 4 else [turn % 29]]
        whole.extend(new)
        if anew and saved is not None:
            engine = engine_of(model)
            saving.restore(engine, tmp_path, store.load(tmp_path))
        engine.extend(new)
        saved = saving.save(engine, tmp_path, saved, IDENTITY)
        written += sum(sum(s.tokens) for s in saved.segments if s.revision == saved.revision)
        assert len({s.revision for s in saved.segments}) <= 4 + 8
        assert len(list(tmp_path.iterdir())) == len(saved.segments) + 1
    assert maintenance.problems(tmp_path, store.load(tmp_path)) == []
    assert written <= 6 * sum(whole.computed)
    engine = engine_of(model)
    saving.restore(engine, tmp_path, store.load(tmp_path))
    assert engine.tokens == whole.tokens
    assert all(torch.equal(a, b) for a, b in zip(kv_of(engine), kv_of(whole), strict=True))
    back = maintenance.roll_back(tmp_path, saved, 25)
    assert maintenance.problems(tmp_path, store.load(tmp_path)) == []
    assert len(back.turns) == 5


def test_without_room_segments_stay_many(model, tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "MANY_REVISIONS", 2)
    usage = type("usage", (), {"free": 0})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    engine, saved = engine_of(model), None
    for turn in range(6):
        engine.extend([[turn], [turn]])
        saved = saving.save(engine, tmp_path, saved, IDENTITY)
    assert len(saved.segments) == 6
    assert maintenance.problems(tmp_path, store.load(tmp_path)) == []


def test_what_a_turn_rewrites(tmp_path, model):
    """The newest revisions, while each is no more than all that are newer."""
    engine, saved = engine_of(model), None
    for count in (20, 6, 2, 1):
        engine.extend([[3] * count, []])
        saved = saving.save(engine, tmp_path, saved, IDENTITY)
    expected = [(5, 30, 29), (4, 29, 29), (4, 30, 26), (4, 32, 20), (4, 39, 20), (4, 40, 0)]
    for many, until, first in expected:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(manifest, "MANY_REVISIONS", many)
            assert saved.rewrite_from([29, 0], [until, 0]) == [first, 0], until
