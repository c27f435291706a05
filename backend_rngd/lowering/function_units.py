"""Operations of a `tc` function between units."""

from __future__ import annotations

import numpy as np
from xdsl.ir import SSAValue

from backend_rngd.isa.descriptors import Dtype, Space
from backend_rngd.lowering.exchange import dense
from backend_rngd.lowering.function_base import FunctionBase
from backend_rngd.lowering.group import check_axis
from backend_rngd.lowering.tensor import Tensor
from backend_rngd.lowering.values import Form, Weight
from ir.dialects import tc
from ir.errors import UnsupportedError
from ir.types import shape_of


class BetweenUnits(FunctionBase):
    """Lowers collectives and numbers that differ between units."""

    def op_tc_all_reduce(self, op: tc.AllReduceOp) -> None:
        """See `collective.py`."""
        check_axis(self.parent, op.axis.data)
        if op.kind.data != "add":
            raise UnsupportedError(f"an all-reduce of kind {op.kind.data}", "only sums are lowered", "reduce locally")
        if op.x in self.scattered:
            self.env[op.result] = self.scattered[op.x]
            return
        self.env[op.result] = self.collectives.all_reduce(self._dense(op.x))

    def op_tc_all_gather(self, op: tc.AllGatherOp) -> None:
        """See `collective.py`."""
        check_axis(self.parent, op.axis.data)
        name = self.output_name(op.result)
        dim, x = int(op.dim.value.data), self._dense(op.x)

        def sink(nbytes: int) -> SSAValue:
            return self.em.global_buffer(name, "hbm", nbytes, "output") if name else self.em.alloc(nbytes, space="hbm")

        whole = self.collectives.all_gather(x, dim, sink, name is not None)
        self.contracts.arriving.add(whole.buffer)
        self.env[op.result] = whole

    def op_tc_reduce_scatter(self, op: tc.ReduceScatterOp) -> None:
        """See `collective.py`."""
        check_axis(self.parent, op.axis.data)
        if op.x in self.scattered:
            self.env[op.result] = self.scattered[op.x]
            return
        self.env[op.result] = self.collectives.reduce_scatter(self._dense(op.x), int(op.dim.value.data))

    def op_tc_local_slice(self, op: tc.LocalSliceOp) -> None:
        """See `collective.py`."""
        check_axis(self.parent, op.axis.data)
        dim = int(op.dim.value.data)
        self.env[op.result] = self.collectives.local_slice(self._dense(op.x), dim, shape_of(op.result)[dim])

    def _dense(self, value: SSAValue) -> Tensor:
        t = self.tensor(value)
        return t if dense(t) or t.space == Space.HBM else self.copy(t)

    def op_tc_axis_index(self, op: tc.AxisIndexOp) -> None:
        """A number that differs between units: a literal in HBM, each unit has its own."""
        axis, scale = op.axis.data, int(op.scale.value.data)
        mesh = self.parent.mesh
        values = np.array([[mesh.coordinate(u, axis) * scale] for u in range(self.parent.units)], np.int32)
        name = f"index.{axis}.{scale}"

        def bind(form: Form) -> SSAValue:
            image = np.zeros((len(values), form.pad[0] * form.pad[1]), np.int32)
            image[:, :1] = values
            return self.parent.unit_constant(self.em, name, image)

        self.env[op.result] = Weight.of((), Dtype.I32, bind)
