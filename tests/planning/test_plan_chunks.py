"""`cptool plan --chunk`: a prompt in chunks, and a layout that only they fit on."""

import json

import pytest
from click.testing import CliRunner

from cptool.cli.main import main

MILLION = ("llama3-405b", "--context", "1M", "--cp", 8, "--tp", 8)
GTT = ("--hardware", "gtt-h100")


def run(*arguments, code=0):
    done = CliRunner().invoke(main, ["plan", *map(str, arguments)])
    assert done.exit_code == code, done.output
    return done


def ask(*arguments):
    return json.loads(run(*arguments, "--json").stdout)


@pytest.mark.parametrize("hardware", [GTT, ()])
@pytest.mark.parametrize("chunk", [("--chunk", "auto"), ()])
def test_a_million_tokens_fit_on_eight_hosts(hardware, chunk):
    said = ask(*MILLION, *hardware, *chunk)
    assert said["memory_bytes_per_rank"] <= said["memory_capacity_bytes"]
    assert (said["cp"], said["tp"], said["feed_forward"]) == (8, 8, "float8")
    assert 100 < said["ttft_s"] < 200


def test_what_fits_in_fp8_alone_is_planned_so_and_said_so():
    done = run(*MILLION)
    assert "nothing fits with the feed-forward in bfloat16; planned in FP8" in done.stderr
    assert "give --fp8" in run(*MILLION, "--no-fp8", code=2).stderr


def test_chunks_add_up():
    whole, parts = (ask(*MILLION, *GTT, "--chunk", n) for n in ("1M", "64K"))
    assert (whole["chunk"], whole["chunks"]) == (1_000_000, 1)
    assert (parts["chunk"], parts["chunks"]) == (64_000, 16)
    first, last = parts["first_chunk"], parts["last_chunk"]
    assert (first["new"], first["cached"]) == (64_000, 0)
    assert (last["new"], last["cached"]) == (40_000, 960_000)
    assert first["forward_s"] < last["forward_s"] < parts["ttft_s"] / 8
    assert parts["switches"][-1]["variant"] == last["variant"] == parts["variant"]
    assert sum(parts["parts_s"].values()) == pytest.approx(parts["ttft_s"])
    assert whole["ttft_s"] < parts["ttft_s"] < 1.2 * whole["ttft_s"]
    assert parts["wire_bytes"] > 5 * whole["wire_bytes"]  # the prefix travels with every chunk
    saved = whole["memory_bytes_per_rank"] - parts["memory_bytes_per_rank"]
    assert saved > 0.9 * whole["memory_parts_bytes"]["workspace"]


def test_a_person_reads_of_the_chunks_and_of_the_switch():
    text = run(*MILLION, "--hardware", "gti-h100", "--chunk", "16K").stdout
    assert "63 of up to 16,000 tokens" in text and "the first " in text and "the last " in text
    assert "pass-q from " in text and " cached tokens on" in text
    assert "--chunk 16000" in text.partition("run it:")[2]
    assert "chunks" not in run(*MILLION, *GTT, "--chunk", "1M").stdout


def test_a_cpu_s_remedies_fit_a_cpu():
    """Its ranks share a machine's memory: more of them are of no use."""
    cpu = ("llama3-8b", "--context", "1M", "--hardware", "cpu-avx2")
    assert run(*cpu, code=2).stderr.endswith("; give the --hardware of machines with more memory\n")
    wide = run(*cpu, "--dtype", "float32", code=2).stderr
    assert "; give --kv-dtype bfloat16 or the --hardware of machines" in wide
    whole = ("llama3-1b", "--context", "100K", "--cp", 1, "--tp", 1, "--hardware", "cpu-avx2")
    assert "give a smaller --chunk or the" in run(*whole, "--chunk", "100K", code=2).stderr
    run(*whole)


def test_a_plan_for_this_machine_takes_the_memory_of_this_machine(mqa_path, monkeypatch):
    from cptool.host import memory

    for whole in (4e9, 64e9):
        monkeypatch.setattr(memory, "total", lambda whole=whole: whole)
        said = ask(mqa_path, "--context", 1000, "--cp", 1, "--tp", 1)
        assert said["memory_capacity_bytes"] == pytest.approx(0.96 * whole)
        assert ask("llama3-1b", "--context", "1K", "--cp", 1, "--tp", 1, "--hardware", "cpu-avx2")[
            "memory_capacity_bytes"
        ] == pytest.approx(0.96 * 8e9)
