"""Options of how an engine computes, set by a command or a caller. Imports no torch."""

from dataclasses import dataclass

SAVE_EVERY_S = 60.0
"""Seconds between two commits of what was computed of a prompt."""


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Options of `cptool.engine.engine.Engine`.

    variant: attention variant, or "auto" to choose one for each forward.
    partials: "float32", or "working" to send partial outputs in the model's dtype
        (`cptool.parallel.step.Step` says what that costs in error).
    weights: "file" to keep weights in the type of the file where products read it, or what
        `cptool.quantisation.quantised_to` takes, to which float matrices are quantised while
        loading; None for "file", or what the session was computed with.
    kv_dtype: type in which keys and values are stored and travel, or "auto" for the model's dtype.
    static: whether `decode` under the variant "auto" runs over static memory
        (`cptool.engine.static_decode`); None means on CUDA only.
    kv_memory: bytes of KV per rank that stay in memory; the rest lies in a file in the temporary
        directory and is read ahead of its use (`cptool.host.file_memory`). None for all of it.
    chunk: the most new tokens, over all sequences together, that go through the model at a time
        while prompts are read (`cptool.engine.prefill.chunks`); None leaves it to cptool.
    memory: bytes that a rank may take in all, so far as the choice of a chunk decides it; None for
        its part of what the machine or its control group has left, or the device.
    """

    variant: str = "auto"
    partials: str = "float32"
    static: bool | None = None
    kv_dtype: str = "auto"
    weights: str | None = None
    kv_memory: int | None = None
    chunk: int | None = None
    memory: int | None = None
