// RUN: rngdc opt %s -p 'plan-tp{size=2},partition' | filecheck %s

// q, k and v in one matrix with inputs first: every unit takes its heads of each of the three.
// CHECK: func.func @main(%x: tensor<1x4x8xf32, #tc.axes<"B,S,_">>, %pos: tensor<1x4xi32, #tc.axes<"B,S">>) -> tensor<1x4x8xf32, #tc.axes<"B,S,_">>
func.func @main(%x: tensor<1x4x8xf32, #tc.axes<"B,S,_">>, %pos: tensor<1x4xi32, #tc.axes<"B,S">>) -> tensor<1x4x8xf32, #tc.axes<"B,S,_">> attributes {arg_names = ["x", "position_ids"], result_names = ["y"]} {
  // CHECK-NEXT: %0 = tc.weight "qkv.weight" shard "8, 3 2@kv 4" : tensor<8x12xf32>
  // CHECK-NEXT: %1 = tc.weight "qkv.bias" shard "3 2@kv 4" : tensor<12xf32>
  // CHECK-NEXT: %2 = tc.weight "o.weight" shard "2@kv 4, 8" : tensor<4x8xf32>
  // CHECK-NEXT: %3 = tc.weight "o.bias" : tensor<8xf32>
  %0 = tc.weight "qkv.weight" : tensor<8x24xf32>
  %1 = tc.weight "qkv.bias" : tensor<24xf32>
  %2 = tc.weight "o.weight" : tensor<8x8xf32>
  %3 = tc.weight "o.bias" : tensor<8xf32>
  // CHECK-NEXT: tc.contract "b s i, i o -> b s o" (%x, %0) : tensor<1x4x12xf32, #tc.axes<"B,S,_">>
  %4 = tc.contract "b s i, i o -> b s o" (%x, %0) : tensor<1x4x24xf32, #tc.axes<"B,S,_">>
  // CHECK-NEXT: tc.map "add(a, b)" over "b s h, h -> b s h" (%{{.*}}, %1) : tensor<1x4x12xf32, #tc.axes<"B,S,_">>
  %5 = tc.map "add(a, b)" over "b s h, h -> b s h" (%4, %1) : tensor<1x4x24xf32, #tc.axes<"B,S,_">>
  // CHECK-NEXT: tc.slice %{{.*}} axis 2 start 0 size 4 : tensor<1x4x4xf32, #tc.axes<"B,S,_">>
  // CHECK-NEXT: tc.slice %{{.*}} axis 2 start 4 size 4 : tensor<1x4x4xf32, #tc.axes<"B,S,_">>
  // CHECK-NEXT: tc.slice %{{.*}} axis 2 start 8 size 4 : tensor<1x4x4xf32, #tc.axes<"B,S,_">>
  %6 = tc.slice %5 axis 2 start 0 size 8 : tensor<1x4x8xf32, #tc.axes<"B,S,_">>
  %7 = tc.slice %5 axis 2 start 8 size 8 : tensor<1x4x8xf32, #tc.axes<"B,S,_">>
  %8 = tc.slice %5 axis 2 start 16 size 8 : tensor<1x4x8xf32, #tc.axes<"B,S,_">>
  // CHECK-NEXT: tc.reshape %{{.*}} : tensor<1x4x1x4xf32, #tc.axes<"B,S,_,_">>
  %9 = tc.reshape %6 : tensor<1x4x2x4xf32, #tc.axes<"B,S,_,_">>
  %10 = tc.reshape %7 : tensor<1x4x2x4xf32, #tc.axes<"B,S,_,_">>
  %11 = tc.reshape %8 : tensor<1x4x2x4xf32, #tc.axes<"B,S,_,_">>
  %12 = tc.transpose %9 [0, 2, 1, 3] : tensor<1x2x4x4xf32, #tc.axes<"B,_,S,_">>
  %13 = tc.transpose %10 [0, 2, 1, 3] : tensor<1x2x4x4xf32, #tc.axes<"B,_,S,_">>
  %14 = tc.transpose %11 [0, 2, 1, 3] : tensor<1x2x4x4xf32, #tc.axes<"B,_,S,_">>
  %15 = tc.attention (%12, %13, %14, %pos) scale 0.5 causal true window 0 softcap 0.0 : tensor<1x4x2x4xf32, #tc.axes<"B,S,_,_">>
  %16 = tc.reshape %15 : tensor<1x4x8xf32, #tc.axes<"B,S,_">>
  // The bias is added once, behind the sum.
  // CHECK: %[[P:[0-9]+]] = tc.contract "b s i, i o -> b s o" (%{{.*}}, %2) : tensor<1x4x8xf32, #tc.axes<"B,S,_">>
  // CHECK-NEXT: %[[R:[0-9]+]] = tc.all_reduce %[[P]] kind add axis tp
  // CHECK-NEXT: tc.map "add(a, b)" over "b s h, h -> b s h" (%[[R]], %3) : tensor<1x4x8xf32, #tc.axes<"B,S,_">>
  %17 = tc.contract "b s i, i o -> b s o" (%16, %2) : tensor<1x4x8xf32, #tc.axes<"B,S,_">>
  %18 = tc.map "add(a, b)" over "b s h, h -> b s h" (%17, %3) : tensor<1x4x8xf32, #tc.axes<"B,S,_">>
  func.return %18 : tensor<1x4x8xf32, #tc.axes<"B,S,_">>
}
