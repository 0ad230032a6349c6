"""What the ranks of a run load, and loading it. Imports no torch until then."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cptool.engine.options import EngineOptions
from cptool.engine.setup.types import mean_weight_size, widened
from cptool.errors import RunError
from cptool.host import memory
from cptool.planning.cost.forward import ELEMENT_BYTES
from cptool.planning.prediction import Work
from cptool.quantisation import FP8_FEED_FORWARD

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

    def types(self, checkpoint: "Checkpoint", device: str, *, tp: int = 1) -> dict[str, Any]:
        """Return what is computed and stored in which type, as fields of a report."""
        found = widened(checkpoint, self.dtype, device)
        if self.weights == FP8_FEED_FORWARD:
            import torch

            from cptool.ops.fp8 import how_multiplied

            hidden = checkpoint.config.hidden_size
            inner = checkpoint.config.intermediate_size // tp
            shapes = [(2 * inner, hidden), (hidden, inner)]
            found = how_multiplied(torch.device(device), getattr(torch, self.dtype), shapes)
        shown = {"kv_dtype": self.kv_dtype, "weights": self.weights, "widened": found}
        return {"dtype": self.dtype, **shown}

    def work(
        self,
        checkpoint: "Checkpoint",
        device: str,
        *,
        cp: int,
        tp: int,
        local: int,
        new: Sequence[int],
        cached: Sequence[int],
    ) -> Work:
        """Return the turn of `new[b]` tokens over `cached[b]`, without an answer, as the cost model
        describes it, on `local` ranks per machine.
        """
        options = self.options
        return Work(
            config=checkpoint.config,
            dtype=self.dtype,
            new=new,
            cached=cached,
            answer=0,
            ranks=cp,
            tp=tp,
            partial_bytes=ELEMENT_BYTES[self.dtype] if options.partials == "working" else 4,
            weight_size=mean_weight_size(checkpoint, self.dtype, device, self.weights),
            feed_forward="float8" if self.weights == FP8_FEED_FORWARD else None,
            kv_dtype=self.kv_dtype,
            kv_memory=options.kv_memory,
            local=local,
        )

    def on(
        self,
        world: "World",
        checkpoint: "Checkpoint",
        *,
        new: Sequence[int],
        cached: Sequence[int],
    ) -> Work:
        """Return the same on the ranks of `world`."""
        ranks = {"cp": world.cp, "tp": world.tp, "local": world.local_size}
        return self.work(checkpoint, world.device.type, new=new, cached=cached, **ranks)


def load_for(
    world: "World", setup: Setup, *, before: "Callable[[Checkpoint], None] | None" = None
) -> "tuple[Checkpoint, Llama]":
    """Load the model of `setup`, in its dtype, onto this rank.

    before: called with the checkpoint before anything of it is loaded; by default, checks that
        there is memory for the model.

    Collective. Raises UserError before anything is loaded if a rank may not take the memory for it;
    RunError if the checkpoint changed since `setup.state` was taken.
    """
    import torch

    from cptool.checkpoint import open_checkpoint
    from cptool.engine.weights import load_model

    world.report("load the weights")
    checkpoint = open_checkpoint(setup.model)
    if before is None:
        check_memory(world, setup, setup.on(world, checkpoint, new=[], cached=[]))
    else:
        before(checkpoint)
    dtype, weights = getattr(torch, setup.dtype), setup.options.weights
    model = load_model(checkpoint, dtype, world.device, world, weights=weights)
    # What loading took beside the weights is page cache: it is no part of what the rank needs.
    checkpoint.release()
    memory.forget_peak()
    if setup.state is not None and checkpoint.state != setup.state:
        raise RunError(f"{checkpoint.path} was changed while it was loaded; give the command again")
    return checkpoint, model


def check_memory(world: "World", setup: Setup, work: Work, *, drafts: float = 0.0) -> None:
    """Raise UserError on all ranks if one would take more memory for `work` than it may.
    Collective.

    drafts: bytes of a model that drafts.
    """
    from cptool.engine.setup.memory import check
    from cptool.engine.world_profile import world_profile

    check(world, work, world_profile(world), options=setup.options, drafts=drafts)


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
