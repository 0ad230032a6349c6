"""Process groups that a user's program has made, as the variants of attention take them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from cptool.distributed.devices import cores
from cptool.distributed.group import Group
from cptool.errors import UserError
from cptool.model.config import LlamaConfig
from cptool.parallel.ring import Ring
from cptool.parallel.transport import ring_of
from cptool.planning.cost.forward import Forward
from cptool.planning.cost.layer import predict
from cptool.planning.profiles import load_profile
from cptool.variants import names

_rings: dict[tuple[dist.ProcessGroup, torch.device], Ring] = {}
_agreed: dict[Ring, dict[tuple, str]] = {}
_MOST_AGREED = 256


def group_of(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """Return `group`, else torch's default group, else None for a process that is alone.

    Raises UserError if this process is not a member.
    """
    if group is None:
        if not (dist.is_available() and dist.is_initialized()):
            return None
        group = dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):  # what new_group gives those outside
        raise UserError("this process is not a member of `group`; call it on the members alone")
    return group


def ring_for(process_group: dist.ProcessGroup, device: torch.device) -> Ring:
    """Return the ring of a group for tensors on `device`, made at the first call. Collective then.

    Rings are kept as long as their group exists. Raises UserError if the group has no backend that
    carries such tensors.
    """
    ring = _rings.get((process_group, device))
    if ring is not None:
        return ring
    for stale in [key for key in _rings if not _exists(key[0])]:
        _agreed.pop(_rings.pop(stale), None)
    carrier = _backend(process_group, device.type)
    staged = device.type != "cpu" and carrier != "nccl"
    carrier = _backend(process_group, "cpu") if staged else carrier
    if not carrier:
        raise UserError(
            f"the tensors are on {device.type}, and `group` carries none of those (backend "
            f"{dist.get_backend(process_group)}); make it with backend cpu:gloo,cuda:nccl"
        )
    group = Group(process_group, device, staged=staged, direct=carrier not in ("gloo", "nccl"))
    # NCCL needs every rank of a group in the group's first operation.
    group.sum_(torch.ones(1, device=device))
    ring = _rings[process_group, device] = ring_of(group)
    return ring


def check_alike(
    ring: Ring,
    *,
    lengths: Sequence[int],
    heads: Sequence[int],
    dtypes: Sequence[torch.dtype],
    causal: bool = True,
    hstu: Sequence[object] = (),
    variant: str = "",
    choose: Callable[[], str] = str,
) -> str:
    """Check that all ranks call with the same arguments, and return the variant. Collective.

    Ranks talk at the first call with these arguments only. hstu: those of
    `cptool.hstu_attention` alone. choose: called for the variant "auto";
    the choice of rank 0 is taken, because ranks may know different profiles of the hardware.
    """
    known = ["", *names(baselines=True)]
    key = (tuple(lengths), tuple(heads), tuple(dtypes), causal, tuple(hstu), variant)
    agreed = _agreed.setdefault(ring, {})
    if key in agreed:
        return agreed[key]
    chosen = choose() if variant == "auto" else variant
    own = {
        "lengths": _digest(tuple(lengths)),
        "heads and widths": _digest(tuple(heads)),
        "dtypes": _digest(tuple(dtypes)),
        "`causal`": int(causal),
        "`targets`, `window`, `scale` or `max_len`": _digest(tuple(hstu)),
        "`variant`": _digest(variant),
    }
    group = ring.group
    place = torch.device("cpu") if group.staged else group.device
    numbers = torch.tensor([*own.values(), known.index(chosen)], device=place)
    everyone = [torch.empty_like(numbers) for _ in range(ring.size)]
    dist.all_gather(everyone, numbers, group=group.process_group)
    table = [row.tolist() for row in everyone]
    for column, name in enumerate(own):
        for rank, row in enumerate(table):
            if row[column] != table[0][column]:
                raise UserError(
                    f"ranks 0 and {rank} of the group were given different {name}; every rank "
                    "takes those of the whole batch"
                )
    # The ranks of a ring forget in the same order; what they agree on with others plays no part.
    while len(agreed) >= _MOST_AGREED:
        del agreed[next(iter(agreed))]
    agreed[key] = known[table[0][-1]]
    return agreed[key]


def quickest(q: torch.Tensor, k: torch.Tensor, lengths: Sequence[int], ranks: int) -> str:
    """Return the variant that the cost model predicts to be fastest for one layer's attention."""
    heads, head_dim = q.shape[1:]
    config = LlamaConfig(
        vocab_size=1,
        hidden_size=heads * head_dim,
        intermediate_size=4 * heads * head_dim,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=k.shape[1],
        head_dim=head_dim,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        max_position_embeddings=max(1, *lengths),
        tie_word_embeddings=True,
    )
    forward = Forward(
        config=config,
        dtype=str(q.dtype).removeprefix("torch."),
        new=max(1, sum(lengths)),
        cached=0,
        ranks=ranks,
        active=ranks,
        batch=max(1, sum(map(bool, lengths))),
    )
    threads = torch.get_num_threads()
    profile = load_profile(q.device.type).for_ranks(threads, max(cores(), threads))
    return min(names(), key=lambda name: predict(name, forward, profile).seconds)


def _exists(process_group: dist.ProcessGroup) -> bool:
    try:
        return bool(dist.get_process_group_ranks(process_group))
    except (KeyError, ValueError, RuntimeError):  # destroyed
        return False


def _backend(process_group: dist.ProcessGroup, kind: str) -> str:
    """Return the name of the backend that carries tensors on devices of a kind, "" for none."""
    try:
        return process_group._get_backend(torch.device(kind)).name()
    except RuntimeError:
        return ""


def _digest(value: object) -> int:
    """Return 63 bits of a value's text, the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:8], "little") >> 1
