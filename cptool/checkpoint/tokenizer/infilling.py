"""Which tokens of a vocabulary stand around a gap that an answer fills."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

# The tokens before the text in front of the gap, before the text behind it, and before the answer.
# They are those of Code Llama, of Qwen 2.5 Coder and CodeGemma, of Granite, and of DeepSeek Coder.
_NAMES = (
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<\uff5cfim▁begin\uff5c>", "<\uff5cfim▁hole\uff5c>", "<\uff5cfim▁end\uff5c>"),
)
_ROLES = ("prefix_token", "suffix_token", "middle_token")
_ENDS = ("▁<EOT>", "<EOT>", "<|endoftext|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>")


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
            ends = [find(text) for text in (roles.get("eot_token", ""), *_ENDS)]
            known = dict.fromkeys(end for end in ends if end is not None)
            return Infilling(before=before, behind=behind, middle=middle, ends=tuple(known))
    return None
