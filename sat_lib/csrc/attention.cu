// Fused block-sparse attention: O = softmax(scale Q K^T over the kept blocks) V, never writing the scores.
//
//   forward    p_ij = exp(s_ij) / z_i,  z_i = sum over kept j of exp(s_ij) [+ pruned keys, under the "zero" rule]
//              O_i = sum_j p_ij V_j,  LSE_i = log z_i
//   backward   delta_i = dO_i . O_i,  dS_ij = p_ij (dO_i . V_j - delta_i)
//              dQ = scale dS K,  dK = scale dS^T Q,  dV = P^T dO
//
// q (B, H, Lq, d), k and v (B, H, Lk, d); padding keys weigh 0; a row without keys gives 0 and takes no gradient. Under a
// window, query i sees of the keys 0 .. Lq-1 those with |i - j| <= window; keys from Lq on stand outside of it.
//
// Plan: a warp owns 16 M rows of one head and walks through their list of kept blocks, 8 N columns at a time. Forward:
// rows are queries. Backward: a first launch computes delta; a second has two roles, neighbours in the grid so that a
// head's second read hits L2: row tiles gather dQ, column tiles gather dK and dV. Nobody adds to anybody else's result,
// so there are no atomics and the same input gives the same bits. Every score is computed twice for that, which costs
// less than one more tensor in memory.

#include <type_traits>

#include "block_lists.cuh"
#include "mma.cuh"
#include "online_softmax.cuh"

namespace sat {
namespace {

// Scores outside the window become -inf. `row` and `column` are the first query and key of the tile, or first key and
// query. Most chunks of a narrow layout lie inside as a whole.
template <bool rows_are_keys, int M, int N>
__device__ inline void mask_window(float (&scores)[M][N][4], int row, int column, const Attention& p, Lane lane) {
  if (max(column + 8 * N - 1 - row, row + 16 * M - 1 - column) <= p.window) return;
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int j = 0; j < N; ++j)
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        const int r = row + 16 * m + 8 * (x / 2) + lane.g, c = column + held_column<N>(j, lane.t) + x % 2;
        if (abs(r - c) > p.window && (rows_are_keys ? r : c) < p.shape.queries) scores[m][j][x] = -INFINITY;
      }
}

// ---- forward --------------------------------------------------------------------------------------------------------

template <class F, bool windowed, int P, int M, int N, bool held, int resident>
__global__ void __launch_bounds__(kThreads, resident) forward_kernel(const Attention p) {
  const Lane lane;
  const Shape& shape = p.shape;
  const Tile tile(blockIdx.x, 16 * M);
  if (tile.first >= shape.queries) return;
  const int width = shape.head_size * F::kBytes;
  const Matrix q(p.q, tile.b, tile.h, shape.queries, width), out(p.out, tile.b, tile.h, shape.queries, width);
  const NearMatrix k(p.k, tile.b, tile.h, shape.keys, width), v(p.v, tile.b, tile.h, shape.keys, width);
  const uint8_t* mask = tile.mask(p.key_mask, shape.keys);
  const float scale = p.scale * kLog2e;

  const List list(p.layout.row_offsets, p.layout, p.layout.rows, tile.h, tile.first >> p.layout.block_log2);
  const Rows<F, P, M, held> queries(q, tile.first, lane);
  const float pruned = p.pruned_weigh ? static_cast<float>(pruned_keys(list, p.layout, shape.keys)) : 0;
  RunningSoftmax rows[M][2];
#pragma unroll
  for (int m = 0; m < M; ++m) rows[m][0].start(pruned, lane), rows[m][1].start(pruned, lane);
  Sums<M, P> sums;
  clear<M, P>(sums);

  for (Walk walk(list, p.layout.row_columns, p.layout, shape.keys); walk.go_on(); walk.next())
    for (int first = walk.start; first < walk.end; first += 8 * N) {
      float scores[M][N][4], factors[M][2];
      const Chunk<F, P, N, (P <= 2)> values(v, first, lane);
      multiply_rows<F, P, M, N>(scores, queries, k, first, lane);
      mask_keys<M, N>(scores, mask, first, shape.keys, lane);
      if constexpr (windowed) mask_window<false, M, N>(scores, tile.first, first, p, lane);
      soften<M, N>(scores, rows, factors, scale);
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int c = 0; c < P; ++c)
#pragma unroll
          for (int x = 0; x < 4; ++x)
#pragma unroll
            for (int y = 0; y < 4; ++y) sums[m][c][x][y] *= factors[m][y / 2];
      multiply_scores<F, M, N, P>(sums, scores, values, lane);
    }

  float* lse = p.lse + tile.head(shape) * shape.queries;
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = tile.first + 16 * m + 8 * half + lane.g;
      const float whole = quad_sum(rows[m][half].total);
      store_sums<F, M, P>(out, row, sums, m, half, whole > 0 ? __fdividef(1, whole) : 0, lane);
      if (lane.t == 0 && row < shape.queries) lse[row] = RunningSoftmax::lse(rows[m][half].peak, whole);
    }
}

