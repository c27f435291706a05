"""Sizes with symbols and einsum-like axis rules: the arithmetic behind sharding, tiling, cost and shape checks.

Pure Python, no xDSL. A rule such as `b s i, o i -> b s o` names every dimension of every operand; an axis that the
output does not name is reduced. `(h d)` is one dimension made of two axes, outer axis first. `[t]` says that the axis
must not be sharded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from ir.errors import RuleError

Dim = int | str
"""A static size, or a product of symbols and numbers such as `B`, `B*S` or `B*4`."""

SYMBOL_ORDER = ("B", "S", "KV")
_SYMBOL = re.compile(r"[A-Z][A-Z0-9_]*")
_AXIS = re.compile(r"[a-z][a-z0-9_]*")
_TOKEN = re.compile(r"[a-z][a-z0-9_]*|[()\[\]]|\S")


@dataclass(frozen=True)
class Size:
    """A size as `factor` times a sorted product of symbols."""

    factor: int
    symbols: tuple[str, ...] = ()

    @staticmethod
    def of(dim: Dim) -> Size:
        """The size of a dimension; raises RuleError if the text is no product of symbols and numbers."""
        if isinstance(dim, int):
            return Size(dim)
        factor = 1
        symbols: list[str] = []
        for part in dim.split("*"):
            part = part.strip()
            if part.isdigit():
                factor *= int(part)
            elif _SYMBOL.fullmatch(part):
                symbols.append(part)
            else:
                raise RuleError(f"size '{dim}' is no product of symbols such as B*S")
        return Size(factor, _sorted(symbols))

    def __mul__(self, other: Size) -> Size:
        return Size(self.factor * other.factor, _sorted([*self.symbols, *other.symbols]))

    def divided_by(self, other: Size) -> Size | None:
        """The exact quotient, or None if there is none."""
        rest = list(self.symbols)
        for symbol in other.symbols:
            if symbol not in rest:
                return None
            rest.remove(symbol)
        if other.factor == 0 or self.factor % other.factor:
            return None
        return Size(self.factor // other.factor, tuple(rest))

    def substitute(self, values: Mapping[str, int]) -> Size:
        """The size with numbers for the symbols in `values`."""
        factor = math.prod([values[s] for s in self.symbols if s in values], start=self.factor)
        return Size(factor, tuple(s for s in self.symbols if s not in values))

    @property
    def dim(self) -> Dim:
        """An int if static, else the normal text such as `B*S*4`."""
        if not self.symbols:
            return self.factor
        return "*".join([*self.symbols, *([str(self.factor)] if self.factor != 1 else [])])


def _sorted(symbols: Sequence[str]) -> tuple[str, ...]:
    return tuple(sorted(symbols, key=lambda s: (SYMBOL_ORDER.index(s) if s in SYMBOL_ORDER else 9, s)))


def product(dims: Sequence[Dim]) -> Size:
    """The number of elements of a shape."""
    total = Size(1)
    for dim in dims:
        total = total * Size.of(dim)
    return total


def factors(dim: str) -> tuple[str, ...]:
    """The axes of one dimension of a rule: `(h d)` has two, `s` one, `()` none."""
    return tuple(_AXIS.findall(dim))


@dataclass(frozen=True)
class Rule:
    """A parsed rule. An entry of `inputs[i]` or `output` is one dimension: an axis name, or `(h d)` for a product."""

    inputs: tuple[tuple[str, ...], ...]
    output: tuple[str, ...]
    unsharded: frozenset[str] = frozenset()

    @staticmethod
    def parse(text: str) -> Rule:
        """Read `b s i, o i -> b s o`. Raises RuleError if the text is malformed."""
        return _parse(text)

    def __str__(self) -> str:
        sides = [" ".join(self._show(d) for d in dims) for dims in (*self.inputs, self.output)]
        return f"{', '.join(sides[:-1])} -> {sides[-1]}".strip()

    def _show(self, dim: str) -> str:
        return _AXIS.sub(lambda m: f"[{m[0]}]" if m[0] in self.unsharded else m[0], dim)

    @property
    def reduced(self) -> tuple[str, ...]:
        """Axes of the inputs that the output does not have, in order of appearance."""
        kept = {a for d in self.output for a in factors(d)}
        return tuple(a for a in self.axes if a not in kept)

    @property
    def axes(self) -> tuple[str, ...]:
        """All axes in order of appearance, inputs first."""
        return tuple(dict.fromkeys(a for dims in (*self.inputs, self.output) for d in dims for a in factors(d)))

    def sizes(self, shapes: Sequence[Sequence[Dim]]) -> dict[str, Dim]:
        """The size of every axis, from the input shapes or from input shapes and output shape.

        Raises RuleError if the ranks or the sizes of an axis disagree. Axes only in a product whose other factors are
        unknown are absent from the result.
        """
        sides = (*self.inputs, self.output)
        if len(shapes) not in (len(sides), len(sides) - 1):
            raise RuleError(f"rule '{self}' has {len(self.inputs)} operands, but {len(shapes)} shapes are given")
        known: dict[str, Size] = {}
        groups: list[tuple[str, Size]] = []
        for index, (dims, shape) in enumerate(zip(sides, shapes, strict=False)):
            what = f"operand {index}" if index < len(self.inputs) else "the result"
            if len(dims) != len(shape):
                raise RuleError(f"rule '{self}' gives {what} {len(dims)} dimensions, but it has {len(shape)}")
            for name, dim in zip(dims, shape, strict=True):
                size = Size.of(dim)
                if name.startswith("("):
                    groups.append((name, size))
                elif known.setdefault(name, size) != size:
                    raise RuleError(f"axis '{name}' of rule '{self}' has sizes {known[name].dim} and {size.dim}")
        for _ in range(len(groups)):
            for name, size in groups:
                self._solve(name, size, known)
        return {name: size.dim for name, size in known.items()}

    def _solve(self, group: str, size: Size, known: dict[str, Size]) -> None:
        names = factors(group)
        missing = [n for n in names if n not in known]
        rest = Size(1)
        for name in names:
            rest = rest * known.get(name, Size(1))
        if not missing and rest != size:
            raise RuleError(f"axes '{group}' of rule '{self}' have sizes {rest.dim} and {size.dim}")
        if len(missing) == 1:
            quotient = size.divided_by(rest)
            if quotient is None:
                raise RuleError(f"axes '{group}' of rule '{self}': {size.dim} is no multiple of {rest.dim}")
            known[missing[0]] = quotient

    def shape(self, sizes: Mapping[str, Dim]) -> list[Dim]:
        """The output shape for given axis sizes."""
        return [product([sizes[a] for a in factors(d)]).dim for d in self.output]

    def rename(self, names: Mapping[str, str]) -> Rule:
        """The rule with other axis names; names that are not in the mapping stay."""

        def change(dim: str) -> str:
            return _AXIS.sub(lambda m: names.get(m[0], m[0]), dim)

        return Rule(
            tuple(tuple(change(d) for d in dims) for dims in self.inputs),
            tuple(change(d) for d in self.output),
            frozenset(names.get(a, a) for a in self.unsharded),
        )

    def fresh(self, count: int) -> list[str]:
        """Axis names that the rule does not use yet."""
        used = set(self.axes)
        candidates = [c for c in "abcdefghijklmnopqrstuvwxyz"] + [f"x{i}" for i in range(count + len(used))]
        return [c for c in candidates if c not in used][:count]


@lru_cache(maxsize=4096)
def _parse(text: str) -> Rule:
    left, arrow, right = text.partition("->")
    if not arrow or "->" in right:
        raise RuleError(f"rule '{text}' needs one '->'")
    unsharded: set[str] = set()
    inputs = tuple(_dims(side, text, unsharded) for side in left.split(",")) if left.strip() else ()
    if left.strip() == "" and "," in left:
        inputs = tuple(() for _ in left.split(","))
    return Rule(inputs, _dims(right, text, unsharded), frozenset(unsharded))


def _dims(side: str, text: str, unsharded: set[str]) -> tuple[str, ...]:
    dims: list[str] = []
    group: list[str] | None = None
    bracket = False
    for token in _TOKEN.findall(side):
        if token == "(" and group is None:
            group = []
        elif token == ")" and group is not None and not bracket:
            dims.append(f"({' '.join(group)})")
            group = None
        elif token == "[" and not bracket:
            bracket = True
        elif token == "]" and bracket:
            bracket = False
        elif _AXIS.fullmatch(token):
            if bracket:
                unsharded.add(token)
            (dims if group is None else group).append(token)
        else:
            raise RuleError(f"rule '{text}': unexpected '{token}'")
    if group is not None or bracket:
        raise RuleError(f"rule '{text}': a bracket is not closed")
    names = [a for d in dims for a in factors(d)]
    if len(set(names)) != len(names):
        raise RuleError(f"rule '{text}' names an axis twice in one operand")
    return tuple(dims)


def reshape_rule(source: Sequence[Dim], target: Sequence[Dim]) -> Rule:
    """The split and merge groups of a row-major reshape, e.g. `a (b c) -> a b c` for [2, 12] -> [2, 3, 4].

    Dimensions are matched from the left in the smallest groups of equal size. A group that merges one dimension with
    a part of another (`[6, 4] -> [4, 6]`) shares a common axis only where sizes divide, otherwise its axes are
    separate and must not be sharded. Raises RuleError if the numbers of elements differ.
    """
    if product(source) != product(target):
        raise RuleError(f"a reshape from {list(source)} to {list(target)} changes the number of elements")
    names = iter([*"abcdefghijklmnopqrstuvwxyz", *(f"x{i}" for i in range(64))])
    unsharded: set[str] = set()
    left: list[list[str]] = [[] for _ in source]
    right: list[list[str]] = [[] for _ in target]
    rest_l, rest_r = [Size.of(d) for d in source], [Size.of(d) for d in target]
    i = j = 0
    while i < len(source) and j < len(target):
        if rest_l[i] == Size(1) and rest_r[j] != Size(1):
            i += 1
            continue
        if rest_r[j] == Size(1) and rest_l[i] != Size(1):
            j += 1
            continue
        left_over, right_over = rest_l[i].divided_by(rest_r[j]), rest_r[j].divided_by(rest_l[i])
        if left_over is None and right_over is None:
            i, j = _skip(i, j, rest_l, rest_r, left, right, names, unsharded)
            continue
        name = next(names)
        left[i].append(name)
        right[j].append(name)
        # The larger dimension keeps what is left for further axes; equal ones are both used up.
        rest_l[i], rest_r[j] = left_over or Size(1), right_over or Size(1)
        i, j = i + (rest_l[i] == Size(1)), j + (rest_r[j] == Size(1))
    return Rule((tuple(_group(g) for g in left),), tuple(_group(g) for g in right), frozenset(unsharded))


def _skip(
    i: int,
    j: int,
    rest_l: list[Size],
    rest_r: list[Size],
    left: list[list[str]],
    right: list[list[str]],
    names: Iterator[str],
    unsharded: set[str],
) -> tuple[int, int]:
    """Sizes that share no factor in order: give every dimension up to the next common boundary an own axis."""
    total_l, total_r = rest_l[i], rest_r[j]
    end_l, end_r = i + 1, j + 1
    while total_l != total_r:
        if end_r == len(rest_r) or (end_l < len(rest_l) and total_l.factor <= total_r.factor):
            total_l, end_l = total_l * rest_l[end_l], end_l + 1
        else:
            total_r, end_r = total_r * rest_r[end_r], end_r + 1
    for group in [*left[i:end_l], *right[j:end_r]]:
        name = next(names)
        group.append(name)
        unsharded.add(name)
    return end_l, end_r


def _group(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"({' '.join(names)})"
