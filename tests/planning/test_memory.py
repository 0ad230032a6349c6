"""The model of memory: what each part counts, by hand."""

import dataclasses

import pytest

from cptool.model.shapes import llama_config
from cptool.planning.cost.forward import Forward
from cptool.planning.cost.memory import in_words, memory_per_rank
from cptool.planning.profiles import find_profile
from cptool.variants import names

CONFIG = llama_config(
    hidden=1024,
    layers=4,
    heads=8,
    kv_heads=2,
    ffn=4096,
    vocab_size=1000,
    tie_word_embeddings=True,
)
CPU, GPU = find_profile("cpu-avx512"), find_profile("h100-sxm")
ATTENTION, FEED_FORWARD, TABLE = 1024 * 20 * 128, 3 * 1024 * 4096, 1000 * 1024


def on(ranks=1, **fields):
    given = {"new": 8192, "cached": 0, "dtype": "float32", **fields}
    return Forward(config=CONFIG, ranks=ranks, active=ranks, **given)


def test_ranks_of_a_machine_hold_one_copy_of_the_weights():
    matrices = 4 * 4 * (ATTENTION + FEED_FORWARD)
    for ranks, tp, local, held in [
        (1, 1, None, matrices + 4 * TABLE),
        (4, 1, None, (matrices + 4 * TABLE) / 4),
        (2, 2, None, (matrices + 4 * TABLE) / 4),  # two halves, each held once
        (4, 1, 2, (matrices + 4 * TABLE) / 2),
        (2, 4, 2, (matrices / 2 + 4 * TABLE) / 2),  # two quarters on each machine
    ]:
        forward = on(ranks, tp=tp, local=local)
        assert memory_per_rank("pass-kv", forward, CPU)["weights"] == held
    assert memory_per_rank("pass-kv", on(4, tp=2), GPU)["weights"] == matrices / 2 + 4 * TABLE


def test_the_peak_of_one_rank_is_that_of_projecting_attention_s_result():
    """Stream, normed copy, q with k and v, attention's result, and its projection."""
    rows = 8192
    streams = rows * 4 * (1024 + 1024 + 1536 + 1024 + 1024)
    rest = rows * (4 * 128 + 12)  # rotary tables, numbers and positions
    assert memory_per_rank("pass-kv", on(), CPU)["workspace"] == streams + rest
    halves = on(dtype="bfloat16")
    assert memory_per_rank("pass-kv", halves, CPU)["workspace"] == streams / 2 + rest


def test_panels_of_stored_weights_cost_a_copy_of_the_result():
    stored = on(weight_size=0.56)
    parts = [memory_per_rank("pass-kv", stored, find_profile(f"cpu-{isa}"))["workspace"]
             for isa in ("avx2", "portable")]  # fmt: skip
    assert parts[1] - parts[0] == pytest.approx(8192 * 4 * 1024 + 10 * (4 << 20))


def test_messages_are_what_the_variants_hold():
    forward = on(4, cached=4096)
    rows, held = 2048, 3072
    query, result, token = 4096, 4096 + 4 * 8, 4 * 512
    kept = {"pass-kv": 2 * held * token, "gather-kv": 2 * 12288 * token, "pass-q": 2 * rows * query}
    passing = {
        "pass-kv": 2 * rows * result,
        "gather-kv": 0,
        "pass-q": rows * (query + 7 * result),
        "gather-q": 4 * rows * query + (2 * 4 + 4) * rows * result,
    }
    for variant in names():
        expected = kept.get(variant, 0) + passing[variant]
        assert memory_per_rank(variant, forward, GPU)["messages"] == expected
    two = dataclasses.replace(forward, batch=2)  # whose slots are not contiguous
    assert memory_per_rank("pass-kv", two, GPU)["messages"] == (
        kept["pass-kv"] + passing["pass-kv"] + held * token
    )


def test_kv_has_room_for_what_is_to_come():
    plain, roomy = (memory_per_rank("pass-kv", on(2), GPU, room)["kv"] for room in (None, 20_000))
    assert plain == 4096 * (4 * 4 * 512 + 4) and roomy == 10_000 * (4 * 4 * 512 + 4)


def test_words_leave_out_what_is_not_there():
    said = in_words(memory_per_rank("pass-kv", on(), GPU))
    assert said.startswith("weights 247 MB, kv ") and "process" not in said
    assert "messages" not in said
