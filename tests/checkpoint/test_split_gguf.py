"""Models in several GGUF files, written by the gguf package."""

import shutil

import numpy as np
import pytest
import torch
from conftest import refusal
from gguf_checkpoint import HIDDEN, SHAPES, write

from cptool.checkpoint import open_checkpoint
from cptool.session.store import identity

MATRICES = {name: "Q8_0" for name, shape in SHAPES.items() if len(shape) == 2}


def written(directory, every=5, **changes):
    """The parts of a small quantised model in a new directory."""
    directory.mkdir()
    write(directory / "tiny.gguf", types=MATRICES, every=every, **changes)
    return sorted(directory.iterdir())


@pytest.fixture
def parts(tmp_path):
    found = written(tmp_path / "parts")
    assert [path.name for path in found] == [f"tiny-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    return found


def test_any_part_and_the_directory_open_the_same_model(parts, tmp_path):
    write(tmp_path / "whole.gguf", types=MATRICES)
    whole = open_checkpoint(str(tmp_path / "whole.gguf"))
    for given in (*parts, parts[0].parent):
        found = open_checkpoint(str(given))
        assert found.path == parts[0] and found.name == "tiny"
        assert found.config == whole.config and found.notes == whole.notes
        assert sorted(found.names()) == sorted(whole.names())
        assert found.fingerprint == whole.fingerprint
    assert {tensor.file for tensor in found.stored.values()} == set(parts)
    for name in whole.names():
        assert torch.equal(found.read(name), whole.read(name))
        if len(whole.shape(name)) == 2:  # mapped as it is stored, in whichever file
            assert torch.equal(found.read_stored(name), whole.read_stored(name))


def test_divisors_of_a_split_llama_are_read_from_their_own_file(tmp_path):
    divisors = np.ones(HIDDEN // 8 // 2, np.float32)
    written(tmp_path / "ones", tensors={"rope_freqs": divisors})
    assert open_checkpoint(str(tmp_path / "ones")).config.rope_scaling is None
    written(tmp_path / "threes", tensors={"rope_freqs": divisors * np.float32(3)})
    assert "not those of llama3 scaling" in refusal(tmp_path / "threes")


def test_a_missing_part_is_named(parts):
    parts[1].unlink()
    for given in (parts[0], parts[2], parts[0].parent):
        assert refusal(given) == f"{parts[1]}: part 2 of 3 is missing; fetch it too"
    parts[1].symlink_to("elsewhere")
    assert f"{parts[1]}: part 2 of 3 is a link to elsewhere" in refusal(parts[0])


def test_a_part_in_the_place_of_another(parts):
    shutil.copy(parts[1], parts[2])
    message = refusal(parts[0])
    assert message.startswith(f"{parts[2]}: by its header (split.no 1) it is part 2, and its name")


def test_names_that_do_not_fit(parts):
    renamed = parts[1].rename(parts[1].with_name("second.gguf"))
    assert "part 2 of 3, and its name does not tell where the others are" in refusal(renamed)
    other = renamed.rename(renamed.with_name("tiny-00002-of-00004.gguf"))
    assert "its header says that it is one of 3 parts and its name says otherwise" in refusal(other)


def test_a_number_of_parts_that_no_model_has(tmp_path):
    write(tmp_path / "tiny-00001-of-00003.gguf", **{"split.count": 2**20})
    assert "split.count is 1048576; convert" in refusal(tmp_path / "tiny-00001-of-00003.gguf")


def test_a_session_finds_the_parts_of_a_model_that_are_links(parts, tmp_path):
    (tmp_path / "links").mkdir()
    for number, part in enumerate(parts):  # as in the hub's cache
        blob = part.rename(tmp_path / f"{number}")
        (tmp_path / "links" / part.name).symlink_to(blob)
    checkpoint = open_checkpoint(str(tmp_path / "links"))
    assert open_checkpoint(identity(checkpoint).path).fingerprint == checkpoint.fingerprint


def test_a_part_of_another_model(parts, tmp_path):
    def with_second(path):
        shutil.copy(path, parts[1])
        return refusal(parts[0])

    two = written(tmp_path / "two", every=6)
    assert "split.count is 2, the first part says 3; the two are not of one" in with_second(two[1])
    extra = {f"blk.0.more{i}": np.zeros(4, np.float32) for i in range(2)}
    more = written(tmp_path / "more", tensors=extra)
    assert "split.tensors.count is 14, the first part says 12" in with_second(more[1])
    fours = written(tmp_path / "fours", every=4)  # as many tensors in as many parts
    assert "is in tiny-00001-of-00003.gguf too" in with_second(fours[1])
    for path, part in zip(fours[:2], parts, strict=False):
        shutil.copy(path, part)
    assert "split.tensors.count is 12, and the 3 parts hold 10" in refusal(parts[0])


def test_a_directory_of_several_models(parts):
    for path in parts:
        shutil.copy(path, path.with_name(path.name.replace("tiny", "other")))
    message = refusal(parts[0].parent)
    assert "parts of 2 models are in it, among them other-00001-of-00003.gguf and tiny" in message
    assert open_checkpoint(str(parts[2])).name == "tiny"
