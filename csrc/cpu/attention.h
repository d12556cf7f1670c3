// The CPU backend's interface: what csrc/ffi calls, and the table that picks an instruction set.
#pragma once

#include <cstdint>

#include "semantics/pages.h"
#include "semantics/params.h"

namespace jax_flashattn::cpu {

// Runs `body(context, index)` for every index in [0, count), in any order, on any number of
// threads.
class Executor {
 public:
  // `work`: the whole loop in multiply-adds, to tell whether waking threads pays.
  virtual void run(int64_t count, double work, void (*body)(void*, int64_t), void* context) = 0;

 protected:
  ~Executor() = default;
};

// One instruction set's kernels. Compiled from the same source, so one binary serves every CPU.
struct Kernels {
  const char* name;
  void (*forward)(const ForwardParams&, Executor&);
  void (*backward)(const BackwardParams&, Executor&);
  void (*tangent)(const TangentParams&, Executor&);
  void (*cached)(const CachedParams&, Executor&);
};

// The best kernels this CPU runs; JAX_FLASHATTN_CPU_ISA=<name> asks for a lesser set by name.
const Kernels& kernels();

// The same for every instruction set.
void append(const AppendParams& p);

// Multiply-adds of the scores of every row and key; a pass is a few times that.
inline double score_work(const Sizes& n) {
  return static_cast<double>(n.b) * n.g * n.r * n.sq * n.sk * n.d;
}

// Columns of an unfinished row in scratch of the cached forward: whole loads of every instruction
// set.
constexpr int64_t cached_columns(int64_t dv) { return (dv + 31) / 32 * 32; }

// Rounds an accumulator row up to whole vectors of every instruction set.
constexpr int64_t padded_dim(int64_t d) { return (d + 15) / 16 * 16; }

// Of an accumulator row of the backward: dK, dV, and for a bias per key its gradient by query head.
FLASH_FN int64_t accumulator_columns(const BackwardParams& p) {
  return padded_dim(p.n.d) + padded_dim(p.n.dv) + (p.bias_per_key ? padded_dim(p.n.r) : 0);
}

}  // namespace jax_flashattn::cpu
