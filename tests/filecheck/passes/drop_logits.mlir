// RUN: rngdc opt %s -p drop-logits --split-input-file | filecheck %s

// The head goes with its weight and with the argument that only it reads; the call stays, for it updates the cache.
// CHECK-LABEL: func.func @main
// CHECK-SAME: (%x: tensor<2x8xbf16>, %k: tensor<2x4xbf16>) -> tensor<2x4xbf16>
// CHECK-SAME: arg_names = ["x", "cache.k"]
// CHECK-SAME: result_names = ["cache.k"]
// CHECK-NOT: tc.weight
// CHECK: func.call @block_0
// CHECK-NEXT: func.return %{{.*}} : tensor<2x4xbf16>
func.func private @block_0(%x: tensor<2x8xbf16>, %k: tensor<2x4xbf16>) -> (tensor<2x8xbf16>, tensor<2x4xbf16>) {
  func.return %x, %k : tensor<2x8xbf16>, tensor<2x4xbf16>
}
func.func @main(%x: tensor<2x8xbf16>, %last: tensor<2xi32>, %k: tensor<2x4xbf16>) -> (tensor<2x16xbf16>, tensor<2x4xbf16>) attributes {arg_names = ["x", "last", "cache.k"], result_names = ["logits", "cache.k"]} {
  %w = tc.weight "head" : tensor<16x8xbf16>
  %y, %k1 = func.call @block_0(%x, %k) : (tensor<2x8xbf16>, tensor<2x4xbf16>) -> (tensor<2x8xbf16>, tensor<2x4xbf16>)
  %r = tc.gather "v h, b -> b h" (%y, %last) : tensor<2x8xbf16>
  %z = tc.contract "b i, v i -> b v" (%r, %w) : tensor<2x16xbf16>
  func.return %z, %k1 : tensor<2x16xbf16>, tensor<2x4xbf16>
}

// -----

// Without logits nothing changes.
// CHECK-LABEL: func.func @main
// CHECK: tc.contract
// CHECK-NEXT: func.return
func.func @main(%x: tensor<2x8xbf16>) -> tensor<2x16xbf16> attributes {result_names = ["last_hidden_state"]} {
  %w = tc.weight "head" : tensor<16x8xbf16>
  %y = tc.contract "b i, v i -> b v" (%x, %w) : tensor<2x16xbf16>
  func.return %y : tensor<2x16xbf16>
}
