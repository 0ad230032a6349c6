"""The tokenizer files of a Hugging Face directory, put together as transformers 5 does.

    tokenizer.json           the vocabulary, how texts are cut, what is put around them
    tokenizer.model          a SentencePiece model, if there is no tokenizer.json (`slow_llama.py`)
    tokenizer_config.json    tokens with a role, further added tokens, the tokenizer's class
    special_tokens_map.json, added_tokens.json
                             the same in older directories; read if tokenizer_config.json has no
                             `added_tokens_decoder`
    chat_template.jinja, additional_chat_templates/*.jinja
                             chat templates, before the one in tokenizer_config.json

If two files differ about a role, the order of precedence is transformers'. If a file gives a token
another id than the vocabulary does, the tokenizer is refused.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from cptool.checkpoint.fields import first_line, read_json
from cptool.checkpoint.tokenizer import backends, library, slow_llama
from cptool.checkpoint.tokenizer.templates import default_template
from cptool.checkpoint.tokenizer.tokenizer import Tokenizer
from cptool.errors import UserError

_ROLES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)

# Roles that a class of transformers fills where no file does.
_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_GPT2: dict[str, str] = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
_CLASS_ROLES: dict[str, dict[str, str]] = {
    "LlamaTokenizer": _LLAMA,
    "CodeLlamaTokenizer": _LLAMA,
    "GPT2Tokenizer": _GPT2,
    "GPTNeoXTokenizer": _GPT2 | {"pad_token": "<|padding|>"},
}

# Further roles of Code Llama's, for infilling.
_INFILLING = {
    "prefix_token": "▁<PRE>",
    "middle_token": "▁<MID>",
    "suffix_token": "▁<SUF>",
    "eot_token": "▁<EOT>",
    "fill_token": "<FILL_ME>",
}

_MAX_BYTES = 1 << 29


def from_files(
    path: Path,
    settings: dict[str, Any],
    chat_template: str | None = None,
    *,
    by_default: str | None = None,
) -> Tokenizer:
    """Return the tokenizer of a Hugging Face directory, out of all its files.

    `path` is its tokenizer.json or its tokenizer.model, `settings` its tokenizer_config.json;
    `chat_template` goes before any template in the files, `by_default` is the one if these have
    none. Raises UserError as `read_tokenizer_files` does.
    """
    files = read_tokenizer_files(path, settings, chat_template)
    backend, roles = files.backend, files.roles
    bos_id = backend.token_to_id(roles["bos_token"]) if "bos_token" in roles else None
    around = backend.encode("", add_special_tokens=True).ids
    if bos_id is None and len(around) == 1:
        bos_id = around[0]
    return Tokenizer(
        backend,
        bos_id,
        roles,
        by_default if files.chat_template is None else files.chat_template,
        why_no_template=files.why_no_template,
        space_first=files.space_first,
    )


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """What the files of a tokenizer describe.

    `roles` maps `bos_token` and the like to texts. `chat_template` is None if there is none, and
    `why_no_template` then gives the reason if it is known. `space_first` is as for `Tokenizer`.
    """

    backend: Backend
    roles: dict[str, str]
    chat_template: str | None
    why_no_template: str | None = None
    space_first: bool = False


def read_tokenizer_files(
    path: Path, settings: dict[str, Any], chat_template: str | None = None
) -> TokenizerFiles:
    """Read the tokenizer.json or tokenizer.model at `path` and the files beside it.

    `settings` is tokenizer_config.json; `chat_template` goes before any template in the files.
    Raises UserError if a file is damaged, or requests what cptool does not do.
    """
    kind, space_first = _class_of(path, settings), False
    if path.suffix == ".model":
        backend, space_first = slow_llama.read(path, settings, kind)
    else:
        backend = _read_backend(path)
    try:
        backend, roles = _assemble(path, settings, kind, backend)
    except (library.LibraryError, TypeError, ValueError, AttributeError, KeyError) as error:
        raise UserError(
            f"{path.parent}: its tokenizer's files do not fit together ({first_line(error)}); "
            f"fetch them again"
        ) from None
    template, why = _template(path.parent, settings, chat_template)
    return TokenizerFiles(
        backend=backend,
        roles=roles,
        chat_template=template,
        why_no_template=why,
        space_first=space_first,
    )


def _read_backend(path: Path) -> Backend:
    try:
        if (size := path.stat().st_size) > _MAX_BYTES:
            raise UserError(f"{path}: {size:,} bytes are no tokenizer's; fetch the file again")
        with library.muted():
            backend = library.call(Backend.from_file, str(path))
            backend.no_truncation()
            backend.no_padding()
            # What goes around a text is put there here: a faulty description fails now.
            library.call(backend.encode, "", add_special_tokens=True)
    except library.LibraryError as error:
        raise UserError(f"{path}: not a tokenizer ({error}); fetch the file again") from None
    return backend


def _class_of(path: Path, settings: dict[str, Any]) -> str:
    """Return the class with which transformers would read the files if it matters, else ""."""
    if settings.get("split_special_tokens") is True:
        raise UserError(
            f"{path.parent}: split_special_tokens is true, so that a chat's control tokens would "
            f"be spelled in letters; set it to false"
        )
    declared = settings.get("tokenizer_class")
    if declared is None:
        config = path.parent / "config.json"
        declared = read_json(config).get("tokenizer_class") if config.is_file() else None
    name = str(declared or "").removesuffix("Fast")
    if path.suffix == ".model":
        return name or "LlamaTokenizer"
    # A byte-level vocabulary under the name of Llama's is Llama 3's, which the file describes.
    if name == "LlamaTokenizer" and b'"ByteLevel"' in path.read_bytes():
        return ""
    return name if name in _CLASS_ROLES else ""


def _assemble(
    path: Path, settings: dict[str, Any], kind: str, backend: Backend
) -> tuple[Backend, dict[str, str]]:
    fields = dict(settings)
    if "additional_special_tokens" in fields and not fields.get("extra_special_tokens"):
        fields["extra_special_tokens"] = fields.pop("additional_special_tokens")
    own_roles = {
        key: fields.pop(key)
        for key in list(fields)
        if key.endswith("_token") and key not in _ROLES and isinstance(fields[key], str)
    }
    if isinstance(fields.get("extra_special_tokens"), dict):
        own_roles |= fields.pop("extra_special_tokens")
    if kind == "CodeLlamaTokenizer":
        own_roles = _INFILLING | own_roles
    listed = _listed_tokens(path, fields, own_roles, backend)
    known = {token.content: token for token in listed.values()}
    roles: dict[str, str | AddedToken] = {}
    for key in _ROLES:
        value = fields[key] if key in fields else _CLASS_ROLES.get(kind, {}).get(key)
        if value is not None:
            token = _token(value)
            roles[key] = known.get(_text(token), token)
    roles |= {key: _token(value) for key, value in own_roles.items()}
    more = "extra" if "extra_special_tokens" in fields else "additional"
    extra = [_token(value) for value in fields.get(f"{more}_special_tokens") or []]
    alone = path.suffix == ".model"
    if kind in slow_llama.CLASSES and not alone:
        backend = _as_llama(fields, backend, "always" if kind == "LlamaTokenizer" else "first")
    elif kind == "GPTNeoXTokenizer":
        backend = _as_gpt_neox(fields, backend)
    elif kind == "GPT2Tokenizer" and isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(
            add_prefix_space=fields.get("add_prefix_space") is True
        )
    _add(backend, listed, roles, extra)
    if alone:
        slow_llama.put_around(
            backend, settings, {key: _text(value) for key, value in roles.items()}
        )
    elif kind == "CodeLlamaTokenizer":  # Whatever the file puts around a text.
        bos = roles.get("bos_token")
        backends.put_around(backend, backend.token_to_id(_text(bos)) if bos else None)
    for token_id, token in listed.items():
        if (actual := backend.token_to_id(token.content)) != token_id:
            raise ValueError(
                f"{token.content!r} has id {token_id} in one file and {actual} in another"
            )
    return backend, {key: _text(value) for key, value in roles.items()}


def _listed_tokens(
    path: Path, fields: dict[str, Any], own_roles: dict[str, Any], backend: Backend
) -> dict[int, AddedToken]:
    """Added tokens by id, out of all files that list them; roles of older files enter `fields`."""
    if "added_tokens_decoder" in fields:
        decoder = fields["added_tokens_decoder"]
        return {int(token_id): AddedToken(**token) for token_id, token in decoder.items()}
    special_file = path.parent / "special_tokens_map.json"
    if special_file.is_file():
        for key, value in read_json(special_file).items():
            if isinstance(value, dict) and key != "extra_special_tokens":
                value = _token(value, special=True)
            elif key == "extra_special_tokens" and isinstance(value, list):
                value = [*(fields.get(key) or []), *value]
            fields[key] = value
        if isinstance(fields.get("extra_special_tokens"), dict):
            own_roles |= fields.pop("extra_special_tokens")
        for key in list(fields):
            if key.endswith("_token") and key not in _ROLES:
                if isinstance(fields[key], str | AddedToken):
                    own_roles[key] = fields.pop(key)
    listed = {}
    added_file = path.parent / "added_tokens.json"
    if added_file.is_file():
        special = {_text(fields[key]) for key in _ROLES if fields.get(key)}
        special |= {_text(value) for value in fields.get("extra_special_tokens") or []}
        for text, token_id in read_json(added_file).items():
            if type(token_id) is not int:
                raise TypeError(f"the id of {text!r} in {added_file.name} is {token_id!r}")
            listed[token_id] = AddedToken(
                text, special=text in special, normalized=text not in special
            )
    return listed | backend.get_added_tokens_decoder()


def _add(
    backend: Backend,
    listed: dict[int, AddedToken],
    roles: dict[str, str | AddedToken],
    extra: list[str | AddedToken],
) -> None:
    """Add tokens that the vocabulary lacks, in the order in which they get ids."""
    present = backend.get_added_tokens_decoder()
    described = {repr(token) for token in present.values()}
    new = [token for _, token in sorted(listed.items()) if repr(token) not in described]
    texts = {token.content for token in (*present.values(), *new)}
    for value in (*roles.values(), *extra):
        if _text(value) not in texts:
            texts.add(_text(value))
            new.append(value if isinstance(value, AddedToken) else AddedToken(value, special=True))
    with_role = {_text(value) for value in roles.values()}
    for token in new:
        if token.content in with_role:
            token.special = True
    library.call(backend.add_tokens, new)


def _as_llama(fields: dict[str, Any], backend: Backend, if_legacy: str) -> Backend:
    """Return the vocabulary under the rules of transformers' LlamaTokenizer, which keeps no others.

    `if_legacy` says before which parts of a text a space goes if the files are `legacy`.
    """
    model = backend.model
    if not isinstance(model, models.BPE):
        raise TypeError(f"a LlamaTokenizer over {type(model).__name__}, it must be BPE")
    model.fuse_unk = model.byte_fallback = True
    model.dropout, model.unk_token, model.ignore_merges = None, None, False
    built = Backend(model)
    prefix = fields.get("add_prefix_space")
    prefix = True if prefix is None else bool(prefix)
    scheme = "never" if not prefix else if_legacy if fields.get("legacy", False) else "first"
    built.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    built.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    if backend.post_processor is not None:
        built.post_processor = backend.post_processor
    return built


def _as_gpt_neox(fields: dict[str, Any], backend: Backend) -> Backend:
    """Return the vocabulary under the rules of transformers' GPTNeoXTokenizer."""
    model = backend.model
    if not isinstance(model, models.BPE):
        raise TypeError(f"a GPTNeoXTokenizer over {type(model).__name__}, it must be BPE")
    model.fuse_unk = model.byte_fallback = model.ignore_merges = False
    model.dropout = model.unk_token = None
    built = Backend(model)
    built.normalizer = normalizers.NFC()
    built.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=fields.get("add_prefix_space") is True
    )
    built.decoder = decoders.ByteLevel()
    return built


