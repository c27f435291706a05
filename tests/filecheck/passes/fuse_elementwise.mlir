// RUN: rngdc opt %s -p fuse-elementwise | filecheck %s
// RUN: rngdc opt %s -p 'fuse-elementwise{keep-rounding=true}' | filecheck %s --check-prefix ROUND

// An RMS norm: the widening cast goes into both readers, the rest into one map.
// CHECK-LABEL: func.func @norm
func.func @norm(%x: tensor<?x8xbf16, #tc.axes<"B,_">>, %g: tensor<8xbf16>) -> tensor<?x8xbf16, #tc.axes<"B,_">> {
  // CHECK-NEXT: %[[V:.*]] = tc.reduce add "div(square(a), 8.0)" over "b h -> b" (%x) {path = "norm"} : tensor<?xf32, #tc.axes<"B">>
  // CHECK-NEXT: %[[Y:.*]] = tc.map "mul(a, mul(b, rsqrt(add(c, 1e-06))))" over "h, b h, b -> b h" (%g, %x, %[[V]]) {path = "norm"} : tensor<?x8xbf16, #tc.axes<"B,_">>
  // CHECK-NEXT: func.return %[[Y]]
  // ROUND: tc.map "mul(a, round_bf16(mul(b, rsqrt(add(c, 1e-06)))))" over "h, b h, b -> b h"
  %0 = tc.map "a" over "b h -> b h" (%x) {path = "norm"} : tensor<?x8xf32, #tc.axes<"B,_">>
  %1 = tc.map "square(a)" over "b h -> b h" (%0) {path = "norm"} : tensor<?x8xf32, #tc.axes<"B,_">>
  %2 = tc.reduce add "div(a, 8.0)" over "b h -> b" (%1) {path = "norm"} : tensor<?xf32, #tc.axes<"B">>
  %3 = tc.map "add(a, 1e-06)" over "b -> b" (%2) {path = "norm"} : tensor<?xf32, #tc.axes<"B">>
  %4 = tc.map "rsqrt(a)" over "b -> b" (%3) {path = "norm"} : tensor<?xf32, #tc.axes<"B">>
  %5 = tc.map "mul(a, b)" over "b h, b -> b h" (%0, %4) {path = "norm"} : tensor<?x8xf32, #tc.axes<"B,_">>
  %6 = tc.map "a" over "b h -> b h" (%5) {path = "norm"} : tensor<?x8xbf16, #tc.axes<"B,_">>
  %7 = tc.map "mul(a, b)" over "h, b h -> b h" (%g, %6) {path = "norm"} : tensor<?x8xbf16, #tc.axes<"B,_">>
  func.return %7 : tensor<?x8xbf16, #tc.axes<"B,_">>
}

// A residual sum that two operations read stays: computing it twice would read both its operands twice.
// CHECK-LABEL: func.func @residual
func.func @residual(%x: tensor<4x8xbf16>, %y: tensor<4x8xbf16>) -> (tensor<4xf32>, tensor<4x8xbf16>) {
  // CHECK-NEXT: tc.map "add(a, b)"
  // CHECK-NEXT: tc.reduce max "abs(a)"
  // CHECK-NEXT: tc.map "tanh(a)"
  %0 = tc.map "add(a, b)" over "b h, b h -> b h" (%x, %y) : tensor<4x8xbf16>
  %1 = tc.reduce max "abs(a)" over "b h -> b" (%0) : tensor<4xf32>
  %2 = tc.map "tanh(a)" over "b h -> b h" (%0) : tensor<4x8xbf16>
  func.return %1, %2 : tensor<4xf32>, tensor<4x8xbf16>
}

// Integers stay integers: f32 is exact only up to 2^24.
// CHECK-LABEL: func.func @integers
func.func @integers(%p: tensor<4xi32>) -> (tensor<4xf32>, tensor<4xi32>) {
  // CHECK-NEXT: %[[A:.*]] = tc.map "mul(a, 3.0)" over "b -> b" (%p) : tensor<4xi32>
  // CHECK-NEXT: tc.map "a" over "b -> b" (%[[A]]) : tensor<4xf32>
  // CHECK-NEXT: tc.map "max(add(a, 5.0), 0.0)" over "b -> b" (%p) : tensor<4xi32>
  %0 = tc.map "mul(a, 3.0)" over "b -> b" (%p) : tensor<4xi32>
  %1 = tc.map "a" over "b -> b" (%0) : tensor<4xf32>
  %2 = tc.map "add(a, 5.0)" over "b -> b" (%p) : tensor<4xi32>
  %3 = tc.map "max(a, 0.0)" over "b -> b" (%2) : tensor<4xi32>
  func.return %1, %3 : tensor<4xf32>, tensor<4xi32>
}

// A sum that becomes i1 is 1, not 2; a comparison may be fused.
// CHECK-LABEL: func.func @booleans
func.func @booleans(%x: tensor<4xf32>, %m: tensor<4xi1>) -> (tensor<4xf32>, tensor<4xf32>) {
  // CHECK-NEXT: %[[S:.*]] = tc.map "add(a, b)" over "b, b -> b" (%x, %m) : tensor<4xi1>
  // CHECK-NEXT: tc.map "mul(a, 2.0)" over "b -> b" (%[[S]]) : tensor<4xf32>
  // CHECK-NEXT: tc.map "select(lt(a, 0.0), 0.0, a)" over "b -> b" (%x) : tensor<4xf32>
  %0 = tc.map "add(a, b)" over "b, b -> b" (%x, %m) : tensor<4xi1>
  %1 = tc.map "mul(a, 2.0)" over "b -> b" (%0) : tensor<4xf32>
  %2 = tc.map "lt(a, 0.0)" over "b -> b" (%x) : tensor<4xi1>
  %3 = tc.map "select(a, 0.0, b)" over "b, b -> b" (%2, %x) : tensor<4xf32>
  func.return %1, %3 : tensor<4xf32>, tensor<4xf32>
}
