"""The rotary embedding that a `config.json` states, of transformers 4 or 5."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cptool.checkpoint.fields import integer, mapping, number, shown
from cptool.checkpoint.huggingface.known import ROPE
from cptool.checkpoint.huggingface.rope_scaling import SCALINGS, Stated
from cptool.checkpoint.known_fields import check_fields
from cptool.checkpoint.notes import Notes
from cptool.errors import UserError
from cptool.model.architectures.family import Family
from cptool.model.config import RopeScaling

# How long a context the author states beside `max_position_embeddings`.
_CONTEXT_HINTS = ("max_sequence_length", "model_max_length", "max_seq_len", "max_seq_length")

_KINDS = ("full_attention", "sliding_attention")

# Types that stretch the context that a model had before.
_STRETCHING = ("linear", "yarn")


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Base and scaling of the frequencies, the context before scaling if it is stated, and how much
    of a head is rotated; and the base of layers with a window, where it is another.
    """

    theta: float
    scaling: RopeScaling | None = None
    original_context: int | None = None
    part: float = 1.0
    window_theta: float | None = None


def read_rope(
    source: Path, fields: dict[str, Any], family: Family, *, positions: int, notes: Notes
) -> Rope:
    """Return the rotary embedding out of the fields of the `config.json` at `source`.

    transformers 4 has `rope_theta` and `rope_scaling`, 5 has both in `rope_parameters`, and files
    exist with all three. They must agree, for transformers' own choice depends on its version.
    `positions` is `max_position_embeddings`. Choices between two answers are added to
    `notes`.
    """
    if family.window_theta is not None:
        return _of_two_kinds(source, fields, family, positions=positions, notes=notes)
    older, newer = (mapping(source, fields, key) for key in ("rope_scaling", "rope_parameters"))
    answers = [
        _Dictionary(source=source, place=key, fields=rope, top=fields, family=family).rope(
            positions, notes
        )
        for key, rope in (("rope_scaling", older), ("rope_parameters", newer))
        if rope
    ]
    if len(answers) == 2 and answers[0] != answers[1]:
        raise UserError(
            f"{source}: rope_scaling {shown(older)} and rope_parameters {shown(newer)} "
            f"disagree; remove the wrong one"
        )
    if answers:
        return answers[0]
    nothing = _Dictionary(source=source, place="", fields={}, top=fields, family=family)
    return Rope(theta=nothing.theta(), part=nothing.part())


def _of_two_kinds(
    source: Path, fields: dict[str, Any], family: Family, *, positions: int, notes: Notes
) -> Rope:
    """Return the rotary embedding of a family whose layers with a window have one of their own.

    transformers 5 has `rope_parameters` of both kinds, 4 `rope_scaling` of the others alone and
    `rope_local_base_freq`.
    """
    full, local = _KINDS
    nested = mapping(source, fields, "rope_parameters")
    if nested and not nested.keys() <= set(_KINDS):
        raise UserError(
            f"{source}: rope_parameters is {shown(nested)}, it must have one object for each of "
            f"{' and '.join(_KINDS)}; correct the file"
        )
    outside = {k: v for k, v in fields.items() if k not in ("rope_parameters", "rope_scaling")}
    stated = mapping(source, nested, full) or mapping(source, fields, "rope_scaling")
    rope = read_rope(
        source,
        {**outside, "rope_parameters": stated},
        replace(family, window_theta=None),
        positions=positions,
        notes=notes,
    )
    theta = number(source, fields, "rope_local_base_freq", family.window_theta)
    own = mapping(source, nested, local)
    if own.get("rope_type", "default") != "default" or own.get("factor") not in (None, 1):
        raise UserError(
            f"{source}: rope_parameters of {local} is {shown(own)}, cptool scales only those of "
            f"{full}; use another checkpoint"
        )
    return replace(rope, window_theta=number(source, own, "rope_theta", theta))


