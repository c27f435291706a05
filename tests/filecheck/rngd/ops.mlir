// RUN: rngdc opt %s | rngdc opt | filecheck %s
// RUN: rngdc opt %s --print-op-generic | rngdc opt | filecheck %s

rngd.global @w : !rngd.buffer<hbm, 65536> kind "weight"
rngd.global @k : !rngd.buffer<hbm, 65536> kind "cache" row_bytes 16384 address 131072
rngd.global @p : !rngd.buffer<dm, 1024> kind "activation"
rngd.launch register 63 values [0, 1099511627776]
rngd.routine @block_0(%w: !rngd.buffer<hbm, 65536>) {
  %a = rngd.alloc "a" align 64 : !rngd.buffer<dm, 1024>
  rngd.dma dma "dma(source=(space=hbm base=0) destination=(space=dm base=0) loops=[64:1024:4194304] packet=1024)" (%w -> %a) at "mlp|tc.contract"
}
rngd.routine @main() {
  %w = rngd.get_global @w : !rngd.buffer<hbm, 65536>
  %k = rngd.get_global @k : !rngd.buffer<hbm, 65536>
  %a = rngd.alloc "tile" align 128 address 4096 : !rngd.buffer<dm, 16384>
  %b = rngd.alloc "" align 64 : !rngd.buffer<dm, 16384>
  %t = rngd.alloc "half" align 32768 : !rngd.buffer<trf, 32768>
  %v = rngd.alloc "scale" align 64 : !rngd.buffer<vrf, 256>
  rngd.memset sub "memset(slices=64 base=0 bytes=64 value=1065353216)" (%a)
  rngd.load_trf sub "load_trf(slices=64 fetch=(base=0 loops=[2048:2] dtype=bf16 packet=16) lanes=8 base=0)" (%a -> %t)
  rngd.load_vrf sub "load_vrf(slices=64 fetch=(base=0 loops=[64:4] dtype=f32 packet=8) base=0)" (%a -> %v) "after(main=1 enter=false)"
  rngd.exec main "exec(slices=64 fetch=(base=0 loops=[512:2] dtype=bf16 packet=32) commit=(base=0 loops=[64:4] dtype=f32 valid=8) contract=(lanes=8 pack=2 trf_base=0 loops=[4:0:0 4:64:1 2:256:2] trf_read=32 depth=5 mode=interleaved))" (%a, trf %t -> %b) at "mlp.up|tc.contract"
  rngd.exec main "exec(slices=64 fetch=(base=0 loops=[64:4] dtype=f32 packet=8 second=0:[4]) commit=(base=0 loops=[64:2] dtype=bf16 valid=8) vector=[(alu=fp_mul0 op=mul operand=(source=vrf loops=[64:4]) group=1) (alu=fp_fma op=add mode=zip01)])" (%a, second %a, vrf %v -> %b)
  rngd.dma dma "dma(source=(space=hbm base=0) destination=(space=dm base=0) loops=[64:0:4194304] packet=256 index=(register=0 base=0 strides=[8] scatter=false))" (%w, index %w -> %b)
  rngd.call @block_0(%w) at "layers.0"
  rngd.call @block_0(%w) offsets [4096] at "layers.0"
  rngd.probe %b "y" layout "{}" : !rngd.buffer<dm, 16384>
  %p = rngd.get_global @p : !rngd.buffer<dm, 1024>
  rngd.notify dma "notify(register=0 base=0 units=[2:1] semaphore=3)" (%p, %w) "after(main=1)" at "all_reduce"
  rngd.wait dma "wait(semaphore=3 count=1)" ()
  rngd.dma dma "dma(source=(space=peer_dm base=0 register=63) destination=(space=dm base=0) loops=[2:1099511627776:1024 64:4194304:4194304] packet=1024)" (%p -> %b)
  rngd.wait dma "wait(semaphore=4 count=1)" (%p, arrived %b, arrived %a) at "all_gather"
}

// CHECK:      rngd.global @w : !rngd.buffer<hbm, 65536> kind "weight"
// CHECK-NEXT: rngd.global @k : !rngd.buffer<hbm, 65536> kind "cache" row_bytes 16384 address 131072
// CHECK-NEXT: rngd.global @p : !rngd.buffer<dm, 1024> kind "activation"
// CHECK-NEXT: rngd.launch register 63 values [0, 1099511627776]
// CHECK-NEXT: rngd.routine @block_0(%w: !rngd.buffer<hbm, 65536>) {
// CHECK-NEXT:   %a = rngd.alloc "a" align 64 : !rngd.buffer<dm, 1024>
// CHECK-NEXT:   rngd.dma dma "dma(source=(space=hbm base=0) destination=(space=dm base=0) loops=[64:1024:4194304] packet=1024)" (%w -> %a) at "mlp|tc.contract"
// CHECK-NEXT: }
// CHECK-NEXT: rngd.routine @main() {
// CHECK-NEXT:   %w = rngd.get_global @w : !rngd.buffer<hbm, 65536>
// CHECK-NEXT:   %k = rngd.get_global @k : !rngd.buffer<hbm, 65536>
// CHECK-NEXT:   %a = rngd.alloc "tile" align 128 address 4096 : !rngd.buffer<dm, 16384>
// CHECK-NEXT:   %b = rngd.alloc "" align 64 : !rngd.buffer<dm, 16384>
// CHECK-NEXT:   %t = rngd.alloc "half" align 32768 : !rngd.buffer<trf, 32768>
// CHECK-NEXT:   %v = rngd.alloc "scale" align 64 : !rngd.buffer<vrf, 256>
// CHECK-NEXT:   rngd.memset sub "memset(slices=64 base=0 bytes=64 value=1065353216)" (%a)
// CHECK-NEXT:   rngd.load_trf sub "load_trf(slices=64 fetch=(base=0 loops=[2048:2] dtype=bf16 packet=16) lanes=8 base=0)" (%a -> %t)
// CHECK-NEXT:   rngd.load_vrf sub "load_vrf(slices=64 fetch=(base=0 loops=[64:4] dtype=f32 packet=8) base=0)" (%a -> %v) "after(main=1 enter=false)"
// CHECK-NEXT:   rngd.exec main "exec(slices=64 {{.*}}mode=interleaved))" (%a, trf %t -> %b) at "mlp.up|tc.contract"
// CHECK-NEXT:   rngd.exec main "exec(slices=64 {{.*}}mode=zip01)])" (%a, second %a, vrf %v -> %b)
// CHECK-NEXT:   rngd.dma dma "dma({{.*}}scatter=false))" (%w, index %w -> %b)
// CHECK-NEXT:   rngd.call @block_0(%w) at "layers.0"
// CHECK-NEXT:   rngd.call @block_0(%w) offsets [4096] at "layers.0"
// CHECK-NEXT:   rngd.probe %b "y" layout "{}" : !rngd.buffer<dm, 16384>
// CHECK-NEXT:   %p = rngd.get_global @p : !rngd.buffer<dm, 1024>
// CHECK-NEXT:   rngd.notify dma "notify(register=0 base=0 units=[2:1] semaphore=3)" (%p, %w) "after(main=1)" at "all_reduce"
// CHECK-NEXT:   rngd.wait dma "wait(semaphore=3 count=1)" ()
// CHECK-NEXT:   rngd.dma dma "dma(source=(space=peer_dm base=0 register=63) {{.*}})" (%p -> %b)
// CHECK-NEXT:   rngd.wait dma "wait(semaphore=4 count=1)" (%p, arrived %b, arrived %a) at "all_gather"
// CHECK-NEXT: }