// ---- backward -------------------------------------------------------------------------------------------------------

template <class F>
__device__ inline float dot(const Piece& x, const Piece& y) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kHalf<F>) {
      const float2 a = F::unpack(x.w[i]), b = F::unpack(y.w[i]);
      sum = fmaf(a.x, b.x, fmaf(a.y, b.y, sum));
    } else {
      sum = fmaf(__uint_as_float(x.w[i]), __uint_as_float(y.w[i]), sum);
    }
  }
  return sum;
}

// What every score of a query's row needs: its LSE in base 2, +inf beyond the last query, and delta. 8 rows a warp.
template <class F>
__global__ void __launch_bounds__(kThreads) row_terms_kernel(const Attention p) {
  const Lane lane;
  const Shape& shape = p.shape;
  const Tile tile(blockIdx.x, 8);
  const int width = shape.head_size * F::kBytes, row = tile.first + lane.g, rows = p.layout.rows * p.layout.block;
  if (tile.first >= rows) return;
  const Matrix grad(p.grad_out, tile.b, tile.h, shape.queries, width), out(p.out, tile.b, tile.h, shape.queries, width);
  const float lse = row < shape.queries ? __ldg(p.lse + tile.head(shape) * shape.queries + row) * kLog2e : INFINITY;
  float delta = 0;
  for (int byte = 16 * lane.t; byte < width; byte += 64)
    delta += dot<F>(grad.load<16>(row, byte), out.load<16>(row, byte));
  delta = quad_sum(delta);
  if (lane.t == 0) p.row_terms[tile.head(shape) * rows + row] = make_float2(lse, delta);
}

template <class F, bool windowed, int P, int M, int N, bool held>
__device__ inline void gather_queries(const Attention& p, int part) {
  const Lane lane;
  const Shape& shape = p.shape;
  const Tile tile(part, 16 * M);
  if (tile.first >= shape.queries) return;
  const int width = shape.head_size * F::kBytes;
  const Matrix q(p.q, tile.b, tile.h, shape.queries, width), grad(p.grad_out, tile.b, tile.h, shape.queries, width);
  const NearMatrix k(p.k, tile.b, tile.h, shape.keys, width), v(p.v, tile.b, tile.h, shape.keys, width);
  const Matrix grad_q(p.grad_q, tile.b, tile.h, shape.queries, width);
  const uint8_t* mask = tile.mask(p.key_mask, shape.keys);
  const float2* terms = p.row_terms + tile.head(shape) * (p.layout.rows * p.layout.block) + tile.first + lane.g;
  const float scale = p.scale * kLog2e;

  const List list(p.layout.row_offsets, p.layout, p.layout.rows, tile.h, tile.first >> p.layout.block_log2);
  const Rows<F, P, M, held> queries(q, tile.first, lane), grads(grad, tile.first, lane);
  float2 term[M][2];
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) term[m][half] = __ldg(terms + 16 * m + 8 * half);
  Sums<M, P> sums;
  clear<M, P>(sums);
  for (Walk walk(list, p.layout.row_columns, p.layout, shape.keys); walk.go_on(); walk.next())
    for (int first = walk.start; first < walk.end; first += 8 * N) {
      float scores[M][N][4], grad_weights[M][N][4];
      const Chunk<F, P, N, (P == 1)> keys(k, first, lane);
      multiply_rows<F, P, M, N>(scores, queries, k, first, lane);
      multiply_rows<F, P, M, N>(grad_weights, grads, v, first, lane);
      mask_keys<M, N>(scores, mask, first, shape.keys, lane);
      if constexpr (windowed) mask_window<false, M, N>(scores, tile.first, first, p, lane);
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int j = 0; j < N; ++j)
#pragma unroll
          for (int x = 0; x < 4; ++x) {
            const float weight = power_of_two(fmaf(scores[m][j][x], scale, -term[m][x / 2].x));
            scores[m][j][x] = weight * (grad_weights[m][j][x] - term[m][x / 2].y);
          }
      multiply_scores<F, M, N, P>(sums, scores, keys, lane);
    }
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      store_sums<F, M, P>(grad_q, tile.first + 16 * m + 8 * half + lane.g, sums, m, half, p.scale, lane);
}

