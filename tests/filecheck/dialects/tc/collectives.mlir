// RUN: rngdc opt %s | rngdc opt | filecheck %s
// RUN: rngdc opt %s --print-op-generic | rngdc opt | filecheck %s

// A partitioned module: types are those of one unit's part.
// CHECK: builtin.module attributes {tc.mesh = "kv=2,r=2"}
builtin.module attributes {tc.mesh = "kv=2,r=2"} {
  func.func @main(%x: tensor<1x8x4xbf16, #tc.axes<"B,S,_">>, %ids: tensor<1x8xi32, #tc.axes<"B,S">>) {
    // CHECK: %w = tc.weight "q_proj.weight" shard "2@kv 3@r 4, 16" : tensor<8x16xbf16>
    %w = tc.weight "q_proj.weight" shard "2@kv 3@r 4, 16" : tensor<8x16xbf16>
    // CHECK: %g = tc.weight "norm.weight" {path = "norm"} : tensor<4xbf16>
    %g = tc.weight "norm.weight" {path = "norm"} : tensor<4xbf16>
    // CHECK: %a = tc.all_reduce %x kind add axis tp why "o_proj: partial sums" : tensor<1x8x4xbf16, #tc.axes<"B,S,_">>
    %a = tc.all_reduce %x kind add axis tp why "o_proj: partial sums" : tensor<1x8x4xbf16, #tc.axes<"B,S,_">>
    // CHECK: %b = tc.all_gather %x dim 2 axis kv why "logits" {path = "head"} : tensor<1x8x8xbf16, #tc.axes<"B,S,_">>
    %b = tc.all_gather %x dim 2 axis kv why "logits" {path = "head"} : tensor<1x8x8xbf16, #tc.axes<"B,S,_">>
    // CHECK: %c = tc.reduce_scatter %x kind add dim 1 axis tp why "down_proj" : tensor<1x2x4xbf16, #tc.axes<"B,S,_">>
    %c = tc.reduce_scatter %x kind add dim 1 axis tp why "down_proj" : tensor<1x2x4xbf16, #tc.axes<"B,S,_">>
    // CHECK: %d = tc.local_slice %x dim 2 axis tp why "up_proj" : tensor<1x8x1xbf16, #tc.axes<"B,S,_">>
    %d = tc.local_slice %x dim 2 axis tp why "up_proj" : tensor<1x8x1xbf16, #tc.axes<"B,S,_">>
    // CHECK: %e = tc.axis_index axis tp scale 12 : tensor<i32>
    %e = tc.axis_index axis tp scale 12 : tensor<i32>
    func.return
  }
}
