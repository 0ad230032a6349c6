"""The recipe for a new attention variant: a record with its cost, and a function. Nothing else."""

from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from click.testing import CliRunner
from ranks import run_ranks
from test_attention_variants import CASES, attend_all_cases, reference

from cptool import variants
from cptool.errors import UserError
from cptool.model.shapes import llama_config
from cptool.ops.attention import attention_partial, merge_partials
from cptool.parallel import attention
from cptool.parallel.attention import FUNCTIONS, computes
from cptool.planning.cost.exchange import AttentionCost
from cptool.planning.cost.forward import Forward
from cptool.planning.cost.layer import predict
from cptool.planning.cost.memory import memory_per_rank
from cptool.planning.profiles import default_profile
from cptool.planning.strategy import choose

NAME = "copy-kv"
RANKS = 3
CONFIG = llama_config(hidden=64, layers=2, heads=4, kv_heads=2, ffn=128)


def cost(rates):
    forward = rates.forward
    received = (forward.ranks - 1) * forward.keys * forward.kv_width * forward.element
    return AttentionCost(
        attention_s=rates.attention(forward.pairs, forward.ranks * forward.keys, forward.queries),
        exposed_s=rates.collective(received, forward.ranks - 1),
        bytes=received,
    )


def copy_kv(q, kv, step, *, ring, scores):
    """All KV at once, one attention per source, one merge in rank order."""
    mine, partials = step.queries[step.rank], []
    for block, keys in zip(ring.gather(kv.packed(), step.key_sizes), step.keys, strict=True):
        k, v = block.unbind(1)
        positions = (mine.positions, keys.positions, mine.cu_seqlens, keys.cu_seqlens)
        partials.append(attention_partial(q, k, v, *positions, scores.scale))
    outs, lses = zip(*partials, strict=True)
    return merge_partials(outs, lses, q.dtype)[0]


@contextmanager
def registered():
    """The variant, as two files of the package would register it, and no longer than needed."""
    record = variants.Variant(
        name=NAME,
        travels="K and V of all ranks at once",
        section="",
        cost=cost,
        buffers=lambda sizes: sizes.everything,
        keys_travel=True,
        collectives=1,
    )
    with patch.dict(variants._REGISTERED), patch.dict(attention.FUNCTIONS):
        variants.records()  # those of the package come first
        variants.register(record)
        computes(NAME)(copy_kv)
        yield


def attend_by_it(world, cases):
    with registered():
        return attend_all_cases(world, cases, [NAME])


def test_every_variant_has_a_function_and_a_cost():
    records = variants.records()
    assert {record.name for record in records if not record.static} == set(FUNCTIONS)
    profile = default_profile("cpu")
    forward = Forward(config=CONFIG, dtype="float32", new=64, cached=64, ranks=4, active=4)
    for record in records:
        assert predict(record.name, forward, profile).bytes > 0
        assert memory_per_rank(record.name, forward, profile)["messages"] > 0


def test_a_new_variant_runs_on_ranks():
    cases = CASES[:6]
    per_rank = run_ranks(RANKS, attend_by_it, cases)
    for number, case in enumerate(cases):
        whole = torch.full((sum(case.new), case.heads[0], case.head_dim), float("nan"))
        for answers in per_rank:
            indices, bits = map(torch.from_numpy, answers[number])
            whole[indices] = bits.view(case.dtype)
        expected = reference(case)
        error = (whole - expected).abs().max() if len(expected) else 0.0
        assert error <= 1e-5 * max(1.0, float(expected.abs().max()) if len(expected) else 0.0)


def test_a_new_variant_is_priced_and_can_be_requested():
    profile = default_profile("cpu")
    with registered():
        assert NAME in variants.names() and variants.find(NAME).keys_travel
        sizes = {"config": CONFIG, "dtype": "float32", "new": 64, "cached": 0}
        forward = Forward(ranks=4, active=4, **sizes)
        choice = choose(NAME, forward, profile)
        assert choice.variant == NAME and choice.predicted_s > 0
        automatic = choose("auto", replace(forward, partial_bytes=2), profile)
        assert automatic.variant in variants.names()
    assert NAME not in variants.names()
    with pytest.raises(UserError, match=f"`variant` {NAME}: it must be one of pass-kv, "):
        variants.find(NAME)


def test_the_command_line_lists_every_variant():
    from cptool.cli.main import main

    shown = " ".join(CliRunner().invoke(main, ["prefill", "--help"]).output.split())
    assert f"[auto|{'|'.join(variants.names(baselines=True))}]" in shown.replace(" ", "")
