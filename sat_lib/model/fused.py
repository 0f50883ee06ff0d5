"""What a training step spends its time on beside attention, made fast: own kernels, or a few lines for torch.compile.

    embed            token and position embeddings, dropout, compiled; `embedding`'s gradient has a kernel of its own
    before_attention norm, and the projections to queries, keys and values: one kernel each way
    after_attention  output projection, residual, norm, feed-forward block, residual: one kernel each way
    masked_mean      norm, mask and mean over the positions, compiled

`fuse` puts them in the place of `encoder.PLAIN`. On a CPU PyTorch's own operations do the kernels' work. CUDA graphs
take them. See csrc/embedding.cu, before_attention.cu and after_attention.cu.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.ops import IMPLEMENTATION
from ..attention.registration import gradient, library, operator
from ..common.errors import require
from .encoder import Encoder, Layer, LayerResult, Parts, SelfAttention

WIDTH, HIDDEN = 64, 128  # the sizes of all published models, which the kernel is written for
MOST_ROWS = 1_700  # of a table that fits into a thread block's shared memory
WAY_OUT = "Take the plain step"
MOST_SHAPES = 64  # that a process compiles a function for
CAPABILITY = (9, 0)  # 190 KB of shared memory in one thread block


# ---- the model -------------------------------------------------------------------------------------------------------


def fuse(model: Encoder, *, compiled: bool) -> None:
    """Let a model compute with these operators from now on, under bfloat16 autocast.

    The parameters stay what they are. Results differ by rounding, and by the masks that dropout draws.

    Args:
        compiled: whether what is left to PyTorch goes through torch.compile in training.

    Raises:
        InputError: the operators aren't made for this model or device.
    """
    config, device = model.config, model.token.weight.device
    require(IMPLEMENTATION == "kernels", f"SAT_LIB_IMPLEMENTATION: {IMPLEMENTATION!r} has no fused layers")
    width, hidden, rows = config.width, config.hidden, config.vocab
    require(
        (width, hidden) == (WIDTH, HIDDEN),
        f"width, hidden: the fused layer is for {WIDTH} and {HIDDEN}; got {width} and {hidden}. {WAY_OUT}",
    )
    require(rows <= MOST_ROWS, f"vocab: the fused step takes up to {MOST_ROWS} tokens; got {rows}. {WAY_OUT}")
    if device.type == "cuda":
        there = torch.cuda.get_device_capability(device)
        require(
            there >= CAPABILITY,
            f"device: the fused layer wants compute capability {CAPABILITY} or later (H100); got {there}. {WAY_OUT}",
        )
    for layer in model.layers:
        plain = type(layer.attention) is SelfAttention and layer.attention.global_projections is None
        require(plain, "attention: the fused layer is for SelfAttention without a global token's own projections")
    embed, pool = (functools.partial(part, compiled=compiled) for part in (_embed, _pool))
    model.parts = Parts(embed, _layer, pool)


def _embed(encoder: Encoder, tokens: Tensor, compiled: bool) -> Tensor:
    tables = encoder.token.weight, encoder.position.weight, encoder.global_token
    dropout = encoder.dropout.p if encoder.training else 0.0
    return embed(tokens, *tables, dropout, compiled=compiled and encoder.training)


def _layer(layer: Layer, x: Tensor, mask: Tensor | None, statistics: bool) -> LayerResult:
    """What a layer computes, with one operator before attention and one behind it."""
    attention, feed_forward = layer.attention, layer.feed_forward
    *qkv, x = before_attention(x, layer.norm_attention, (attention.query, attention.key, attention.value))
    attended, seen = attention.attend_by_head([attention.split_heads(part) for part in qkv], mask, statistics)
    modules = attention.out, layer.norm_feed_forward, feed_forward.up, feed_forward.down
    return after_attention(x, attended, *modules, layer.dropout.p if layer.training else 0.0), seen


def _pool(encoder: Encoder, x: Tensor, real: Tensor, compiled: bool) -> Tensor:
    return masked_mean(x, real, encoder.norm, compiled=compiled and encoder.training)


# ---- left to torch.compile -------------------------------------------------------------------------------------------


def _compilable(function):
    """`function` with a keyword `compiled`. Beyond MOST_SHAPES it raises; it never runs as it is without being told."""
    make = functools.cache(lambda: torch.compile(function, fullgraph=True, dynamic=False))  # 2 s of imports, if wanted

    @functools.wraps(function)
    def call(*arguments, compiled: bool):
        if not compiled:
            return function(*arguments)
        with torch._dynamo.config.patch(recompile_limit=MOST_SHAPES, accumulated_recompile_limit=4 * MOST_SHAPES):
            return make()(*arguments)

    return call


@_compilable
def embed(tokens: Tensor, table: Tensor, positions: Tensor, first: Tensor | None, dropout: float) -> Tensor:
    """(B, L) int64, tables (V, W) and (L, W), one embedding (1, 1, W) more to stand first -> (B, L or L + 1, W)."""
    x = embedding(tokens, table) + positions
    if first is not None:
        x = torch.cat([first.expand(len(x), -1, -1), x], 1)
    return F.dropout(x, dropout)


@_compilable
def masked_mean(x: Tensor, real: Tensor, norm: torch.nn.LayerNorm) -> Tensor:
    """Mean over all L positions of norm(x), (B, L, W), with zeros where `real` (B, L) is False: (B, W)."""
    return (F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps) * real[..., None]).mean(1)


# ---- embedding -------------------------------------------------------------------------------------------------------


def embedding(tokens: Tensor, table: Tensor) -> Tensor:
    """Rows of a float32 table (V, W), V at most 1,700, by tokens (...) int64: (..., W).

    The gradient is summed without atomics: the same input gives the same bits.

    Raises:
        InputError: another dtype, or more rows.
    """
    require(
        table.dim() == 2 and table.dtype == torch.float32 and len(table) <= MOST_ROWS,
        f"table: wanted (V, W) float32 with V at most {MOST_ROWS}; got {tuple(table.shape)} {table.dtype}",
    )
    require(tokens.dtype == torch.int64, f"tokens: wanted int64; got {tokens.dtype}")
    return _Embedding.apply(tokens, table)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.rows = table.shape[0]
        return F.embedding(tokens, table)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        (tokens,) = ctx.saved_tensors
        return None, torch.ops.sat_lib.embedding_gradient(grad, tokens, ctx.rows)


@operator("embedding_gradient(Tensor grad, Tensor tokens, int rows) -> Tensor")
def _embedding_gradient(grad, tokens, rows):
    return torch.ops.aten.embedding_dense_backward(grad, tokens, rows, -1, False)


@torch.library.register_fake("sat_lib::embedding_gradient", lib=library)
def _(grad, tokens, rows):
    return grad.new_empty(rows, grad.shape[-1])


# ---- before the attention --------------------------------------------------------------------------------------------


def before_attention(
    x: Tensor, norm: torch.nn.LayerNorm, linears: tuple[torch.nn.Linear, torch.nn.Linear, torch.nn.Linear]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values of norm(x), each (..., 64), and x itself, the residual stream.

    The gradient of that x is added inside the kernel; a pass over memory less than if autograd added it. Products in
    bfloat16, in which the three come on a GPU; on a CPU in x's dtype.

    Args:
        x: (..., 64) float32.

    Raises:
        InputError: another shape or dtype.
    """
    _check_residual(x)
    _check_modules(norm, *((linear, WIDTH, WIDTH) for linear in linears))
    weight, bias = (torch.cat([getattr(linear, name) for linear in linears]) for name in ("weight", "bias"))
    return _BeforeAttention.apply(x, *_behind_norm(norm, weight, bias), norm.eps)


