// What a layer does with its attention's result: output projection, residual, norm, feed-forward block, residual.
//
//   r = x + drop(a Wo^T + bo)                     x (T, 64) float32, a (T, 64) bf16, T tokens
//   n = (r - mean r) / sqrt(var r + eps)          the norm's gain and bias are already in W1 and b1
//   y = r + drop(drop(gelu(n W1^T + b1)) W2^T + b2)      W1 (128, 64), W2 (64, 128), y (T, 64) float32
//
// Products in bf16, all else in float32. Backward recomputes r, n and the hidden layer from x and a, so that nothing
// but these is kept. drop(v) is v / (1 - p) or 0, by 16 bits of Philox 4x32 with 7 rounds: counter (tile and lane, site),
// key the call's seed. The same bits in both directions, and no mask in memory.
//
// Plan: see layer.cuh. Each block of the backward pass writes its sums of the weights' gradients once; the caller adds
// them up. Bytes: forward reads x and a and writes y, backward reads x, a, dy and writes dx, da; 0.11 and 0.18 ms for
// half a million tokens at 3 TB/s. `bench layer` sets the times beside them.

#include "layer.cuh"

namespace sat {
namespace {

constexpr int kHidden = 128;
constexpr int kWide = kHidden + 8;
constexpr int kPerProcessor = 4;            // blocks of the forward pass

struct Weights {
  bf16 out[kWidth][kNarrow];   // Wo
  bf16 up[kHidden][kNarrow];   // W1
  bf16 down[kWidth][kWide];    // W2
  float out_bias[kWidth], up_bias[kHidden], down_bias[kWidth];

  __device__ void load(const AfterAttention& p) {
    for (int i = threadIdx.x; i < kWidth * kWidth; i += blockDim.x) {
      const int row = i / kWidth, column = i % kWidth;
      out[row][column] = __float2bfloat16(__ldg(p.out_weight + feature(row) * kWidth + entry(column)));
    }
    for (int i = threadIdx.x; i < kHidden * kWidth; i += blockDim.x) {
      up[i / kWidth][i % kWidth] = __float2bfloat16(__ldg(p.up_weight + i / kWidth * kWidth + feature(i % kWidth)));
      down[i / kHidden][i % kHidden] = __float2bfloat16(__ldg(p.down_weight + feature(i / kHidden) * kHidden + i % kHidden));
    }
    for (int i = threadIdx.x; i < kHidden; i += blockDim.x) up_bias[i] = __ldg(p.up_bias + i);
    for (int i = threadIdx.x; i < kWidth; i += blockDim.x) {
      out_bias[i] = __ldg(p.out_bias + feature(i));
      down_bias[i] = __ldg(p.down_bias + feature(i));
    }
  }
};

// What the warps of a block leave for the products over tokens.
struct Staged {
  bf16 attended[kTile][kNarrow], grad_projected[kTile][kNarrow];  // dWo
  bf16 normed[kTile][kNarrow], grad_hidden[kTile][kWide];         // dW1
  bf16 hidden[kTile][kWide], grad_out[kTile][kNarrow];            // dW2
};

struct BackwardShared {
  Weights weights;
  Staged staged;
};

// ---- dropout, gelu --------------------------------------------------------------------------------------------------

struct Coins {
  uint32_t unit, key0, key1, threshold;
  float scale;

