"""What a compiled program sends between devices: every collective, how often it runs, and the bytes it moves.

    from lora_jax.tools.collectives import collectives, wire_bytes
    found = collectives(step.lower(*arguments).compile().as_text())

Counted from the text of the optimised program, so that what XLA has added, merged or removed is seen as it is. A
collective inside a loop counts as often as the loop runs, which XLA notes beside it.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

__all__ = ["Collective", "collectives", "wire_bytes"]

_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
_OPERATION = re.compile(rf"^\s*(?:ROOT )?%?(\S+) = (.*?) ({_KINDS}|ragged-all-to-all)(?:-start)?\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+?\d+\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(\S+) \(.*\{\s*$")
_CALLED = re.compile(r"(?:to_apply|calls|body|condition|\w+_computations)=(\{[^}]*\}|%?[\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a program."""

    kind: str  # all-gather, all-reduce, ...
    dtype: str  # of its (first) array, as XLA writes it: u8, bf16 ...
    bytes: int  # of its result on one device
    group: int  # devices that take part together
    times: int  # how often it runs in one run of the program

    @property
    def wire(self) -> int:
        """Bytes that one device receives in all its runs, by the algorithms that move least (a ring's)."""
        share = (self.group - 1) / self.group
        factor = {"all-reduce": 2 * share, "reduce-scatter": self.group - 1, "collective-permute": 1}
        return round(self.times * self.bytes * factor.get(self.kind, share))


def collectives(program: str) -> list[Collective]:
    """The collectives of a compiled program (`compiled.as_text()`), in the order of the text.

    Raises:
      ValueError: a loop with a collective does not say how often it runs.
    """
    bodies = _computations(program)
    times = _runs(bodies)
    found = []
    for name, lines in bodies.items():
        for line in lines:
            if (match := _OPERATION.match(line)) is None:
                continue
            if (count := times[name]) is None:
                raise ValueError(f"the loop around {match[1]} does not say how often it runs")
            arrays = [(dtype, _bytes(dtype, shape)) for dtype, shape in _ARRAY.findall(match[2])]
            if match[2].startswith("(("):  # the asynchronous form returns the operands, and then the results
                arrays = arrays[len(arrays) // 2 :]
            size = sum(size for _, size in arrays)
            found.append(Collective(match[3], arrays[0][0], size, _group(line), count))
    return [one for one in found if one.times]


def wire_bytes(found: list[Collective]) -> int:
    """Bytes that one device receives in one run of the program."""
    return sum(one.wire for one in found)


def _computations(program: str) -> dict[str, list[str]]:
    """The lines of each computation; that of the entry has the name ""."""
    bodies: dict[str, list[str]] = {}
    current: list[str] = []
    for line in program.splitlines():
        if (match := _COMPUTATION.match(line)) and " = " not in line.split("(")[0]:
            current = bodies.setdefault("" if line.startswith("ENTRY") else match[1].lstrip("%"), [])
        else:
            current.append(line)
    return bodies


def _calls(lines: list[str]) -> Iterator[tuple[str, int | None]]:
    """(computation, how often it runs in one run of these lines); None where that is not known."""
    for line in lines:
        if " async-done(" in line or " async-update(" in line:  # the start has counted it
            continue
        trips = _TRIPS.search(line)
        for called in _CALLED.findall(line):
            for name in re.findall(r"[\w.\-]+", called):
                looped = " while(" in line
                yield name, (int(trips[1]) if trips else None) if looped else 1


def _runs(bodies: dict[str, list[str]]) -> dict[str, int | None]:
    """How often every computation runs; None where a loop around it does not say."""
    calls = {name: [call for call in _calls(lines) if call[0] in bodies] for name, lines in bodies.items()}
    runs: dict[str, int | None] = dict.fromkeys(bodies, 0)

    def visit(name: str, times: int | None) -> None:
        before = runs[name]
        runs[name] = None if before is None or times is None else before + times
        for called, count in calls[name]:
            visit(called, None if times is None or count is None else times * count)

    visit("", 1)
    return runs


def _bytes(dtype: str, shape: str) -> int:
    bits = 8 if dtype == "pred" else int(re.sub(r"^[a-z]+", "", dtype).split("e")[0])
    return math.prod(int(n) for n in shape.split(",") if n) * bits // 8


def _group(line: str) -> int:
    """Devices in one group of a collective: groups listed, as an iota [groups, size], or as axes of a mesh."""
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match[2]))
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(match[1].split(","))
    return 2 if "collective-permute" in line else 1