class _BeforeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float):
        ctx.save_for_backward(x, weight, bias)
        ctx.eps = eps
        return *torch.ops.sat_lib.before_attention(x, weight, bias, eps), x.view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor):
        x, weight, bias = ctx.saved_tensors
        grad_x, flat = torch.ops.sat_lib.before_attention_backward(*grads, x, weight, bias, ctx.eps)
        grad_weight, grad_bias = flat.split([weight.numel(), bias.numel()])
        return grad_x, grad_weight.view_as(weight), grad_bias, None


@operator("before_attention(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor)")
def _before_attention(x, weight, bias, eps):
    projected = F.linear(_normalised(x, eps)[0], weight, bias)
    return tuple(part.contiguous() for part in projected.chunk(3, -1))


@torch.library.register_fake("sat_lib::before_attention", lib=library)
def _(x, weight, bias, eps):
    dtype = torch.bfloat16 if x.device.type == "cuda" else x.dtype
    return tuple(torch.empty_like(x, dtype=dtype) for _ in range(3))


@operator(
    "before_attention_backward(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_past, Tensor x, Tensor weight, "
    "Tensor bias, float eps) -> (Tensor, Tensor)"
)
def _before_attention_backward(grad_q, grad_k, grad_v, grad_past, x, weight, bias, eps):
    normed, rstd = _normalised(x, eps)
    grad = torch.cat([grad_q, grad_k, grad_v], -1).to(x.dtype)
    flat = grad.flatten(0, -2)
    grads = torch.cat([(flat.T @ normed.flatten(0, -2)).flatten(), flat.sum(0)])
    return grad_past + _through_norm(grad @ weight, normed, rstd), grads


