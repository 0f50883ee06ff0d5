// Which part of the work is whose: a grid over batch, heads and rows, and a layout's lists of kept blocks.
//
// A thread block is at most four warps, which work alone, each on some rows of one head. A warp's rows lie in one block
// row (or block column), so that it has one list of kept blocks to go through. The lists are those of `Layout`.
#pragma once

#include "block_sparse.h"

namespace sat {

// ---- the grid -------------------------------------------------------------------------------------------------------

constexpr int kWarps = 4;  // of a thread block, at most; each works alone
constexpr int kThreads = 32 * kWarps;

// This warp's rows of one head, of the grid (thread blocks of a head, heads, batch): thread blocks of one head are
// neighbours, so that they share its data in L2.
struct Tile {
  unsigned b, h;
  int first;

  // `part`: which of the head's thread blocks.
  __device__ Tile(int part, int rows) : b(blockIdx.z), h(blockIdx.y) {
    first = (part * static_cast<int>(blockDim.x / 32) + static_cast<int>(threadIdx.x) / 32) * rows;
  }
  __device__ int64_t head(const Shape& shape) const { return int64_t{b} * shape.heads + h; }
  __device__ const uint8_t* mask(const uint8_t* masks, int keys) const { return masks ? masks + int64_t{b} * keys : masks; }
};

__host__ __device__ inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Warps of a thread block: those of one block row, whose lists are equally long. A thread block keeps its place on the
// multiprocessor until its last warp is done, so warps of unlike lists had better not share one.
inline int warps_of(const Layout& layout, int rows) { return min(max(layout.block / rows, 1), kWarps); }

inline dim3 grid_of(const Shape& shape, int parts) {
  return dim3(parts, static_cast<unsigned>(shape.heads), static_cast<unsigned>(shape.batch));
}

// ---- kept blocks ----------------------------------------------------------------------------------------------------

// Kept blocks of one block row or column of one head: places begin .. end of the lists.
struct List {
  int begin, end;
  __device__ List(const int* offsets, const Layout& layout, int lists, unsigned h, int index) {
    const int place = (layout.per_head ? h * lists : 0) + index;
    begin = __ldg(offsets + place);
    end = __ldg(offsets + place + 1);
  }
};

// Walks through a list of kept blocks, their number one step ahead: entries start .. end along the other axis.
struct Walk {
  const int* blocks;
  int i, last, block_log2, block, length, ahead, start, end;

  __device__ Walk(const List& list, const int* blocks, const Layout& layout, int length)
      : blocks(blocks), i(list.begin), last(list.end), block_log2(layout.block_log2), block(layout.block),
        length(length), ahead(0) {
    if (i < last) ahead = __ldg(blocks + i);
  }
  __device__ bool go_on() {
    start = ahead << block_log2;
    end = min(start + block, length);
    if (i + 1 < last) ahead = __ldg(blocks + i + 1);
    return i < last;
  }
  __device__ void next() { ++i; }
};

// The (b, b) values of the kept block at place `i` of the row lists.
template <class F>
__device__ inline char* block_values(char* values, const Layout& layout, const Shape& shape, unsigned b, unsigned h, int i) {
  const int64_t blocks = layout.per_head ? layout.kept : int64_t{layout.kept} * shape.heads;
  const int64_t place = b * blocks + (layout.per_head ? 0 : int64_t{layout.kept} * h) + i;
  return values + ((place << (2 * layout.block_log2)) * F::kBytes);
}

// Keys that a query of this block row does not keep, from its list (whose columns ascend).
__device__ inline int pruned_keys(const List& list, const Layout& layout, int keys) {
  const int size = list.end - list.begin, missing = layout.columns * layout.block - keys;
  int kept = size * layout.block;
  if (missing > 0 && size > 0 && __ldg(layout.row_columns + list.end - 1) == layout.columns - 1) kept -= missing;
  return keys - kept;
}

}  // namespace sat
