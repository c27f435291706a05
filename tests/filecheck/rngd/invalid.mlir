// RUN: rngdc opt %s --split-input-file --verify-diagnostics --parsing-diagnostics | filecheck %s

// CHECK: unknown memory 'sram'
rngd.global @w : !rngd.buffer<sram, 64> kind "weight"

// -----
// CHECK: a buffer has at least one byte
rngd.global @w : !rngd.buffer<dm, 0> kind "weight"

// -----
// CHECK: unknown kind 'scale'
rngd.global @w : !rngd.buffer<dm, 64> kind "scale"

// -----
// CHECK: row_bytes needs an HBM buffer of whole rows
rngd.global @w : !rngd.buffer<hbm, 100> kind "cache" row_bytes 64

// -----
// CHECK: alignment 48 is not a power of two
rngd.routine @main() {
  %a = rngd.alloc "a" align 48 : !rngd.buffer<dm, 64>
}

// -----
// CHECK: address 8 is not aligned to 64
rngd.routine @main() {
  %a = rngd.alloc "a" align 64 address 8 : !rngd.buffer<dm, 64>
}

// -----
// CHECK: expected an integer, found 'all'
rngd.routine @main() {
  %a = rngd.alloc "a" align 64 : !rngd.buffer<dm, 64>
  rngd.memset sub "memset(slices=all base=0 bytes=64)" (%a)
}

// -----
// CHECK: rngd.memset holds a descriptor of class LoadVrf
rngd.routine @main() {
  %a = rngd.alloc "a" align 64 : !rngd.buffer<dm, 64>
  rngd.memset sub "load_vrf(slices=64 fetch=(base=0 loops=[64:4] dtype=f32 packet=8) base=0)" (%a)
}

// -----
// CHECK: a memset in context MAIN [context:
rngd.routine @main() {
  %a = rngd.alloc "a" align 64 : !rngd.buffer<dm, 64>
  rngd.memset main "memset(slices=64 base=0 bytes=64)" (%a)
}

// -----
// CHECK: unknown context "extra"
rngd.routine @main() {
  %a = rngd.alloc "a" align 64 : !rngd.buffer<dm, 64>
  rngd.memset extra "memset(slices=64 base=0 bytes=64)" (%a)
}

// -----
// CHECK: 12 B at 0 with pattern 0 [memset: memset writes multiples of 8 B
rngd.routine @main() {
  %a = rngd.alloc "a" align 64 : !rngd.buffer<dm, 64>
  rngd.memset sub "memset(slices=64 base=0 bytes=12)" (%a)
}

// -----
// CHECK: operand target must lie in trf, not in dm
rngd.routine @main() {
  %a = rngd.alloc "a" align 64 : !rngd.buffer<dm, 4096>
  rngd.load_trf sub "load_trf(slices=64 fetch=(base=0 loops=[2048:2] dtype=bf16 packet=16) lanes=8 base=0)" (%a -> %a)
}

// -----
// CHECK: operand trf belongs to a contraction
rngd.routine @main() {
  %a = rngd.alloc "a" align 64 : !rngd.buffer<dm, 4096>
  rngd.exec main "exec(slices=64 fetch=(base=0 loops=[512:2] dtype=bf16 packet=32) commit=(base=0 loops=[64:4] dtype=f32 valid=8) contract=(lanes=8 pack=2 trf_base=0 loops=[4:0:0 4:64:1 2:256:2] trf_read=32 depth=5 mode=interleaved))" (%a -> %a)
}

// -----
// CHECK: operand second belongs to a fetch with a second tensor
rngd.routine @main() {
  %a = rngd.alloc "a" align 64 : !rngd.buffer<dm, 4096>
  rngd.exec main "exec(slices=64 fetch=(base=0 loops=[64:4] dtype=f32 packet=8) commit=(base=0 loops=[64:4] dtype=f32 valid=8))" (%a, second %a -> %a)
}

// -----
// CHECK: 1 vector operations read VRF, 0 buffers given
rngd.routine @main() {
  %a = rngd.alloc "a" align 64 : !rngd.buffer<dm, 4096>
  rngd.exec main "exec(slices=64 fetch=(base=0 loops=[64:4] dtype=f32 packet=8) commit=(base=0 loops=[64:4] dtype=f32 valid=8) vector=[(alu=fp_mul0 op=mul operand=(source=vrf loops=[64:4]))])" (%a -> %a)
}

// -----
// CHECK: rngd.dma has no operand 'trf'
rngd.routine @main(%w: !rngd.buffer<hbm, 65536>) {
  %a = rngd.alloc "a" align 64 : !rngd.buffer<dm, 1024>
  rngd.dma dma "dma(source=(space=hbm base=0) destination=(space=dm base=0) loops=[64:1024:4194304] packet=1024)" (%w, trf %w -> %a)
}

// -----
// CHECK: operand index belongs to a gather or scatter
rngd.routine @main(%w: !rngd.buffer<hbm, 65536>) {
  %a = rngd.alloc "a" align 64 : !rngd.buffer<dm, 1024>
  rngd.dma dma "dma(source=(space=hbm base=0) destination=(space=dm base=0) loops=[64:1024:4194304] packet=1024)" (%w, index %w -> %a)
}

