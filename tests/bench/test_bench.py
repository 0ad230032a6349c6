"""`cptool bench` at tiny sizes: what its JSON says, what it draws, and mistakes in one line."""

import importlib.util
import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from cptool.cli.main import main

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 3000,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    path = tmp_path_factory.mktemp("shape") / "config.json"
    path.write_text(json.dumps(TINY))
    return str(path)


def bench(*arguments, code: int = 0):
    result = CliRunner().invoke(main, ["bench", *map(str, arguments)])
    assert result.exit_code == code, (result.output, result.stderr, result.exception)
    return result


def measured(*arguments) -> dict:
    """Standard output is one JSON object, and says under which circumstances."""
    fields = json.loads(bench(*arguments, "--repeats", 1, "--json").stdout)
    assert {"machine", "date", "commit", "command", "torch", "device", "threads"} <= fields.keys()
    return fields


def in_order(summary):
    return 0 < summary["min"] <= summary["median"] <= summary["max"]


def test_attention(tmp_path):
    plot = tmp_path / "a.png"
    fields = measured(
        "attention",
        "-t",
        1,
        "-t",
        65,
        "--cached",
        0,
        "--cached",
        40,
        "--heads",
        "4/2",
        "-d",
        16,
        "--dtype",
        "float32",
        "--threads",
        1,
        "--device",
        "cpu",
        "--plot",
        plot,
    )
    assert plot.read_bytes().startswith(b"\x89PNG")
    rows = fields["results"]
    assert [(r["tokens"], r["cached"]) for r in rows] == [(1, 0), (1, 40), (65, 0), (65, 40)]
    assert [r["torch_seconds"] is None for r in rows] == [False, False, False, True]
    for row in rows:
        assert in_order(row["seconds"]) and in_order(row["ceilings"]["matmul"])
        assert row["bound"] in ("compute", "memory") and row["error"] < 0.05


def test_merge():
    fields = measured(
        "merge",
        "-n",
        1,
        "-n",
        3,
        "-t",
        5,
        "--heads",
        2,
        "-d",
        16,
        "--device",
        "cpu",
        "--threads",
        1,
    )
    assert [(r["partials"], r["dtype"]) for r in fields["results"]] == [
        (1, "float32"),
        (3, "float32"),
        (1, "bfloat16"),
        (3, "bfloat16"),
    ]
    assert all(in_order(r["seconds"]) and in_order(r["torch_seconds"]) for r in fields["results"])
    assert bench("merge", "-n", 2, "-t", 5, "--repeats", 1, "--threads", 1).stdout.count("\n") >= 4


