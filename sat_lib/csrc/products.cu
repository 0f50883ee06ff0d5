// The two sparse-dense products of block-sparse attention, and the transpose that their gradients need.
//
//   sddmm             values = scale Q K^T at the kept blocks; -inf at padding keys, 0 beyond the last query or key
//   spmm              out = scale values X             (X one row a key)
//   spmm_transposed   out = scale values^T X           (X one row a query)
//
// values (B, T, b, b); gradients: sddmm's are spmm and spmm_transposed of its values' gradient, spmm's are sddmm and
// spmm_transposed. With a key mask, padding keys count as rows of zeros of X, and get rows of zeros of the transpose.
//
// Plan: a warp owns 16 M rows (transposed: columns) of one head's map and walks through their kept blocks, 8 N entries
// of a row at a time, 16 bytes a lane wherever the block is wide enough.

#include "block_lists.cuh"
#include "mma.cuh"

namespace sat {
namespace {

// Keys behind a key mask look like keys beyond the end.
struct MaskedMatrix : Matrix {
  const uint8_t* mask;

  __device__ MaskedMatrix(const Matrix& x, const uint8_t* mask) : Matrix(x), mask(mask) {}
  template <int bytes>
  __device__ Piece load(int row, int byte) const {
    const bool real = inside(row, byte) && (mask == nullptr || __ldg(mask + row));
    return real ? load_piece<bytes>(at(row, byte)) : Piece{};
  }
};

template <class F, int P, int M, int N>
__global__ void __launch_bounds__(kThreads) sddmm_kernel(const Product p) {
  const Lane lane;
  const Shape& shape = p.shape;
  const Tile tile(blockIdx.x, 16 * M);
  if (tile.first >= p.layout.rows * p.layout.block) return;
  const int width = shape.head_size * F::kBytes;
  const Matrix q(p.left, tile.b, tile.h, shape.queries, width);
  const NearMatrix k(p.right, tile.b, tile.h, shape.keys, width);
  const uint8_t* mask = tile.mask(p.key_mask, shape.keys);
  const int block = p.layout.block, within = tile.first & (block - 1);

  const List list(p.layout.row_offsets, p.layout, p.layout.rows, tile.h, tile.first >> p.layout.block_log2);
  const Rows<F, P, M, (P < 4)> queries(q, tile.first, lane);
  for (int i = list.begin; i < list.end; ++i) {
    const int start = __ldg(p.layout.row_columns + i) << p.layout.block_log2;
    char* values = block_values<F>(p.values, p.layout, shape, tile.b, tile.h, i);
    for (int column = 0; column < block; column += 8 * N) {
      float scores[M][N][4];
      multiply_rows<F, P, M, N>(scores, queries, k, start + column, lane);
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float x[2 * N];
#pragma unroll
          for (int j = 0; j < 2 * N; ++j) {
            const int key = start + column + 2 * N * lane.t + j;
            x[j] = key < shape.keys ? scores[m][j / 2][2 * half + j % 2] * p.scale : 0;
            if (mask != nullptr && key < shape.keys && !__ldg(mask + key)) x[j] = -INFINITY;
          }
          const int row = within + 16 * m + 8 * half + lane.g;
          store<F>(values + (row * block + column + 2 * N * lane.t) * F::kBytes, x);
        }
    }
  }
}

template <class F, int P, int M, int N>
__global__ void __launch_bounds__(kThreads) spmm_kernel(const Product p) {
  const Lane lane;
  const Shape& shape = p.shape;
  const Tile tile(blockIdx.x, 16 * M);
  if (tile.first >= shape.queries) return;
  const int width = shape.head_size * F::kBytes;
  const uint8_t* mask = tile.mask(p.key_mask, shape.keys);
  const MaskedMatrix x(Matrix(p.right, tile.b, tile.h, shape.keys, width), mask);
  const Matrix out(p.left, tile.b, tile.h, shape.queries, width);
  const int block = p.layout.block, within = tile.first & (block - 1);

  const List list(p.layout.row_offsets, p.layout, p.layout.rows, tile.h, tile.first >> p.layout.block_log2);
  Sums<M, P> sums;
  clear<M, P>(sums);
  for (int i = list.begin; i < list.end; ++i) {
    const int start = __ldg(p.layout.row_columns + i) << p.layout.block_log2;
    const char* values = block_values<F>(p.values, p.layout, shape, tile.b, tile.h, i);
    for (int column = 0; column < block; column += 8 * N) {
      constexpr int bytes = 2 * N * F::kBytes;  // a lane's part of a row: 16, or 8 in a narrow block of 16 bit
      Piece low[M], high[M];
#pragma unroll
      for (int m = 0; m < M; ++m) {
        const char* at = values + ((within + 16 * m + lane.g) * block + column) * F::kBytes + bytes * lane.t;
        low[m] = load_piece<bytes>(at);
        high[m] = load_piece<bytes>(at + 8 * block * F::kBytes);
      }
#pragma unroll
      for (int s = 0; s < bytes / 8; ++s) {
        uint32_t a[M][4];
#pragma unroll
        for (int m = 0; m < M; ++m) {
          a[m][0] = low[m].w[2 * s];
          a[m][1] = high[m].w[2 * s];
          a[m][2] = low[m].w[2 * s + 1];
          a[m][3] = high[m].w[2 * s + 1];
        }
        multiply_columns<F, M, P>(sums, a, x, start + column + 2 * N * lane.t + kLaneRows<F> * s, lane);
      }
    }
  }
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      store_sums<F, M, P>(out, tile.first + 16 * m + 8 * half + lane.g, sums, m, half, p.scale, lane);
}

// The values are read across: a lane takes 2 M neighbouring keys of its queries, and owns these keys' sums.
template <class F, int P, int M>
__global__ void __launch_bounds__(kThreads) spmm_transposed_kernel(const Product p) {
  constexpr int kStep = 4 * kLaneRows<F>;  // queries of one contraction step
  const Lane lane;
  const Shape& shape = p.shape;
  const Tile tile(blockIdx.x, 16 * M);
  if (tile.first >= shape.keys) return;
  const int width = shape.head_size * F::kBytes;
  const Matrix x(p.left, tile.b, tile.h, shape.queries, width);
  const Matrix out(p.right, tile.b, tile.h, shape.keys, width);
  const uint8_t* mask = tile.mask(p.key_mask, shape.keys);
  const int block = p.layout.block, within = tile.first & (block - 1);

  const List list(p.layout.column_offsets, p.layout, p.layout.columns, tile.h, tile.first >> p.layout.block_log2);
  Sums<M, P> sums;
  clear<M, P>(sums);
  for (int i = list.begin; i < list.end; ++i) {
    const int start = __ldg(p.layout.column_rows + i) << p.layout.block_log2;
    char* data = block_values<F>(p.values, p.layout, shape, tile.b, tile.h, __ldg(p.layout.column_to_row + i));
    const NearMatrix values(View{data, 0, 0, int64_t{block} * F::kBytes}, 0, 0, block, block * F::kBytes);
    for (int row = 0; row < block; row += kStep) {
      Columns<F, 2 * M> keys;
      keys.load(values, row + kLaneRows<F> * lane.t, (within + 2 * M * lane.g) * F::kBytes);
      uint32_t a[M][4];
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) a[m][i] = keys.get(2 * m + i % 2, i / 2);
      multiply_columns<F, M, P>(sums, a, x, start + row + kLaneRows<F> * lane.t, lane);
    }
  }
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = tile.first + 2 * M * lane.g + 2 * m + half;
      const bool real = key < shape.keys && (mask == nullptr || __ldg(mask + key));
      store_sums<F, M, P>(out, key, sums, m, half, real ? p.scale : 0, lane);
    }
}

