// Picks the instruction set and owns the per-thread buffers.
#include <cstdlib>
#include <cstring>
#include <memory>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu/attention.h"

namespace jax_flashattn::cpu {

#define FLASH_DECLARE(isa)                         \
  namespace isa {                                  \
  void forward(const ForwardParams&, Executor&);   \
  void backward(const BackwardParams&, Executor&); \
  void tangent(const TangentParams&, Executor&);   \
  void cached(const CachedParams&, Executor&);     \
  }
FLASH_DECLARE(baseline)
#if defined(__x86_64__)
FLASH_DECLARE(avx2)
FLASH_DECLARE(avx512)
FLASH_DECLARE(avx512_bf16)
FLASH_DECLARE(amx)
#endif
#undef FLASH_DECLARE

namespace {

// AVX512-BF16 and AMX have kernels for bfloat16 alone; the others would be those of AVX-512.
template <auto kBf16, auto kOther, class Params>
void by_element(const Params& p, Executor& executor) {
  (p.dtype == DType::kBF16 ? kBf16 : kOther)(p, executor);
}

#if defined(__x86_64__)
// Whether there are tile registers for bfloat16, and the system lets this process use them.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr unsigned kLeaf = 7, kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl
  unsigned a, b, c, d = 0;
  if (!__get_cpuid_count(kLeaf, 0, &a, &b, &c, &d)) return false;
  return (d & kAmxBf16) && (d & kAmxTile) &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

struct Candidate {
  Kernels kernels;
  bool supported;
  bool preferred = true;  // to those that follow, unless one is asked for
};

Kernels pick() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
  const Candidate candidates[] = {
      // A token's attention over a cache has nothing for tiles.
      {{"amx", by_element<amx::forward, avx512::forward>,
        by_element<amx::backward, avx512::backward>, by_element<amx::tangent, avx512::tangent>,
        avx512::cached},
       has_bf16 && may_use_tiles()},
      {{"avx512_bf16", by_element<avx512_bf16::forward, avx512::forward>,
        by_element<avx512_bf16::backward, avx512::backward>,
        by_element<avx512_bf16::tangent, avx512::tangent>,
        by_element<avx512_bf16::cached, avx512::cached>},
       has_bf16,
       // Intel's cores multiply pairs of bfloat16 at half the rate of float32, pair for element.
       !__builtin_cpu_is("intel")},
      {{"avx512", avx512::forward, avx512::backward, avx512::tangent, avx512::cached}, has_avx512},
      {{"avx2", avx2::forward, avx2::backward, avx2::tangent, avx2::cached}, has_avx2},
      {{"baseline", baseline::forward, baseline::backward, baseline::tangent, baseline::cached},
       true},
  };
#else
  const Candidate candidates[] = {
      {{"baseline", baseline::forward, baseline::backward, baseline::tangent, baseline::cached},
       true}};
#endif
  const char* wanted = std::getenv("JAX_FLASHATTN_CPU_ISA");
  const bool any = !wanted || !*wanted;
  for (const Candidate& c : candidates) {
    if (c.supported && (any ? c.preferred : std::strcmp(wanted, c.kernels.name) == 0))
      return c.kernels;
  }
  return {nullptr, nullptr, nullptr, nullptr, nullptr};
}

}  // namespace

const Kernels& kernels() {
  static const Kernels picked = pick();
  return picked;
}

void* thread_buffer(int64_t bytes) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<void, Free> buffer;
  thread_local int64_t capacity = 0;
  if (bytes > capacity) {
    capacity = (bytes + 4095) / 4096 * 4096;
    buffer.reset(std::aligned_alloc(64, capacity));
  }
  return buffer.get();
}

}  // namespace jax_flashattn::cpu
