"""A needle at several depths of texts of several lengths, with the real model: each cell says what
one rank says.
"""

from cptool.checkpoint import open_checkpoint
from cptool.distributed.launch import run
from cptool.distributed.options import RankOptions
from cptool.engine.answers.decode import decode
from cptool.engine.answers.records import AnswerOptions
from cptool.engine.engine import Engine
from cptool.engine.weights import load_model

HAY = (
    "The tide turned before noon and the boats came in one after another. Nobody spoke of the "
    "weather. "
    "A dog slept on the quay, and the nets were hung to dry along the wall. Later the bell rang "
    "twice. "
)
NEEDLE = "The name of the harbour cat is Pepper. "
QUESTION = "\nWhat is the name of the harbour cat?"
DEPTHS, REPEATS = (0.1, 0.5, 0.9), (3, 9)


def prompts(tokenizer) -> list[list[int]]:
    cells = []
    for repeats in REPEATS:
        for depth in DEPTHS:
            before = round(depth * repeats)
            text = HAY * before + NEEDLE + HAY * (repeats - before) + QUESTION
            cells.append(tokenizer.chat([{"role": "user", "content": text}]))
    return cells


def answer_all(world, path) -> list[list[int]]:
    import torch

    checkpoint = open_checkpoint(str(path))
    model = load_model(checkpoint, torch.float32, world.device, world)
    cells = prompts(checkpoint.tokenizer())
    engine = Engine(model, world, batch=len(cells))
    engine.extend(cells, reserve=10)
    return decode(engine, AnswerOptions(limit=10, stop_ids=checkpoint.eos_ids)).token_ids


def test_every_cell_of_the_grid_agrees_with_one_rank(smollm2_path):
    alone = run(answer_all, smollm2_path, ranks=RankOptions(cp=1))
    assert run(answer_all, smollm2_path, ranks=RankOptions(cp=3)) == alone
    decode = open_checkpoint(str(smollm2_path)).tokenizer().decode
    found = ["Pepper" in decode(ids) for ids in alone]
    assert sum(found) >= len(found) / 2, (
        found
    )  # a model this small misses some; the text does reach it
