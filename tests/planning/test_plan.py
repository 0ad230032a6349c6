"""`cptool plan`: its numbers against the published ones, its answers, its refusals, its speed."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from cptool.cli.main import main
from cptool.errors import UserError
from cptool.model.shapes import SHAPES
from cptool.planning.cost.forward import Forward
from cptool.planning.cost.layer import predict
from cptool.planning.cost.memory import memory_per_rank
from cptool.planning.hardware import Measurement
from cptool.planning.planner import Workload, as_published, best, layouts, plan
from cptool.planning.profiles import default_profile, find_profile, known_profiles, save_profile

LLAMA, GTT = SHAPES["llama3-405b"], find_profile("gtt-h100")


def published():
    path = Path(__file__).parents[2] / "benchmarks" / "plan_against_paper.py"
    spec = importlib.util.spec_from_file_location("plan_against_paper", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*arguments, code=0):
    done = CliRunner().invoke(main, ["plan", *map(str, arguments)], standalone_mode=True)
    assert done.exit_code == code, done.output
    return done.output


def ask(*arguments):
    return json.loads(run(*arguments, "--json"))


PAPER = ("llama3-405b", "--hardware", "gtt-h100")


def test_published_times_are_predicted():
    """Sections 7 to 9: median error at most 5%, worst 15%, the headline within 5%."""
    paper = published()
    rows = paper.compare()
    found = paper.errors(rows, "ttft", "ttit")
    assert found["median"] <= 0.03 and found["worst"] <= 0.12
    assert paper.errors(rows, "ttft")["worst"] <= 0.05
    assert paper.errors(rows, "ring step")["worst"] <= 0.07
    headline = next(row for row in rows if row["what"].startswith("1000000"))
    assert abs(headline["error"]) <= 0.02


def test_published_decode_attention_is_predicted_but_for_batches():
    """Table 8 within 10%, but for three rows: one attention of four sequences on one host, which
    took half as long again as one of as many keys in a single sequence; and four hosts with as
    many, of which one attention is 1.5 us off and whose steps hid each other in part.
    """
    paper = published()
    found = paper.errors(paper.compare(), "decode attention")
    assert found["median"] <= 0.06
    sizes = sorted(abs(r["error"]) for r in paper.compare() if r["table"] == "decode attention")
    assert sizes[-4] <= 0.1


def test_published_times_of_short_turns_are_predicted():
    """Section 7, partial prefill: below a miss rate of 10% too, whichever rows the fit has seen."""
    paper = published()
    found = paper.errors(paper.compare(), "partial")
    assert found["rows"] == 14 and found["median"] <= 0.02 and found["worst"] <= 0.08
    left_out = sorted(paper.without_one_row())
    assert left_out[len(left_out) // 2] <= 0.025 and left_out[-1] <= 0.08


def test_the_switch_lies_where_the_paper_measured_it():
    """Steady transfers, 627 us against 414 us of attention and 424 us of All2All, would put it at
    3%; the published whole is at 5%, where the two differ by less than 1%.
    """
    switch = published().switch()
    assert 0.04 <= switch["equal_at_miss_rate"] <= 0.06
    assert switch["pass_q_over_pass_kv_at_1.00%"] < 0.9
    assert switch["pass_q_over_pass_kv_at_2.50%"] < 0.96
    assert abs(switch["pass_q_over_pass_kv_at_5.00%"] - 1) < 0.015
    assert switch["pass_q_over_pass_kv_at_12.50%"] > 1


def test_slow_links_still_hide_pass_kv_at_long_contexts():
    """Full prefill over TCP scales as over RDMA up to 4 nodes (section 7)."""
    work = Workload(config=LLAMA, context=128_000, feed_forward="float8")
    for cp in (2, 4):
        fast, slow = (
            plan(work, cp, 8, "pass-kv", find_profile(name)).ttft.seconds
            for name in ("gtt-h100", "gti-h100")
        )
        assert slow < 1.02 * fast


def test_json_says_what_the_design_promises():
    said = ask(
        *PAPER, "--context", 128000, "--cached", 121600, "--cp", 4, "--tp", 8, "--variant", "pass-q"
    )
    assert said["variant"] == "pass-q" and said["reason"] == "as asked"
    assert 1.2 < said["ttft_s"] < 1.6 and 40 < said["ttit_ms"] < 90
    assert 60e9 < said["memory_bytes_per_rank"] < 96e9
    assert sum(said["parts_s"].values()) == pytest.approx(said["ttft_s"])
    assert sum(said["ttit_parts_ms"].values()) == pytest.approx(said["ttit_ms"])
    assert sum(said["parts_share"].values()) == pytest.approx(1)
    assert (said["new"], said["gpus"], said["hosts"]) == (6400, 32, 4)
    assert "torchrun --nnodes 4" in said["command"] and "srun" in said["command"]


def test_auto_explains_its_pick_and_names_all_variants():
    said = ask(*PAPER, "--context", "128K", "--cp", 4, "--tp", 8)
    times = [row["ttft_s"] for row in said["variants"]]
    assert times == sorted(times) and len(times) == 4
    assert said["variant"] == said["variants"][0]["variant"] and "equal within 1%" in said["reason"]
    text = run(*PAPER, "--context", "128K", "--cp", 4, "--tp", 8)
    assert "exposed" in text and "variants on this layout" in text and "run it:" in text


def test_the_fewest_gpus_that_reach_the_target():
    arguments = (*PAPER, "--context", "128K", "--max-gpus", 64)
    said = ask(*arguments, "--ttft-below", "15s")
    assert (said["cp"], said["tp"], said["reaches_target"]) == (4, 8, True)
    reasons = [row["why"] for row in said["rejected"]]
    assert any("too much" in why for why in reasons)
    assert any("misses the target" in why for why in reasons)
    assert any("32 reach the target" in why for why in reasons)
    said = json.loads(run(*arguments, "--ttft-below", "1s", "--json", code=3))
    assert said["gpus"] == 64 and said["reaches_target"] is False


def test_what_does_not_fit_is_refused_by_how_much():
    said = run(*PAPER, "--context", "128K", "--cp", 1, "--tp", 4, code=2)
    assert "GB more than the 92.2 GB" in said and "raise --tp" in said
    assert len(said.strip().splitlines()) == 1
    assert "--fp8" in run(*PAPER, "--no-fp8", "--context", "8K", "--cp", 1, "--tp", 8, code=2)


def test_the_remedy_is_one_that_was_not_tried():
    """Numbers of ranks that are not given are all looked at; FP8 is in use here already."""
    for given, remedy in [
        (("--cp", 1, "--tp", 4), "raise --tp"),
        (("--cp", 1, "--tp", 4, "--no-fp8"), "raise --tp, or give --fp8"),
        (("--max-gpus", 8), "raise --max-gpus"),
        (("--context", "9M", "--cp", 2, "--tp", 16), "raise --cp"),
        (("--context", "9M", "--tp", 16), "raise --max-gpus"),
    ]:
        assert run(*PAPER, "--context", "1M", *given, code=2).strip().endswith("; " + remedy)


def test_what_a_plan_says_can_be_run():
    said = ask("llama3-8b", "--hardware", "h100-sxm", "--context", "8K", "--cp", 2, "--tp", 1)
    assert said["command"].startswith("cptool prefill MODEL --prompt-file PROMPT")
    assert said["command"].endswith("--cp 2 --dtype bfloat16")
    assert "engine has no FP8" in run(*PAPER, "--context", "8K", "--cp", 1, "--tp", 16)
    shape = ("llama3-8b", "--hardware", "h100-sxm", "--cp", 1, "--tp", 1)
    assert "model's context of 131,072: prefill" in run(*shape, "--context", "128Ki", "--decode", 1)
    assert "model's context" not in run(*shape, "--context", "128Ki")


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (("llama3-8b", "--context", "8K", "--sweep", "ranks", "--cp", "2"), "--cp: --sweep ranks"),
        (
            ("llama3-8b", "--context", "8K", "--sweep", "ranks", "--ttft-below", "1s"),
            "--ttft-below: --sweep ranks does not use it",
        ),
        (("llama3-405c", "--context", "8K"), "no such model"),
        (("llama3-8b", "--context", "8K", "--hardware", "h1000"), "name one of"),
        (("llama3-8b", "--context", "8K", "--cached", "8K"), "less than --context"),
        (("llama3-8b", "--context", "8.5"), "whole number"),
        (("llama3-8b", "--context", "8K", "--ttft-below", "soon"), "not a duration"),
        (("llama3-8b", "--context", "8K", "--tp", "3"), "do not divide"),
        (("llama3-8b", "--context", "8K", "--hardware", "a100", "--fp8"), "no FP8"),
        (("llama3-8b", "--context", "8K", "--plot", "x.png"), "without --sweep"),
        (("llama3-8b", "--context", "8K", "--sweep", "miss-rates", "--cp", "1"), "one CP rank"),
        (("llama3-8b", "--context", "8K", "--cp", "4", "--max-gpus", "2"), "raise it"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, reason):
    said = run(*arguments, code=2)
    assert reason in said and len(said.strip().splitlines()) == 1


@pytest.mark.parametrize("name", known_profiles())
def test_every_profile_plans_a_small_model(name):
    said = ask("llama3-1b", "--hardware", name, "--context", "16K", "--cp", 2, "--tp", 1)
    assert said["ttft_s"] > 0 and said["ttit_ms"] > 0


@pytest.mark.parametrize("sweep", ["contexts", "ranks", "miss-rates"])
def test_sweeps_give_tables(sweep):
    said = ask(*PAPER, "--context", "128K", "--tp", 8, "--max-gpus", 32, "--sweep", sweep)
    assert said["sweep"] == sweep and len(said["x"]) >= 3
    assert all(len(times) == len(said["x"]) for times in said["ttft_s"].values())
    assert "CP" in run(*PAPER, "--context", "32K", "--tp", 8, "--max-gpus", 32, "--sweep", sweep)


@pytest.mark.parametrize("cached, travels", [("0", "pass-kv"), ("127500", "pass-q")])
@pytest.mark.parametrize("rule", ["algorithm1", "algorithm5"])
def test_a_rule_of_the_paper_chooses(rule, cached, travels):
    """Keys and values travel where all tokens are new, queries where few are."""
    asked = (*PAPER, "--cp", 4, "--tp", 8, "--context", "128K", "--cached", cached)
    said = ask(*asked, "--rule", rule)
    assert (said["rule"], said["variant"]) == (rule, travels)
    assert said["reason"].startswith(f"algorithm {rule[-1]}, miss rate")


def test_the_fitted_rule_needs_its_coefficients(tmp_path):
    asked = (*PAPER[:1], "--cp", 2, "--tp", 8, "--context", "64K", "--rule", "fitted")
    told = run(*asked, "--hardware", "gtt-h100", code=2)
    assert told.startswith("cptool: --rule fitted: gtt-h100 has no coefficients of it; measure")
    own = tmp_path / "own.json"
    for constant, variant in ((1.0, "pass-kv"), (-1.0, "pass-q")):
        fitted = dataclasses.replace(GTT, rule=(0.0, 0.0, constant))
        own.write_text(json.dumps(dataclasses.asdict(fitted)))
        said = ask(*asked, "--hardware", own)
        assert said["variant"] == variant and said["reason"].startswith("fitted rule, miss rate")


def test_a_sweep_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "sweep.png"
    run(
        *PAPER, "--context", "128K", "--tp", 8, "--max-gpus", 32, "--sweep", "ranks", "--plot", path
    )
    assert path.read_bytes().startswith(b"\x89PNG")


def test_an_answer_takes_no_torch():
    code = (
        "import sys\nfrom cptool.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "finally:\n    assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    arguments = ["plan", *PAPER, "--context", "1M", "--max-gpus", "128", "--json"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["gpus"] == 128


def test_tensor_parallelism_over_hosts_pays_for_their_link():
    one, two = (
        predict(
            "pass-kv",
            Forward(
                config=LLAMA, dtype="bfloat16", new=128_000, cached=0, ranks=1, active=1, tp=tp
            ),
            GTT,
        )
        for tp in (8, 16)
    )
    stream = 128_000 * LLAMA.hidden_size * 2
    inside = 2 * 7 / 8 * stream
    assert one.tensor_parallel_bytes == 2 * inside
    assert two.tensor_parallel_bytes == 2 * (inside + stream / 8)
    assert two.tensor_parallel_s > one.tensor_parallel_s and two.linear_s < one.linear_s


def test_fp8_halves_the_feed_forward_alone():
    plain, small = (
        memory_per_rank(
            "pass-kv",
            Forward(
                config=LLAMA,
                dtype="bfloat16",
                new=8000,
                cached=0,
                ranks=1,
                active=1,
                tp=8,
                feed_forward=dtype,
            ),
            GTT,
        )["weights"]
        for dtype in (None, "float8")
    )
    assert plain - small == LLAMA.num_hidden_layers * 3 * 16384 * 53248 / 8


def test_padding_queries_costs_a_step():
    plain, padded = (
        plan(
            Workload(config=LLAMA, context=128_000, feed_forward="float8", published=published),
            4,
            8,
            "pass-q-all2all",
            GTT,
        ).ttit.seconds
        for published in (False, True)
    )
    assert padded > plain


def test_decode_takes_the_steps_that_the_engine_takes():
    work = Workload(config=LLAMA, context=128_000, feed_forward="float8")
    free = plan(work, 4, 8, "auto", GTT)
    assert free.decode_choice.variant == "all-q"
    assert free.ttit.seconds == min(e.seconds for e in free.other_steps.values())
    assert plan(work, 4, 8, "gather-q", GTT).decode_choice.variant == "gather-q"
    assert plan(work, 1, 8, "auto", GTT).decode_choice.variant == "pass-kv"
    cpu = plan(
        Workload(config=SHAPES["llama3-1b"], context=8000), 2, 1, "auto", find_profile("cpu-avx2")
    )
    assert cpu.decode_choice.variant in ("pass-q", "gather-q")


def test_the_published_system_runs_its_own_form_of_pass_q():
    forms = {"auto": "auto", "pass-kv": "pass-kv", "pass-q": "pass-q-all2all"}
    assert {name: as_published(name) for name in forms} == forms


def test_the_published_system_has_two_variants():
    said = ask(
        *PAPER, "--context", "128K", "--cached", "127K", "--cp", 4, "--tp", 8, "--as-published"
    )
    assert {row["variant"] for row in said["variants"]} == {"pass-kv", "pass-q-all2all"}
    assert said["variant"] == said["decode_variant"] == "pass-q-all2all"
    assert 55 < said["ttit_ms"] < 80


def test_layouts_divide_the_model():
    assert all(tp in (1, 2, 4, 8) for _, tp in layouts(SHAPES["llama3-8b"], None, None, 8))
    assert layouts(LLAMA, 3, 5, 100) == [(3, 5)]


def test_nothing_fits_names_the_nearest():
    work = Workload(config=LLAMA, context=1_000_000)
    with pytest.raises(UserError, match=r"`cp` \d+, `tp` 8: a rank needs"):
        best(plan(work, cp, tp, "auto", GTT) for cp, tp in layouts(LLAMA, None, None, 8))


def test_ranks_beyond_the_processors_gain_nothing():
    two = dataclasses.replace(find_profile("cpu-avx2"), ranks_at_once=2)
    work = Workload(config=SHAPES["llama3-1b"], context=16_000)
    one = plan(work, 1, 1, "auto", two).ttft.seconds  # of two threads
    for cp, tp in ((2, 1), (1, 2), (4, 1), (2, 2), (1, 4)):
        assert plan(work, cp, tp, "auto", two).ttft.seconds > 0.95 * one
    assert plan(work, 4, 1, "auto", two).capacity == plan(work, 1, 1, "auto", two).capacity / 4


def test_a_target_that_is_not_reached_is_exit_code_3():
    arguments = (*PAPER, "--context", "128K", "--max-gpus", 64, "--ttft-below")
    assert "no layout here reaches the target of 1 s" in run(*arguments, "1s", code=3)
    assert json.loads(run(*arguments, "1s", "--json", code=3))["reaches_target"] is False
    run(*arguments, "15s")


@pytest.mark.parametrize("products", [True, False])
def test_a_checkpoint_is_planned_as_prefill_would_run_it(mqa_path, monkeypatch, products):
    from cptool.engine import world_profile
    from cptool.engine.setup import types

    isa = "avx512bf16" if products else "avx2"
    monkeypatch.setattr(types, "has_bfloat16_products", lambda: products)
    monkeypatch.setattr(world_profile, "instruction_set", lambda: isa)
    said = ask(mqa_path, "--context", 64)
    assert (said["dtype"], said["hardware"], said["calibrated"]) == ("float32", f"cpu-{isa}", None)
    assert f"cpu-{isa} (defaults, not calibrated here)" in run(mqa_path, "--context", 64)
    assert ask("llama3-1b", "--context", 64)["dtype"] == "bfloat16"
    slow, fast = (
        ask(mqa_path, "--context", "100K", "--dtype", dtype)["ttft_s"]
        for dtype in ("bfloat16", "float32")
    )
    assert (slow < fast) == products


def test_a_dtype_that_was_not_measured_is_said_to_be_so(mqa_path, tmp_path, monkeypatch):
    monkeypatch.setenv("CPTOOL_CACHE", str(tmp_path))
    measured = Measurement(date="2026-11-29", dtypes=("float32",))
    named = {"name": "measured on 2 cpu ranks", "measurement": measured}
    save_profile(dataclasses.replace(default_profile("cpu"), **named))
    told = run(mqa_path, "--context", 64, "--dtype", "bfloat16")
    assert "bfloat16 was not measured here" in told and "calibrate --dtype bfloat16" in told
    told = run(mqa_path, "--context", 64)
    assert "not measured" not in told and "2 cpu ranks (calibrated 2026-11-29)" in told
    assert ask(mqa_path, "--context", 64)["calibrated"] == "2026-11-29"


def test_the_command_of_a_plan_beyond_the_models_context_runs():
    """It has the option without which `prefill` refuses the prompt."""
    beyond = ["plan", "llama3-8b", "--context", "1M", "--hardware", "gtt-h100", "--max-gpus", "16"]
    shown = CliRunner().invoke(main, [*beyond, "--decode", "10"])
    after = shown.stdout.partition("run it:\n")[2].splitlines()
    commands = [line for line in after if line.startswith("  ") and line != "  # or:"]
    assert [line.split()[0] for line in commands] == ["torchrun", "srun"]
    assert all("--context-length 1000010" in line for line in commands)
    within = CliRunner().invoke(main, ["plan", "llama3-8b", "--context", "100K"])
    assert "--context-length" not in within.stdout
