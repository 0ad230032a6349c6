"""The tokenizers of Meta's releases, made of what a `tokenizer.model` holds."""

from cptool.checkpoint.tokenizer import backends
from cptool.checkpoint.tokenizer.sentencepiece import SentencePieceModel
from cptool.checkpoint.tokenizer.tiktoken import RankedModel
from cptool.checkpoint.tokenizer.tokenizer import Tokenizer


def from_sentencepiece(model: SentencePieceModel, chat_template: str | None) -> Tokenizer:
    """Return the tokenizer of a SentencePiece model; a plain text begins with BOS."""
    backend = backends.sentencepiece_bpe(
        model.pieces, model.scores, model.types, dummy_prefix=model.dummy_prefix
    )
    backends.add_tokens(backend, model.pieces, model.types)
    backends.put_around(backend, model.bos_id)
    special = {"bos_token": model.pieces[model.bos_id], "eos_token": model.pieces[model.eos_id]}
    return Tokenizer(backend, model.bos_id, special, chat_template)


def from_ranks(
    model: RankedModel, bos_id: int, eos_id: int, chat_template: str | None
) -> Tokenizer:
    """Return the tokenizer of Llama 3's ranked tokens; a plain text begins with BOS."""
    tokens = [backends.printable(token) for token in model.tokens]
    backend = backends.byte_level_bpe(
        tokens, backends.all_merges(tokens), backends.LLAMA3_CUT, ignore_merges=True
    )
    backend.add_special_tokens(model.special)
    backends.put_around(backend, bos_id)
    ids = {"bos_token": bos_id, "eos_token": eos_id}
    special = {name: str(backend.id_to_token(i)) for name, i in ids.items()}
    return Tokenizer(backend, bos_id, special, chat_template)
