"""The commands as users type them: tokens against `transformers`, sessions, sampling."""

import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import edit_json, greedy
from fake_gpu import STARTED, stop_at_launch

from cptool import units
from cptool.checkpoint import open_checkpoint
from cptool.checkpoint.sampling import SamplingDefaults
from cptool.cli import demo, draw
from cptool.cli.chat import command
from cptool.cli.main import main
from cptool.distributed.options import RankOptions
from cptool.engine import world_profile
from cptool.engine.sampling_request import SamplingRequest
from cptool.planning.profiles import default_profile

STORY = [504, 2365, 282, 4649, 314] * 9 + [7042, 30, 378, 2365, 282, 6219, 314]


MQA_IDS = [(7 * i * i + 3 * i) % 299 for i in range(83)]


def cptool(*arguments, code: int = 0):
    """The result of `cptool ARGUMENTS`, which must exit with `code`."""
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.stderr, result.exception)
    return result


def as_json(*arguments) -> dict:
    """Standard output must be exactly one JSON object."""
    return json.loads(cptool(*arguments, "--json").stdout)


@functools.cache
def continued(reference, ids, count: int, eos: tuple[int, ...]) -> list[int]:
    return greedy(reference, list(ids), count, eos)


@pytest.mark.parametrize(
    "model, cp, variant",
    [
        *(("mqa", cp, variant) for cp in (1, 2, 3, 4) for variant in ("pass-kv", "gather-kv")),
        ("smollm2", 1, "pass-kv"),
        ("smollm2", 2, "gather-kv"),
        ("smollm2", 3, "pass-kv"),
        ("smollm2", 4, "gather-kv"),
    ],
)
def test_tokens_are_those_of_transformers(request, token_file, tmp_path, model, cp, variant):
    path = request.getfixturevalue(f"{model}_path")
    ids, eos = (MQA_IDS, (300,)) if model == "mqa" else (STORY, (2,))
    expected = continued(request.getfixturevalue(f"{model}_reference"), tuple(ids), 32, eos)
    where = ("--session", tmp_path / "s", "--cp", cp, "--variant", variant)
    first = as_json("prefill", path, "--token-ids", token_file(ids), *where)
    assert first["first_token"] == expected[:1]
    assert (first["tokens"], first["cached"], first["cp"], first["variant"]) == (
        len(ids),
        0,
        cp,
        variant,
    )
    answer = as_json("decode", tmp_path / "s", "-n", 32)
    assert answer["token_ids"] == [expected]
    assert answer["cp"] == cp


def test_partials_travel_in_the_working_dtype_on_request(mqa_path, token_file):
    """In bfloat16, outputs of partials then take 2 bytes an element instead of 4."""
    asked = ("prefill", mqa_path, "--token-ids", token_file(MQA_IDS), "--cp", 2)
    asked += ("--dtype", "bfloat16", "--variant", "gather-q")
    wide, narrow = (as_json(*asked, "--partials", p)["wire_bytes"] for p in ("float32", "working"))
    heads, head_dim, layers, mine = 5, 64, 3, (len(MQA_IDS) + 1) // 2
    assert wide - narrow == layers * (len(MQA_IDS) - mine) * heads * head_dim * 2


def test_a_rate_beyond_the_hardware_is_told(mqa_path, token_file, monkeypatch):
    slow = replace(default_profile("cpu"), peak_flops={"float32": 1.0})
    monkeypatch.setattr(world_profile, "world_profile", lambda world: slow)
    asked = ("prefill", mqa_path, "--token-ids", token_file(MQA_IDS))
    assert "is more than this hardware can do" in cptool(*asked).stderr
    monkeypatch.setattr(world_profile, "world_profile", lambda world: default_profile("cpu"))
    assert "hardware can do" not in cptool(*asked).stderr


def test_a_session_resumes_on_other_ranks_and_takes_a_next_turn(
    mqa_path, mqa_reference, token_file, tmp_path
):
    store, turns = tmp_path / "s", [MQA_IDS[:31], MQA_IDS[31:50], MQA_IDS[50:]]
    said = list(turns[0])
    as_json("prefill", mqa_path, "--token-ids", token_file(turns[0]), "--session", store, "--cp", 4)
    for turn, (cp, variant) in zip(
        [[], *turns[1:]], [(2, "pass-kv"), (3, "gather-q"), (1, "auto")], strict=True
    ):
        said += turn
        prompt = ("--token-ids", token_file(turn)) if turn else ()
        answer = as_json("decode", store, *prompt, "-n", 9, "--cp", cp, "--variant", variant)
        assert answer["token_ids"] == [greedy(mqa_reference, said, 9, (300,))]
        said += answer["token_ids"][0]
    assert as_json("decode", store, "-n", 0)["cached"] == len(said) - 1


