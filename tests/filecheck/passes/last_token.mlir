// RUN: rngdc opt %s -p last-token --split-input-file | filecheck %s

// Up through the head and the norm, to the result of the last block; arguments and names follow.
// CHECK-LABEL: func.func @main
// CHECK-SAME: %last: tensor<?xi32, #tc.axes<"B">>, %cache:
// CHECK-SAME: (tensor<?x1x16xbf16, #tc.axes<"B,_,_">>, tensor<?x?x8xbf16, #tc.axes<"B,KV,_">>)
// CHECK-SAME: arg_names = ["input_ids", "position_ids", "last", "cache.k.0"]
func.func private @block(%x: tensor<?x?x8xbf16, #tc.axes<"B,S,_">>) -> tensor<?x?x8xbf16, #tc.axes<"B,S,_">> {
  func.return %x : tensor<?x?x8xbf16, #tc.axes<"B,S,_">>
}
func.func @main(%ids: tensor<?x?xi32, #tc.axes<"B,S">>, %pos: tensor<?x?xi32, #tc.axes<"B,S">>, %cache: tensor<?x?x8xbf16, #tc.axes<"B,KV,_">>) -> (tensor<?x?x16xbf16, #tc.axes<"B,S,_">>, tensor<?x?x8xbf16, #tc.axes<"B,KV,_">>) attributes {arg_names = ["input_ids", "position_ids", "cache.k.0"], result_names = ["logits", "cache.k.0"]} {
  %table = tc.weight "embed" : tensor<16x8xbf16>
  %g = tc.weight "norm" : tensor<8xbf16>
  %x = tc.gather "v h, b s -> b s h" (%table, %ids) : tensor<?x?x8xbf16, #tc.axes<"B,S,_">>
  // CHECK: %[[H:.*]] = func.call @block
  // CHECK-NEXT: %[[R:.*]] = tc.gather "a b c, a -> a c" (%[[H]], %last) {path = "layers.0"} : tensor<?x8xbf16, #tc.axes<"B,_">>
  // CHECK-NEXT: %[[X:.*]] = tc.reshape %[[R]] {path = "layers.0"} : tensor<?x1x8xbf16, #tc.axes<"B,_,_">>
  // CHECK-NEXT: %[[V:.*]] = tc.reduce add "square(a)" over "b s h -> b s" (%[[X]]) : tensor<?x1xf32, #tc.axes<"B,_">>
  // CHECK-NEXT: %[[N:.*]] = tc.map "mul(mul(a, rsqrt(b)), c)" over "b s h, b s, h -> b s h" (%[[X]], %[[V]], %{{.*}}) : tensor<?x1x8xbf16, #tc.axes<"B,_,_">>
  // CHECK-NEXT: %[[M:.*]] = tc.reshape %[[N]] : tensor<?x8xbf16, #tc.axes<"B,_">>
  // CHECK-NEXT: %[[L:.*]] = tc.contract "n i, v i -> n v" (%[[M]], %{{.*}}) : tensor<?x16xbf16, #tc.axes<"B,_">>
  // CHECK-NEXT: %[[Y:.*]] = tc.reshape %[[L]] : tensor<?x1x16xbf16, #tc.axes<"B,_,_">>
  // CHECK-NEXT: func.return %[[Y]], %cache
  %h = func.call @block(%x) {path = "layers.0"} : (tensor<?x?x8xbf16, #tc.axes<"B,S,_">>) -> tensor<?x?x8xbf16, #tc.axes<"B,S,_">>
  %v = tc.reduce add "square(a)" over "b s h -> b s" (%h) : tensor<?x?xf32, #tc.axes<"B,S">>
  %n = tc.map "mul(mul(a, rsqrt(b)), c)" over "b s h, b s, h -> b s h" (%h, %v, %g) : tensor<?x?x8xbf16, #tc.axes<"B,S,_">>
  %m = tc.reshape %n : tensor<?x8xbf16, #tc.axes<"B*S,_">>
  %l = tc.contract "n i, v i -> n v" (%m, %table) : tensor<?x16xbf16, #tc.axes<"B*S,_">>
  %y = tc.reshape %l : tensor<?x?x16xbf16, #tc.axes<"B,S,_">>
  func.return %y, %cache : tensor<?x?x16xbf16, #tc.axes<"B,S,_">>, tensor<?x?x8xbf16, #tc.axes<"B,KV,_">>
}

// -----

// A reduction over tokens, or a sum over rows of other tokens, stops it.
// CHECK-LABEL: func.func @main
func.func @main(%x: tensor<?x?x8xf32, #tc.axes<"B,S,_">>) -> tensor<?x?x8xf32, #tc.axes<"B,S,_">> attributes {arg_names = ["x"], result_names = ["logits"]} {
  // CHECK-NEXT: %[[S:.*]] = tc.reduce add "a" over "b s h -> b h" (%x)
  // CHECK-NEXT: tc.gather "a b c, a -> a c" (%x, %last)
  // CHECK: tc.map "sub(a, b)" over "b s h, b h -> b s h" (%{{.*}}, %[[S]]) : tensor<?x1x8xf32, #tc.axes<"B,_,_">>
  %s = tc.reduce add "a" over "b s h -> b h" (%x) : tensor<?x8xf32, #tc.axes<"B,_">>
  %y = tc.map "sub(a, b)" over "b s h, b h -> b s h" (%x, %s) : tensor<?x?x8xf32, #tc.axes<"B,S,_">>
  func.return %y : tensor<?x?x8xf32, #tc.axes<"B,S,_">>
}

// -----

// So does an operation whose other operand runs over tokens too.
// CHECK-LABEL: func.func @main
func.func @main(%x: tensor<?x?x8xf32, #tc.axes<"B,S,_">>, %m: tensor<?x?x?xf32, #tc.axes<"B,S,S">>) -> tensor<?x?x8xf32, #tc.axes<"B,S,_">> attributes {arg_names = ["x", "m"], result_names = ["logits"]} {
  // CHECK-NEXT: %[[Y:.*]] = tc.contract "b s t, b t h -> b s h" (%m, %x)
  // CHECK-NEXT: tc.gather "a b c, a -> a c" (%[[Y]], %last)
  %y = tc.contract "b s t, b t h -> b s h" (%m, %x) : tensor<?x?x8xf32, #tc.axes<"B,S,_">>
  func.return %y : tensor<?x?x8xf32, #tc.axes<"B,S,_">>
}

// -----

// An encoder has no logits.
// CHECK-LABEL: func.func @main
// CHECK-NEXT: func.return %x
func.func @main(%x: tensor<?x?x8xf32, #tc.axes<"B,S,_">>) -> tensor<?x?x8xf32, #tc.axes<"B,S,_">> attributes {arg_names = ["x"], result_names = ["last_hidden_state"]} {
  func.return %x : tensor<?x?x8xf32, #tc.axes<"B,S,_">>
}