  __device__ Coins(const AfterAttention& p, int64_t tile)
      : unit(static_cast<uint32_t>(tile) * 32 + threadIdx.x % 32), key0(0), key1(0), threshold(p.threshold), scale(p.scale) {
    if (threshold > 0) {
      const uint64_t seed = static_cast<uint64_t>(__ldg(p.seed));
      key0 = static_cast<uint32_t>(seed);
      key1 = static_cast<uint32_t>(seed >> 32);
    }
  }
  // Eight draws of 16 bits for two neighbouring tiles of a result.
  __device__ uint4 draw(uint32_t site) const {
    uint4 c = {unit, site, 0, 0};
    uint32_t k0 = key0, k1 = key1;
#pragma unroll
    for (int round = 0; round < 7; ++round) {
      const uint64_t x = uint64_t{0xD2511F53u} * c.x, z = uint64_t{0xCD9E8D57u} * c.z;
      c = {static_cast<uint32_t>(z >> 32) ^ c.y ^ k0, static_cast<uint32_t>(z),
           static_cast<uint32_t>(x >> 32) ^ c.w ^ k1, static_cast<uint32_t>(x)};
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    return c;
  }
  __device__ float keep(float value, uint32_t pair, bool high) const {
    return (high ? pair >> 16 : pair & 0xffffu) < threshold ? 0.0f : value * scale;
  }
  __device__ void drop(float (&low)[4], float (&high)[4], uint32_t site) const {
    if (threshold == 0) return;
    const uint4 bits = draw(site);
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      low[i] = keep(low[i], words[i / 2], i % 2);
      high[i] = keep(high[i], words[2 + i / 2], i % 2);
    }
  }
};
constexpr uint32_t kProjected = 0, kOut = 4, kHiddenSite = 8;  // first site of each dropout

__device__ inline float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Phi(u) and phi(u) of the normal distribution; Phi by Abramowitz and Stegun 7.1.26, to 1e-7.
struct Normal {
  float whole, density;
  __device__ explicit Normal(float u) {
    const float e = power_of_two(-0.5f * kLog2e * u * u);
    const float t = reciprocal(fmaf(0.3275911f * 0.70710678f, fabsf(u), 1.0f));
    const float poly = t * fmaf(t, fmaf(t, fmaf(t, fmaf(t, 1.061405429f, -1.453152027f), 1.421413741f), -0.284496736f),
                                0.254829592f);
    const float tail = 0.5f * poly * e;
    whole = u < 0 ? tail : 1 - tail;
    density = 0.39894228f * e;
  }
};

// r = x + drop(a Wo^T + bo)
__device__ inline void residual(Tiles& r, const Piece (&a)[2][2], const AfterAttention& p, const Weights& w, int64_t first,
                                const Coins& coins, Lane lane) {
  Tiles sum = {};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    uint32_t rows[4];
    left_of_pieces(rows, a, k);
    multiply_rows_of(sum, rows, w.out, 0, k);
  }
  read_rows(r, p.x, first, p.rows, lane);
#pragma unroll
  for (int n = 0; n < 8; n += 2) {
    add_bias(sum[n], w.out_bias + 8 * n, lane);
    add_bias(sum[n + 1], w.out_bias + 8 * n + 8, lane);
    coins.drop(sum[n], sum[n + 1], kProjected + n / 2);
#pragma unroll
    for (int i = 0; i < 4; ++i) r[n][i] += sum[n][i], r[n + 1][i] += sum[n + 1][i];
  }
}

// n W1^T + b1 of hidden columns 16 c .. + 16.
__device__ inline void raise(float (&u)[2][4], const uint32_t (&normed)[4][4], const Weights& w, int c, Lane lane) {
#pragma unroll
  for (int i = 0; i < 4; ++i) u[0][i] = u[1][i] = 0;
#pragma unroll
  for (int k = 0; k < 4; ++k) multiply_rows_of(u, normed[k], w.up, 2 * c, k);
  add_bias(u[0], w.up_bias + 16 * c, lane);
  add_bias(u[1], w.up_bias + 16 * c + 8, lane);
}

// ---- forward --------------------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(32 * kForwardWarps, kPerProcessor) forward_kernel(const AfterAttention p) {
  extern __shared__ __align__(16) char shared[];
  Weights& w = *reinterpret_cast<Weights*>(shared);
  w.load(p);
  __syncthreads();
  const Lane lane;
  const int64_t tiles = (p.rows + 15) / 16;
  for (int64_t tile = int64_t{blockIdx.x} * kForwardWarps + threadIdx.x / 32; tile < tiles;
       tile += int64_t{gridDim.x} * kForwardWarps) {
    const Coins coins(p, tile);
    Tiles r, out = {};
    Piece a[2][2];
    uint32_t normed[4][4];
    float rstd[2];
    read_pieces(a, p.attended, 16 * tile, p.rows, lane);
    residual(r, a, p, w, 16 * tile, coins, lane);
    normalise(normed, rstd, r, p.eps);
#pragma unroll 2
    for (int c = 0; c < kHidden / 16; ++c) {
      float u[2][4];
      raise(u, normed, w, c, lane);
#pragma unroll
      for (int i = 0; i < 8; ++i) u[i / 4][i % 4] *= Normal(u[i / 4][i % 4]).whole;
      coins.drop(u[0], u[1], kHiddenSite + c);
      uint32_t hidden[4];
      pack(hidden, u[0], u[1]);
      multiply_rows_of(out, hidden, w.down, 0, c);
    }
#pragma unroll
    for (int n = 0; n < 8; n += 2) {
      add_bias(out[n], w.down_bias + 8 * n, lane);
      add_bias(out[n + 1], w.down_bias + 8 * n + 8, lane);
      coins.drop(out[n], out[n + 1], kOut + n / 2);
#pragma unroll
      for (int i = 0; i < 4; ++i) out[n][i] += r[n][i], out[n + 1][i] += r[n + 1][i];
    }
    write_rows(p.y, out, 16 * tile, p.rows, lane);
  }
}