def test_a_batch_says_what_its_members_say_alone(mqa_path, mqa_reference, token_file, tmp_path):
    batch = [MQA_IDS[:1], MQA_IDS[1:8], MQA_IDS[8:], MQA_IDS[3:6]]
    first = as_json(
        "prefill",
        mqa_path,
        "--token-ids",
        token_file(batch),
        "--session",
        tmp_path / "s",
        "--cp",
        3,
    )
    expected = [greedy(mqa_reference, ids, 12, (300,)) for ids in batch]
    assert first["first_token"] == [ids[0] for ids in expected]
    assert first["tokens_per_sequence"] == list(map(len, batch))
    assert as_json("decode", tmp_path / "s", "-n", 12)["token_ids"] == expected


def test_sampling_depends_on_the_seed_and_not_on_ranks(mqa_path, token_file, tmp_path):
    draws = {}
    for cp in (1, 3):
        for seed in (1, 2):
            store = tmp_path / f"{cp}-{seed}"
            as_json(
                "prefill",
                mqa_path,
                "--token-ids",
                token_file(MQA_IDS),
                "--session",
                store,
                "--cp",
                cp,
            )
            options = ("--temperature", 0.8, "--top-p", 0.9, "--seed", seed)
            draws[cp, seed] = as_json("decode", store, "-n", 16, *options)["token_ids"]
    assert draws[1, 1] == draws[3, 1] != draws[1, 2] == draws[3, 2]


def test_tensor_parallel_ranks_say_the_same(mqa_path, mqa_reference, token_file, tmp_path):
    with_heads = ("--token-ids", token_file(MQA_IDS), "--session", tmp_path / "s")
    error = cptool("prefill", mqa_path, *with_heads, "--tp", 2, code=2)
    assert "do not divide into 2" in error.stderr