def _token(value: Any, **more: Any) -> str | AddedToken:
    """Return a token as files write one: a text, or an object of its text and flags."""
    if isinstance(value, dict):
        return AddedToken(**{k: v for k, v in value.items() if k != "__type"} | more)
    if isinstance(value, str | AddedToken):
        return value
    raise TypeError(f"{value!r:.40} where a token's text must be")


def _text(token: str | AddedToken | dict[str, Any]) -> str:
    token = _token(token)
    return token.content if isinstance(token, AddedToken) else token


def _template(
    directory: Path, settings: dict[str, Any], given: str | None
) -> tuple[str | None, str | None]:
    """Return the template for chats, or None and why."""
    named = sorted((directory / "additional_chat_templates").glob("*.jinja"))
    if given is not None:
        return given, None
    if named:  # Files go before the configuration, whatever it holds.
        values = {file.stem: file.read_text("utf-8") for file in named if file.stem == "default"}
        template, names = values.get("default"), [file.stem for file in named]
    else:
        value = settings.get("chat_template")
        template = default_template(value)
        names = list(value) if isinstance(value, dict) else []
        if isinstance(value, list):
            names = [str(entry.get("name")) for entry in value if isinstance(entry, dict)]
    if template is None and names:
        return None, f"its chat templates are {', '.join(names)}, none of them is the default"
    return template, None
