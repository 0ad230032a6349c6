"""A manifest says what can be, or is refused in one line by everything that reads it.

Each crafted manifest carries a right checksum: what is found is found in its contents.
"""

import copy
import json
import os

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from test_session import DIM, HEADS, LAYERS, VOCABULARY, new_cache, save_turn

from cptool.cli.main import main
from cptool.errors import UserError
from cptool.files import sha256
from cptool.session import maintenance, restoring, store
from cptool.session.manifest import Manifest, sealed
from cptool.session.manifest_format import parse


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two turns of two sequences on two ranks of two, the second after going back."""
    directory = tmp_path_factory.mktemp("made") / "s"
    first = save_turn(directory, [40, 7], [0, 0], 2, 2, None)
    back = first.truncated([31, 7])
    save_turn(directory, [12, 3], [s.cached for s in back.sequences], 2, 2, back)
    return directory


def fields_of(directory) -> dict:
    fields = json.loads((directory / store.MANIFEST).read_text())
    del fields["sha256"]
    return fields


WRONG = [
    None,
    True,
    False,
    -1,
    0,
    1,
    2**31,
    2**63,
    10**19,
    10**400,
    1.0,
    64.0,
    "",
    "x",
    "1",
    "\0",
    "../manifest.json",
    "f" * 64,
    "f" * 63,
    "F" * 64,
    [],
    [0],
    [[]],
    [None],
    {},
    {"a": 1},
    "a" * 100_000,
]


def places(value, path=()):
    """Where a value stands in nested lists and objects; of long lists the first and the last."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for i in sorted({0, len(value) - 1} & set(range(len(value)))):
            yield from places(value[i], (*path, i))


def at(value, path):
    for step in path:
        value = value[step]
    return value


def mutations(fields: dict):
    """(what, manifest) with one place changed: to a wrong value, removed, doubled, one more or one
    less, or with a key that nobody knows.
    """
    for path in places(fields):
        if not path:
            continue
        old = at(fields, path)
        values = [*WRONG]
        if type(old) is int:
            values += [old + 1, old - 1, float(old), str(old)]
        if isinstance(old, list):
            values += [old[:-1], [*old, *old[-1:]], old[::-1]]
        for new in values:
            if new == old and type(new) is type(old):
                continue
            changed = copy.deepcopy(fields)
            at(changed, path[:-1])[path[-1]] = new
            yield f"{path} = {new!r:.40}", changed
        changed = copy.deepcopy(fields)
        del at(changed, path[:-1])[path[-1]]
        yield f"del {path}", changed
        if isinstance(old, dict):
            changed = copy.deepcopy(fields)
            at(changed, path)["other"] = 1
            yield f"{path} with another key", changed


def text_of(fields: dict) -> bytes:
    return sealed(fields).encode()


# What says nothing about the KV: any value of the right kind is as good as the one it replaces.
HARMLESS = {"session", "path", "cp", "tp", "ended", "fingerprint", "vocab_size", "chat"}


def test_every_mutation_is_refused_or_harmless(made):
    """At each place of a manifest, each wrong value: more than a thousand."""
    fields = fields_of(made)
    whole = parse(text_of(fields))
    count = 0
    for what, changed in mutations(fields):
        count += 1
        try:
            found = parse(text_of(changed))
        except ValueError as error:
            assert len(str(error)) < 400 and "\n" not in str(error), what
            continue
        same = json.loads(found.dump())
        path = next((p for p in places(fields) if not equal(fields, same, p)), None)
        if path is not None and path[-1] not in HARMLESS and path[0] not in HARMLESS:
            # What the manifest alone does not tell, the segments do.
            assert told_by_the_files(made, found) or covers(found, whole), what
    assert count > 1000


def equal(first, second, path) -> bool:
    try:
        return at(first, path) == at(second, path) or isinstance(at(first, path), (dict, list))
    except (LookupError, TypeError):
        return False


def told_by_the_files(directory, manifest) -> bool:
    try:
        for segment in manifest.segments:
            store.check_size(directory, segment)
        return bool(maintenance.problems(directory, manifest))
    except UserError:
        return True


def covers(found: Manifest, whole: Manifest) -> bool:
    """Whether both have the same KV, and it is that of as many tokens."""
    return [(s.cached, len(s.tokens)) for s in found.sequences] == [
        (s.cached, len(s.tokens)) for s in whole.sequences
    ] and {s.file for s in found.segments} == {s.file for s in whole.segments}


