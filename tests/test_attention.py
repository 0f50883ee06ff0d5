"""The contract that every entry of ATTENTION keeps."""

import pytest
import torch

from sat_lib.attention import ATTENTION, get_attention
from sat_lib.errors import InputError
from sat_lib.layout import BlockLayout


def qkv(batch=2, heads=2, length=48, size=8, dtype=torch.float64):
    torch.manual_seed(0)
    return [torch.randn(batch, heads, length, size, dtype=dtype, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("name", ATTENTION)
def test_without_a_layout_all_equal_the_definition(name):
    q, k, v = qkv()
    out = get_attention(name)(q, k, v)
    torch.testing.assert_close(out, (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1) @ v)


@pytest.mark.parametrize("name", ATTENTION)
def test_padding_keys_weigh_nothing_and_an_empty_example_gives_0(name):
    q, k, v = qkv()
    mask = torch.zeros(2, 48, dtype=torch.bool)
    mask[0, :20] = True
    out = get_attention(name)(q, k, v, key_padding_mask=mask)
    torch.testing.assert_close(out[0], (q[0] @ k[0, :, :20].transpose(-1, -2) / 8**0.5).softmax(-1) @ v[0, :, :20])
    assert (out[1] == 0).all()
    out.sum().backward()
    for x in (q, k, v):
        assert x.grad.isfinite().all()
        assert (x.grad[1] == 0).all()


def test_sat_under_the_full_layout_equals_dense():
    q, k, v = qkv()
    torch.testing.assert_close(
        get_attention("sat")(q, k, v, layout=BlockLayout.full(3, 3, 16)), get_attention("dense")(q, k, v)
    )


def test_dense_refuses_a_layout():
    q, k, v = qkv()
    with pytest.raises(InputError, match="dense attention takes none"):
        get_attention("dense")(q, k, v, layout=BlockLayout.full(3, 3, 16))


@pytest.mark.parametrize("name", ["Dense", "performer", ""])
def test_an_unknown_name_raises_and_lists_the_known(name):
    with pytest.raises(InputError, match=r"attention: wanted one of \['dense', 'sat'\]"):
        get_attention(name)