// ---- backward -------------------------------------------------------------------------------------------------------

// dy of these rows where the last dropout kept it, packed.
__device__ inline void grad_of_out(uint32_t (&grad)[4][4], const AfterAttention& p, int64_t first, const Coins& coins,
                                   Lane lane) {
  Tiles y;
  read_rows(y, p.grad_y, first, p.rows, lane);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    coins.drop(y[2 * k], y[2 * k + 1], kOut + k);
    pack(grad[k], y[2 * k], y[2 * k + 1]);
  }
}

// d n += the gradient that goes through hidden columns 16 c .. + 16; leaves both operands of dW1 and dW2's one.
__device__ inline void through_hidden(Tiles& grad_normed, const uint32_t (&normed)[4][4], const uint32_t (&grad_out)[4][4],
                                      BackwardShared& s, int c, const Coins& coins, Lane lane) {
  float u[2][4], grad[2][4] = {};
  raise(u, normed, s.weights, c, lane);
  uint32_t packed[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) multiply_columns_of(grad, grad_out[k], s.weights.down, 2 * c, k);
  coins.drop(grad[0], grad[1], kHiddenSite + c);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float& x = u[i / 4][i % 4];
    const Normal normal(x);
    grad[i / 4][i % 4] *= fmaf(x, normal.density, normal.whole);
    x *= normal.whole;
  }
  coins.drop(u[0], u[1], kHiddenSite + c);
  pack(packed, u[0], u[1]);
  stage(s.staged.hidden, packed, c, lane);
  pack(packed, grad[0], grad[1]);
  stage(s.staged.grad_hidden, packed, c, lane);
  multiply_columns_of(grad_normed, packed, s.weights.up, 0, c);
}

// d r -> d a, and dWo's operand.
__device__ inline void through_projection(Tiles& grad, const AfterAttention& p, BackwardShared& s, int64_t first,
                                          const Coins& coins, Lane lane) {
  float sum[2][4][4] = {};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    uint32_t packed[4];
    coins.drop(grad[2 * k], grad[2 * k + 1], kProjected + k);
    pack(packed, grad[2 * k], grad[2 * k + 1]);
    stage(s.staged.grad_projected, packed, k, lane);
#pragma unroll
    for (int c = 0; c < 2; ++c) multiply_columns_of(sum[c], packed, s.weights.out, 4 * c, k);
  }
#pragma unroll
  for (int c = 0; c < 2; ++c) write_pieces(p.grad_attended, sum[c], c, first, p.rows, lane);
}

// Of one warp: 16 rows of W1's gradient, and half of 16 rows of W2's and Wo's.
struct WeightGrads {
  float up[8][4] = {}, down[8][4] = {}, out[4][4] = {};
  float up_bias[4] = {}, down_bias[4] = {}, out_bias[4] = {};

