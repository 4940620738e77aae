"""A row means the same alone, packed with others, in any order and on either layout's path."""

import pytest
import torch

from arctrm.config import TRMConfig
from arctrm.trm.carry import ReferenceTRM
from arctrm.trm.layers import rotary_tables
from arctrm.trm.model import TRM
from arctrm.trm.packing import DUMMY, longest_row, sequences, token_map

SMALL = {"hidden_size": 16, "num_heads": 2, "num_layers": 1, "H_cycles": 2, "L_cycles": 1}
CONFIGS = {
    "compact": TRMConfig(**SMALL),
    "reference": TRMConfig(**SMALL, layout="reference", condition_cells=False, rope_base=10000),
}
SHAPES = [(3, 4), (1, 1), (30, 30), (7, 2), (5, 5)]


def random_model(config):
    """Every parameter random: an untrained halting head says the same whatever it sees."""
    torch.manual_seed(0)
    model = TRM(config, 5)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * p.shape[-1] ** -0.5)
    return model


def make_rows(layout):
    """(codes, task, dihedral, colour flag) of five pairs."""
    generator = torch.Generator().manual_seed(1)
    shapes = SHAPES if layout == "compact" else [(30, 30)] * 3
    return [
        (torch.randint(0, 12, shape, generator=generator), i, (3 * i) % 8, i % 2)
        for i, shape in enumerate(shapes)
    ]


@torch.no_grad()
def run_packed(model, rows, spare_tokens, absent=0, steps=2):
    """Per row (logits of its cells, q_halt) after some supervision steps on one packed batch."""
    slots = model.config.num_prefix_slots
    lengths = torch.tensor([slots + codes.numel() for codes, *_ in rows] + [0] * absent)
    widths = torch.tensor([codes.shape[1] for codes, *_ in rows] + [0] * absent)
    num_tokens = int(lengths.sum()) + spare_tokens
    tokens = token_map(lengths, widths, num_tokens, longest_row(model.config), slots)
    flat = torch.cat([torch.nn.functional.pad(c.flatten(), (slots, 0)) for c, *_ in rows])
    codes = torch.nn.functional.pad(flat, (0, spare_tokens))
    kinds = [torch.tensor([row[i] for row in rows] + [0] * absent) for i in (1, 2, 3)]
    x = model.embed(codes, tokens.row, tokens.first, *model.prefix(*kinds))
    seq = sequences(tokens, model.config, torch.float32)
    latents = model.initial_latents(num_tokens)
    for _ in range(steps):
        latents, prediction = model.supervision_step(latents, x, seq, tokens.first)
    cells = tokens.slot >= slots
    return [
        (prediction.logits[(tokens.row == i) & cells], prediction.q_halt[i])
        for i in range(len(rows))
    ]


def assert_same(a, b):
    torch.testing.assert_close(a[0], b[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(a[1], b[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", ["compact", "reference"])
def test_a_row_packed_with_others_says_what_it_says_alone(layout):
    model, rows = random_model(CONFIGS[layout]), make_rows(layout)
    packed = run_packed(model, rows, spare_tokens=0)
    assert (packed[0][0][:1] - packed[1][0][:1]).abs().max() > 1e-2  # rows do differ
    for row, together in zip(rows, packed, strict=True):
        assert_same(run_packed(model, [row], spare_tokens=0)[0], together)


@pytest.mark.parametrize("layout", ["compact", "reference"])
def test_order_spare_tokens_and_absent_rows_change_nothing(layout):
    model, rows = random_model(CONFIGS[layout]), make_rows(layout)
    packed = run_packed(model, rows, spare_tokens=0)
    backwards = run_packed(model, rows[::-1], spare_tokens=1234, absent=3)[::-1]
    for a, b in zip(packed, backwards, strict=True):
        assert_same(a, b)


def test_the_dense_reference_path_equals_the_packed_path():
    model, rows = random_model(CONFIGS["reference"]), make_rows("reference")
    packed = run_packed(model, rows, spare_tokens=50, steps=1)
    dense = ReferenceTRM(model).eval()
    batch = {
        "inputs": torch.stack([codes.flatten() for codes, *_ in rows]),
        "puzzle_identifiers": torch.tensor([row[1] for row in rows]),
    }
    with torch.no_grad():
        _, outputs = dense(dense.initial_carry(batch), batch)
    for i, (logits, q_halt) in enumerate(packed):
        assert_same((outputs["logits"][i], outputs["q_halt_logits"][i]), (logits, q_halt))


def test_tokens_of_a_hand_laid_batch():
    tokens = token_map(torch.tensor([8, 0, 5]), torch.tensor([3, 0, 2]), 20, 6, 2)
    assert tokens.row.tolist()[:13] == [0] * 8 + [2] * 5
    assert (tokens.row[13:] >= 3).all()
    assert tokens.slot.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 0]
    assert tokens.y.tolist()[:13] == [0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1]
    assert tokens.x.tolist()[:13] == [0, 0, 0, 1, 2, 0, 1, 2, 0, 0, 0, 1, 0]
    assert tokens.first.tolist() == [0, 20, 8]
    assert tokens.offsets.tolist() == [0, 8, 8, 13, 19, 20, 20, 20]


@pytest.mark.parametrize("lengths", [[0, 0], [908, 908], [9, 500], [908, 140]])
def test_dummies_fill_what_rows_leave_and_none_is_too_long(lengths):
    tokens = token_map(torch.tensor(lengths), torch.tensor([1, 1]), 2048, 908, 8)
    sizes = tokens.offsets.diff()
    assert tokens.offsets[-1] == 2048
    assert sizes[:2].tolist() == lengths
    assert (sizes >= 0).all()
    assert (sizes[2:6] <= DUMMY).all()
    assert (sizes[6:] <= 908).all()
    assert len(sizes) == 2 + 4 + 2  # the shape depends on the budget only
    assert (sizes[6:] == 0).all() or sum(lengths) + 4 * DUMMY < 2048  # long ones come last


def cell_tables(height, width):
    """Rotary tables of every cell and of the prefix slots of one canvas."""
    config = CONFIGS["compact"]
    slots = config.num_prefix_slots
    length = torch.tensor([slots + height * width])
    tokens = token_map(length, torch.tensor([width]), int(length), longest_row(config), slots)
    seq = sequences(tokens, config, torch.float32)
    tables = torch.cat((seq.cos, seq.sin), -1)[:, 0]
    return tables[slots:].view(height, width, -1), tables[:slots]


def test_cropping_the_canvas_moves_no_position():
    small, small_slots = cell_tables(5, 7)
    large, large_slots = cell_tables(30, 30)
    assert torch.equal(small, large[:5, :7])
    assert torch.equal(small_slots, large_slots)
    assert large.flatten(0, 1).unique(dim=0).shape[0] == 900


def test_the_reference_layout_counts_slots_and_cells_on_one_axis():
    config = CONFIGS["reference"]
    length = torch.tensor([config.num_prefix_slots + 900])
    tokens = token_map(length, torch.tensor([30]), int(length), int(length), 8)
    seq = sequences(tokens, config, torch.float32)
    cos, _ = rotary_tables(torch.arange(908)[:, None], 8, 10000)
    assert torch.equal(seq.cos, cos)


def test_the_longest_row_is_a_full_canvas():
    assert longest_row(TRMConfig(num_prefix_slots=16)) == 916
