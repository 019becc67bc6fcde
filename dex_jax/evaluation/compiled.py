"""Reading optimised programs, as XLA's compilers for GPUs and TPUs print them: what a step moves, launches and copies.

Compilers need no device, so this says what a program does on one that is not here. An instruction moves what it reads
and writes in the device's main memory, each array once, whatever caches do.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator

NO_WORK = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "partition-id"}
"""Operations that name what is there; those whose names end in "-done" wait for it."""

PARTS = ("dynamic-slice", "slice", "gather")
"""Operations that read as much of their first operand as they give."""

INSERTS = {"dynamic-update-slice": 1, "scatter": -1}
"""Operations that write one of their operands, which stands here, into the first where that lies."""

RUN_BY = ("while", "conditional", "call", "async-start", "fusion")
"""Operations whose computations run once a call; other ones apply theirs to single numbers."""


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a program."""

    kind: str  # "bf16", "f32", ...
    dims: tuple[int, ...]
    on_chip: bool  # in a TPU's own memory beside the main one

    @property
    def size(self) -> int:
        """Its numbers."""
        return math.prod(self.dims)

    @property
    def nbytes(self) -> int:
        """All of it."""
        bits = 8 if self.kind == "pred" or self.kind.startswith("f8") else int(re.sub(r"\D", "", self.kind) or 0)
        return self.size * bits // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction, and what it runs."""

    name: str
    operation: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]  # names within its computation
    calls: tuple[str, ...]  # computations: of a loop (body, condition), of a choice one a branch
    root: bool
    line: str

    @property
    def nbytes(self) -> int:
        """Its results in the main memory."""
        return sum(each.nbytes for each in self.results if not each.on_chip)

    @property
    def works(self) -> bool:
        """Whether a device does anything for it."""
        return self.operation not in NO_WORK and not self.operation.endswith("-done")

    @property
    def turns(self) -> int:
        """Of a loop; 1 where the compiler does not know it."""
        return int(self.told(r'"known_trip_count":\{"n":"(\d+)"') or 1)

    def told(self, pattern: str) -> str:
        """What the group of a pattern finds in the line; empty where it finds nothing."""
        found = re.search(pattern, self.line)
        return found.group(1) if found else ""


Known = dict[str, Instruction]
"""The instructions of a computation by name."""


