"""bind-quantized: contractions with quantized weights become products of stored numbers, with scales behind.

Before:
    module attribute tc.quantized = {"up.weight" = "int8 channel dynamic"}
    %w = tc.weight "up.weight" : tensor<96x64xbf16>
    %y = tc.contract "b s i, o i -> b s o" (%x, %w) : tensor<?x?x96xbf16, #tc.axes<"B,S,_">>
After:
    %w = tc.weight "up.weight" : tensor<96x64xi8>
    %c = tc.weight "up.weight_scale" : tensor<96xf32>
    %m = tc.reduce max "abs(a)" over "b s i -> b s" (%x) : tensor<?x?xf32, #tc.axes<"B,S">>
    %s = tc.map "max(mul(a, 0.00784313725490196), 1e-12)" over "b s -> b s" (%m) : tensor<?x?xf32, #tc.axes<"B,S">>
    %q = tc.map "div(a, b)" over "b s i, b s -> b s i" (%x, %s) : tensor<?x?x64xi8, #tc.axes<"B,S,_">>
    %a = tc.contract "b s i, o i -> b s o" (%q, %w) : tensor<?x?x96xf32, #tc.axes<"B,S,_">>
    %y = tc.map "mul(mul(a, b), c)" over "b s o, b s, o -> b s o" (%a, %s, %c) : tensor<?x?x96xbf16, ...>

4-bit weights become `tc.dequantize`. Block functions get the scales as further arguments; a block whose calls differ in
what is quantized is copied. The activations' numbers of contractions with one input merge in `simplify`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from typing_extensions import override
from xdsl.context import Context
from xdsl.dialects.builtin import ArrayAttr, FunctionType, ModuleOp, StringAttr
from xdsl.dialects.func import CallOp, FuncOp, ReturnOp
from xdsl.ir import Operation, SSAValue
from xdsl.passes import ModulePass
from xdsl.rewriter import Rewriter

from ir.dialects import tc
from ir.errors import Problem, UserError
from ir.interpreter import names_of
from ir.quantization import ELEMENT, LARGEST, QUANTIZED, SMALLEST_SCALE, WEIGHT, Scheme, schemes_of
from ir.types import labelled_dims, shape_of, tensor_type, with_elem
from passes.provenance import inherit

Parts = dict[str, SSAValue]
"""What stands in for a weight: the last word of the tensor's name (`weight`, `weight_scale`, ...) -> value."""


def scheme_of(value: SSAValue, schemes: Mapping[str, Scheme]) -> Scheme | None:
    """The scheme of a weight of `@main`."""
    return schemes.get(value.owner.fqn.data) if isinstance(value.owner, tc.WeightOp) else None


def split_blocks(module: ModuleOp, schemes: Mapping[str, Scheme]) -> dict[FuncOp, list[Scheme | None]]:
    """The scheme of every argument of every called function; a function whose calls disagree is copied."""
    functions = {f.sym_name.data: f for f in module.ops if isinstance(f, FuncOp)}
    made: dict[tuple[str, tuple[Scheme | None, ...]], FuncOp] = {}
    for call in [op for op in module.walk() if isinstance(op, CallOp)]:
        name = call.callee.string_value()
        key = (name, tuple(scheme_of(v, schemes) for v in call.arguments))
        if key not in made:
            number = sum(known == name for known, _ in made)
            function = functions[name]
            if number:
                function = functions[name].clone()
                function.properties["sym_name"] = StringAttr(f"{name}_q{number}")
                module.body.block.insert_op_before(function, functions[name])
            made[key] = function
    # Names change only now: `clone` above must still find what the first call meant.
    calls = [op for op in module.walk() if isinstance(op, CallOp)]
    for call in calls:
        key = (call.callee.string_value(), tuple(scheme_of(v, schemes) for v in call.arguments))
        if key in made and made[key].sym_name != functions[key[0]].sym_name:
            new = CallOp(made[key].sym_name.data, list(call.arguments), [r.type for r in call.results])
            new.attributes |= call.attributes
            inherit(new, call)
            Rewriter.replace_op(call, new)
    return {function: list(found) for (_, found), function in made.items()}


def refuse(name: str, use: str) -> UserError:
    """A quantized weight that something else than a linear layer reads."""
    why = f"it is read by {use}, and only contractions over its last dimension are computed on stored numbers"
    return UserError([Problem(f"weight {name} is quantized", why, "add its module to `ignore` of the checkpoint")])


def rewrite_uses(value: SSAValue, scheme: Scheme, parts: Parts, name: str) -> None:
    """Replace the contractions that read `value`. Raises UserError for any other use in its function."""
    for use in list(value.uses):
        op = use.operation
        if isinstance(op, CallOp):
            continue  # the callee is rewritten on its own
        if not isinstance(op, tc.ContractOp):
            raise refuse(name, op.name)
        rule = op.rule()
        n, k = rule.inputs[use.index]
        if k in rule.output or n not in rule.output or k not in rule.inputs[1 - use.index]:
            raise refuse(name, f"a contraction `{rule}`")
        if scheme.kind == "int4":
            kind = tensor_type("bf16", shape_of(value))
            op.operands[use.index] = insert(tc.DequantizeOp(parts["weight_packed"], parts["weight_scale"], kind), op)
        else:
            replace_contraction(op, use.index, scheme, parts)


