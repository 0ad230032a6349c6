"""Sessions on disk: any split is restored on any other, damage is refused, a turn is all or
nothing.
"""

import json
import threading
from contextlib import ExitStack
from dataclasses import replace
from operator import le

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cptool import files
from cptool.cache import KVCache
from cptool.errors import UserError
from cptool.session import committing, maintenance, restoring, segments
from cptool.session import store as session
from cptool.session.manifest import Manifest, ModelIdentity, Sequence, sealed
from cptool.sharding import balanced

LAYERS, HEADS, DIM = 2, 4, 2
VOCABULARY = 1000
MODEL = ModelIdentity(
    path="model",
    fingerprint="f" * 64,
    layers=LAYERS,
    kv_heads=HEADS,
    head_dim=DIM,
    vocab_size=VOCABULARY,
)


def new_cache(batch: int, heads: int = HEADS) -> KVCache:
    return KVCache(
        layers=LAYERS, kv_heads=heads, head_dim=DIM, batch=batch, dtype=torch.float32, device="cpu"
    )


def kv_of(layer: int, sequence: int, positions: torch.Tensor, heads: slice) -> torch.Tensor:
    """K and V that say whose they are: [tokens, 2, heads, dim]."""
    code = positions[:, None, None, None] * 1000.0 + sequence * 100 + layer * 10
    which = (
        torch.arange(2)[:, None, None] * 5 + torch.arange(HEADS)[:, None] + torch.arange(DIM) / 10
    )
    return (code + which)[:, :, heads].float()


def store(cache: KVCache, placement, heads: slice = slice(None)) -> None:
    cache.extend(placement)
    for layer in range(LAYERS):
        kv = torch.cat([kv_of(layer, b, p, heads) for b, p in enumerate(placement.sequences())])
        cache.store(layer, kv[:, 0], kv[:, 1])


def save_turn(directory, lengths, starts, ranks, tp, previous):
    """A turn of `lengths` new tokens, computed on `ranks` x `tp` ranks, saved as the engine
    does.
    """
    with ExitStack() as held:
        return _save_turn(directory, lengths, starts, ranks, tp, previous, held)


