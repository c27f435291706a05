// RUN: rngdc opt %s -p 'specialise{batch=2 seq=512 kv=1024}' | filecheck %s
// RUN: rngdc opt %s -p 'specialise{batch=1}' | filecheck %s --check-prefix BATCH
// RUN: not rngdc opt %s -p 'specialise{batch=0}' 2>&1 | filecheck %s --check-prefix ZERO
// ZERO: specialise: sizes must be positive

// CHECK: func.func private @block(%x: tensor<2x512x8xbf16, #tc.axes<"B,S,_">>, %c: tensor<2x1x1024x8xbf16, #tc.axes<"B,_,KV,_">>) -> tensor<1024x8xbf16, #tc.axes<"B*S,_">>
// CHECK-NEXT: tc.reshape %x : tensor<1024x8xbf16, #tc.axes<"B*S,_">>
// BATCH: func.func private @block(%x: tensor<1x?x8xbf16, #tc.axes<"B,S,_">>, %c: tensor<1x1x?x8xbf16, #tc.axes<"B,_,KV,_">>) -> tensor<?x8xbf16, #tc.axes<"S,_">>
func.func private @block(%x: tensor<?x?x8xbf16, #tc.axes<"B,S,_">>, %c: tensor<?x1x?x8xbf16, #tc.axes<"B,_,KV,_">>) -> tensor<?x8xbf16, #tc.axes<"B*S,_">> {
  %y = tc.reshape %x : tensor<?x8xbf16, #tc.axes<"B*S,_">>
  func.return %y : tensor<?x8xbf16, #tc.axes<"B*S,_">>
}
// CHECK: func.call @block(%x, %c) : (tensor<2x512x8xbf16, #tc.axes<"B,S,_">>, tensor<2x1x1024x8xbf16, #tc.axes<"B,_,KV,_">>) -> tensor<1024x8xbf16, #tc.axes<"B*S,_">>
func.func @main(%x: tensor<?x?x8xbf16, #tc.axes<"B,S,_">>, %c: tensor<?x1x?x8xbf16, #tc.axes<"B,_,KV,_">>) -> tensor<?x8xbf16, #tc.axes<"B*S,_">> {
  %y = func.call @block(%x, %c) : (tensor<?x?x8xbf16, #tc.axes<"B,S,_">>, tensor<?x1x?x8xbf16, #tc.axes<"B,_,KV,_">>) -> tensor<?x8xbf16, #tc.axes<"B*S,_">>
  func.return %y : tensor<?x8xbf16, #tc.axes<"B*S,_">>
}
