"""plan-tp: decide which part of every weight and cache a unit holds. Types stay; `partition` carries the plan out.

Before:
    %q = tc.weight "q_proj.weight" : tensor<4096x4096xbf16>
    %d = tc.weight "down_proj.weight" : tensor<4096x14336xbf16>
After (size=8, 32 heads, 8 of them for keys and values):
    builtin.module attributes {tc.plan = "kv=8,r=1"}
    %q = tc.weight "q_proj.weight" shard "8@kv 512, 4096" : tensor<4096x4096xbf16>
    %d = tc.weight "down_proj.weight" shard "4096, 14336@tp" : tensor<4096x14336xbf16>

Units form a mesh of `kv` (key-value heads) times `r` (query heads of a group; copies of keys and values). Projections
to attention are cut by heads; the first ones of an MLP, and the vocabulary of embedding and head, over all units. What
follows from these cuts (biases, caches, the weights behind) is found by walking on. The model's own plan (`tc.tp_plan`)
and the user's file name styles by module; see `passes.tp_styles`.
"""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import override
from xdsl.context import Context
from xdsl.dialects.builtin import IntegerAttr, ModuleOp, StringAttr, i64
from xdsl.passes import ModulePass
from xdsl.utils.exceptions import PassFailedException

from ir.dialects import tc
from ir.errors import Problem, UserError
from ir.interpreter import find_function
from ir.placement import Mesh
from ir.types import axis_names, shape_of
from passes.chunk_sizes import chunk_size, token_sizes
from passes.notes import add_notes
from passes.partition import SEQUENCE
from passes.sharding import Sharding
from passes.tp_planner import Planner
from passes.tp_styles import MODEL_PLAN, read_styles


@dataclass(frozen=True)
class PlanTp(ModulePass):
    """Place weights and caches on `size` units; `plan` is a YAML file of styles.

    sequence_parallel: every unit has a part of the tokens between the layers' collectives. sequence_rows: the same, but
    only where the tokens of a program, or of a chunk (`chunk-tokens`), are a multiple of so many a unit; 0: never.
    """

    name = "plan-tp"
    size: int = 1
    sequence_parallel: bool = False
    plan: str | None = None
    sequence_rows: int = 0

    @override
    def apply(self, ctx: Context, op: ModuleOp) -> None:
        if self.size < 1:
            raise PassFailedException(f"plan-tp: size must be positive, not {self.size}")
        if tc.mesh_of(op) is not None or tc.mesh_of(op, tc.PLAN) is not None:
            raise PassFailedException("plan-tp: the module has a plan already")
        styles = read_styles(op, self.plan)
        op.attributes.pop(MODEL_PLAN, None)
        if self.size == 1:
            styles.check(op, Mesh((("kv", 1), ("r", 1))))
            return
        mesh = styles.mesh or choose_mesh(op, self.size)
        if mesh.size != self.size:
            raise UserError([Problem(f"mesh {mesh}", f"it has {mesh.size} units, not {self.size}", "correct the plan")])
        rows = self._sequence(op)
        sharding = Sharding(mesh, rows)
        Planner(op, sharding, styles).run()
        op.attributes[tc.PLAN] = StringAttr(str(mesh))
        if rows is not None:
            op.attributes[SEQUENCE] = IntegerAttr(rows, i64)

    def _divides(self, module: ModuleOp) -> bool:
        """Whether all units can have equal parts of every chunk, of whole multiples of `sequence_rows` tokens."""
        sizes = token_sizes(find_function(module, "main"))
        if sizes is None or sizes[0] > 1:
            return False
        batch, length, token_bytes = sizes
        size = chunk_size(batch, length, token_bytes)
        return size % (self.size * self.sequence_rows) == 0 and length % size == 0

    def _sequence(self, module: ModuleOp) -> int | None:
        """The number of tokens to cut under sequence parallelism."""
        if not self.sequence_parallel and not (self.sequence_rows and self._divides(module)):
            return None
        for value in find_function(module, "main").body.block.args:
            if "S" in axis_names(value):
                rows = shape_of(value)[axis_names(value).index("S")]
                if rows % self.size == 0:
                    return rows
                why = f"{rows} tokens are no multiple of {self.size} units"
                add_notes(module, [f"no sequence parallelism in this bucket: {why}"])
                return None
        return None


def choose_mesh(module: ModuleOp, size: int) -> Mesh:
    """The mesh with the fewest query heads a unit, then the fewest key-value heads, padding included.

    Of equal ones that without padding of key-value heads (`kv` = gcd), then that with most `kv`. Where every query head
    has its own key-value head there is nothing for `r` to cut.
    """
    attentions = [op for op in module.walk() if isinstance(op, tc.AttentionOp)]

    def cost(kv: int) -> tuple[int, int, bool, int]:
        own = [-(-shape_of(a.k)[1] // kv) for a in attentions]
        heads = sum(n * -(-a.group // (size // kv)) for n, a in zip(own, attentions, strict=True))
        # Without groups there is nothing that copies of keys and values could serve.
        padded = any(shape_of(a.k)[1] % kv for a in attentions if a.group > 1)
        return heads, sum(own), padded, -kv

    best = min((kv for kv in range(1, size + 1) if size % kv == 0), key=cost)
    return Mesh((("kv", best), ("r", size // best)))
