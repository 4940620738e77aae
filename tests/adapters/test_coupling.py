"""The adapters between a real reader and a real TRM: small, and trained from the first step on."""

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from arctrm.adapters import (
    DraftAdapter,
    LatentToTextAdapter,
    TextToLatentAdapter,
    cell_table,
    count_parameters,
    place_hidden,
)
from arctrm.config import TRMConfig
from arctrm.trm.model import TRM, Latents
from arctrm.trm.packing import sequences, token_map

HIDDEN, WIDTH, SLOTS, CONTEXT = 32, 16, 7, 4
SIDE = 3


def test_all_adapters_of_an_8b_reader_stay_under_fifteen_million():
    sizes = count_parameters(
        {
            "text_to_latent": TextToLatentAdapter(),
            "draft": DraftAdapter(),
            "latent_to_text": LatentToTextAdapter(),
        }
    )
    assert sizes["total"] == sum(sizes[name] for name in sizes if name != "total")
    assert sizes["total"] < 15e6
    assert min(sizes.values()) > 1e6


@pytest.fixture
def parts():
    torch.manual_seed(0)
    reader = LlamaModel(
        LlamaConfig(
            vocab_size=16,
            hidden_size=HIDDEN,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
    )
    config = TRMConfig(
        hidden_size=WIDTH, num_heads=2, num_layers=1, H_cycles=2, L_cycles=1, num_prefix_slots=SLOTS
    )
    trm = TRM(config, 2)
    with torch.no_grad():
        trm.q_head.weight.normal_()
    return {
        "reader": reader,
        "text_to_latent": TextToLatentAdapter(
            HIDDEN, WIDTH, num_context_slots=CONTEXT, num_heads=2
        ),
        "draft": DraftAdapter(HIDDEN, WIDTH),
        "latent_to_text": LatentToTextAdapter(WIDTH, HIDDEN, num_prefix=2, num_heads=2),
        "trm": trm,
    }


def attempt(parts, text, use, prefix=None):
    """One attempt on two rows of 3x3 cells: logits, and the prefix for the next attempt."""
    trm, to_latent = parts["trm"], parts["text_to_latent"]
    embedded = parts["reader"].embed_tokens(text)
    if prefix is not None:
        embedded = torch.cat((prefix, embedded), dim=1)
    hidden = parts["reader"](inputs_embeds=embedded).last_hidden_state[:, -text.shape[1] :]
    lengths = torch.full((2,), SLOTS + SIDE**2)
    canvas = token_map(lengths, torch.full((2,), SIDE), int(lengths.sum()), 100, SLOTS)
    is_cell = canvas.slot >= SLOTS
    zero = torch.zeros(2, dtype=torch.long)
    slots, condition = trm.prefix(torch.tensor([0, 1]), zero, zero)
    read = to_latent.resample(hidden)
    if "context" in use:
        slots = torch.cat((slots[:, :-CONTEXT], slots[:, -CONTEXT:] + read.context), dim=1)
    x = trm.embed(torch.zeros_like(canvas.row), canvas.row, canvas.first, slots, condition)
    z_H, z_L = trm.initial_latents(len(canvas.row))
    if "latents" in use:
        more = to_latent.gather(read, canvas.row, canvas.y, canvas.x, is_cell)
        z_H, z_L = z_H + more[0], z_L + more[1]
    if "draft" in use:
        row = torch.arange(2).repeat_interleave(SIDE**2)
        place = torch.arange(SIDE**2).repeat(2)
        table = cell_table(row, torch.ones_like(row), place // SIDE, place % SIDE, 2)
        states = hidden[:, : SIDE**2].flatten(0, 1)
        cells = parts["draft"](
            *place_hidden(states, table, canvas.row, canvas.y, canvas.x, is_cell)
        )
        z_H, z_L, x = z_H + cells.z_H, z_L + cells.z_L, x + cells.injection
    seq = sequences(canvas, trm.config, torch.float32)
    for _ in range(2):  # the second step starts from detached latents
        (z_H, z_L), said = trm.supervision_step(Latents(z_H, z_L), x, seq, canvas.first)
    return said.logits, parts["latent_to_text"].packed(z_H, z_L, canvas.row, 2, is_cell)


@pytest.fixture
def text():
    return torch.randint(0, 16, (2, 12), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("use", "trained"), [("context", "text_to_latent"), ("draft", "draft")])
def test_the_loss_of_the_last_step_trains_adapter_and_reader(parts, text, use, trained):
    attempt(parts, text, use)[0].logsumexp(-1).sum().backward()
    for name in (trained, "reader", "trm"):
        assert sum(p.grad.norm() for p in parts[name].parameters() if p.grad is not None) > 0, name


@pytest.mark.parametrize("use", ["context", "draft"])
def test_the_way_back_is_trained_by_the_second_attempt(parts, text, use):
    _, prefix = attempt(parts, text, use)
    attempt(parts, text, use, prefix)[0].logsumexp(-1).sum().backward()
    for name, p in parts["latent_to_text"].named_parameters():
        assert p.grad is not None, name
        assert p.grad.norm() > 0, name


@torch.no_grad()
@pytest.mark.parametrize("use", ["context", "latents", "draft"])
def test_another_text_gives_other_logits_and_no_path_none(parts, text, use):
    other = (text + 1) % 16
    assert (attempt(parts, text, use)[0] - attempt(parts, other, use)[0]).abs().max() > 1e-4
    assert torch.equal(attempt(parts, text, "")[0], attempt(parts, other, "")[0])
