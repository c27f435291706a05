// RUN: rngdc opt %s -p simplify | filecheck %s

// CHECK-LABEL: func.func @transposes
func.func @transposes(%x: tensor<8x4xbf16>, %w: tensor<16x8xbf16>, %q: tensor<2x3x4xbf16>) -> (tensor<4x16xbf16>, tensor<16x4xbf16>, tensor<4x2x3xbf16>) {
  // Into the rule of an operand, out of the rule of a result, and composed.
  // CHECK-NEXT: %[[A:.*]] = tc.contract "i a, o i -> a o" (%x, %w) : tensor<4x16xbf16>
  // CHECK-NEXT: %[[B:.*]] = tc.contract "i a, o i -> o a" (%x, %w) : tensor<16x4xbf16>
  // CHECK-NEXT: %[[C:.*]] = tc.transpose %q [2, 0, 1] : tensor<4x2x3xbf16>
  // CHECK-NEXT: func.return %[[A]], %[[B]], %[[C]]
  %0 = tc.transpose %x [1, 0] : tensor<4x8xbf16>
  %1 = tc.contract "a i, o i -> a o" (%0, %w) : tensor<4x16xbf16>
  %2 = tc.contract "a i, o i -> a o" (%0, %w) {path = "other"} : tensor<4x16xbf16>
  %3 = tc.contract "i a, o i -> a o" (%x, %w) : tensor<4x16xbf16>
  %4 = tc.transpose %3 [1, 0] : tensor<16x4xbf16>
  %5 = tc.transpose %q [1, 0, 2] : tensor<3x2x4xbf16>
  %6 = tc.transpose %5 [2, 1, 0] : tensor<4x2x3xbf16>
  func.return %1, %4, %6 : tensor<4x16xbf16>, tensor<16x4xbf16>, tensor<4x2x3xbf16>
}

// Permutations that are not their own inverse.
// CHECK-LABEL: func.func @cycles
func.func @cycles(%x: tensor<2x3x4xbf16>, %g: tensor<3xbf16>) -> (tensor<4x2x3xbf16>, tensor<3x4x2xf32>) {
  // CHECK-NEXT: %[[A:.*]] = tc.map "mul(a, b)" over "a b c, b -> c a b" (%x, %g) : tensor<4x2x3xbf16>
  // CHECK-NEXT: %[[B:.*]] = tc.map "exp(a)" over "r p q -> p q r" (%x) : tensor<3x4x2xf32>
  // CHECK-NEXT: func.return %[[A]], %[[B]]
  %0 = tc.map "mul(a, b)" over "a b c, b -> a b c" (%x, %g) : tensor<2x3x4xbf16>
  %1 = tc.transpose %0 [2, 0, 1] : tensor<4x2x3xbf16>
  %2 = tc.map "a" over "x y z -> y z x" (%x) : tensor<3x4x2xbf16>
  %3 = tc.map "exp(a)" over "p q r -> p q r" (%2) : tensor<3x4x2xf32>
  func.return %1, %3 : tensor<4x2x3xbf16>, tensor<3x4x2xf32>
}

// A value that others read too is not computed twice for the sake of a transpose.
// CHECK-LABEL: func.func @shared
func.func @shared(%x: tensor<8x4xbf16>, %w: tensor<16x8xbf16>) -> (tensor<4x16xbf16>, tensor<16x4xbf16>) {
  // CHECK-NEXT: %[[A:.*]] = tc.contract
  // CHECK-NEXT: %[[B:.*]] = tc.transpose %[[A]] [1, 0]
  // CHECK-NEXT: func.return %[[A]], %[[B]]
  %0 = tc.contract "i a, o i -> a o" (%x, %w) : tensor<4x16xbf16>
  %1 = tc.transpose %0 [1, 0] : tensor<16x4xbf16>
  func.return %0, %1 : tensor<4x16xbf16>, tensor<16x4xbf16>
}

// CHECK-LABEL: func.func @slices
func.func @slices(%x: tensor<4x16xbf16>, %y: tensor<4x8xbf16>) -> (tensor<4x2xbf16>, tensor<4x8xbf16>) {
  // CHECK-NEXT: %[[A:.*]] = tc.slice %x axis 1 start 7 size 2 : tensor<4x2xbf16>
  // CHECK-NEXT: func.return %[[A]], %y
  %0 = tc.slice %x axis 1 start 4 size 8 : tensor<4x8xbf16>
  %1 = tc.slice %0 axis 1 start 3 size 2 : tensor<4x2xbf16>
  %2 = tc.concat (%x, %y) axis 1 : tensor<4x24xbf16>
  %3 = tc.slice %2 axis 1 start 16 size 8 : tensor<4x8xbf16>
  func.return %1, %3 : tensor<4x2xbf16>, tensor<4x8xbf16>
}

