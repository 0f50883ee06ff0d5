"""The operators against the definition in float64: on a CPU in float64, on a GPU in every format the kernels take."""

import contextlib
import subprocess
from functools import partial

import pytest
import torch
from attention_cases import LAYOUTS, assert_close, definition, inputs, layouts, padding_mask, with_gradients

from sat_lib.attention import build, ops, reference, statistics
from sat_lib.attention.layout import BlockLayout
from sat_lib.attention.ops import attention_statistics, block_sparse_attention, sddmm, sparse_softmax, spmm
from sat_lib.common.errors import InputError


def rounded_inputs(queries, keys, number_format, size=32, **changes):
    """q, k, v in the format, and the same numbers in float64."""
    device, dtype, *_ = number_format
    made = inputs(queries, keys, device, dtype, size=size, **changes)
    return made, [x.detach().double().requires_grad_() for x in made]


def check_attention(layout, queries, keys, number_format, mask=None, pruned="zero", window=None, **changes):
    device, dtype, *_ = number_format
    layout, mask = layout.to(device), None if mask is None else mask.to(device)
    given, exact = rounded_inputs(queries, keys, number_format, **changes)
    attend = partial(block_sparse_attention, layout=layout, key_padding_mask=mask, pruned=pruned, window=window)
    out, gradients = with_gradients(attend, given)
    dense = lambda q, k, v: definition(q, k, v, layout, mask, pruned, window)[0]
    want, wanted = with_gradients(dense, exact)
    peer, peers = with_gradients(partial(reference.block_sparse_attention, **attend.keywords), given)
    assert_close(out, want, peer, 2, number_format.rounding)
    for gradient, expected, theirs in zip(gradients, wanted, peers, strict=True):
        assert gradient.dtype == dtype
        assert_close(gradient, expected, theirs, 3, number_format.rounding)


