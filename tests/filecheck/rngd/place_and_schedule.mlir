// RUN: rngdc opt %s -p rngd-place,rngd-schedule | filecheck %s

// Globals first, then locals; the pass waits for its transfer and the transfer back for the pass.

rngd.global @x : !rngd.buffer<hbm, 65536> kind "input"
rngd.global @y : !rngd.buffer<hbm, 65536> kind "output"
rngd.global @table : !rngd.buffer<dm, 100> kind "scratch"
rngd.routine @main() {
  %x = rngd.get_global @x : !rngd.buffer<hbm, 65536>
  %y = rngd.get_global @y : !rngd.buffer<hbm, 65536>
  %a = rngd.alloc "a" align 64 : !rngd.buffer<dm, 1024>
  %b = rngd.alloc "b" align 64 : !rngd.buffer<dm, 1024>
  rngd.dma dma "dma(source=(space=hbm base=0) destination=(space=dm base=0) loops=[64:1024:4194304] packet=1024)" (%x -> %a)
  rngd.exec main "exec(slices=64 fetch=(base=0 loops=[256:4] dtype=f32 packet=8) commit=(base=0 loops=[256:4] dtype=f32 valid=8))" (%a -> %b)
  rngd.dma dma "dma(source=(space=dm base=0) destination=(space=hbm base=0) loops=[64:4194304:1024] packet=1024)" (%b -> %y)
}

// CHECK:      rngd.global @x : !rngd.buffer<hbm, 65536> kind "input" address 0
// CHECK-NEXT: rngd.global @y : !rngd.buffer<hbm, 65536> kind "output" address 65536
// CHECK-NEXT: rngd.global @table : !rngd.buffer<dm, 100> kind "scratch" address 0
// CHECK:        %a = rngd.alloc "a" align 64 address 128
// CHECK-NEXT:   %b = rngd.alloc "b" align 64 address 1152
// CHECK-NEXT:   rngd.dma dma "{{.*}}" (%x -> %a)
// CHECK-NEXT:   rngd.exec main "{{.*}}" (%a -> %b) "after(dma=1)"
// CHECK-NEXT:   rngd.dma dma "{{.*}}" (%b -> %y) "after(main=1)"
