"""The one table ATen -> tc. A rule takes (emitter, meta, arguments) and returns the value of the node.

Arguments are already values: `View` and `Splat` for tensors, Python numbers and lists for the rest. Result shapes and
element types come from the node's fake tensor, so that bf16 results round exactly where the traced model rounds.
`rngd` operators come from `frontend.interfaces`. What has no rule is reported, all of it together.
"""

from __future__ import annotations

# Importing a module registers its rules.
from frontend.aten import attention, elementwise, products, shapes
from frontend.aten.table import ELEMENTS, NO_RULE, TABLE, Meta, convert

__all__ = ["ELEMENTS", "NO_RULE", "TABLE", "Meta", "attention", "convert", "elementwise", "products", "shapes"]