def insert(op: Operation, origin: Operation) -> SSAValue:
    """Put an operation in front of the one it is made for."""
    inherit(op, origin)
    assert origin.parent is not None
    origin.parent.insert_op_before(op, origin)
    return op.results[0]


def replace_contraction(op: tc.ContractOp, side: int, scheme: Scheme, parts: Parts) -> None:
    """Quantize the activations, multiply stored numbers, apply the scales."""
    rule, x = op.rule(), op.operands[1 - side]
    axes, k = rule.inputs[1 - side], rule.inputs[side][1]
    inner, n = " ".join(axes), rule.inputs[side][0]
    if scheme.dynamic:
        kept = [i for i, a in enumerate(axes) if a != k]
        rows = " ".join(axes[i] for i in kept)
        dims = labelled_dims(x)
        small = tensor_type("f32", [dims[i] for i in kept])
        largest = insert(tc.ReduceOp([x], "max", "abs(a)", f"{inner} -> {rows}", small), op)
        text = f"max(mul(a, {1 / LARGEST[scheme.kind]!r}), {SMALLEST_SCALE!r})"
        scale = insert(tc.MapOp([largest], text, f"{rows} -> {rows}", small), op)
    else:
        rows, scale = "", parts["input_scale"]
    numbers = with_elem(x, ELEMENT[scheme.kind])
    q = insert(tc.MapOp([x, scale], "div(a, b)", f"{inner}, {rows} -> {inner}", numbers), op)
    operands = [parts["weight"], q] if side == 0 else [q, parts["weight"]]
    sums = insert(tc.ContractOp(operands[0], operands[1], str(rule), with_elem(op.result, "f32")), op)
    output = " ".join(rule.output)
    channels = n if scheme.per_channel else ""
    scaled = tc.MapOp(
        [sums, scale, parts["weight_scale"]],
        "mul(mul(a, b), c)",
        f"{output}, {rows}, {channels} -> {output}",
        op.result_type,
    )
    inherit(scaled, op)
    Rewriter.replace_op(op, scaled)


def part_name(fqn: str) -> str:
    """`model.layers.0.up_proj.weight_scale` -> `weight_scale`."""
    return fqn.rsplit(".", 1)[-1]


def rebuild_function(function: FuncOp, found: list[Scheme | None]) -> None:
    """Give a block function the arguments of the quantized form and rewrite its contractions."""
    block = function.body.block
    names = names_of(function, "arg_names", len(block.args))
    new_names: list[str] = []
    for value, name, scheme in zip(list(block.args), names, found, strict=True):
        if scheme is None:
            new_names.append(name)
            continue
        parts: Parts = {}
        wanted = scheme.tensors(WEIGHT, (shape_of(value)[0], shape_of(value)[1]))
        for fqn, (shape, elem) in wanted.items():
            arg = block.insert_arg(tensor_type(elem, list(shape)), value.index)  # in front of the old one
            part = part_name(fqn)
            arg.name_hint = None if value.name_hint is None else f"{value.name_hint}_{part}"
            new_names.append(name if part == "weight" else f"{name.removesuffix(WEIGHT)}.{part}")
            parts[part] = arg
        rewrite_uses(value, scheme, parts, name)
        block.erase_arg(value)
    if "arg_names" in function.attributes:
        function.attributes["arg_names"] = ArrayAttr([StringAttr(n) for n in new_names])
    end = block.last_op
    assert isinstance(end, ReturnOp)
    function.function_type = FunctionType.from_lists([a.type for a in block.args], [o.type for o in end.operands])


@dataclass(frozen=True)
class BindQuantized(ModulePass):
    """Compute with the stored numbers of quantized weights."""

    name = "bind-quantized"

    @override
    def apply(self, ctx: Context, op: ModuleOp) -> None:
        schemes = schemes_of(op)
        if not schemes:
            return
        for function, found in split_blocks(op, schemes).items():
            if any(found):
                rebuild_function(function, found)
        parts: dict[SSAValue, Parts] = {}
        weights = [w for w in op.walk() if isinstance(w, tc.WeightOp) and w.fqn.data in schemes]
        for weight in weights:
            scheme = schemes[weight.fqn.data]
            shape = shape_of(weight.result)
            held: Parts = {}
            for fqn, (sizes, elem) in scheme.tensors(weight.fqn.data, (shape[0], shape[1])).items():
                held[part_name(fqn)] = insert(tc.WeightOp(fqn, tensor_type(elem, list(sizes))), weight)
            parts[weight.result] = held
            rewrite_uses(weight.result, scheme, held, weight.fqn.data)
        for call in [o for o in op.walk() if isinstance(o, CallOp)]:
            operands = [v for a in call.arguments for v in (parts[a].values() if a in parts else [a])]
            if len(operands) != len(call.arguments) or any(a in parts for a in call.arguments):
                new = CallOp(call.callee.string_value(), operands, [r.type for r in call.results])
                new.attributes |= call.attributes
                inherit(new, call)
                Rewriter.replace_op(call, new)
        for weight in weights:
            Rewriter.erase_op(weight)
        del op.attributes[QUANTIZED]
