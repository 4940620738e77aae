"""Draft and refine: the state of a reader's cell arrives at that cell of TRM, and only there."""

import pytest
import torch

from arctrm.adapters import DraftAdapter, cell_table, place_hidden
from arctrm.adapters.draft import INPUT, OUTPUT
from arctrm.errors import ConfigError
from arctrm.trm.packing import token_map

HIDDEN, WIDTH, SLOTS = 24, 16, 3
NONE = -1
GRIDS = [((2, 3), (3, 2)), ((30, 30), (1, 4)), ((1, 1), None)]
"""(size of the input, size of the drafted output) of each row."""


@pytest.fixture
def adapter():
    torch.manual_seed(0)
    return DraftAdapter(HIDDEN, WIDTH)


def reader_tokens():
    """Tokens (row, kind, y, x) of three rows as a reader writes them, separators included."""
    tokens = []
    for row, grids in enumerate(GRIDS):
        for kind, size in enumerate(grids):
            height, width = size or (0, 0)
            for y in range(height):
                tokens += [(row, kind, y, x) for x in range(width)]
                tokens.append((row, NONE, y, width))
    return torch.tensor(tokens)


def trm_tokens(spare=5):
    """A packed batch of the three rows on canvases that are larger than the grids."""
    sides = torch.tensor([(4, 4), (30, 30), (2, 5)])
    lengths = SLOTS + sides.prod(1)
    return token_map(lengths, sides[:, 1], int(lengths.sum()) + spare, 1000, SLOTS)


@pytest.fixture
def placed():
    tokens, canvas = reader_tokens(), trm_tokens()
    hidden = torch.randn(len(tokens), HIDDEN, generator=torch.Generator().manual_seed(0))
    table = cell_table(*tokens.unbind(1), num_rows=3)
    is_cell = canvas.slot >= SLOTS
    return (
        tokens,
        canvas,
        hidden,
        place_hidden(hidden, table, canvas.row, canvas.y, canvas.x, is_cell),
    )


def test_every_cell_gets_the_hidden_state_of_its_own_token(placed):
    tokens, canvas, hidden, got = placed
    by_place = {tuple(place): hidden[i] for i, place in enumerate(tokens.tolist())}
    for t in range(len(canvas.row)):
        place = (int(canvas.row[t]), int(canvas.y[t]), int(canvas.x[t]))
        kinds = (
            (INPUT, got.input_hidden, got.has_input),
            (OUTPUT, got.output_hidden, got.has_output),
        )
        for kind, states, has in kinds:
            key = (place[0], kind, *place[1:])
            expected = by_place.get(key) if canvas.slot[t] >= SLOTS else None
            assert bool(has[t]) == (expected is not None)
            assert torch.equal(states[t], torch.zeros(HIDDEN) if expected is None else expected)


def test_no_cell_of_the_reader_is_lost(placed):
    _, _, _, got = placed
    assert int(got.has_input.sum()) == 2 * 3 + 900 + 1
    assert int(got.has_output.sum()) == 3 * 2 + 4


def test_prefix_slots_and_spare_tokens_get_nothing(placed):
    _, canvas, _, got = placed
    nowhere = (canvas.slot < SLOTS) | (canvas.row >= 3)
    assert not (got.has_input | got.has_output)[nowhere].any()


def test_the_later_of_two_tokens_for_one_cell_holds_it():
    row = kind = y = x = torch.zeros(4, dtype=torch.long)
    assert cell_table(row, kind, y, x, 1)[0, INPUT, 0, 0] == 3


def test_tokens_outside_the_canvas_and_of_no_row_are_left_out():
    row = torch.tensor([0, 0, 2, -1, 0])
    kind = torch.tensor([OUTPUT, OUTPUT, OUTPUT, OUTPUT, 2])
    y, x = torch.tensor([30, 0, 0, 0, 0]), torch.tensor([0, -1, 0, 0, 0])
    assert (cell_table(row, kind, y, x, 2) == -1).all()


