// Sparse softmax over the kept keys of every query, and its gradient.
//
//   forward    w_ij = exp(s_ij) / z_i,  z_i = sum over kept j of exp(s_ij) [+ pruned keys, under the "zero" rule]
//   backward   ds_ij = w_ij (dw_ij - sum_j w_ij dw_ij)
//
// scores, weights and gradients are (B, T, b, b). Padding keys and keys beyond the end weigh 0; a row without keys is 0.
//
// Plan: a warp owns 8 rows of one block row, a quad of lanes each. It reads them twice, 16 bytes a lane: once for the
// sums, once, from L1, to write. No number is kept in between, so a row may be as long as it likes.

#include "block_lists.cuh"
#include "mma.cuh"

namespace sat {
namespace {

constexpr int kRows = 8;  // of a warp

template <class F>
constexpr int kNumbers = 16 / F::kBytes;  // of a piece

template <class F>
__device__ inline void unpack(const Piece& piece, float (&x)[kNumbers<F>]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kHalf<F>) {
      const float2 pair = F::unpack(piece.w[i]);
      x[2 * i] = pair.x;
      x[2 * i + 1] = pair.y;
    } else {
      x[i] = __uint_as_float(piece.w[i]);
    }
  }
}

// One row's pieces: number `i` (from the lane's t in steps of 4) lies in a kept block at `offset`, its first key `key`.
template <class F>
struct RowPieces {
  const Layout& layout;
  const List list;
  const int row;  // within the block
  const int log2;  // pieces of a block's row

  __device__ int count() const { return (list.end - list.begin) << log2; }
  __device__ int64_t offset(int i) const {
    const int place = ((i >> log2) << layout.block_log2) + row;
    return (int64_t{place} << (layout.block_log2)) * F::kBytes + 16 * (i & ((1 << log2) - 1));
  }
  __device__ int key(int i) const {
    const int column = __ldg(layout.row_columns + list.begin + (i >> log2));
    return (column << layout.block_log2) + (i & ((1 << log2) - 1)) * kNumbers<F>;
  }
};

template <class F>
__device__ inline void read_scores(float (&x)[kNumbers<F>], const char* at, const uint8_t* mask, int key, int keys) {
  unpack<F>(load_piece<16>(at), x);
  if (mask == nullptr && key + kNumbers<F> <= keys) return;
#pragma unroll
  for (int i = 0; i < kNumbers<F>; ++i)
    if (key + i >= keys || (mask != nullptr && !__ldg(mask + key + i))) x[i] = -INFINITY;
}

template <class F>
__global__ void __launch_bounds__(kThreads) softmax_kernel(const Softmax p) {
  const Lane lane;
  const Tile tile(blockIdx.x, kRows);
  if (tile.first >= p.layout.rows * p.layout.block) return;
  const List list(p.layout.row_offsets, p.layout, p.layout.rows, tile.h, tile.first >> p.layout.block_log2);
  const int row = (tile.first & (p.layout.block - 1)) + lane.g;
  const RowPieces<F> pieces{p.layout, list, row, p.layout.block_log2 + (kHalf<F> ? 1 : 2) - 4};
  const char* scores = block_values<F>(const_cast<char*>(p.scores), p.layout, p.shape, tile.b, tile.h, list.begin);
  char* weights = block_values<F>(p.weights, p.layout, p.shape, tile.b, tile.h, list.begin);
  const uint8_t* mask = tile.mask(p.key_mask, p.shape.keys);
  const int count = pieces.count();

  const float pruned = p.pruned_weigh ? static_cast<float>(pruned_keys(list, p.layout, p.shape.keys)) : 0;
  float peak = pruned > 0 ? 0 : -INFINITY, total = 0;
  for (int i = lane.t; i < count; i += 4) {
    float x[kNumbers<F>];
    read_scores<F>(x, scores + pieces.offset(i), mask, pieces.key(i), p.shape.keys);
    float highest = peak;
#pragma unroll
    for (int n = 0; n < kNumbers<F>; ++n) highest = fmaxf(highest, x[n] * kLog2e);
    if (highest == -INFINITY) continue;
    total *= power_of_two(peak - highest);
    peak = highest;
#pragma unroll
    for (int n = 0; n < kNumbers<F>; ++n) total += power_of_two(fmaf(x[n], kLog2e, -peak));
  }
  const float highest = quad_max(peak);
  const float base = highest == -INFINITY ? 0 : highest;
  const float whole = quad_sum(total * power_of_two(peak - base)) + pruned * power_of_two(-base);
  const float factor = whole > 0 ? 1 / whole : 0;

  for (int i = lane.t; i < count; i += 4) {
    float x[kNumbers<F>];
    read_scores<F>(x, scores + pieces.offset(i), mask, pieces.key(i), p.shape.keys);
#pragma unroll
    for (int n = 0; n < kNumbers<F>; ++n) x[n] = power_of_two(fmaf(x[n], kLog2e, -base)) * factor;
    store<F>(weights + pieces.offset(i), x);
  }
}

