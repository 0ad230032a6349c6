"""The shape of a model by name, from a configuration alone, or of a checkpoint."""

from cptool.checkpoint import Checkpoint, open_checkpoint
from cptool.checkpoint.fetching import Watch, unwatched
from cptool.checkpoint.huggingface.config import read_shape
from cptool.errors import UserError
from cptool.files import expanded
from cptool.model.config import LlamaConfig
from cptool.model.shapes import SHAPES


def find_shape(name: str, notes: list[str] | None = None, watch: Watch = unwatched) -> LlamaConfig:
    """Return the shape of a model.

    `name` is a name in `SHAPES`, a `config.json` or a directory with one, or any model that
    `open_checkpoint` opens, which takes `watch`. Lines that the user should see are appended to
    `notes`. Reads no weights and imports no torch. Raises UserError, one line, for anything else.
    """
    notes = [] if notes is None else notes
    if name in SHAPES:
        return SHAPES[name]
    path = expanded(name)
    if path.is_dir() and (path / "config.json").is_file():
        path /= "config.json"
    if path.suffix == ".json" and path.is_file():
        try:
            return read_shape(path, notes)
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error}); give a config.json") from None
    try:
        checkpoint = open_checkpoint(name, watch=watch)
    except UserError as error:
        if path.exists() or "/" in name:
            raise
        raise UserError(f"{error}; or one of the shapes {', '.join(SHAPES)}") from None
    notes += checkpoint.notes
    return checkpoint.config


def find_checkpoint(name: str) -> Checkpoint | None:
    """Return the checkpoint that `find_shape` finds by that name; None for a mere shape."""
    if name in SHAPES or name.endswith(".json"):
        return None
    try:
        return open_checkpoint(name)
    except UserError:  # a directory with a configuration and without weights
        return None
