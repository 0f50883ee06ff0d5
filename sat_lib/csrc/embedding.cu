// Gradient of an embedding table of few rows: grad_table_v = sum of grad_i over the tokens i with id v.
//
// grad (T, W) float32, ids (T,) int64, partial (P, V, W) float32, which the caller adds up over P.
//
// Plan: a block is one warp with a table of its own in shared memory, V rows by 32 columns; it takes a share of the
// tokens in order, 32 at a time. A lane owns a column, so nothing is added atomically and the result is repeatable.
// The library's kernel sorts the tokens first, or adds atomically; with 256 rows for half a million tokens both wait.

#include "block_sparse.h"

namespace sat {
namespace {

constexpr int kColumns = 32;

__global__ void __launch_bounds__(32) gradient_kernel(const Embedding p) {
  extern __shared__ float table[];
  const int lane = threadIdx.x, column = blockIdx.y * kColumns + lane;
  const bool inside = column < p.width;
  for (int row = 0; row <= p.rows; ++row) table[row * kColumns + lane] = 0;  // the last for what is no token
  const int64_t share = (p.tokens + gridDim.x - 1) / gridDim.x;
  const int64_t begin = blockIdx.x * share, end = min(begin + share, p.tokens);
  const float* grad = p.grad + (inside ? column : 0);
  for (int64_t first = begin; first < end; first += 32) {
    const int64_t mine = first + lane;
    const int64_t id = mine < end ? __ldg(p.ids + mine) : -1;
    const int row = (id >= 0 && id < p.rows ? static_cast<int>(id) : p.rows) * kColumns;
    float values[32];
#pragma unroll
    for (int i = 0; i < 32; ++i) values[i] = first + i < end ? __ldg(grad + (first + i) * p.width) : 0;
#pragma unroll
    for (int i = 0; i < 32; ++i) table[__shfl_sync(0xffffffffu, row, i) + lane] += values[i];
  }
  if (!inside) return;
  float* out = p.partial + int64_t{blockIdx.x} * p.rows * p.width + column;
  for (int row = 0; row < p.rows; ++row) out[int64_t{row} * p.width] = table[row * kColumns + lane];
}

}  // namespace

cudaError_t embedding_gradient(const Embedding& p, cudaStream_t stream) {
  const int bytes = (p.rows + 1) * kColumns * static_cast<int>(sizeof(float));
  cudaError_t error = cudaFuncSetAttribute(gradient_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(gradient_kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (error != cudaSuccess) return error;
  gradient_kernel<<<dim3(p.parts, (p.width + kColumns - 1) / kColumns), 32, bytes, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace sat