  __device__ void add(const Staged& s, int warp, Lane lane) {
    const int m = warp % 4, half = warp / 4;
    const uint32_t one = ones(lane);
#pragma unroll 2
    for (int k = 0; k < kTile / 16; ++k) {
      uint32_t a[4];
      left_transposed(a, s.grad_hidden, warp, k);
      Bf16::mma(up_bias, a, {one, one});
      multiply_columns_of(up, a, s.normed, 0, k);
      left_transposed(a, s.grad_out, m, k);
      Bf16::mma(down_bias, a, {one, one});
      multiply_columns_of(down, a, s.hidden, 8 * half, k);
      left_transposed(a, s.grad_projected, m, k);
      Bf16::mma(out_bias, a, {one, one});
      multiply_columns_of(out, a, s.attended, 4 * half, k);
    }
  }

  // One after another: Wo, W1, W2, bo, b1, b2.
  __device__ void write(float* to, int warp, Lane lane) const {
    const int m = warp % 4, half = warp / 4;
    float *to_up = to + kWidth * kWidth, *to_down = to_up + kHidden * kWidth, *biases = to_down + kWidth * kHidden;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int hidden = 16 * warp + lane.g + i / 2 * 8, row = feature(16 * m + lane.g + i / 2 * 8);
      const int column = 2 * lane.t + i % 2;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        to_up[hidden * kWidth + feature(8 * n + column)] = up[n][i];
        to_down[row * kHidden + 64 * half + 8 * n + column] = down[n][i];
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) to[row * kWidth + 32 * half + 8 * n + column] = out[n][i];
      if (column > 0) continue;
      biases[kWidth + hidden] = up_bias[i];
      if (half > 0) continue;
      biases[row] = out_bias[i];
      biases[kWidth + kHidden + row] = down_bias[i];
    }
  }
};

__global__ void __launch_bounds__(32 * kBackwardWarps, 1) backward_kernel(const AfterAttention p) {
  extern __shared__ __align__(16) char shared[];
  BackwardShared& s = *reinterpret_cast<BackwardShared*>(shared);
  s.weights.load(p);
  __syncthreads();
  const Lane lane;
  const int warp = threadIdx.x / 32;
  WeightGrads grads;
  for (int64_t begin = int64_t{blockIdx.x} * kTile; begin < p.rows; begin += int64_t{gridDim.x} * kTile) {
    const int64_t first = begin + 16 * warp;
    const Coins coins(p, first / 16);
    Tiles tiles;
    uint32_t normed[4][4], grad_out[4][4];
    float rstd[2];
    {
      Piece a[2][2];
      read_pieces(a, p.attended, first, p.rows, lane);
      residual(tiles, a, p, s.weights, first, coins, lane);
      stage_pieces(s.staged.attended, a, 0, lane);
    }
    normalise(normed, rstd, tiles, p.eps);
    grad_of_out(grad_out, p, first, coins, lane);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      stage(s.staged.normed, normed[k], k, lane);
      stage(s.staged.grad_out, grad_out[k], k, lane);
#pragma unroll
      for (int i = 0; i < 4; ++i) tiles[2 * k][i] = tiles[2 * k + 1][i] = 0;
    }
#pragma unroll 1
    for (int c = 0; c < kHidden / 16; ++c) through_hidden(tiles, normed, grad_out, s, c, coins, lane);
    through_norm(tiles, normed, rstd, p.grad_y, first, p.rows, lane);
    write_rows(p.grad_x, tiles, first, p.rows, lane);
    through_projection(tiles, p, s, first, coins, lane);
    __syncthreads();
    grads.add(s.staged, warp, lane);
    __syncthreads();
  }
  grads.write(p.partial + int64_t{blockIdx.x} * kAfterAttentionWeights, warp, lane);
}

}  // namespace

static_assert(kAfterAttentionWeights == kWidth * kWidth + 2 * kWidth * kHidden + 2 * kWidth + kHidden);

cudaError_t after_attention(const AfterAttention& p, cudaStream_t stream) {
  return launch(forward_kernel, kPerProcessor * p.parts, kForwardWarps, sizeof(Weights), p, stream);
}

cudaError_t after_attention_backward(const AfterAttention& p, cudaStream_t stream) {
  return launch(backward_kernel, p.parts, kBackwardWarps, sizeof(BackwardShared), p, stream);
}

}  // namespace sat
