// Small matrices in one warp's registers: loads, products with mma.sync straight from global memory, stores.
//
// Operands need no shared memory, because a product doesn't care in which order its contraction index runs, nor a
// result in which order its columns stand. A lane (g = lane / 4, t = lane % 4) reads 16-byte pieces of row g; what
// the instruction takes for contraction index 2t, 2t+1, ... are simply the numbers of the piece. Both operands use the
// same order, so the sum is the same. A 16-byte piece feeds two instructions in every format:
//
//   16 bit   mma.m16n8k16, 8 numbers a piece         tf32   mma.m16n8k8, 4 numbers a piece
//
// Names: *rows* are operands read along the contraction (pieces of 16 bytes), *columns* are operands read across it
// (4 neighbours of each of the lane's 4, or in tf32 2, contraction rows). Scores come out of a product of rows with
// rows; turned into an operand in place they meet columns in the next product.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "block_sparse.h"

namespace sat {

// ---- lanes ----------------------------------------------------------------------------------------------------------

constexpr unsigned kAll = 0xffffffffu;

struct Lane {
  int g, t;
  __device__ Lane() : g(threadIdx.x % 32 / 4), t(threadIdx.x % 4) {}
};

struct Piece {
  uint32_t w[4];
};

// Over a quad, the lanes that share g and with it the rows of a result.
__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAll, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAll, x, 2));
}

__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(kAll, x, 1);
  return x + __shfl_xor_sync(kAll, x, 2);
}

// ---- number formats -------------------------------------------------------------------------------------------------

constexpr float kLog2e = 1.4426950408889634f;

// 2^x in one instruction, to 2^-22; exp2f would spend four on results below 2^-126.
__device__ inline float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

struct Bf16 {
  static constexpr int kBytes = 2;
  static __device__ uint32_t pack(float x, float y) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
    return reinterpret_cast<const uint32_t&>(pair);
  }
  static __device__ float2 unpack(uint32_t pair) {
    return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(pair));
  }
  static __device__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
};

struct Fp16 {
  static constexpr int kBytes = 2;
  static __device__ uint32_t pack(float x, float y) {
    const __half2 pair = __floats2half2_rn(x, y);
    return reinterpret_cast<const uint32_t&>(pair);
  }
  static __device__ float2 unpack(uint32_t pair) { return __half22float2(reinterpret_cast<const __half2&>(pair)); }
  static __device__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
};

__device__ inline uint32_t round_to_tf32(uint32_t x) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(x)));
  return rounded;
}

__device__ inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

struct Tf32 {
  static constexpr int kBytes = 4;
  static __device__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    const uint32_t rounded_a[4] = {round_to_tf32(a[0]), round_to_tf32(a[1]), round_to_tf32(a[2]), round_to_tf32(a[3])};
    const uint32_t rounded_b[2] = {round_to_tf32(b[0]), round_to_tf32(b[1])};
    mma_tf32(c, rounded_a, rounded_b);
  }
};

// x = high + low with both parts in TF32; (high + low)(high' + low') without low low' is within 2^-21 of the product.
struct Fp32 {
  static constexpr int kBytes = 4;
  template <int n>
  static __device__ void split(const uint32_t (&x)[n], uint32_t (&high)[n], uint32_t (&low)[n]) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      high[i] = round_to_tf32(x[i]);
      low[i] = round_to_tf32(__float_as_uint(__uint_as_float(x[i]) - __uint_as_float(high[i])));
    }
  }
  static __device__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    uint32_t high_a[4], low_a[4], high_b[2], low_b[2];
    split(a, high_a, low_a);
    split(b, high_b, low_b);
    float sum[4] = {};  // added up apart: the instruction cuts off where an addition rounds
    mma_tf32(sum, low_a, high_b);
    mma_tf32(sum, high_a, low_b);
    mma_tf32(sum, high_a, high_b);
#pragma unroll
    for (int i = 0; i < 4; ++i) c[i] += sum[i];
  }
};

