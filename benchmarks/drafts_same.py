"""Whether answers are the same, token for token, with drafts that are looked up, with drafts by the
first layers, and with none.

    python benchmarks/drafts_same.py --json results.json

100 prompts for SmolLM2-135M-Instruct: parts of the lighthouse logbook that are to be continued or
repeated, and random tokens; every fourth is answered at temperature 0.8. Each is read once per type
and number of ranks, and answered in three ways. Drafts are computed wherever there is room for
them, whether they pay or not, so that many are checked, true ones and false ones. Beside tokens,
log-probabilities are compared to the last bit.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

import checkout
import torch

from cptool.bench.timing import circumstances
from cptool.checkpoint import open_checkpoint
from cptool.distributed.launch import run
from cptool.distributed.options import RankOptions
from cptool.engine.answers.decode import decode
from cptool.engine.answers.records import AnswerOptions
from cptool.engine.drafts import drafter
from cptool.engine.drafts.pace import Budget
from cptool.engine.engine import Engine
from cptool.engine.options import EngineOptions
from cptool.engine.sampling import Sampling
from cptool.engine.weights import load_model

LOG = Path(checkout.__file__).resolve().parents[1] / "cptool" / "data" / "lighthouse.txt"
MODEL = "smollm2-135m-instruct"
TYPES = {
    "float32": ("float32", None),
    "bfloat16": ("bfloat16", None),
    "q8_0": ("float32", "q8_0"),
    "q4_1": ("float32", None),
}
"""Dtype to compute in, and what weights are quantised to; "q4_1" are those of the file."""

MOST_DRAFTS = 3


class Eager(Budget):
    """Takes drafts whether they pay or not, a few in each step."""

    def __init__(self, rows, times, *, room) -> None:
        super().__init__(rows, times, room=min(room, MOST_DRAFTS))

    def pays(self, chance: float) -> bool:
        return self._room > 0


def prompts(tokenizer, count: int) -> list[tuple[list[int], float]]:
    """Return the tokens and the temperature of each prompt."""
    drawn = random.Random(0)
    log = LOG.read_text()
    found = []
    for n in range(count):
        if n % 5 < 3:
            start = drawn.randrange(len(log) - 2500)
            said = log[start : start + drawn.randrange(150, 700)]
            if n % 5:
                said += "\n\nAgain, word for word:\n\n" + " ".join(said.split()[3:9])
            tokens = tokenizer.encode(said)
        else:
            tokens = [drawn.randrange(17, 49000) for _ in range(drawn.randrange(1, 100))]
        found.append((tokens, 0.8 if n % 4 == 3 else 0.0))
    return found


def answers(world, options, model_path: str, kind: str) -> list[dict]:
    """Return what became of each prompt on this rank."""
    torch.set_num_threads(1)
    drafter.Budget = Eager
    name, weights = TYPES[kind]
    tokenizer = open_checkpoint(MODEL).tokenizer()
    checkpoint = open_checkpoint(model_path)
    model = load_model(checkpoint, getattr(torch, name), world.device, None, weights=weights)
    rows = []
    for tokens, temperature in prompts(tokenizer, options.prompts):
        engine = Engine(model, world, options=EngineOptions(weights=weights))
        engine.extend([tokens], reserve=options.tokens)
        here, found = engine.mark(), {}
        for draft in ("off", "lookup", f"layers:{options.layers}"):
            engine.rewind(here)
            engine.extend([[]])
            asked = AnswerOptions(
                limit=options.tokens,
                draft=draft,
                logprobs=1,
                sampling=Sampling(temperature=temperature),
                stop_ids=tuple(checkpoint.eos_ids),
            )
            found[draft] = decode(engine, asked)
        plain = found.pop("off")
        rows.append(
            {
                draft: {
                    "tokens": answer.token_ids == plain.token_ids,
                    "logprobs": answer.logprobs == plain.logprobs,
                    **answer.drafts.fields(),
                }
                for draft, answer in found.items()
            }
        )
    return rows


def counts(rows: list[dict]) -> dict[str, dict[str, int]]:
    """Return, for each source of drafts, in how many prompts all was the same."""
    return {
        draft: {
            "prompts": len(rows),
            "same_tokens": sum(row[draft]["tokens"] for row in rows),
            "same_logprobs": sum(row[draft]["logprobs"] for row in rows),
            "drafted": sum(row[draft]["drafted_tokens"] for row in rows),
            "accepted": sum(row[draft]["accepted_tokens"] for row in rows),
            "undrafted_prompts": sum(row[draft]["draft_off"] is not None for row in rows),
        }
        for draft in rows[0]
    }


def write_floats(directory: str) -> str:
    """Write SmolLM2 with float32 weights, as transformers reads them from its file."""
    from transformers import AutoModelForCausalLM

    path = open_checkpoint(MODEL).path
    read = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    if hasattr(read.config, "quantization_config"):
        del read.config.quantization_config  # the weights are floats by now
    model = type(read)(read.config)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(directory)
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", nargs="+", default=list(TYPES), choices=list(TYPES))
    parser.add_argument("--cp", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=8, help="of an answer at most")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--json", help="file for the results")
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as directory:
        floats = write_floats(directory)
        for kind in options.types:
            model = str(open_checkpoint(MODEL).path) if kind == "q4_1" else floats
            for n in options.cp:
                began = time.time()
                ranks = RankOptions(cp=n, device="cpu", threads=1)
                found = counts(run(answers, options, model, kind, ranks=ranks))
                results.append({"type": kind, "cp": n, "s": time.time() - began, **found})
                print(json.dumps(results[-1]), flush=True)
                if options.json:
                    facts = {"options": vars(options), **circumstances(), "results": results}
                    Path(options.json).write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
