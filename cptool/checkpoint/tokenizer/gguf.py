"""The tokenizer that the metadata of a GGUF file describes."""

from pathlib import Path
from typing import Any

from cptool.checkpoint.fields import first_line, shown
from cptool.checkpoint.tokenizer import backends
from cptool.checkpoint.tokenizer.sentencepiece import NORMAL
from cptool.checkpoint.tokenizer.templates import default_template
from cptool.checkpoint.tokenizer.tokenizer import Tokenizer
from cptool.errors import UserError

# How byte-level vocabularies cut text before merging, by `tokenizer.ggml.pre`. Granite has
# "refact", SmolLM 3 "smaug-bpe", Phi 4 and OLMo 2 and 3 "dbrx", Phi 4 mini "gpt-4o", and Mistral's
# models since Nemo "tekken".
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3", "falcon3")
CUTS = {
    "gpt-2": backends.GPT2_CUT,
    **dict.fromkeys(("smollm", "starcoder", "refact", "minerva-7b"), backends.DIGITS_CUT),
    **dict.fromkeys((*_LLAMA3, "smaug-bpe", "dbrx"), backends.LLAMA3_CUT),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), backends.QWEN2_CUT),
    "tekken": backends.TEKKEN_CUT,
    "gpt-4o": backends.GPT4O_CUT,
    "chameleon": backends.CHAMELEON_CUT,
}

# Vocabularies that hold words that their merges do not reach, and whose texts begin with BOS if the
# file does not say otherwise.
_WHOLE_WORDS = (*_LLAMA3, "tekken")

# Roles of tokens for infilling, by the newer and the older names of their ids.
_INFILLING = {
    "prefix_token": ("fim_pre", "prefix"),
    "suffix_token": ("fim_suf", "suffix"),
    "middle_token": ("fim_mid", "middle"),
    "eot_token": ("eot",),
    "fim_pad_token": ("fim_pad",),
    "fim_rep_token": ("fim_rep",),
    "fim_sep_token": ("fim_sep",),
}

# Tokens that end a turn or a message, by the names that models give them. Many files name only the
# end of the text in their metadata.
_ENDS = (
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<|end_of_turn|>",
    "<|eot|>",
    "<EOT>",
)


def from_gguf(
    path: Path, metadata: dict[str, Any], by_default: str | None = None
) -> Tokenizer | None:
    """Return the tokenizer that a GGUF file describes, None if it describes none.

    by_default: the chat template if the file has none.

    Supports byte-level BPE (`gpt2`) with the cuts above and SentencePiece BPE (`llama`). Raises
    UserError for others, and if it is damaged.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind in (None, "none", "no_vocab"):
        return None
    if kind not in ("gpt2", "llama"):
        raise UserError(
            f"{path}: tokenizer {kind!r} is not supported (gpt2 and llama are); give token ids"
        )
    pre = str(metadata.get("tokenizer.ggml.pre"))
    if kind == "gpt2" and pre not in CUTS:
        raise UserError(
            f"{path}: tokenizer.ggml.pre is {shown(metadata.get('tokenizer.ggml.pre'))}, cptool "
            f"knows {', '.join(CUTS)}; use the Hugging Face checkpoint"
        )
    try:
        tokens = metadata["tokenizer.ggml.tokens"]
        types = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
        if len(types) != len(tokens):
            raise ValueError(f"{len(tokens)} tokens and {len(types)} token types")
        if kind == "gpt2":
            merges = metadata.get("tokenizer.ggml.merges", [])
            bos_by_default = ignore_merges = pre in _WHOLE_WORDS
            backend = backends.byte_level_bpe(
                tokens, [_pair(merge) for merge in merges], CUTS[pre], ignore_merges
            )
        else:
            bos_by_default = True
            scores = metadata.get("tokenizer.ggml.scores", [])
            dummy_prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
            backend = backends.sentencepiece_bpe(tokens, scores, types, dummy_prefix=dummy_prefix)
        backends.add_tokens(backend, tokens, types)
        usual = {"bos": 1, "eos": 2} if kind == "llama" and len(tokens) > 2 else {}
        ids = {
            name: metadata.get(f"tokenizer.ggml.{name}_token_id", usual.get(name))
            for name in ("bos", "eos")
        }
        for name, token_id in ids.items():
            if token_id is not None and token_id not in range(len(tokens)):
                raise ValueError(f"{name}_token_id is {token_id}, there are {len(tokens)} tokens")
        special = {f"{name}_token": tokens[i] for name, i in ids.items() if i is not None}
        special |= _infilling_roles(metadata, tokens)
        add_bos = metadata.get("tokenizer.ggml.add_bos_token", bos_by_default)
        add_eos = metadata.get("tokenizer.ggml.add_eos_token", False)
        backends.put_around(
            backend, ids["bos"] if add_bos else None, ids["eos"] if add_eos else None
        )
    except Exception as error:  # The library raises bare Exception, bad metadata anything.
        raise UserError(
            f"{path}: its tokenizer is damaged ({first_line(error)}); fetch the file again"
        ) from None
    template = default_template(metadata.get("tokenizer.chat_template")) or by_default
    return Tokenizer(backend, ids["bos"], special, template, ends=_ENDS)


def _infilling_roles(metadata: dict[str, Any], tokens: list[str]) -> dict[str, str]:
    """Return the texts of the tokens for infilling that the metadata names, by their roles."""
    found = {}
    for role, keys in _INFILLING.items():
        stated = (metadata.get(f"tokenizer.ggml.{key}_token_id") for key in keys)
        token_id = next((i for i in stated if i is not None), None)
        if token_id is not None and token_id in range(len(tokens)):
            found[role] = tokens[token_id]
    return found


def _pair(merge: str) -> tuple[str, str]:
    first, second = merge.split(" ", 1)
    return first, second
