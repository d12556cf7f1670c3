#include "ffi/decode.h"

namespace jax_flashattn {

namespace ffi = xla::ffi;

// Operands: cache [blocks, size, ...], new [b, n, ...], start int32 [b], table int32 [b, columns],
// or [b, 0] where block n belongs to sequence n. The result is the cache, in the same memory.
ffi::Error decode_append(const Call& call, AppendParams* p) {
  if (call.operands.size() != 4 || call.results.size() != 1)
    return invalid("an append has 4 operands and 1 result, got " +
                   std::to_string(call.operands.size()) + " and " +
                   std::to_string(call.results.size()));
  const auto buffer = [&](size_t n) { return *call.operands.get<ffi::AnyBuffer>(n); };
  const auto cache = buffer(0), fresh = buffer(1), start = buffer(2), table = buffer(3);
  const auto have = cache.dimensions(), added = fresh.dimensions(), columns = table.dimensions();
  if (have.size() < 2 || added.size() < 2 || columns.size() != 2)
    return invalid("an append needs a cache [blocks, size, ...], new [b, n, ...] and a table [b, " +
                   std::string("columns]; they have ") + std::to_string(have.size()) + ", " +
                   std::to_string(added.size()) + " and " + std::to_string(columns.size()) +
                   " dimensions");
  p->b = added[0];
  p->n = added[1];
  p->bytes = static_cast<int64_t>(ffi::ByteWidth(cache.element_type()));
  std::vector<int64_t> wanted{p->b, p->n};
  for (size_t axis = 2; axis < have.size(); ++axis) {
    p->bytes *= have[axis];
    wanted.push_back(have[axis]);
  }
  const auto type = cache.element_type();
  if (auto e = expect("new", fresh, wanted, type); e.failure()) return e;
  if (auto e = expect("start", start, {p->b}, ffi::DataType::S32); e.failure()) return e;
  if (auto e = decode_pages(cache, table, p->b, &p->pages); e.failure()) return e;
  const auto updated = result(call, 0);
  if (updated.has_error()) return updated.error();
  if (auto e = expect("cache", *updated, {have.begin(), have.end()}, type); e.failure()) return e;
  if (updated->untyped_data() != cache.untyped_data())
    return invalid("the result of an append must be the cache's own memory");
  p->fresh = static_cast<const char*>(fresh.untyped_data());
  p->start = static_cast<const int32_t*>(start.untyped_data());
  p->cache = static_cast<char*>(updated->untyped_data());
  return ffi::Error::Success();
}

}  // namespace jax_flashattn