template <class F>
__global__ void __launch_bounds__(kThreads) softmax_backward_kernel(const Softmax p) {
  const Lane lane;
  const Tile tile(blockIdx.x, kRows);
  if (tile.first >= p.layout.rows * p.layout.block) return;
  const List list(p.layout.row_offsets, p.layout, p.layout.rows, tile.h, tile.first >> p.layout.block_log2);
  const int row = (tile.first & (p.layout.block - 1)) + lane.g;
  const RowPieces<F> pieces{p.layout, list, row, p.layout.block_log2 + (kHalf<F> ? 1 : 2) - 4};
  const char* grads = block_values<F>(const_cast<char*>(p.scores), p.layout, p.shape, tile.b, tile.h, list.begin);
  const char* weights = block_values<F>(p.weights, p.layout, p.shape, tile.b, tile.h, list.begin);
  char* out = block_values<F>(p.grad_scores, p.layout, p.shape, tile.b, tile.h, list.begin);
  const int count = pieces.count();

  float sum = 0;
  for (int i = lane.t; i < count; i += 4) {
    float weight[kNumbers<F>], grad[kNumbers<F>];
    unpack<F>(load_piece<16>(weights + pieces.offset(i)), weight);
    unpack<F>(load_piece<16>(grads + pieces.offset(i)), grad);
#pragma unroll
    for (int n = 0; n < kNumbers<F>; ++n) sum = fmaf(weight[n], grad[n], sum);
  }
  sum = quad_sum(sum);
  for (int i = lane.t; i < count; i += 4) {
    float weight[kNumbers<F>], grad[kNumbers<F>];
    unpack<F>(load_piece<16>(weights + pieces.offset(i)), weight);
    unpack<F>(load_piece<16>(grads + pieces.offset(i)), grad);
#pragma unroll
    for (int n = 0; n < kNumbers<F>; ++n) grad[n] = weight[n] * (grad[n] - sum);
    store<F>(out + pieces.offset(i), grad);
  }
}

template <class F>
cudaError_t launch(const Softmax& p, bool backward, cudaStream_t stream) {
  const int warps = warps_of(p.layout, kRows), parts = ceil_div(p.layout.rows * p.layout.block, kRows * warps);
  const dim3 grid = grid_of(p.shape, parts);
  if (backward)
    softmax_backward_kernel<F><<<grid, 32 * warps, 0, stream>>>(p);
  else
    softmax_kernel<F><<<grid, 32 * warps, 0, stream>>>(p);
  return cudaGetLastError();
}

cudaError_t run(const Softmax& p, bool backward, cudaStream_t stream) {
  switch (p.format) {
    case Format::kBf16: return launch<Bf16>(p, backward, stream);
    case Format::kFp16: return launch<Fp16>(p, backward, stream);
    default: return launch<Fp32>(p, backward, stream);
  }
}

}  // namespace

cudaError_t sparse_softmax(const Softmax& p, cudaStream_t stream) { return run(p, false, stream); }
cudaError_t sparse_softmax_backward(const Softmax& p, cudaStream_t stream) { return run(p, true, stream); }

}  // namespace sat
