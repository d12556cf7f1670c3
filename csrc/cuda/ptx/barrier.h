// mbarriers, named barriers, proxy fences, register reallocation: one instruction per wrapper.
#pragma once

#include <cstdint>

namespace jax_flashattn::cuda::ptx {

static __device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

static __device__ __forceinline__ void barrier_init(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(count));
}
// Makes initialised barriers visible to the copy engine; follow with __syncthreads().
static __device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
static __device__ __forceinline__ void barrier_expect(uint64_t* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
static __device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
static __device__ __forceinline__ void barrier_wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:\n}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Whether the phase of this parity is over, without waiting for it.
static __device__ __forceinline__ bool barrier_test(uint64_t* barrier, int parity) {
  int over;
  asm volatile(
      "{\n.reg .pred over;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 over, [%1], %2;\n"
      "selp.b32 %0, 1, 0, over;\n}\n"
      : "=r"(over)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return over;
}

// Waits until a word of shared memory is 0, but for no more than so many looks at it.
static __device__ __forceinline__ void wait_while_set(const int* word, int looks) {
  asm volatile(
      "{\n.reg .pred p;\n.reg .b32 value, left;\n"
      "mov.b32 left, %1;\n"
      "again:\n"
      "ld.volatile.shared.b32 value, [%0];\n"
      "setp.eq.s32 p, value, 0;\n"
      "@p bra finished;\n"
      "sub.s32 left, left, 1;\n"
      "setp.ne.s32 p, left, 0;\n"
      "@p bra again;\n"
      "finished:\n}\n" ::"r"(shared_address(word)),
      "r"(looks)
      : "memory");
}
static __device__ __forceinline__ void set_word(int* word, int value) {
  asm volatile("st.volatile.shared.b32 [%0], %1;" ::"r"(shared_address(word)), "r"(value)
               : "memory");
}

// One lane of a converged warp. ptxas issues copies under it without a loop over lanes.
static __device__ __forceinline__ bool elect() {
  int elected;
  asm volatile(
      "{\n.reg .pred one;\n"
      "elect.sync _|one, 0xffffffff;\n"
      "selp.b32 %0, 1, 0, one;\n}\n"
      : "=r"(elected)::"memory");
  return elected;
}
// A number that all lanes of a converged warp agree on, where ptxas sees that they do.
static __device__ __forceinline__ int uniform(int x) {
  return static_cast<int>(__reduce_or_sync(0xffffffffu, static_cast<unsigned>(x)));
}

static __device__ __forceinline__ int thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

// Named barriers 1 to 15; `threads` counts all participants.
static __device__ __forceinline__ void named_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
static __device__ __forceinline__ void named_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Orders this thread's shared-memory writes before later reads by wgmma or the copy engine.
static __device__ __forceinline__ void proxy_fence() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

template <int kRegisters>
static __device__ __forceinline__ void release_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
static __device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace jax_flashattn::cuda::ptx
