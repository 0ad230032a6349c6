"""Commands on damaged files: each is refused in one line, or answers as before or harmlessly.

Every command runs in a fork of this process, with bounds on its memory and time.
"""

import contextlib
import io
import json
import os
import random
import resource
import select
import shutil
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mutations
from material import (
    SAID,
    make_conversations,
    make_gguf,
    make_huggingface,
    make_meta,
    make_session,
)

MEMORY = 3 << 30
"""Bytes of addresses beyond those of the process that is forked."""
SECONDS = 20
"""Seconds of processor time, and three times as many by the clock."""
BUG = "please report"


@dataclass(frozen=True, kw_only=True)
class Format:
    """`file` is damaged inside `folder`; `command` is given the copy of the folder.

    exact: the answer must then be the one of the whole files, for all of them are sealed.
    """

    folder: str
    file: str
    command: Callable[[Path], list]
    mutate: Callable = mutations.of_format(None)
    exact: bool = False


def _prefill(*prompt) -> Callable[[Path], list]:
    rest = ("--threads", 1, "--device", "cpu", "--json")
    return lambda folder: ["prefill", folder, *prompt, *rest]


def _decode(folder: Path) -> list:
    return ["decode", folder, "-n", 3, "--threads", 1, "--device", "cpu", "--json"]


def _verify(folder: Path) -> list:
    return ["session", "verify", folder]


_chat = _prefill("--prompt", SAID, "--chat")
_text = _prefill("--prompt", SAID)
_json = mutations.of_format(mutations.edit_json)
FORMATS = {
    "safetensors": Format(
        folder="hf",
        file="model.safetensors",
        command=_chat,
        mutate=mutations.of_format(mutations.edit_safetensors),
    ),
    "config.json": Format(folder="hf", file="config.json", command=_chat, mutate=_json),
    "generation_config.json": Format(
        folder="hf", file="generation_config.json", command=_chat, mutate=_json
    ),
    "tokenizer.json": Format(folder="hf", file="tokenizer.json", command=_chat, mutate=_json),
    "tokenizer_config.json": Format(
        folder="hf", file="tokenizer_config.json", command=_chat, mutate=_json
    ),
    "pth": Format(
        folder="meta",
        file="consolidated.00.pth",
        command=_text,
        mutate=mutations.of_format(mutations.edit_zip),
    ),
    "params.json": Format(folder="meta", file="params.json", command=_text, mutate=_json),
    "tokenizer.model": Format(folder="meta", file="tokenizer.model", command=_text),
    "gguf": Format(
        folder="gguf",
        file="m.gguf",
        command=lambda folder: _prefill("--prompt", "the cab")(folder / "m.gguf"),
    ),
    "manifest.json": Format(
        folder="session", file="manifest.json", command=_decode, mutate=_json, exact=True
    ),
    "segment": Format(
        folder="session",
        file="segment-*",
        command=_decode,
        mutate=mutations.of_format(mutations.edit_safetensors),
        exact=True,
    ),
    "chat.json": Format(
        folder="session",
        file="chat.json",
        mutate=_json,
        exact=True,
        command=_verify,
    ),
    "chat.json of a batch": Format(
        folder="batch", file="chat.json", mutate=_json, exact=True, command=_verify
    ),
    "chat.json without answers": Format(
        folder="pending", file="chat.json", mutate=_json, exact=True, command=_verify
    ),
    "manifest.json of a batch": Format(
        folder="batch", file="manifest.json", mutate=_json, exact=True, command=_verify
    ),
}


def make(root: Path) -> None:
    make_huggingface(root / "hf")
    make_meta(root / "meta")
    make_gguf(root / "gguf" / "m.gguf")
    make_session(root / "hf", root / "session")
    make_conversations(root / "hf", root / "batch", answered=True)
    make_conversations(root / "hf", root / "pending", answered=False)


