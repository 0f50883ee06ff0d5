// The only file that meets torch: takes tensors apart, allocates results, picks device and stream, reports errors.
// sat_lib/ops.py has checked the arguments and registers these functions' autograd, fake and CPU counterparts.

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <array>
#include <tuple>

#include "block_sparse.h"

namespace {

using at::Tensor;
using Mask = std::optional<Tensor>;
using Lists = std::array<Tensor, 5>;  // row_offsets, row_columns, column_offsets, column_rows, column_to_row of a layout

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

sat::Layout layout_of(const Lists& lists, int64_t block, int64_t keys) {
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

std::tuple<Tensor, Tensor> attention(const Tensor& q0, const Tensor& k0, const Tensor& v0, const Tensor& row_offsets,
                                     const Tensor& row_columns, const Tensor& column_offsets, const Tensor& column_rows,
                                     const Tensor& column_to_row, const Mask& mask0, int64_t block, double scale,
                                     bool pruned_weigh, std::optional<int64_t> window, bool tf32) {
  const Lists lists = {row_offsets, row_columns, column_offsets, column_rows, column_to_row};
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
                                                      const Tensor& row_offsets, const Tensor& row_columns,
                                                      const Tensor& column_offsets, const Tensor& column_rows,
                                                      const Tensor& column_to_row, const Mask& mask0, int64_t block,
                                                      double scale, std::optional<int64_t> window, bool tf32) {
  const Lists lists = {row_offsets, row_columns, column_offsets, column_rows, column_to_row};
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

Tensor sddmm(const Tensor& q0, const Tensor& k0, const Tensor& row_offsets, const Tensor& row_columns,
             const Tensor& column_offsets, const Tensor& column_rows, const Tensor& column_to_row, const Mask& mask0,
             int64_t block, double scale, bool tf32) {
  const Lists lists = {row_offsets, row_columns, column_offsets, column_rows, column_to_row};
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

Tensor spmm_either(bool transposed, const Tensor& values0, const Tensor& x0, const Lists& lists, const Mask& mask0,
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

Tensor spmm(const Tensor& values, const Tensor& x, const Tensor& row_offsets, const Tensor& row_columns,
            const Tensor& column_offsets, const Tensor& column_rows, const Tensor& column_to_row, const Mask& mask,
            int64_t block, int64_t queries, double scale, bool tf32) {
  const Lists lists = {row_offsets, row_columns, column_offsets, column_rows, column_to_row};
  return spmm_either(false, values, x, lists, mask, block, queries, scale, tf32);
}

Tensor spmm_transposed(const Tensor& values, const Tensor& x, const Tensor& row_offsets, const Tensor& row_columns,
                       const Tensor& column_offsets, const Tensor& column_rows, const Tensor& column_to_row,
                       const Mask& mask, int64_t block, int64_t keys, double scale, bool tf32) {
  const Lists lists = {row_offsets, row_columns, column_offsets, column_rows, column_to_row};
  return spmm_either(true, values, x, lists, mask, block, keys, scale, tf32);
}

sat::Softmax softmax_call(const Tensor& scores, const Tensor& weights, const Lists& lists, int64_t block,
                          int64_t heads, int64_t keys) {
  sat::Softmax call = {format_of(scores, false)};
  call.shape = {static_cast<int>(scores.size(0)), static_cast<int>(heads), 0, static_cast<int>(keys), 0};
  call.layout = layout_of(lists, block, keys);
  call.scores = static_cast<const char*>(scores.data_ptr());
  call.weights = static_cast<char*>(weights.data_ptr());
  return call;
}

Tensor sparse_softmax(const Tensor& scores0, const Tensor& row_offsets, const Tensor& row_columns,
                      const Tensor& column_offsets, const Tensor& column_rows, const Tensor& column_to_row,
                      const Mask& mask0, int64_t block, int64_t heads, int64_t keys, bool pruned_weigh) {
  const Lists lists = {row_offsets, row_columns, column_offsets, column_rows, column_to_row};
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

Tensor sparse_softmax_backward(const Tensor& grad0, const Tensor& weights0, const Tensor& row_offsets,
                               const Tensor& row_columns, const Tensor& column_offsets, const Tensor& column_rows,
                               const Tensor& column_to_row, int64_t block, int64_t heads, int64_t keys) {
  const Lists lists = {row_offsets, row_columns, column_offsets, column_rows, column_to_row};
  const c10::cuda::CUDAGuard guard(grad0.device());
  const Tensor grad = grad0.contiguous(), weights = weights0.contiguous();
  Tensor grad_scores = at::empty_like(grad);
  sat::Softmax call = softmax_call(grad, weights, lists, block, heads, keys);
  call.grad_scores = static_cast<char*>(grad_scores.data_ptr());
  C10_CUDA_CHECK(sat::sparse_softmax_backward(call, stream()));
  return grad_scores;
}

// Shares of the heads, so that four thread blocks a multiprocessor are under way.
int splits_of(const sat::Shape& shape) {
  int device = 0, processors = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  const int64_t pieces = ((shape.queries + sat::kMapTile - 1) / sat::kMapTile) *
                         ((shape.keys + sat::kMapTile - 1) / sat::kMapTile);
  const int64_t wanted = std::max<int64_t>(1, 4 * processors / pieces);
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
}
