"""Block functions: lowered once, called with each layer's weights and caches."""

from __future__ import annotations

from collections.abc import Sequence

from xdsl.dialects import func
from xdsl.ir import SSAValue

from backend_rngd.dialect import BufferType, buffer_type
from backend_rngd.lowering.context import Program
from backend_rngd.lowering.function import FunctionLowering
from backend_rngd.lowering.pieces import Pieces
from backend_rngd.lowering.slots import Slots
from backend_rngd.lowering.tensor import Tensor, round_up
from backend_rngd.lowering.values import Form, Stored, Value, Weight
from passes.outline import OUTLINED

EARLY_BYTES = 128 * 1024  # of a slice, for weights that a layer loads while the layer before it ends


class BlockLowering(FunctionLowering):
    """A function that `@main` calls, lowered once; weights and caches come as HBM addresses, activations in `slots`.

    The routine gets one argument per weight form it asks for and one per cache: `parameters` lists them in order.
    `results` are tensors in their slots, or the number of the argument whose cache was updated.
    """

    def __init__(
        self, parent: Program, function: func.FuncOp, operands: Sequence[Value], slots: Slots, call: func.CallOp
    ) -> None:
        super().__init__(parent, function, parent.routine(function.sym_name.data))
        self.slots = slots
        self.parameters: list[tuple[int, Form | None]] = []
        self.results: list[int | Tensor | Pieces] = []
        self.em.location = self.name
        if OUTLINED not in function.attributes:
            self.em.early_bytes = EARLY_BYTES
        for i, (arg, v) in enumerate(zip(function.body.block.args, operands, strict=True)):
            self.env[arg] = self._bind(i, v, call.operands[i])
        returned = function.body.block.last_op
        assert isinstance(returned, func.ReturnOp)
        self.outputs = {
            inner: slots.outputs[outer]
            for inner, outer in zip(returned.operands, call.results, strict=True)
            if outer in slots.outputs
        }
        self._return(self.walk(), call)
        self.group.finish()

    def _bind(self, i: int, v: Value, value: SSAValue) -> Value:
        if isinstance(v, Stored):
            return Stored(self._parameter(i, None, _bytes(v.buffer)), v.shape)
        if isinstance(v, Weight):

            def bind(form: Form) -> SSAValue:
                rows, columns = (round_up(n, m) for n, m in zip(form.reshape, form.pad, strict=True))
                return self._parameter(i, form, rows * columns * v.dtype.bytes)

            return Weight.of(v.shape, v.dtype, bind, v.literal)
        return self.slots.place(value, v, self.em)

    def _parameter(self, i: int, form: Form | None, nbytes: int) -> SSAValue:
        """The routine argument that carries argument `i` in `form`."""
        block = self.em.block
        if (i, form) not in self.parameters:
            self.parameters.append((i, form))
            return block.insert_arg(buffer_type("hbm", nbytes), len(block.args))
        return block.args[self.parameters.index((i, form))]

    def _return(self, values: Sequence[SSAValue], call: func.CallOp) -> None:
        for value, result in zip(values, call.results, strict=True):
            v = self.env[value]
            if isinstance(v, Stored):
                arguments = [self.env[a] for a in self.function.body.block.args]
                self.results.append(
                    next(i for i, a in enumerate(arguments) if isinstance(a, Stored) and a.buffer is v.buffer)
                )
                continue
            if value in self.outputs:
                self.results.append(self.output(self.tensor(value), self.outputs[value]))
                continue
            target = self.slots.place(result, v if isinstance(v, Pieces) else self.tensor(value), self.em)
            if isinstance(target, Pieces):
                self.move(self.pieces(value).held, target.held)
            else:
                self.move(self.tensor(value), target)
            self.results.append(target)


def _bytes(buffer: SSAValue) -> int:
    assert isinstance(buffer.type, BufferType)
    return buffer.type.nbytes.data
