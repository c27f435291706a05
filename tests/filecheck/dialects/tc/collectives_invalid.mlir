// RUN: rngdc opt %s --split-input-file --verify-diagnostics --parsing-diagnostics | filecheck %s

// CHECK: 4 parts of dimension 0: 2 and 6 elements do not fit
builtin.module attributes {tc.mesh = "kv=2,r=2"} {
  func.func @main(%x: tensor<2xf32>) {
    %y = tc.all_gather %x dim 0 axis tp why "t" : tensor<6xf32>
    func.return
  }
}

// -----

// CHECK: 4 parts of dimension 0: 1 and 2 elements do not fit
builtin.module attributes {tc.mesh = "kv=2,r=2"} {
  func.func @main(%x: tensor<2xf32>) {
    %y = tc.reduce_scatter %x kind add dim 0 axis tp why "t" : tensor<1xf32>
    func.return
  }
}

// -----

// CHECK: 2 parts of dimension 0: 1 and 3 elements do not fit
builtin.module attributes {tc.mesh = "kv=2,r=2"} {
  func.func @main(%x: tensor<3xf32>) {
    %y = tc.local_slice %x dim 0 axis kv why "t" : tensor<1xf32>
    func.return
  }
}

// -----

// CHECK: mesh 'kv=2,r=2' has no axis 'z'
builtin.module attributes {tc.mesh = "kv=2,r=2"} {
  func.func @main(%x: tensor<3xf32>) {
    %y = tc.all_reduce %x kind add axis z why "t" : tensor<3xf32>
    func.return
  }
}

// -----

// CHECK: collective reduction 'min' is none of add, max
%x = tc.weight "w" : tensor<4xf32>
%y = tc.all_reduce %x kind min axis tp why "t" : tensor<4xf32>

// -----

// CHECK: a reduction between units of i32
%x = tc.weight "w" : tensor<4xi32>
%y = tc.all_reduce %x kind add axis tp why "t" : tensor<4xi32>

// -----

// CHECK: dimension 1 of a tensor with 1 dimensions
%x = tc.weight "w" : tensor<4xf32>
%y = tc.all_gather %x dim 1 axis tp why "t" : tensor<8xf32>

// -----

// CHECK: dimension 0 is symbolic; modules are partitioned after specialise
func.func @main(%x: tensor<?xf32, #tc.axes<"B">>) {
  %y = tc.all_gather %x dim 0 axis tp why "t" : tensor<8xf32>
  func.return
}

// -----

// CHECK: an axis index is tensor<i32>
%x = tc.axis_index axis tp scale 4 : tensor<f32>

// -----

// CHECK: placement '8@kv, 4' gives shape [4, 4], not [8, 4]
builtin.module attributes {tc.mesh = "kv=2"} {
  %x = tc.weight "w" shard "8@kv, 4" : tensor<8x4xbf16>
}

// -----

// CHECK: placement '8@kv, 4' gives shape [8, 4], not [4, 4]
builtin.module attributes {tc.plan = "kv=2"} {
  %x = tc.weight "w" shard "8@kv, 4" : tensor<4x4xbf16>
}

// -----

// CHECK: placement '8@kv, 4@tp' uses mesh axis 'tp' twice
builtin.module attributes {tc.mesh = "kv=2"} {
  %x = tc.weight "w" shard "8@kv, 4@tp" : tensor<4x2xbf16>
}

// -----

// CHECK: placement '8@': '8@' is not like 128 or 8@kv
%x = tc.weight "w" shard "8@" : tensor<8xbf16>
