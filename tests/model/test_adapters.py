"""Adapters: rows are independent, padding says nothing, gradients reach everything."""

import pytest
import torch

from arctrm.model.adapters import AlignedAdapter, LatentToTextAdapter, TextToLatentAdapter

HIDDEN, WIDTH, CELLS, SLOTS, PREFIX = 48, 32, 900, 5, 3


@pytest.fixture
def adapter():
    torch.manual_seed(0)
    return TextToLatentAdapter(HIDDEN, WIDTH, CELLS, num_context_slots=SLOTS, num_heads=4)


@pytest.fixture
def back():
    torch.manual_seed(0)
    return LatentToTextAdapter(WIDTH, HIDDEN, num_prefix=PREFIX, num_heads=4)


def sequences(rows=16, length=9, width=HIDDEN):
    """States of rows of different lengths (1 .. length), and their mask."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(rows, length, width, generator=generator)
    lengths = torch.arange(rows) % length + 1
    return hidden, torch.arange(length) < lengths[:, None]


def latents(rows=16):
    z_H, mask = sequences(rows, 7, WIDTH)
    return z_H, z_H.flip(0, 1) * 0.5 + 0.1, mask


def all_outputs(adapter, hidden, mask=None):
    return (*adapter(hidden, mask), adapter.context(hidden, mask))


def assert_same(got, expected):
    torch.testing.assert_close(tuple(got), tuple(expected), atol=1e-5, rtol=1e-5)


def test_shapes_are_those_of_the_contract(adapter, back):
    z_H, z_L, context = all_outputs(adapter, *sequences(3))
    assert z_H.shape == z_L.shape == (3, CELLS, WIDTH)
    assert context.shape == (3, SLOTS, WIDTH)
    assert back(z_H, z_L).shape == (3, PREFIX, HIDDEN)


def test_all_adapters_together_are_small_at_the_size_of_llama_8b():
    adapters = TextToLatentAdapter(), AlignedAdapter(), LatentToTextAdapter()
    assert adapters[0](torch.randn(1, 4096))[0].shape == (1, 900, 512)
    assert sum(p.numel() for adapter in adapters for p in adapter.parameters()) < 15e6


@pytest.mark.parametrize("filler", [100.0, float("nan"), float("inf")])
def test_what_lies_under_the_padding_changes_nothing(adapter, back, filler):
    hidden, mask = sequences()
    spoiled = torch.where(mask[..., None], hidden, filler)
    assert_same(all_outputs(adapter, spoiled, mask), all_outputs(adapter, hidden, mask))
    longer = (torch.nn.functional.pad(hidden, (0, 0, 0, 7)), torch.nn.functional.pad(mask, (0, 7)))
    assert_same(all_outputs(adapter, *longer), all_outputs(adapter, hidden, mask))
    *own, mask = latents()
    spoiled = [torch.where(mask[..., None], z, filler) for z in own]
    assert_same([back(*spoiled, mask)], [back(*own, mask)])


def test_a_row_alone_says_what_it_says_among_sixteen(adapter, back):
    inputs = sequences()
    together, prefix = all_outputs(adapter, *inputs), back(*latents())
    for row in range(16):
        part = slice(row, row + 1)
        alone = all_outputs(adapter, *(x[part] for x in inputs))
        assert_same(alone, [x[part] for x in together])
        assert_same([back(*(x[part] for x in latents()))], [prefix[part]])


def test_long_texts_that_share_a_mean_still_differ_by_row_and_slot():
    """Contexts that start alike for every task are what collapses in training."""
    torch.manual_seed(0)
    adapter = TextToLatentAdapter(256, 128, CELLS)
    hidden = torch.randn(1, 1, 256) + 0.5 * torch.randn(2, 300, 256)
    one, other = adapter.context(hidden).detach()
    assert (one - other).norm() > 0.1 * one.norm()
    assert (one - one.mean(0)).norm() > 0.2 * one.norm()


def test_a_row_with_nothing_to_read_gives_a_constant_and_finite_gradients(adapter, back):
    for call, (*given, mask) in ((all_outputs, sequences(4)), (None, latents(4))):
        mask[1] = mask[2] = False
        outputs = call(adapter, *given, mask) if call else [back(*given, mask)]
        for x in outputs:
            assert x.isfinite().all()
            assert_same([x[1]], [x[2]])
            assert not torch.allclose(x[1], x[0])
        sum(x.square().sum() for x in outputs).backward()
    gradients = [p.grad for part in (adapter, back) for p in part.parameters()]
    assert all(own.isfinite().all() for own in gradients if own is not None)


def test_some_cells_are_those_of_the_full_canvas_and_all_differ(adapter):
    inputs = sequences(3)
    row, y, x = (torch.randint(0, n, (200,)) for n in (3, 30, 30))
    full = adapter(*inputs)
    picked = adapter.cells(adapter.read(*inputs), row, y, x)
    assert_same(picked, [z.unflatten(1, (30, 30))[row, y, x] for z in full])
    assert all(len(torch.unique(z[0].detach(), dim=0)) == CELLS for z in full)


def test_the_first_gradient_reaches_every_parameter_and_the_reader(adapter):
    hidden, mask = sequences(4)
    hidden.requires_grad_()
    torch.manual_seed(2)
    outputs = all_outputs(adapter, hidden, mask)
    sum((x * torch.randn_like(x)).sum() for x in outputs).backward()
    for name, p in adapter.named_parameters():
        assert p.grad is not None, name
        assert p.grad.norm() > 0, name
    assert ((hidden.grad.norm(dim=-1) > 0) == mask).all()


def test_the_first_gradient_reaches_the_way_back_and_both_latents(back):
    z_H, z_L, mask = (z.detach() for z in latents())
    z_H.requires_grad_(), z_L.requires_grad_()
    prefix = back(z_H, z_L, mask)
    (prefix * torch.randn_like(prefix)).sum().backward()
    assert all(p.grad.norm() > 0 for p in back.parameters())
    for z in (z_H, z_L):
        assert ((z.grad.norm(dim=-1) > 0) == mask).all()


def test_aligned_states_stay_on_their_cell_and_are_zero_where_there_is_none():
    torch.manual_seed(0)
    adapter = AlignedAdapter(HIDDEN, WIDTH)
    hidden = torch.randn(6, HIDDEN, requires_grad=True)
    there = torch.tensor([1, 1, 0, 1, 0, 1]).bool()
    z, injection = adapter(torch.where(there[:, None], hidden, float("nan")), there)
    assert ((z.norm(dim=1) > 0) == there).all()
    assert ((injection.norm(dim=1) > 0) == there).all()
    z[3].sum().backward(retain_graph=True)
    assert hidden.grad.norm(dim=1).nonzero()[:, 0].tolist() == [3]
    (z.square().sum() + injection.square().sum()).backward()
    assert all(p.grad.norm() > 0 for p in adapter.parameters())
