"""What the ranks of a run load, and loading it. Imports no torch until then."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cptool.engine.options import EngineOptions
from cptool.engine.setup.types import widened
from cptool.errors import RunError

if TYPE_CHECKING:
    from cptool.checkpoint import Checkpoint
    from cptool.distributed.world import World
    from cptool.engine.engine import Engine
    from cptool.model.llama import Llama


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What the ranks load.

    model, dtype: the checkpoint, and the dtype to compute in.
    session, resume: a session to restore, at this revision.
    fingerprint: the checkpoint's, if the process that starts the ranks has computed it.
    state: the state of the checkpoint's files at that time; ranks that find another one fail.
    """

    model: str
    dtype: str
    options: EngineOptions = field(default_factory=EngineOptions)
    session: str | None = None
    resume: int | None = None
    fingerprint: str | None = None
    state: str | None = None

    @property
    def kv_dtype(self) -> str:
        """Type in which keys and values are stored."""
        return self.dtype if self.options.kv_dtype == "auto" else self.options.kv_dtype

    @property
    def weights(self) -> str:
        """What weights are quantised to, or "file"."""
        return self.options.weights or "file"

    def types(self, checkpoint: "Checkpoint", device: str) -> dict[str, Any]:
        """Return what is computed and stored in which type, as fields of a report."""
        found = widened(checkpoint, self.dtype, device)
        shown = {"kv_dtype": self.kv_dtype, "weights": self.weights, "widened": found}
        return {"dtype": self.dtype, **shown}


def load_for(world: "World", setup: Setup) -> "tuple[Checkpoint, Llama]":
    """Load the model of `setup`, in its dtype, onto this rank.

    Collective. Raises RunError if the checkpoint changed since `setup.state` was taken.
    """
    import torch

    from cptool.checkpoint import open_checkpoint
    from cptool.engine.weights import load_model

    world.report("load the weights")
    checkpoint = open_checkpoint(setup.model)
    dtype, weights = getattr(torch, setup.dtype), setup.options.weights
    model = load_model(checkpoint, dtype, world.device, world, weights=weights)
    if setup.state is not None and checkpoint.state != setup.state:
        raise RunError(f"{checkpoint.path} was changed while it was loaded; give the command again")
    return checkpoint, model


def make_engine(world: "World", setup: Setup, model: "Llama", *, batch: int) -> "Engine":
    """Return an engine with the options of `setup` for a batch of sequences. Collective."""
    from cptool.engine.engine import Engine
    from cptool.engine.world_profile import world_profile

    return Engine(
        model,
        world,
        batch=batch,
        options=setup.options,
        profile=world_profile(world),
        progress=world.report,
    )
