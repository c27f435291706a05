"""Styles of a tensor-parallel plan: the model's own, and the user's YAML file, which wins.

    # A pattern of module or weight names (`*` stands for one part of a name) and a style, or a placement.
    mesh: kv=2,r=4                          # optional: instead of the mesh that is chosen
    layers.*.self_attn.q_proj: colwise      # outputs are cut
    layers.*.mlp.down_proj: rowwise         # inputs are cut, partial sums are added
    layers.*.mlp.gate_proj: replicate       # every unit holds all of it
    embed_tokens: embedding_rowwise         # the vocabulary is cut
    layers.*.mlp.up_proj.weight: 14336@tp, 4096

A pattern fits a name if it is its end or all of it, with or without `.weight`: `layers.*.mlp.up_proj` fits
`model.layers.3.mlp.up_proj.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, cast

from xdsl.dialects.builtin import DictionaryAttr, ModuleOp, StringAttr

from ir.dialects import tc
from ir.errors import Problem, UserError
from ir.placement import Mesh, PlacementError, Shard
from ir.types import shape_of

MODEL_PLAN = "tc.tp_plan"
"""Module attribute with the model's own plan: patterns of module names and styles."""

COLUMN, ROW, REPLICATE, EMBEDDING = "colwise", "rowwise", "replicate", "embedding_rowwise"
STYLES = (COLUMN, ROW, REPLICATE, EMBEDDING)
MODEL_STYLES = {
    "colwise": COLUMN,
    "colwise_rep": COLUMN,
    "colwise_gather_output": COLUMN,
    "rowwise": ROW,
    "embedding_rowwise": EMBEDDING,
}
"""Styles in models' own plans by what they mean here; weights under other styles are placed by what they are for."""

Style = str | Shard


@dataclass
class Styles:
    """Styles by pattern, in order of precedence, and the mesh if the user named one."""

    user: dict[str, Style] = field(default_factory=dict[str, Style])
    model: dict[str, Style] = field(default_factory=dict[str, Style])
    mesh: Mesh | None = None
    source: str = ""

    def of(self, weight: str) -> Style | None:
        """The style of a weight; None if nothing names it."""
        for patterns in (self.user, self.model):
            for pattern, style in patterns.items():
                if _regex(pattern).search(weight):
                    return style
        return None

    def check(self, module: ModuleOp, mesh: Mesh) -> None:
        """Raises UserError with everything in the user's plan that does not fit the module."""
        weights = {op.fqn.data: shape_of(op.result) for op in module.walk() if isinstance(op, tc.WeightOp)}
        problems: list[Problem] = []
        for pattern, style in self.user.items():
            where = f"{self.source}: {pattern}"
            found = [name for name in weights if _regex(pattern).search(name)]
            if not found:
                example = next((n for n, s in weights.items() if len(s) > 1), "none")
                problems.append(Problem(where, "no weight has such a name", f"write it like {example}"))
            vectors = [n for n in found if len(weights[n]) < 2]
            if isinstance(style, str) and style != REPLICATE and found and len(vectors) == len(found):
                why = f"{found[0]} has one dimension; it lies as what it is used with"
                problems.append(Problem(where, why, "name the matrix, or write a placement"))
            if isinstance(style, Shard):
                problems += _placement_problems(where, style, mesh, {n: weights[n] for n in found})
        if problems:
            raise UserError(problems)


def _placement_problems(where: str, shard: Shard, mesh: Mesh, weights: Mapping[str, list[int]]) -> list[Problem]:
    try:
        shard.check(mesh)
    except PlacementError as error:
        return [Problem(where, str(error), f"use the axes of mesh {mesh}, or tp, once each")]
    for name, shape in weights.items():
        if shape != shard.shape:
            return [Problem(where, f"placement '{shard}' is for shape {shard.shape}, {name} has {shape}", "correct it")]
    return []


@cache
def _regex(pattern: str) -> re.Pattern[str]:
    body = re.escape(pattern).replace(r"\*", r"[^.]+")
    return re.compile(rf"(?:^|\.){body}(?:\.weight(?:_scale|_packed)?|\.bias)?$")


def read_styles(module: ModuleOp, path: str | None) -> Styles:
    """The styles of a module's own plan, and of a user's file. Raises UserError with all problems of the file."""
    styles = Styles()
    own = module.attributes.get(MODEL_PLAN)
    if isinstance(own, DictionaryAttr):
        for pattern, style in own.data.items():
            if isinstance(style, StringAttr) and style.data in MODEL_STYLES:
                styles.model[pattern] = MODEL_STYLES[style.data]
    if path is not None:
        _read_file(Path(path), styles)
    return styles


def _read_file(path: Path, styles: Styles) -> None:
    import yaml

    styles.source = path.name
    try:
        content: Any = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError([Problem(f"{path} cannot be read", " ".join(str(error).split()), "correct it")]) from error
    if not isinstance(content, dict):
        raise UserError([Problem(str(path), "it is no list of `pattern: style` lines", f"styles: {', '.join(STYLES)}")])
    problems: list[Problem] = []
    for key, value in cast("dict[Any, Any]", content).items():
        where = f"{path.name}: {key}"
        try:
            if key == "mesh":
                styles.mesh = Mesh.parse(str(value))
            elif value in STYLES:
                styles.user[str(key)] = str(value)
            elif re.match(r"\s*\d", str(value)):
                styles.user[str(key)] = Shard.parse(str(value))
            else:
                problems.append(Problem(where, f"'{value}' is no style", f"use {', '.join(STYLES)}, or a placement"))
        except PlacementError as error:
            problems.append(Problem(where, str(error), "write it like 8@kv 128, 4096"))
    if problems:
        raise UserError(problems)
