"""Block functions: lowered once, called with each layer's weights and caches."""

from __future__ import annotations

from collections.abc import Sequence

from xdsl.dialects import func
from xdsl.ir import SSAValue

from backend_rngd.dialect import BufferType, RoutineOp, buffer_type
from backend_rngd.isa.descriptors import Space
from backend_rngd.lowering.context import Program
from backend_rngd.lowering.emitter import Emitter, hbm
from backend_rngd.lowering.function import FunctionLowering
from backend_rngd.lowering.tensor import Tensor, round_up
from backend_rngd.lowering.values import Form, Slot, Stored, Value, Weight, in_global
from ir import expr as ex


class BlockLowering(FunctionLowering):
    """A block function, lowered once; weights and caches come as HBM addresses, activations in fixed slots.

    The routine gets one argument per weight form it asks for and one per cache: `parameters` lists them in order.
    """

    def __init__(
        self, parent: Program, function: func.FuncOp, operands: Sequence[Value], direct: Sequence[str | None]
    ) -> None:
        routine = RoutineOp(function.sym_name.data, [])
        parent.out.module.body.block.add_op(routine)
        super().__init__(parent, function, routine)
        self.slots: dict[int, Slot] = {}
        self.parameters: list[tuple[int, Form | None]] = []
        self.results: list[int | str] = []
        self.templates: list[Tensor | None] = []
        self.em.location = self.name
        for i, (arg, v) in enumerate(zip(function.body.block.args, operands, strict=True)):
            self.env[arg] = self._bind(i, v, direct[i])
        self._return(self.walk(), function)

    def _bind(self, i: int, v: Value, direct: str | None) -> Value:
        if isinstance(v, Stored):
            return Stored(self._parameter(i, None, _bytes(v.buffer)), v.shape)
        if isinstance(v, Weight):

            def bind(form: Form) -> SSAValue:
                rows, columns = (round_up(n, m) for n, m in zip(form.reshape, form.pad, strict=True))
                return self._parameter(i, form, rows * columns * v.dtype.bytes)

            return Weight.of(v.shape, v.dtype, bind, v.literal)
        self.slots[i] = Slot(direct or f"{self.name}.arg{i}", v, direct)
        return self.slot_tensor(i, self.em)

    def _parameter(self, i: int, form: Form | None, nbytes: int) -> SSAValue:
        """The routine argument that carries argument `i` in `form`."""
        block = self.em.block
        if (i, form) not in self.parameters:
            self.parameters.append((i, form))
            return block.insert_arg(buffer_type("hbm", nbytes), len(block.args))
        return block.args[self.parameters.index((i, form))]

    def slot_tensor(self, i: int, em: Emitter) -> Tensor:
        """The argument slot seen from the routine `em` writes."""
        slot = self.slots[i]
        return in_global(slot.like, slot.name, em)

    def _return(self, values: Sequence[SSAValue], function: func.FuncOp) -> None:
        for n, value in enumerate(values):
            v = self.env[value]
            if isinstance(v, Stored):
                arguments = [self.env[a] for a in function.body.block.args]
                source = next(i for i, a in enumerate(arguments) if isinstance(a, Stored) and a.buffer is v.buffer)
                self.results.append(source)
                self.templates.append(None)
                continue
            t = self.tensor(value)
            name = f"{self.name}.result{n}"
            target = in_global(t, name, self.em)
            if t.space == Space.HBM:
                assert t.rows is not None
                self.em.dma(
                    hbm(t.buffer, t.base),
                    hbm(target.buffer, target.base),
                    [(t.rows.physical, t.pitch, target.pitch)],
                    round_up(t.row_bytes, 8),
                )
            else:
                names = [f"d{k}" for k in range(len(t.dims))]
                self.vector.map(ex.Input(0), [t], [names], names, t.dtype, target=target)
            self.results.append(name)
            self.templates.append(t)

    def result_tensor(self, n: int, em: Emitter) -> Tensor:
        """Result `n` seen from the caller."""
        template, name = self.templates[n], self.results[n]
        assert template is not None
        assert isinstance(name, str)
        return in_global(template, name, em)


def _bytes(buffer: SSAValue) -> int:
    assert isinstance(buffer.type, BufferType)
    return buffer.type.nbytes.data