RAW = {
    "nothing": b"",
    "no object": b"[]",
    "deep": b"[" * 1_000_000,
    "deep objects": b'{"a":' * 100_000,
    "not UTF-8": b'{"format": 2, "session": "\xff\xfe"}',
    "a number of 10,000 digits": b'{"format": ' + b"9" * 10_000 + b"}",
    "not a number": b'{"format": NaN}',
    "infinite": b'{"format": Infinity}',
    "a key twice": b'{"format": 2, "format": 2}',
    "format true": b'{"format": true}',
    "format 2.0": b'{"format": 2.0}',
    "a later format": b'{"format": 3}',
    "an earlier format": b'{"format": 1, "model": {}}',
    "zeros": bytes(1000),
}


@pytest.mark.parametrize("name", RAW)
def test_bytes_that_are_no_manifest(tmp_path, name):
    (tmp_path / store.MANIFEST).write_bytes(RAW[name])
    with pytest.raises(UserError, match="not a readable session manifest") as told:
        store.load(tmp_path)
    assert "\n" not in str(told.value) and len(str(told.value)) < 500


def test_a_manifest_that_is_no_file_or_too_long(tmp_path, monkeypatch):
    path = tmp_path / store.MANIFEST
    os.mkfifo(path)  # nobody ever writes to it
    with pytest.raises(UserError, match="not a regular file"):
        store.load(tmp_path)
    path.unlink()
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match="at most 268435456 are read"):
        store.load(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="it is not a regular file"):
        store.load(tmp_path)
    path.rmdir()
    path.symlink_to(path)
    with pytest.raises(UserError, match="it is a link that leads to itself"):
        store.load(tmp_path)


