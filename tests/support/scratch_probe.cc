// The CPU backward with scratch that is watched: for tests/unit/test_scratch.py, by ctypes.
//
// Tasks run last to first, which the Executor's contract allows, in one thread.
#include <vector>

#include "cpu/attention.h"

namespace jax_flashattn::cpu {
namespace FLASH_ISA {
void backward(const BackwardParams&, Executor&);
}
void* thread_buffer(int64_t bytes) {
  static std::vector<char> buffer;
  buffer.resize(bytes + 64);
  return buffer.data() + (64 - reinterpret_cast<uintptr_t>(buffer.data()) % 64) % 64;
}
}  // namespace jax_flashattn::cpu

using namespace jax_flashattn;

struct Backwards final : cpu::Executor {
  void run(int64_t count, double, void (*body)(void*, int64_t), void* context) override {
    for (int64_t index = count; index-- > 0;) body(context, index);
  }
};

// Arrays of float32 ones; returns how many of `margin` negative zeros behind the scratch changed.
// A write of x + 0 changes them, though it would change no number.
extern "C" int64_t probe_scratch(int64_t g, int64_t sq, int64_t sk, int64_t d, int32_t left,
                                 int32_t right, int64_t parts) {
  constexpr int64_t margin = 4096;
  BackwardParams p{};
  p.n = {1, g, 1, sq, sk, d, d};
  p.dtype = DType::kF32;
  p.mask = {left, right, nullptr, nullptr, nullptr, 0, 0};
  p.scale = 1;
  std::vector<float> rows(g * sq * d, 1.0f), keys(g * sk * d, 1.0f), statistics(g * sq, 0.0f);
  std::vector<float> dq(rows), dk(keys), dv(keys);
  const int64_t size = g * parts * (sk + sk % 2) * 2 * cpu::padded_dim(d);
  std::vector<float> scratch(size + margin, -0.0f);
  p.q = p.dout = rows.data();
  p.k = p.v = keys.data();
  p.lse = p.delta = statistics.data();
  p.dq = dq.data(), p.dk = dk.data(), p.dv = dv.data();
  p.scratch = scratch.data();
  p.parts = parts;
  Backwards executor;
  cpu::FLASH_ISA::backward(p, executor);
  int64_t changed = 0;
  for (int64_t x = size; x < size + margin; ++x) changed += !__builtin_signbit(scratch[x]);
  return changed;
}
