// Mean of the dense attention map A^s over batch and heads, and its mean over blocks, without any head's L x L map.
//
//   mean_map_ij = 1 / (B H) sum over b, h of exp(s_ij - LSE_i),  s = scale Q K^T;  pooled = mean_map averaged by block
//
// q (B, H, Lq, d), k (B, H, Lk, d); padding keys weigh 0, a query without any real key counts as a row of zeros.
//
// Plan, three launches: lse_kernel gives every query's log-sum-exp. map_kernel gives a thread block one 128 x 128 piece
// of the map and a share of the heads; it recomputes that piece head after head and adds it up in registers, so every
// exponential is computed twice and nothing of size L x L is written per head. finish_kernel adds up the shares in
// order, which makes the result repeatable, and pools.

#include "block_lists.cuh"
#include "mma.cuh"
#include "online_softmax.cuh"

namespace sat {
namespace {

// Rows of the LSE's workspace: whole pieces of the map, so that readers need no bounds.
__host__ __device__ inline int padded_queries(const Shape& shape) {
  return ceil_div(shape.queries, kMapTile) * kMapTile;
}

// LSE in base 2, +inf beyond the last query.
template <class F, int P, int M, int N, bool held>
__global__ void __launch_bounds__(kThreads) lse_kernel(const Statistics p) {
  const Lane lane;
  const Shape& shape = p.shape;
  const Tile tile(blockIdx.x, 16 * M);
  const int padded = padded_queries(shape);
  if (tile.first >= padded) return;
  const int width = shape.head_size * F::kBytes;
  const Matrix q(p.q, tile.b, tile.h, shape.queries, width);
  const NearMatrix k(p.k, tile.b, tile.h, shape.keys, width);
  const uint8_t* mask = tile.mask(p.key_mask, shape.keys);
  const Rows<F, P, M, held> queries(q, tile.first, lane);
  RunningSoftmax rows[M][2];
#pragma unroll
  for (int m = 0; m < M; ++m) rows[m][0].start(0, lane), rows[m][1].start(0, lane);
  for (int first = 0; first < shape.keys; first += 8 * N) {
    float scores[M][N][4], factors[M][2];
    multiply_rows<F, P, M, N>(scores, queries, k, first, lane);
    mask_keys<M, N>(scores, mask, first, shape.keys, lane);
    soften<M, N>(scores, rows, factors, p.scale * kLog2e);
  }
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = tile.first + 16 * m + 8 * half + lane.g;
      const float whole = quad_sum(rows[m][half].total);
      const float lse = row < shape.queries && whole > 0 ? rows[m][half].peak + __log2f(whole) : INFINITY;
      if (lane.t == 0) p.lse[tile.head(shape) * padded + row] = lse;
    }
}

constexpr int kMapWarps = 16;  // four by four, each with 32 rows and 32 columns of the piece
constexpr int kMapRows = 2, kMapTiles = 4;  // of a warp: 2 x 16 queries, 4 x 8 keys

// What a warp reads of one head.
template <class F, int P, bool held, bool ahead>
struct Operands {
  Matrix q;
  NearMatrix k;
  Rows<F, P, kMapRows, held> queries;
  Piece keys[ahead ? kMapTiles : 1];
  float base[kMapRows][2];

  __device__ Operands(const Statistics& p, unsigned head, int row, int column, Lane lane)
      : Operands(p, head / p.shape.heads, head % p.shape.heads, p.shape.head_size * F::kBytes, row, lane) {
    const float* lse = p.lse + int64_t{head} * padded_queries(p.shape) + row + lane.g;
#pragma unroll
    for (int m = 0; m < kMapRows; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) base[m][half] = __ldg(lse + 16 * m + 8 * half);
    if constexpr (ahead)
#pragma unroll
      for (int j = 0; j < kMapTiles; ++j) keys[j] = k.template load<16>(column + read_row<kMapTiles>(j, lane.g), 16 * lane.t);
  }
  __device__ Operands(const Statistics& p, unsigned b, unsigned h, int width, int row, Lane lane)
      : q(p.q, b, h, p.shape.queries, width), k(p.k, b, h, p.shape.keys, width), queries(q, row, lane) {}

