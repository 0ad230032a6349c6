"""The fingerprint of a checkpoint covers every byte, and is remembered only while it holds."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from test_checkpoint_huggingface import tiny

from cptool.checkpoint import fingerprint as fingerprints
from cptool.checkpoint import open_checkpoint
from cptool.checkpoint.tensors import byte_ranges
from cptool.distributed import launch
from cptool.distributed.options import RankOptions
from cptool.engine.setup.loading import Setup, load_for
from cptool.errors import RunError


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A checkpoint written an hour ago, and an empty cache directory."""
    monkeypatch.setenv("CPTOOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprints, "_SETTLED_NS", -(10**12))  # ctime cannot be set back
    tiny().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def taken(path: Path) -> str:
    return open_checkpoint(str(path)).fingerprint


@pytest.fixture
def reads(monkeypatch):
    """How often a checkpoint was read in full."""
    count, digest = [], fingerprints._digest

    def counted(checkpoint):
        count.append(checkpoint)
        return digest(checkpoint)

    monkeypatch.setattr(fingerprints, "_digest", counted)
    return count


def entries(saved: Path) -> list[Path]:
    folder = saved.parent / "cache" / "fingerprints"
    return [path for path in folder.iterdir() if not path.name.startswith("lock-")]


def test_fields_of_the_configuration_count_where_they_are_not_the_default(saved):
    """A field that is added later leaves the fingerprints of older sessions as they are."""
    checkpoint = open_checkpoint(str(saved))
    written = fingerprints._configuration(checkpoint)
    assert "score_scale" not in written and "rope_scaling" in written
    checkpoint.config = replace(checkpoint.config, score_scale=0.5, windows=(4, None))
    changed = fingerprints._configuration(checkpoint)
    assert '"score_scale": 0.5' in changed and '"windows": [4, null]' in changed


def test_each_byte_of_each_tensor_counts(saved, monkeypatch):
    monkeypatch.setattr(fingerprints, "_BLOCK", 1000)  # tensors of several blocks
    monkeypatch.setattr(fingerprints, "_PIECE", 300)
    file, whole = saved / "model.safetensors", taken(saved)
    data = file.read_bytes()
    stored = sorted(open_checkpoint(str(saved)).stored.items())
    for _, tensor in stored[:: len(stored) // 4]:
        for at in {tensor.nbytes // 2, 999 % tensor.nbytes, tensor.nbytes - 1}:
            changed = bytearray(data)
            changed[tensor.offset + at] ^= 1
            file.write_bytes(changed)
            assert taken(saved) != whole
    file.write_bytes(data)
    assert taken(saved) == whole


def test_blocks_and_threads_do_not_show(saved, monkeypatch):
    whole = fingerprints._digest(open_checkpoint(str(saved)))
    monkeypatch.setattr(fingerprints, "_PIECE", 77)
    monkeypatch.setattr(fingerprints, "_threads", lambda: 7)
    assert fingerprints._digest(open_checkpoint(str(saved))) == whole


def test_a_checkpoint_is_read_once(saved, reads):
    first = taken(saved)
    assert taken(saved) == first and len(reads) == 1
    saved.rename(saved.with_name("moved"))
    assert taken(saved.with_name("moved")) == first  # the files are the same, only found elsewhere
    assert len(reads) <= 2
    for path in (saved.parent / "cache" / "fingerprints").iterdir():
        assert path.stat().st_mode & 0o777 == 0o600
    assert (saved.parent / "cache" / "fingerprints").stat().st_mode & 0o777 == 0o700


def test_a_change_in_place_with_its_times_set_back_is_noticed(saved, reads):
    file, first = saved / "model.safetensors", taken(saved)
    status, tensor = file.stat(), open_checkpoint(str(saved)).stored["model.norm.weight"]
    with file.open("r+b") as opened:
        opened.seek(tensor.offset + 5)
        opened.write(b"\x01")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert taken(saved) != first and len(reads) == 2


def test_files_written_just_now_are_not_remembered(saved, reads, monkeypatch):
    monkeypatch.setattr(fingerprints, "_SETTLED_NS", 10**12)
    assert taken(saved) == taken(saved) and len(reads) == 2
    assert entries(saved) == []


@pytest.mark.parametrize("damage", [b"", b"\xff" * 130, b"0" * 64, b"0" * 64 + b" " + b"1" * 64])
def test_what_is_remembered_must_be_as_it_was_written(saved, reads, damage):
    first = taken(saved)
    (entry,) = entries(saved)
    entry.write_bytes(damage)
    assert taken(saved) == first and len(reads) == 2
    entry.unlink()
    os.mkfifo(entry)
    assert taken(saved) == first


@pytest.mark.parametrize("cache", ["/dev/null/cache", "/proc/cache"])
def test_without_a_cache_directory_it_is_taken_each_time(saved, reads, monkeypatch, cache):
    first = taken(saved)
    monkeypatch.setenv("CPTOOL_CACHE", cache)
    assert taken(saved) == taken(saved) == first and len(reads) == 3


def test_a_file_that_changes_while_it_is_read(saved, monkeypatch):
    checkpoint, read = open_checkpoint(str(saved)), fingerprints._read

    def cut(descriptor, piece, at, path):
        os.truncate(path, at + 1)
        read(descriptor, piece, at, path)

    monkeypatch.setattr(fingerprints, "_read", cut)
    with pytest.raises(RunError, match="changed while it was read"):
        _ = checkpoint.fingerprint


def test_a_file_that_another_one_replaces(saved):
    """What is in memory by then and what the name leads to are two models, whatever the size and
    the time of the last write.
    """
    file, checkpoint = saved / "model.safetensors", open_checkpoint(str(saved))
    before, status = checkpoint.state, file.stat()
    other = saved / "other"
    other.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\1")
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(file)
    assert file.stat().st_size == status.st_size
    with pytest.raises(RunError, match="was changed since it was opened"):
        _ = checkpoint.fingerprint
    setup = Setup(model=str(saved), dtype="float32", state=before)
    with pytest.raises(RunError, match="was changed while it was loaded"):
        launch.run(load_for, setup, ranks=RankOptions(cp=1, tp=1, device="cpu", threads=1))
    assert open_checkpoint(str(saved)).state != before


def test_what_is_left_to_read(saved):
    checkpoint = open_checkpoint(str(saved))
    size = sum(tensor.nbytes for tensor in checkpoint.stored.values())
    assert fingerprints.bytes_to_read(checkpoint, checkpoint.state) == size > 0
    assert checkpoint.fingerprint
    assert fingerprints.bytes_to_read(checkpoint, checkpoint.state) == 0


def test_ranks_of_a_launcher_read_it_once(saved):
    """Processes that want one fingerprint at the same time take turns."""
    code = (
        "import sys; from cptool.checkpoint import fingerprint as f, open_checkpoint\n"
        "f._SETTLED_NS, digest = -10**12, f._digest\n"
        "f._digest = lambda c: (print('read'), digest(c))[1]\n"
        "print(open_checkpoint(sys.argv[1]).fingerprint)"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code, saved], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    told = [process.communicate(timeout=120)[0].split() for process in running]
    assert sum(lines.count("read") for lines in told) == 1
    assert len({lines[-1] for lines in told}) == 1


def test_ranges_of_a_tensor_cover_it_once(saved):
    for tensor in open_checkpoint(str(saved)).stored.values():
        for size in (1, 7, 1000, 1 << 20):
            end = tensor.offset
            for start in range(0, tensor.nbytes, size):
                for _, offset, count in byte_ranges(
                    tensor, start, min(start + size, tensor.nbytes)
                ):
                    assert offset == end
                    end += count
            assert end == tensor.offset + tensor.nbytes
