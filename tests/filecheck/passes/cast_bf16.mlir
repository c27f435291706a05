// RUN: rngdc opt %s -p 'cast-bf16{allow=true}' | filecheck %s
// RUN: not rngdc opt %s -p cast-bf16 2>&1 | filecheck %s --check-prefix REFUSE
// REFUSE: error: 3 weights are fp16 or fp32 (embed, w, half): the matrix engine computes in bf16
// REFUSE: fix: pass --auto-bfloat16-cast (allow=true)

// Weights and caches change at their source, through calls; activations are rounded where the engine reads them.
// CHECK: func.func private @block(%x: tensor<?x?x8xf32, #tc.axes<"B,S,_">>, %w: tensor<8x8xbf16>, %g: tensor<8xf32>, %pos: tensor<?x?xi32, #tc.axes<"B,S">>, %c: tensor<?x1x?x8xbf16, #tc.axes<"B,_,KV,_">>) -> (tensor<?x?x8xf32, #tc.axes<"B,S,_">>, tensor<?x1x?x8xbf16, #tc.axes<"B,_,KV,_">>)
func.func private @block(%x: tensor<?x?x8xf32, #tc.axes<"B,S,_">>, %w: tensor<8x8xf32>, %g: tensor<8xf32>, %pos: tensor<?x?xi32, #tc.axes<"B,S">>, %c: tensor<?x1x?x8xf32, #tc.axes<"B,_,KV,_">>) -> (tensor<?x?x8xf32, #tc.axes<"B,S,_">>, tensor<?x1x?x8xf32, #tc.axes<"B,_,KV,_">>) {
  // CHECK-NEXT: %[[X:.*]] = tc.map "a" over "a b c -> a b c" (%x) : tensor<?x?x8xbf16, #tc.axes<"B,S,_">>
  // CHECK-NEXT: %[[Y:.*]] = tc.contract "b s i, o i -> b s o" (%[[X]], %w) : tensor<?x?x8xf32, #tc.axes<"B,S,_">>
  // CHECK-NEXT: %[[H:.*]] = tc.reshape %[[Y]] : tensor<?x1x?x8xf32, #tc.axes<"B,_,S,_">>
  // CHECK-NEXT: %[[N:.*]] = tc.map "a" over "a b c d -> a b c d" (%[[H]]) : tensor<?x1x?x8xbf16, #tc.axes<"B,_,S,_">>
  // CHECK-NEXT: tc.kv_update (%c, %[[N]], %pos) : tensor<?x1x?x8xbf16, #tc.axes<"B,_,KV,_">>
  // CHECK-NEXT: tc.map "mul(a, b)" over "b s h, h -> b s h" (%[[Y]], %g) : tensor<?x?x8xf32, #tc.axes<"B,S,_">>
  %y = tc.contract "b s i, o i -> b s o" (%x, %w) : tensor<?x?x8xf32, #tc.axes<"B,S,_">>
  %h = tc.reshape %y : tensor<?x1x?x8xf32, #tc.axes<"B,_,S,_">>
  %c2 = tc.kv_update (%c, %h, %pos) : tensor<?x1x?x8xf32, #tc.axes<"B,_,KV,_">>
  %z = tc.map "mul(a, b)" over "b s h, h -> b s h" (%y, %g) : tensor<?x?x8xf32, #tc.axes<"B,S,_">>
  func.return %z, %c2 : tensor<?x?x8xf32, #tc.axes<"B,S,_">>, tensor<?x1x?x8xf32, #tc.axes<"B,_,KV,_">>
}
// CHECK: func.func @main({{.*}}, %c: tensor<?x1x?x8xbf16, #tc.axes<"B,_,KV,_">>)
func.func @main(%ids: tensor<?x?xi32, #tc.axes<"B,S">>, %pos: tensor<?x?xi32, #tc.axes<"B,S">>, %c: tensor<?x1x?x8xf32, #tc.axes<"B,_,KV,_">>) -> (tensor<?x?x8xf32, #tc.axes<"B,S,_">>, tensor<?x1x?x8xf32, #tc.axes<"B,_,KV,_">>, tensor<4xf16>) {
  // CHECK-NEXT: tc.weight "embed" : tensor<16x8xbf16>
  %t = tc.weight "embed" : tensor<16x8xf32>
  // CHECK-NEXT: tc.weight "w" : tensor<8x8xbf16>
  %w = tc.weight "w" : tensor<8x8xf32>
  // A gain is not read by the engine.
  // CHECK-NEXT: tc.weight "gain" : tensor<8xf32>
  %g = tc.weight "gain" : tensor<8xf32>
  // CHECK-NEXT: tc.weight "half" : tensor<4xbf16>
  %half = tc.weight "half" : tensor<4xf16>
  // CHECK-NEXT: %[[E:.*]] = tc.gather "v h, b s -> b s h" (%{{.*}}, %ids) : tensor<?x?x8xbf16, #tc.axes<"B,S,_">>
  // CHECK-NEXT: tc.map "a" over "a b c -> a b c" (%[[E]]) : tensor<?x?x8xf32, #tc.axes<"B,S,_">>
  %x = tc.gather "v h, b s -> b s h" (%t, %ids) : tensor<?x?x8xf32, #tc.axes<"B,S,_">>
  %y, %c2 = func.call @block(%x, %w, %g, %pos, %c) : (tensor<?x?x8xf32, #tc.axes<"B,S,_">>, tensor<8x8xf32>, tensor<8xf32>, tensor<?x?xi32, #tc.axes<"B,S">>, tensor<?x1x?x8xf32, #tc.axes<"B,_,KV,_">>) -> (tensor<?x?x8xf32, #tc.axes<"B,S,_">>, tensor<?x1x?x8xf32, #tc.axes<"B,_,KV,_">>)
  func.return %y, %c2, %half : tensor<?x?x8xf32, #tc.axes<"B,S,_">>, tensor<?x1x?x8xf32, #tc.axes<"B,_,KV,_">>, tensor<4xf16>
}
