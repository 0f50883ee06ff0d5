// What the kernels and bindings.cpp agree on: parameter structs and launchers. No torch, no device code.
//
// Axes: B batch, H heads, L positions (Lq queries, Lk keys), d head size, b block side, R and C block rows and columns.
// Strides count bytes. A launcher puts its work on `stream` and returns the launch's error code.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace sat {

// How numbers are stored and multiplied. Fp32 multiplies as three TF32 products, which keeps float32's precision.
enum class Format { kBf16, kFp16, kTf32, kFp32 };

// A (B, H, L, d) tensor whose last axis is contiguous and whose rows start at multiples of 16 bytes.
struct View {
  char* data;
  int64_t batch, head, row;
};

// The kept blocks, by row and by column; `per_head` tells whether every head has lists of its own.
struct Layout {
  const int* row_offsets;
  const int* row_columns;
  const int* column_offsets;
  const int* column_rows;
  const int* column_to_row;
  int block, block_log2, rows, columns;
  int kept;  // blocks in the lists
  bool per_head;
};

struct Shape {
  int batch, heads, queries, keys, head_size;
};

constexpr int kNoWindow = 1 << 30;  // beyond any difference of positions

// Fused attention. The key mask is (B, Lk), 0 for padding; lse is (B, H, Lq) float32.
struct Attention {
  Format format;
  Shape shape;
  Layout layout;
  View q, k, v, out;
  float* lse;
  const uint8_t* key_mask;
  float scale;
  bool pruned_weigh;  // the "zero" rule: pruned keys stay in the denominator with raw score 0
  int window;         // see attention.cu; kNoWindow for none
  View grad_out, grad_q, grad_k, grad_v;
  float2* row_terms;  // backward's workspace, (B, H, R b): LSE in base 2 and delta of every query
};
cudaError_t attention_forward(const Attention& attention, cudaStream_t stream);
cudaError_t attention_backward(const Attention& attention, cudaStream_t stream);

// One of the three operations: values is (B, T, b, b), contiguous, T kept blocks over all heads.
struct Product {
  Format format;
  Shape shape;
  Layout layout;
  char* values;
  View left, right;  // sddmm: q, k; spmm: right is v, left the result; transposed: left is x, right the result
  const uint8_t* key_mask;
  float scale;
};
cudaError_t sddmm(const Product& product, cudaStream_t stream);
cudaError_t spmm(const Product& product, cudaStream_t stream);
cudaError_t spmm_transposed(const Product& product, cudaStream_t stream);

struct Softmax {
  Format format;
  Shape shape;
  Layout layout;
  const char* scores;  // backward: the gradient of the weights
  char* weights;
  char* grad_scores;  // backward only
  const uint8_t* key_mask;
  bool pruned_weigh;
};
cudaError_t sparse_softmax(const Softmax& softmax, cudaStream_t stream);
cudaError_t sparse_softmax_backward(const Softmax& softmax, cudaStream_t stream);

constexpr int kMapTile = 128;  // side of the piece of the map that one thread block sums up

// Means of the dense attention map over batch and heads.
struct Statistics {
  Format format;
  Shape shape;
  View q, k;
  float* lse;       // (B, H, Lq rounded up to kMapTile), workspace
  float* partial;   // (splits, Lq, Lk), workspace
  float* mean_map;  // (Lq, Lk)
  float* pooled;    // (R, C)
  const uint8_t* key_mask;
  float scale;
  int block, splits;
};
cudaError_t attention_statistics(const Statistics& statistics, cudaStream_t stream);

}  // namespace sat