// run(F{}) with the struct of that format.
template <class Run>
inline cudaError_t by_format(Format format, const Run& run) {
  switch (format) {
    case Format::kBf16: return run(Bf16{});
    case Format::kFp16: return run(Fp16{});
    case Format::kTf32: return run(Tf32{});
    case Format::kFp32: return run(Fp32{});
  }
  return cudaErrorInvalidValue;
}

template <class F>
constexpr bool kHalf = F::kBytes == 2;
template <class F>
constexpr int kTilesAStep = kHalf<F> ? 2 : 1;  // 8-wide score tiles that make one contraction step
template <class F>
constexpr int kLaneRows = kHalf<F> ? 4 : 2;  // contraction rows of a step that belong to one lane

// ---- memory ---------------------------------------------------------------------------------------------------------

template <int bytes>
__device__ inline Piece load_piece(const char* at) {
  Piece piece = {};
  if constexpr (bytes == 16) {
    const uint4 x = __ldg(reinterpret_cast<const uint4*>(at));
    piece = {x.x, x.y, x.z, x.w};
  } else if constexpr (bytes == 8) {
    const uint2 x = __ldg(reinterpret_cast<const uint2*>(at));
    piece.w[0] = x.x;
    piece.w[1] = x.y;
  } else {
    piece.w[0] = __ldg(reinterpret_cast<const uint32_t*>(at));
  }
  return piece;
}

// One head's (rows, width) matrix; what lies outside reads as 0 and is not written.
struct Matrix {
  char* data;
  unsigned stride;  // bytes from row to row; one head's rows lie within 4 GiB
  int rows;
  int width;  // bytes

  __device__ Matrix(const View& view, unsigned b, unsigned h, int rows, int width)
      : data(view.data + b * view.batch + h * view.head), stride(view.row), rows(rows), width(width) {}
  __device__ bool inside(int row, int byte) const { return row < rows && byte < width; }
  __device__ char* at(int row, int byte) const { return data + (row * stride + byte); }

  template <int bytes>
  __device__ Piece load(int row, int byte) const {
    return inside(row, byte) ? load_piece<bytes>(at(row, byte)) : Piece{};
  }
};

// The same for right operands: what lies outside reads as some number inside, which is cheaper. It meets a 0 of the left
// operand, ends in a column that isn't stored, or in a score that is then masked.
struct NearMatrix : Matrix {
  using Matrix::Matrix;
  template <int bytes>
  __device__ Piece load(int row, int byte) const {
    return load_piece<bytes>(at(min(row, rows - 1), byte < width ? byte : 0));
  }
};

// n neighbouring numbers in the format's storage, written past the caches' older content: nobody reads them soon.
template <class F, int n>
__device__ inline void store(char* at, const float (&x)[n]) {
  constexpr int words = n * F::kBytes / 4;
  uint32_t w[words];
#pragma unroll
  for (int i = 0; i < words; ++i) {
    if constexpr (kHalf<F>)
      w[i] = F::pack(x[2 * i], x[2 * i + 1]);
    else
      w[i] = __float_as_uint(x[i]);
  }
  if constexpr (words % 4 == 0) {
#pragma unroll
    for (int i = 0; i < words / 4; ++i)
      __stcs(reinterpret_cast<uint4*>(at) + i, make_uint4(w[4 * i], w[4 * i + 1], w[4 * i + 2], w[4 * i + 3]));
  } else {
    static_assert(words == 2);
    __stcs(reinterpret_cast<uint2*>(at), make_uint2(w[0], w[1]));
  }
}

// ---- operands -------------------------------------------------------------------------------------------------------

// 16 M rows of a matrix of up to 32 P numbers a row, as the left operand, or re-read (from L1) where registers are few.
template <class F, int P, int M, bool held>
struct Rows {
  static constexpr int kPieces = P * F::kBytes / 2;
  using Operands = uint32_t[2][4];  // of the two instructions that a piece feeds
  Matrix x;
  int first;  // this lane's first row
  Operands operands[held ? M : 1][held ? kPieces : 1];

