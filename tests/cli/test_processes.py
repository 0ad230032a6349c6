"""Commands as processes of their own: streams, launchers, signals, the death of a rank."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
from conftest import greedy
from test_cli import MQA_IDS, as_json

from cptool.cli.answers.stream import Output


def run(*arguments, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "cptool", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, **options)


def test_text_streams_to_standard_output(smollm2_path, tmp_path):
    done = run(
        "prefill", smollm2_path, "--prompt", "The capital of France is", "--session", tmp_path / "s"
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout and "pass-kv" in done.stdout
    done = run("decode", tmp_path / "s", "-n", 2, "--cp", 2)
    assert (done.returncode, done.stdout) == (0, " Paris.\n"), done.stderr
    assert "ms each" in done.stderr


def test_torchrun_joins(mqa_path, mqa_reference, token_file, tmp_path):
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "-m",
        "cptool",
    ]
    prompt = ("--token-ids", token_file(MQA_IDS))
    words = ("generate", mqa_path, *prompt, "--session", tmp_path / "s", "-n", 8, "--json")
    done = subprocess.run([*torchrun, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    fields = json.loads(done.stdout)  # one object, from one rank
    assert fields["cp"] == 2 and as_json("session", "show", tmp_path / "s")["cp"] == 2
    assert fields["token_ids"] == [greedy(mqa_reference, MQA_IDS, 8, (300,))]


def descendants(pid: int) -> list[int]:
    """Living processes that `pid` started, and those that they started."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            parents[int(stat.parent.name)] = int(fields[1])
    found, frontier = [], {pid}
    while frontier:
        frontier = {child for child, parent in parents.items() if parent in frontier}
        found += sorted(frontier)
    return found


def rank_pids(process: subprocess.Popen) -> list[int]:
    """Ranks are what the fork server has started: children of a child."""
    children = {
        pid
        for pid in descendants(process.pid)
        if f"PPid:\t{process.pid}\n" in Path(f"/proc/{pid}/status").read_text()
    }
    return [pid for pid in descendants(process.pid) if pid not in children]


def test_the_death_of_a_rank_ends_all_and_leaves_the_session(
    mqa_path, smollm2_path, token_file, tmp_path
):
    store = tmp_path / "s"
    as_json("prefill", smollm2_path, "--synthetic", 5, "--session", store, "--cp", 3)
    before = {p.name: p.read_bytes() for p in store.iterdir()}
    command = [
        sys.executable,
        "-m",
        "cptool",
        "decode",
        str(store),
        "--synthetic",
        "8000",
        "-n",
        "1",
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        while len(ranks := rank_pids(process)) < 3:
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(3)
        os.kill(ranks[1], signal.SIGKILL)
        killed = time.monotonic()
        output, errors = process.communicate(timeout=600)
    assert time.monotonic() - killed < 30
    assert process.returncode == 1, errors
    assert output == ""
    line = errors.strip().splitlines()[-1]
    assert "was killed by SIGKILL during" in line and f"pid {ranks[1]}" in line
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    assert {p.name: p.read_bytes() for p in store.iterdir()} == before


@pytest.mark.parametrize("cp", [1, 2])
def test_a_turn_is_saved_though_nobody_reads_the_answer(smollm2_path, tmp_path, cp):
    store = tmp_path / "s"
    as_json("prefill", smollm2_path, "--synthetic", 5, "--session", store)
    command = [sys.executable, "-m", "cptool", "decode", str(store), "-n", "8", "--cp", str(cp)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert as_json("session", "show", store)["tokens"] == [13]


def test_an_answer_that_cannot_be_written_is_told_and_saved(monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        output = Output()
        for word in ("one", "two"):
            output.write(word)
        assert output.fault == "No space left on device"
        monkeypatch.setattr(sys, "stdout", None)
        Output().write("closed from the beginning")


def test_what_ends_ranks_is_one_line(mqa_path, tmp_path):
    broken = tmp_path / "model"
    shutil.copytree(mqa_path, broken)
    weights = safetensors.torch.load_file(broken / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    safetensors.torch.save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    done = run("prefill", broken, "--synthetic", 9, "--cp", 2, "--session", tmp_path / "s")
    assert done.returncode == 1 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "are not finite; use another" in done.stderr
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("command", ["prefill", "chat"])
def test_ctrl_c_while_ranks_start_is_one_line(mqa_path, smollm2_path, command):
    """The server that ranks are forked from still imports then."""
    asked = [mqa_path, "--synthetic", 9] if command == "prefill" else [smollm2_path]
    with subprocess.Popen(
        [sys.executable, "-m", "cptool", command, *map(str, asked), "--cp", "2"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while process.poll() is None and not children.read_text():
            time.sleep(0.01)
        time.sleep(0.4)
        os.killpg(process.pid, signal.SIGINT)
        output = process.communicate(timeout=600)
    assert (process.returncode, *output) == (130, "", "cptool: interrupted\n")


def test_ctrl_c_while_a_dataclass_is_made_exits_130(tmp_path):
    """Imports make dataclasses, which use `exec`; there CPython would end by SIGINT instead."""
    (tmp_path / "interrupted.py").write_text("""
import cptool.cli.main as cli
def interrupted(name):
    exec("raise KeyboardInterrupt")
cli.importlib.import_module = interrupted
cli.main(["plan"])
""")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "interrupted"],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (130, "cptool: interrupted\n")