template <class F, bool windowed, int P, int M, int N, bool held>
__device__ inline void gather_keys(const Attention& p, int part) {
  const Lane lane;
  const Shape& shape = p.shape;
  const Tile tile(part, 16 * M);
  if (tile.first >= shape.keys) return;
  const int width = shape.head_size * F::kBytes;
  const NearMatrix q(p.q, tile.b, tile.h, shape.queries, width);
  const NearMatrix grad(p.grad_out, tile.b, tile.h, shape.queries, width);
  const Matrix k(p.k, tile.b, tile.h, shape.keys, width), v(p.v, tile.b, tile.h, shape.keys, width);
  const Matrix grad_k(p.grad_k, tile.b, tile.h, shape.keys, width);
  const Matrix grad_v(p.grad_v, tile.b, tile.h, shape.keys, width);
  const float2* terms = p.row_terms + tile.head(shape) * (p.layout.rows * p.layout.block);
  const uint8_t* mask = tile.mask(p.key_mask, shape.keys);
  const float scale = p.scale * kLog2e;

  const List list(p.layout.column_offsets, p.layout, p.layout.columns, tile.h, tile.first >> p.layout.block_log2);
  const Rows<F, P, M, held> keys(k, tile.first, lane), values(v, tile.first, lane);
  bool real[M][2];  // a padding key's sums may be anything; it takes no gradient
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = tile.first + 16 * m + 8 * half + lane.g;
      real[m][half] = key < shape.keys && (mask == nullptr || __ldg(mask + key));
    }
  Sums<M, P> sums_k, sums_v;
  clear<M, P>(sums_k);
  clear<M, P>(sums_v);
  for (Walk walk(list, p.layout.column_rows, p.layout, shape.queries); walk.go_on(); walk.next())
    for (int first = walk.start; first < walk.end; first += 8 * N) {
      float weights[M][N][4], grads[M][N][4];  // transposed: rows are keys, columns are queries
      const Chunk<F, P, N, (P == 1 && kHalf<F>)> chunk_q(q, first, lane), chunk_grad(grad, first, lane);
      multiply_rows<F, P, M, N>(weights, keys, q, first, lane);
      multiply_rows<F, P, M, N>(grads, values, grad, first, lane);
      if constexpr (windowed) mask_window<true, M, N>(weights, tile.first, first, p, lane);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float4 term = __ldg(reinterpret_cast<const float4*>(terms + first + held_column<N>(j, lane.t)));
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
          for (int x = 0; x < 4; ++x) {
            const float base = x % 2 ? term.z : term.x, delta = x % 2 ? term.w : term.y;
            const float weight = power_of_two(fmaf(weights[m][j][x], scale, -base));
            weights[m][j][x] = weight;
            grads[m][j][x] = weight * (grads[m][j][x] - delta);
          }
      }
      multiply_scores<F, M, N, P>(sums_v, weights, chunk_grad, lane);
      multiply_scores<F, M, N, P>(sums_k, grads, chunk_q, lane);
    }
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = tile.first + 16 * m + 8 * half + lane.g;
      store_sums<F, M, P>(grad_k, row, sums_k, m, half, real[m][half] ? p.scale : 0, lane);
      store_sums<F, M, P>(grad_v, row, sums_v, m, half, real[m][half] ? 1 : 0, lane);
    }
}

template <class F, bool windowed, int P, int MQ, int MK, int N, bool held, int resident>
__global__ void __launch_bounds__(kThreads, resident) backward_kernel(const Attention p, int row_parts) {
  const int part = blockIdx.x;
  if (part < row_parts)
    gather_queries<F, windowed, P, MQ, N, held>(p, part);
  else
    gather_keys<F, windowed, P, MK, N, held>(p, part - row_parts);
}

