"""Ranks that keep a model loaded count the one that drafts in the memory of every request."""

import math
from dataclasses import replace

import pytest
from ranks import run_ranks

from cptool.engine.answers.records import AnswerOptions
from cptool.engine.options import EngineOptions
from cptool.engine.rank_server import _Server
from cptool.engine.requests import Continue
from cptool.engine.setup import drafting
from cptool.engine.setup.loading import Setup, make_engine
from cptool.errors import UserError
from cptool.planning.prediction import memory_of
from cptool.planning.strategy import AUTO

SAID = tuple(n % 290 for n in range(1, 301))


def refused(world, path, draft, count):
    """What ranks say to a request of `count` tokens that the model alone has memory for, without a
    draft, with one of the model, and once that is loaded.
    """
    setup = Setup(model=str(path), dtype="float32")
    server = _Server(world, setup, connection=None)
    engine = make_engine(world, setup, server.model, batch=1)
    work = replace(setup.on(world, server.checkpoint, new=[count], cached=[0]), answer=4)
    parts = memory_of(work, AUTO, engine.profile, chunk=None, limit=math.inf)
    small = drafting.bytes_of(setup, draft, work, engine.profile)
    enough = int(sum(parts.values()) + small / 2)
    server.setup = replace(setup, options=EngineOptions(memory=enough))
    found = []
    for source, loaded in (("lookup", False), (draft, False), (draft, True)):
        if loaded:
            server.load_small(draft)
        options = AnswerOptions(limit=4, draft=source)
        request = Continue(slot="", tokens=(SAID[:count],), options=options)
        try:
            server.check_memory(engine, [count], room=4, request=request)
            found.append("")
        except UserError as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize("count", [3, 300])
def test_a_request_without_memory_for_the_draft_model_is_refused(mqa_path, tiny_model, count):
    without, *with_draft = run_ranks(1, refused, mqa_path, str(tiny_model), count)[0]
    assert not without
    for said in with_draft:
        assert "drafts" in said and "more than the" in said and "another `draft`" in said
