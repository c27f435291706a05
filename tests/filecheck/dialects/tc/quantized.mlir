// RUN: rngdc opt %s --split-input-file | filecheck %s

// CHECK-LABEL: @quantized
func.func @quantized(%x: tensor<2x64xi8>, %f: tensor<2x64xf8E4M3FN>) -> (tensor<2x96xf32>, tensor<2x96xf32>) {
  %w = tc.weight "up.weight" : tensor<96x64xi8>
  %v = tc.weight "gate.weight" : tensor<96x64xf8E4M3FN>
  // CHECK: tc.contract "b i, o i -> b o" (%x, %w) : tensor<2x96xf32>
  %y = tc.contract "b i, o i -> b o" (%x, %w) : tensor<2x96xf32>
  // CHECK: tc.contract "b i, o i -> b o" (%f, %v) : tensor<2x96xf32>
  %z = tc.contract "b i, o i -> b o" (%f, %v) : tensor<2x96xf32>
  func.return %y, %z : tensor<2x96xf32>, tensor<2x96xf32>
}

// -----

// CHECK-LABEL: @four_bits
func.func @four_bits(%x: tensor<2x64xbf16>) -> tensor<2x96xbf16> {
  %p = tc.weight "up.weight_packed" : tensor<96x8xi32>
  %s = tc.weight "up.weight_scale" : tensor<96x2xf32>
  // CHECK: %w = tc.dequantize (%p, %s) : tensor<96x64xbf16>
  %w = tc.dequantize (%p, %s) : tensor<96x64xbf16>
  %y = tc.contract "b i, o i -> b o" (%x, %w) : tensor<2x96xbf16>
  func.return %y : tensor<2x96xbf16>
}
