"""What the baselines attend to: the published numbers of pairs, and what they refuse."""

import numpy as np
import pytest
import torch
from definitions import MASKS

from sat_lib.attention import get_attention
from sat_lib.attention.baselines import IMPLEMENTATIONS
from sat_lib.attention.static_patterns import bigbird_layout
from sat_lib.common.errors import InputError

PAIRS = [  # at L = 1024, per head
    ("dense", {}, 1_048_576),
    ("longformer", {}, 65_504),
    ("longformer", {"dilation": 2}, 64_448),
    ("bigbird", {}, 309_248),
]


def attended(attend, length, heads=1):
    """(H, L, L): the attention map itself, as the output for the values 1, 0, 0 ..., then 0, 1, 0 ..."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, heads, length, 205)  # 205 values at a time, a divisor of 1,025
    parts = torch.nn.functional.pad(torch.eye(length), (0, -length % 205)).split(205, 1)
    return torch.cat([attend(q, k, v.expand(1, heads, -1, -1)) for v in parts], 3)[0, :, :, :length]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("name", "options", "pairs"), PAIRS, ids=str)
def test_pairs_per_head_are_the_published_number(name, options, pairs, implementation):
    if name != "dense":
        options = options | {"implementation": implementation}
    heads = 2 if name == "bigbird" else 1
    weights = attended(get_attention(name, **options), 1024, heads)
    assert (weights > 0).sum((1, 2)).tolist() == [pairs] * heads
    torch.testing.assert_close(weights.sum(-1), torch.ones(heads, 1024))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_pairs_of_lsg_are_the_published_number_beside_the_global_ones(implementation):
    weights = attended(get_attention("lsg", implementation=implementation), 1025)[0]
    assert (weights[1:, 1:] > 0).sum() == 156_672
    assert (weights[0] > 0).all() and (weights[:, 0] > 0).all()
    assert set((weights[1 + 3 * 32 : -3 * 32] > 0).sum(1).tolist()) == {161}


def test_definitions_of_the_tests_give_the_published_numbers_too():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1024, 8)
    for name, options, pairs in PAIRS:
        assert MASKS[name](q, k, None, **options).sum() == pairs
    with_global = torch.randn(1, 1, 1025, 8)
    assert MASKS["lsg"](with_global, with_global, None)[..., 1:, 1:].sum() == 156_672


def test_bigbirds_pattern():
    layout = bigbird_layout(heads=4, blocks=32, random_blocks=3, block=32, seed=0)
    assert layout.grid.sum((1, 2)).tolist() == [302] * 4
    assert layout.density == pytest.approx(0.295, abs=0.0005)
    assert layout.grid[:, [0, -1]].all() and layout.grid[:, :, [0, -1]].all()
    for grid in layout.grid:
        for row in range(1, 31):
            fixed = {0, row - 1, row, row + 1, 31}
            kept = set(grid[row].nonzero().flatten().tolist())
            assert fixed <= kept and len(kept - fixed) == 3
    assert not torch.equal(layout.grid[0], layout.grid[1])


def test_bigbirds_random_blocks_depend_on_seed_and_layer_alone():
    grids = {(seed, layer): bigbird_layout(2, 16, 3, 32, seed, layer).grid for seed in range(2) for layer in range(2)}
    assert torch.equal(grids[1, 1], bigbird_layout(2, 16, np.int64(3), 32, 1, 1).grid)
    different = [torch.equal(x, y) for x in grids.values() for y in grids.values()]
    assert sum(different) == len(grids)
    chosen = torch.stack([bigbird_layout(1, 12, 3, 32, seed).grid[0, 5] for seed in range(300)]).float().mean(0)
    free = chosen[[1, 2, 3, 7, 8, 9, 10]]  # the others are fixed
    assert (free - 3 / 7).abs().max() < 0.12


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("name", "length", "options", "message"),
    [
        ("bigbird", 352, {}, "more than 11 blocks of 32 positions; got 11, where published layers silently switch"),
        ("bigbird", 400, {"random_blocks": -1}, "random_blocks: wanted a whole number, 0 or more; got -1"),
        ("bigbird", 400, {"block": 0}, "block: wanted a whole number, 1 or more; got 0"),
        ("lsg", 65, {}, "LSG wants more than 2 blocks of 32 positions behind the global one; got 64"),
        ("lsg", 97, {"factor": 1}, "LSG wants more than 3 blocks of 32 positions behind the global one; got 96"),
        ("lsg", 400, {"block": -4}, "block: wanted a whole number, 1 or more; got -4"),
        ("lsg", 400, {"factor": 3}, "factor: wanted a divisor of the block 32; got 3"),
        ("longformer", 33, {}, "window: 64 leaves none of 33 positions out, which is dense attention"),
        ("longformer", 34, {"global_token": True}, "window: 64 leaves none of 34 positions out"),
        ("longformer", 2, {"dilation": 2, "global_token": True}, "window: 64 leaves none of 2 positions out"),
        ("longformer", 400, {"window": 7}, "window: wanted an even number of positions; got 7"),
        ("longformer", 400, {"window": 0}, "window: wanted a whole number, 2 or more; got 0"),
        ("longformer", 400, {"window": 64.0}, r"window: wanted a whole number, 2 or more; got 64\.0"),
        ("longformer", 400, {"dilation": 0}, "dilation: wanted a whole number, 1 or more; got 0"),
    ],
)
def test_what_has_no_definition_is_refused(name, length, options, message, implementation):
    x = torch.randn(1, 2, length, 8)
    with pytest.raises(InputError, match=message):
        get_attention(name, implementation=implementation, **options)(x, x, x)


@pytest.mark.parametrize(
    ("name", "length", "options"),
    [
        ("bigbird", 353, {}),
        ("lsg", 66, {}),
        ("lsg", 98, {"factor": 1}),
        ("longformer", 34, {}),
        ("longformer", 35, {"global_token": True}),
        ("longformer", 2, {"dilation": 2}),
        ("longformer", 3, {"dilation": 2, "global_token": True}),
    ],
    ids=str,
)
def test_the_shortest_length_leaves_something_out(name, length, options):
    weights = attended(get_attention(name, **options), length, heads=2)
    assert (weights == 0).any()


def test_an_unknown_implementation_and_unasked_projections_are_refused():
    x = torch.randn(1, 2, 400, 8)
    with pytest.raises(InputError, match=r"implementation: wanted one of \['kernel', 'library'\]; got 'flash'"):
        get_attention("lsg", implementation="flash")(x, x, x)
    with pytest.raises(InputError, match="global_qkv: goes with global_token=True alone"):
        get_attention("longformer")(x, x, x, global_qkv=(x, x, x))
    attend = get_attention("longformer", global_token=True)
    with pytest.raises(InputError, match=r"global_qkv: wanted shapes \[\(1, 2, 1, 8\), .*; got \[\(1, 2, 400, 8\)"):
        attend(x, x, x, global_qkv=(x, x, x))
    with pytest.raises(InputError, match=r"global_qkv: wanted torch\.float32"):
        attend(x, x, x, global_qkv=(x[:, :, :1].double(), x, x))


@pytest.mark.parametrize("name", ["longformer", "bigbird", "lsg"])
def test_as_many_keys_as_queries_are_wanted(name):
    x = torch.randn(1, 2, 401, 8)
    with pytest.raises(InputError, match="wanted as many keys as queries"):
        get_attention(name)(x, x[:, :, :400], x[:, :, :400])


def test_the_global_token_has_its_own_projections():
    q, k, v, k_global, v_global = torch.randn(5, 2, 2, 400, 8)
    q_global = torch.randn(2, 2, 1, 8)
    attend = get_attention("longformer", window=12, global_token=True)
    out = attend(q, k, v, global_qkv=(q_global, k_global, v_global))
    weights = (q_global @ k_global.mT / 8**0.5).softmax(-1)
    torch.testing.assert_close(out[:, :, :1], weights @ v_global)
    torch.testing.assert_close(out[:, :, 1:], attend(q, k, v)[:, :, 1:])


def test_gradients_of_lsg_reach_what_a_query_sees_and_nothing_else():
    q, k, v = torch.randn(3, 1, 1, 161, 8, dtype=torch.float64)
    k = k.requires_grad_()
    out = get_attention("lsg")(q, k, v)
    row = out[0, 0, 1]  # chunk 0: sees chunks 0 and 1 in full, offers of 2 and 3, not chunk 4
    (gradient,) = torch.autograd.grad(row.sum(), k)
    seen = gradient[0, 0].abs().sum(-1) > 0
    assert seen[:65].all() and seen[65:97].sum() == seen[97:129].sum() == 16 and not seen[129:].any()