// ---- launch ---------------------------------------------------------------------------------------------------------

enum class Kind { kSddmm, kSpmm, kSpmmTransposed };

template <class F, int P, int M, int N>
cudaError_t launch(Kind kind, const Product& p, cudaStream_t stream) {
  const int warps = warps_of(p.layout, 16 * M);
  int length = kind == Kind::kSpmmTransposed ? p.shape.keys : p.shape.queries;
  if (kind == Kind::kSddmm) length = p.layout.rows * p.layout.block;  // the last block is written whole
  const int parts = ceil_div(length, 16 * M * warps);
  const dim3 grid = grid_of(p.shape, parts);
  if (kind == Kind::kSddmm)
    sddmm_kernel<F, P, M, N><<<grid, 32 * warps, 0, stream>>>(p);
  else if (kind == Kind::kSpmm)
    spmm_kernel<F, P, M, N><<<grid, 32 * warps, 0, stream>>>(p);
  else
    spmm_transposed_kernel<F, P, M><<<grid, 32 * warps, 0, stream>>>(p);
  return cudaGetLastError();
}

template <class F>
cudaError_t launch(Kind kind, const Product& p, cudaStream_t stream) {
  constexpr int N = kHalf<F> ? 4 : 2;  // 16 bytes a lane
  const bool small = p.layout.block == 16;
  if (p.shape.head_size <= 32)
    return small ? launch<F, 1, 1, 2>(kind, p, stream) : launch<F, 1, 2, N>(kind, p, stream);
  if (p.shape.head_size <= 64)
    return small ? launch<F, 2, 1, 2>(kind, p, stream) : launch<F, 2, 1, N>(kind, p, stream);
  return small ? launch<F, 4, 1, 2>(kind, p, stream) : launch<F, 4, 1, N>(kind, p, stream);
}

cudaError_t run(Kind kind, const Product& p, cudaStream_t stream) {
  return by_format(p.format, [&](auto format) { return launch<decltype(format)>(kind, p, stream); });
}

}  // namespace

cudaError_t sddmm(const Product& p, cudaStream_t stream) { return run(Kind::kSddmm, p, stream); }
cudaError_t spmm(const Product& p, cudaStream_t stream) { return run(Kind::kSpmm, p, stream); }
cudaError_t spmm_transposed(const Product& p, cudaStream_t stream) { return run(Kind::kSpmmTransposed, p, stream); }

}  // namespace sat
