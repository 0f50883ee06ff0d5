// What the kernels before and after the attention share: a warp takes 16 tokens of width 64 through products in registers.
//
// What one mma.m16n8k16 leaves (lane g, t: rows g, g + 8, columns 2t, 2t + 1 of every 8) is, packed to bf16, the left
// operand of the next. The weights wait in shared memory in bf16; their rows and columns stand in an order in which a
// lane's numbers are neighbours in memory: see `feature`, `entry`. In the backward passes every warp leaves its tokens'
// operands in shared memory; then all warps of a block share the products over tokens, which are the weights'
// gradients, and keep them in registers from tile to tile.
#pragma once

#include "mma.cuh"

namespace sat {

constexpr int kWidth = 64;
constexpr int kNarrow = kWidth + 8;  // a row in shared memory: no two of 8 begin in the same bank
constexpr int kForwardWarps = 4, kBackwardWarps = 8;
constexpr int kTile = 16 * kBackwardWarps;  // tokens of a block in the backward pass
using bf16 = __nv_bfloat16;

// Column 8 n + 2 t + e of a result, or contraction index 16 k + 8 h + 2 t + e, stands for this feature of x.
__host__ __device__ constexpr int feature(int at) { return at / 16 * 16 + at % 8 / 2 * 4 + at % 16 / 8 * 2 + at % 2; }
// The same for a, of which a lane reads 8 neighbours.
__host__ __device__ constexpr int entry(int at) {
  return at / 32 * 32 + at % 8 / 2 * 8 + at % 32 / 16 * 4 + at % 16 / 8 * 2 + at % 2;
}

// ---- small matrices in shared memory --------------------------------------------------------------------------------

template <bool transposed>
__device__ inline void read_matrices(uint32_t (&r)[4], const bf16* row) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}

// Right operands of columns 8 n .. 8 n + 16 and contraction 16 k .. + 16: two of two registers.
// x[column][contraction]
template <int stride>
__device__ inline void right(uint32_t (&b)[4], const bf16 (*x)[stride], int n, int k) {
  const int lane = threadIdx.x % 32;
  read_matrices<false>(b, &x[8 * (n + lane / 16) + lane % 8][16 * k + lane / 8 % 2 * 8]);
}
// x[contraction][column]
template <int stride>
__device__ inline void right_transposed(uint32_t (&b)[4], const bf16 (*x)[stride], int n, int k) {
  const int lane = threadIdx.x % 32;
  read_matrices<true>(b, &x[16 * k + lane / 8 % 2 * 8 + lane % 8][8 * (n + lane / 16)]);
}
// The left operand of rows 16 m .. + 16 from x[contraction][row].
template <int stride>
__device__ inline void left_transposed(uint32_t (&a)[4], const bf16 (*x)[stride], int m, int k) {
  const int lane = threadIdx.x % 32;
  read_matrices<true>(a, &x[16 * k + lane / 16 * 8 + lane % 8][16 * m + lane / 8 % 2 * 8]);
}

// Two neighbouring tiles of a result.
__device__ inline void multiply(float (&low)[4], float (&high)[4], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
  Bf16::mma(low, a, {b[0], b[1]});
  Bf16::mma(high, a, {b[2], b[3]});
}

// Neighbouring tiles of a result += a times columns 8 n .. of x[column][contraction], contraction 16 k .. + 16.
template <int tiles, int stride>
__device__ inline void multiply_rows_of(float (&sum)[tiles][4], const uint32_t (&a)[4], const bf16 (*x)[stride], int n,
                                        int k) {
#pragma unroll
  for (int i = 0; i < tiles; i += 2) {
    uint32_t b[4];
    right(b, x, n + i, k);
    multiply(sum[i], sum[i + 1], a, b);
  }
}
// The same of x[contraction][column].
template <int tiles, int stride>
__device__ inline void multiply_columns_of(float (&sum)[tiles][4], const uint32_t (&a)[4], const bf16 (*x)[stride], int n,
                                           int k) {
#pragma unroll
  for (int i = 0; i < tiles; i += 2) {
    uint32_t b[4];
    right_transposed(b, x, n + i, k);
    multiply(sum[i], sum[i + 1], a, b);
  }
}