def test_a_reader_without_tokens_places_nothing():
    empty = torch.zeros(0, dtype=torch.long)
    canvas = trm_tokens()
    table = cell_table(empty, empty, empty, empty, 3)
    got = place_hidden(torch.zeros(0, HIDDEN), table, canvas.row, canvas.y, canvas.x)
    assert not (got.has_input | got.has_output).any()


def test_output_goes_to_z_H_input_to_z_L_and_both_to_the_injection(adapter, placed):
    got = adapter(*placed[-1])
    assert got.z_H.shape == got.z_L.shape == got.injection.shape == (len(placed[1].row), WIDTH)
    has_input, has_output = placed[-1].has_input, placed[-1].has_output
    assert torch.equal(got.z_L.abs().sum(1) > 0, has_input)
    assert torch.equal(got.z_H.abs().sum(1) > 0, has_output)
    assert torch.equal(got.injection.abs().sum(1) > 0, has_input | has_output)


@pytest.mark.parametrize("filler", [100.0, float("nan"), float("inf")])
def test_a_state_where_there_is_no_cell_changes_nothing(adapter, placed, filler):
    whole = placed[-1]
    spoiled = whole._replace(
        input_hidden=torch.where(whole.has_input[:, None], whole.input_hidden, filler),
        output_hidden=torch.where(whole.has_output[:, None], whole.output_hidden, filler),
    )
    for a, b in zip(adapter(*spoiled), adapter(*whole), strict=True):
        assert torch.equal(a, b)


def test_a_cell_sees_no_other_cell(adapter, placed):
    """The leak rule: what a row drafts reaches that row's cell only."""
    tokens, canvas, hidden, before = placed
    changed = hidden.clone()
    token = tokens.tolist().index([0, OUTPUT, 2, 1])
    changed[token] += 1
    table = cell_table(*tokens.unbind(1), num_rows=3)
    after = place_hidden(changed, table, canvas.row, canvas.y, canvas.x, canvas.slot >= SLOTS)
    differs = sum(
        (a - b).abs().sum(1) for a, b in zip(adapter(*after), adapter(*before), strict=True)
    )
    place = (canvas.row == 0) & (canvas.y == 2) & (canvas.x == 1) & (canvas.slot >= SLOTS)
    assert torch.equal(differs > 0, place)


def test_projecting_before_placing_is_the_same(adapter, placed):
    """For wide readers: gather D numbers per token instead of H."""
    tokens, canvas, hidden, got = placed
    table = cell_table(*tokens.unbind(1), num_rows=3)
    narrow = place_hidden(
        adapter.project(hidden), table, canvas.row, canvas.y, canvas.x, canvas.slot >= SLOTS
    )
    torch.testing.assert_close(narrow.output_hidden, adapter.project(got.output_hidden))


def test_a_cell_alone_says_what_it_says_among_many(adapter, placed):
    together = adapter(*placed[-1])
    for t in (SLOTS, SLOTS + 9, SLOTS + 30):
        alone = adapter(*(x[t : t + 1] for x in placed[-1]))
        for a, b in zip(alone, together, strict=True):
            torch.testing.assert_close(a[0], b[t], atol=1e-5, rtol=1e-5)


def test_the_first_gradient_reaches_every_parameter_and_every_cells_state(adapter, placed):
    tokens, canvas, hidden, _ = placed
    hidden = hidden.clone().requires_grad_()
    table = cell_table(*tokens.unbind(1), num_rows=3)
    got = adapter(
        *place_hidden(hidden, table, canvas.row, canvas.y, canvas.x, canvas.slot >= SLOTS)
    )
    torch.manual_seed(2)
    sum((x * torch.randn_like(x)).sum() for x in got).backward()
    for name, p in adapter.named_parameters():
        assert p.grad is not None, name
        assert p.grad.norm() > 0, name
    assert torch.equal(hidden.grad.norm(dim=1) > 0, tokens[:, 1] != NONE)


def test_a_reader_of_another_width_is_refused_naming_both(adapter):
    has = torch.ones(2, dtype=torch.bool)
    with pytest.raises(ConfigError, match=r"\[2, 99\].*width 24"):
        adapter(torch.randn(2, 99), torch.randn(2, HIDDEN), has, has)
