// RUN: rngdc opt %s -p 'plan-tp{size=4}' | filecheck %s --check-prefix PLAN
// RUN: rngdc opt %s -p 'plan-tp{size=4},partition' | filecheck %s --check-prefix PART
// RUN: rngdc opt %s -p 'plan-tp{size=4},partition' | rngdc opt | filecheck %s --check-prefix PART
// RUN: rngdc opt %s -p 'plan-tp{size=4 sequence-parallel=true},partition' | filecheck %s --check-prefix ROWS
// RUN: not rngdc opt %s -p partition 2>&1 | filecheck %s --check-prefix NOPLAN
// RUN: not rngdc opt %s -p 'plan-tp{size=0}' 2>&1 | filecheck %s --check-prefix ZERO
// NOPLAN: partition: the module has no plan; run plan-tp first
// ZERO: plan-tp: size must be positive, not 0

// Two key-value heads with two query heads each, on four units: kv=2 x r=2.
// PLAN: builtin.module attributes {tc.plan = "kv=2,r=2"}
// PART: builtin.module attributes {tc.mesh = "kv=2,r=2"}
// ROWS: builtin.module attributes {tc.sequence = 8 : i64, tc.mesh = "kv=2,r=2"}
builtin.module {
  // PLAN: func.func private @block_0(%x: tensor<1x8x16xbf16, #tc.axes<"B,S,_">>
  // PLAN-SAME: arg_shards = ["", "", "2@kv 2@r 4, 16", "2@kv 4, 16", "2@kv 2@r 4", "16, 2@kv 2@r 4", "32@tp, 16", "16, 32@tp", "1, 2@kv, 8, 4", "1, 2@kv, 8, 4"]
  // PART: func.func private @block_0(%x: tensor<1x8x16xbf16, #tc.axes<"B,S,_">>
  // PART-SAME: %q: tensor<4x16xbf16>, %kv: tensor<4x16xbf16>, %b: tensor<4xbf16>, %o: tensor<16x4xbf16>, %up: tensor<8x16xbf16>, %down: tensor<16x8xbf16>, %ck: tensor<1x1x8x4xbf16, #tc.axes<"B,_,KV,_">>
  // ROWS: func.func private @block_0(%x: tensor<1x2x16xbf16, #tc.axes<"B,S,_">>
  func.func private @block_0(%x: tensor<1x8x16xbf16, #tc.axes<"B,S,_">>, %pos: tensor<1x8xi32, #tc.axes<"B,S">>, %q: tensor<16x16xbf16>, %kv: tensor<8x16xbf16>, %b: tensor<16xbf16>, %o: tensor<16x16xbf16>, %up: tensor<32x16xbf16>, %down: tensor<16x32xbf16>, %ck: tensor<1x2x8x4xbf16, #tc.axes<"B,_,KV,_">>, %cv: tensor<1x2x8x4xbf16, #tc.axes<"B,_,KV,_">>) -> (tensor<1x8x16xbf16, #tc.axes<"B,S,_">>, tensor<1x2x8x4xbf16, #tc.axes<"B,_,KV,_">>, tensor<1x2x8x4xbf16, #tc.axes<"B,_,KV,_">>) attributes {arg_names = ["x", "position_ids", "w:q.weight", "w:kv.weight", "w:q.bias", "w:o.weight", "w:up.weight", "w:down.weight", "cache.k", "cache.v"], result_names = ["y", "cache.k", "cache.v"]} {
    // ROWS-NEXT: %0 = tc.all_gather %x dim 1 axis tp why "q: x is needed as [1, 8, 16], it lies as [1, 8@tp, 16]" {path = "q"} : tensor<1x8x16xbf16, #tc.axes<"B,S,_">>
    // ROWS-NEXT: tc.contract "b s i, o i -> b s o" (%0, %q)
    // PART-NEXT: tc.contract "b s i, o i -> b s o" (%x, %q) {path = "q"} : tensor<1x8x4xbf16, #tc.axes<"B,S,_">>
    // PART-NEXT: tc.map "add(a, b)" over "b s h, h -> b s h" (%{{.*}}, %b) : tensor<1x8x4xbf16, #tc.axes<"B,S,_">>
    %0 = tc.contract "b s i, o i -> b s o" (%x, %q) {path = "q"} : tensor<1x8x16xbf16, #tc.axes<"B,S,_">>
    %1 = tc.map "add(a, b)" over "b s h, h -> b s h" (%0, %b) : tensor<1x8x16xbf16, #tc.axes<"B,S,_">>
    // PART-NEXT: tc.reshape %{{.*}} : tensor<1x8x1x4xbf16, #tc.axes<"B,S,_,_">>
    %2 = tc.reshape %1 : tensor<1x8x4x4xbf16, #tc.axes<"B,S,_,_">>
    %3 = tc.transpose %2 [0, 2, 1, 3] : tensor<1x4x8x4xbf16, #tc.axes<"B,_,S,_">>
    %4 = tc.contract "b s i, o i -> b s o" (%x, %kv) : tensor<1x8x8xbf16, #tc.axes<"B,S,_">>
    %5 = tc.reshape %4 : tensor<1x8x2x4xbf16, #tc.axes<"B,S,_,_">>
    %6 = tc.transpose %5 [0, 2, 1, 3] : tensor<1x2x8x4xbf16, #tc.axes<"B,_,S,_">>
    // PART: tc.kv_update (%ck, %{{.*}}, %pos) : tensor<1x1x8x4xbf16, #tc.axes<"B,_,KV,_">>
    %7 = tc.kv_update (%ck, %6, %pos) : tensor<1x2x8x4xbf16, #tc.axes<"B,_,KV,_">>
    %8 = tc.kv_update (%cv, %6, %pos) : tensor<1x2x8x4xbf16, #tc.axes<"B,_,KV,_">>
    // PART: tc.attention (%{{.*}}) scale 0.5 causal true window 0 softcap 0.0 : tensor<1x8x1x4xbf16, #tc.axes<"B,S,_,_">>
    %9 = tc.attention (%3, %7, %8, %pos) scale 0.5 causal true window 0 softcap 0.0 : tensor<1x8x4x4xbf16, #tc.axes<"B,S,_,_">>
    %10 = tc.reshape %9 : tensor<1x8x16xbf16, #tc.axes<"B,S,_">>
    // The sum of all units directly behind the contraction that needs it.
    // PART: %[[P:[0-9]+]] = tc.contract "b s i, o i -> b s o" (%{{.*}}, %o) {path = "o"} : tensor<1x8x16xbf16, #tc.axes<"B,S,_">>
    // PART-NEXT: tc.all_reduce %[[P]] kind add axis tp why "o: sum over an axis along which o is cut" {path = "o"} : tensor<1x8x16xbf16, #tc.axes<"B,S,_">>
    // ROWS: %[[P:[0-9]+]] = tc.contract "b s i, o i -> b s o" (%{{.*}}, %o)
    // ROWS-NEXT: tc.reduce_scatter %[[P]] kind add dim 1 axis tp why "o: sum over an axis along which o is cut" {path = "o"} : tensor<1x2x16xbf16, #tc.axes<"B,S,_">>
    // ROWS-NEXT: tc.map "add(a, b)" over "b s h, b s h -> b s h" (%x, %{{.*}}) : tensor<1x2x16xbf16, #tc.axes<"B,S,_">>
    %11 = tc.contract "b s i, o i -> b s o" (%10, %o) {path = "o"} : tensor<1x8x16xbf16, #tc.axes<"B,S,_">>
    %12 = tc.map "add(a, b)" over "b s h, b s h -> b s h" (%x, %11) : tensor<1x8x16xbf16, #tc.axes<"B,S,_">>
    %13 = tc.contract "b s i, o i -> b s o" (%12, %up) {path = "up"} : tensor<1x8x32xbf16, #tc.axes<"B,S,_">>
    %14 = tc.contract "b s i, o i -> b s o" (%13, %down) {path = "down"} : tensor<1x8x16xbf16, #tc.axes<"B,S,_">>
    %15 = tc.map "add(a, b)" over "b s h, b s h -> b s h" (%12, %14) : tensor<1x8x16xbf16, #tc.axes<"B,S,_">>
    func.return %15, %7, %8 : tensor<1x8x16xbf16, #tc.axes<"B,S,_">>, tensor<1x2x8x4xbf16, #tc.axes<"B,_,KV,_">>, tensor<1x2x8x4xbf16, #tc.axes<"B,_,KV,_">>
  }
  // PLAN: func.func @main(
  // PLAN-SAME: arg_shards = ["", "", "", "1, 2@kv, 8, 4", "1, 2@kv, 8, 4"]
  func.func @main(%ids: tensor<1x8xi32, #tc.axes<"B,S">>, %pos: tensor<1x8xi32, #tc.axes<"B,S">>, %last: tensor<1xi32, #tc.axes<"B">>, %ck: tensor<1x2x8x4xbf16, #tc.axes<"B,_,KV,_">>, %cv: tensor<1x2x8x4xbf16, #tc.axes<"B,_,KV,_">>) -> (tensor<1x30xf32, #tc.axes<"B,_">>, tensor<1x2x8x4xbf16, #tc.axes<"B,_,KV,_">>, tensor<1x2x8x4xbf16, #tc.axes<"B,_,KV,_">>) attributes {arg_names = ["input_ids", "position_ids", "last", "cache.k.0", "cache.v.0"], result_names = ["logits", "cache.k.0", "cache.v.0"]} {
    // PLAN: tc.weight "embed.weight" shard "30@tp, 16" : tensor<30x16xbf16>
    // PLAN-NEXT: tc.weight "q.weight" shard "2@kv 2@r 4, 16" : tensor<16x16xbf16>
    // PLAN-NEXT: tc.weight "kv.weight" shard "2@kv 4, 16" : tensor<8x16xbf16>
    // PLAN-NEXT: tc.weight "q.bias" shard "2@kv 2@r 4" : tensor<16xbf16>
    // PART: %[[E:[0-9]+]] = tc.weight "embed.weight" shard "30@tp, 16" : tensor<8x16xbf16>
    // PART-NEXT: tc.weight "q.weight" shard "2@kv 2@r 4, 16" : tensor<4x16xbf16>
    %0 = tc.weight "embed.weight" : tensor<30x16xbf16>
    %1 = tc.weight "q.weight" : tensor<16x16xbf16>
    %2 = tc.weight "kv.weight" : tensor<8x16xbf16>
    %3 = tc.weight "q.bias" : tensor<16xbf16>
    %4 = tc.weight "o.weight" : tensor<16x16xbf16>
    %5 = tc.weight "up.weight" : tensor<32x16xbf16>
    %6 = tc.weight "down.weight" : tensor<16x32xbf16>
    // Every unit looks up the tokens of its part of the vocabulary.
    // PART: %[[I:[0-9]+]] = tc.axis_index axis tp scale 8 {path = "embed"} : tensor<i32>
    // PART-NEXT: %[[T:[0-9]+]] = tc.map "sub(a, b)" over "b s,  -> b s" (%ids, %[[I]]) {path = "embed"} : tensor<1x8xi32, #tc.axes<"B,S">>
    // PART-NEXT: %[[C:[0-9]+]] = tc.map "min(max(a, 0.0), 7.0)" over "b s -> b s" (%[[T]]) {path = "embed"} : tensor<1x8xi32, #tc.axes<"B,S">>
    // PART-NEXT: %[[G:[0-9]+]] = tc.gather "v h, b s -> b s h" (%[[E]], %[[C]]) {path = "embed"} : tensor<1x8x16xbf16, #tc.axes<"B,S,_">>
    // PART-NEXT: %[[M:[0-9]+]] = tc.map "mul(a, mul(min(max(add(b, 1.0), 0.0), 1.0), min(max(sub(8.0, b), 0.0), 1.0)))" over "b s h, b s -> b s h" (%[[G]], %[[T]])
    // PART-NEXT: tc.all_reduce %[[M]] kind add axis tp
    // ROWS: tc.reduce_scatter %{{.*}} kind add dim 1 axis tp why "embed: sum over an axis along which embed.weight is cut"
    %7 = tc.gather "v h, b s -> b s h" (%0, %ids) {path = "embed"} : tensor<1x8x16xbf16, #tc.axes<"B,S,_">>
    %8, %9, %10 = func.call @block_0(%7, %pos, %1, %2, %3, %4, %5, %6, %ck, %cv) {path = "layers.0"} : (tensor<1x8x16xbf16, #tc.axes<"B,S,_">>, tensor<1x8xi32, #tc.axes<"B,S">>, tensor<16x16xbf16>, tensor<8x16xbf16>, tensor<16xbf16>, tensor<16x16xbf16>, tensor<32x16xbf16>, tensor<16x32xbf16>, tensor<1x2x8x4xbf16, #tc.axes<"B,_,KV,_">>, tensor<1x2x8x4xbf16, #tc.axes<"B,_,KV,_">>) -> (tensor<1x8x16xbf16, #tc.axes<"B,S,_">>, tensor<1x2x8x4xbf16, #tc.axes<"B,_,KV,_">>, tensor<1x2x8x4xbf16, #tc.axes<"B,_,KV,_">>)
    // ROWS: func.call @block_0
    // ROWS-NEXT: %[[X:[0-9]+]] = tc.all_gather %{{.*}} dim 1 axis tp
    // ROWS-NEXT: tc.gather "a b c, a -> a c" (%[[X]], %last)
    %11 = tc.gather "a b c, a -> a c" (%8, %last) : tensor<1x16xbf16, #tc.axes<"B,_">>
    // PART: %[[L:[0-9]+]] = tc.contract "b i, o i -> b o" (%{{.*}}, %[[E]]) {path = "head"} : tensor<1x8xf32, #tc.axes<"B,_">>
    // PART-NEXT: %[[A:[0-9]+]] = tc.all_gather %[[L]] dim 1 axis tp why "{{.*}}result logits is whole in every unit{{.*}}" : tensor<1x32xf32, #tc.axes<"B,_">>
    // PART-NEXT: %[[S:[0-9]+]] = tc.slice %[[A]] axis 1 start 0 size 30 : tensor<1x30xf32, #tc.axes<"B,_">>
    // PART-NEXT: func.return %[[S]],
    %12 = tc.contract "b i, o i -> b o" (%11, %0) {path = "head"} : tensor<1x30xf32, #tc.axes<"B,_">>
    func.return %12, %9, %10 : tensor<1x30xf32, #tc.axes<"B,_">>, tensor<1x2x8x4xbf16, #tc.axes<"B,_,KV,_">>, tensor<1x2x8x4xbf16, #tc.axes<"B,_,KV,_">>
  }
}
