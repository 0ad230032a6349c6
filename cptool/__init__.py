"""Exact long-context inference of Llama-family models, split over ranks by context.

`LLM` loads a model and generates, `Session` keeps sequences on disk; `attention_partial` and
`merge_partials` are the attention kernels alone, and `silu_attention_partial` that of HSTU;
`ring_attention` and `hstu_attention` are attention over the ranks of a process group, for models of
one's own. Importing this package imports no torch; each name
is loaded at its first use.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cptool.engine.answers.records import TokenLogprob
    from cptool.functional import hstu_attention, ring_attention, shard, shard_positions, unshard
    from cptool.llm.answers import Generation, Piece, Stream
    from cptool.llm.llm import LLM
    from cptool.llm.options import GenerateOptions
    from cptool.llm.session import Session
    from cptool.ops.attention import attention_partial, merge_partials
    from cptool.ops.silu_attention import silu_attention_partial

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "GenerateOptions",
    "Generation",
    "Piece",
    "Session",
    "Stream",
    "TokenLogprob",
    "attention_partial",
    "hstu_attention",
    "merge_partials",
    "ring_attention",
    "shard",
    "shard_positions",
    "silu_attention_partial",
    "unshard",
]

_HOMES = {
    "LLM": "cptool.llm.llm",
    "GenerateOptions": "cptool.llm.options",
    "Generation": "cptool.llm.answers",
    "Piece": "cptool.llm.answers",
    "Session": "cptool.llm.session",
    "Stream": "cptool.llm.answers",
    "TokenLogprob": "cptool.engine.answers.records",
    "attention_partial": "cptool.ops.attention",
    "hstu_attention": "cptool.functional",
    "merge_partials": "cptool.ops.attention",
    "ring_attention": "cptool.functional",
    "shard": "cptool.functional",
    "shard_positions": "cptool.functional",
    "silu_attention_partial": "cptool.ops.silu_attention",
    "unshard": "cptool.functional",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