// CHECK-LABEL: func.func @identities
func.func @identities(%x: tensor<?x8xbf16, #tc.axes<"B,_">>) -> tensor<?x8xbf16, #tc.axes<"B,_">> {
  // CHECK-NEXT: func.return %x
  %0 = tc.map "mul(add(a, 0.0), 1.0)" over "b h -> b h" (%x) : tensor<?x8xbf16, #tc.axes<"B,_">>
  %1 = tc.reshape %0 : tensor<?x2x4xbf16, #tc.axes<"B,_,_">>
  %2 = tc.transpose %1 [0, 1, 2] : tensor<?x2x4xbf16, #tc.axes<"B,_,_">>
  %3 = tc.reshape %2 : tensor<?x8xbf16, #tc.axes<"B,_">>
  %4 = tc.slice %3 axis 1 start 0 size 4 : tensor<?x4xbf16, #tc.axes<"B,_">>
  %5 = tc.concat (%3, %4) axis 1 : tensor<?x12xbf16, #tc.axes<"B,_">>
  %6 = tc.slice %5 axis 1 start 0 size 8 : tensor<?x8xbf16, #tc.axes<"B,_">>
  func.return %6 : tensor<?x8xbf16, #tc.axes<"B,_">>
}

// CHECK-LABEL: func.func @constants
func.func @constants(%x: tensor<2x2xf32>) -> (tensor<2x2xf32>, tensor<2x2xf32>, tensor<2xi32>) {
  // CHECK-DAG: tc.constant dense<[5, 6]> : tensor<2xi32>
  // CHECK-DAG: %[[A:.*]] = tc.map "mul(a, 3.0)" over "a b -> a b" (%x) : tensor<2x2xf32>
  // CHECK-DAG: %[[B:.*]] = tc.map "mul(a, a)" over "a b -> a b" (%x) : tensor<2x2xf32>
  %0 = tc.constant dense<3.0> : tensor<2xf32>
  %1 = tc.map "mul(a, b)" over "a b, b -> a b" (%x, %0) : tensor<2x2xf32>
  %2 = tc.map "mul(b, pow(a, add(1.0, 0.0)))" over "a b, a b -> a b" (%x, %x) : tensor<2x2xf32>
  %3 = tc.constant dense<[2, 3]> : tensor<2xi32>
  %4 = tc.map "add(a, 3.0)" over "a -> a" (%3) : tensor<2xi32>
  func.return %1, %2, %4 : tensor<2x2xf32>, tensor<2x2xf32>, tensor<2xi32>
}

// An outer product must not reach the matrix engine in f32.
// CHECK-LABEL: func.func @outer
func.func @outer(%f: tensor<?x4x1xf32, #tc.axes<"B,_,_">>, %p: tensor<?x1x?xf32, #tc.axes<"B,_,S">>) -> tensor<?x?x4xf32, #tc.axes<"B,S,_">> {
  // CHECK-DAG: %[[F:.*]] = tc.reshape %f : tensor<?x4xf32, #tc.axes<"B,_">>
  // CHECK-DAG: %[[P:.*]] = tc.reshape %p : tensor<?x?xf32, #tc.axes<"B,S">>
  // CHECK: tc.map "mul(a, b)" over "b h, b s -> b s h" (%[[F]], %[[P]]) : tensor<?x?x4xf32, #tc.axes<"B,S,_">>
  %0 = tc.contract "b h k, b k s -> b h s" (%f, %p) : tensor<?x4x?xf32, #tc.axes<"B,_,S">>
  %1 = tc.transpose %0 [0, 2, 1] : tensor<?x?x4xf32, #tc.axes<"B,S,_">>
  func.return %1 : tensor<?x?x4xf32, #tc.axes<"B,S,_">>
}

// In a decode bucket the last token is the only one.
// CHECK-LABEL: func.func @only_row
func.func @only_row(%x: tensor<2x1x8xbf16, #tc.axes<"B,S,_">>, %last: tensor<2xi32, #tc.axes<"B">>) -> tensor<2x8xbf16, #tc.axes<"B,_">> {
  // CHECK-NEXT: tc.reshape %x : tensor<2x8xbf16, #tc.axes<"B,_">>
  %0 = tc.gather "a b c, a -> a c" (%x, %last) : tensor<2x8xbf16, #tc.axes<"B,_">>
  func.return %0 : tensor<2x8xbf16, #tc.axes<"B,_">>
}

// Unused operations and functions go.
// CHECK-LABEL: func.func @dead
func.func @dead(%x: tensor<4xbf16>) -> tensor<4xbf16> {
  // CHECK-NEXT: func.return %x
  %0 = tc.map "exp(a)" over "b -> b" (%x) : tensor<4xbf16>
  func.return %x : tensor<4xbf16>
}
// CHECK-NOT: @uncalled
func.func private @uncalled(%x: tensor<4xbf16>) -> tensor<4xbf16> {
  func.return %x : tensor<4xbf16>
}
