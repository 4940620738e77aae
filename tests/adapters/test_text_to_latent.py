"""Reader -> TRM: only tokens under the mask count, rows are independent, cells are forward's."""

import pytest
import torch

from arctrm.adapters import TextToLatentAdapter
from arctrm.errors import ConfigError

HIDDEN, WIDTH, CELLS, SLOTS = 48, 32, 900, 5


@pytest.fixture
def adapter():
    torch.manual_seed(0)
    return TextToLatentAdapter(HIDDEN, WIDTH, CELLS, num_context_slots=SLOTS, num_heads=4)


def sequences(rows=16, length=9):
    """Hidden states of rows of different lengths (1 .. length), and their mask."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(rows, length, HIDDEN, generator=generator)
    lengths = torch.arange(rows) % length + 1
    return hidden, torch.arange(length) < lengths[:, None]


def all_outputs(adapter, hidden, mask=None):
    return (*adapter(hidden, mask), adapter.context(hidden, mask))


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_shapes_are_those_of_the_contract(adapter):
    hidden, mask = sequences(3)
    z_H, z_L, context = all_outputs(adapter, hidden, mask)
    assert z_H.shape == z_L.shape == (3, CELLS, WIDTH)
    assert context.shape == (3, SLOTS, WIDTH)


def test_one_vector_per_row_is_a_sequence_of_one_token(adapter):
    hidden = sequences(3)[0][:, 0]
    assert_same(all_outputs(adapter, hidden), all_outputs(adapter, hidden[:, None]))


@pytest.mark.parametrize("filler", [100.0, float("nan"), float("inf")])
def test_what_lies_under_the_padding_changes_nothing(adapter, filler):
    hidden, mask = sequences()
    spoiled = torch.where(mask[..., None], hidden, filler)
    assert_same(all_outputs(adapter, spoiled, mask), all_outputs(adapter, hidden, mask))


def test_longer_padding_changes_nothing(adapter):
    hidden, mask = sequences()
    pad = torch.nn.functional.pad
    longer = all_outputs(adapter, pad(hidden, (0, 0, 0, 7)), pad(mask, (0, 7)))
    assert_same(longer, all_outputs(adapter, hidden, mask))


def test_a_row_alone_says_what_it_says_among_sixteen(adapter):
    hidden, mask = sequences(16)
    together = all_outputs(adapter, hidden, mask)
    for row in range(16):
        alone = all_outputs(adapter, hidden[row : row + 1], mask[row : row + 1])
        assert_same(alone, [x[row : row + 1] for x in together])


def test_different_tokens_give_different_context_and_latents(adapter):
    hidden, mask = sequences(2)
    mask[:] = True
    for x in all_outputs(adapter, hidden, mask):
        assert (x[0] - x[1]).norm() > 0.3 * x[0].norm()


def test_long_texts_that_share_a_mean_still_differ_by_row_and_slot():
    """Contexts that start alike for every task are what collapses in training."""
    torch.manual_seed(0)
    adapter = TextToLatentAdapter(256, 128, CELLS)
    hidden = torch.randn(1, 1, 256) + 0.5 * torch.randn(2, 300, 256)
    one, other = adapter.context(hidden).detach()
    assert (one - other).norm() > 0.1 * one.norm()
    assert (one - one.mean(0)).norm() > 0.2 * one.norm()


def test_a_row_without_tokens_gives_a_constant(adapter):
    hidden, mask = sequences(4)
    mask[1] = mask[2] = False
    for x in all_outputs(adapter, hidden, mask):
        assert x.isfinite().all()
        assert torch.equal(x[1], x[2])
        assert not torch.allclose(x[1], x[0])


def test_a_batch_without_any_token_has_finite_gradients(adapter):
    hidden, mask = sequences(2)
    hidden.requires_grad_()
    outputs = all_outputs(adapter, hidden, torch.zeros_like(mask))
    sum(x.square().sum() for x in outputs).backward()
    assert hidden.grad.abs().sum() == 0
    assert all(p.grad.isfinite().all() for p in adapter.parameters() if p.grad is not None)


def test_cells_of_a_packed_batch_are_those_of_the_full_canvas(adapter):
    hidden, mask = sequences(3)
    row, y, x = (torch.randint(0, n, (200,)) for n in (3, 30, 30))
    full = [z.unflatten(1, (30, 30))[row, y, x] for z in adapter(hidden, mask)]
    assert_same(adapter.cells(hidden, mask, row, y, x), full)


def test_every_cell_has_its_own_latents(adapter):
    z_H, z_L = adapter(*sequences(1))
    for z in (z_H[0], z_L[0]):
        assert len(torch.unique(z.detach(), dim=0)) == CELLS


def test_tokens_that_are_no_cell_of_a_row_get_nothing(adapter):
    read = adapter.resample(*sequences(2))
    row, y, x = torch.tensor([0, 1, 2, 7]), torch.tensor([3, 0, 5, 0]), torch.tensor([4, 0, 5, 0])
    is_cell = torch.tensor([True, False, True, True])
    for z in adapter.gather(read, row, y, x, is_cell):
        assert (z.abs().sum(dim=1) > 0).tolist() == [True, False, False, False]


def test_the_first_gradient_reaches_every_parameter_and_the_reader(adapter):
    hidden, mask = sequences(4)
    hidden.requires_grad_()
    torch.manual_seed(2)
    outputs = all_outputs(adapter, hidden, mask)
    sum((x * torch.randn_like(x)).sum() for x in outputs).backward()
    for name, p in adapter.named_parameters():
        assert p.grad is not None, name
        assert p.grad.norm() > 0, name
    assert (hidden.grad.norm(dim=-1)[mask] > 0).all()
    assert (hidden.grad[~mask] == 0).all()


def test_the_start_is_small_but_not_zero(adapter):
    z_H, z_L, context = all_outputs(adapter, *sequences())
    for x in (z_H, z_L, context * WIDTH**0.5):
        assert 0.02 < x.std() < 0.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"trm_seq_len": 901}, "trm_seq_len = 901"),
        ({"trm_seq_len": 0}, "trm_seq_len = 0"),
        ({"num_heads": 5}, "num_heads = 5"),
    ],
)
def test_impossible_sizes_are_refused_by_name(arguments, message):
    with pytest.raises(ConfigError, match=message):
        TextToLatentAdapter(HIDDEN, WIDTH, **arguments)


def test_a_reader_of_another_width_is_refused_naming_both(adapter):
    with pytest.raises(ConfigError, match=r"\[2, 3, 64\].*width 48"):
        adapter.context(torch.randn(2, 3, 64))


def test_a_mask_of_another_shape_is_refused(adapter):
    with pytest.raises(ConfigError, match=r"\[2, 4\]"):
        adapter.context(torch.randn(2, 3, HIDDEN), torch.ones(2, 4, dtype=torch.bool))
