// RUN: rngdc opt %s --split-input-file --verify-diagnostics --parsing-diagnostics | filecheck %s

// CHECK: dynamic dimension 0 of tensor<?x4xbf16> needs a name
%x = "tc.weight"() <{fqn = "w"}> : () -> tensor<?x4xbf16>

// -----

// CHECK: axis name '4' must hold a symbol and be written 4
%x = tc.weight "w" : tensor<4xbf16, #tc.axes<"4">>

// -----

// CHECK: size 'b' is no product of symbols such as B*S
%x = tc.weight "w" : tensor<4xbf16, #tc.axes<"b">>

// -----

// CHECK: axis name 'S*B' must hold a symbol and be written B*S
%x = tc.weight "w" : tensor<4xbf16, #tc.axes<"S*B">>

// -----

// CHECK: has 2 dimensions but 1 axis names
%x = tc.weight "w" : tensor<4x4xbf16, #tc.axes<"B">>

// -----

// CHECK: element type f64 is none of bf16, f16, f32, f8e4m3, i32, i8, i1
%x = tc.weight "w" : tensor<4xf64>

// -----

// CHECK: a weight has static sizes
%x = tc.weight "w" : tensor<?xbf16, #tc.axes<"B">>

// -----

// CHECK: a weight needs a name
%x = tc.weight "" : tensor<4xbf16>

// -----

// CHECK: a constant of 5000 elements; more than 4096 belong into a weight
%x = tc.constant dense<1.0> : tensor<5000xf32>

// -----

// CHECK: axis 'i' of rule 'b i, o i -> b o' has sizes 4 and 5
%x = tc.weight "x" : tensor<2x4xbf16>
%w = tc.weight "w" : tensor<3x5xbf16>
%y = tc.contract "b i, o i -> b o" (%x, %w) : tensor<2x3xbf16>

// -----

// CHECK: rule 'b i, o i -> b o' gives the result 2 dimensions, but it has 1
%x = tc.weight "x" : tensor<2x4xbf16>
%w = tc.weight "w" : tensor<3x4xbf16>
%y = tc.contract "b i, o i -> b o" (%x, %w) : tensor<2xbf16>

// -----

// CHECK: rule 'b i, o i' needs one '->'
%x = tc.weight "x" : tensor<2x4xbf16>
%y = tc.contract "b i, o i" (%x, %x) : tensor<2x2xbf16>

// -----

// CHECK: rule 'b b -> b' names an axis twice in one operand
%x = tc.weight "x" : tensor<4x4xbf16>
%y = tc.map "a" over "b b -> b" (%x) : tensor<4xbf16>

// -----

// CHECK: output axis 'z' is in no operand
%x = tc.weight "x" : tensor<2x4xbf16>
%y = tc.contract "b i, o i -> b z" (%x, %x) : tensor<2x2xbf16>

// -----

// CHECK: a contraction of i32; cast it with a map first
%x = tc.weight "x" : tensor<2x4xi32>
%y = tc.contract "b i, o i -> b o" (%x, %x) : tensor<2x2xi32>

// -----

// CHECK: tc.contract takes 2 operands, not 1
%x = tc.weight "x" : tensor<2x4xbf16>
%y = tc.contract "b i, o i -> b o" (%x) : tensor<2x2xbf16>

// -----

// CHECK: %z is not defined above its use
%y = tc.reshape %z : tensor<2x2xbf16>

// -----

// CHECK: expression 'frob(a)': unknown function 'frob'
%x = tc.weight "x" : tensor<4xbf16>
%y = tc.map "frob(a)" over "b -> b" (%x) : tensor<4xbf16>

// -----

// CHECK: expression 'mul(a)': 'mul' takes 2 arguments, not 1
%x = tc.weight "x" : tensor<4xbf16>
%y = tc.map "mul(a)" over "b -> b" (%x) : tensor<4xbf16>

// -----

// CHECK: expression 'mul(a, b)' uses 'b' but there are 1 operands
%x = tc.weight "x" : tensor<4xbf16>
%y = tc.map "mul(a, b)" over "b -> b" (%x) : tensor<4xbf16>

// -----

// CHECK: expression 'a' does not use operand 'b'
%x = tc.weight "x" : tensor<4xbf16>
%y = tc.map "a" over "b, b -> b" (%x, %x) : tensor<4xbf16>

// -----

// CHECK: axis 'c' is not in the output; use tc.reduce
%x = tc.weight "x" : tensor<4x4xbf16>
%y = tc.map "a" over "b c -> b" (%x) : tensor<4xbf16>

// -----

// CHECK: 'exp' has no integer form; make an operand or the result floating-point
%x = tc.weight "x" : tensor<4xi32>
%y = tc.map "exp(a)" over "b -> b" (%x) : tensor<4xi32>

// -----

// CHECK: reduction 'mean' is none of add, max, min
%x = tc.weight "x" : tensor<4x4xbf16>
%y = tc.reduce mean "a" over "b c -> b" (%x) : tensor<4xf32>

// -----

// CHECK: no axis is reduced; use tc.map
%x = tc.weight "x" : tensor<4x4xbf16>
%y = tc.reduce add "a" over "b c -> c b" (%x) : tensor<4x4xf32>

// -----

// CHECK: indices must be i32, not f32
%x = tc.weight "x" : tensor<4x4xbf16>
%i = tc.weight "i" : tensor<2xf32>
%y = tc.gather "v h, b -> b h" (%x, %i) : tensor<2x4xbf16>

