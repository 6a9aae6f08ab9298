"""The communication of a compiled program, read from its HLO text."""

import collections
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16} | {f"{kind}{bits}": bits for kind in "sufc" for bits in (2, 4, 8, 16, 32, 64, 128)}
_COMPUTATION = re.compile(r"^(ENTRY )?%?(\S+) \(.*\) -> .* \{$", re.MULTILINE)
_COLLECTIVE = re.compile(rf"= (.+?) ({'|'.join(KINDS)})(-start)?\((.*)")
_ARRAY = re.compile(r"\b([a-z]+[0-9]*)\[([0-9,]*)\]")
_CALL = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([^ ,)}]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_LIMIT = re.compile(r"s(?:32|64)\[\]\S* constant\((\d+)\)")


class Traffic(NamedTuple):
    """Executions per step, and bytes of the whole arrays that they gather, reduce or move on one device."""

    count: int
    bytes: int


def collectives(hlo: str) -> dict[str, Traffic]:
    """Kind -> traffic of one step on one device, of the text of a compiled (partitioned) program.

    The bytes are those of the gathered, the reduced or the moved array. A loop's body counts as often as it runs, where XLA
    knows how often.
    """
    entry, bodies = _computations(hlo)
    times: collections.Counter[str] = collections.Counter()

    def visit(name: str, turns: int) -> None:
        times[name] += turns
        for callee, inner in _callees(bodies[name], bodies):
            visit(callee, turns * inner)

    visit(entry, 1)
    total: dict[str, list[int]] = {kind: [0, 0] for kind in KINDS}
    for name, body in bodies.items():
        for shapes, kind, start, rest in _COLLECTIVE.findall(body) if times[name] else ():
            total[kind][1] += times[name] * _whole(kind, bool(start), _sizes(shapes), rest)
            total[kind][0] += times[name]
    return {kind: Traffic(*sums) for kind, sums in total.items() if sums[0]}


def _whole(kind: str, start: bool, sizes: list[int], rest: str) -> int:
    """Bytes of the whole array of one collective, from the sizes in its result and the text after its name."""
    if start and kind != "all-reduce":  # the result of a start is (operands, results), and marks after a permutation's
        half = max(1, len(sizes) // 2)
        return {"all-gather": sum(sizes[half:]), "collective-permute": sizes[0]}.get(kind, sum(sizes[:half]))
    return sum(sizes) * (_group_size(rest) if kind == "reduce-scatter" else 1)


def _computations(hlo: str) -> tuple[str, dict[str, str]]:
    """(name of the entry, name -> text of each computation)."""
    heads = list(_COMPUTATION.finditer(hlo))
    ends = [*(head.start() for head in heads[1:]), len(hlo)]
    bodies = {head[2]: hlo[head.end() : end] for head, end in zip(heads, ends, strict=True)}
    return next(head[2] for head in heads if head[1]), bodies


def _callees(body: str, bodies: dict[str, str]) -> Iterator[tuple[str, int]]:
    """(computation, how often one turn of `body` runs it)."""
    for line in body.splitlines():
        names = [name for name in _CALL.findall(line) if name in bodies]
        for listed in _BRANCHES.findall(line):
            names += [name.strip().lstrip("%") for name in listed.split(",")]
        turns = 1
        if " while(" in line:
            known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)
            limits = known or re.search(r"condition=%?([^ ,)}]+)", line)
            found = [int(known[1])] if known else [int(n) for n in _LIMIT.findall(bodies[limits[1]])]
            turns = max(found, default=1)
        for name in names:
            yield name, turns


def _sizes(shapes: str) -> list[int]:
    """Bytes of each array in the text of a shape."""
    return [math.prod(int(n) for n in dims.split(",") if n) * _BITS[kind] // 8 for kind, dims in _ARRAY.findall(shapes) if kind in _BITS]


def _group_size(text: str) -> int:
    """Devices per group of `replica_groups=[groups,size]<=[...]` or `{{0,1},{2,3}}`."""
    listed = re.search(r"replica_groups=\[(\d+),(\d+)\]", text)
    if listed:
        return int(listed[2])
    first = re.search(r"replica_groups=\{\{([0-9,]*)\}", text)
    return first[1].count(",") + 1 if first else 1
