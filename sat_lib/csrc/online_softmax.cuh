// Softmax over scores that come chunk by chunk: every row keeps its maximum and its sum so far.
//
// Weights are powers of two, p = 2^(scale log2(e) score - maximum), since the hardware has no other exponential. A chunk
// with a higher maximum lowers what was summed before by a factor, which the caller's own sums take too. Keys that a row
// does not attend to have the score -inf.
#pragma once

#include "mma.cuh"

namespace sat {

constexpr float kLn2 = 0.6931471805599453f;

// Running maximum and sum of a row's weights in base 2; a quad of lanes shares the maximum, each has its own sum.
struct RunningSoftmax {
  float peak, total;

  __device__ void start(float pruned, Lane lane) {
    peak = pruned > 0 ? 0 : -1e30f;  // not -inf, whose difference from itself is no number
    total = lane.t == 0 ? pruned : 0;
  }
  // Take up a chunk whose maximum is `highest`; returns what the sums so far must be multiplied with.
  __device__ float raise(float highest) {
    const float higher = fmaxf(peak, highest), factor = power_of_two(peak - higher);
    peak = higher;
    total *= factor;
    return factor;
  }
  // Natural logarithm of the sum; +inf where there was nothing, so that exp(score - lse) is 0.
  static __device__ float lse(float peak, float whole) { return whole > 0 ? (peak + __log2f(whole)) * kLn2 : INFINITY; }
};

// Scores of keys that don't exist or are padding become -inf. Columns of the chunk are keys.
template <int M, int N>
__device__ inline void mask_keys(float (&scores)[M][N][4], const uint8_t* mask, int first, int keys, Lane lane) {
  if (mask == nullptr && first + 8 * N <= keys) return;
#pragma unroll
  for (int j = 0; j < N; ++j)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int key = first + held_column<N>(j, lane.t) + i;
      if (key < keys && (mask == nullptr || __ldg(mask + key))) continue;
#pragma unroll
      for (int m = 0; m < M; ++m) scores[m][j][i] = scores[m][j][2 + i] = -INFINITY;
    }
}

// p = 2^(scale score), scale > 0, relative to the row's running maximum, in place; returns the factors for older sums.
template <int M, int N>
__device__ inline void soften(float (&scores)[M][N][4], RunningSoftmax (&rows)[M][2], float (&factors)[M][2],
                              float scale) {
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float highest = -INFINITY;
#pragma unroll
      for (int j = 0; j < N; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) highest = fmaxf(highest, scores[m][j][2 * half + i]);
      RunningSoftmax& row = rows[m][half];
      factors[m][half] = row.raise(quad_max(highest) * scale);
      const float base = row.peak;
#pragma unroll
      for (int j = 0; j < N; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& score = scores[m][j][2 * half + i];
          score = power_of_two(fmaf(score, scale, -base));
          row.total += score;
        }
    }
}

}  // namespace sat
