// The only file that meets torch: takes tensors apart, allocates results, picks device and stream, reports errors.
// sat_lib/attention/ops.py and sat_lib/model/fused.py have checked the arguments and register these functions' CPU
// forms, fake kernels and gradients.

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <tuple>

#include "block_sparse.h"

namespace {

using at::Tensor;
using Mask = std::optional<Tensor>;

sat::Format format_of(const Tensor& x, bool tf32) {
  switch (x.scalar_type()) {
    case at::kBFloat16: return sat::Format::kBf16;
    case at::kHalf: return sat::Format::kFp16;
    case at::kFloat: return tf32 ? sat::Format::kTf32 : sat::Format::kFp32;
    default: TORCH_CHECK(false, "dtype: wanted bfloat16, float16 or float32; got ", x.scalar_type());
  }
}

// The tensor itself if the kernels can read it: last axis contiguous, every row at a multiple of 16 bytes.
Tensor readable(const Tensor& x) {
  bool fits = x.stride(3) == 1 && reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0;
  fits = fits && x.size(2) * x.stride(2) * x.element_size() < (int64_t{1} << 32);  // one head's offsets are 32 bit
  for (int axis = 0; axis < 3; ++axis)
    fits = fits && (x.size(axis) == 1 || x.stride(axis) * x.element_size() % 16 == 0);
  return fits ? x : x.clone(at::MemoryFormat::Contiguous);
}

// A result with x's order of axes, so that a view of (B, L, H, d) stays one.
Tensor like(const Tensor& x) {
  Tensor result = at::empty_like(x);
  return result.stride(3) == 1 ? result : at::empty_like(x, at::MemoryFormat::Contiguous);
}

sat::View view(const Tensor& x) {
  const int64_t size = x.element_size();
  return {static_cast<char*>(x.data_ptr()), x.stride(0) * size, x.stride(1) * size, x.stride(2) * size};
}

sat::Shape shape_of(const Tensor& q, const Tensor& k) {
  return {static_cast<int>(q.size(0)), static_cast<int>(q.size(1)), static_cast<int>(q.size(2)),
          static_cast<int>(k.size(2)), static_cast<int>(k.size(3))};
}

// `lists`: row_offsets, row_columns, column_offsets, column_rows, column_to_row of a layout, int32.
sat::Layout layout_of(at::TensorList lists, int64_t block, int64_t keys) {
  TORCH_CHECK(lists.size() == 5, "layout: wanted 5 lists; got ", lists.size());
  sat::Layout layout = {};
  layout.row_offsets = lists[0].data_ptr<int>();
  layout.row_columns = lists[1].data_ptr<int>();
  layout.column_offsets = lists[2].data_ptr<int>();
  layout.column_rows = lists[3].data_ptr<int>();
  layout.column_to_row = lists[4].data_ptr<int>();
  layout.block = static_cast<int>(block);
  for (int side = layout.block; side > 1; side /= 2) ++layout.block_log2;
  layout.columns = static_cast<int>((keys + block - 1) / block);
  const int64_t patterns = (lists[2].numel() - 1) / layout.columns;
  layout.rows = static_cast<int>((lists[0].numel() - 1) / patterns);
  layout.kept = static_cast<int>(lists[1].numel());
  layout.per_head = patterns > 1;
  return layout;
}

int64_t all_blocks(const sat::Layout& layout, int64_t heads) {
  return layout.per_head ? layout.kept : layout.kept * heads;
}

const uint8_t* mask_of(const Mask& mask) {
  return mask ? reinterpret_cast<const uint8_t*>(mask->const_data_ptr<bool>()) : nullptr;
}

Mask contiguous(const Mask& mask) { return mask ? Mask(mask->contiguous()) : mask; }

cudaStream_t stream() { return c10::cuda::getCurrentCUDAStream(); }

std::tuple<Tensor, Tensor> attention(const Tensor& q0, const Tensor& k0, const Tensor& v0, at::TensorList lists,
                                     const Mask& mask0, int64_t block, double scale, bool pruned_weigh,
                                     std::optional<int64_t> window, bool tf32) {
  const c10::cuda::CUDAGuard guard(q0.device());
  const Tensor q = readable(q0), k = readable(k0), v = readable(v0);
  const Mask mask = contiguous(mask0);
  Tensor out = like(q0), lse = at::empty({q.size(0), q.size(1), q.size(2)}, q.options().dtype(at::kFloat));
  sat::Attention call = {format_of(q, tf32), shape_of(q, k), layout_of(lists, block, k.size(2))};
  call.q = view(q), call.k = view(k), call.v = view(v), call.out = view(out);
  call.lse = lse.data_ptr<float>();
  call.key_mask = mask_of(mask);
  call.scale = static_cast<float>(scale);
  call.pruned_weigh = pruned_weigh;
  call.window = static_cast<int>(window.value_or(sat::kNoWindow));
  C10_CUDA_CHECK(sat::attention_forward(call, stream()));
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& grad0, const Tensor& q0, const Tensor& k0,
                                                      const Tensor& v0, const Tensor& out0, const Tensor& lse,
                                                      at::TensorList lists, const Mask& mask0, int64_t block,
                                                      double scale, std::optional<int64_t> window, bool tf32) {
  const c10::cuda::CUDAGuard guard(q0.device());
  const Tensor q = readable(q0), k = readable(k0), v = readable(v0), out = readable(out0), grad = readable(grad0);
  const Mask mask = contiguous(mask0);
  Tensor grad_q = like(q0), grad_k = like(k0), grad_v = like(v0);
  sat::Attention call = {format_of(q, tf32), shape_of(q, k), layout_of(lists, block, k.size(2))};
  call.q = view(q), call.k = view(k), call.v = view(v), call.out = view(out);
  call.grad_out = view(grad), call.grad_q = view(grad_q), call.grad_k = view(grad_k), call.grad_v = view(grad_v);
  const int64_t rows = int64_t{call.layout.rows} * block;
  Tensor row_terms = at::empty({q.size(0), q.size(1), rows, 2}, lse.options());
  call.row_terms = reinterpret_cast<float2*>(row_terms.data_ptr<float>());
  call.lse = lse.data_ptr<float>();
  call.key_mask = mask_of(mask);
  call.scale = static_cast<float>(scale);
  call.window = static_cast<int>(window.value_or(sat::kNoWindow));
  C10_CUDA_CHECK(sat::attention_backward(call, stream()));
  return {grad_q, grad_k, grad_v};
}

Tensor sddmm(const Tensor& q0, const Tensor& k0, at::TensorList lists, const Mask& mask0, int64_t block, double scale,
             bool tf32) {
  const c10::cuda::CUDAGuard guard(q0.device());
  const Tensor q = readable(q0), k = readable(k0);
  const Mask mask = contiguous(mask0);
  sat::Product call = {format_of(q, tf32), shape_of(q, k), layout_of(lists, block, k.size(2))};
  Tensor values = at::empty({q.size(0), all_blocks(call.layout, q.size(1)), block, block}, q.options());
  call.values = static_cast<char*>(values.data_ptr());
  call.left = view(q), call.right = view(k);
  call.key_mask = mask_of(mask);
  call.scale = static_cast<float>(scale);
  C10_CUDA_CHECK(sat::sddmm(call, stream()));
  return values;
}

Tensor spmm_either(bool transposed, const Tensor& values0, const Tensor& x0, at::TensorList lists, const Mask& mask0,
                   int64_t block, int64_t length, double scale, bool tf32) {
  const c10::cuda::CUDAGuard guard(x0.device());
  const Tensor values = values0.contiguous(), x = readable(x0);
  const Mask mask = contiguous(mask0);
  Tensor out = at::empty({x.size(0), x.size(1), length, x.size(3)}, x.options());
  const Tensor &queries = transposed ? x : out, &keys = transposed ? out : x;
  sat::Product call = {format_of(x, tf32), shape_of(queries, keys), layout_of(lists, block, keys.size(2))};
  call.values = static_cast<char*>(values.data_ptr());
  call.left = view(queries), call.right = view(keys);
  call.key_mask = mask_of(mask);
  call.scale = static_cast<float>(scale);
  C10_CUDA_CHECK(transposed ? sat::spmm_transposed(call, stream()) : sat::spmm(call, stream()));
  return out;
}

Tensor spmm(const Tensor& values, const Tensor& x, at::TensorList lists, const Mask& mask, int64_t block,
            int64_t queries, double scale, bool tf32) {
  return spmm_either(false, values, x, lists, mask, block, queries, scale, tf32);
}

Tensor spmm_transposed(const Tensor& values, const Tensor& x, at::TensorList lists, const Mask& mask, int64_t block,
                       int64_t keys, double scale, bool tf32) {
  return spmm_either(true, values, x, lists, mask, block, keys, scale, tf32);
}

sat::Softmax softmax_call(const Tensor& scores, const Tensor& weights, at::TensorList lists, int64_t block,
                          int64_t heads, int64_t keys) {
  sat::Softmax call = {format_of(scores, false)};
  call.shape = {static_cast<int>(scores.size(0)), static_cast<int>(heads), 0, static_cast<int>(keys), 0};
  call.layout = layout_of(lists, block, keys);
  call.scores = static_cast<const char*>(scores.data_ptr());
  call.weights = static_cast<char*>(weights.data_ptr());
  return call;
}

Tensor sparse_softmax(const Tensor& scores0, at::TensorList lists, const Mask& mask0, int64_t block, int64_t heads,
                      int64_t keys, bool pruned_weigh) {
  const c10::cuda::CUDAGuard guard(scores0.device());
  const Tensor scores = scores0.contiguous();
  const Mask mask = contiguous(mask0);
  Tensor weights = at::empty_like(scores);
  sat::Softmax call = softmax_call(scores, weights, lists, block, heads, keys);
  call.key_mask = mask_of(mask);
  call.pruned_weigh = pruned_weigh;
  C10_CUDA_CHECK(sat::sparse_softmax(call, stream()));
  return weights;
}

Tensor sparse_softmax_backward(const Tensor& grad0, const Tensor& weights0, at::TensorList lists, int64_t block,
                               int64_t heads, int64_t keys) {
  const c10::cuda::CUDAGuard guard(grad0.device());
  const Tensor grad = grad0.contiguous(), weights = weights0.contiguous();
  Tensor grad_scores = at::empty_like(grad);
  sat::Softmax call = softmax_call(grad, weights, lists, block, heads, keys);
  call.grad_scores = static_cast<char*>(grad_scores.data_ptr());
  C10_CUDA_CHECK(sat::sparse_softmax_backward(call, stream()));
  return grad_scores;
}

int processors() {
  int device = 0, count = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

// Shares of the heads, so that four thread blocks a multiprocessor are under way.
int splits_of(const sat::Shape& shape) {
  const int64_t pieces = ((shape.queries + sat::kMapTile - 1) / sat::kMapTile) *
                         ((shape.keys + sat::kMapTile - 1) / sat::kMapTile);
  const int64_t wanted = std::max<int64_t>(1, 4 * processors() / pieces);
  return static_cast<int>(std::min<int64_t>(wanted, int64_t{shape.batch} * shape.heads));
}

std::tuple<Tensor, Tensor> attention_statistics(const Tensor& q0, const Tensor& k0, const Mask& mask0, int64_t block,
                                                double scale, bool tf32) {
  const c10::cuda::CUDAGuard guard(q0.device());
  const Tensor q = readable(q0), k = readable(k0);
  const Mask mask = contiguous(mask0);
  sat::Statistics call = {format_of(q, tf32), shape_of(q, k), view(q), view(k)};
  call.splits = splits_of(call.shape);
  const auto wide = q.options().dtype(at::kFloat);
  const int64_t queries = q.size(2), keys = k.size(2);
  const int64_t padded = (queries + sat::kMapTile - 1) / sat::kMapTile * sat::kMapTile;
  Tensor lse = at::empty({q.size(0), q.size(1), padded}, wide), partial = at::empty({call.splits, queries, keys}, wide);
  Tensor mean_map = at::empty({queries, keys}, wide);
  Tensor pooled = at::empty({(queries + block - 1) / block, (keys + block - 1) / block}, wide);
  call.lse = lse.data_ptr<float>(), call.partial = partial.data_ptr<float>();
  call.mean_map = mean_map.data_ptr<float>(), call.pooled = pooled.data_ptr<float>();
  call.key_mask = mask_of(mask);
  call.scale = static_cast<float>(scale);
  call.block = static_cast<int>(block);
  C10_CUDA_CHECK(sat::attention_statistics(call, stream()));
  return {mean_map, pooled};
}

Tensor embedding_gradient(const Tensor& grad0, const Tensor& ids0, int64_t rows) {
  const c10::cuda::CUDAGuard guard(grad0.device());
  const Tensor grad = grad0.contiguous(), ids = ids0.contiguous();
  const int64_t width = grad.size(-1), table = (rows + 1) * 32 * 4;  // bytes of shared memory of one share
  const int64_t fitting = std::clamp<int64_t>((int64_t{220} << 10) / (table + 1024), 1, 16);
  const int64_t groups = (width + 31) / 32, parts = std::max<int64_t>(1, processors() * fitting / groups);
  Tensor partial = at::empty({parts, rows, width}, grad.options());
  const sat::Embedding call = {grad.data_ptr<float>(), ids.data_ptr<int64_t>(), partial.data_ptr<float>(), ids.numel(),
                               static_cast<int>(rows), static_cast<int>(width), static_cast<int>(parts)};
  C10_CUDA_CHECK(sat::embedding_gradient(call, stream()));
  return partial.sum(0);
}

void check(const char* name, const Tensor& x, at::ScalarType dtype, int64_t numbers) {
  TORCH_CHECK(x.scalar_type() == dtype && x.numel() == numbers, name, ": wanted ", numbers, " numbers in ", dtype,
              "; got ", x.sizes(), " ", x.scalar_type());
}

sat::BeforeAttention before_attention_call(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps) {
  TORCH_CHECK(x.size(-1) == 64, "x: wanted (..., 64); got ", x.sizes());
  check("weight", weight, at::kFloat, 192 * 64);
  check("bias", bias, at::kFloat, 192);
  sat::BeforeAttention call = {x.data_ptr<float>(), weight.data_ptr<float>(), bias.data_ptr<float>()};
  call.rows = x.numel() / 64;
  call.eps = static_cast<float>(eps);
  call.parts = 2 * processors();
  return call;
}

std::tuple<Tensor, Tensor, Tensor> before_attention(const Tensor& x0, const Tensor& weight0, const Tensor& bias0,
                                                    double eps) {
  const c10::cuda::CUDAGuard guard(x0.device());
  const Tensor x = x0.contiguous(), weight = weight0.contiguous(), bias = bias0.contiguous();
  sat::BeforeAttention call = before_attention_call(x, weight, bias, eps);
  std::array<Tensor, 3> out;
  for (int i = 0; i < 3; ++i) {
    out[i] = at::empty_like(x, x.options().dtype(at::kBFloat16));
    call.out[i] = static_cast<char*>(out[i].data_ptr());
  }
  C10_CUDA_CHECK(sat::before_attention(call, stream()));
  return {out[0], out[1], out[2]};
}

std::tuple<Tensor, Tensor> before_attention_backward(const Tensor& grad_q, const Tensor& grad_k, const Tensor& grad_v,
                                                     const Tensor& past0, const Tensor& x0, const Tensor& weight0,
                                                     const Tensor& bias0, double eps) {
  const c10::cuda::CUDAGuard guard(x0.device());
  const Tensor past = past0.contiguous(), x = x0.contiguous(), weight = weight0.contiguous(), bias = bias0.contiguous();
  sat::BeforeAttention call = before_attention_call(x, weight, bias, eps);
  const std::array<Tensor, 3> grads = {grad_q.contiguous(), grad_k.contiguous(), grad_v.contiguous()};
  check("grad_past", past, at::kFloat, x.numel());
  for (int i = 0; i < 3; ++i) {
    check("gradients of q, k, v", grads[i], at::kBFloat16, x.numel());
    call.grad_out[i] = static_cast<const char*>(grads[i].data_ptr());
  }
  Tensor grad_x = at::empty_like(x), partial = at::empty({call.parts, sat::kBeforeAttentionWeights}, x.options());
  call.grad_past = past.data_ptr<float>();
  call.grad_x = grad_x.data_ptr<float>();
  call.partial = partial.data_ptr<float>();
  C10_CUDA_CHECK(sat::before_attention_backward(call, stream()));
  return {grad_x, partial.sum(0)};
}

sat::AfterAttention after_attention_call(const Tensor& x, const Tensor& attended, const std::array<Tensor, 6>& weights,
                                         const Mask& seed, double dropout, double eps) {
  TORCH_CHECK(x.size(-1) == 64, "x: wanted (..., 64); got ", x.sizes());
  check("attended", attended, at::kBFloat16, x.numel());
  constexpr int64_t kNumbers[6] = {64 * 64, 64, 128 * 64, 128, 64 * 128, 64};
  for (int i = 0; i < 6; ++i) check("weights", weights[i], at::kFloat, kNumbers[i]);
  if (seed.has_value()) check("seed", *seed, at::kLong, 1);
  sat::AfterAttention call = {x.data_ptr<float>(), static_cast<const char*>(attended.data_ptr())};
  call.out_weight = weights[0].data_ptr<float>(), call.out_bias = weights[1].data_ptr<float>();
  call.up_weight = weights[2].data_ptr<float>(), call.up_bias = weights[3].data_ptr<float>();
  call.down_weight = weights[4].data_ptr<float>(), call.down_bias = weights[5].data_ptr<float>();
  call.rows = x.numel() / 64;
  call.threshold = seed.has_value() ? static_cast<uint32_t>(dropout * 65536 + 0.5) : 0;
  call.seed = seed.has_value() ? seed->data_ptr<int64_t>() : nullptr;
  call.scale = 65536.0f / (65536.0f - static_cast<float>(call.threshold));
  call.eps = static_cast<float>(eps);
  call.parts = processors();
  return call;
}

Tensor after_attention(const Tensor& x0, const Tensor& attended0, const Tensor& out_weight, const Tensor& out_bias,
                       const Tensor& up_weight, const Tensor& up_bias, const Tensor& down_weight,
                       const Tensor& down_bias, const Mask& seed, double dropout, double eps) {
  const c10::cuda::CUDAGuard guard(x0.device());
  const Tensor x = x0.contiguous(), attended = attended0.contiguous();
  const std::array<Tensor, 6> weights = {out_weight.contiguous(), out_bias.contiguous(),  up_weight.contiguous(),
                                         up_bias.contiguous(),    down_weight.contiguous(), down_bias.contiguous()};
  sat::AfterAttention call = after_attention_call(x, attended, weights, seed, dropout, eps);
  Tensor y = at::empty_like(x);
  call.y = y.data_ptr<float>();
  C10_CUDA_CHECK(sat::after_attention(call, stream()));
  return y;
}

std::tuple<Tensor, Tensor, Tensor> after_attention_backward(
    const Tensor& grad0, const Tensor& x0, const Tensor& attended0, const Tensor& out_weight, const Tensor& out_bias,
    const Tensor& up_weight, const Tensor& up_bias, const Tensor& down_weight, const Tensor& down_bias,
    const Mask& seed, double dropout, double eps) {
  const c10::cuda::CUDAGuard guard(x0.device());
  const Tensor grad = grad0.contiguous(), x = x0.contiguous(), attended = attended0.contiguous();
  const std::array<Tensor, 6> weights = {out_weight.contiguous(), out_bias.contiguous(),  up_weight.contiguous(),
                                         up_bias.contiguous(),    down_weight.contiguous(), down_bias.contiguous()};
  sat::AfterAttention call = after_attention_call(x, attended, weights, seed, dropout, eps);
  check("grad", grad, at::kFloat, x.numel());
  Tensor grad_x = at::empty_like(x), grad_attended = at::empty_like(attended);
  Tensor partial = at::empty({call.parts, sat::kAfterAttentionWeights}, x.options());
  call.grad_y = grad.data_ptr<float>(), call.grad_x = grad_x.data_ptr<float>();
  call.grad_attended = static_cast<char*>(grad_attended.data_ptr());
  call.partial = partial.data_ptr<float>();
  C10_CUDA_CHECK(sat::after_attention_backward(call, stream()));
  return {grad_x, grad_attended, partial.sum(0)};
}

}  // namespace

TORCH_LIBRARY(sat_lib_cuda, library) {
  library.def("attention", &attention);
  library.def("attention_backward", &attention_backward);
  library.def("sddmm", &sddmm);
  library.def("spmm", &spmm);
  library.def("spmm_transposed", &spmm_transposed);
  library.def("sparse_softmax", &sparse_softmax);
  library.def("sparse_softmax_backward", &sparse_softmax_backward);
  library.def("attention_statistics", &attention_statistics);
  library.def("embedding_gradient", &embedding_gradient);
  library.def("before_attention", &before_attention);
  library.def("before_attention_backward", &before_attention_backward);
  library.def("after_attention", &after_attention);
  library.def("after_attention_backward", &after_attention_backward);
}