@dataclasses.dataclass(frozen=True)
class Program:
    """An optimised program, as `read` gives it.

    Attributes:
      computations: by name.
      entry: the name of the one that runs first.
    """

    computations: dict[str, Known]
    entry: str

    @functools.cached_property
    def loops(self) -> tuple[str, ...]:
        """Bodies of the loops of the entry computation, the one with the largest state first."""
        loops = [each for each in self.computations[self.entry].values() if each.operation == "while"]
        return tuple(each.calls[0] for each in sorted(loops, key=lambda each: -each.nbytes))

    def moved(self, computation: str, scope: str = "") -> int:
        """Bytes that one run of a computation moves; of a choice, those of the branch that moves most.

        Only for what is named after a scope (`jax.named_scope`), if one is given.
        """

        def of(each: Instruction, known: Known) -> int:
            return self._moved(each, known) if scope in each.told(r'op_name="([^"]*)"') else 0

        return int(self._total(computation, of))

    def kernels(self, computation: str) -> int:
        """Operations that one run of a computation launches; of a choice, of the branch that launches most."""
        return int(self._total(computation, lambda each, known: 1))

    def cycles(self, computation: str) -> float:
        """Cycles that libtpu estimates for one run of a computation; of a choice, of the longest branch."""
        return self._total(computation, lambda each, known: float(each.told(r'"estimated_cycles":"(\d+)"') or 0))

    def within(self, *computations: str) -> Iterator[Instruction]:
        """All instructions that computations run, but for the inside of fusions, whose numbers stay in registers."""
        seen: set[str] = set()
        todo = [*computations]
        while todo:
            if (name := todo.pop()) in seen:
                continue
            seen.add(name)
            for each in self.computations[name].values():
                yield each
                todo += () if each.operation == "fusion" else each.calls

    def operation_of(self, each: Instruction) -> str:
        """What an instruction does; of a fusion, what makes its result."""
        return self._root(each.calls[0]).operation if each.operation == "fusion" else each.operation

    def _root(self, computation: str) -> Instruction:
        return next(each for each in self.computations[computation].values() if each.root)

    def _total(self, computation: str, cost: Callable[[Instruction, Known], float]) -> float:
        known, total = self.computations[computation], 0.0
        for each in filter(lambda each: each.works, known.values()):
            if each.operation == "fusion" or not each.calls:
                total += cost(each, known)
                continue
            inner = [self._total(name, cost) for name in each.calls]
            total += max(inner) if each.operation == "conditional" else each.turns * sum(inner)
        return total

    def _moved(self, each: Instruction, known: Known) -> int:
        operands = [known[name] for name in each.operands]
        if each.operation == "fusion":
            return self._moved_by_fusion(each, operands)
        if each.operation in PARTS:
            return 2 * each.nbytes
        if each.operation in INSERTS:
            return 2 * operands[INSERTS[each.operation]].nbytes
        if each.operation.endswith("-start"):
            # What arrives there: the first result of a copy, and of a slice the one behind what is cut.
            arrives = each.results[1 if each.operation == "slice-start" else 0]
            return arrives.nbytes * sum(not end.on_chip for end in (operands[0].results[0], arrives))
        given = each.results
        if each.operation == "custom-call":
            # Bytes that a library's kernel gives beside its result are room to work in.
            given = tuple(x for place, x in enumerate(given) if place == 0 or x.kind not in ("s8", "u8"))
            aliasing = each.told(r"output_to_operand_aliasing=\{(.*?\))\}")
            if aliasing:  # what lies there is written where it lies: no more than comes in beside it
                there = {int(number) for number in re.findall(r"\((\d+), ", aliasing)}
                kept = sum(operands[place].nbytes for place in there)
                read = sum(x.nbytes for place, x in enumerate(operands) if place not in there)
                return read + min(read, kept)
        return sum(x.nbytes for x in given if not x.on_chip) + sum(x.nbytes for x in operands)

    def _moved_by_fusion(self, fusion: Instruction, operands: list[Instruction]) -> int:
        inside = self.computations[fusion.calls[0]]

        def origin(name: str) -> str:
            """What a chain of bitcasts names, or of fusions whose results lie where their operands do."""
            each = inside[name]
            stays = each.operation == "fusion" and "output_to_operand_aliasing" in each.line
            return origin(each.operands[0]) if each.operation == "bitcast" or stays else name

        read: dict[str, int] = {}
        for each in inside.values():
            for place, name in enumerate(each.operands if origin(each.name) == each.name else ()):
                source = origin(name)
                whole = place > 0 or each.operation not in (*PARTS, *INSERTS)
                size = inside[source].nbytes if whole else each.nbytes if each.operation in PARTS else 0
                read[source] = read.get(source, 0) + size
        total = 0
        for each in inside.values():
            if each.operation == "parameter":
                operand = operands[int(each.told(r"parameter\((\d+)\)"))]
                total += min(read.get(each.name, operand.nbytes), operand.nbytes)
        root = self._root(fusion.calls[0])
        ends = root.operands if root.operation == "tuple" else (root.name,)
        for name, result in zip(ends, fusion.results, strict=False):
            end = inside[origin(name)]
            if end.operation in INSERTS:
                total += inside[end.operands[INSERTS[end.operation]]].nbytes
            elif not result.on_chip:
                total += result.nbytes
        return total


def read(hlo: str) -> Program:
    """The program that the `as_text` of a compiled one prints."""
    computations: dict[str, Known] = {}
    entry = current = ""
    for line in hlo.splitlines():
        header = re.match(r"(ENTRY )?%?(\S+) \(.*\) -> .* \{\s*$", line)
        if header:
            current = header.group(2)
            computations[current] = {}
            entry = current if header.group(1) else entry
        elif line.startswith(" ") and current and (found := _instruction(line)) is not None:
            computations[current][found.name] = found
    return Program(computations, entry)


def _instruction(line: str) -> Instruction | None:
    head = re.match(r"\s+(ROOT )?%?(\S+) = (.*?)\s([a-z][\w\-]*)\(", line)
    if head is None:
        return None
    root, name, result, operation = head.groups()
    depth, end = 1, head.end()
    while depth and end < len(line):
        depth += {"(": 1, ")": -1}.get(line[end], 0)
        end += 1
    inside, rest = line[head.end() : end - 1], line[end:]
    arrays = re.findall(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?", result)  # kind, dimensions, layout
    calls: list[str] = []
    if operation in RUN_BY:
        for key in ("body", "condition", "calls", "to_apply", "true_computation", "false_computation"):
            calls += re.findall(rf"\b{key}=%?([\w.\-]+)", rest)
        for group in re.findall(r"branch_computations=\{([^}]*)\}", rest):
            calls += [each.strip().lstrip("%") for each in group.split(",")]
    return Instruction(
        name=name,
        operation=operation,
        results=tuple(Array(kind, tuple(map(int, re.findall(r"\d+", dims))), "S(" in at) for kind, dims, at in arrays),
        operands=tuple(re.findall(r"%([\w.\-]+)", inside)) if operation != "constant" else (),
        calls=tuple(calls),
        root=bool(root),
        line=line.strip(),
    )
