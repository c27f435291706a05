// RUN: rngdc opt %s | rngdc opt | filecheck %s
// RUN: rngdc opt %s --print-op-generic | rngdc opt | filecheck %s

// CHECK: module attributes {tc.model = "test"}
builtin.module attributes {tc.model = "test"} {
  func.func @main(%ids: tensor<?x?xi32, #tc.axes<"B,S">>, %pos: tensor<?x?xi32, #tc.axes<"B,S">>, %n: tensor<?xi32, #tc.axes<"B">>, %cache: tensor<?x1x?x4xbf16, #tc.axes<"B,_,KV,_">>, %bias: tensor<1x2x?x?xf32, #tc.axes<"_,_,S,KV">>, %sinks: tensor<2xbf16>) -> tensor<?x?x2x4xbf16, #tc.axes<"B,S,_,_">> attributes {arg_names = ["ids", "pos", "n", "cache", "bias", "sinks"], result_names = ["y"]} {
    // CHECK: %table = tc.weight "model.embed.weight" : tensor<16x8xbf16>
    %table = tc.weight "model.embed.weight" : tensor<16x8xbf16>
    // CHECK: %w = tc.weight "model.w" {path = "model"} : tensor<4x8xbf16>
    %w = tc.weight "model.w" {path = "model"} : tensor<4x8xbf16>
    // CHECK: tc.constant dense<[1.500000e+00, -2.000000e+00]> : tensor<2xbf16>
    %c = tc.constant dense<[1.5, -2.0]> : tensor<2xbf16>
    // CHECK: tc.constant dense<[0, 1, 2]> : tensor<3xi32> {path = "p"}
    %i = tc.constant dense<[0, 1, 2]> : tensor<3xi32> {path = "p"}
    // CHECK: tc.constant dense<true> : tensor<2x2xi1>
    %t = tc.constant dense<true> : tensor<2x2xi1>
    // CHECK: %x = tc.gather "v h, b s -> b s h" (%table, %ids) : tensor<?x?x8xbf16, #tc.axes<"B,S,_">>
    %x = tc.gather "v h, b s -> b s h" (%table, %ids) : tensor<?x?x8xbf16, #tc.axes<"B,S,_">>
    // CHECK: %v = tc.reduce add "square(a)" over "b s h -> b s" (%x) : tensor<?x?xf32, #tc.axes<"B,S">>
    %v = tc.reduce add "square(a)" over "b s h -> b s" (%x) : tensor<?x?xf32, #tc.axes<"B,S">>
    // CHECK: %m = tc.map "mul(a, rsqrt(add(b, 1e-06)))" over "b s h, b s -> b s h" (%x, %v) : tensor<?x?x8xbf16, #tc.axes<"B,S,_">>
    %m = tc.map "mul(a, rsqrt(add(b, 1e-06)))" over "b s h, b s -> b s h" (%x, %v) : tensor<?x?x8xbf16, #tc.axes<"B,S,_">>
    // CHECK: %h = tc.reshape %m {path = "model.attn"} : tensor<?x?x2x4xbf16, #tc.axes<"B,S,_,_">>
    %h = tc.reshape %m {path = "model.attn"} : tensor<?x?x2x4xbf16, #tc.axes<"B,S,_,_">>
    // CHECK: %q = tc.transpose %h [0, 2, 1, 3] : tensor<?x2x?x4xbf16, #tc.axes<"B,_,S,_">>
    %q = tc.transpose %h [0, 2, 1, 3] : tensor<?x2x?x4xbf16, #tc.axes<"B,_,S,_">>
    // CHECK: %k = tc.contract "b s i, o i -> b s o" (%m, %w) : tensor<?x?x4xbf16, #tc.axes<"B,S,_">>
    %k = tc.contract "b s i, o i -> b s o" (%m, %w) : tensor<?x?x4xbf16, #tc.axes<"B,S,_">>
    %k1 = tc.reshape %k : tensor<?x1x?x4xbf16, #tc.axes<"B,_,S,_">>
    // CHECK: %kv = tc.kv_update (%cache, %k1, %pos) : tensor<?x1x?x4xbf16, #tc.axes<"B,_,KV,_">>
    %kv = tc.kv_update (%cache, %k1, %pos) : tensor<?x1x?x4xbf16, #tc.axes<"B,_,KV,_">>
    // CHECK: %a = tc.attention (%q, %kv, %kv, %pos) scale 0.5 causal true window 0 softcap 0.0 : tensor<?x?x2x4xbf16, #tc.axes<"B,S,_,_">>
    %a = tc.attention (%q, %kv, %kv, %pos) scale 0.5 causal true window 0 softcap 0.0 : tensor<?x?x2x4xbf16, #tc.axes<"B,S,_,_">>
    // CHECK: %b = tc.attention (%q, %kv, %kv, %pos) lengths(%n) bias(%bias) sinks(%sinks) scale 0.08838834764831845 causal false window 16 softcap 50.0 : tensor<?x?x2x4xbf16, #tc.axes<"B,S,_,_">>
    %b = tc.attention (%q, %kv, %kv, %pos) lengths(%n) bias(%bias) sinks(%sinks) scale 0.08838834764831845 causal false window 16 softcap 50.0 : tensor<?x?x2x4xbf16, #tc.axes<"B,S,_,_">>
    // CHECK: %s = tc.slice %a axis 3 start 2 size 2 : tensor<?x?x2x2xbf16, #tc.axes<"B,S,_,_">>
    %s = tc.slice %a axis 3 start 2 size 2 : tensor<?x?x2x2xbf16, #tc.axes<"B,S,_,_">>
    // CHECK: %y = tc.concat (%s, %s) axis 3 : tensor<?x?x2x4xbf16, #tc.axes<"B,S,_,_">>
    %y = tc.concat (%s, %s) axis 3 : tensor<?x?x2x4xbf16, #tc.axes<"B,S,_,_">>
    %scalar = tc.constant dense<4.0> : tensor<f32>
    // CHECK: tc.map "a" over "-> b s" (%scalar) : tensor<2x3xf32>
    %full = tc.map "a" over "-> b s" (%scalar) : tensor<2x3xf32>
    func.return %y : tensor<?x?x2x4xbf16, #tc.axes<"B,S,_,_">>
  }
  // Products of symbols, and labels of static sizes.
  func.func private @merged(%x: tensor<?x?x8xbf16, #tc.axes<"B,S,_">>, %y: tensor<1x512x8xbf16, #tc.axes<"B,S,_">>) -> tensor<?x8xbf16, #tc.axes<"B*S,_">> {
    // CHECK: tc.reshape %{{.*}} : tensor<?x8xbf16, #tc.axes<"B*S,_">>
    %r = tc.reshape %x : tensor<?x8xbf16, #tc.axes<"B*S,_">>
    // CHECK: tc.reshape %{{.*}} : tensor<?xbf16, #tc.axes<"B*S*8">>
    %f = tc.reshape %x : tensor<?xbf16, #tc.axes<"B*S*8">>
    func.return %r : tensor<?x8xbf16, #tc.axes<"B*S,_">>
  }
}
