// RUN: rngdc opt %s -p 'split-stages{stages=2}' --split-input-file | filecheck %s
// RUN: not rngdc opt %s -p 'split-stages{stages=4}' --split-input-file 2>&1 | filecheck %s --check-prefix MANY
// MANY: error: 4 pipeline stages: the model has 3 layers that can be apart
// MANY-NEXT: use -pp 1 to 3

// The head is as large as two layers, so the last stage gets one layer.
// CHECK: builtin.module attributes {tc.stages = 2 : i64}
builtin.module {
  func.func private @block_0(%x: tensor<2x4xf32>, %w: tensor<4x4xf32>) -> tensor<2x4xf32> attributes {arg_names = ["x", "w:w"], result_names = ["y"]} {
    %0 = tc.contract "b i, o i -> b o" (%x, %w) : tensor<2x4xf32>
    func.return %0 : tensor<2x4xf32>
  }
  func.func @main(%x: tensor<2x4xf32>) -> tensor<2x8xf32> attributes {arg_names = ["x"], result_names = ["y"]} {
    %0 = tc.weight "w0" : tensor<4x4xf32>
    %1 = tc.weight "w1" : tensor<4x4xf32>
    %2 = tc.weight "w2" : tensor<4x4xf32>
    %3 = tc.weight "head" : tensor<8x4xf32>
    // CHECK: func.call @block_0(%x, %0) {path = "layers.0", stage = 0 : i64}
    // CHECK: func.call @block_0(%{{.*}}, %1) {path = "layers.1", stage = 0 : i64}
    // CHECK: func.call @block_0(%{{.*}}, %2) {path = "layers.2", stage = 1 : i64}
    %4 = func.call @block_0(%x, %0) {path = "layers.0"} : (tensor<2x4xf32>, tensor<4x4xf32>) -> tensor<2x4xf32>
    %5 = func.call @block_0(%4, %1) {path = "layers.1"} : (tensor<2x4xf32>, tensor<4x4xf32>) -> tensor<2x4xf32>
    %6 = func.call @block_0(%5, %2) {path = "layers.2"} : (tensor<2x4xf32>, tensor<4x4xf32>) -> tensor<2x4xf32>
    %7 = tc.contract "b i, o i -> b o" (%6, %3) : tensor<2x8xf32>
    func.return %7 : tensor<2x8xf32>
  }
}