@torch.library.register_fake("sat_lib::before_attention_backward", lib=library)
def _(grad_q, grad_k, grad_v, grad_past, x, weight, bias, eps):
    return torch.empty_like(x), x.new_empty(weight.numel() + bias.numel())


# ---- after the attention ---------------------------------------------------------------------------------------------


def after_attention(
    x: Tensor,
    attended: Tensor,
    out: torch.nn.Linear,
    norm: torch.nn.LayerNorm,
    up: torch.nn.Linear,
    down: torch.nn.Linear,
    dropout: float,
) -> Tensor:
    """r + drop(down(drop(gelu(up(norm(r)))))) with r = x + drop(out(attended)): (..., 64) float32.

    Products in bfloat16, sums in float32; nothing but x and `attended` is kept for the backward pass, which repeats the
    rest. Draws a seed from the device's generator where there is dropout; masks aren't those of torch.nn.Dropout.

    Args:
        x: (..., 64) float32, the residual stream. attended: (..., 64) bfloat16, heads side by side.
        dropout: 0 to 0.99, rounded to 1 / 65,536; 0 for evaluation.

    Raises:
        InputError: other shapes or dtypes.
    """
    _check_residual(x)
    _check_modules(norm, (out, WIDTH, WIDTH), (up, WIDTH, HIDDEN), (down, HIDDEN, WIDTH))
    require(0 <= dropout <= 0.99, f"dropout: wanted 0 to 0.99; got {dropout}")
    wanted = torch.bfloat16 if x.device.type == "cuda" else attended.dtype
    require(
        attended.shape == x.shape and attended.dtype == wanted,
        f"attended: wanted {tuple(x.shape)} {wanted}; got {tuple(attended.shape)} {attended.dtype}",
    )
    seed = None
    if dropout > 0:
        seed = torch.randint(2**62, (1,), device=x.device)
    weights = out.weight, out.bias, *_behind_norm(norm, up.weight, up.bias), down.weight, down.bias
    return torch.ops.sat_lib.after_attention(x, attended, *weights, seed, dropout, norm.eps)


# Weights (64, 64), (128, 64) and (64, 128), the biases of their first axis.
_ARGUMENTS = (
    "Tensor x, Tensor attended, Tensor out_weight, Tensor out_bias, Tensor up_weight, Tensor up_bias, "
    "Tensor down_weight, Tensor down_bias, Tensor? seed, float dropout, float eps"
)


@operator(f"after_attention({_ARGUMENTS}) -> Tensor")
def _after_attention(x, attended, *others):
    *weights, seed, dropout, eps = others
    return _forward(x, attended, weights, _masks(x, seed, dropout), eps)[0]


def _forward(x, attended, weights, masks, eps):
    """`after_attention`'s formulas: the result, and what the backward pass wants of the way there."""
    out, up, down = weights[:2], weights[2:4], weights[4:]
    residual = x + F.linear(attended.to(x.dtype), *out) * masks[0]
    normed, rstd = _normalised(residual, eps)
    raised = F.linear(normed, *up)
    hidden = F.gelu(raised) * masks[1]
    return residual + F.linear(hidden, *down) * masks[2], normed, rstd, raised, hidden


