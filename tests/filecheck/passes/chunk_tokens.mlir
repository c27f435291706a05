// RUN: rngdc opt %s -p 'chunk-tokens{tokens=4}' --split-input-file | filecheck %s

// Six tokens of one row in two chunks of three: functions shrink, caches go from chunk to chunk, the head gets its row.
// CHECK-LABEL: func.func private @cut_0
// CHECK: tc.slice %ids axis 1 start 0 size 3
// CHECK: tc.map "sub(a, 0.0)" over "a -> a" (%last)
// CHECK-LABEL: func.func private @embed
// CHECK: tc.gather "v h, b s -> b s h" {{.*}} : tensor<1x3x8xbf16
// CHECK-LABEL: func.func private @block_0
// CHECK: tc.reshape {{.*}} : tensor<3x8xbf16
// CHECK: tc.attention {{.*}} : tensor<1x3x1x8xbf16
// CHECK-LABEL: func.func private @pick_first
// CHECK: tc.map "min(max(a, 0.0), 2.0)"
// CHECK: tc.gather "b s h, b -> b h"
// CHECK: tc.map "mul(a, mul(min(max(add(b, 1.0), 0.0), 1.0), min(max(sub(3.0, b), 0.0), 1.0)))" over "b h, b -> b h"
// CHECK-LABEL: func.func private @cut_1
// CHECK: tc.slice %ids axis 1 start 3 size 3
// CHECK: tc.map "sub(a, 3.0)"
// CHECK-LABEL: func.func private @pick(
// CHECK: tc.map "add(c, mul(a, {{.*}} over "b h, b, b h -> b h"
// CHECK-LABEL: func.func private @head
// CHECK-SAME: (%{{.*}}: tensor<1x8xbf16
// CHECK-NOT: tc.gather
// CHECK-LABEL: func.func @main
// CHECK: [[I0:%.*]], [[P0:%.*]], [[A0:%.*]] = func.call @cut_0(%ids, %pos, %last)
// CHECK: [[X0:%.*]] = func.call @embed({{.*}}, [[I0]])
// CHECK: [[Y0:%.*]], [[K0:%.*]] = func.call @block_0([[X0]], [[P0]], %k) {path = "model.layers.0", chunk = 0 : i64}
// CHECK: [[R0:%.*]] = func.call @pick_first([[Y0]], [[A0]])
// CHECK: [[I1:%.*]], [[P1:%.*]], [[A1:%.*]] = func.call @cut_1(%ids, %pos, %last)
// CHECK: [[X1:%.*]] = func.call @embed({{.*}}, [[I1]])
// CHECK: [[Y1:%.*]], [[K1:%.*]] = func.call @block_0([[X1]], [[P1]], [[K0]]) {path = "model.layers.0", chunk = 1 : i64}
// CHECK: [[R1:%.*]] = func.call @pick([[Y1]], [[A1]], [[R0]])
// CHECK: [[L:%.*]] = func.call @head([[R1]]
// CHECK: func.return [[L]], [[K1]]
func.func private @embed(%w: tensor<16x8xbf16>, %ids: tensor<1x6xi32, #tc.axes<"B,S">>) -> tensor<1x6x8xbf16, #tc.axes<"B,S,_">> attributes {tc.outlined, arg_names = ["w", "ids"]} {
  %x = tc.gather "v h, b s -> b s h" (%w, %ids) : tensor<1x6x8xbf16, #tc.axes<"B,S,_">>
  func.return %x : tensor<1x6x8xbf16, #tc.axes<"B,S,_">>
}
func.func private @block_0(%x: tensor<1x6x8xbf16, #tc.axes<"B,S,_">>, %pos: tensor<1x6xi32, #tc.axes<"B,S">>, %k: tensor<1x1x9x8xbf16>) -> (tensor<1x6x8xbf16, #tc.axes<"B,S,_">>, tensor<1x1x9x8xbf16>) {
  %f = tc.reshape %x : tensor<6x8xbf16, #tc.axes<"B*S,_">>
  %h = tc.reshape %f : tensor<1x1x6x8xbf16, #tc.axes<"B,_,S,_">>
  %k1 = tc.kv_update (%k, %h, %pos) : tensor<1x1x9x8xbf16>
  %o = tc.attention (%h, %k1, %k1, %pos) scale 0.5 causal true window 0 softcap 0.0 : tensor<1x6x1x8xbf16, #tc.axes<"B,S,_,_">>
  %y = tc.reshape %o : tensor<1x6x8xbf16, #tc.axes<"B,S,_">>
  func.return %y, %k1 : tensor<1x6x8xbf16, #tc.axes<"B,S,_">>, tensor<1x1x9x8xbf16>
}
func.func private @head(%x: tensor<1x6x8xbf16, #tc.axes<"B,S,_">>, %last: tensor<1xi32, #tc.axes<"B">>, %w: tensor<16x8xbf16>) -> tensor<1x16xf32> attributes {tc.outlined, arg_names = ["x", "last", "w"]} {
  %r = tc.gather "b s h, b -> b h" (%x, %last) : tensor<1x8xbf16, #tc.axes<"B,_">>
  %l = tc.contract "b i, v i -> b v" (%r, %w) : tensor<1x16xf32>
  func.return %l : tensor<1x16xf32>
}
func.func @main(%ids: tensor<1x6xi32, #tc.axes<"B,S">>, %pos: tensor<1x6xi32, #tc.axes<"B,S">>, %last: tensor<1xi32, #tc.axes<"B">>, %k: tensor<1x1x9x8xbf16>) -> (tensor<1x16xf32>, tensor<1x1x9x8xbf16>) attributes {arg_names = ["ids", "pos", "last", "cache.k"], result_names = ["logits", "cache.k"]} {
  %w = tc.weight "embed" : tensor<16x8xbf16>
  %x = func.call @embed(%w, %ids) {path = "embed"} : (tensor<16x8xbf16>, tensor<1x6xi32, #tc.axes<"B,S">>) -> tensor<1x6x8xbf16, #tc.axes<"B,S,_">>
  %y, %k1 = func.call @block_0(%x, %pos, %k) {path = "model.layers.0"} : (tensor<1x6x8xbf16, #tc.axes<"B,S,_">>, tensor<1x6xi32, #tc.axes<"B,S">>, tensor<1x1x9x8xbf16>) -> (tensor<1x6x8xbf16, #tc.axes<"B,S,_">>, tensor<1x1x9x8xbf16>)
  %l = func.call @head(%y, %last, %w) {path = "head"} : (tensor<1x6x8xbf16, #tc.axes<"B,S,_">>, tensor<1xi32, #tc.axes<"B">>, tensor<16x8xbf16>) -> tensor<1x16xf32>
  func.return %l, %k1 : tensor<1x16xf32>, tensor<1x1x9x8xbf16>
}

// -----

// A sum over the tokens needs all of them: the program stays whole, and says why.
// CHECK: tc.notes = ["1 x 6 tokens are not computed in chunks: @block_0: tc.reduce `b s h -> b h` mixes tokens"]
// CHECK-NOT: func.func private @cut_0
func.func private @embed(%w: tensor<16x8xbf16>, %ids: tensor<1x6xi32, #tc.axes<"B,S">>) -> tensor<1x6x8xbf16, #tc.axes<"B,S,_">> attributes {tc.outlined, arg_names = ["w", "ids"]} {
  %x = tc.gather "v h, b s -> b s h" (%w, %ids) : tensor<1x6x8xbf16, #tc.axes<"B,S,_">>
  func.return %x : tensor<1x6x8xbf16, #tc.axes<"B,S,_">>
}
func.func private @block_0(%x: tensor<1x6x8xbf16, #tc.axes<"B,S,_">>) -> tensor<1x8xf32> {
  %y = tc.reduce add "a" over "b s h -> b h" (%x) : tensor<1x8xf32>
  func.return %y : tensor<1x8xf32>
}
func.func @main(%ids: tensor<1x6xi32, #tc.axes<"B,S">>) -> tensor<1x8xf32> attributes {arg_names = ["ids"], result_names = ["sum"]} {
  %w = tc.weight "embed" : tensor<16x8xbf16>
  %x = func.call @embed(%w, %ids) {path = "embed"} : (tensor<16x8xbf16>, tensor<1x6xi32, #tc.axes<"B,S">>) -> tensor<1x6x8xbf16, #tc.axes<"B,S,_">>
  %y = func.call @block_0(%x) {path = "model.layers.0"} : (tensor<1x6x8xbf16, #tc.axes<"B,S,_">>) -> tensor<1x8xf32>
  func.return %y : tensor<1x8xf32>
}
