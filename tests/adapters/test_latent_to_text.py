"""TRM -> reader: padded and packed latents give the same prefix, rows are independent."""

import pytest
import torch

from arctrm.adapters import LatentToTextAdapter
from arctrm.errors import ConfigError

HIDDEN, WIDTH, PREFIX = 48, 32, 3


@pytest.fixture
def adapter():
    torch.manual_seed(0)
    return LatentToTextAdapter(WIDTH, HIDDEN, num_prefix=PREFIX, num_heads=4)


def latents(rows=16, length=7):
    generator = torch.Generator().manual_seed(1)
    z_H, z_L = torch.randn(2, rows, length, WIDTH, generator=generator)
    lengths = torch.arange(rows) % length + 1
    return z_H, z_L, torch.arange(length) < lengths[:, None]


def assert_same(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_the_prefix_has_the_readers_width_and_the_size_of_its_embeddings(adapter):
    prefix = adapter(*latents())
    assert prefix.shape == (16, PREFIX, HIDDEN)
    assert 0.005 < prefix.std() < 0.08


def test_no_mask_reads_every_cell(adapter):
    z_H, z_L, mask = latents()
    assert_same(adapter(z_H, z_L), adapter(z_H, z_L, torch.ones_like(mask)))


def test_packed_latents_give_the_same_prefix(adapter):
    z_H, z_L, mask = latents(5)
    row = torch.arange(5)[:, None].expand_as(mask)[mask]
    shuffled = torch.randperm(len(row))
    got = adapter.packed(z_H[mask][shuffled], z_L[mask][shuffled], row[shuffled], 5)
    assert_same(got, adapter(z_H, z_L, mask))


def test_packed_attention_is_the_attention_of_torch(adapter):
    """The same block over padded rows with torch's own kernel."""
    from arctrm.adapters.layers import dense, packed

    keys, mask = latents(4)[0], latents(4)[2]
    queries = adapter.queries.expand(4, -1, -1)
    row = torch.arange(4).repeat_interleave(mask.shape[1])
    got = adapter.block(queries, keys.flatten(0, 1), packed(row, mask.flatten()))
    assert_same(got, adapter.block(queries, keys, dense(mask)))


@pytest.mark.parametrize("filler", [100.0, float("nan"), float("inf")])
def test_what_lies_under_the_padding_changes_nothing(adapter, filler):
    z_H, z_L, mask = latents()
    spoiled = [torch.where(mask[..., None], z, filler) for z in (z_H, z_L)]
    assert_same(adapter(*spoiled, mask), adapter(z_H, z_L, mask))


def test_tokens_of_no_row_are_not_read(adapter):
    z_H, z_L, _ = latents(2)
    flat_H, flat_L = z_H.flatten(0, 1), z_L.flatten(0, 1)
    row = torch.arange(2).repeat_interleave(7)
    spare = torch.full((4, WIDTH), float("nan"))
    got = adapter.packed(
        torch.cat((flat_H, spare)),
        torch.cat((flat_L, spare)),
        torch.cat((row, torch.arange(2, 6))),
        2,
    )
    assert_same(got, adapter(z_H, z_L))


def test_a_mask_cannot_bring_back_tokens_of_no_row(adapter):
    z_H, z_L, _ = latents(1)
    row = torch.tensor([0, 0, 0, 1, 1, 9, 9])
    got = adapter.packed(z_H[0], z_L[0], row, 1, torch.ones(7, dtype=torch.bool))
    assert_same(got, adapter(z_H[:, :3], z_L[:, :3]))


def test_a_row_alone_says_what_it_says_among_sixteen(adapter):
    z_H, z_L, mask = latents(16)
    together = adapter(z_H, z_L, mask)
    for row in range(16):
        part = slice(row, row + 1)
        assert_same(adapter(z_H[part], z_L[part], mask[part]), together[part])


def test_both_latents_matter(adapter):
    z_H, z_L, mask = latents()
    prefix = adapter(z_H, z_L, mask)
    for other in (adapter(-z_H, z_L, mask), adapter(z_H, -z_L, mask)):
        assert (other - prefix).norm() > 0.1 * prefix.norm()


def test_a_row_without_cells_gives_a_constant(adapter):
    z_H, z_L, mask = latents(4)
    mask[1] = mask[2] = False
    prefix = adapter(z_H, z_L, mask)
    assert prefix.isfinite().all()
    assert_same(prefix[1], prefix[2])
    assert not torch.allclose(prefix[1], prefix[0])


def test_attention_to_a_single_cell_does_not_overflow(adapter):
    z_H, z_L, mask = latents()
    with torch.no_grad():
        adapter.block.sharpness.fill_(1000.0)
    assert adapter(z_H * 1e6, z_L * 1e6, mask).isfinite().all()


def test_the_first_gradient_reaches_every_parameter_and_both_latents(adapter):
    z_H, z_L, mask = latents()
    z_H.requires_grad_(), z_L.requires_grad_()
    torch.manual_seed(2)
    prefix = adapter(z_H, z_L, mask)
    (prefix * torch.randn_like(prefix)).sum().backward()
    for name, p in adapter.named_parameters():
        assert p.grad is not None, name
        assert p.grad.norm() > 0, name
    for z in (z_H, z_L):
        assert (z.grad.norm(dim=-1)[mask] > 0).all()
        assert (z.grad[~mask] == 0).all()


def test_the_gradient_of_packed_attention_is_that_of_torch(adapter):
    from arctrm.adapters.layers import dense, packed

    mask = latents(4)[2]
    row = torch.arange(4).repeat_interleave(mask.shape[1])
    gradients = []
    for attend, shape in ((packed(row, mask.flatten()), (28, WIDTH)), (dense(mask), (4, 7, WIDTH))):
        keys = latents(4)[0].reshape(shape).requires_grad_()
        adapter.zero_grad()
        adapter.block(adapter.queries.expand(4, -1, -1), keys, attend).square().sum().backward()
        gradients.append((keys.grad.flatten(), adapter.block.null.grad, adapter.queries.grad))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_a_trm_of_another_width_is_refused_naming_both(adapter):
    with pytest.raises(ConfigError, match=r"\[6, 16\].*width 32"):
        adapter(torch.randn(2, 3, 16), torch.randn(2, 3, 16))
