// The CPU backward with scratch that is watched: for tests/unit/test_scratch.py, by ctypes.
//
// Tasks run in one thread, first to last and last to first: the Executor's contract allows any
// order.
#include <algorithm>
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

struct InOrder final : cpu::Executor {
  bool reversed;
  explicit InOrder(bool reversed) : reversed(reversed) {}
  void run(int64_t count, double, void (*body)(void*, int64_t), void* context) override {
    for (int64_t n = 0; n < count; ++n) body(context, reversed ? count - 1 - n : n);
  }
};

// Arrays of float32 ones, in both orders; returns how many gradients differ, plus how many of
// `margin` negative zeros behind the scratch changed: a write of x + 0 changes them, though it
// would change no number. The scratch comes as NaN: one that is read before it is written shows in
// a gradient, which then differs from itself.
extern "C" int64_t probe_scratch(int64_t g, int64_t sq, int64_t sk, int64_t d, int32_t left,
                                 int32_t right, int64_t parts) {
  constexpr int64_t margin = 4096;
  BackwardParams p{};
  p.n = {1, g, 1, sq, sk, d, d};
  p.dtype = DType::kF32;
  p.mask = {left, right, nullptr, nullptr, nullptr, 0, 0};
  p.scale = 1;
  const std::vector<float> rows(g * sq * d, 1.0f), keys(g * sk * d, 1.0f), delta(g * sq, 0.5f);
  p.q = p.dout = rows.data();
  p.k = p.v = keys.data();
  p.lse = p.delta = delta.data();
  p.parts = parts;
  std::vector<float> dq[2] = {rows, rows}, dk[2] = {keys, keys}, dv[2] = {keys, keys};
  int64_t wrong = 0;
  for (int reversed = 0; reversed < 2; ++reversed) {
    const int64_t size = g * parts * (sk + sk % 2 + 1) * 2 * cpu::padded_dim(d);
    std::vector<float> scratch(size + margin, -0.0f);
    std::fill_n(scratch.begin(), size, __builtin_nanf(""));
    p.dq = dq[reversed].data(), p.dk = dk[reversed].data(), p.dv = dv[reversed].data();
    p.scratch = scratch.data();
    InOrder executor(reversed);
    cpu::FLASH_ISA::backward(p, executor);
    for (int64_t x = size; x < size + margin; ++x) wrong += !__builtin_signbit(scratch[x]);
  }
  return wrong + (dq[0] != dq[1]) + (dk[0] != dk[1]) + (dv[0] != dv[1]);
}