  __device__ Rows(const Matrix& x, int first, Lane lane) : x(x), first(first + lane.g) {
    if constexpr (held) {
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int c = 0; c < kPieces; ++c) read(operands[m][c], m, c, lane);
    }
  }
  __device__ void read(Operands& a, int m, int c, Lane lane) const {
    const Piece low = x.template load<16>(first + 16 * m, 64 * c + 16 * lane.t);
    const Piece high = x.template load<16>(first + 16 * m + 8, 64 * c + 16 * lane.t);
#pragma unroll
    for (int s = 0; s < 2; ++s)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[s][i] = (i % 2 ? high : low).w[2 * s + i / 2];
        asm volatile("" : "+r"(a[s][i]));  // once in the instruction's order, stay there: don't copy at every use
      }
  }
  __device__ void get(Operands& a, int m, int c, Lane lane) const {
    if constexpr (held) {
#pragma unroll
      for (int s = 0; s < 2; ++s)
#pragma unroll
        for (int i = 0; i < 4; ++i) a[s][i] = operands[m][c][s][i];
    } else {
      read(a, m, c, lane);
    }
  }
};

// Which of the 8 N columns of a chunk of scores lane (., t) holds in tile j, first of two: 2 N neighbours a lane.
template <int N>
__device__ inline int held_column(int j, int t) {
  return 2 * N * t + 2 * j;
}

// The row of the right operand that lane (g, .) reads for tile j, so that scores land as `held_column` says.
template <int N>
__device__ inline int read_row(int j, int g) {
  return 2 * N * (g >> 1) + 2 * j + (g & 1);
}

// scores[m][j] += a times 8 rows of b, by one piece of both.
template <class F, int M, int N>
__device__ inline void multiply_piece(float (&scores)[M][N][4], int j, const uint32_t (&left)[M][2][4], const Piece& y) {
#pragma unroll
  for (int s = 0; s < 2; ++s)
#pragma unroll
    for (int m = 0; m < M; ++m) F::mma(scores[m][j], left[m][s], {y.w[2 * s], y.w[2 * s + 1]});
}

// scores[m][j] = rows of a (16 M) times rows first .. first + 8 N of b.
template <class F, int P, int M, int N, bool held>
__device__ inline void multiply_rows(float (&scores)[M][N][4], const Rows<F, P, M, held>& a, const NearMatrix& b,
                                     int first, Lane lane) {
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int j = 0; j < N; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[m][j][i] = 0;
#pragma unroll
  for (int c = 0; c < Rows<F, P, M, held>::kPieces; ++c) {
    uint32_t left[M][2][4];
#pragma unroll
    for (int m = 0; m < M; ++m) a.get(left[m], m, c, lane);
#pragma unroll
    for (int j = 0; j < N; ++j)
      multiply_piece<F, M, N>(scores, j, left,
                              b.template load<16>(first + read_row<N>(j, lane.g), 64 * c + 16 * lane.t));
  }
}

// `wide` neighbours of each of the lane's contraction rows of one step.
template <class F, int wide>
struct Columns {
  Piece rows[kLaneRows<F>];

  template <class X>
  __device__ void load(const X& x, int first, int byte) {
#pragma unroll
    for (int i = 0; i < kLaneRows<F>; ++i) rows[i] = x.template load<wide * F::kBytes>(first + i, byte);
  }
  // The operand register of neighbour v: contraction rows 0, 1 or 2, 3 (in tf32 row 0 or 1).
  __device__ uint32_t get(int v, int half) const {
    if constexpr (kHalf<F>)
      return __byte_perm(rows[2 * half].w[v >> 1], rows[2 * half + 1].w[v >> 1], v & 1 ? 0x7632 : 0x5410);
    else
      return rows[half].w[v];
  }
};

// Sums of 16 M rows by 32 P columns. A lane holds of rows g and g + 8 (of tile m) columns 32 p + 8 t .. + 8.
template <int M, int P>
using Sums = float[M][P][4][4];

template <int M, int P>
__device__ inline void clear(Sums<M, P>& sums) {
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int p = 0; p < P; ++p)
#pragma unroll
      for (int v = 0; v < 4; ++v)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[m][p][v][i] = 0;
}