def test_link_between_ranks_of_torchrun(tmp_path):
    plot = tmp_path / "l.svg"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3"]
    command += ["-m", "cptool", "bench", "link", "--size", "1K", "--size", "70000"]
    command += ["--repeats", "1", "--device", "cpu", "--threads", "1", "--json"]
    done = subprocess.run(
        [*command, "--plot", str(plot)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    fields = json.loads(done.stdout)
    assert (fields["ranks"], fields["ranks_of_a_host"], fields["backend"]) == (3, 3, "gloo")
    assert [(r["pattern"], r["size"], r["sent_bytes"]) for r in fields["results"]] == [
        (pattern, size, size * others)
        for size in (1000, 70000)
        for pattern, others in (("send-receive", 1), ("all-gather", 2), ("all-to-all", 2))
    ]
    for row in fields["results"]:
        assert in_order(row["seconds"]) and in_order(row["tcp_seconds"]) and row["rate"] > 0
        assert ("steals" in row) == (row["pattern"] == "send-receive")
    assert plot.stat().st_size


def test_prefill_measures_beside_the_prediction(shape, tmp_path):
    plot = tmp_path / "p.png"
    fields = measured(
        "prefill",
        shape,
        "--cp",
        1,
        "--cp",
        3,
        "--context",
        90,
        "--miss-rate",
        1,
        "--miss-rate",
        0.1,
        "--variant",
        "pass-kv",
        "--variant",
        "auto",
        "--layers",
        3,
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--threads",
        1,
        "--plot",
        plot,
    )
    assert (fields["layers"], fields["model_layers"], fields["vocabulary"]) == (3, 5, 1024)
    assert [(r["tokens"], r["cached"], r["ranks"], r["asked"]) for r in fields["results"]] == [
        (new, 90 - new, ranks, asked)
        for new in (9, 90)
        for ranks, variants in ((1, ["auto"]), (3, ["pass-kv", "auto"]))
        for asked in variants
    ]
    for row in fields["results"]:
        assert in_order(row["ttft_seconds"]) and row["predicted_s"] > 0
        assert ("regret" in row) == (row["asked"] == "auto" and row["ranks"] > 1)
    ring = next(r for r in fields["results"] if r["asked"] == "pass-kv" and r["cached"] == 0)
    # Two blocks of 30 tokens for each layer: K and V of two heads of 16 in float32.
    assert ring["sent_bytes"] == 3 * 2 * 30 * (2 * 2 * 16 * 4)
    assert plot.stat().st_size


@pytest.mark.parametrize("calibrate", [False, True])
@pytest.mark.parametrize("command", ["prefill", "decode"])
def test_a_sweep_is_calibrated_on_request_alone(command, calibrate, shape, monkeypatch):
    from cptool.distributed import launch

    sweeps = []

    def started(entry, measure, sweep, **options):
        sweeps.append(sweep)
        return {}, 1  # a rank that prints nothing

    monkeypatch.setattr(launch, "run", started)
    bench(command, shape, "--repeats", 2, *["--calibrate"] * calibrate)
    assert [sweep.calibrated for sweep in sweeps] == [calibrate]
    assert sweeps[0].repeats == 2 and getattr(sweeps[0], "seconds", 0.0) == 0.0


@pytest.mark.slow
def test_decode_calibrates_first_if_asked(shape):
    fields = measured(
        "decode",
        shape,
        "--cp",
        2,
        "--cached",
        0,
        "--cached",
        33,
        "--batch",
        2,
        "--steps",
        2,
        "--variant",
        "gather-q",
        "--variant",
        "auto",
        "--calibrate",
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--threads",
        1,
    )
    assert fields["profile"]["name"].startswith("measured on 2 cpu ranks")
    assert [(r["cached"], r["asked"], r["ranks"]) for r in fields["results"]] == [
        (cached, asked, 2) for cached in (0, 33) for asked in ("gather-q", "auto")
    ]
    assert all(in_order(r["ttit_seconds"]) and r["bytes"] > 0 for r in fields["results"])


MISTAKES = {
    "heads": (["attention", "--heads", "8/3"], "'8/3' must be QUERY/KV heads"),
    "head dim": (["attention", "-d", "21"], "--head-dim 21: it must be even"),
    "threads": (["attention", "--threads", "100000"], "--threads 100000: it must be 1 to 1024"),
    "threads of merge": (["merge", "--threads", "100000"], "it must be 1 to 1024"),
    "threads of emulate": (
        ["emulate", "--shape", "llama3-1b", "--context", "64", "--threads", "100000"],
        "it must be 1 to 1024",
    ),
    "tokens": (["merge", "-t", "none"], "'none' must be a whole number"),
    "size": (["link", "--size", "0"], "'0' must be a positive number of bytes"),
    "pattern": (["link", "--pattern", "ring"], "'ring' is not one of"),
    "one rank": (["link", "--cp", "1"], "1 is not in the range"),
    "shape": (["prefill", "llama9"], "or one of the shapes"),
    "miss rate": (["prefill", "llama3-1b", "--miss-rate", "0"], "0"),
    "tp": (["decode", "llama3-1b", "--tp", "3"], "do not divide into 3 equal parts"),
    "plot's ending": (["merge", "--plot", "a.txt"], "--plot a.txt: it must end in .png"),
    "plot's folder": (["merge", "--plot", "/nowhere/a.png"], "/nowhere is not a directory"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_code_2(name, monkeypatch):
    from cptool.distributed import launch

    monkeypatch.setattr(launch, "run", lambda *a, **k: pytest.fail("a rank was started"))
    given, told = MISTAKES[name]
    result = bench(*given, code=2)
    assert result.stdout == "" and len(result.stderr.splitlines()) == 1
    assert told in result.stderr


def test_a_plot_without_matplotlib_is_refused_before_anything_runs(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    told = bench("merge", "--plot", "a.png", code=2).stderr
    assert told == (
        "cptool: --plot: matplotlib is not installed; install it with pip install 'cptool[plot]'\n"
    )


def test_help_does_not_wait_for_torch():
    script = (
        "import sys\nfrom cptool.cli.main import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules\n"
    )
    command = [sys.executable, "-c", script, "bench", "prefill", "--help"]
    subprocess.run(command, check=True, capture_output=True)
