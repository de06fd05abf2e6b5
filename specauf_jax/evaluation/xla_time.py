"""How long a program takes on a TPU, as its compiler estimates it: cycles by named scope, from XLA's own text.

The compiler writes `estimated_cycles` to the fusions and most other operations of a finished program. It has no figure
for Pallas kernels, for sorts, for asynchronous copies, for what is sent, and for how often a loop turns where that is
for the data to say.
"""

import dataclasses
import re
from collections import Counter
from typing import NamedTuple

from specauf_jax.evaluation.xla_memory import LOOP, called_by, computations_of, turns_of

SCOPES = (
    "target",
    "context",
    "blocks",
    "attention",
    "experts",
    "lm_head",
    "objective",
    "optimiser",
    "propose",
    "verify",
    "commit",
)
"""Names that this project gives to parts of its programs (`jax.named_scope`)."""
_SCOPE = re.compile(rf"\b({'|'.join(SCOPES)})\b")
KERNEL = "tpu_custom_call"
_UNKNOWN = 2**63 - 1  # cycles that the compiler writes where it has no figure


class Operation(NamedTuple):
    """An instruction of the program: its name there, its scope, such as "verify/target", its results and what JAX calls
    its source."""

    name: str
    scope: str
    shape: str
    source: str


@dataclasses.dataclass(frozen=True)
class Cycles:
    """By Operation: cycles if all goes well and at most, and calls of Pallas kernels."""

    least: Counter
    most: Counter
    kernels: Counter

    @staticmethod
    def by_scope(part: Counter) -> Counter:
        """The sums of one of the three."""
        return sum((Counter({operation.scope: count}) for operation, count in part.items()), Counter())

    def __add__(self, other: "Cycles") -> "Cycles":
        return Cycles(self.least + other.least, self.most + other.most, self.kernels + other.kernels)

    def times(self, least: int, most: int) -> "Cycles":
        """Of so many turns."""
        parts = (self.least, least), (self.most, most), (self.kernels, most)
        return Cycles(*(Counter({x: turns * count for x, count in part.items()}) for part, turns in parts))

    def within(self, scope: str) -> "Cycles":
        """What has no scope of its own gets this one."""

        def placed(part: Counter) -> Counter:
            found: Counter = Counter()
            for operation, count in part.items():
                found[operation if operation.scope else operation._replace(scope=scope)] += count
            return found

        return Cycles(*map(placed, (self.least, self.most, self.kernels)))


_NONE = Cycles(Counter(), Counter(), Counter())


def read_cycles(program: str, turns: dict[str, tuple[int, int]]) -> Cycles:
    """Cycles of one call of a program.

    Args:
      program: the HLO text of a finished compilation.
      turns: last name of a scope → how often loops in it turn at least and at most, where only the data know; others
        count once. Of branches the cheapest and the dearest one count.
    """
    computations, entry = computations_of(program)
    known: dict[str, Cycles] = {}

    def of(name: str) -> Cycles:
        if name not in known:
            known[name] = sum(map(of_line, computations[name]), _NONE)
        return known[name]

    def of_line(line: str) -> Cycles:
        scope = _scope(line)
        if (found := re.search(r'"estimated_cycles":"(\d+)"', line)) and int(found[1]) < _UNKNOWN:
            spent = Counter({_operation(line): int(found[1])})
            return Cycles(spent, spent, Counter())
        if f'custom_call_target="{KERNEL}"' in line:
            return Cycles(Counter(), Counter(), Counter({_operation(line): 1}))
        if loop := LOOP.search(line):
            count = turns_of(line, computations)
            return of(loop[2]).within(scope).times(*((count, count) if count else _turns(scope, turns)))
        inner = [of(name).within(scope) for name in called_by(line)]
        if " conditional(" in line:
            return Cycles(min((x.least for x in inner), key=Counter.total),
                          max((x.most for x in inner), key=Counter.total),
                          max((x.kernels for x in inner), key=Counter.total))  # fmt: skip
        return sum(inner, _NONE) if re.search(r" (call|async-start)\(", line) else _NONE

    return of(entry)


def _operation(line: str) -> Operation:
    found = re.match(r"\s*(?:ROOT )?%(\S+) = (.*?) [\w-]+\(", line)
    name, results = found.groups() if found else ("", "")
    return Operation(name, _scope(line), re.sub(r"\{[^}]*\}|/\*.*?\*/", "", results), _source(line))


def _scope(line: str) -> str:
    """Of an instruction, by what JAX calls its source; empty where it has none."""
    return "/".join(dict.fromkeys(_SCOPE.findall(_source(line))))


def _source(line: str) -> str:
    found = re.search(r'op_name="([^"]*)"', line)
    return found[1] if found else ""


def _turns(scope: str, turns: dict[str, tuple[int, int]]) -> tuple[int, int]:
    return turns.get(scope.rpartition("/")[2], (1, 1))