// sums += a times these columns, 32 of them: one contraction step.
template <class F, int M, int P>
__device__ inline void multiply_panel(Sums<M, P>& sums, int p, const uint32_t (&a)[M][4], const Columns<F, 4>& columns) {
#pragma unroll
  for (int v = 0; v < 4; ++v)
#pragma unroll
    for (int m = 0; m < M; ++m) F::mma(sums[m][p][v], a[m], {columns.get(v, 0), columns.get(v, 1)});
}

// sums += a times rows first .. first + kLaneRows (this lane's) of x: one contraction step.
template <class F, int M, int P, class X>
__device__ inline void multiply_columns(Sums<M, P>& sums, const uint32_t (&a)[M][4], const X& x, int first,
                                        Lane lane) {
#pragma unroll
  for (int p = 0; p < P; ++p) {
    Columns<F, 4> columns;
    columns.load(x, first, (32 * p + 4 * lane.g) * F::kBytes);
    multiply_panel<F, M, P>(sums, p, a, columns);
  }
}

// The rows first .. first + 8 N of x that a chunk of scores is multiplied with. `load` them before the scores are known,
// so that both operands are on their way at once; with `early` false they are read at their use, to save registers.
template <class F, int P, int N, bool early>
struct Chunk {
  static constexpr int kSteps = N / kTilesAStep<F>;
  const NearMatrix& x;
  const int first;  // this lane's first row
  Columns<F, 4> columns[early ? kSteps : 1][early ? P : 1];

  __device__ Chunk(const NearMatrix& x, int first, Lane lane) : x(x), first(first + 2 * N * lane.t) {
    if constexpr (early) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step)
#pragma unroll
        for (int p = 0; p < P; ++p) read(columns[step][p], step, p, lane);
    }
  }
  __device__ void read(Columns<F, 4>& to, int step, int p, Lane lane) const {
    to.load(x, first + kLaneRows<F> * step, (32 * p + 4 * lane.g) * F::kBytes);
  }
  __device__ Columns<F, 4> get(int step, int p, Lane lane) const {
    if constexpr (early) return columns[step][p];
    Columns<F, 4> now;
    read(now, step, p, lane);
    return now;
  }
};

// sums += scores (as they came out of multiply_rows) times the chunk's rows.
template <class F, int M, int N, int P, bool early>
__device__ inline void multiply_scores(Sums<M, P>& sums, const float (&scores)[M][N][4],
                                       const Chunk<F, P, N, early>& chunk, Lane lane) {
#pragma unroll
  for (int step = 0; step < Chunk<F, P, N, early>::kSteps; ++step) {
    uint32_t a[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) {
      if constexpr (kHalf<F>) {
        const float(&s)[N][4] = scores[m];
        a[m][0] = F::pack(s[2 * step][0], s[2 * step][1]);
        a[m][1] = F::pack(s[2 * step][2], s[2 * step][3]);
        a[m][2] = F::pack(s[2 * step + 1][0], s[2 * step + 1][1]);
        a[m][3] = F::pack(s[2 * step + 1][2], s[2 * step + 1][3]);
      } else {
        const float(&s)[4] = scores[m][step];
        a[m][0] = __float_as_uint(s[0]);
        a[m][1] = __float_as_uint(s[2]);
        a[m][2] = __float_as_uint(s[1]);
        a[m][3] = __float_as_uint(s[3]);
      }
    }
#pragma unroll
    for (int p = 0; p < P; ++p) multiply_panel<F, M, P>(sums, p, a, chunk.get(step, p, lane));
  }
}

// One row of the sums, times `factor`: 8 numbers a lane and 32 columns.
template <class F, int M, int P>
__device__ inline void store_sums(const Matrix& out, int row, const Sums<M, P>& sums, int m, int half, float factor,
                                  Lane lane) {
#pragma unroll
  for (int p = 0; p < P; ++p) {
    const int byte = (32 * p + 8 * lane.t) * F::kBytes;
    float x[8];
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      x[v] = factor == 0 ? 0 : sums[m][p][v][2 * half] * factor;
      x[4 + v] = factor == 0 ? 0 : sums[m][p][v][2 * half + 1] * factor;
    }
    if (out.inside(row, byte)) store<F>(out.at(row, byte), x);
  }
}

}  // namespace sat