def run(root: Path, names: list[str], count: int, seed: int, watch=lambda text: None) -> dict:
    """Damages `count` files of each format in `names`; `root` holds what `make` made.

    Returns the counts of outcomes by format, and up to 20 examples of faults and failures. No
    faults are "refused", "answered" (where nothing seals the file, perhaps otherwise than before)
    and "failed" (one line, but as a failure while running). Faults are "traceback", "crash",
    "hang", "many lines" and, for sealed files, "silent difference".
    """
    _warm_up()
    results = {}
    for name in names:
        kind = FORMATS[name]
        began, counts = time.perf_counter(), Counter()
        faults, failed = [], []
        whole = _outcome(root / kind.folder, kind, None, b"")
        if whole[0] != "answered":
            raise RuntimeError(f"{name}: the whole files are {whole}")
        victim = next((root / kind.folder).glob(kind.file))
        data = victim.read_bytes()
        for i in range(count):
            rng = random.Random(f"{seed} {name} {i}")
            damaged = kind.mutate(data, rng)
            if damaged == data:
                continue
            outcome, said = _outcome(root / kind.folder, kind, victim.name, damaged)
            if outcome == "answered" and kind.exact and said != whole[1]:
                outcome = "silent difference"
            counts[outcome] += 1
            told = {"number": i, "outcome": outcome, "said": said[-600:]}
            if outcome == "failed":
                failed.append(told)
            elif outcome not in ("refused", "answered"):
                faults.append(told)
        results[name] = {"counts": dict(counts), "faults": faults[:20], "failed": failed[:20]}
        watch(f"{name}: {dict(counts)} in {time.perf_counter() - began:.0f} s")
        for fault in faults[:3]:
            watch(f"    {fault}")
    return results


def _warm_up() -> None:
    """Imports what commands import, so that a fork has it; runs nothing, so that no thread waits
    in the process that is forked.
    """
    import torch

    torch.set_num_threads(1)
    import cptool.cli.chat
    import cptool.cli.decode
    import cptool.cli.launch
    import cptool.cli.prefill
    import cptool.cli.session
    import cptool.engine.engine
    import cptool.engine.rank_server
    import cptool.engine.turn  # noqa: F401


def _outcome(folder: Path, kind: Format, name: str | None, data: bytes) -> tuple[str, str]:
    """What the command makes of a copy of the folder whose file `name` holds `data`."""
    copy = folder.with_name("damaged")
    shutil.rmtree(copy, ignore_errors=True)
    if kind.exact:  # the command may write to it
        shutil.copytree(folder, copy)
    else:
        copy.mkdir()
        for file in folder.iterdir():
            os.link(file, copy / file.name)
    if name is not None:
        (copy / name).unlink()
        (copy / name).write_bytes(data)
    return _in_a_fork([str(a) for a in kind.command(copy)], copy)


def _in_a_fork(arguments: list[str], copy: Path) -> tuple[str, str]:
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(ours)
        _child(arguments, theirs)
    os.close(theirs)
    deadline, said = time.monotonic() + 3 * SECONDS, b""
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([ours], [], [], left)[0]:
            os.kill(pid, signal.SIGKILL)
            break
        part = os.read(ours, 1 << 16)
        if not part:
            break
        said += part
    os.close(ours)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        hung = number in (signal.SIGKILL, signal.SIGXCPU)
        return ("hang" if hung else "crash"), f"signal {number}"
    if not said:
        return "crash", f"exit code {os.waitstatus_to_exitcode(status)}"
    outcome, text = json.loads(said)
    return outcome, text.replace(str(copy), "DIR")


def _child(arguments: list[str], pipe: int) -> None:
    os.dup2(os.open(os.devnull, os.O_RDWR), 2)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        result = _run(arguments)
    except BaseException:
        result = "traceback", traceback.format_exc()
    with os.fdopen(pipe, "w") as writer:
        writer.write(json.dumps(result))
    os._exit(0)


def _run(arguments: list[str]) -> tuple[str, str]:
    from cptool.cli.main import main

    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as stop:
            code = stop.code or 0
    lines = err.getvalue().splitlines()
    text = "\n".join(lines[-3:])
    if "Traceback" in err.getvalue() or BUG in text:
        return "traceback", text
    if code == 0:
        return "answered", _answer(arguments, out.getvalue())
    if len(lines) > 1 and arguments[0] != "session":
        # A note on an accepted model may come before the refusal of something else.
        known = ("cptool: ", "fields that cptool ", "sampling fields that cptool ")
        if any(not line.startswith(known) for line in lines[:-1]):
            return "many lines", text
    if not lines or code not in (1, 2):
        return "traceback", f"exit code {code}: {text}"
    return ("refused" if code == 2 or arguments[0] == "session" else "failed"), text


def _answer(arguments: list[str], said: str) -> str:
    """The tokens of an answer; of a conversation that was verified, what it says."""
    if arguments[0] == "session":
        return json.dumps(json.loads((Path(arguments[2]) / "chat.json").read_text()))
    found = json.loads(said)
    return json.dumps(found.get("token_ids", found.get("first_token")))