@pytest.mark.parametrize("pruned", ["zero", "drop"])
@pytest.mark.parametrize("mask", ["none", "ragged", "block"])
@pytest.mark.parametrize("shape", [(64, 64, 16), (50, 50, 16), (40, 70, 32)], ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_attention_equals_the_definition(name, shape, mask, pruned, number_format):
    queries, keys, block = shape
    layout = layouts(-(-queries // block), -(-keys // block), block, 2)[name]
    check_attention(layout, queries, keys, number_format, padding_mask(mask, 3, keys, block), pruned)


@pytest.mark.parametrize("size", [16, 32, 48, 64, 96, 128])
@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_attention_of_every_size_equals_the_definition(block, size, number_format):
    length = 3 * block - 5
    check_attention(layouts(3, 3, block, 2)["random"], length, length, number_format, size=size)
    mask = padding_mask("ragged", 3, length, block)
    check_attention(layouts(3, 3, block, 2)["per head"], length, length, number_format, mask, "drop", size=size)


@pytest.mark.parametrize("window", [15, 16, 40, 1000])
@pytest.mark.parametrize("mask", ["none", "ragged"])
@pytest.mark.parametrize("shape", [(64, 64, 16), (50, 51, 16), (70, 40, 32), (130, 300, 64)], ids=str)
@pytest.mark.parametrize("name", ["everything", "random", "per head", "empty row"])
def test_a_window_leaves_the_keys_behind_the_queries_own(name, shape, mask, window, number_format):
    queries, keys, block = shape
    layout = layouts(-(-queries // block), -(-keys // block), block, 2)[name]
    check_attention(layout, queries, keys, number_format, padding_mask(mask, 3, keys, block), "drop", window)


def test_a_window_of_0_gives_the_values(number_format):
    device, dtype, *_ = number_format
    q, k, v = inputs(50, 50, device, dtype, size=32)
    out = block_sparse_attention(q, k, v, BlockLayout.full(4, 4, 16).to(device), pruned="drop", window=0)
    torch.testing.assert_close(out, v, rtol=number_format.rounding, atol=0)


@pytest.mark.parametrize("size", [16, 64, 96])
@pytest.mark.parametrize("block", [16, 32, 128])
def test_a_window_of_every_size_equals_the_definition(block, size, number_format):
    length = 3 * block - 5
    layout = layouts(3, 3, block, 2)["everything"]
    check_attention(layout, length, length, number_format, None, "drop", block // 2 + 3, size=size)


@pytest.mark.parametrize("pruned", ["zero", "drop"])
def test_large_scores_stay_finite_and_right(pruned, number_format):
    device = number_format.device
    layout = layouts(4, 4, 16, 2)["random"].to(device)
    given, exact = rounded_inputs(64, 64, number_format, scale=12.0)
    attend = partial(block_sparse_attention, layout=layout, pruned=pruned)
    out, gradients = with_gradients(attend, given)
    plain = partial(reference.block_sparse_attention, layout=layout, pruned=pruned)
    (want, _), (peer, _) = with_gradients(plain, exact), with_gradients(plain, given)
    assert_close(out, want, peer, 2, number_format.rounding)
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("place", range(3))
def test_an_operand_may_be_the_only_one_that_takes_a_gradient(place, number_format):
    device, dtype, *_ = number_format
    layout = layouts(4, 4, 16, 2)["per head"].to(device)
    given = inputs(50, 50, device, dtype, size=32)
    alone = [x if index == place else x.detach() for index, x in enumerate(given)]

    def three_operations(q, k, v):
        return spmm(sparse_softmax(sddmm(q, k, layout), layout, 2, 50), v, layout, 50)

    for attend in (partial(block_sparse_attention, layout=layout), three_operations):
        wanted = torch.autograd.grad(attend(*given).sum(), given)[place]
        assert torch.equal(torch.autograd.grad(attend(*alone).sum(), alone[place])[0], wanted)
        assert attend(*(x.detach() for x in given)).grad_fn is None


@pytest.mark.parametrize("name", ["attention", "sddmm", "sparse_softmax", "spmm"])
def test_second_derivatives_are_refused(name, device):
    q, k, v = inputs(32, 32, device, torch.float32, size=16)
    layout = layouts(2, 2, 16, 2)["random"].to(device)
    values = sddmm(q, k, layout).detach().requires_grad_()
    call, x = {
        "attention": (lambda: block_sparse_attention(q, k, v, layout), q),
        "sddmm": (lambda: sddmm(q, k, layout), q),
        "sparse_softmax": (lambda: sparse_softmax(values, layout, 2, 32), values),
        "spmm": (lambda: spmm(values, v, layout, 32), v),
    }[name]
    (gradient,) = torch.autograd.grad(call().square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.square().sum().backward()


def check_operation(operation, plain, operands, number_format):
    out, gradients = with_gradients(operation, operands)
    want, wanted = with_gradients(plain, [x.detach().double().requires_grad_() for x in operands])
    peer, peers = with_gradients(plain, operands)
    assert_close(out, want, peer, 2, number_format.rounding)
    for gradient, expected, theirs in zip(gradients, wanted, peers, strict=True):
        assert_close(gradient, expected, theirs, 3, number_format.rounding)


@pytest.mark.parametrize("size", [16, 32, 64, 128])
@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("name", ["random", "per head", "empty column"])
def test_the_three_operations_equal_the_reference(name, block, size, number_format):
    device, dtype, *_ = number_format
    layout = layouts(3, 3, block, 2)[name].to(device)
    queries, keys = 3 * block - 5, 3 * block - 3
    q, k, v = inputs(queries, keys, device, dtype, size=size)
    check_operation(partial(sddmm, layout=layout), partial(reference.sddmm, layout=layout), [q, k], number_format)
    scores = reference.sddmm(q, k, layout).detach().requires_grad_()
    for mask, pruned in ((None, "zero"), (padding_mask("ragged", 3, keys, block).to(device), "drop")):
        settings = {"layout": layout, "heads": 2, "keys": keys, "key_padding_mask": mask, "pruned": pruned}
        check_operation(
            partial(sparse_softmax, **settings), partial(reference.sparse_softmax, **settings), [scores], number_format
        )
    weights = reference.sparse_softmax(scores, layout, 2, keys).detach().requires_grad_()
    settings = {"layout": layout, "queries": queries}
    check_operation(partial(spmm, **settings), partial(reference.spmm, **settings), [weights, v], number_format)


def test_sddmm_with_a_mask_gives_minus_infinity_and_no_gradient_to_padding(number_format):
    device, dtype, *_ = number_format
    layout = layouts(4, 4, 16, 2)["everything"].to(device)
    q, k, _ = inputs(50, 50, device, dtype, size=32)
    mask = padding_mask("ragged", 3, 50, 16).to(device)
    scores = sddmm(q, k, layout, key_padding_mask=mask)
    want = reference.sddmm(q, k, layout, key_padding_mask=mask)
    assert torch.equal(scores == -torch.inf, want == -torch.inf)
    gradient = torch.randn_like(scores)
    got = torch.autograd.grad(scores, (q, k), gradient)
    wanted = torch.autograd.grad(want, (q, k), gradient)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.03, atol=0.03)
    assert (got[1][~mask[:, None].expand(-1, 2, -1)] == 0).all()


@pytest.mark.parametrize("size", [16, 32, 64, 128])
@pytest.mark.parametrize("mask", ["none", "ragged"])
@pytest.mark.parametrize("shape", [(50, 50, 16), (300, 140, 32)], ids=str)
def test_statistics_equal_the_means_of_the_maps(shape, mask, size, number_format):
    device, dtype, *_ = number_format
    queries, keys, block = shape
    mask = padding_mask(mask, 3, keys, block)
    mask = None if mask is None else mask.to(device)
    q, k, _ = inputs(queries, keys, device, dtype, size=size)
    seen = attention_statistics(q, k, block, key_padding_mask=mask)
    want = statistics.attention_statistics(q.double(), k.double(), block, key_padding_mask=mask)
    peer = statistics.attention_statistics(q, k, block, key_padding_mask=mask)
    statistics_rounding = 2**-20 if dtype != torch.float64 and not number_format.tf32 else number_format.rounding
    for ours, exact, theirs in zip(seen, want, peer, strict=True):
        assert ours.dtype == torch.promote_types(dtype, torch.float32)
        assert_close(ours, exact, theirs, 2, statistics_rounding)


def test_statistics_of_heads_that_the_shares_do_not_divide(number_format):
    """200 heads over 6 pieces of the map: on a GPU the last shares have no head left."""
    device, dtype, *_ = number_format
    q, k, _ = inputs(300, 140, device, dtype, size=16, batch=100)
    seen, want = attention_statistics(q, k, 32), statistics.attention_statistics(q.double(), k.double(), 32)
    torch.testing.assert_close(seen.mean_map.double(), want.mean_map, rtol=2e-3, atol=1e-5)


def test_views_and_stride_zero_gradients(number_format):
    device, dtype, *_ = number_format
    layout = layouts(4, 4, 16, 2)["random"].to(device)
    packed = torch.randn(3, 64, 3, 2, 32, dtype=dtype, device=device, requires_grad=True)
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    out = block_sparse_attention(q, k, v, layout)
    assert out.transpose(1, 2).is_contiguous()  # so that joining the heads copies nothing
    out.sum().backward()  # the gradient of a sum is expanded: all strides 0
    copies = [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in (q, k, v)]
    plain = block_sparse_attention(*copies, layout)
    assert torch.equal(out, plain)
    plain.sum().backward()
    for index, copy in enumerate(copies):
        assert torch.equal(packed.grad.permute(2, 0, 3, 1, 4)[index], copy.grad)
    odd = torch.randn(3, 2, 64, 33, dtype=dtype, device=device)[..., 1:]  # rows that no 16-byte load can read
    copy = odd.clone()
    assert torch.equal(block_sparse_attention(odd, odd, odd, layout), block_sparse_attention(copy, copy, copy, layout))


def test_the_same_input_gives_the_same_bits(number_format):
    device, dtype, *_ = number_format
    layout = layouts(8, 8, 32, 2)["random"].to(device)
    given = inputs(256, 256, device, dtype, size=32, batch=8)
    run = lambda: with_gradients(partial(block_sparse_attention, layout=layout), given)
    out, gradients = run()
    first = [out, *gradients, *attention_statistics(given[0], given[1], 32)]
    for _ in range(100 if device.type == "cuda" else 2):
        out, gradients = run()
        again = [out, *gradients, *attention_statistics(given[0], given[1], 32)]
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


OPERATORS = (
    "attention",
    "attention_backward",
    "sddmm",
    "spmm",
    "spmm_transposed",
    "sparse_softmax",
    "sparse_softmax_backward",
    "attention_statistics",
)


def operator_calls(number_format):
    """One call of every operator, with and without a mask."""
    device, dtype, *_ = number_format
    layout = layouts(2, 2, 16, 2)["per head"].to(device)
    q, k, v = inputs(30, 30, device, dtype, size=16)
    mask = padding_mask("ragged", 3, 30, 16).to(device)
    lists = ops._lists(layout)
    scores = reference.sddmm(q, k, layout).detach().requires_grad_()
    out, lse = torch.ops.sat_lib.attention(q, k, v, lists, mask, 16, 0.25, True, 20)
    plain = [x.detach() for x in (out, q, k, v, out, lse)]
    loose = [x.detach() for x in (scores, q)]
    return {
        "attention": (q, k, v, lists, mask, 16, 0.25, True, 20),
        "attention_backward": (*plain, lists, mask, 16, 0.25, 20),
        "sddmm": (q, k, lists, mask, 16, 0.25),
        "spmm": (scores, v, lists, None, 16, 30, 1.0),
        "spmm_transposed": (*loose, lists, mask, 16, 30, 1.0),
        "sparse_softmax": (scores, lists, mask, 16, 2, 30, True),
        "sparse_softmax_backward": (loose[0], loose[0], lists, 16, 2, 30),
        "attention_statistics": (q.detach(), k.detach(), mask, 16, 0.25),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_pass_pytorchs_own_check(name, number_format):
    torch.use_deterministic_algorithms(False)
    arguments = operator_calls(number_format)[name]
    torch.library.opcheck(getattr(torch.ops.sat_lib, name).default, arguments, atol=1e-2, rtol=1e-2)


def test_compiles_as_one_graph(device):
    layout = layouts(4, 4, 16, 2)["random"].to(device)
    dtype = torch.float32
    given = inputs(50, 50, device, dtype, size=32)
    mask = padding_mask("ragged", 3, 50, 16).to(device)

    def attend(q, k, v):
        return block_sparse_attention(q * 2, k, v, layout, key_padding_mask=mask) + 1

    backend = "inductor" if device.type == "cuda" else "aot_eager"
    out, gradients = with_gradients(torch.compile(attend, fullgraph=True, backend=backend), given)
    want, wanted = with_gradients(attend, given)
    torch.testing.assert_close(out, want)
    for ours, theirs in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_autocast_casts_like_pytorchs_attention(device):
    layout = layouts(4, 4, 16, 2)["random"].to(device)
    given = inputs(64, 64, device, torch.float32, size=32)
    with torch.autocast(device.type, torch.bfloat16):
        out = block_sparse_attention(*given, layout)
        peer = torch.nn.functional.scaled_dot_product_attention(*given)
    assert out.dtype == peer.dtype == torch.bfloat16
    out.sum().backward()
    assert given[0].grad.dtype == torch.float32


@pytest.mark.gpu
def test_runs_on_another_stream_and_in_a_cuda_graph():
    layout = layouts(8, 8, 32, 2)["random"].to("cuda")
    q, k, v = inputs(256, 256, "cuda", torch.bfloat16, size=32)
    run = lambda: with_gradients(partial(block_sparse_attention, layout=layout), (q, k, v))
    out, _ = run()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        again = run()
    stream.synchronize()
    assert torch.equal(out, again[0])
    weight = torch.randn_like(out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = block_sparse_attention(q, k, v, layout)
        captured_gradients = torch.autograd.grad(captured, (q, k, v), weight)
    with torch.no_grad():
        q.copy_(torch.randn_like(q))
    graph.replay()
    fresh = block_sparse_attention(q, k, v, layout)
    assert torch.equal(captured, fresh)
    for ours, theirs in zip(captured_gradients, torch.autograd.grad(fresh, (q, k, v), weight), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_runs_on_a_second_device():
    layout = layouts(4, 4, 16, 2)["random"]
    q, k, v = inputs(64, 64, "cuda:1", torch.float32, size=32)
    out = block_sparse_attention(q, k, v, layout.to("cuda:1"))
    want = reference.block_sparse_attention(q, k, v, layout.to("cuda:1"))
    torch.testing.assert_close(out, want, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_offsets_beyond_31_bits():
    """4.3 billion numbers a tensor: the last head lies where a 32-bit offset would not reach."""
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    layout = BlockLayout(torch.eye(16384 // 128).bool(), 128).to("cuda")
    q = torch.zeros(2049, 1, 16384, 128, dtype=torch.bfloat16, device="cuda")
    q[-1].normal_()
    out = block_sparse_attention(q, q, q, layout, pruned="drop")
    want = block_sparse_attention(q[-1:], q[-1:], q[-1:], layout, pruned="drop")
    assert torch.equal(out[-1:], want)
    assert want.abs().max() > 0


@pytest.mark.gpu
def test_the_kernels_refuse_what_they_cannot_take():
    layout = BlockLayout.full(2, 2, 8).to("cuda")
    q, k, v = inputs(16, 16, "cuda", torch.float32, size=32)
    with pytest.raises(InputError, match="block: the kernels take"):
        block_sparse_attention(q, k, v, layout)
    layout = BlockLayout.full(1, 1, 16).to("cuda")
    with pytest.raises(InputError, match="head size: the kernels take multiples of 16"):
        block_sparse_attention(*inputs(16, 16, "cuda", torch.float32, size=24), layout)
    with pytest.raises(InputError, match="dtype: the kernels take"):
        block_sparse_attention(*inputs(16, 16, "cuda", torch.float64, size=32), layout)
    with pytest.raises(InputError, match="layout: wanted it on cuda"):
        block_sparse_attention(q, k, v, layout.to("cpu"))


def test_bad_input_is_named():
    layout = layouts(4, 4, 16, 2)["random"]
    q, k, v = inputs(64, 64)
    with pytest.raises(InputError, match="q, k, v: wanted"):
        block_sparse_attention(q[0], k, v, layout)
    with pytest.raises(InputError, match="pruned: wanted one of"):
        block_sparse_attention(q, k, v, layout, pruned="keep")
    with pytest.raises(InputError, match="window: goes with pruned='drop' alone; got pruned='zero'"):
        block_sparse_attention(q, k, v, layout, window=3)
    with pytest.raises(InputError, match="window: wanted a number of positions, 0 or more; got -1"):
        block_sparse_attention(q, k, v, layout, pruned="drop", window=-1)
    with pytest.raises(InputError, match="want a grid of 4 x 4"):
        sddmm(q, k, BlockLayout.full(2, 2, 16))
    with pytest.raises(InputError, match="values: wanted"):
        sparse_softmax(torch.zeros(3, 1, 16, 16), layout, 2, 64)
    with pytest.raises(InputError, match="weights, v: wanted one dtype"):
        spmm(sddmm(q, k, layout).float(), v, layout, 64)


def test_the_reference_is_chosen_by_name_only(monkeypatch):
    layout = layouts(4, 4, 16, 2)["random"]
    q, k, v = inputs(64, 64)
    monkeypatch.setattr(ops, "IMPLEMENTATION", "reference")
    out = block_sparse_attention(q, k, v, layout)
    assert "sat_lib" not in out.grad_fn.name()
    assert torch.equal(out, reference.block_sparse_attention(q, k, v, layout))
    assert torch.equal(attention_statistics(q, k, 16).pooled, statistics.attention_statistics(q, k, 16).pooled)


# ---- building --------------------------------------------------------------------------------------------------------


def nvcc():
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        subprocess.run(["nvcc", "--version"], capture_output=True, check=True)
        return True
    return False


@pytest.mark.skipif(not nvcc(), reason="needs nvcc on PATH")
@pytest.mark.parametrize("path", sorted(build.SOURCES.glob("*.cu")), ids=lambda path: path.name)
def test_kernels_compile(path, tmp_path):
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in (80, 90)]
    command = ["nvcc", "-std=c++17", "--threads=2", *targets, *build.CUDA_FLAGS, "-c", str(path)]
    command += ["-o", str(tmp_path / "out.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr


def test_without_nvcc_the_build_says_what_to_do(tmp_path, monkeypatch):
    from torch.utils import cpp_extension

    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.load.cache_clear()
    with pytest.raises(InputError, match=r"nvcc: wanted CUDA .*SAT_LIB_IMPLEMENTATION=reference"):
        build.load()


def test_a_killed_build_leaves_nothing_that_hangs_the_next(tmp_path, monkeypatch):
    """PyTorch's build lock is a file that stays when its owner is killed: the next build must not wait for it."""
    from torch.utils import cpp_extension

    folder = tmp_path / "build"
    folder.mkdir()
    (folder / "lock").touch()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    seen = []
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(cpp_extension, "load", lambda *_, **__: seen.append((folder / "lock").exists()))
    build._build(folder, "9.0")
    assert seen == [False]


def test_a_failed_build_says_so(tmp_path, monkeypatch):
    from torch.utils import cpp_extension

    def fail(*_, **__):
        raise RuntimeError("nvcc fatal: no such option")

    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(cpp_extension, "load", fail)
    with pytest.raises(InputError, match="could not be built: nvcc fatal"):
        build._build(tmp_path, "9.0")
