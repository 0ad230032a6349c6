"""Which tokens of a vocabulary stand around a gap that an answer fills."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer as Backend

from cptool.checkpoint.tokenizer import library

# The tokens before the text in front of the gap, before the text behind it, and before the answer.
# They are those of Code Llama, of Qwen 2.5 Coder and CodeGemma, of Granite, and of DeepSeek Coder.
_NAMES = (
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<\uff5cfim▁begin\uff5c>", "<\uff5cfim▁hole\uff5c>", "<\uff5cfim▁end\uff5c>"),
)
_ROLES = ("prefix_token", "suffix_token", "middle_token")
_ENDS = (
    "▁<EOT>",
    "<EOT>",
    "<|endoftext|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<|file_separator|>",
)
_END_ROLES = ("eot_token", "fim_pad_token", "fim_rep_token", "fim_sep_token")


@dataclass(frozen=True, kw_only=True)
class Infilling:
    """Token ids: before the text in front of the gap, before the text behind it, before what fills
    it, and those that end what fills it.
    """

    before: int
    behind: int
    middle: int
    ends: tuple[int, ...]


def find_infilling(roles: Mapping[str, str], find: Callable[[str], int | None]) -> Infilling | None:
    """Return the tokens for infilling of a tokenizer, None if it has none.

    roles: texts of tokens with a role, which files may give. find: returns the id of the token of a
        text, None if the model has none.
    """
    named = tuple(roles.get(role, "") for role in _ROLES)
    for names in (named, *_NAMES):
        before, behind, middle = map(find, names)
        if before is not None and behind is not None and middle is not None:
            ends = [find(text) for text in (*(roles.get(role, "") for role in _END_ROLES), *_ENDS)]
            known = dict.fromkeys(end for end in ends if end is not None)
            return Infilling(before=before, behind=behind, middle=middle, ends=tuple(known))
    return None


def infilling_texts(backend: Backend, roles: Mapping[str, str]) -> list[str]:
    """Return the texts of all tokens for infilling, none if a tokenizer has no such tokens."""
    found = find_infilling(roles, lambda text: backend.token_to_id(text) if text else None)
    if found is None:
        return []
    ids = (found.before, found.behind, found.middle, *found.ends)
    return [str(backend.id_to_token(i)) for i in ids]


def unmerged(backend: Backend, texts: Sequence[str]) -> Backend:
    """Return the tokenizer without merges that make one of these special tokens of its letters.

    Code Llama's files have its tokens for infilling as pieces like any other, merges included.
    """
    backend.encode_special_tokens = True
    if not any(_merges(backend, text) for text in texts):
        return backend
    described = json.loads(backend.to_str())
    model = described["model"]
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    model["merges"] = [pair for pair in pairs if "".join(pair) not in texts]
    return Backend.from_str(json.dumps(described))


def _merges(backend: Backend, text: str) -> bool:
    """Return whether the letters of a special token become that token, alone or behind others."""
    token_id = backend.token_to_id(text)
    try:
        found = library.call(backend.encode_batch, [text, f"a{text}"], add_special_tokens=False)
    except library.LibraryError:  # which a text to encode meets again
        return False
    return any(token_id in encoding.ids for encoding in found)
