// The CPU extension module: FFI handlers as capsules, and what the diagnostics page asks.
#include <pybind11/pybind11.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>

#include "cpu/attention.h"
#include "ffi/decode.h"

namespace jax_flashattn {
namespace {

namespace ffi = xla::ffi;

// Spreads a loop over XLA's intra-op thread pool. The calling thread works too, and waits only for
// indices that a helper has already claimed: a pool that is busy, or the caller being one of its
// threads, cannot deadlock it. A helper that starts late finds nothing to claim and touches nothing
// but the shared counter.
class PoolExecutor final : public cpu::Executor {
 public:
  explicit PoolExecutor(ffi::ThreadPool pool) : pool_(pool) {}

  void run(int64_t count, double work, void (*body)(void*, int64_t), void* context) override {
    constexpr double kWorthAThread = 1e6;
    const int64_t helpers =
        std::min({pool_.num_threads(), count, static_cast<int64_t>(work / kWorthAThread)}) - 1;
    if (helpers <= 0) {
      for (int64_t index = 0; index < count; ++index) body(context, index);
      return;
    }
    auto loop = std::make_shared<Loop>();
    loop->count = count;
    loop->body = body;
    loop->context = context;
    for (int64_t h = 0; h < helpers; ++h) pool_.Schedule([loop] { loop->work(); });
    loop->work();
    std::unique_lock<std::mutex> lock(loop->mutex);
    loop->finished.wait(lock, [&] { return loop->done == loop->count; });
  }

 private:
  struct Loop {
    int64_t count;
    void (*body)(void*, int64_t);
    void* context;
    std::atomic<int64_t> next{0};
    std::mutex mutex;
    std::condition_variable finished;
    int64_t done = 0;

    void work() {
      int64_t mine = 0;
      for (int64_t index; (index = next.fetch_add(1)) < count; ++mine) body(context, index);
      if (mine == 0) return;
      std::lock_guard<std::mutex> lock(mutex);
      done += mine;
      if (done == count) finished.notify_all();
    }
  };
  ffi::ThreadPool pool_;
};

ffi::Error no_kernels() {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument,
                    "jax_flashattn: JAX_FLASHATTN_CPU_ISA names no instruction set of this CPU; "
                    "see python -m jax_flashattn");
}

// Large results are fresh memory, and the system hands it out page by page at the first write: of a
// bias gradient of 134 MB that took as long as a fifth of the pass. Huge pages take a fraction.
void ask_for_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 2 << 20, kLarge = 32 << 20;
  if (bytes < kLarge) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (address + kPage - 1) / kPage * kPage,
                  end = (address + bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

ffi::Error forward(ffi::ThreadPool pool, ffi::Dictionary attributes, ffi::RemainingArgs operands,
                   ffi::RemainingRets results) {
  ForwardParams p;
  if (auto e = decode_forward({attributes, operands, results}, &p); e.failure()) return e;
  p.scratch = nullptr;
  if (!cpu::kernels().forward) return no_kernels();
  PoolExecutor executor(pool);
  cpu::kernels().forward(p, executor);
  return ffi::Error::Success();
}

ffi::Error backward(ffi::ThreadPool pool, ffi::Dictionary attributes, ffi::RemainingArgs operands,
                    ffi::RemainingRets results) {
  BackwardParams p;
  const Call call{attributes, operands, results};
  if (auto e = decode_backward(call, &p); e.failure()) return e;
  const auto scratch = result(call, kBackwardResults);
  if (scratch.has_error()) return scratch.error();
  const Sizes& n = p.n;
  const auto dims = scratch->dimensions();
  const Bias& bias = p.features.bias;
  p.parts = dims.size() == 5 && dims[2] > 0 ? dims[2] : 1;
  p.bias_per_key =
      bias.data && !bias.i && bias.j && dims.size() == 5 && dims[4] > cpu::accumulator_columns(p);
  if (auto e = expect("scratch", *scratch,
                      {n.b, n.g, p.parts, n.sk + n.sk % 2 + 1, cpu::accumulator_columns(p)},
                      statistics_type(p.dtype));
      e.failure())
    return e;
  p.scratch = scratch->untyped_data();
  for (const auto& large :
       {*scratch, *result(call, kBackwardResults - 1)})  // the gradient of a bias
    ask_for_huge_pages(large.untyped_data(), large.size_bytes());
  if (!cpu::kernels().backward) return no_kernels();
  PoolExecutor executor(pool);
  cpu::kernels().backward(p, executor);
  return ffi::Error::Success();
}

ffi::Error tangent(ffi::ThreadPool pool, ffi::Dictionary attributes, ffi::RemainingArgs operands,
                   ffi::RemainingRets results) {
  TangentParams p;
  if (auto e = decode_tangent({attributes, operands, results}, &p); e.failure()) return e;
  if (!cpu::kernels().tangent) return no_kernels();
  PoolExecutor executor(pool);
  cpu::kernels().tangent(p, executor);
  return ffi::Error::Success();
}

ffi::Error cached(ffi::ThreadPool pool, ffi::Dictionary attributes, ffi::RemainingArgs operands,
                  ffi::RemainingRets results) {
  CachedParams p;
  const Call call{attributes, operands, results};
  if (auto e = decode_cached(call, &p); e.failure()) return e;
  const auto scratch = result(call, kForwardResults);
  if (scratch.has_error()) return scratch.error();
  const Sizes& n = p.n;
  const auto dims = scratch->dimensions();
  p.parts = dims.size() == 4 && dims[1] > 0 ? dims[1] : 1;
  if (auto e = expect("scratch", *scratch,
                      {n.b, p.parts, n.g * n.r * n.sq, cpu::cached_columns(n.dv) + 2},
                      statistics_type(p.dtype));
      e.failure())
    return e;
  p.scratch = scratch->untyped_data();
  if (!cpu::kernels().cached) return no_kernels();
  PoolExecutor executor(pool);
  cpu::kernels().cached(p, executor);
  return ffi::Error::Success();
}

ffi::Error append(ffi::Dictionary attributes, ffi::RemainingArgs operands,
                  ffi::RemainingRets results) {
  AppendParams p;
  if (auto e = decode_append({attributes, operands, results}, &p); e.failure()) return e;
  cpu::append(p);
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER(
    kForward, forward,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attrs().RemainingArgs().RemainingRets());

XLA_FFI_DEFINE_HANDLER(
    kBackward, backward,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attrs().RemainingArgs().RemainingRets());

XLA_FFI_DEFINE_HANDLER(
    kTangent, tangent,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attrs().RemainingArgs().RemainingRets());

XLA_FFI_DEFINE_HANDLER(
    kCached, cached,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attrs().RemainingArgs().RemainingRets());

XLA_FFI_DEFINE_HANDLER(kAppend, append, ffi::Ffi::Bind().Attrs().RemainingArgs().RemainingRets());

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.def("forward", [] { return pybind11::capsule(reinterpret_cast<void*>(kForward)); });
  m.def("backward", [] { return pybind11::capsule(reinterpret_cast<void*>(kBackward)); });
  m.def("tangent", [] { return pybind11::capsule(reinterpret_cast<void*>(kTangent)); });
  m.def("cached", [] { return pybind11::capsule(reinterpret_cast<void*>(kCached)); });
  m.def("append", [] { return pybind11::capsule(reinterpret_cast<void*>(kAppend)); });
  m.def("instruction_set", []() -> const char* { return cpu::kernels().name; });
}

}  // namespace jax_flashattn