def test_rows_are_lines_where_no_terminal_is(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    draw.table([("one", "a" * 200), ("longer", "b")])
    assert capsys.readouterr().out == f"one     {'a' * 200}\nlonger  b\n"
    assert [units.size(n) for n in (999, 1e12, 1.5e18)] == ["999 B", "1 TB", "1,500,000 TB"]


def test_doctor_tells_a_wrong_kernel(monkeypatch):
    from cptool.exactness import selftest

    assert "ok" in cptool("doctor").stdout
    good = list(selftest.run())
    bad = selftest.Check("attention avx512, float32, D 64", error=0.1, allowed=1e-6)
    monkeypatch.setattr(selftest, "run", lambda device: iter([*good, bad]))
    result = cptool("doctor", code=1)
    assert "WRONG" in result.stdout and "1 of" in result.stderr


def test_demo_compares_both_answers(smollm2_path, monkeypatch):
    """Over the end of the logbook; `test_demo_answers_from_the_document` reads all of it."""
    document = demo.read_document()
    monkeypatch.setattr(demo, "read_document", lambda: document[-1500:])
    done = cptool("demo")
    lines = done.stdout.splitlines()
    assert lines[0] == f"Q: {demo.QUESTION}" and lines[1].startswith("A: ")
    assert "check: tokens of 2 ranks = tokens of 1 rank" in lines[-1]
    assert demo._compare([[1, 2], [1, 3]], RankOptions(cp=2)) == 1


@pytest.mark.slow
def test_demo_answers_from_the_document(smollm2_path):
    assert "Biscuit" in cptool("demo").stdout


def authors(model: Path, **sampling) -> Path:
    """The model, sampled by its author in some way."""
    edit_json(model / "generation_config.json", do_sample=True, **sampling)
    return model


def test_the_authors_sampling_is_the_default_of_decode(
    mqa_path, mqa_reference, token_file, tmp_path
):
    """An explicit option wins, each by itself, and --temperature 0 is greedy."""
    model = authors(shutil.copytree(mqa_path, tmp_path / "m"), temperature=0.8, top_p=0.9, top_k=30)
    first = tmp_path / "s"
    asked = ("prefill", model, "--token-ids", token_file(MQA_IDS), "--session", first)
    said = greedy(mqa_reference, MQA_IDS, 12, (300,))
    assert as_json(*asked)["first_token"] == said[:1]

    def decode(*options):
        session = shutil.copytree(first, tmp_path / "-".join(map(str, ["copy", *options])))
        answer = as_json("decode", session, "-n", 12, *options)
        names = ("temperature", "top_p", "seed", "top_k", "repetition_penalty")
        return answer["token_ids"][0], tuple(answer["sampling"][name] for name in names)

    own, sampling = decode()
    assert sampling == (0.8, 0.9, 0, 30, 1.0)
    assert own == decode("--temperature", 0.8, "--top-p", 0.9)[0] != said
    assert decode("--temperature", 0) == (said, (0.0, 0.9, 0, 30, 1.0))
    assert decode("--top-p", 1)[1] == (0.8, 1.0, 0, 30, 1.0)
    assert decode("--top-k", 1) == (said, (0.8, 0.9, 0, 1, 1.0))
    penalised = ("--temperature", 0, "--repetition-penalty", 1.5)
    assert decode(*penalised) == (
        greedy(mqa_reference, MQA_IDS, 12, (300,), repetition_penalty=1.5),
        (0.0, 0.9, 0, 30, 1.5),
    )
    shown = cptool("decode", first, "-n", 2).stderr
    assert "temperature 0.8, top-p 0.9, top-k 30 (the model author's; --temperature 0 is" in shown


def test_every_value_of_a_sampling_is_shown_with_who_chose_it(mqa_path):
    checkpoint = open_checkpoint(str(mqa_path))

    def shown(author=None, **request):
        authored = replace(checkpoint, sampling=author or SamplingDefaults())
        request = SamplingRequest(**request)
        return request.describe(request.resolve(authored))

    author = SamplingDefaults(temperature=0.6, top_k=20, repetition_penalty=1.05)
    assert shown() == shown(temperature=0) == shown(top_k=3) == "greedy"
    assert shown(author) == (
        "temperature 0.6, top-p 1, top-k 20, repetition penalty 1.05 "
        "(the model author's; --temperature 0 is greedy)"
    )
    assert shown(author, temperature=0) == "greedy; repetition penalty 1.05 (the model author's)"
    assert shown(author, min_p=0.1, repetition_penalty=1.0) == (
        "temperature 0.6, top-p 1, top-k 20 (the model author's; --temperature 0 is greedy); "
        "min-p 0.1"
    )
    assert shown(frequency_penalty=0.5, presence_penalty=-1, logit_bias=((5, 1.0), (6, 2.0))) == (
        "greedy; presence penalty -1, frequency penalty 0.5, a bias on 2 tokens"
    )


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        (("--top-k", -1), "--top-k -1: it must be a whole number"),
        (("--min-p", 1.5), "--min-p 1.5: it must lie in [0, 1]"),
        (("--repetition-penalty", 0), "--repetition-penalty 0.0: it must be a positive number"),
        (("--presence-penalty", 3), "--presence-penalty 3.0: it must lie in [-2, 2]"),
        (("--frequency-penalty", "nan"), "--frequency-penalty nan: it must lie in [-2, 2]"),
        (("--logit-bias", "301=1"), "--logit-bias 301=1: the model's vocabulary has the ids"),
        (("--logit-bias", "5"), "'5' must be ID=VALUE"),
        (("--logit-bias", "5=inf"), "--logit-bias 5=inf: the value must be a finite number"),
        (("--logit-bias", "5=1", "--logit-bias", "5=2"), "this token has a bias already"),
    ],
)
def test_values_of_a_sampling_out_of_range_are_refused(
    mqa_path, token_file, tmp_path, options, rule
):
    session = tmp_path / "s"
    cptool("prefill", mqa_path, "--token-ids", token_file([1, 2]), "--session", session)
    assert rule in cptool("decode", session, *options, code=2).stderr


def test_the_authors_sampling_is_the_default_of_chat(smollm2_path, monkeypatch):
    checkpoint = open_checkpoint(str(smollm2_path))
    checkpoint = replace(checkpoint, sampling=SamplingDefaults(temperature=0.6))
    monkeypatch.setattr(command, "open_model", lambda *_: checkpoint)
    stop_at_launch(monkeypatch)
    for options, shown in [
        ((), "sampling: temperature 0.6, top-p 1 (the model author's; --temperature 0 is greedy)"),
        (("--temperature", 0.7, "--top-p", 0.5), "sampling: temperature 0.7, top-p 0.5"),
        (("--temperature", 0), None),
    ]:
        lines = cptool("chat", smollm2_path, *options, code=1).stderr.splitlines()
        assert lines == [*[shown] * bool(shown), f"cptool: {STARTED}"]
