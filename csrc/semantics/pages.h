// Where the keys of each sequence lie in a cache of blocks. Host and device.
//
// A contiguous cache [rows, s, heads, width] is one of blocks of s keys, one for each sequence.
#pragma once

#include <cstdint>

#include "semantics/params.h"

namespace jax_flashattn {

struct Pages {
  const int32_t* table;  // [b, columns], ids of each sequence's blocks; null: block b alone
  int64_t columns, blocks, size;

  FLASH_MEMBER int64_t capacity() const { return columns * size; }
  // The id that sequence b has for position j, 0 <= j < capacity(): it may be out of range.
  FLASH_MEMBER int64_t block(int64_t b, int64_t j) const {
    return table ? table[b * columns + j / size] : b;
  }
};

// A forward pass whose keys and values are blocks: n.sk is the capacity of a sequence.
struct CachedParams : ForwardParams {
  Pages pages;
  int64_t parts;  // that the keys of a sequence are cut into; `scratch` has room for each
};

// Writes new [b, n, bytes] to positions start, start + 1, ... of each sequence.
struct AppendParams {
  Pages pages;
  int64_t b, n, bytes;  // bytes of all heads of one position
  const char* fresh;
  const int32_t* start;  // [b]
  char* cache;           // [blocks, size, bytes]
};

// Offset of the bytes that position t of the new ones of sequence b goes to; -1 if it has no place:
// before or behind the sequence, or in a block that does not exist.
FLASH_FN int64_t append_offset(const AppendParams& p, int64_t b, int64_t t) {
  const int64_t j = static_cast<int64_t>(p.start[b]) + t;
  if (j < 0 || j >= p.pages.capacity()) return -1;
  const int64_t block = p.pages.block(b, j);
  if (block < 0 || block >= p.pages.blocks) return -1;
  return (block * p.pages.size + j % p.pages.size) * p.bytes;
}

}  // namespace jax_flashattn
