// RUN: rngdc opt %s -p bind-quantized --split-input-file | filecheck %s

// A block called with weights of one scheme is rewritten once; its scales become arguments.
// CHECK-LABEL: func.func private @block(%x: tensor<?x?x64xbf16, #tc.axes<"B,S,_">>, %w_weight: tensor<96x64xi8>, %w_weight_scale: tensor<96xf32>, %d_weight_packed: tensor<64x12xi32>, %d_weight_scale: tensor<64x3xf32>)
// CHECK-NEXT: [[M:%.*]] = tc.reduce max "abs(a)" over "b s i -> b s" (%x) : tensor<?x?xf32, #tc.axes<"B,S">>
// CHECK-NEXT: [[S:%.*]] = tc.map "max(mul(a, 0.00784313725490196), 1e-12)" over "b s -> b s" ([[M]]) : tensor<?x?xf32, #tc.axes<"B,S">>
// CHECK-NEXT: [[Q:%.*]] = tc.map "div(a, b)" over "b s i, b s -> b s i" (%x, [[S]]) : tensor<?x?x64xi8, #tc.axes<"B,S,_">>
// CHECK-NEXT: [[A:%.*]] = tc.contract "b s i, o i -> b s o" ([[Q]], %w_weight) : tensor<?x?x96xf32, #tc.axes<"B,S,_">>
// CHECK-NEXT: %y = tc.map "mul(mul(a, b), c)" over "b s o, b s, o -> b s o" ([[A]], [[S]], %w_weight_scale) : tensor<?x?x96xbf16, #tc.axes<"B,S,_">>
// CHECK: [[W:%.*]] = tc.dequantize (%d_weight_packed, %d_weight_scale) : tensor<64x96xbf16>
// CHECK-NEXT: tc.contract "b s i, o i -> b s o" (%z, [[W]]) : tensor<?x?x64xbf16, #tc.axes<"B,S,_">>
// CHECK-LABEL: func.func @main
// CHECK: tc.weight "up.weight" : tensor<96x64xi8>
// CHECK: tc.map "div(a, b)" over "b s i,  -> b s i" (%y, [[I:%.*]]) : tensor<?x?x64xf8E4M3FN
// CHECK-NOT: tc.quantized
builtin.module attributes {tc.quantized = {"up.weight" = "int8 channel dynamic", "a.weight" = "fp8 tensor static", "d.weight" = "int4 group 32"}} {
func.func private @block(%x: tensor<?x?x64xbf16, #tc.axes<"B,S,_">>, %w: tensor<96x64xbf16>, %d: tensor<64x96xbf16>) -> tensor<?x?x64xbf16, #tc.axes<"B,S,_">> {
    %y = tc.contract "b s i, o i -> b s o" (%x, %w) : tensor<?x?x96xbf16, #tc.axes<"B,S,_">>
    %z = tc.map "silu(a)" over "a b c -> a b c" (%y) : tensor<?x?x96xbf16, #tc.axes<"B,S,_">>
    %q = tc.contract "b s i, o i -> b s o" (%z, %d) : tensor<?x?x64xbf16, #tc.axes<"B,S,_">>
    func.return %q : tensor<?x?x64xbf16, #tc.axes<"B,S,_">>
}
func.func @main(%x: tensor<?x?x64xbf16, #tc.axes<"B,S,_">>) -> tensor<?x?x64xbf16, #tc.axes<"B,S,_">> {
  %w = tc.weight "up.weight" : tensor<96x64xbf16>
  %d = tc.weight "d.weight" : tensor<64x96xbf16>
  %a = tc.weight "a.weight" : tensor<64x64xbf16>
  %y = func.call @block(%x, %w, %d) : (tensor<?x?x64xbf16, #tc.axes<"B,S,_">>, tensor<96x64xbf16>, tensor<64x96xbf16>) -> tensor<?x?x64xbf16, #tc.axes<"B,S,_">>
  %z = tc.contract "b s i, o i -> b s o" (%y, %a) : tensor<?x?x64xbf16, #tc.axes<"B,S,_">>
  func.return %z : tensor<?x?x64xbf16, #tc.axes<"B,S,_">>
}
}

// -----

// A layer that is not quantized keeps the block as it is; the others get a copy.
// CHECK-LABEL: func.func private @block_q1(%x: tensor<2x64xbf16>, %w_weight: tensor<64x64xf8E4M3FN>, %w_weight_scale: tensor<64xf32>)
// CHECK-LABEL: func.func private @block(%x: tensor<2x64xbf16>, %w: tensor<64x64xbf16>)
// CHECK-LABEL: func.func @main
// CHECK: func.call @block(%x, %0)
// CHECK: func.call @block_q1(%y, %1, %2)
builtin.module attributes {tc.quantized = {"l1.weight" = "fp8 channel dynamic"}} {
func.func private @block(%x: tensor<2x64xbf16>, %w: tensor<64x64xbf16>) -> tensor<2x64xbf16> {
    %y = tc.contract "b i, o i -> b o" (%x, %w) : tensor<2x64xbf16>
    func.return %y : tensor<2x64xbf16>
}
func.func @main(%x: tensor<2x64xbf16>) -> tensor<2x64xbf16> {
  %0 = tc.weight "l0.weight" : tensor<64x64xbf16>
  %1 = tc.weight "l1.weight" : tensor<64x64xbf16>
  %y = func.call @block(%x, %0) : (tensor<2x64xbf16>, tensor<64x64xbf16>) -> tensor<2x64xbf16>
  %z = func.call @block(%y, %1) : (tensor<2x64xbf16>, tensor<64x64xbf16>) -> tensor<2x64xbf16>
  func.return %z : tensor<2x64xbf16>
}
}
