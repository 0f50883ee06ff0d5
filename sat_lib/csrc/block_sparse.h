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

// Gradient of a small embedding table, in `parts` sums.
struct Embedding {
  const float* grad;  // (tokens, width)
  const int64_t* ids;
  float* partial;  // (parts, rows, width)
  int64_t tokens;
  int rows, width, parts;
};
cudaError_t embedding_gradient(const Embedding& embedding, cudaStream_t stream);

// What a layer of width 64 does before its attention; see before_attention.cu.
struct BeforeAttention {
  const float *x, *weight, *bias;  // (rows, 64), (192, 64), (192,)
  char* out[3];                    // q, k, v, (rows, 64) bf16
  int64_t rows;
  float eps;
  int parts;                // blocks of the backward pass, and a share of the forward's
  const char* grad_out[3];  // of q, k, v
  const float* grad_past;   // (rows, 64), what comes past the norm
  float* grad_x;
  float* partial;  // (parts, kBeforeAttentionWeights)
};
constexpr int kBeforeAttentionWeights = 192 * 64 + 192;
cudaError_t before_attention(const BeforeAttention& call, cudaStream_t stream);
cudaError_t before_attention_backward(const BeforeAttention& call, cudaStream_t stream);

// What a layer of width 64 and hidden size 128 does behind its attention; see after_attention.cu.
struct AfterAttention {
  const float* x;        // (rows, 64)
  const char* attended;  // (rows, 64) bf16
  const float *out_weight, *out_bias, *up_weight, *up_bias, *down_weight, *down_bias;
  const int64_t* seed;  // of the dropouts, one number
  float* y;             // (rows, 64)
  int64_t rows;
  uint32_t threshold;  // drop where 16 random bits are below it
  float scale, eps;
  int parts;  // multiprocessors
  const float* grad_y;
  float* grad_x;
  char* grad_attended;
  float* partial;  // (parts, kAfterAttentionWeights)
};
constexpr int kAfterAttentionWeights = 64 * 64 + 2 * 64 * 128 + 64 + 128 + 64;
cudaError_t after_attention(const AfterAttention& call, cudaStream_t stream);
cudaError_t after_attention_backward(const AfterAttention& call, cudaStream_t stream);

}  // namespace sat