// The right operand whose column 0 is all ones, in both registers: it sums over the contraction.
__device__ inline uint32_t ones(Lane lane) { return lane.g == 0 ? 0x3f803f80u : 0u; }

// Two tiles of a result as a left operand.
__device__ inline void pack(uint32_t (&a)[4], const float (&low)[4], const float (&high)[4]) {
  a[0] = Bf16::pack(low[0], low[1]);
  a[1] = Bf16::pack(low[2], low[3]);
  a[2] = Bf16::pack(high[0], high[1]);
  a[3] = Bf16::pack(high[2], high[3]);
}

// A left operand back to where its results came from: columns 16 k .. + 16 of this warp's rows.
template <int stride>
__device__ inline void stage(bf16 (*x)[stride], const uint32_t (&a)[4], int k, Lane lane) {
  bf16* at = &x[threadIdx.x / 32 * 16 + lane.g][16 * k + 2 * lane.t];
  *reinterpret_cast<uint32_t*>(at) = a[0];
  *reinterpret_cast<uint32_t*>(at + 8 * stride) = a[1];
  *reinterpret_cast<uint32_t*>(at + 8) = a[2];
  *reinterpret_cast<uint32_t*>(at + 8 * stride + 8) = a[3];
}

// ---- rows of tokens -------------------------------------------------------------------------------------------------

// A lane's 32 numbers of the warp's 16 rows, in the order of a result's tiles.
using Tiles = float[8][4];

__device__ inline void read_rows(Tiles& x, const float* data, int64_t first, int64_t rows, Lane lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = first + lane.g + 8 * half;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      float4 v = {};
      if (row < rows) v = __ldg(reinterpret_cast<const float4*>(data + row * kWidth + 16 * k + 4 * lane.t));
      x[2 * k][2 * half] = v.x;
      x[2 * k][2 * half + 1] = v.y;
      x[2 * k + 1][2 * half] = v.z;
      x[2 * k + 1][2 * half + 1] = v.w;
    }
  }
}

__device__ inline void write_rows(float* data, const Tiles& x, int64_t first, int64_t rows, Lane lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = first + lane.g + 8 * half;
    if (row >= rows) continue;
#pragma unroll
    for (int k = 0; k < 4; ++k)
      *reinterpret_cast<float4*>(data + row * kWidth + 16 * k + 4 * lane.t) =
          make_float4(x[2 * k][2 * half], x[2 * k][2 * half + 1], x[2 * k + 1][2 * half], x[2 * k + 1][2 * half + 1]);
  }
}

__device__ inline void add_bias(float (&tile)[4], const float* bias, Lane lane) {
  const float2 b = *reinterpret_cast<const float2*>(bias + 2 * lane.t);
  tile[0] += b.x;
  tile[1] += b.y;
  tile[2] += b.x;
  tile[3] += b.y;
}

// pieces[half][c]: 8 neighbours of row g + 8 half of a (rows, 64) bf16 matrix, a left operand in the order of `entry`.
__device__ inline void read_pieces(Piece (&pieces)[2][2], const char* data, int64_t first, int64_t rows, Lane lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = first + lane.g + 8 * half;
#pragma unroll
    for (int c = 0; c < 2; ++c)
      pieces[half][c] = row < rows ? load_piece<16>(data + (row * kWidth + 32 * c + 8 * lane.t) * 2) : Piece{};
  }
}

__device__ inline void left_of_pieces(uint32_t (&a)[4], const Piece (&pieces)[2][2], int k) {
  const int c = k / 2, s = 2 * (k % 2);
  a[0] = pieces[0][c].w[s];
  a[1] = pieces[1][c].w[s];
  a[2] = pieces[0][c].w[s + 1];
  a[3] = pieces[1][c].w[s + 1];
}

