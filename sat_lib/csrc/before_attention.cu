// What a layer does before its attention: norm and the projections to queries, keys and values.
//
//   n = (x - mean x) / sqrt(var x + eps),  q, k, v = n W^T + b, cut in three
//
// x (T, 64) float32, T tokens; q, k, v (T, 64) bf16; W (192, 64), b (192,), the norm's gain and bias already in them.
// Products in bf16, all else in float32. Backward recomputes n and adds the gradient that comes past the norm, of the
// residual stream, so that no pass over memory is spent on that sum.
//
// Plan: see layer.cuh. Each block of the backward pass writes its sums of the weights' gradients once; the caller adds
// them up. Bytes: forward reads x and writes q, k, v; backward reads x, dx, dq, dk, dv and writes dx; 0.11 and 0.20 ms for
// half a million tokens at 3 TB/s.

#include "layer.cuh"

namespace sat {
namespace {

constexpr int kOuts = 3 * kWidth;
constexpr int kPerProcessor = 5;  // blocks of the forward pass

struct Weights {
  bf16 matrix[kOuts][kNarrow];
  float bias[kOuts];

  __device__ void load(const BeforeAttention& p) {
    for (int i = threadIdx.x; i < kOuts * kWidth; i += blockDim.x) {
      const int row = i / kWidth, from = row / kWidth * kWidth + entry(row % kWidth);
      matrix[row][i % kWidth] = __float2bfloat16(__ldg(p.weight + from * kWidth + feature(i % kWidth)));
    }
    for (int i = threadIdx.x; i < kOuts; i += blockDim.x) bias[i] = __ldg(p.bias + i / kWidth * kWidth + entry(i % kWidth));
  }
};

struct BackwardShared {
  Weights weights;
  bf16 normed[kTile][kNarrow], grad[kTile][kOuts + 8];
};

__global__ void __launch_bounds__(32 * kForwardWarps, kPerProcessor) forward_kernel(const BeforeAttention p) {
  extern __shared__ __align__(16) char shared[];
  Weights& w = *reinterpret_cast<Weights*>(shared);
  w.load(p);
  __syncthreads();
  const Lane lane;
  const int64_t tiles = (p.rows + 15) / 16;
  for (int64_t tile = int64_t{blockIdx.x} * kForwardWarps + threadIdx.x / 32; tile < tiles;
       tile += int64_t{gridDim.x} * kForwardWarps) {
    Tiles x;
    uint32_t normed[4][4];
    float rstd[2];
    read_rows(x, p.x, 16 * tile, p.rows, lane);
    normalise(normed, rstd, x, p.eps);
#pragma unroll
    for (int c = 0; c < kOuts / 32; ++c) {
      float sum[4][4] = {};
#pragma unroll
      for (int k = 0; k < 4; ++k) multiply_rows_of(sum, normed[k], w.matrix, 4 * c, k);
#pragma unroll
      for (int n = 0; n < 4; ++n) add_bias(sum[n], w.bias + 32 * c + 8 * n, lane);
      write_pieces(p.out[c / 2], sum, c % 2, 16 * tile, p.rows, lane);
    }
  }
}

// Of one warp: 48 rows by 32 columns of W's gradient, and b's of these rows.
struct WeightGrads {
  float matrix[3][4][4] = {}, bias[3][4] = {};

  __device__ void add(const BackwardShared& s, int warp, Lane lane) {
    const uint32_t one = ones(lane);
#pragma unroll 2
    for (int k = 0; k < kTile / 16; ++k) {
      uint32_t b[2][4];
#pragma unroll
      for (int n = 0; n < 2; ++n) right_transposed(b[n], s.normed, warp / 4 * 4 + 2 * n, k);
#pragma unroll
      for (int m = 0; m < 3; ++m) {
        uint32_t a[4];
        left_transposed(a, s.grad, warp % 4 * 3 + m, k);
        Bf16::mma(bias[m], a, {one, one});
#pragma unroll
        for (int n = 0; n < 2; ++n) multiply(matrix[m][2 * n], matrix[m][2 * n + 1], a, b[n]);
      }
    }
  }

  // W, then b.
  __device__ void write(float* to, int warp, Lane lane) const {
#pragma unroll
    for (int m = 0; m < 3; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = 16 * (warp % 4 * 3 + m) + lane.g + i / 2 * 8, column = 2 * lane.t + i % 2;
#pragma unroll
        for (int n = 0; n < 4; ++n) to[row * kWidth + feature(warp / 4 * 32 + 8 * n + column)] = matrix[m][n][i];
        if (column == 0 && warp < 4) to[kOuts * kWidth + row] = bias[m][i];
      }
  }
};

__global__ void __launch_bounds__(32 * kBackwardWarps, 2) backward_kernel(const BeforeAttention p) {
  extern __shared__ __align__(16) char shared[];
  BackwardShared& s = *reinterpret_cast<BackwardShared*>(shared);
  s.weights.load(p);
  __syncthreads();
  const Lane lane;
  const int warp = threadIdx.x / 32;
  WeightGrads grads;
  for (int64_t begin = int64_t{blockIdx.x} * kTile; begin < p.rows; begin += int64_t{gridDim.x} * kTile) {
    const int64_t first = begin + 16 * warp;
    Tiles tiles = {};
#pragma unroll
    for (int part = 0; part < 3; ++part) {
      Piece pieces[2][2];
      read_pieces(pieces, p.grad_out[part], first, p.rows, lane);
      stage_pieces(s.grad, pieces, kWidth * part, lane);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        uint32_t a[4];
        left_of_pieces(a, pieces, k);
        multiply_columns_of(tiles, a, s.weights.matrix, 0, 4 * part + k);
      }
    }
    uint32_t normed[4][4];
    float rstd[2];
    {
      Tiles x;
      read_rows(x, p.x, first, p.rows, lane);
      normalise(normed, rstd, x, p.eps);
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) stage(s.normed, normed[k], k, lane);
    through_norm(tiles, normed, rstd, p.grad_past, first, p.rows, lane);
    write_rows(p.grad_x, tiles, first, p.rows, lane);
    __syncthreads();
    grads.add(s, warp, lane);
    __syncthreads();
  }
  grads.write(p.partial + int64_t{blockIdx.x} * kBeforeAttentionWeights, warp, lane);
}

}  // namespace

static_assert(kBeforeAttentionWeights == kOuts * kWidth + kOuts);

cudaError_t before_attention(const BeforeAttention& p, cudaStream_t stream) {
  return launch(forward_kernel, kPerProcessor * p.parts / 2, kForwardWarps, sizeof(Weights), p, stream);
}

cudaError_t before_attention_backward(const BeforeAttention& p, cudaStream_t stream) {
  return launch(backward_kernel, p.parts, kBackwardWarps, sizeof(BackwardShared), p, stream);
}

}  // namespace sat
