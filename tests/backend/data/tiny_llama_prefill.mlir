builtin.module attributes {tc.model = "llama"} {
  func.func private @block_0(%x: tensor<1x16x256xbf16, #tc.axes<"B,S,_">>, %cos: tensor<1x16x32xbf16, #tc.axes<"B,S,_">>, %sin: tensor<1x16x32xbf16, #tc.axes<"B,S,_">>, %position_ids: tensor<1x16xi32, #tc.axes<"B,S">>, %input_layernorm_weight: tensor<256xbf16>, %self_attn_q_proj_weight: tensor<256x256xbf16>, %self_attn_k_proj_weight: tensor<256x256xbf16>, %self_attn_v_proj_weight: tensor<256x256xbf16>, %self_attn_o_proj_weight: tensor<256x256xbf16>, %post_attention_layernorm_weight: tensor<256xbf16>, %mlp_gate_proj_weight: tensor<512x256xbf16>, %mlp_up_proj_weight: tensor<512x256xbf16>, %mlp_down_proj_weight: tensor<256x512xbf16>, %cache_k: tensor<1x8x32x32xbf16, #tc.axes<"B,_,KV,_">>, %cache_v: tensor<1x8x32x32xbf16, #tc.axes<"B,_,KV,_">>) -> (tensor<1x16x256xbf16, #tc.axes<"B,S,_">>, tensor<1x8x32x32xbf16, #tc.axes<"B,_,KV,_">>, tensor<1x8x32x32xbf16, #tc.axes<"B,_,KV,_">>) attributes {arg_names = ["x", "cos", "sin", "position_ids", "w:input_layernorm.weight", "w:self_attn.q_proj.weight", "w:self_attn.k_proj.weight", "w:self_attn.v_proj.weight", "w:self_attn.o_proj.weight", "w:post_attention_layernorm.weight", "w:mlp.gate_proj.weight", "w:mlp.up_proj.weight", "w:mlp.down_proj.weight", "cache.k", "cache.v"], result_names = ["y", "cache.k", "cache.v"]} {
    %0 = tc.reduce add "div(square(a), 256.0)" over "b s h -> b s" (%x) {path = "input_layernorm"} : tensor<1x16xf32, #tc.axes<"B,S">>
    %1 = tc.map "mul(a, mul(b, rsqrt(add(c, 1e-05))))" over "h, b s h, b s -> b s h" (%input_layernorm_weight, %x, %0) {path = "input_layernorm"} : tensor<1x16x256xbf16, #tc.axes<"B,S,_">>
    %2 = tc.contract "b s i, o i -> b s o" (%1, %self_attn_q_proj_weight) {path = "self_attn.q_proj"} : tensor<1x16x256xbf16, #tc.axes<"B,S,_">>
    %3 = tc.reshape %2 {path = "self_attn"} : tensor<1x16x8x32xbf16, #tc.axes<"B,S,_,_">>
    %4 = tc.transpose %3 [0, 2, 1, 3] {path = "self_attn"} : tensor<1x8x16x32xbf16, #tc.axes<"B,_,S,_">>
    %5 = tc.contract "b s i, o i -> b s o" (%1, %self_attn_k_proj_weight) {path = "self_attn.k_proj"} : tensor<1x16x256xbf16, #tc.axes<"B,S,_">>
    %6 = tc.reshape %5 {path = "self_attn"} : tensor<1x16x8x32xbf16, #tc.axes<"B,S,_,_">>
    %7 = tc.transpose %6 [0, 2, 1, 3] {path = "self_attn"} : tensor<1x8x16x32xbf16, #tc.axes<"B,_,S,_">>
    %8 = tc.contract "b s i, o i -> b s o" (%1, %self_attn_v_proj_weight) {path = "self_attn.v_proj"} : tensor<1x16x256xbf16, #tc.axes<"B,S,_">>
    %9 = tc.reshape %8 {path = "self_attn"} : tensor<1x16x8x32xbf16, #tc.axes<"B,S,_,_">>
    %10 = tc.transpose %9 [0, 2, 1, 3] {path = "self_attn"} : tensor<1x8x16x32xbf16, #tc.axes<"B,_,S,_">>
    %11 = tc.slice %4 axis 3 start 0 size 16 {path = "self_attn"} : tensor<1x8x16x16xbf16, #tc.axes<"B,_,S,_">>
    %12 = tc.slice %4 axis 3 start 16 size 16 {path = "self_attn"} : tensor<1x8x16x16xbf16, #tc.axes<"B,_,S,_">>
    %13 = tc.map "neg(a)" over "b h s i -> b h s i" (%12) {path = "self_attn"} : tensor<1x8x16x16xbf16, #tc.axes<"B,_,S,_">>
    %14 = tc.concat (%13, %11) axis 3 {path = "self_attn"} : tensor<1x8x16x32xbf16, #tc.axes<"B,_,S,_">>
    %15 = tc.map "add(mul(a, b), mul(c, d))" over "b s h i, b s i, b h s i, b s i -> b h s i" (%3, %cos, %14, %sin) {path = "self_attn"} : tensor<1x8x16x32xbf16, #tc.axes<"B,_,S,_">>
    %16 = tc.slice %7 axis 3 start 0 size 16 {path = "self_attn"} : tensor<1x8x16x16xbf16, #tc.axes<"B,_,S,_">>
    %17 = tc.slice %7 axis 3 start 16 size 16 {path = "self_attn"} : tensor<1x8x16x16xbf16, #tc.axes<"B,_,S,_">>
    %18 = tc.map "neg(a)" over "b h s i -> b h s i" (%17) {path = "self_attn"} : tensor<1x8x16x16xbf16, #tc.axes<"B,_,S,_">>
    %19 = tc.concat (%18, %16) axis 3 {path = "self_attn"} : tensor<1x8x16x32xbf16, #tc.axes<"B,_,S,_">>
    %20 = tc.map "add(mul(a, b), mul(c, d))" over "b s h i, b s i, b h s i, b s i -> b h s i" (%6, %cos, %19, %sin) {path = "self_attn"} : tensor<1x8x16x32xbf16, #tc.axes<"B,_,S,_">>
    %21 = tc.kv_update (%cache_k, %20, %position_ids) {path = "self_attn"} : tensor<1x8x32x32xbf16, #tc.axes<"B,_,KV,_">>
    %22 = tc.kv_update (%cache_v, %10, %position_ids) {path = "self_attn"} : tensor<1x8x32x32xbf16, #tc.axes<"B,_,KV,_">>
    %23 = tc.attention (%15, %21, %22, %position_ids) scale 0.1767766952966369 causal true window 0 softcap 0.0 {path = "self_attn"} : tensor<1x16x8x32xbf16, #tc.axes<"B,S,_,_">>
    %24 = tc.reshape %23 {path = "self_attn"} : tensor<1x16x256xbf16, #tc.axes<"B,S,_">>
    %25 = tc.contract "b s i, o i -> b s o" (%24, %self_attn_o_proj_weight) {path = "self_attn.o_proj"} : tensor<1x16x256xbf16, #tc.axes<"B,S,_">>
    %26 = tc.map "add(a, b)" over "b s h, b s h -> b s h" (%x, %25) : tensor<1x16x256xbf16, #tc.axes<"B,S,_">>
    %27 = tc.reduce add "div(square(a), 256.0)" over "b s h -> b s" (%26) {path = "post_attention_layernorm"} : tensor<1x16xf32, #tc.axes<"B,S">>
    %28 = tc.map "mul(a, mul(b, rsqrt(add(c, 1e-05))))" over "h, b s h, b s -> b s h" (%post_attention_layernorm_weight, %26, %27) {path = "post_attention_layernorm"} : tensor<1x16x256xbf16, #tc.axes<"B,S,_">>
    %29 = tc.contract "b s i, o i -> b s o" (%28, %mlp_gate_proj_weight) {path = "mlp.gate_proj"} : tensor<1x16x512xbf16, #tc.axes<"B,S,_">>
    %30 = tc.contract "b s i, o i -> b s o" (%28, %mlp_up_proj_weight) {path = "mlp.up_proj"} : tensor<1x16x512xbf16, #tc.axes<"B,S,_">>
    %31 = tc.map "mul(silu(a), b)" over "b s h, b s h -> b s h" (%29, %30) {path = "mlp"} : tensor<1x16x512xbf16, #tc.axes<"B,S,_">>
    %32 = tc.contract "b s i, o i -> b s o" (%31, %mlp_down_proj_weight) {path = "mlp.down_proj"} : tensor<1x16x256xbf16, #tc.axes<"B,S,_">>
    %33 = tc.map "add(a, b)" over "b s h, b s h -> b s h" (%26, %32) : tensor<1x16x256xbf16, #tc.axes<"B,S,_">>
    func.return %33, %21, %22 : tensor<1x16x256xbf16, #tc.axes<"B,S,_">>, tensor<1x8x32x32xbf16, #tc.axes<"B,_,KV,_">>, tensor<1x8x32x32xbf16, #tc.axes<"B,_,KV,_">>
  }
  func.func @main(%input_ids: tensor<1x16xi32, #tc.axes<"B,S">>, %position_ids: tensor<1x16xi32, #tc.axes<"B,S">>, %last: tensor<1xi32, #tc.axes<"B">>, %cache_k: tensor<1x8x32x32xbf16, #tc.axes<"B,_,KV,_">>, %cache_v: tensor<1x8x32x32xbf16, #tc.axes<"B,_,KV,_">>, %cache_k_1: tensor<1x8x32x32xbf16, #tc.axes<"B,_,KV,_">>, %cache_v_1: tensor<1x8x32x32xbf16, #tc.axes<"B,_,KV,_">>) -> (tensor<1x1x1024xf32, #tc.axes<"B,_,_">>, tensor<1x8x32x32xbf16, #tc.axes<"B,_,KV,_">>, tensor<1x8x32x32xbf16, #tc.axes<"B,_,KV,_">>, tensor<1x8x32x32xbf16, #tc.axes<"B,_,KV,_">>, tensor<1x8x32x32xbf16, #tc.axes<"B,_,KV,_">>) attributes {arg_names = ["input_ids", "position_ids", "last", "cache.k.0", "cache.v.0", "cache.k.1", "cache.v.1"], result_names = ["logits", "cache.k.0", "cache.v.0", "cache.k.1", "cache.v.1"]} {
    %0 = tc.weight "model.embed_tokens.weight" : tensor<1024x256xbf16>
    %1 = tc.weight "model.rotary_emb.inv_freq" : tensor<16xf32>
    %2 = tc.weight "model.layers.0.input_layernorm.weight" : tensor<256xbf16>
    %3 = tc.weight "model.layers.0.self_attn.q_proj.weight" : tensor<256x256xbf16>
    %4 = tc.weight "model.layers.0.self_attn.k_proj.weight" : tensor<256x256xbf16>
    %5 = tc.weight "model.layers.0.self_attn.v_proj.weight" : tensor<256x256xbf16>
    %6 = tc.weight "model.layers.0.self_attn.o_proj.weight" : tensor<256x256xbf16>
    %7 = tc.weight "model.layers.0.post_attention_layernorm.weight" : tensor<256xbf16>
    %8 = tc.weight "model.layers.0.mlp.gate_proj.weight" : tensor<512x256xbf16>
    %9 = tc.weight "model.layers.0.mlp.up_proj.weight" : tensor<512x256xbf16>
    %10 = tc.weight "model.layers.0.mlp.down_proj.weight" : tensor<256x512xbf16>
    %11 = tc.weight "model.layers.1.input_layernorm.weight" : tensor<256xbf16>
    %12 = tc.weight "model.layers.1.self_attn.q_proj.weight" : tensor<256x256xbf16>
    %13 = tc.weight "model.layers.1.self_attn.k_proj.weight" : tensor<256x256xbf16>
    %14 = tc.weight "model.layers.1.self_attn.v_proj.weight" : tensor<256x256xbf16>
    %15 = tc.weight "model.layers.1.self_attn.o_proj.weight" : tensor<256x256xbf16>
    %16 = tc.weight "model.layers.1.post_attention_layernorm.weight" : tensor<256xbf16>
    %17 = tc.weight "model.layers.1.mlp.gate_proj.weight" : tensor<512x256xbf16>
    %18 = tc.weight "model.layers.1.mlp.up_proj.weight" : tensor<512x256xbf16>
    %19 = tc.weight "model.layers.1.mlp.down_proj.weight" : tensor<256x512xbf16>
    %20 = tc.weight "model.norm.weight" : tensor<256xbf16>
    %21 = tc.weight "lm_head.weight" : tensor<1024x256xbf16>
    %22 = tc.gather "v h, b s -> b s h" (%0, %input_ids) {path = "model.embed_tokens"} : tensor<1x16x256xbf16, #tc.axes<"B,S,_">>
    %23 = tc.map "mul(a, b)" over "b s, h -> b s h" (%position_ids, %1) {path = "model.rotary_emb"} : tensor<1x16x16xf32, #tc.axes<"B,S,_">>
    %24 = tc.concat (%23, %23) axis 2 {path = "model.rotary_emb"} : tensor<1x16x32xf32, #tc.axes<"B,S,_">>
    %25 = tc.map "cos(a)" over "b s h -> b s h" (%24) {path = "model.rotary_emb"} : tensor<1x16x32xbf16, #tc.axes<"B,S,_">>
    %26 = tc.map "sin(a)" over "b s h -> b s h" (%24) {path = "model.rotary_emb"} : tensor<1x16x32xbf16, #tc.axes<"B,S,_">>
    %27, %28, %29 = func.call @block_0(%22, %25, %26, %position_ids, %2, %3, %4, %5, %6, %7, %8, %9, %10, %cache_k, %cache_v) {path = "model.layers.0"} : (tensor<1x16x256xbf16, #tc.axes<"B,S,_">>, tensor<1x16x32xbf16, #tc.axes<"B,S,_">>, tensor<1x16x32xbf16, #tc.axes<"B,S,_">>, tensor<1x16xi32, #tc.axes<"B,S">>, tensor<256xbf16>, tensor<256x256xbf16>, tensor<256x256xbf16>, tensor<256x256xbf16>, tensor<256x256xbf16>, tensor<256xbf16>, tensor<512x256xbf16>, tensor<512x256xbf16>, tensor<256x512xbf16>, tensor<1x8x32x32xbf16, #tc.axes<"B,_,KV,_">>, tensor<1x8x32x32xbf16, #tc.axes<"B,_,KV,_">>) -> (tensor<1x16x256xbf16, #tc.axes<"B,S,_">>, tensor<1x8x32x32xbf16, #tc.axes<"B,_,KV,_">>, tensor<1x8x32x32xbf16, #tc.axes<"B,_,KV,_">>)
    %30, %31, %32 = func.call @block_0(%27, %25, %26, %position_ids, %11, %12, %13, %14, %15, %16, %17, %18, %19, %cache_k_1, %cache_v_1) {path = "model.layers.1"} : (tensor<1x16x256xbf16, #tc.axes<"B,S,_">>, tensor<1x16x32xbf16, #tc.axes<"B,S,_">>, tensor<1x16x32xbf16, #tc.axes<"B,S,_">>, tensor<1x16xi32, #tc.axes<"B,S">>, tensor<256xbf16>, tensor<256x256xbf16>, tensor<256x256xbf16>, tensor<256x256xbf16>, tensor<256x256xbf16>, tensor<256xbf16>, tensor<512x256xbf16>, tensor<512x256xbf16>, tensor<256x512xbf16>, tensor<1x8x32x32xbf16, #tc.axes<"B,_,KV,_">>, tensor<1x8x32x32xbf16, #tc.axes<"B,_,KV,_">>) -> (tensor<1x16x256xbf16, #tc.axes<"B,S,_">>, tensor<1x8x32x32xbf16, #tc.axes<"B,_,KV,_">>, tensor<1x8x32x32xbf16, #tc.axes<"B,_,KV,_">>)
    %33 = tc.gather "a b c, a -> a c" (%30, %last) {path = "model.layers.1"} : tensor<1x256xbf16, #tc.axes<"B,_">>
    %34 = tc.reshape %33 {path = "model.layers.1"} : tensor<1x1x256xbf16, #tc.axes<"B,_,_">>
    %35 = tc.reduce add "div(square(a), 256.0)" over "b s h -> b s" (%34) {path = "model.norm"} : tensor<1x1xf32, #tc.axes<"B,_">>
    %36 = tc.map "mul(a, mul(b, rsqrt(add(c, 1e-05))))" over "h, b s h, b s -> b s h" (%20, %34, %35) {path = "model.norm"} : tensor<1x1x256xbf16, #tc.axes<"B,_,_">>
    %37 = tc.contract "b s i, o i -> b s o" (%36, %21) {path = "lm_head"} : tensor<1x1x1024xf32, #tc.axes<"B,_,_">>
    func.return %37, %28, %29, %31, %32 : tensor<1x1x1024xf32, #tc.axes<"B,_,_">>, tensor<1x8x32x32xbf16, #tc.axes<"B,_,KV,_">>, tensor<1x8x32x32xbf16, #tc.axes<"B,_,KV,_">>, tensor<1x8x32x32xbf16, #tc.axes<"B,_,KV,_">>, tensor<1x8x32x32xbf16, #tc.axes<"B,_,KV,_">>
  }
}
