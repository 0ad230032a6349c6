"""Mistakes of the user: one line each, exit code 2, before any rank is started."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from test_cli import MQA_IDS, as_json, cptool

from cptool.checkpoint import open_checkpoint
from cptool.distributed import devices, launch
from cptool.session import store


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
    assert "has 100 kB free, the KV of 100 tokens needs 155 kB; make room" in error
    error = cptool(*given[:-1], tmp_path / "other", code=2).stderr
    assert "the KV of 83 tokens needs 129 kB" in error and not (tmp_path / "other").exists()
    assert kept == {p.name: p.read_bytes() for p in (tmp_path / "s").iterdir()}


@pytest.mark.parametrize("group", [[], ["session"], ["bench"]])
def test_lists_of_commands_are_not_cut_short(group):
    assert "..." not in cptool(*group, "--help").stdout.partition("Commands:")[2]


def test_defaults_of_ranks_are_those_of_the_command():
    said = {name: " ".join(cptool(name, "--help").stdout.split()) for name in ("demo", "decode")}
    assert "KV are divided. [default: 2]" in said["demo"]
    assert "KV are divided. [default: the session's last, or what" in said["decode"]


def test_decode_mistakes(mqa_path, smollm2_path, token_file, tmp_path):
    store = tmp_path / "s"
    as_json("prefill", mqa_path, "--token-ids", token_file(MQA_IDS), "--session", store)
    before = {p.name: p.read_bytes() for p in store.iterdir()}
    for arguments, expected in [
        ([tmp_path / "none"], "holds no session"),
        ([mqa_path / "config.json"], "holds no session"),
        ([store, "--model", smollm2_path], "is not the model of this session"),
        ([store, "--synthetic", 2000], "the model's context is 2048"),
        ([store, "--json", "--jsonl"], "--json and --jsonl exclude each other"),
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
