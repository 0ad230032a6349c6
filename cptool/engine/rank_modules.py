"""What ranks import to run a model, which the process that they are forked from does for all."""

import pkgutil
import sys

from cptool.model import architectures

_ALWAYS = (
    "cptool.engine.samples",  # with it the engine
    "cptool.engine.answers.decode",
    "cptool.engine.answers.logprobs",
    "cptool.engine.prefill.prompt",
    "cptool.engine.prefill.session",
    "cptool.engine.saving",
    "cptool.engine.weights",
    "cptool.engine.world_profile",
    "cptool.parallel.tensor_parallel",
    "cptool.checkpoint.catalogue",
    "cptool.checkpoint.fingerprint",
    "cptool.checkpoint.hub",
    "cptool.host.pinned_copies",
)
_READERS = (
    "cptool.checkpoint.gguf.reader",
    "cptool.checkpoint.huggingface.reader",
    "cptool.checkpoint.meta.reader",
)


def rank_modules() -> list[str]:
    """Return the names of what ranks import besides torch; of the readers of checkpoints, those
    that this process has used itself.
    """
    families = (
        f"{architectures.__name__}.{m.name}" for m in pkgutil.iter_modules(architectures.__path__)
    )
    return [*_ALWAYS, *families, *(name for name in _READERS if name in sys.modules)]
