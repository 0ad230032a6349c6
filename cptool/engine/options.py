"""How an engine computes, as a command or a caller asks for it. Imports no torch."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Options of `cptool.engine.engine.Engine`.

    variant: attention variant, or "auto" to choose one for each forward.
    partials: "float32", or "working" to send partial outputs in the model's dtype
        (`cptool.parallel.step.Step` says what that costs in error).
    static: whether `decode` under the variant "auto" runs over static memory
        (`cptool.engine.static_decode`); None means on CUDA only.
    """

    variant: str = "auto"
    partials: str = "float32"
    static: bool | None = None