def context(fields: dict[str, Any], positions: int, rope: Rope) -> int:
    """Return the number of positions that the model was made for.

    Linear scaling and yarn stretch the context that the model had before. `max_position_embeddings`
    is that one, unless the file states it apart, or states a second time how long the context is
    now.
    """
    scaling, original = rope.scaling, rope.original_context
    if scaling is None or scaling.kind not in _STRETCHING or not 0 < scaling.factor < 2**31:
        return positions
    if original is not None:
        return max(positions, int(original * scaling.factor))
    if any(fields.get(key) == positions for key in _CONTEXT_HINTS):
        return positions
    return max(positions, int(positions * scaling.factor))


@dataclass(frozen=True, kw_only=True)
class _Dictionary:
    """`rope_scaling` or `rope_parameters` under the key `place`; what it lacks is in `top`."""

    source: Path
    place: str
    fields: dict[str, Any]
    top: dict[str, Any]
    family: Family

    def rope(self, positions: int, notes: Notes) -> Rope:
        """Return the rotary embedding; `positions` is `max_position_embeddings`."""
        source, fields = self.source, self.fields
        theta, kind = self.theta(), self._kind()
        scaling = SCALINGS.get(kind)
        used = [*(scaling.fields if scaling else ()), "partial_rotary_factor"]
        if self.family.grows_queries and kind == "yarn":
            used += ["llama_4_scaling_beta", "max_position_embeddings"]
        check_fields(source, fields, ROPE.of_family({}, used))
        if scaling is None:
            if fields.get("factor") is not None and number(source, fields, "factor") != 1:
                raise UserError(
                    f"{source}: {self.place} has a factor of {number(source, fields, 'factor')} "
                    f'and no type that it belongs to; add "rope_type"'
                )
            return Rope(theta=theta, part=self.part())
        original = self._original_context(notes)
        stated = Stated(source=source, fields=fields, positions=positions, original=original)
        return Rope(
            theta=theta,
            scaling=scaling.read(stated),
            original_context=original,
            part=self.part(),
        )

    def theta(self) -> float:
        """Return the base of the frequencies."""
        theta = number(self.source, self.top, "rope_theta", self.family.default_theta)
        if self.fields.get("rope_theta") is None:
            return theta
        inside = number(self.source, self.fields, "rope_theta")
        if self.top.get("rope_theta") is not None and inside != theta:
            raise UserError(
                f"{self.source}: rope_theta is {theta}, and {inside} inside {self.place}; remove "
                f"the wrong one"
            )
        return inside

    def part(self) -> float:
        """Return how much of a head is rotated, at most 1."""
        key = "partial_rotary_factor"
        part = number(self.source, self.top, key, 1.0)
        part = number(self.source, self.fields, key, part)
        if part != 1 and not (self.family.partial_rotary and 0 < part < 1):
            raise UserError(
                f"{self.source}: {key} is {part}, a {self.family.title} rotates whole heads; use "
                f"another checkpoint"
            )
        return part

    def _kind(self) -> str:
        kinds = [self.fields[k] for k in ("rope_type", "type") if self.fields.get(k) is not None]
        if len(kinds) == 2 and kinds[0] != kinds[1]:
            raise UserError(
                f"{self.source}: {self.place} has rope_type {shown(kinds[0])} and type "
                f"{shown(kinds[1])}; remove the wrong one"
            )
        kind = kinds[0] if kinds else "default"
        if isinstance(kind, str):
            kind = self.family.rope_aliases.get(kind, kind)
        if not isinstance(kind, str) or kind not in ("default", *SCALINGS):
            raise UserError(
                f"{self.source}: rope type {shown(kind)} is not supported; use a checkpoint with "
                f"default, {', '.join(SCALINGS)} rotary embeddings"
            )
        return kind

    def _original_context(self, notes: Notes) -> int | None:
        key = "original_max_position_embeddings"
        inside, top = (
            None if fields.get(key) is None else integer(self.source, fields, key)
            for fields in (self.fields, self.top)
        )
        if inside is not None and top is not None and inside != top:
            notes.add(
                f"{self.source}: {key} is {top}, and {inside} inside {self.place}; the first one "
                f"counts"
            )
        return inside if top is None else top
