"""The commands as users type them: tokens against `transformers`, mistakes in one line, the death
of a rank.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
from click.testing import CliRunner
from conftest import greedy

from cptool import units
from cptool.checkpoint import open_checkpoint
from cptool.cli import draw
from cptool.cli.launch import Output
from cptool.cli.main import main
from cptool.distributed import devices, launch
from cptool.engine import world_profile
from cptool.planning.profiles import default_profile
from cptool.session import store

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


@pytest.mark.parametrize("variant", ["pass-kv", "gather-kv"])
@pytest.mark.parametrize("cp", [1, 2, 3, 4])
@pytest.mark.parametrize("model", ["mqa", "smollm2"])
def test_tokens_are_those_of_transformers(request, token_file, tmp_path, model, cp, variant):
    path = request.getfixturevalue(f"{model}_path")
    ids, eos = (MQA_IDS, (300,)) if model == "mqa" else (STORY, (2,))
    expected = greedy(request.getfixturevalue(f"{model}_reference"), ids, 32, eos)
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
    steps = [
        [
            "prefill",
            mqa_path,
            "--token-ids",
            token_file(MQA_IDS),
            "--session",
            tmp_path / "s",
            "--json",
        ],
        ["decode", tmp_path / "s", "-n", 8, "--json"],
    ]
    outputs = []
    for step in steps:
        done = subprocess.run(
            [*torchrun, *map(str, step)], capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr
        outputs.append(json.loads(done.stdout))  # one object, from one rank
    assert outputs[0]["cp"] == outputs[1]["cp"] == 2
    assert outputs[1]["token_ids"] == [greedy(mqa_reference, MQA_IDS, 8, (300,))]


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


def test_rows_are_lines_where_no_terminal_is(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    draw.table([("one", "a" * 200), ("longer", "b")])
    assert capsys.readouterr().out == f"one     {'a' * 200}\nlonger  b\n"
    assert [units.size(n) for n in (999, 1e12, 1.5e18)] == ["999 B", "1 TB", "1,500,000 TB"]


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
    """As one of an import is: under `python -m`, CPython would end by SIGINT, not by the code."""
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


@pytest.mark.parametrize("group", [[], ["session"]])
def test_a_group_alone_shows_its_commands(group):
    result = cptool(*group, code=2)
    assert len(result.output.splitlines()) > 5


MISTAKES = {
    "no prompt": (["{mqa}"], "no prompt"),
    "missing model": (["/nowhere/model", "--synthetic", "4"], "/nowhere/model"),
    "missing prompt file": (
        ["{mqa}", "--prompt-file", "/nowhere.txt"],
        "/nowhere.txt cannot be read",
    ),
    "missing ids": (["{mqa}", "--token-ids", "/nowhere.json"], "/nowhere.json cannot be read"),
    "no tokenizer": (["{mqa}", "--prompt", "hello"], "has no tokenizer"),
    "empty prompt": (["{smollm2}", "--prompt", ""], "the prompt is empty"),
    "not UTF-8": (["{smollm2}", "--prompt", "\udcff"], "--prompt 1: it is not UTF-8 text"),
    "no model": (["", "--synthetic", "4"], "no such model"),
    "nothing to rewind": (["{mqa}", "--synthetic", "4", "--rewind"], "add --session DIR"),
    "deep JSON": (["{mqa}", "--token-ids", "{raw:" + "[" * 100_000 + "}"], "is not JSON"),
    "empty ids": (["{mqa}", "--token-ids", "{ids:[]}"], "the prompt is empty"),
    "an empty sequence": (
        ["{mqa}", "--token-ids", "{ids:[[1], []]}"],
        "sequence 2: the prompt is empty",
    ),
    "not ids": (["{mqa}", "--token-ids", '{ids:"word"}'], "must be a list of integers"),
    "a float": (["{mqa}", "--token-ids", "{ids:[1.5]}"], "must be a list of integers"),
    "not JSON": (["{mqa}", "--token-ids", "{raw:[1, 2}"], "is not JSON"),
    "a foreign id": (
        ["{mqa}", "--token-ids", "{ids:[301]}"],
        "token id 301 is not in the model's vocabulary, 0 to 300",
    ),
    "a negative id": (["{mqa}", "--token-ids", "{ids:[-1]}"], "token id -1"),
    "too long": (
        ["{mqa}", "--synthetic", "2049"],
        "has 2049 tokens (2049 new), the model's context is 2048",
    ),
    "unknown variant": (
        ["{mqa}", "--synthetic", "4", "--variant", "pass-x"],
        "'pass-x' is not one of",
    ),
    "no ranks": (["{mqa}", "--synthetic", "4", "--cp", "0"], "0 is not in the range"),
    "more ranks than start": (
        ["{mqa}", "--synthetic", "4", "--cp", "1000"],
        "make 1000 ranks, one command starts at most 128",
    ),
    "more threads than start": (
        ["{mqa}", "--synthetic", "4", "--threads", "100000"],
        "--threads 100000: it must be 1 to 1024",
    ),
    "no time": (["{mqa}", "--synthetic", "4", "--timeout", "nan"], "--timeout nan"),
    "a time without end": (["{mqa}", "--synthetic", "4", "--timeout", "inf"], "--timeout inf"),
    "no such option": (["{mqa}", "--synthetic", "4", "--frob"], "--frob"),
    "no GPU": (["{mqa}", "--synthetic", "4", "--device", "cuda"], "--device cuda"),
    "truncated weights": (["{truncated}", "--synthetic", "4"], "model.safetensors"),
    "another architecture": (["{gpt2}", "--synthetic", "4"], "gpt2"),
    "far too long": (["{mqa}", "--synthetic", str(10**12)], "the model's context is 2048"),
    "session under a file": (
        ["{mqa}", "--synthetic", "4", "--session", "{truncated}/config.json/s"],
        "config.json is a file, so no turn can be saved",
    ),
    "session in the way": (
        ["{mqa}", "--synthetic", "4", "--session", "{truncated}"],
        "is not empty",
    ),
}


@pytest.fixture(scope="module")
def broken(mqa_path, tmp_path_factory):
    """Checkpoints that must be refused."""
    import shutil

    import gguf

    truncated = tmp_path_factory.mktemp("broken") / "truncated"
    shutil.copytree(mqa_path, truncated)
    weights = truncated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    other = truncated.parent / "other.gguf"
    writer = gguf.GGUFWriter(other, "gpt2")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {"{truncated}": str(truncated), "{gpt2}": str(other)}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_code_2(
    name, mqa_path, smollm2_path, broken, tmp_path, monkeypatch
):
    if name == "no GPU":
        monkeypatch.setattr(devices, "_gpus", lambda: 0)
    # Every mistake here can be known before a rank is started.
    monkeypatch.setattr(launch, "run", lambda *a, **k: pytest.fail("a rank was started"))
    given, expected = MISTAKES[name]
    places = {"{mqa}": str(mqa_path), "{smollm2}": str(smollm2_path), **broken}
    arguments = []
    for word in given:
        if word.startswith(("{ids:", "{raw:")):
            file = tmp_path / "given.json"
            file.write_text(word[5:-1])
            word = str(file)
        for placeholder, place in places.items():
            word = word.replace(placeholder, place)
        arguments.append(word)
    result = cptool("prefill", *arguments, code=2)
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert expected in result.stderr


def test_a_prompt_file_is_taken_as_it_stands(smollm2_path, tmp_path):
    """Line ends stay, a byte order mark is no text."""
    text, tokens = tmp_path / "text", {}
    dos, marked = b"a\r\nb\r\n", b"\xef\xbb\xbfa\nb\n"
    for name, content in [("unix", b"a\nb\n"), ("dos", dos), ("marked", marked)]:
        text.write_bytes(content)
        where = ("--session", tmp_path / name)
        given = as_json("prefill", smollm2_path, "--prompt-file", text, *where)
        tokens[name] = store.load(tmp_path / name).sequences[0].tokens
        assert given["tokens"] == len(tokens[name])
    checkpoint = open_checkpoint(str(smollm2_path))
    assert checkpoint.tokenizer().decode(list(tokens["dos"])) == "a\r\nb\r\n"
    assert tokens["marked"] == tokens["unix"] != tokens["dos"]


def test_a_full_disk_is_told_before_the_work(mqa_path, token_file, tmp_path, monkeypatch):
    given = ("prefill", mqa_path, "--token-ids", token_file(MQA_IDS), "--session", tmp_path / "s")
    as_json(*given)
    monkeypatch.setattr(launch, "run", lambda *a, **k: pytest.fail("a rank was started"))
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=100_000))
    kept = {p.name: p.read_bytes() for p in (tmp_path / "s").iterdir()}
    error = cptool("decode", tmp_path / "s", "-n", 100, code=2).stderr
    assert "has 100 KB free, the KV of 100 tokens needs 155 KB; make room" in error
    error = cptool(*given[:-1], tmp_path / "other", code=2).stderr
    assert "the KV of 83 tokens needs 129 KB" in error and not (tmp_path / "other").exists()
    assert kept == {p.name: p.read_bytes() for p in (tmp_path / "s").iterdir()}


@pytest.mark.parametrize("group", [[], ["session"], ["bench"]])
def test_lists_of_commands_are_not_cut_short(group):
    assert "..." not in cptool(*group, "--help").stdout.partition("Commands:")[2]


def test_defaults_of_ranks_are_those_of_the_command():
    said = {name: " ".join(cptool(name, "--help").stdout.split()) for name in ("demo", "decode")}
    assert "Context-parallel ranks. [default: 2]" in said["demo"]
    assert "Context-parallel ranks. [default: the session's last, or what" in said["decode"]


def test_decode_mistakes(mqa_path, smollm2_path, token_file, tmp_path):
    store = tmp_path / "s"
    as_json("prefill", mqa_path, "--token-ids", token_file(MQA_IDS), "--session", store)
    before = {p.name: p.read_bytes() for p in store.iterdir()}
    for arguments, expected in [
        ([tmp_path / "none"], "holds no session"),
        ([mqa_path / "config.json"], "holds no session"),
        ([store, "--model", smollm2_path], "is not the model of this session"),
        ([store, "-n", 2048], "the model's context is 2048"),
        (
            [store, "--token-ids", token_file([[1], [2]])],
            "2 prompts for a session of 1 sequence;",
        ),
        ([store, "--temperature", -1], "--temperature -1.0"),
    ]:
        result = cptool("decode", *arguments, code=2)
        assert len(result.stderr.splitlines()) == 1
        assert expected in result.stderr
    assert {p.name: p.read_bytes() for p in store.iterdir()} == before


def test_a_note_about_a_model_that_is_refused_is_not_shown(mqa_path, tmp_path):
    for file in mqa_path.iterdir():
        shutil.copy(file, tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, "mood": "good"}))
    (tmp_path / "tokenizer.json").write_text("{")
    refused = cptool("prefill", tmp_path, "--prompt", "a", code=2).stderr
    assert refused.count("\n") == 1 and "tokenizer.json: not a tokenizer" in refused
    (tmp_path / "tokenizer.json").unlink()
    noted = cptool("prefill", tmp_path, "--synthetic", 3).stderr
    assert "fields that cptool does not know were ignored: mood" in noted


def test_help_and_mistakes_do_not_wait_for_torch():
    script = (
        "import sys\nfrom cptool.cli.main import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules\n"
    )
    for arguments in (
        ["--help"],
        ["prefill", "--help"],
        ["prefill", "/nowhere", "--synthetic", "3"],
    ):
        subprocess.run([sys.executable, "-c", script, *arguments], check=True, capture_output=True)


def test_doctor_tells_a_wrong_kernel(monkeypatch):
    from cptool.exactness import selftest

    assert "ok" in cptool("doctor").stdout
    good = list(selftest.run())
    bad = selftest.Check("attention avx512, float32, D 64", error=0.1, allowed=1e-6)
    monkeypatch.setattr(selftest, "run", lambda device: iter([*good, bad]))
    result = cptool("doctor", code=1)
    assert "WRONG" in result.stdout and "1 of" in result.stderr


def test_demo_answers_from_the_document(smollm2_path):
    done = run("demo")
    assert done.returncode == 0, done.stderr
    assert "check: tokens of 2 ranks = tokens of 1 rank" in done.stdout