// ---- launch ---------------------------------------------------------------------------------------------------------

template <class F, int P, int M, int N, bool held, int resident>
cudaError_t launch_forward(const Attention& p, cudaStream_t stream) {
  const int warps = warps_of(p.layout, 16 * M), parts = ceil_div(p.shape.queries, 16 * M * warps);
  const auto kernel = p.window == kNoWindow ? forward_kernel<F, false, P, M, N, held, resident>
                                            : forward_kernel<F, true, P, M, N, held, resident>;
  kernel<<<grid_of(p.shape, parts), 32 * warps, 0, stream>>>(p);
  return cudaGetLastError();
}

// MQ and MK: tiles of 16 queries or keys that a warp of either role owns.
template <class F, int P, int MQ, int MK, int N, bool held, int resident>
cudaError_t launch_backward(const Attention& p, cudaStream_t stream) {
  const int rows = ceil_div(p.layout.rows * p.layout.block, 8 * kWarps);
  row_terms_kernel<F><<<grid_of(p.shape, rows), kThreads, 0, stream>>>(p);
  const int warps = warps_of(p.layout, 16 * MQ), row_parts = ceil_div(p.shape.queries, 16 * MQ * warps);
  const dim3 grid = grid_of(p.shape, row_parts + ceil_div(p.shape.keys, 16 * MK * warps));
  const auto kernel = p.window == kNoWindow ? backward_kernel<F, false, P, MQ, MK, N, held, resident>
                                            : backward_kernel<F, true, P, MQ, MK, N, held, resident>;
  kernel<<<grid, 32 * warps, 0, stream>>>(p, row_parts);
  return cudaGetLastError();
}

// Tile sizes by format and head size, the fastest of those tried on an H100 at 5 % density: larger tiles share what they
// read among more rows, until registers run out. Blocks of 16 leave no choice of M.
template <class F>
cudaError_t forward(const Attention& p, cudaStream_t stream) {
  const bool small = p.layout.block == 16;
  const int size = p.shape.head_size;
  if constexpr (std::is_same_v<F, Fp32>) {
    if (size <= 32) return launch_forward<F, 1, 1, 2, true, 4>(p, stream);
    return size <= 64 ? launch_forward<F, 2, 1, 2, true, 2>(p, stream) : launch_forward<F, 4, 1, 2, false, 2>(p, stream);
  } else {
    constexpr int resident = kHalf<F> ? 4 : 3;
    if (size <= 32)
      return small ? launch_forward<F, 1, 1, 2, true, 4>(p, stream) : launch_forward<F, 1, 2, 4, true, resident>(p, stream);
    if (size <= 64)
      return small || !kHalf<F> ? launch_forward<F, 2, 1, 2, true, 3>(p, stream)
                                : launch_forward<F, 2, 2, 4, true, 2>(p, stream);
    return launch_forward<F, 4, 1, 2, kHalf<F>, 2>(p, stream);
  }
}

template <class F>
cudaError_t backward(const Attention& p, cudaStream_t stream) {
  const bool small = p.layout.block == 16;
  const int size = p.shape.head_size;
  if constexpr (kHalf<F>) {
    if (size <= 32)
      return small ? launch_backward<F, 1, 1, 1, 2, true, 4>(p, stream)
                   : launch_backward<F, 1, 2, 1, 2, true, 4>(p, stream);
    if (size <= 64)
      return small ? launch_backward<F, 2, 1, 1, 2, true, 2>(p, stream)
                   : launch_backward<F, 2, 2, 1, 2, true, 2>(p, stream);
  } else {
    constexpr int resident = std::is_same_v<F, Fp32> ? 3 : 4;
    if (size <= 32) return launch_backward<F, 1, 1, 1, 2, true, resident>(p, stream);
    if (size <= 64) return launch_backward<F, 2, 1, 1, 2, true, 2>(p, stream);
  }
  return launch_backward<F, 4, 1, 1, 2, false, 2>(p, stream);
}

}  // namespace

cudaError_t attention_forward(const Attention& p, cudaStream_t stream) {
  return by_format(p.format, [&](auto format) { return forward<decltype(format)>(p, stream); });
}

cudaError_t attention_backward(const Attention& p, cudaStream_t stream) {
  return by_format(p.format, [&](auto format) { return backward<decltype(format)>(p, stream); });
}

}  // namespace sat
