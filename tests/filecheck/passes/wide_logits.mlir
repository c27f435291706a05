// RUN: rngdc opt %s -p wide-logits --split-input-file | filecheck %s

// The contraction that makes the logits returns its accumulator; other results stay as they are.
// CHECK-LABEL: func.func @main
// CHECK-SAME: -> (tensor<2x1x16xf32>, tensor<2x1x8xbf16>)
// CHECK: tc.contract "b s i, v i -> b s v" (%{{.*}}, %{{.*}}) : tensor<2x1x16xf32>
func.func @main(%x: tensor<2x1x8xbf16>) -> (tensor<2x1x16xbf16>, tensor<2x1x8xbf16>) attributes {result_names = ["logits", "other"]} {
  %w = tc.weight "head" : tensor<16x8xbf16>
  %y = tc.contract "b s i, v i -> b s v" (%x, %w) : tensor<2x1x16xbf16>
  func.return %y, %x : tensor<2x1x16xbf16>, tensor<2x1x8xbf16>
}

// -----

// Softcapping is one pass with the contraction.
// CHECK-LABEL: func.func @main
// CHECK: tc.contract {{.*}} : tensor<2x1x16xf32>
// CHECK-NEXT: tc.map "mul(tanh(mul(a, 0.5)), 2.0)" {{.*}} : tensor<2x1x16xf32>
func.func @main(%x: tensor<2x1x8xbf16>) -> tensor<2x1x16xbf16> attributes {result_names = ["logits"]} {
  %w = tc.weight "head" : tensor<16x8xbf16>
  %y = tc.contract "b s i, v i -> b s v" (%x, %w) : tensor<2x1x16xbf16>
  %z = tc.map "mul(tanh(mul(a, 0.5)), 2.0)" over "b s v -> b s v" (%y) : tensor<2x1x16xbf16>
  func.return %z : tensor<2x1x16xbf16>
}

// -----

// No logits, nothing to do; what something else reads keeps its rounding.
// CHECK-LABEL: func.func @main
// CHECK: tc.contract {{.*}} : tensor<2x1x16xbf16>
// CHECK-NEXT: func.return
func.func @main(%x: tensor<2x1x8xbf16>) -> tensor<2x1x16xbf16> attributes {result_names = ["last_hidden_state"]} {
  %w = tc.weight "head" : tensor<16x8xbf16>
  %y = tc.contract "b s i, v i -> b s v" (%x, %w) : tensor<2x1x16xbf16>
  func.return %y : tensor<2x1x16xbf16>
}