def _save_turn(directory, lengths, starts, ranks, tp, previous, held):
    directory.mkdir(exist_ok=True)
    revision, written, logits_of = (previous.revision if previous else 0) + 1, [], {}
    total = [s + n for s, n in zip(starts, lengths, strict=True)]
    layout = balanced(lengths, ranks, starts=starts)
    for rank in range(ranks):
        for part in range(tp):
            heads = (part * HEADS // tp, (part + 1) * HEADS // tp)
            cache = new_cache(len(lengths), heads[1] - heads[0])
            store(cache, layout.placement(rank), slice(*heads))
            logits = {
                b: torch.full((VOCABULARY,), float(b))
                for b in range(len(lengths))
                if rank == 0 and part == 0
            }
            segment = segments.write_segment(
                directory,
                cache,
                segments.Addition(
                    revision=revision,
                    rank=rank,
                    kv_heads=heads,
                    since=(0,) * len(lengths),
                    start=tuple(starts),
                    until=tuple(total),
                ),
                logits=logits,
                held=held,
            )
            if segment is not None:
                written.append(segment)
                logits_of |= dict.fromkeys(logits, segment.file)
    sequences = tuple(
        Sequence(tokens=tuple(range(n)), cached=n, logits=logits_of.get(b))
        for b, n in enumerate(total)
    )
    turns = tuple(t for t in previous.turns if all(map(le, t, total))) if previous else ()
    manifest = Manifest(
        session=previous.session if previous else "5" * 16,
        model=MODEL,
        dtype="float32",
        kv_dtype="float32",
        weights="file",
        cp=ranks,
        tp=tp,
        revision=revision,
        turns=turns if turns[-1:] == (tuple(total),) else (*turns, tuple(total)),
        sequences=sequences,
        segments=(previous.segments if previous else ()) + tuple(written),
    )
    return committing.commit(directory, manifest)


turns = st.integers(1, 3).flatmap(
    lambda batch: st.lists(
        st.tuples(
            st.lists(st.integers(0, 9), min_size=batch, max_size=batch),
            st.integers(1, 4),
            st.sampled_from([1, 2]),
        ),
        min_size=1,
        max_size=4,
    )
)


@settings(deadline=None, max_examples=40)
@given(turns=turns, ranks=st.integers(1, 5), tp=st.sampled_from([1, 2, 4]))
def test_any_turns_restore_on_any_ranks(tmp_path_factory, turns, ranks, tp):
    """Turns follow each other, some after going back to half of what was said; and one is taken
    back at the end.
    """
    directory = tmp_path_factory.mktemp("session")
    batch, starts, manifest = len(turns[0][0]), [0] * len(turns[0][0]), None
    for lengths, cp, parts in turns:
        if manifest is not None and parts == 2:
            manifest = manifest.truncated([s // 2 for s in starts])
            starts = [sequence.cached for sequence in manifest.sequences]
        manifest = save_turn(directory, lengths, starts, cp, parts, manifest)
        starts = [s + n for s, n in zip(starts, lengths, strict=True)]
    assert maintenance.problems(directory, session.load(directory)) == []
    if len(manifest.turns) > 1:
        maintenance.roll_back(directory, manifest, 1)
    else:
        maintenance.compact(directory, manifest)
    manifest = session.load(directory)
    assert maintenance.problems(directory, manifest) == []
    starts = [sequence.cached for sequence in manifest.sequences]
    held, on_rank = [[] for _ in range(batch)], []
    for rank in range(ranks):
        for part in range(tp):
            heads = (part * HEADS // tp, (part + 1) * HEADS // tp)
            cache = new_cache(batch, heads[1] - heads[0])
            placements = restoring.restore(
                directory, manifest, cache, rank=rank, ranks=ranks, kv_heads=heads
            )
            assert torch.equal(placements[rank].positions, cache.held.positions)
            for b, positions in enumerate(placements[rank].sequences()):
                assert (positions.diff() > 0).all()
                for layer in range(LAYERS):
                    assert torch.equal(
                        cache.tokens_from(layer, b, 0), kv_of(layer, b, positions, slice(*heads))
                    )
        lengths = cache.lengths
        assert all(abs(n - s / ranks) < 1 for n, s in zip(lengths, starts, strict=True))
        on_rank.append(sum(lengths))
        for b, positions in enumerate(placements[rank].sequences()):
            held[b] += positions.tolist()
    # Ranks that take back what they wrote hold equal parts of each sequence, and of all together
    # but for what does not divide of longer ones.
    long = sum(s > ranks for s in starts)
    assert max(on_rank) - min(on_rank) <= max(1, long)
    assert [sorted(h) for h in held] == [list(range(s)) for s in starts]
    if any(starts):
        assert set(restoring.read_logits(directory, manifest)) == {
            b for b, s in enumerate(manifest.sequences) if s.logits
        }


@pytest.fixture
def saved(tmp_path):
    directory = tmp_path / "s"
    return directory, save_turn(directory, [40, 7], [0, 0], 2, 1, None)


def test_manifest_round_trip(saved):
    directory, manifest = saved
    assert session.load(directory) == manifest


def test_only_named_files_remain(saved):
    directory, manifest = saved
    left = [
        "segment-00002-000-000-0123dead.safetensors",  # a turn that was killed
        "manifest.json.0123dead.tmp",
        "segment-00002-000-000-0123dead.safetensors.tmp",  # as earlier versions had them
        "manifest.tmp",
    ]
    for name in left:
        (directory / name).write_text("left by a killed turn")
    (directory / ".tmpQx71aZ").write_bytes(b"88888888" + b'{"kv.0":{"dtype"')
    manifest = save_turn(directory, [1, 1], [40, 7], 2, 1, manifest)
    assert {p.name for p in directory.iterdir()} == {"manifest.json"} | {
        s.file for s in manifest.segments
    }


def test_a_segment_without_a_manifest_changes_nothing(saved):
    directory, manifest = saved
    cache = new_cache(2)
    store(cache, balanced([3, 3], 1, starts=[40, 7]).placement(0))
    segments.write_segment(
        directory,
        cache,
        segments.Addition(
            revision=2, rank=0, kv_heads=(0, HEADS), since=(0, 0), start=(40, 7), until=(43, 10)
        ),
        logits={},
        held=ExitStack(),
    )
    assert session.load(directory) == manifest


def test_two_runs_from_one_turn_cannot_both_commit(saved):
    directory, manifest = saved
    save_turn(directory, [1, 1], [40, 7], 1, 1, manifest)
    with pytest.raises(RuntimeError, match="changed by another run"):
        save_turn(directory, [2, 2], [40, 7], 1, 1, manifest)
    assert session.load(directory).revision == 2


def test_of_two_commits_at_the_same_time_one_fails(saved, monkeypatch):
    directory, manifest = saved
    next_one = replace(manifest, revision=manifest.revision + 1)
    synced, late = files.sync, []

    def second():
        with pytest.raises(RuntimeError, match="changed by another run"):
            committing.commit(directory, next_one.without_kv())
        late.append(session.load(directory))

    def sync(path):
        if not thread.ident:
            thread.start()
            thread.join(0.3)  # it must wait, so this passes only by the clock
        synced(path)

    thread = threading.Thread(target=second)
    monkeypatch.setattr(files, "sync", sync)
    committing.commit(directory, next_one)
    thread.join()
    assert late == [next_one]


def test_damage_is_refused_in_one_line(saved):
    directory, manifest = saved
    file = directory / manifest.segments[0].file
    whole = file.read_bytes()
    file.write_bytes(whole[:-10] + bytes(10))
    with pytest.raises(UserError, match="does not match its checksum"):
        segments.verify(directory, manifest.segments)
    file.write_bytes(whole[:-1])
    with pytest.raises(
        UserError, match=f"has {len(whole) - 1} bytes, the manifest says {len(whole)}"
    ):
        session.load(directory)
    file.unlink()
    with pytest.raises(UserError, match="is missing"):
        session.load(directory)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"format": 99}', '{"format": 1}', '{"format": 1, "model": 3}']
)
def test_hostile_manifests_are_refused_in_one_line(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="not a readable session manifest") as error:
        session.load(tmp_path)
    assert "\n" not in str(error.value)


def unsealed(manifest):
    fields = json.loads(manifest.dump())
    del fields["sha256"]
    return fields


def test_a_manifest_that_changed_on_disk_is_refused(saved):
    directory, manifest = saved
    path, text = directory / "manifest.json", manifest.dump()
    tokens = json.dumps(manifest.sequences[0].tokens, separators=(",", ":"))
    assert text.count(f'"tokens":{tokens}') == 1
    changed = (manifest.sequences[0].tokens[0] + 1, *manifest.sequences[0].tokens[1:])
    path.write_text(text.replace(tokens, json.dumps(changed, separators=(",", ":"))))
    with pytest.raises(UserError, match=r"not a readable session manifest .its checksum is that"):
        session.load(directory)
    path.write_text(json.dumps(unsealed(manifest)))
    with pytest.raises(UserError, match="it has no checksum"):
        session.load(directory)


def test_segment_names_cannot_leave_the_directory(saved):
    directory, manifest = saved
    fields = unsealed(manifest)
    fields["segments"][0]["file"] = "../elsewhere.safetensors"
    (directory / "manifest.json").write_text(sealed(fields))
    with pytest.raises(UserError, match="not a readable session manifest"):
        session.load(directory)


def test_logits_must_be_in_a_segment(saved):
    directory, manifest = saved
    fields = unsealed(manifest)
    fields["sequences"][0]["logits"] = "elsewhere.safetensors"
    (directory / "manifest.json").write_text(sealed(fields))
    with pytest.raises(UserError, match="not a readable session manifest"):
        session.load(directory)


def test_places_that_are_not_for_a_new_session(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        session.check_new(tmp_path / "file")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"thesis.tex"):
        session.check_new(tmp_path / "mine")
    session.check_new(tmp_path / "new")


def test_a_place_behind_a_link_that_leads_nowhere_is_refused_before_the_run(tmp_path):
    link = tmp_path / "link"
    link.symlink_to("missing")
    for place in (link, link / "s"):
        with pytest.raises(UserError, match="link is a link that leads nowhere"):
            session.check_writable(place)
    (tmp_path / "missing").mkdir()
    session.check_writable(link)


def test_another_model_is_refused(saved):
    _directory, manifest = saved
    session.check_model(manifest, MODEL)
    with pytest.raises(UserError, match="is not the model of this session"):
        session.check_model(manifest, replace(MODEL, path="other", fingerprint="e" * 64))
    with pytest.raises(UserError, match="head_dim 2, its model model has 4"):
        session.check_model(manifest, replace(MODEL, head_dim=4))
