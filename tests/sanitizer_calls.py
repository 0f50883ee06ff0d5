"""Every kernel on small awkward shapes, to be run under compute-sanitizer: `make gputest`."""

from functools import partial

import torch
from attention_cases import inputs, layouts, padding_mask, with_gradients

from sat_lib.attention.ops import attention_statistics, block_sparse_attention, sddmm, sparse_softmax, spmm
from sat_lib.model.fused import HIDDEN, WIDTH, after_attention, before_attention, embedding


def main() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    for dtype in (torch.float32, torch.bfloat16):
        for block, size in ((16, 16), (32, 32), (32, 64), (64, 128)):
            length = 3 * block - 5
            layout = layouts(3, 3, block, 2)["per head"].to("cuda")
            mask = padding_mask("ragged", 3, length, block).to("cuda")
            q, k, v = inputs(length, length, "cuda", dtype, size=size)
            with_gradients(partial(block_sparse_attention, layout=layout, key_padding_mask=mask), (q, k, v))
            windowed = partial(block_sparse_attention, layout=layout, pruned="drop", window=block // 2)
            with_gradients(windowed, (q, k, v))
            with_gradients(partial(three_operations, layout=layout), (q, k, v))
            attention_statistics(q, k, block, key_padding_mask=mask)
    layer_operators()
    torch.cuda.synchronize()
    print("every kernel ran")


def layer_operators() -> None:
    """A number of tokens that no tile divides, so that the last is partly empty."""
    x, attended = (
        torch.randn(1, 37, WIDTH, device="cuda", dtype=dtype, requires_grad=True)
        for dtype in (torch.float32, torch.bfloat16)
    )
    norm, (up, down) = torch.nn.LayerNorm(WIDTH), (torch.nn.Linear(WIDTH, HIDDEN), torch.nn.Linear(HIDDEN, WIDTH))
    square = torch.nn.Linear(WIDTH, WIDTH)
    torch.nn.ModuleList([norm, up, down, square]).to("cuda")
    with_gradients(lambda x: sum(part.float() for part in before_attention(x, norm, (square,) * 3)), (x,))
    with_gradients(lambda x, a: after_attention(x, a, square, norm, up, down, 0.1), (x, attended))
    tokens = torch.randint(0, 300, (37,), device="cuda")
    table = torch.randn(300, WIDTH, device="cuda", requires_grad=True)
    with_gradients(lambda table: embedding(tokens, table), (table,))


def three_operations(q, k, v, layout):
    weights = sparse_softmax(sddmm(q, k, layout), layout, q.shape[1], k.shape[2])
    return spmm(weights, v, layout, q.shape[2])


if __name__ == "__main__":
    main()
