"""What Chameleon has of its own in Meta's layout: its fields in two files, among those of its
training, and a tokenizer in the Hugging Face format.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cptool.checkpoint.fields import mapping, read_json, token_ids
from cptool.checkpoint.image_ids import find_image_ids
from cptool.errors import UserError
from cptool.model.architectures.family import Family

if TYPE_CHECKING:
    from cptool.checkpoint.tokenizer.tokenizer import Tokenizer

_MORE, _TOKENIZER = "consolidate_params.json", "text_tokenizer.json"

# The arguments of Meta's own model, which ignores all other fields.
_ARGUMENTS = frozenset(
    """
    model_parallel_size dim n_layers n_heads n_kv_heads vocab_size ffn_dim_multiplier multiple_of
    norm_eps rope_theta qk_normalization swin_norm max_seq_len
    """.split()
)
_ROLES = {"bos_token": "<s>", "eos_token": "</s>", "sep_token": "<reserved08706>"}


def is_chameleon(params: dict[str, Any]) -> bool:
    """Return whether a params.json is of this family."""
    return "qk_normalization" in params or isinstance(params.get("model"), dict)


def merged_params(path: Path, params: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of the model out of all its files, of which later ones count."""
    more = path / _MORE
    model = params.get("model", {})
    merged = {**params, **model, **(read_json(more) if more.is_file() else {})}
    if merged.get("qk_normalization") is not True:
        raise UserError(
            f"{path}: qk_normalization is not true in its params.json, as in every Chameleon; use "
            f"a checkpoint of Chameleon or Llama"
        )
    return {name: value for name, value in merged.items() if name in _ARGUMENTS}


@dataclass(frozen=True, kw_only=True)
class TextTokenizer:
    """The tokenizer beside a model. ids: of its tokens by name. named: those with a role, at most
    one each.
    """

    path: Path
    ids: dict[str, Any]
    named: dict[str, tuple[int, ...]]
    family: Family

    def image_ids(self, vocab_size: int) -> tuple[tuple[int, int], ...]:
        """Return the ranges of the tokens that stand for parts of images."""
        return find_image_ids(
            self.path, "model.vocab", self.ids, family=self.family, vocab_size=vocab_size
        )

    @property
    def bos_id(self) -> int | None:
        """The id of the token that begins a text."""
        return next(iter(self.named["bos_token"]), None)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids of tokens that end an answer."""
        return self.named["eos_token"]

    def tokenizer(self) -> "Tokenizer":
        """Return the tokenizer; a plain text begins with BOS, which the file may leave to its
        reader.
        """
        from cptool.checkpoint.tokenizer import backends
        from cptool.checkpoint.tokenizer.huggingface import read_tokenizer_files
        from cptool.checkpoint.tokenizer.tokenizer import Tokenizer

        files = read_tokenizer_files(self.path, dict(_ROLES))
        backends.put_around(files.backend, self.bos_id, None)
        return Tokenizer(files.backend, self.bos_id, files.roles, self.family.chat_template)


def read_text_tokenizer(path: Path, family: Family, vocab_size: int) -> TextTokenizer:
    """Read the tokenizer beside the weights, or where the release has it: in `tokenizer`, beside
    `models`. UserError if there is none, because it says which tokens are images.
    """
    above = path.resolve().parents
    places = [path, *above[:2]]
    for folder in (*places, *(place / "tokenizer" for place in places)):
        file = folder / _TOKENIZER
        if file.is_file():
            model = mapping(file, read_json(file), "model")
            ids = mapping(file, model, "vocab")
            named = {
                role: token_ids(file, "model.vocab", ids.get(token), vocab_size)
                for role, token in _ROLES.items()
            }
            return TextTokenizer(path=file, ids=ids, named=named, family=family)
    raise UserError(
        f"{path}: {_TOKENIZER} is not beside the weights, and it says which tokens are parts of "
        f"images; put it there"
    )