// Pieces to where their rows belong, from `column` on.
template <int stride>
__device__ inline void stage_pieces(bf16 (*x)[stride], const Piece (&pieces)[2][2], int column, Lane lane) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t(&w)[4] = pieces[i / 2][i % 2].w;
    bf16* at = &x[threadIdx.x / 32 * 16 + lane.g + i / 2 * 8][column + i % 2 * 32 + 8 * lane.t];
    *reinterpret_cast<uint4*>(at) = make_uint4(w[0], w[1], w[2], w[3]);
  }
}

// Four tiles of results, columns in the order of `entry`, to columns 32 c .. + 32 of a (rows, 64) bf16 matrix.
__device__ inline void write_pieces(char* data, const float (&sum)[4][4], int c, int64_t first, int64_t rows, Lane lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = first + lane.g + 8 * half;
    if (row >= rows) continue;
    float x[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = sum[i / 2][2 * half + i % 2];
    store<Bf16>(data + (row * kWidth + 32 * c + 8 * lane.t) * 2, x);
  }
}

__device__ inline float row_mean(const Tiles& x, int half) {
  float sum = 0;
#pragma unroll
  for (int n = 0; n < 8; ++n) sum += x[n][2 * half] + x[n][2 * half + 1];
  return quad_sum(sum) / kWidth;
}

// n of r, packed; and 1 / sqrt(var + eps) of the two rows.
__device__ inline void normalise(uint32_t (&normed)[4][4], float (&rstd)[2], const Tiles& r, float eps) {
  Tiles n;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float mean = row_mean(r, half);
    float squares = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int e = 2 * half; e < 2 * half + 2; ++e) {
        n[i][e] = r[i][e] - mean;
        squares = fmaf(n[i][e], n[i][e], squares);
      }
    rstd[half] = rsqrtf(quad_sum(squares) / kWidth + eps);
#pragma unroll
    for (int i = 0; i < 8; ++i) n[i][2 * half] *= rstd[half], n[i][2 * half + 1] *= rstd[half];
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) pack(normed[k], n[2 * k], n[2 * k + 1]);
}

// grad: d n -> d r, through the norm, and what comes past it.
__device__ inline void through_norm(Tiles& grad, const uint32_t (&normed)[4][4], const float (&rstd)[2],
                                    const float* past, int64_t first, int64_t rows, Lane lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = first + lane.g + 8 * half;
    const float mean = row_mean(grad, half);
    float product = 0;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const float2 x = Bf16::unpack(normed[n / 2][n % 2 * 2 + half]);
      product = fmaf(grad[n][2 * half], x.x, fmaf(grad[n][2 * half + 1], x.y, product));
    }
    product = quad_sum(product) / kWidth;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      float4 y = {};
      if (row < rows) y = __ldg(reinterpret_cast<const float4*>(past + row * kWidth + 16 * k + 4 * lane.t));
      const float2 x = Bf16::unpack(normed[k][half]), z = Bf16::unpack(normed[k][2 + half]);
      float *low = grad[2 * k] + 2 * half, *high = grad[2 * k + 1] + 2 * half;
      low[0] = fmaf(rstd[half], low[0] - mean - x.x * product, y.x);
      low[1] = fmaf(rstd[half], low[1] - mean - x.y * product, y.y);
      high[0] = fmaf(rstd[half], high[0] - mean - z.x * product, y.z);
      high[1] = fmaf(rstd[half], high[1] - mean - z.y * product, y.w);
    }
  }
}

// ---- launch ---------------------------------------------------------------------------------------------------------

template <class Kernel, class Call>
inline cudaError_t launch(Kernel kernel, int blocks, int warps, size_t bytes, const Call& p, cudaStream_t stream) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) return error;
  kernel<<<blocks, 32 * warps, bytes, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace sat
