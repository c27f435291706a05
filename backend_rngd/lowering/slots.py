"""Where the activations lie that `@main` passes between its calls: one buffer for all values that take the same place.

The result of layer i and the operand of layer i + 1 are the same operand of one routine, so they share a buffer: a
layer reads its input there and leaves its result there, and `@main` copies nothing. So do the same layers of all
chunks, whatever number of keys they read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from xdsl.dialects import func
from xdsl.ir import SSAValue

from backend_rngd.artifact.stages import LAYER, TAIL, family, role
from backend_rngd.lowering.emitter import Emitter
from backend_rngd.lowering.pieces import Pieces
from backend_rngd.lowering.tensor import Tensor
from backend_rngd.lowering.values import in_global
from ir.errors import UnsupportedError

Key = SSAValue | tuple[str, str, int]


class Slots:
    """Names of the shared buffers of `@main`, and the layout that their first writer chose."""

    def __init__(
        self,
        main: func.FuncOp,
        outputs: Mapping[SSAValue, str],
        inputs: Mapping[SSAValue, str],
        caches: Sequence[SSAValue] = (),
    ) -> None:
        """`outputs`: values that the program returns; `inputs`: its arguments that calls read in place; `caches`:
        values that calls get by address and update in place."""
        self.calls = [op for op in main.body.block.ops if isinstance(op, func.CallOp)]
        self.outputs = dict(outputs)
        self._parent: dict[Key, Key] = {}
        self._names: dict[Key, str] = {}
        self._layout: dict[str, Tensor | Pieces] = {}
        for call in self.calls:
            name = family(call.callee.string_value())
            for i, value in enumerate(call.operands):
                self._join(value, (name, "operand", i))
            for i, value in enumerate(call.results):
                self._join(value, (name, "result", i))
        for table in (inputs, self.outputs):
            for value, name in table.items():
                root = self._root(value)
                if self._names.setdefault(root, name) != name:
                    raise UnsupportedError(
                        f"program value {name}",
                        f"it would share a buffer with {self._names[root]}, because a layer passes one on as the other",
                        "return a computed value instead",
                    )
        self._check_lives({self._root(value) for value in caches})

    def name(self, value: SSAValue) -> str:
        """The buffer of a value."""
        root = self._root(value)
        return self._names.setdefault(root, f"x{len(self._names)}")

    def place(self, value: SSAValue, like: Tensor | Pieces, em: Emitter) -> Tensor | Pieces:
        """The tensor of `value` seen from the routine of `em`; `like` gives the layout to the first who asks."""
        name = self.name(value)
        chosen = self._layout.setdefault(name, like)
        if isinstance(chosen, Pieces):
            return replace(chosen, held=in_global(chosen.held, name, em))
        return in_global(chosen, name, em)

    def known(self, value: SSAValue) -> Tensor | Pieces | None:
        """The layout of a value's buffer, if it has been chosen."""
        return self._layout.get(self.name(value))

    def handed_over(self) -> dict[str, dict[str, Tensor]]:
        """Buffers that go from one layer to the next: what a pipeline stage sends to the following one.

        By the ending of the layers' names: a shorter last chunk has layers, and buffers, of its own.
        """
        out: dict[str, dict[str, Tensor]] = {}
        for call in self.calls:
            name = call.callee.string_value()
            if role(name) == LAYER:
                made = {self.name(v) for v in call.results if self.known(v) is not None} - set(self.outputs.values())
                held = {n: v.held if isinstance(v := self._layout[n], Pieces) else v for n in made}
                out.setdefault(TAIL if name.endswith(TAIL) else "", {}).update(held)
        return {ending: dict(sorted(values.items())) for ending, values in out.items() if values}

    def _check_lives(self, caches: set[Key]) -> None:
        """A value may be overwritten by the next one in its buffer only when nothing reads it any more."""
        order = {call: i for i, call in enumerate(self.calls)}
        following: dict[Key, int] = {}  # the next call that writes a buffer, seen from the call at hand
        for call in reversed(self.calls):
            for value in call.results:
                root = self._root(value)
                uses = [order[u.operation] for u in value.uses if isinstance(u.operation, func.CallOp)]
                if root not in caches and max(uses, default=0) > following.get(root, len(order)):
                    raise UnsupportedError(
                        f"result of {call.callee.string_value()}",
                        "a later layer reads it after the next layer has written its own result",
                        "pass it through the layers",
                    )
            following |= {self._root(value): order[call] for value in call.results}

    def _join(self, a: Key, b: Key) -> None:
        self._parent[self._root(a)] = self._root(b)

    def _root(self, key: Key) -> Key:
        while self._parent.setdefault(key, key) is not key:
            key = self._parent[key]
        return key
