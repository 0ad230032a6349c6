"""Byte-pair encodings as objects of the `tokenizers` library, built from vocabularies."""

from collections.abc import Iterable, Sequence

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from cptool.checkpoint.tokenizer.sentencepiece import CONTROL, NORMAL, UNKNOWN, USER_DEFINED

# How Llama 3 cuts a text before merging.
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _by_case(ending: str, digits: str) -> str:
    """Return the pattern of vocabularies that also cut between "camel" and "Case"."""
    first = r"[^\r\n\p{L}\p{N}]?"
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    return (
        rf"{first}{upper}*{lower}+{ending}|{first}{upper}+{lower}*{ending}|{digits}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


GPT2_CUT = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS_CUT = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2_CUT])
LLAMA3_CUT, QWEN2_CUT, TEKKEN_CUT, GPT4O_CUT = (
    pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    # Qwen 2 and 3 cut digits one by one, Llama 3 up to three at a time.
    for pattern in (
        _LLAMA3_PATTERN,
        _LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}"),
        _by_case("", r"\p{N}"),
        _by_case(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?", r"\p{N}{1,3}"),
    )
)

# Chameleon's: one after the other, each divides what those before it left whole.
CHAMELEON_CUT = pre_tokenizers.Sequence(
    [
        *(
            pre_tokenizers.Split(Regex(pattern), behavior="isolated")
            for pattern in (
                "<sentinel:[0-9]+>",
                "IMGIMG[A-I]{1,4}Z",
                r"[\t\n]|    |  ",
                r"\p{N}",
                r"[\p{P}!-/:-@\[-`{-~]",
                r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
            )
        ),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)


def byte_level_bpe(
    tokens: Sequence[str],
    merges: list[tuple[str, str]],
    cut: pre_tokenizers.PreTokenizer,
    ignore_merges: bool,
) -> Tokenizer:
    """Return BPE over bytes, each written as a printable character.

    No merge crosses a place where `cut` divides a text. With `ignore_merges`, a piece between cuts
    that is a token is that token, whatever merges reach.
    """
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=ignore_merges))
    backend.pre_tokenizer = cut
    backend.decoder = decoders.ByteLevel()
    return backend


def printable(token: bytes) -> str:
    """Return bytes as the printable characters of byte-level vocabularies (GPT-2)."""
    return "".join(_PRINTABLE[byte] for byte in token)


def _printable_bytes() -> list[str]:
    kept = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256))
    return [chr(byte if byte in kept else 256 + next(others)) for byte in range(256)]


_PRINTABLE = _printable_bytes()


def sentencepiece_bpe(
    tokens: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    *,
    dummy_prefix: bool,
    strip: bool | None = None,
) -> Tokenizer:
    """Return SentencePiece BPE, which merges the pair whose piece has the best score.

    Spaces are U+2581, with a dummy one in front if `dummy_prefix`; unknown characters are bytes.
    Decoding strips a space in front if `strip`, by default where there is a dummy one.
    """
    if len(scores) != len(tokens):
        raise ValueError(f"{len(tokens)} tokens and {len(scores)} scores")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    pieces = {token: i for i, token in enumerate(tokens) if types[i] == NORMAL}
    best_first = sorted(pieces, key=lambda piece: -scores[pieces[piece]])
    unknown = next((tokens[i] for i, kind in enumerate(types) if kind == UNKNOWN), None)
    backend = Tokenizer(
        models.BPE(
            vocabulary, all_merges(best_first), unk_token=unknown, fuse_unk=True, byte_fallback=True
        )
    )
    spaces = normalizers.Replace(" ", "▁")
    # As a normalizer it also applies after a control token, as in the reference, where every turn
    # is encoded by itself.
    backend.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if dummy_prefix else spaces
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(
        [*steps, decoders.Strip(" ", 1, 0)] if (dummy_prefix if strip is None else strip) else steps
    )
    return backend


def all_merges(best_first: Iterable[str]) -> list[tuple[str, str]]:
    """Return all ways to make each piece from two.

    They are for an encoding that merges whichever pair makes the best piece.
    """
    pieces = dict.fromkeys(best_first)
    return [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]


def add_tokens(backend: Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Register control tokens as special, the author's own tokens as ones to find in any text."""
    special = [t for t, kind in zip(tokens, types, strict=True) if kind in (UNKNOWN, CONTROL)]
    plain = [t for t, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED]
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    backend.add_tokens([AddedToken(t, normalized=False) for t in plain])


def put_around(backend: Tokenizer, first: int | None, last: int | None = None) -> None:
    """Put the tokens `first` and `last` around a text that begins a sequence."""
    named = [(name, i) for name, i in (("first", first), ("last", last)) if i is not None]
    single = ["first"] * (first is not None) + ["$A"] + ["last"] * (last is not None)
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=named)
