"""One new token in each row: attention over what the row fills, and over nothing else."""

import pytest
import torch

from arctrm.reader.last_token import has_kernel, last_token_attention

FILLED = [1, 64, 65, 0, 130, 7, 200, 63, 2, 900]


def rows(heads, width, dtype, device="cpu"):
    """Rows in an order of their own; places that belong to none are not numbers."""
    torch.manual_seed(0)
    filled = torch.tensor(FILLED)
    begin = filled.cumsum(0) - filled + 5 * torch.arange(len(filled))
    shape = int(begin[-1] + filled[-1]) + 3, heads, width
    keys, values = (torch.full(shape, float("nan")) for _ in range(2))
    for first, count in zip(begin.tolist(), filled.tolist(), strict=True):
        for held in (keys, values):
            held[first : first + count] = torch.randn(count, heads, width)
    order = torch.randperm(len(filled))
    query = torch.randn(len(filled), heads, width)
    made = (query.to(dtype), keys.to(dtype), values.to(dtype), begin[order], filled[order])
    return tuple(tensor.to(device) for tensor in made)


def by_definition(query, keys, values, begin, filled):
    """Softmax of products, float64, by hand."""
    result = torch.zeros(query.shape, dtype=torch.float64)
    for row, (first, count) in enumerate(zip(begin.tolist(), filled.tolist(), strict=True)):
        key, value = (held[first : first + count].double() for held in (keys, values))
        scores = torch.einsum("ak,pak->ap", query[row].double(), key) / query.shape[-1] ** 0.5
        result[row] = torch.einsum("ap,pak->ak", scores.softmax(-1), value)
    return result


def test_a_row_attends_to_the_places_it_fills():
    given = rows(3, 8, torch.float64)
    found = last_token_attention(*given)
    torch.testing.assert_close(found, by_definition(*given))
    assert (found[given[-1] == 0] == 0).all()


def test_no_kernel_is_asked_for_on_a_cpu():
    assert not has_kernel(torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("width", [8, 32, 64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_kernel_attends_alike(width, dtype):
    assert has_kernel(torch.device("cuda"))
    given = rows(4, width, dtype, "cuda")
    found = last_token_attention(*given).cpu().double()
    exact = by_definition(*(tensor.cpu() for tensor in given))
    assert ((found - exact).norm() / exact.norm()) < 5e-3
    assert (found[given[-1].cpu() == 0] == 0).all()
