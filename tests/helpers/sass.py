"""Reads what nvdisasm prints of kernels for compute capability 9.0."""

from __future__ import annotations

import re

_INSTRUCTION = re.compile(r"/\*([0-9a-f]+)\*/\s+(@!?U?P\w+ +)?([A-Z][\w.]*)(.*?);")
_LABEL = re.compile(r"^(\.L\w+):")
_TARGET = re.compile(r"\((\.L\w+)\)")
_REGISTER = re.compile(r"\bR(\d+)\b")
_WIDE = {"32": 1, "64": 2, "128": 4, "WIDE": 2}

Groups = tuple[frozenset[int], ...]


def kernels(code: str) -> dict[str, list[str]]:
    """The lines of each kernel by its name."""
    return {
        section.partition(",")[0]: section.splitlines()
        for section in re.split(r"\.section\s+\.text\.", code)[1:]
        if "attention_kernel" in section.partition(",")[0]
    }


def _named(name: str, operands: str) -> set[int]:
    """The registers that an instruction names, with those that follow them in wide operands."""
    width = max([_WIDE.get(part, 1) for part in name.split(".")[1:]], default=1)
    return {int(r) + i for r in _REGISTER.findall(operands) for i in range(width)}


def _product(name: str, operands: str) -> frozenset[int]:
    """The registers of an HGMMA: accumulators, then perhaps fragments."""
    columns = int(name.split(".")[1].split("x")[1])
    registers = [operand.strip() for operand in operands.split(",")][:2]
    found = [
        (_REGISTER.match(text), n) for text, n in zip(registers, (columns // 2, 4), strict=False)
    ]
    return frozenset(int(at[1]) + i for at, count in found if at for i in range(count))


class _Walk:
    """Follows every path through a kernel. A state is the open group of products and the committed
    ones, oldest first, by their registers, and where each convergence barrier leads.
    """

    def __init__(self, lines: list[str]):
        self.code: list[tuple[str, str, str, str]] = []  # place, predicate, name, operands
        self.labels: dict[str, int] = {}
        for line in lines:
            if label := _LABEL.match(line.strip()):
                self.labels[label[1]] = len(self.code)
            elif found := _INSTRUCTION.search(line):
                place, predicate, name, operands = found.groups()
                self.code.append((place, predicate or "", name, operands.strip()))
        self.named = [_named(name, operands) for _, _, name, operands in self.code]
        self.products = sum(name.startswith("HGMMA") for _, _, name, _ in self.code)
        self.complaints: set[str] = set()

    def run(self) -> list[str]:
        ahead: list[tuple[int, Groups, tuple[tuple[str, int], ...]]] = [(0, (frozenset(),), ())]
        seen = set(ahead)
        while ahead:
            at, groups, joins = ahead.pop()
            if at >= len(self.code):
                continue
            _, predicate, name, operands = self.code[at]
            groups = self._after(at, groups)
            if name == "BSSY" or name.startswith("BSSY."):
                barrier, target = operands.split(",")[0].strip(), _TARGET.search(operands)
                assert target is not None
                joins = tuple(sorted({**dict(joins), barrier: self.labels[target[1]]}.items()))
            for following in self._following(at, predicate, name, operands, dict(joins)):
                state = (following, groups, joins)
                if state not in seen:
                    seen.add(state)
                    ahead.append(state)
        return sorted(self.complaints)

    def _after(self, at: int, groups: Groups) -> Groups:
        place, _, name, operands = self.code[at]
        *committed, open_group = groups
        if name.startswith("HGMMA"):
            open_group |= _product(name, operands)
            if "gsb0" not in operands:
                return (*committed, open_group)
            return (*committed, open_group, frozenset())
        if name.startswith(("DEPBAR", "WARPGROUP.DEPBAR")) and "gsb0" in operands:
            pending = int(operands.split(",")[1], 16)
            return (*committed[max(0, len(committed) - pending) :], open_group)
        for register in sorted(self.named[at] & frozenset().union(*groups)):
            self.complaints.add(f"{place}: {name} {operands} names R{register}, which is in flight")
        return groups

    def _following(
        self, at: int, predicate: str, name: str, operands: str, joins: dict[str, int]
    ) -> list[int]:
        kind = name.partition(".")[0]
        targets = [self.labels[x] for x in _TARGET.findall(operands) if x in self.labels]
        if kind == "BSSY":
            return [at + 1]
        if kind == "BSYNC":
            return [joins.get(operands.strip(), at + 1)]
        conditional = bool(predicate) or re.match(r"!?U?P\d", operands) is not None
        if kind in ("BRA", "JMP"):
            return [*targets, at + 1] if conditional else targets
        if kind in ("EXIT", "RET"):
            return [at + 1] if conditional else []
        return [*targets, at + 1]


def in_flight_names(lines: list[str]) -> list[str]:
    """The instructions of a kernel, other than products, that name a register which a product that
    may still be in flight writes or reads: on hardware they would meet any value.
    """
    walk = _Walk(lines)
    assert walk.products, "no HGMMA among the lines"
    return walk.run()
