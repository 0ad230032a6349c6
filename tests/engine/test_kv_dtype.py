"""KV that is stored in fewer bits than products are computed in."""

from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks
from test_weights import without_the_others

from cptool.checkpoint import open_checkpoint
from cptool.engine import saving
from cptool.engine.answers.decode import decode
from cptool.engine.answers.records import AnswerOptions
from cptool.engine.engine import Engine
from cptool.engine.options import EngineOptions
from cptool.engine.setup.types import check_kv_dtype, continued_types, resolve_types
from cptool.engine.weights import load_model
from cptool.errors import OptionError
from cptool.session import store
from cptool.variants import names

PROMPT, NEXT = [7 * i % 301 for i in range(90)], [5, 3, 1]
LIMIT = AnswerOptions(limit=6)


def engine_for(world, path, kv_dtype, **options):
    model = load_model(open_checkpoint(str(path)), torch.float32, "cpu", world)
    return Engine(model, world, options=EngineOptions(kv_dtype=kv_dtype, **options))


def answers(world, path, kv_dtype, variants):
    """The tokens of two turns under each variant, and of steps over static memory."""
    found = []
    for variant in (*variants, "auto"):
        engine = engine_for(world, path, kv_dtype, variant=variant, static=variant == "auto")
        engine.extend([PROMPT])
        tokens = decode(engine, LIMIT).token_ids[0]
        engine.extend([NEXT])
        found.append((*tokens, *decode(engine, LIMIT).token_ids[0]))
        assert engine.cache.dtype == getattr(torch, kv_dtype)
    return found


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float16"])
def test_tokens_are_the_same_on_any_ranks_and_under_any_variant(kv_dtype, tiny_model):
    found = [
        tokens
        for n in (1, 2, 3)
        for rank in run_ranks(n, answers, tiny_model, kv_dtype, names(baselines=True))
        for tokens in rank
    ]
    assert len(set(found)) == 1


def test_keys_are_rounded_once_and_the_rest_is_float32(tiny_model):
    world = without_the_others(0, 1)
    narrow, wide = (engine_for(world, tiny_model, kind) for kind in ("bfloat16", "float32"))
    for engine in (narrow, wide):
        engine.extend([PROMPT])
    first = wide.cache.tokens_from(0, 0, 0)
    assert torch.equal(narrow.cache.tokens_from(0, 0, 0), first.bfloat16())
    assert narrow.logits[0].dtype == torch.float32
    errors = (narrow.logits[0] - wide.logits[0]).abs().max() / wide.logits[0].abs().max()
    assert 0 < errors < 0.05
    assert narrow.cache.nbytes * 2 == wide.cache.nbytes


def test_a_session_keeps_the_type_of_its_kv(tiny_model, tmp_path):
    world, checkpoint = without_the_others(0, 1), open_checkpoint(str(tiny_model))
    engine = engine_for(world, tiny_model, "bfloat16")
    engine.extend([PROMPT])
    identity = store.identity(checkpoint)
    manifest = saving.save(engine, tmp_path / "s", None, identity, chat=None)
    manifest = store.load(tmp_path / "s") if manifest is None else manifest
    assert (manifest.dtype, manifest.kv_dtype) == ("float32", "bfloat16")
    resumed = engine_for(world, tiny_model, "bfloat16")
    saving.restore(resumed, tmp_path / "s", manifest)
    kept, held = (e.cache.tokens_from(1, 0, 0) for e in (resumed, engine))
    assert torch.equal(kept, held) and kept.dtype == torch.bfloat16
    assert decode(resumed, LIMIT).token_ids == decode(engine, LIMIT).token_ids


def held(dtype, kv_dtype):
    return "s", SimpleNamespace(dtype=dtype, kv_dtype=kv_dtype, weights="file")


@pytest.mark.parametrize(
    ("asked", "session", "device", "found"),
    [
        (("auto", "auto"), ("float32", "bfloat16"), "cpu", ("float32", "bfloat16")),
        (("float32", "auto"), ("bfloat16", "bfloat16"), "cpu", ("float32", "bfloat16")),
        (("bfloat16", "auto"), ("float32", "bfloat16"), "cuda", ("bfloat16", "bfloat16")),
        (("auto", "float32"), ("float32", "float32"), "cuda", ("float32", "float32")),
    ],
)
def test_a_session_is_continued_in_types_that_widen(asked, session, device, found):
    options = EngineOptions(kv_dtype=asked[1])
    dtype, resolved = continued_types(asked[0], options, device, held=held(*session))
    assert (dtype, resolved.kv_dtype) == found


@pytest.mark.parametrize(
    ("asked", "session", "device", "words"),
    [
        (("auto", "float32"), ("float32", "bfloat16"), "cpu", "the KV of s is bfloat16"),
        (("bfloat16", "auto"), ("float32", "float32"), "cpu", "cpu computes in float32$"),
        (("auto", "auto"), ("float32", "float16"), "cuda", "cuda computes in float16"),
    ],
)
def test_a_session_in_types_that_do_not_is_refused(asked, session, device, words):
    with pytest.raises(OptionError) as told:
        options = EngineOptions(kv_dtype=asked[1])
        continued_types(asked[0], options, device, held=held(*session))
    assert words.removesuffix("$") in str(told.value) and "\n" not in str(told.value)


def test_types_that_do_not_go_together_are_refused(tiny_model):
    check_kv_dtype("float16", "float32", "cpu")
    for kv, dtype, device in [
        ("float32", "bfloat16", "cpu"),
        ("float16", "bfloat16", "cpu"),
        ("bfloat16", "float32", "cuda"),
    ]:
        with pytest.raises(OptionError, match=rf"`kv_dtype` {kv}: .*{dtype}"):
            check_kv_dtype(kv, dtype, device)
    checkpoint = open_checkpoint(str(tiny_model))
    assert resolve_types("auto", EngineOptions(), checkpoint, "cpu")[1].kv_dtype == "float32"
