"""The grammar allows exactly the grids: compared with the definition, string by string."""

import itertools

import numpy as np
import pytest
import torch
from plain_reader import TOKENS, continuations, spelled

from arctrm.reader import grammar
from arctrm.reader.grammar import END, MAX_OUTPUT_TOKENS, ROW_END


def state_after(choices, max_side=30):
    state = grammar.start(1)
    for choice in choices:
        assert grammar.allowed(state, max_side)[0, choice]
        state = grammar.advance(state, torch.tensor([choice]))
    return state


def random_grids(count=30, seed=0):
    rng = np.random.default_rng(seed)
    sides = [*rng.integers(1, 31, size=(count, 2)), (1, 1), (30, 30), (1, 30), (30, 1)]
    return [rng.integers(10, size=side).astype(np.uint8) for side in sides]


@pytest.mark.parametrize("max_side", [1, 2, 3])
def test_exactly_the_continuations_of_well_formed_grids_are_allowed(max_side):
    """Every reachable string of two colours, to its end."""
    reached, frontier = 0, [[]]
    while frontier:
        choices = frontier.pop()
        given = (
            grammar.allowed(state_after(choices, max_side), max_side)[0].nonzero()[:, 0].tolist()
        )
        if choices and choices[-1] == END:
            assert given == [END]
            continue
        assert given == continuations(choices, max_side)
        reached += 1
        frontier += [[*choices, choice] for choice in given if choice not in range(2, 10)]
    assert reached > max_side**2


@pytest.mark.parametrize("max_side", [30, 4])
def test_random_walks_under_the_grammar_spell_grids(max_side):
    torch.manual_seed(0)
    state = grammar.start(64)
    walks = []
    while not state.finished.all():
        assert len(walks) < MAX_OUTPUT_TOKENS
        logits = torch.randn(64, 12)
        choice = grammar.log_probabilities(logits, state, max_side).exp().multinomial(1)[:, 0]
        state = grammar.advance(state, choice)
        walks.append(choice)
    for walk in torch.stack(walks, dim=1).tolist():
        grid = grammar.decode_choices(walk[: walk.index(END) + 1])
        assert max(grid.shape) <= max_side
        assert spelled(grid) == walk[: walk.index(END) + 1]


def test_a_grid_survives_its_tokens_at_every_size():
    for grid in random_grids():
        ids, y, x = grammar.encode_grid(grid, TOKENS)
        height, width = grid.shape
        back = grammar.decode_grid(ids, TOKENS)
        assert back.dtype == np.uint8
        assert (back == grid).all()
        assert len(ids) == len(y) == len(x) == height * (width + 1) + 1
        assert ids[-1] == TOKENS.end and (y[-1], x[-1]) == (height, 0)  # noqa: PT018
        ends = ids == TOKENS.row_end
        assert (x[ends] == width).all()
        cells = ids < 0
        cells[:-1] = ~ends[:-1]
        assert (np.array(TOKENS.colours)[grid[y[cells], x[cells]]] == ids[cells]).all()


def test_encoded_states_are_those_of_the_walk():
    for grid in random_grids(6):
        choices, states = grammar.encode_choices(grid)
        for place, choice in enumerate(choices.tolist()):
            if place == 0:
                state = grammar.start(1)
            for name in ("y", "x", "width", "finished"):
                assert getattr(states, name)[place] == getattr(state, name)[0]
            state = grammar.advance(state, torch.tensor([choice]))
        assert state.finished[0]


@pytest.mark.parametrize(
    "choices",
    [
        [],
        [END],
        [ROW_END, END],
        [3],
        [3, ROW_END],
        [3, END],
        [3, ROW_END, 4, 4, ROW_END, END],
        [3, 3, ROW_END, 4, ROW_END, END],
        [3, ROW_END, END, END],
        [3, ROW_END, END, 3, ROW_END, END],
        [*[1] * 31, ROW_END, END],
        [*[1, ROW_END] * 31, END],
        [3, -1, ROW_END, END],
        [3, END, ROW_END, END],
    ],
)
def test_what_spells_no_grid_decodes_to_none(choices):
    assert grammar.decode_choices(choices) is None


def test_other_tokens_of_the_vocabulary_spell_no_grid():
    assert grammar.decode_grid([TOKENS.colours[0], 0, TOKENS.row_end, TOKENS.end], TOKENS) is None


def test_a_choice_without_alternative_costs_nothing_and_others_sum_to_one():
    grid = np.array([[1, 2], [3, 4]], dtype=np.uint8)
    choices, states = grammar.encode_choices(grid)
    log_p = grammar.log_probabilities(torch.randn(len(choices), 12), states, max_side=2)
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(len(choices)))
    forced = [place for place, row in enumerate(log_p) if row.isfinite().sum() == 1]
    assert [int(choices[place]) for place in forced] == [ROW_END, ROW_END, END]
    assert all(log_p[place, choices[place]] == 0 for place in forced)


def test_states_of_any_shape_agree():
    grids = random_grids(4)
    for grid in grids:
        _, states = grammar.encode_choices(grid)
        flat = grammar.allowed(states)
        pair = grammar.GridState(
            *(torch.stack([getattr(states, n)] * 2) for n in ("y", "x", "width", "finished"))
        )
        assert all((row == flat).all() for row in grammar.allowed(pair))


def test_the_bound_on_tokens_is_that_of_the_largest_grid():
    choices, _ = grammar.encode_choices(np.zeros((30, 30), dtype=np.uint8))
    assert len(choices) == MAX_OUTPUT_TOKENS == 931
    assert list(itertools.accumulate(choices))[-1] == 30 * ROW_END + END
