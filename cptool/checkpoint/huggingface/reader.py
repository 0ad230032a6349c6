"""Checkpoints in the Hugging Face layout: config.json next to safetensors files.

If files state a thing twice, both are read: equal answers are accepted, others are refused by both
names, or transformers' choice is taken and noted.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cptool.checkpoint.base import Checkpoint
from cptool.checkpoint.config_checks import check_config
from cptool.checkpoint.fields import flag, read_json, token_ids
from cptool.checkpoint.huggingface.config import family_of, read_checked_fields, read_config
from cptool.checkpoint.huggingface.directory import check_kind, check_quantization
from cptool.checkpoint.huggingface.known import GENERATION, TOKENIZER
from cptool.checkpoint.huggingface.shards import read_headers
from cptool.checkpoint.known_fields import FieldList, check_fields
from cptool.checkpoint.lookalikes import dangling
from cptool.checkpoint.notes import Notes
from cptool.checkpoint.sampling import SamplingDefaults, read_sampling
from cptool.checkpoint.selection import flattened, select_tensors, split_fused, with_added
from cptool.checkpoint.tensor_names import check_names
from cptool.checkpoint.tensors import TORCH_DTYPES, StoredTensor, differ
from cptool.errors import UserError
from cptool.model.architectures.family import Family

if TYPE_CHECKING:
    from cptool.checkpoint.tokenizer.tokenizer import Tokenizer


def open_huggingface(path: Path, name: str | None = None) -> Checkpoint:
    """Open and validate the directory `path`.

    Raises UserError for anything that is missing, damaged or not a model that cptool computes.
    """
    check_kind(path)
    config_file = path / "config.json"
    notes = Notes()
    fields = read_checked_fields(config_file, notes)
    family = family_of(config_file, fields)
    embedding, head = family.embedding, family.head
    check_quantization(path, fields)
    tied = flag(config_file, {**family.defaults, **fields}, "tie_word_embeddings")
    found = _with_prefix(family, read_headers(path, head if tied else None, notes))
    check_names(path, found, family)
    if not tied and head not in found and embedding in found:
        raise UserError(
            f"{path}: {head} is missing, as in embedding models, and {config_file.name} does not "
            f'say that the embedding serves in its place; set "tie_word_embeddings" to true '
            f"there if it does, or use a {family.architectures[0]} checkpoint"
        )
    config = read_config(config_file, fields, notes)
    config = check_config(config_file, replace(config, tie_word_embeddings=head not in found))
    found = flattened(config, split_fused(path, config, found))
    stored = select_tensors(path, config, found, TORCH_DTYPES)
    if tied and head in found and differ(found[head], found[embedding]):
        notes.add(
            f"{config_file}: tie_word_embeddings is true, and the files hold a {head} that differs "
            f"from the embedding; the files' own is used"
        )
    generation = _read_optional(path / "generation_config.json", GENERATION, notes)
    tokenizer = _read_optional(path / "tokenizer_config.json", TOKENIZER, notes)
    tokens = _NamedTokens(path, fields, generation, config.vocab_size)
    default_end = None if tokenizer.get("eos_token") else family.defaults.get("eos_token_id")
    return Checkpoint(
        path=path,
        name=name or path.resolve().name,
        config=config,
        stored=with_added(stored, config),
        eos_ids=tokens.end_ids(default_end),
        bos_id=tokens.begin_id(),
        sampling=_sampling(path / "generation_config.json", generation, notes),
        notes=notes.lines(),
        load_tokenizer=lambda: _load_tokenizer(path, family),
    )


def _with_prefix(family: Family, found: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return the tensors under their names in a model that generates text.

    Those of a bare model lack a prefix, which transformers adds when it reads them. Tensors that
    are not the language model's are left out.
    """
    if (others := family.other_tensors) is not None:
        found = {name: tensor for name, tensor in found.items() if not name.startswith(others)}
    if any(name.startswith("model.") for name in found):
        return found
    prefixed = {name: f"model.{name}" for name in found}
    return {
        prefixed[name] if family.find(prefixed[name], "huggingface") else name: tensor
        for name, tensor in found.items()
    }


def _read_optional(file: Path, known: FieldList, notes: Notes) -> dict[str, Any]:
    """Return the checked fields of a file that may be missing."""
    if not file.is_file():
        if (why := dangling(file)) is not None:
            raise UserError(f"{file}: {why}")
        return {}
    fields = read_json(file)
    check_fields(file, fields, known, notes)
    return fields


@dataclass(frozen=True)
class _NamedTokens:
    """The ids of tokens with a role in `config` and, before these, in `generation`."""

    path: Path
    config: dict[str, Any]
    generation: dict[str, Any]
    vocab_size: int

    def ids(self, key: str) -> tuple[int, ...]:
        """Return all ids that the two files give."""
        files = {"generation_config.json": self.generation, "config.json": self.config}
        return tuple(
            token_id
            for file, fields in files.items()
            for token_id in token_ids(self.path / file, key, fields.get(key), self.vocab_size)
        )

    def end_ids(self, default: int | None) -> tuple[int, ...]:
        """Return the ids that end an answer, `default` if no file has the field."""
        key = "eos_token_id"
        ids = self.ids(key)
        missing = key not in self.config and key not in self.generation
        if missing and default is not None and default < self.vocab_size:
            ids = (default,)
        return tuple(dict.fromkeys(ids))

    def begin_id(self) -> int | None:
        """Return the id of BOS, None if no file gives one."""
        return next(iter(self.ids("bos_token_id")), None)


def _sampling(source: Path, generation: dict[str, Any], notes: Notes) -> SamplingDefaults:
    """Return the author's values, of which the repetition penalty alone counts if `do_sample` is
    not set.

    The temperature is 1 if it is not stated, as in transformers.
    """
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    defaults = read_sampling(source, generation, {name: name for name in names}, notes)
    if not flag(source, generation, "do_sample"):
        return SamplingDefaults(repetition_penalty=defaults.repetition_penalty)
    return defaults if defaults.temperature is not None else replace(defaults, temperature=1.0)


def _load_tokenizer(path: Path, family: Family) -> "Tokenizer | None":
    from cptool.checkpoint.tokenizer.huggingface import from_files

    files = (path / "tokenizer.json", path / "tokenizer.model")
    if (file := next((file for file in files if file.is_file()), None)) is not None:
        config_file = path / "tokenizer_config.json"
        settings = read_json(config_file) if config_file.is_file() else {}
        template_file = path / "chat_template.jinja"
        template = template_file.read_text("utf-8") if template_file.is_file() else None
        return from_files(file, settings, template, by_default=family.chat_template)
    return None