// -----

// CHECK: exactly one axis of the table must be absent from the output
%x = tc.weight "x" : tensor<4x4xbf16>
%i = tc.weight "i" : tensor<2xi32>
%y = tc.gather "v h, b -> b" (%x, %i) : tensor<2xbf16>

// -----

// CHECK: element types must be equal, not bf16, f32
%x = tc.weight "x" : tensor<4x4xbf16>
%i = tc.weight "i" : tensor<2xi32>
%y = tc.gather "v h, b -> b h" (%x, %i) : tensor<2x4xf32>

// -----

// CHECK: 3 query heads are no multiple of 2 key-value heads
%q = tc.weight "q" : tensor<1x3x4x8xbf16>
%k = tc.weight "k" : tensor<1x2x4x8xbf16>
%p = tc.weight "p" : tensor<1x4xi32>
%y = tc.attention (%q, %k, %k, %p) scale 1.0 causal true window 0 softcap 0.0 : tensor<1x4x3x8xbf16>

// -----

// CHECK: attention needs q, k, v of rank 4, not [3, 4, 4]
%q = tc.weight "q" : tensor<1x3x4xbf16>
%k = tc.weight "k" : tensor<1x2x4x8xbf16>
%p = tc.weight "p" : tensor<1x4xi32>
%y = tc.attention (%q, %k, %k, %p) scale 1.0 causal true window 0 softcap 0.0 : tensor<1x4x3x8xbf16>

// -----

// CHECK: window and softcap must not be negative (0 turns them off)
%q = tc.weight "q" : tensor<1x2x4x8xbf16>
%p = tc.weight "p" : tensor<1x4xi32>
%y = tc.attention (%q, %q, %q, %p) scale 1.0 causal true window -1 softcap 0.0 : tensor<1x4x2x8xbf16>

// -----

// CHECK: axis 't' of rule 'b k [t] d, b k [s] d, b [s] -> b k [t] d' has sizes 16 and 8
%c = tc.weight "c" : tensor<1x2x16x4xbf16>
%n = tc.weight "n" : tensor<1x2x4x4xbf16>
%p = tc.weight "p" : tensor<1x4xi32>
%y = tc.kv_update (%c, %n, %p) : tensor<1x2x8x4xbf16>

// -----

// CHECK: a reshape from ['B', 6] to ['B', 2, 4] changes the number of elements
func.func @f(%x: tensor<?x6xbf16, #tc.axes<"B,_">>) -> tensor<?x2x4xbf16, #tc.axes<"B,_,_">> {
  %y = tc.reshape %x : tensor<?x2x4xbf16, #tc.axes<"B,_,_">>
  func.return %y : tensor<?x2x4xbf16, #tc.axes<"B,_,_">>
}

// -----

// CHECK: a reshape from ['B', 4] to ['S', 4] changes the number of elements
func.func @f(%x: tensor<?x4xbf16, #tc.axes<"B,_">>) -> tensor<?x4xbf16, #tc.axes<"S,_">> {
  %y = tc.reshape %x : tensor<?x4xbf16, #tc.axes<"S,_">>
  func.return %y : tensor<?x4xbf16, #tc.axes<"S,_">>
}

// -----

// CHECK: [0, 0] is no permutation of 2 dimensions
%x = tc.weight "x" : tensor<4x4xbf16>
%y = tc.transpose %x [0, 0] : tensor<4x4xbf16>

// -----

// CHECK: elements 3 to 5 of an axis of 4
%x = tc.weight "x" : tensor<4x4xbf16>
%y = tc.slice %x axis 1 start 3 size 2 : tensor<4x2xbf16>

// -----

// CHECK: axis 0 is symbolic; only static axes are sliced
func.func @f(%x: tensor<?x4xbf16, #tc.axes<"B,_">>) -> tensor<1x4xbf16> {
  %y = tc.slice %x axis 0 start 0 size 1 : tensor<1x4xbf16>
  func.return %y : tensor<1x4xbf16>
}

// -----

// CHECK: the result has 9 elements on axis 1, not 8
%x = tc.weight "x" : tensor<4x4xbf16>
%y = tc.concat (%x, %x) axis 1 : tensor<4x9xbf16>

// -----

// CHECK: a contraction of quantized operands has two of one type and gives f32, not i8, f8e4m3, f32
%x = tc.weight "x" : tensor<2x4xi8>
%w = tc.weight "w" : tensor<3x4xf8E4M3FN>
%y = tc.contract "b i, o i -> b o" (%x, %w) : tensor<2x3xf32>

// -----

// CHECK: a contraction of quantized operands has two of one type and gives f32, not i8, i8, bf16
%x = tc.weight "x" : tensor<2x4xi8>
%w = tc.weight "w" : tensor<3x4xi8>
%y = tc.contract "b i, o i -> b o" (%x, %w) : tensor<2x3xbf16>

// -----

// CHECK: 8 words of 8 numbers are no multiple of 3 groups
%p = tc.weight "p" : tensor<96x8xi32>
%s = tc.weight "s" : tensor<96x3xf32>
%w = tc.dequantize (%p, %s) : tensor<96x64xbf16>

// -----

// CHECK: packed weights are i32, their scales f32, and the result is floating-point
%p = tc.weight "p" : tensor<96x8xf32>
%s = tc.weight "s" : tensor<96x2xf32>
%w = tc.dequantize (%p, %s) : tensor<96x64xbf16>
