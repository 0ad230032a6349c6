"""The memory of a run: refused before it is taken, and measured beside what was planned."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from cptool import LLM
from cptool.cli.main import main
from cptool.engine.setup import memory
from cptool.errors import UserError
from cptool.host.memory import Usage, usage
from cptool.planning.cost.memory import CODE_BYTES, PROCESS_BYTES
from cptool.planning.prediction import Work, memory_of
from cptool.planning.profiles import find_profile


@pytest.fixture
def scarce(monkeypatch):
    """Leave this process so many bytes."""

    def leave(count):
        monkeypatch.setattr(memory.memory, "available", lambda: count)
        monkeypatch.setattr(memory.memory, "usage", lambda: Usage(private=0, shared=0, peak=0))

    return leave


@pytest.mark.parametrize("command", ["prefill", "generate"])
def test_a_prompt_without_room_is_refused_before_anything_is_loaded(
    command, mqa_path, scarce, monkeypatch
):
    from cptool.engine import weights

    monkeypatch.setattr(weights, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    scarce((PROCESS_BYTES + CODE_BYTES + 4e6) / 0.96)
    arguments = [command, str(mqa_path), "--synthetic", "40000", "--context-length", "100000"]
    done = CliRunner().invoke(main, [*arguments, "--cp", "1"])
    assert done.exit_code == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("cptool: 40,000 tokens: a rank needs ") and "kv " in line
    assert " MB more than the 259 MB that each may take; use " in line
    assert "--kv-dtype bfloat16" in line and "--kv-memory" in line
    assert line.endswith("or more --cp ranks on other machines")


def test_a_program_is_refused_too_and_goes_on(mqa_path, scarce):
    with LLM(mqa_path, context_length=100_000) as llm:
        scarce((PROCESS_BYTES + CODE_BYTES + 4e6) / 0.96)
        with pytest.raises(UserError, match="30,000 tokens: a rank needs"):
            llm.generate([[5] * 30_000], max_tokens=1)
        scarce(2e9)
        assert len(llm.generate([[5] * 600], max_tokens=2)[0].token_ids) == 2


def test_the_remedy_fits_what_is_too_large():
    def remedy(device, **parts):
        work = Work(config=None, dtype="float32", new=[9], cached=[0], answer=0, ranks=1, tp=1)
        whole = {"process": 0.0, "weights": 0.0, "kv": 0.0, "workspace": 0.0, "messages": 0.0}
        on_cpu = device == "cpu"
        found = memory._remedies(work, whole | parts, 10.0, on_cpu=on_cpu, offers=memory.OPTIONS)
        return found

    assert remedy("cuda", workspace=20.0) == "use a smaller `chunk` or more `cp` ranks"
    assert remedy("cuda", weights=20.0) == "use more `tp` ranks"
    assert remedy("cuda", kv=20.0) == "use more `cp` ranks"
    assert remedy("cpu", weights=20.0) == "use more `cp` ranks on other machines or a smaller model"
    assert remedy("cpu", kv=20.0) == (
        "use `kv_dtype` bfloat16, `kv_memory` or more `cp` ranks on other machines"
    )


def test_what_is_shared_counts_once():
    found = Usage(private=100, shared=60, peak=200)
    assert found.held(2) == 130 and found.most(2) == 170 and found.most(1) == 200
    now = usage()
    assert 50e6 < now.private < now.peak


def test_chunks_make_a_turn_fit_and_kv_in_a_file_takes_no_memory(mqa_path):
    from cptool.checkpoint import open_checkpoint

    work = Work(
        config=open_checkpoint(str(mqa_path)).config,
        dtype="float32",
        new=[200_000],
        cached=[0],
        answer=100,
        ranks=2,
        tp=1,
        kv_memory=10_000_000,
    )
    profile = find_profile("cpu-avx2")
    whole = memory_of(work, "auto", profile, chunk=200_000, limit=1e12)
    parts = memory_of(work, "auto", profile, chunk=None, limit=0.9 * sum(whole.values()))
    assert sum(parts.values()) <= 0.9 * sum(whole.values()) and whole["kv"] < 11e6


def test_the_measured_peak_is_near_the_planned_one(mqa_path):
    command = [sys.executable, "-m", "cptool", "prefill", str(mqa_path), "--synthetic", "10000"]
    command += ["--context-length", "100000", "--cp", "2", "--threads", "1", "--chunk", "3000"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["chunks"] == 4
    planned, peak = said["memory_bytes_per_rank"], said["peak_memory_bytes_per_rank"]
    assert planned == pytest.approx(sum(said["memory_parts_bytes"].values()), abs=5)
    assert peak == pytest.approx(planned, rel=0.2)


@pytest.mark.parametrize(
    "command",
    [
        ("verify", "MODEL", "--synthetic", "40000", "--context-length", "100000", "--max-cp", "2"),
        ("bench", "prefill", "llama3-1b", "--context", "64K", "--cp", "1"),
        ("bench", "decode", "llama3-1b", "--cached", "64K", "--cp", "1"),
    ],
)
def test_what_measures_and_verifies_is_refused_too(command, mqa_path, scarce):
    scarce(0.3e9)
    arguments = [str(mqa_path) if word == "MODEL" else word for word in command]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 2, done.output
    assert done.stderr.strip().splitlines()[-1].count(": a rank needs ") == 1
