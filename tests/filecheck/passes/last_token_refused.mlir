// RUN: not rngdc opt %s -p 'specialise{seq=8},last-token' 2>&1 | filecheck %s
// CHECK: last-token: logits tensor<?x8x8xf32, #tc.axes<"B,S,_">> have no symbolic S; run it before specialise
func.func @main(%x: tensor<?x?x8xf32, #tc.axes<"B,S,_">>) -> tensor<?x?x8xf32, #tc.axes<"B,S,_">> attributes {arg_names = ["x"], result_names = ["logits"]} {
  func.return %x : tensor<?x?x8xf32, #tc.axes<"B,S,_">>
}