// -----
// CHECK: operand destination must lie in dm, not in hbm
rngd.routine @main(%w: !rngd.buffer<hbm, 65536>) {
  rngd.dma dma "dma(source=(space=hbm base=0) destination=(space=dm base=0) loops=[64:1024:4194304] packet=1024)" (%w -> %w)
}

// -----
// CHECK: arguments of a routine are HBM buffers
rngd.routine @main(%w: !rngd.buffer<dm, 64>) {
}

// -----
// CHECK: an offset for every buffer, or none
builtin.module {
  rngd.routine @block(%w: !rngd.buffer<hbm, 64>) {
  }
  rngd.routine @main(%w: !rngd.buffer<hbm, 64>) {
    rngd.call @block(%w) offsets [1, 2]
  }
}

// -----
// CHECK: no routine block
rngd.routine @main() {
  rngd.call @block()
}

// -----
// CHECK: block takes other buffers than it is called with
builtin.module {
  rngd.routine @block(%w: !rngd.buffer<hbm, 64>) {
  }
  rngd.routine @main(%w: !rngd.buffer<hbm, 128>) {
    rngd.call @block(%w)
  }
}

// -----
// CHECK: %b is not defined before its use
rngd.routine @main() {
  rngd.memset sub "memset(slices=64 base=0 bytes=64)" (%b)
}

// -----
// CHECK: operand target has 1024 B, the instruction touches [0, 1280)
rngd.routine @main() {
  %a = rngd.alloc "a" align 64 : !rngd.buffer<dm, 1024>
  rngd.memset sub "memset(slices=64 base=0 bytes=1280)" (%a)
}

// -----
// CHECK: operand source has 65536 B, the instruction touches [64, 65600)
rngd.routine @main(%w: !rngd.buffer<hbm, 65536>) {
  %a = rngd.alloc "a" align 64 : !rngd.buffer<dm, 1024>
  rngd.dma dma "dma(source=(space=hbm base=64) destination=(space=dm base=0) loops=[64:1024:4194304] packet=1024)" (%w -> %a)
}

// -----
// CHECK: rngd.exec holds a descriptor of class Memset
rngd.routine @main() {
  %a = rngd.alloc "a" align 64 : !rngd.buffer<dm, 1024>
  rngd.exec main "memset(slices=64 base=0 bytes=64)" (%a -> %a)
}

// -----
// CHECK: ranges are given as buffers
rngd.routine @main() {
  rngd.notify dma "notify(register=0 base=0 units=[2:1] semaphore=3 ranges=[0:64])" ()
}

// -----
// CHECK: operand released must lie in dm or hbm, not in vrf
rngd.routine @main() {
  %a = rngd.alloc "a" align 64 : !rngd.buffer<vrf, 1024>
  rngd.wait dma "wait(semaphore=3 count=1)" (%a)
}

// -----
// CHECK: operand published has 100 B, not a multiple of 8
rngd.routine @main() {
  %a = rngd.alloc "a" align 64 : !rngd.buffer<dm, 100>
  rngd.notify dma "notify(register=0 base=0 units=[2:1] semaphore=3)" (%a)
}

// -----
// CHECK: rngd.wait has no operand 'published': released, arrived
rngd.routine @main() {
  %a = rngd.alloc "a" align 64 : !rngd.buffer<dm, 128>
  rngd.wait dma "wait(semaphore=3 count=1)" (published %a)
}

// -----
// CHECK: a wait in context MAIN [context:
rngd.routine @main() {
  rngd.wait main "wait(semaphore=3 count=1)" ()
}

// -----
// CHECK: rngd.notify holds a descriptor of class Wait
rngd.routine @main() {
  rngd.notify dma "wait(semaphore=3 count=1)" ()
}

// -----
// CHECK: no register 64: 1 to 63
rngd.launch register 64 values [0]

// -----
// CHECK: a launch register has one value of at least 0 for every unit
rngd.launch register 63 values []

// -----
// CHECK: operand source must lie in dm, not in hbm
rngd.routine @main(%w: !rngd.buffer<hbm, 65536>) {
  %a = rngd.alloc "a" align 64 : !rngd.buffer<dm, 2048>
  rngd.dma dma "dma(source=(space=peer_dm base=0) destination=(space=dm base=0) loops=[2:1099511627776:1024 64:4194304:4194304] packet=1024)" (%w -> %a)
}

// -----
// CHECK: operand source has 512 B, the instruction touches [0, 1024)
rngd.routine @main() {
  %p = rngd.alloc "p" align 64 : !rngd.buffer<dm, 512>
  %a = rngd.alloc "a" align 64 : !rngd.buffer<dm, 2048>
  rngd.dma dma "dma(source=(space=peer_dm base=0) destination=(space=dm base=0) loops=[2:1099511627776:1024 64:4194304:4194304] packet=1024)" (%p -> %a)
}
