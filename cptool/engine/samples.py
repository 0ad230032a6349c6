"""Several answers to each prompt, which share the KV of the prompt.

The keys and values of a prompt stay where its reading has left them, divided among the ranks, once
for all its answers; each answer has KV of its own from there on. In a step, the queries of all
answers to a prompt attend to it as if they were one sequence's, so that its keys and values are
read together, and the partial results over the prompt and over each answer are merged
(`cptool.parallel.attention.over_local`).
"""

from __future__ import annotations

from dataclasses import replace

from cptool.engine.engine import Engine
from cptool.planning.cost.exchange import GATHER_Q
from cptool.planning.strategy import Choice
from cptool.variants import find


def sampled(engine: Engine, samples: int, *, room: int) -> Engine:
    """Return what answers each prompt that `engine` has read `samples` times: itself for once."""
    return engine if samples == 1 else Samples(engine, samples, room=room)


class Samples(Engine):
    """The sequences of `prompts`, each `samples` times: sequence b * samples + s goes on from
    sequence b, as its sample s.

    `prompts` has computed all its tokens, and must not change while this engine is in use. Its
    options hold here too, except that only queries travel: of the variants that send keys, each is
    replaced by gather-q.

    room: tokens of each answer to make room for.
    """

    def __init__(self, prompts: Engine, samples: int, *, room: int = 0) -> None:
        self.prompts, self.samples = prompts, samples
        super().__init__(
            prompts.model,
            prompts.world,
            batch=samples * len(prompts.tokens),
            options=prompts.options,
            profile=prompts.profile,
            progress=prompts.report,
            ring=prompts.ring,
        )
        self.trace = prompts.trace
        self.cache.begin_with(prompts.cache)
        share = -(-room // self.world.cp) + 1
        self.cache.reserve([share] * self.cache.batch)
        origins = [b for b in range(len(prompts.tokens)) for _ in range(samples)]
        self.tokens = [list(prompts.tokens[b]) for b in origins]
        self.computed = [prompts.computed[b] for b in origins]
        self.ended = [prompts.ended[b] for b in origins]
        self.logits = {n: prompts.logits[b] for n, b in enumerate(origins) if b in prompts.logits}

    @property
    def held_tokens(self) -> int:
        return self.prompts.held_tokens + super().held_tokens

    def _chosen(self, variant: str | Choice, lengths: list[int]) -> Choice:
        choice = super()._chosen(variant, lengths)
        if self.world.cp == 1 or not find(choice.variant).keys_travel:
            return choice
        reason = f"in place of {choice.variant}: the keys that samples share stay where they are"
        return replace(super()._chosen(GATHER_Q.name, lengths), reason=reason)