  __device__ void multiply(float (&scores)[kMapRows][kMapTiles][4], int column, Lane lane) const {
    if constexpr (ahead) {
#pragma unroll
      for (int m = 0; m < kMapRows; ++m)
#pragma unroll
        for (int j = 0; j < kMapTiles; ++j)
#pragma unroll
          for (int i = 0; i < 4; ++i) scores[m][j][i] = 0;
      uint32_t left[kMapRows][2][4];
#pragma unroll
      for (int m = 0; m < kMapRows; ++m) queries.get(left[m], m, 0, lane);
#pragma unroll
      for (int j = 0; j < kMapTiles; ++j) multiply_piece<F, kMapRows, kMapTiles>(scores, j, left, keys[j]);
    } else {
      multiply_rows<F, P, kMapRows, kMapTiles>(scores, queries, k, column, lane);
    }
  }
};

template <class F, int P, bool held>
__global__ void __launch_bounds__(32 * kMapWarps) map_kernel(const Statistics p) {
  constexpr int M = kMapRows, N = kMapTiles;
  const Lane lane;
  const Shape& shape = p.shape;
  const int warp = threadIdx.x / 32;
  const int row = blockIdx.y * kMapTile + 32 * (warp % 4), column = blockIdx.x * kMapTile + 32 * (warp / 4);
  const int heads = shape.batch * shape.heads, share = ceil_div(heads, p.splits);
  const int begin = static_cast<int>(blockIdx.z) * share, end = min(heads, begin + share);  // the last may be empty
  const float scale = p.scale * kLog2e;

  // With `ahead`, a head's operands are read while the one before is being exponentiated: in the same registers, since
  // its scores are done with them.
  constexpr bool ahead = held && P * F::kBytes <= 2;
  float sums[M][N][4] = {};
  Operands<F, P, held, ahead> now(p, min(begin, heads - 1), row, column, lane);
  for (int head = begin; head < end; ++head) {
    if (!ahead) now = Operands<F, P, held, ahead>(p, head, row, column, lane);
    float scores[M][N][4], base[M][2];
    now.multiply(scores, column, lane);
#pragma unroll
    for (int m = 0; m < M; ++m) base[m][0] = now.base[m][0], base[m][1] = now.base[m][1];
    const uint8_t* mask = p.key_mask ? p.key_mask + int64_t{head / shape.heads} * shape.keys : nullptr;
    if (ahead && head + 1 < end) now = Operands<F, P, held, ahead>(p, head + 1, row, column, lane);
    mask_keys<M, N>(scores, mask, column, shape.keys, lane);
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int j = 0; j < N; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[m][j][i] += power_of_two(fmaf(scores[m][j][i], scale, -base[m][i / 2]));
  }

  float* out = p.partial + int64_t{blockIdx.z} * shape.queries * shape.keys;
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int j = 0; j < N; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int query = row + 16 * m + 8 * (i / 2) + lane.g, key = column + held_column<N>(j, lane.t) + i % 2;
        if (query < shape.queries && key < shape.keys) out[int64_t{query} * shape.keys + key] = sums[m][j][i];
      }
}

constexpr int kFinishThreads = 256;

__global__ void __launch_bounds__(kFinishThreads) finish_kernel(const Statistics p) {
  __shared__ float parts[kFinishThreads];
  const Shape& shape = p.shape;
  const int row = blockIdx.y * p.block, column = blockIdx.x * p.block;
  const int rows = min(p.block, shape.queries - row), columns = min(p.block, shape.keys - column);
  const int64_t size = int64_t{shape.queries} * shape.keys;
  const float factor = 1.0f / (static_cast<float>(shape.batch) * static_cast<float>(shape.heads));
  float sum = 0;
  for (int i = threadIdx.x; i < rows * columns; i += kFinishThreads) {
    const int64_t at = int64_t{row + i / columns} * shape.keys + column + i % columns;
    float mean = 0;
    for (int split = 0; split < p.splits; ++split) mean += p.partial[split * size + at];
    mean *= factor;
    p.mean_map[at] = mean;
    sum += mean;
  }
  parts[threadIdx.x] = sum;
  for (int half = kFinishThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) parts[threadIdx.x] += parts[threadIdx.x + half];
  }
  if (threadIdx.x == 0) p.pooled[int64_t{blockIdx.y} * gridDim.x + blockIdx.x] = parts[0] / (rows * columns);
}

// ---- launch ---------------------------------------------------------------------------------------------------------

template <class F, int P, int M, int N, bool held>
void launch(const Statistics& p, cudaStream_t stream) {
  const dim3 grid = grid_of(p.shape, ceil_div(padded_queries(p.shape), 16 * M * kWarps));
  lse_kernel<F, P, M, N, held><<<grid, kThreads, 0, stream>>>(p);
  const dim3 pieces(ceil_div(p.shape.keys, kMapTile), ceil_div(p.shape.queries, kMapTile), p.splits);
  map_kernel<F, P, held><<<pieces, 32 * kMapWarps, 0, stream>>>(p);
  const dim3 blocks(ceil_div(p.shape.keys, p.block), ceil_div(p.shape.queries, p.block));
  finish_kernel<<<blocks, kFinishThreads, 0, stream>>>(p);
}

template <class F>
cudaError_t launch(const Statistics& p, cudaStream_t stream) {
  constexpr int N = kHalf<F> ? 4 : 2;
  if (p.shape.head_size <= 32)
    launch<F, 1, 2, N, true>(p, stream);
  else if (p.shape.head_size <= 64)
    launch<F, 2, 2, 2, kHalf<F>>(p, stream);
  else
    launch<F, 4, 2, 2, false>(p, stream);
  return cudaGetLastError();
}

}  // namespace

cudaError_t attention_statistics(const Statistics& p, cudaStream_t stream) {
  return by_format(p.format, [&](auto format) { return launch<decltype(format)>(p, stream); });
}

}  // namespace sat
