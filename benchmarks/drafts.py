"""Tokens a second with drafts against none, where an answer quotes its document and where nothing
repeats.

    python benchmarks/drafts.py --json results.json

Prompts are of three kinds, for SmolLM2-135M-Instruct. "quote": a part of the lighthouse logbook or
of the LICENSE, then "again, word for word", and the first words of one of its paragraphs, which
goes on. "question": a chat about the logbook, whose answers take some words of it. "new": a chat
without a document, answered at temperature 1. Each prompt is read once, and answered with and
without drafts in turns; tokens must be the same. Times are those of the processor on one thread, so
that other programs count little.
"""

from __future__ import annotations

import argparse
import json
import statistics
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
from cptool.engine.engine import Engine
from cptool.engine.options import EngineOptions
from cptool.engine.sampling import Sampling
from cptool.engine.weights import load_model

ROOT = Path(checkout.__file__).resolve().parents[1]
QUESTIONS = [
    "When was the lamp built? Quote the sentence of the log that says so.",
    "Quote what the log says of Tom Ferris on September 1.",
    "What is the cat's name?",
    "What drives the lens, and how often must it be wound?",
]
NEW = [
    "Write a short story about a dragon who learns to cook.",
    "Explain how a bicycle stays upright.",
    "Describe a market in a town by the sea at dawn.",
    "Give advice to somebody who begins to run.",
]


def prompts(tokenizer) -> list[tuple[str, list[int], float]]:
    """Return the kind, the tokens and the temperature of each prompt."""
    log = (ROOT / "cptool" / "data" / "lighthouse.txt").read_text()
    found = []
    for text in (log[:6000], (ROOT / "LICENSE").read_text()[:6000]):
        paragraphs = [p for p in text.split("\n\n") if len(p) > 300]
        for paragraph in paragraphs[1:5]:
            start = " ".join(paragraph.split()[:10])
            said = f"{text}\n\nAgain, word for word:\n\n{start}"
            found.append(("quote", tokenizer.encode(said), 0.0))
    for kind, asked, temperature in (("question", QUESTIONS, 0.0), ("new", NEW, 1.0)):
        for question in asked:
            content = f"{log[:6000]}\n\n{question}" if kind == "question" else question
            message = {"role": "user", "content": content}
            found.append((kind, tokenizer.chat([message]), temperature))
    return found


def measure(world, options: argparse.Namespace) -> list[dict]:
    torch.set_num_threads(1)
    checkpoint = open_checkpoint(options.model)
    dtype, weights = getattr(torch, options.dtype), options.weights
    model = load_model(checkpoint, dtype, world.device, None, weights=weights)
    rows = []
    for kind, tokens, temperature in prompts(checkpoint.tokenizer()):
        engine = Engine(model, world, options=EngineOptions(weights=weights))
        engine.extend([tokens], reserve=options.tokens)
        here, rates, answers = engine.mark(), {"off": [], options.draft: []}, {}
        for _ in range(options.repeats):
            for draft in rates:
                engine.rewind(here)
                engine.extend([[]])
                asked = AnswerOptions(
                    limit=options.tokens,
                    draft=draft,
                    sampling=Sampling(temperature=temperature),
                    stop_ids=checkpoint.answer_ends(tokens) if kind != "quote" else (),
                )
                began = time.process_time()
                answers[draft] = decode(engine, asked)
                spent = time.process_time() - began
                rates[draft].append((len(answers[draft].token_ids[0]) - 1) / spent)
        assert answers[options.draft].token_ids == answers["off"].token_ids
        drafts = answers[options.draft].drafts
        best = {draft: max(values) for draft, values in rates.items()}
        rows.append(
            {
                "kind": kind,
                "prompt_tokens": len(tokens),
                "answer_tokens": len(answers["off"].token_ids[0]),
                "tokens_per_s": best,
                "faster": best[options.draft] / best["off"],
                **drafts.fields(),
                "tokens_per_step": drafts.tokens_per_step(answers["off"].token_ids),
            }
        )
        shown = {name: round(rate, 1) for name, rate in best.items()}
        print(
            f"{kind:9} {len(tokens):5} tokens, {rows[-1]['answer_tokens']:4} answered, {shown}, "
            f"{rows[-1]['faster']:.2f} times, {rows[-1]['tokens_per_step']} per step",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--draft", default="lookup", help="where drafts come from, but no model")
    parser.add_argument("--weights", help="quantise weights to this")
    parser.add_argument("--tokens", type=int, default=96, help="of an answer at most")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", help="file for the results")
    options = parser.parse_args()
    rows = run(measure, options, ranks=RankOptions(device="cpu", threads=1))
    median = {
        kind: statistics.median(row["faster"] for row in rows if row["kind"] == kind)
        for kind in dict.fromkeys(row["kind"] for row in rows)
    }
    print({kind: round(value, 3) for kind, value in median.items()})
    if options.json:
        facts = {"options": vars(options), **circumstances(), "median_faster": median, "rows": rows}
        Path(options.json).write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
