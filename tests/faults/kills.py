"""Kills at random moments: of a rank, of the launching process, or of all that it started.

After each the run has ended within seconds, the session is the one before the turn or the one
after, the same command succeeds, and nothing is left behind.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

from material import command

WITHIN_S = 30
"""Seconds in which a run ends after a kill, on a busy machine."""
PHASES = ("prefill", "decode", "chat", "conversations", "compact")
VICTIMS = ("rank", "launcher", "all")
DOCUMENTS = ("the weather", "down the ships and the weather")
"""Messages that no answer follows in the session before the turn."""
QUESTIONS = ("what did the keeper write", "and the ships")


def run(model: Path, root: Path, count: int, seed: int, watch=lambda text: None) -> dict:
    """Returns the counts of outcomes, and each failure with its number, phase and victim."""
    places = root / "places"
    shutil.rmtree(places, ignore_errors=True)
    places.mkdir(parents=True)
    base = root / "base"
    shutil.rmtree(base, ignore_errors=True)
    options = ["--device", "cpu", "--threads", "1"]
    _must(["prefill", model, "--synthetic", 64, "--session", base, *options], places)
    _must(["decode", base, "-n", 4, *options], places)
    pending = root / "pending"
    shutil.rmtree(pending, ignore_errors=True)
    documents = [word for text in DOCUMENTS for word in ("--prompt", text)]
    _must(["prefill", model, "--chat", *documents, "--session", pending, *options], places)
    bases = dict.fromkeys(PHASES, base) | {"conversations": pending}
    counts, failures = Counter(), []
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        phase, victim = PHASES[number % len(PHASES)], rng.choice(VICTIMS)
        told = _one(model, bases[phase], root / "s", places, phase, victim, rng)
        counts["failed" if told else "sound"] += 1
        if told:
            failures.append({"number": number, "phase": phase, "victim": victim, "told": told})
            watch(f"    {failures[-1]}")
        if number % 10 == 9:
            watch(f"{number + 1} kills: {dict(counts)}")
    return {"kills": count, "counts": dict(counts), "failures": failures}


def _one(model, base, session, places, phase, victim, rng) -> str | None:
    """None, or what was wrong."""
    shutil.rmtree(session, ignore_errors=True)
    options = ["--device", "cpu", "--threads", 1, "--timeout", 10]
    said = None
    if phase == "prefill":
        arguments = ["prefill", model, "--synthetic", 512, "--session", session, "--cp", 2]
        arguments += options
    elif phase == "chat":
        arguments = ["chat", model, "--cp", 2, "-n", 40, *options]
        said = f"what did the keeper write\n/save {session}\nand then\n/save\n"
    else:
        shutil.copytree(base, session)
        arguments = ["decode", session, "-n", 60, "--cp", 2, *options]
        if phase == "conversations":
            arguments += [word for text in QUESTIONS for word in ("--prompt", text)]
        if phase == "compact":
            arguments = ["session", "compact", session]
    before = _state(session)
    run = subprocess.Popen(
        command(*arguments),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"TMPDIR": str(places)},
    )
    if said:
        run.stdin.write(said)
    run.stdin.close()
    run.stdin = None
    # Half of the kills while ranks start, half while they compute and save.
    time.sleep(rng.uniform(0, 3 if phase == "compact" else 12))
    struck = _strike(run, victim, rng)
    began = time.monotonic()
    try:
        _, err = run.communicate(timeout=WITHIN_S)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        run.communicate()
        return f"it ran on for {WITHIN_S} s after the kill"
    took = time.monotonic() - began
    if struck and victim == "rank" and run.returncode != 0:
        lines = [line for line in err.splitlines() if line.strip()]
        if "Traceback" in err or not lines or "rank" not in lines[-1]:
            return f"exit code {run.returncode} after {took:.1f} s: {err[-500:]!r}"
    if left := _wait_for_none(run.pid):
        return f"processes are left: {left}"
    return _sound(arguments, said, session, before, phase, places)


def _sound(arguments, said, session, before, phase, places) -> str | None:
    environment = os.environ | {"TMPDIR": str(places)}
    if (session / "manifest.json").exists():
        done = subprocess.run(
            command("session", "verify", session), capture_output=True, text=True, env=environment
        )
        if done.returncode:
            return f"session verify: {done.stderr[-300:]}"
    elif before is not None:
        return "the session is gone"
    after = _state(session)
    if phase == "conversations":  # the questions join the documents, so tokens are replaced
        if wrong := _wrong_messages(_messages(session)):
            return wrong
    elif before is not None and after[: len(before)] != before:
        return f"tokens {before} became {after}"
    if phase == "chat" and after is not None:
        arguments, said = ["chat", session, *arguments[2:]], "and then\n/save\n"
    if phase == "prefill" and after is not None:
        arguments = ["decode", session, "-n", 2, "--cp", 2]
    done = subprocess.run(
        command(*arguments),
        input=said or "",
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    if done.returncode:
        return f"the same command again: {done.returncode} {done.stderr[-300:]}"
    left = [p.name for p in places.iterdir()]
    if left:
        return f"left in the temporary directory: {left}"
    named = {s["file"] for s in json.loads((session / "manifest.json").read_text())["segments"]}
    files = {p.name for p in session.iterdir()} - named - {"manifest.json", "chat.json"}
    files = {name for name in files if not name.endswith("lock")}
    return f"left in the session: {sorted(files)}" if files else None


def _strike(run, victim: str, rng) -> bool:
    """Whether there was something to kill."""
    ranks = [pid for pid in _family(run.pid) if pid != run.pid and _is_rank(pid)]
    if victim == "rank" and not ranks:
        victim = "launcher"
    try:
        if victim == "all":
            os.killpg(run.pid, signal.SIGKILL)
        else:
            os.kill(rng.choice(ranks) if victim == "rank" else run.pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return victim == "rank"


def _family(root: int) -> list[int]:
    """Processes of the session that `root` leads."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == root and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def _is_rank(pid: int) -> bool:
    """Whether it is a process that the server of ranks forked: its parent runs the same line."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
        return b"forkserver" in line and Path(f"/proc/{fields[1]}/cmdline").read_bytes() == line
    except OSError:
        return False


def _wait_for_none(root: int) -> list[int]:
    """Processes of the run that are there WITHIN_S after its end."""
    deadline = time.monotonic() + WITHIN_S
    while (left := _family(root)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return left


def _state(session: Path) -> list | None:
    """The tokens of the session's only sequence; None without one."""
    try:
        return json.loads((session / "manifest.json").read_text())["sequences"][0]["tokens"]
    except FileNotFoundError:
        return None


def _messages(session: Path) -> list:
    """What each conversation of the session says: roles and texts."""
    done = subprocess.run(
        command("session", "show", session, "--json"), capture_output=True, text=True, check=True
    )
    told = json.loads(done.stdout)["messages"]
    return [[(m["role"], m["content"]) for m in conversation] for conversation in told or []]


def _wrong_messages(found: list) -> str | None:
    """None if all conversations are as before the turn, or all as after it."""
    before = [[("user", text)] for text in DOCUMENTS]
    joined = zip(DOCUMENTS, QUESTIONS, strict=True)
    after = [[("user", f"{document}\n\n{question}")] for document, question in joined]
    answered = all(len(said) == 2 and said[1][0] == "assistant" for said in found)
    if found == before or (answered and [said[:1] for said in found] == after):
        return None
    return f"messages became {found}"


def _must(arguments: list, places: Path) -> None:
    subprocess.run(
        command(*arguments),
        check=True,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"TMPDIR": str(places)},
    )
