"""Loading: every weight to the bit, no copy where none is needed, one copy for all local ranks."""

import os
from pathlib import Path

import pytest
import torch
from llama_reference import SHAPES, random_llama

from cptool.checkpoint import open_checkpoint
from cptool.distributed import shared_memory
from cptool.distributed.launch import run
from cptool.distributed.options import RankOptions
from cptool.distributed.status_board import Board
from cptool.distributed.world import World
from cptool.engine.weights import load_model
from cptool.host import large_pages
from cptool.ops.stored import StoredWeight


def fused(state, layer):
    """The reference's tensors of a layer under the names of ours."""
    theirs = {
        name.removeprefix(f"model.layers.{layer}."): tensor
        for name, tensor in state.items()
        if name.startswith(f"model.layers.{layer}.")
    }
    qkv = [theirs.pop(f"self_attn.{part}_proj.weight") for part in "qkv"]
    gate_up = [theirs.pop(f"mlp.{part}_proj.weight") for part in ("gate", "up")]
    theirs["self_attn.qkv_proj.weight"] = torch.cat(qkv)
    theirs["mlp.gate_up_proj.weight"] = torch.cat(gate_up)
    return {f"layers.{layer}.{name}": tensor for name, tensor in theirs.items()}


def expected(reference):
    state = reference.state_dict()
    ours = {name: state[f"model.{name}"] for name in ("embed_tokens.weight", "norm.weight")}
    if not reference.config.tie_word_embeddings:
        ours["lm_head.weight"] = state["lm_head.weight"]
    for layer in range(reference.config.num_hidden_layers):
        ours |= fused(state, layer)
    return ours


def matrices(model):
    """The parameters of a model, those that stay as the file stores them in float32."""
    kept = {
        f"{name}.weight": module.weight.widened()
        for name, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), StoredWeight)
    }
    return {**dict(model.named_parameters()), **kept}


def assert_same(parameters, reference, dtype):
    wanted = expected(reference)
    assert parameters.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(parameters[name], tensor.to(dtype)), name


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", ["gqa-9-3", "tied"])
def test_weights_are_the_files_to_the_bit(shape, stored, dtype, tmp_path):
    reference = random_llama(SHAPES[shape], tmp_path, stored)
    model = load_model(open_checkpoint(str(tmp_path)), dtype, "cpu")
    assert_same(matrices(model), reference, dtype)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("room", [False, True])