CRAFTED = {
    "KV of a position is missing": lambda f: f["segments"][0]["until"].__setitem__(0, 20),
    "a rank is missing": lambda f: f["segments"].__delitem__(slice(0, 2)),
    "half of the KV heads are missing": lambda f: f["segments"].__delitem__(0),
    "the heads of two segments overlap": lambda f: f["segments"][0].update(kv_heads=[0, 3]),
    "a segment twice": lambda f: f["segments"].append(f["segments"][0]),
    "more KV than tokens": lambda f: f["sequences"][0].update(cached=44),
    "less KV than the segments hold": lambda f: f["sequences"][0].update(cached=41),
    "a token beyond the vocabulary": lambda f: f["sequences"][0]["tokens"].__setitem__(3, 1000),
    "a negative token": lambda f: f["sequences"][0]["tokens"].__setitem__(3, -1),
    "a true token": lambda f: f["sequences"][0]["tokens"].__setitem__(1, True),
    "a sequence fewer": lambda f: f["sequences"].pop(),
    "turns that shrink": lambda f: f.update(turns=[[50, 9], [42, 10]]),
    "no turn": lambda f: f.update(turns=[]),
    "a revision that a segment is ahead of": lambda f: f.update(revision=1),
    "another name": lambda f: f["segments"][0].update(file="segment-00001-000-000-x.safetensors"),
    "a name above": lambda f: f["segments"][0].update(file="../s/" + f["segments"][0]["file"]),
    "a dtype that is none": lambda f: f.update(dtype="int8"),
    "a type of KV that is none": lambda f: f.update(kv_dtype="int8"),
    "weights that are none": lambda f: f.update(weights="int4"),
    "too small a file": lambda f: f["segments"][0].update(bytes=100),
    "layers that are not there": lambda f: f["model"].update(layers=3),
    "more ranks than there are": lambda f: f.update(cp=10**9),
    "KV of all tokens, and no logits": lambda f: f["sequences"][0].update(logits=None),
    "a revision that no other can follow": lambda f: f.update(revision=2**31 - 1),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_every_reader_refuses_in_one_line(made, tmp_path, name):
    """`session` by all its commands, `decode`, `prefill` and `chat`, before any rank is started."""
    fields = fields_of(made)
    CRAFTED[name](fields)
    directory = tmp_path / "s"
    directory.mkdir()
    for file in made.glob("segment-*"):
        (directory / file.name).hardlink_to(file)
    (directory / store.MANIFEST).write_bytes(text_of(fields))
    where = str(directory)
    for code, *command in [
        (1, "session", "verify", where),
        (2, "session", "show", where),
        (2, "session", "compact", where),
        (2, "session", "rollback", where),
        (2, "decode", where, "-n", "1"),
        (2, "chat", where),
        (2, "prefill", "model", "--synthetic", "9", "--session", where),
    ]:
        result = CliRunner().invoke(main, command)
        assert result.exit_code == code, (command, result.output, result.stderr)
        assert len(result.stderr.splitlines()) == 1, result.stderr
        assert "restore it or prefill anew" in result.stderr
    left = {file.name for file in directory.iterdir()}
    assert left == {file.name for file in made.iterdir()}


def rewritten(directory, change):
    """The first segment with `change` done to its tensors, under a manifest that fits its bytes."""
    from safetensors.torch import load_file, save_file

    fields = fields_of(directory)
    segment = fields["segments"][0]
    path = directory / segment["file"]
    tensors = load_file(path)
    change(tensors)
    path.unlink()  # shared with other tests
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    segment["bytes"], segment["sha256"] = path.stat().st_size, sha256(path)
    (directory / store.MANIFEST).write_bytes(text_of(fields))


CONTENTS = {
    "positions in another order": lambda t: t.update(positions=t["positions"].flip(0)),
    "a position twice": lambda t: t["positions"].__setitem__(1, int(t["positions"][0])),
    "a position beyond": lambda t: t["positions"].__setitem__(-1, 2**31 - 1),
    "a negative position": lambda t: t["positions"].__setitem__(0, -1),
    "positions of another type": lambda t: t.update(positions=t["positions"].long()),
    "no positions": lambda t: t.pop("positions"),
    "fewer positions": lambda t: t.update(positions=t["positions"][:-1]),
    "KV in another dtype": lambda t: t.update({"kv.0": t["kv.0"].half().repeat(1, 1, 1, 2)}),
    "KV of other heads": lambda t: t.update({"kv.1": t["kv.1"].flatten(2)[..., None]}),
    "a layer less": lambda t: t.pop("kv.1"),
    "KV of fewer tokens": lambda t: t.update({"kv.0": t["kv.0"][1:]}),
    "a layer more": lambda t: t.update({"kv.2": t["kv.1"].clone()}),
    "logits of a sequence more": lambda t: t.update({"logits.2": torch.zeros(VOCABULARY)}),
    "a tensor of another name": lambda t: t.update(x=torch.zeros(3)),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_what_a_segment_holds_is_checked_before_anything_is_taken_over(made, tmp_path, name):
    directory = tmp_path / "s"
    directory.mkdir()
    for file in made.iterdir():
        (directory / file.name).hardlink_to(file)
    (directory / store.MANIFEST).unlink()
    (directory / store.MANIFEST).write_bytes((made / store.MANIFEST).read_bytes())
    rewritten(directory, CONTENTS[name])
    try:
        manifest = store.load(directory)
    except UserError:  # too few bytes for what it must hold
        return
    assert maintenance.problems(directory, manifest)
    cache = new_cache(2)
    with pytest.raises(UserError) as told:
        restoring.restore(directory, manifest, cache, rank=0, ranks=1, kv_heads=(0, HEADS))
    assert "\n" not in str(told.value)
    assert cache.lengths == [0, 0] and cache.nbytes == 0


def test_older_manifests_have_kv_of_the_dtype(made):
    fields = fields_of(made)
    assert (fields.pop("kv_dtype"), fields.pop("weights")) == ("float32", "file")
    older = parse(text_of(fields))
    assert (older.kv_dtype, older.weights) == ("float32", "file")


def test_kv_of_another_dtype_is_refused(made):
    fields = fields_of(made)
    manifest = parse(text_of({**fields, "kv_dtype": "float16"}))
    assert "kv.0 is F32" in maintenance.problems(made, manifest)[0]
    with pytest.raises(UserError, match=r"kv.0 is F32"):
        restoring.restore(made, manifest, new_cache(2), rank=0, ranks=1, kv_heads=(0, HEADS))


def test_logits_of_another_vocabulary_are_refused(tmp_path):
    directory = tmp_path / "s"
    save_turn(directory, [4], [0], 1, 1, None)
    rewritten(directory, lambda t: t.update({"logits.0": torch.zeros(VOCABULARY - 1)}))
    with pytest.raises(UserError, match=r"logits.0 is F32 .999., the manifest makes it F32 .1000."):
        restoring.read_logits(directory, store.load(directory))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_choose_no_token_are_refused(tmp_path, value):
    directory = tmp_path / "s"
    save_turn(directory, [4], [0], 1, 1, None)
    rewritten(directory, lambda t: t["logits.0"].__setitem__(7, value))
    manifest = store.load(directory)
    (told,) = maintenance.problems(directory, manifest)
    assert "logits.0 has no finite largest value; restore it" in told
    with pytest.raises(UserError, match=r"logits.0 has no finite largest value"):
        restoring.read_logits(directory, manifest)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(data=st.data())
def test_a_flipped_byte_of_a_manifest_is_refused(made, data):
    whole = bytearray((made / store.MANIFEST).read_bytes())
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ValueError):
        parse(bytes(whole))


def test_the_shape_of_the_example(made):
    """The cases above rest on it: two revisions, two ranks, two halves of the heads, and a range
    of the first that no longer counts.
    """
    manifest = store.load(made)
    assert maintenance.problems(made, manifest) == []
    assert [s.revision for s in manifest.segments] == [1, 1, 1, 1, 2, 2, 2, 2]
    assert (LAYERS, DIM) == (2, 2)
    assert manifest.segments[0].until[0] == 30 < 40
