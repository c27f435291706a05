"""The mesh of a module: attributes that say for how many units it is planned or partitioned."""

from __future__ import annotations

from xdsl.dialects.builtin import ModuleOp, StringAttr
from xdsl.ir import Operation

from ir.placement import Mesh

MESH = "tc.mesh"
"""Module attribute with the mesh that the module is partitioned for."""

PLAN = "tc.plan"
"""Module attribute with the mesh of a plan that is not carried out yet: types are still those of the whole model."""

ARG_SHARDS = "arg_shards"
"""Function attribute: the placement text of every argument, empty for a whole one."""


def module_of(op: Operation) -> ModuleOp | None:
    """The module around an operation."""
    around: Operation | None = op
    while around is not None and not isinstance(around, ModuleOp):
        around = around.parent_op()
    return around


def mesh_of(op: Operation, attribute: str = MESH) -> Mesh | None:
    """The mesh of the module around an operation, None if it is not partitioned. Raises PlacementError."""
    module = module_of(op)
    text = module.attributes.get(attribute) if module is not None else None
    return Mesh.parse(text.data) if isinstance(text, StringAttr) else None