def test_what_lies_in_the_file_is_copied_where_there_is_room(room, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(large_pages, "worth_copying", lambda size: asked.append(size) or room)
    random_llama({}, tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    model = load_model(checkpoint, torch.float32, "cpu")
    file = checkpoint.read("model.norm.weight").untyped_storage().data_ptr()
    copied = {
        name.rsplit(".", 2)[-2]
        for name, parameter in model.named_parameters()
        if parameter.untyped_storage().data_ptr() != file
    }
    everything = {name.rsplit(".", 2)[-2] for name, _ in model.named_parameters()}
    assert copied == (everything if room else {"qkv_proj", "gate_up_proj"})
    assert asked == [sum(parameter.nbytes for parameter in model.parameters())]


def test_loading_draws_no_random_numbers(tmp_path):
    random_llama({}, tmp_path)
    before = torch.get_rng_state()
    load_model(open_checkpoint(str(tmp_path)), torch.float32, "cpu")
    assert torch.equal(torch.get_rng_state(), before)


def without_the_others(tp_rank, tp):
    """The world of a rank that loads its share without the others and never computes."""
    return World(
        rank=0,
        size=1,
        local_rank=0,
        local_size=1,
        cp_rank=0,
        cp=1,
        tp_rank=tp_rank,
        tp=tp,
        device=torch.device("cpu"),
        board=Board(1),
    )


@pytest.mark.parametrize(("shape", "tp"), [("mha", 2), ("mha", 4), ("mqa-5-1", 5), ("gqa-9-3", 3)])
def test_tensor_parallel_shares_make_up_the_whole(shape, tp, tmp_path):
    reference = random_llama({**SHAPES[shape], "intermediate_size": 120}, tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    head_dim, kv_heads = checkpoint.config.head_dim, checkpoint.config.num_key_value_heads
    shares = []
    for rank in range(tp):
        world = without_the_others(rank, tp)
        shares.append(dict(load_model(checkpoint, torch.float32, "cpu", world).named_parameters()))
    layer, state = "layers.1", reference.state_dict()
    for name, dim in (("self_attn.o_proj.weight", 1), ("mlp.down_proj.weight", 1)):
        whole = torch.cat([share[f"{layer}.{name}"] for share in shares], dim=dim)
        assert torch.equal(whole, state[f"model.{layer}.{name}"])
    gate_up = [share[f"{layer}.mlp.gate_up_proj.weight"].chunk(2) for share in shares]
    for i, part in enumerate(("gate", "up")):
        whole = torch.cat([halves[i] for halves in gate_up])
        assert torch.equal(whole, state[f"model.{layer}.mlp.{part}_proj.weight"])
    kv_rows = max(1, kv_heads // tp) * head_dim
    qkv = [s[f"{layer}.self_attn.qkv_proj.weight"] for s in shares]
    parts = list(
        zip(*(p.split([len(p) - 2 * kv_rows, kv_rows, kv_rows]) for p in qkv), strict=True)
    )
    assert torch.equal(torch.cat(parts[0]), state[f"model.{layer}.self_attn.q_proj.weight"])
    for name, rows in zip("kv", parts[1:], strict=True):
        whole = state[f"model.{layer}.self_attn.{name}_proj.weight"]
        if kv_heads < tp:
            assert all(torch.equal(own, whole) for own in rows)
        else:
            assert torch.equal(torch.cat(rows), whole)


def mapping_of(tensor):
    """(device and inode, path) of the file behind a tensor; inode 0 where there is none."""
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(bound, 16) for bound in line.split()[0].split("-"))
        if start <= address < end:
            fields = line.split(maxsplit=5)
            return " ".join(fields[3:5]), fields[5] if len(fields) > 5 else ""
    raise AssertionError("not mapped")


def load_shared(world, path, dtype):
    """Where each rank's parameters are, and which files it has open after loading."""
    checkpoint = open_checkpoint(path)
    model = load_model(checkpoint, dtype, "cpu", world)
    if world.tp == 1:
        for name, parameter in load_model(checkpoint, dtype, "cpu").named_parameters():
            assert torch.equal(model.get_parameter(name), parameter), name
    places = {name: mapping_of(parameter) for name, parameter in model.named_parameters()}
    descriptors = Path("/proc/self/fd").iterdir()
    open_files = [os.readlink(fd) for fd in descriptors if fd.is_symlink()]
    return world.gather((places, open_files))


@pytest.mark.parametrize(("cp", "tp"), [(2, 1), (1, 2)])
def test_local_ranks_share_one_copy(cp, tp, tmp_path):
    random_llama({}, tmp_path)
    ranks = run(
        load_shared,
        str(tmp_path),
        torch.bfloat16,
        ranks=RankOptions(cp=cp, tp=tp, device="cpu", threads=1),
    )
    (first, _), (second, _) = ranks
    assert first == second
    assert len(set(first.values())) == 1
    # The memory has no name in any file system, and no descriptor any more.
    file = first["norm.weight"][1]
    assert file.startswith("/memfd:cptool-") and file.endswith("(deleted)")
    assert not any("memfd" in file for _, open_files in ranks for file in open_files)


def load_on_two_machines(world, path):
    """Load as if ranks 0 and 1 were on one machine and ranks 2 and 3 on another."""
    machine = range(world.rank // 2 * 2, world.rank // 2 * 2 + 2)
    pids = dict(enumerate(world.gather(os.getpid())))
    elsewhere = {f"/proc/{pids[rank]}/" for rank in pids if rank not in machine}

    def seen_from_here(path, name):
        return not path.startswith(tuple(elsewhere)) and is_here(path, name)

    is_here, shared_memory.is_here = shared_memory.is_here, seen_from_here
    try:
        return load_shared(world, path, torch.bfloat16)
    finally:
        shared_memory.is_here = is_here


def test_each_machine_has_its_copy(tmp_path):
    random_llama({}, tmp_path)
    ranks = run(
        load_on_two_machines, str(tmp_path), ranks=RankOptions(cp=4, device="cpu", threads=1)
    )
    places = [where for where, _ in ranks]
    assert places[0] == places[1] and places[2] == places[3]
    assert not set(places[0].values()) & set(places[2].values())


def test_local_ranks_copy_only_what_the_file_does_not_have(tmp_path):
    random_llama({}, tmp_path)
    ranks = run(
        load_shared, str(tmp_path), torch.float32, ranks=RankOptions(cp=2, device="cpu", threads=1)
    )
    (first, _), (second, _) = ranks
    assert first == second
    shared = {name for name, (_, path) in first.items() if "memfd" in path}
    assert {name.rsplit(".", 2)[-2] for name in shared} == {"qkv_proj", "gate_up_proj"}


def test_work_is_dealt_evenly_and_whole():
    sizes = [9, 1, 7, 3, 3, 2, 5, 8, 1, 1]
    shares = shared_memory._deal({i: (size,) for i, size in enumerate(sizes)}, 3)
    assert sorted(key for share in shares for key in share) == list(range(len(sizes)))
    loads = [sum(sizes[key] for key in share) for share in shares]
    assert max(loads) - min(loads) <= 1
