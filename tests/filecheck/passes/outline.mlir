// RUN: rngdc opt %s -p outline | filecheck %s

// What the inputs alone decide, what the first layer reads, and what follows the last layer become functions.
// CHECK-LABEL: func.func private @prepare(
// CHECK: tc.map "cos(a)"
// CHECK-LABEL: func.func private @embed(
// CHECK: tc.gather "v h, b s -> b s h"
// CHECK-LABEL: func.func private @head(
// CHECK: tc.contract "b s h, v h -> b s v"
// CHECK-LABEL: func.func @main(
// CHECK: [[W:%.*]] = tc.weight "embed"
// CHECK: [[C:%.*]] = func.call @prepare(%pos)
// CHECK: [[X:%.*]] = func.call @embed({{.*}})
// CHECK: [[Y:%.*]] = func.call @block_0([[X]], [[C]])
// CHECK: [[Z:%.*]] = func.call @block_0([[Y]], [[C]])
// CHECK: [[L:%.*]] = func.call @head({{.*}})
// CHECK-NEXT: func.return [[L]]
func.func private @block_0(%x: tensor<1x6x8xbf16, #tc.axes<"B,S,_">>, %c: tensor<1x6xf32, #tc.axes<"B,S">>) -> tensor<1x6x8xbf16, #tc.axes<"B,S,_">> {
  %y = tc.map "mul(a, b)" over "b s h, b s -> b s h" (%x, %c) : tensor<1x6x8xbf16, #tc.axes<"B,S,_">>
  func.return %y : tensor<1x6x8xbf16, #tc.axes<"B,S,_">>
}
func.func @main(%ids: tensor<1x6xi32, #tc.axes<"B,S">>, %pos: tensor<1x6xi32, #tc.axes<"B,S">>) -> tensor<1x6x16xf32, #tc.axes<"B,S,_">> attributes {arg_names = ["input_ids", "position_ids"], result_names = ["logits"]} {
  %w = tc.weight "embed" : tensor<16x8xbf16>
  %x = tc.gather "v h, b s -> b s h" (%w, %ids) : tensor<1x6x8xbf16, #tc.axes<"B,S,_">>
  %c = tc.map "cos(a)" over "b s -> b s" (%pos) : tensor<1x6xf32, #tc.axes<"B,S">>
  %y = func.call @block_0(%x, %c) : (tensor<1x6x8xbf16, #tc.axes<"B,S,_">>, tensor<1x6xf32, #tc.axes<"B,S">>) -> tensor<1x6x8xbf16, #tc.axes<"B,S,_">>
  %z = func.call @block_0(%y, %c) : (tensor<1x6x8xbf16, #tc.axes<"B,S,_">>, tensor<1x6xf32, #tc.axes<"B,S">>) -> tensor<1x6x8xbf16, #tc.axes<"B,S,_">>
  %l = tc.contract "b s h, v h -> b s v" (%z, %w) : tensor<1x6x16xf32, #tc.axes<"B,S,_">>
  func.return %l : tensor<1x6x16xf32, #tc.axes<"B,S,_">>
}