def _masks(x: Tensor, seed: Tensor | None, dropout: float) -> tuple:
    """Scaled masks of the three dropouts, in the order in which they are met."""
    if seed is None:
        return 1.0, 1.0, 1.0
    generator = torch.Generator(x.device).manual_seed(int(seed))
    keep = 1 - round(dropout * 65_536) / 65_536
    shapes = [(*x.shape[:-1], width) for width in (WIDTH, HIDDEN, WIDTH)]
    return tuple((torch.rand(shape, generator=generator, dtype=x.dtype) < keep) / keep for shape in shapes)


@torch.library.register_fake("sat_lib::after_attention", lib=library)
def _(x, *others):
    return torch.empty_like(x)


@operator(f"after_attention_backward(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)")
def _after_attention_backward(grad, x, attended, *others):
    *weights, seed, dropout, eps = others
    out, _, up, _, down, _ = weights
    masks = _masks(x, seed, dropout)
    _, normed, rstd, raised, hidden = _forward(x, attended, weights, masks, eps)
    grad_down = grad * masks[2]
    whole, density = (1 + torch.erf(raised / math.sqrt(2))) / 2, (-raised * raised / 2).exp() / math.sqrt(2 * math.pi)
    grad_up = (grad_down @ down) * masks[1] * (whole + raised * density)
    grad_x = grad + _through_norm(grad_up @ up, normed, rstd)
    grad_out = grad_x * masks[0]
    pairs = ((grad_out, attended.to(x.dtype)), (grad_up, normed), (grad_down, hidden))
    flat = [(left.flatten(0, -2), right.flatten(0, -2)) for left, right in pairs]
    parts = [(left.T @ right).flatten() for left, right in flat] + [left.sum(0) for left, _ in flat]
    return grad_x, (grad_out @ out).to(attended.dtype), torch.cat(parts)


@torch.library.register_fake("sat_lib::after_attention_backward", lib=library)
def _(grad, x, attended, *others):
    *weights, _, _, _ = others
    return torch.empty_like(x), torch.empty_like(attended), x.new_empty(sum(weight.numel() for weight in weights))


def _save_after(ctx, inputs, output):
    *tensors, ctx.dropout, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


@gradient("after_attention", _save_after)
def _differentiate_after(ctx, grad):
    x, attended, *weights, seed = ctx.saved_tensors
    call = torch.ops.sat_lib.after_attention_backward
    grad_x, grad_attended, flat = call(grad, x, attended, *weights, seed, ctx.dropout, ctx.eps)
    ordered = weights[::2] + weights[1::2]  # the flat gradient has the biases behind all weights
    parts = flat.split([weight.numel() for weight in ordered])
    out, up, down, *biases = (part.view_as(weight) for part, weight in zip(parts, ordered, strict=True))
    return grad_x, grad_attended, out, biases[0], up, biases[1], down, biases[2], None, None, None


# ---- shared ----------------------------------------------------------------------------------------------------------


def _behind_norm(norm: torch.nn.LayerNorm, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """A linear layer with the gain and bias of the norm before it moved into it, whose gradients then give theirs."""
    return weight * norm.weight, bias + (weight * norm.bias).sum(1)


def _normalised(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x - mean) / deviation over the last axis, and 1 / deviation."""
    variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    rstd = (variance + eps).rsqrt()
    return (x - mean) * rstd, rstd


def _through_norm(grad: Tensor, normed: Tensor, rstd: Tensor) -> Tensor:
    """The gradient of what was normalised."""
    product = (grad * normed).mean(-1, keepdim=True)
    return rstd * (grad - grad.mean(-1, keepdim=True) - normed * product)


def _check_modules(norm: torch.nn.LayerNorm, *linears: tuple[torch.nn.Linear, int, int]) -> None:
    shapes = [(WIDTH,), (WIDTH,)]
    tensors = [norm.weight, norm.bias]
    for linear, ins, outs in linears:
        tensors += [linear.weight, linear.bias]
        shapes += [(outs, ins), (outs,)]
    got = [None if tensor is None else (tuple(tensor.shape), tensor.dtype) for tensor in tensors]
    wanted = [(shape, torch.float32) for shape in shapes]
    require(got == wanted, f"norm, linears: wanted weights and biases {wanted}; got {got}")


def _check_residual(x: Tensor) -> None:
    fits = x.shape[-1] == WIDTH and x.dtype == torch.float32
    require(fits, f"x: wanted (..., {WIDTH}) float32; got {tuple(x.shape)} {x.dtype}")
