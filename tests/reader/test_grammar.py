"""The grammar allows exactly the grids: compared with the definition, string by string."""

import numpy as np
import pytest
import torch
from plain_reader import continuations, spelled

from arctrm.reader import grammar
from arctrm.reader.grammar import END, MAX_OUTPUT_TOKENS, ROW_END, GridState

FIELDS = ("y", "x", "width", "finished")


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
        allowed = grammar.allowed(state_after(choices, max_side), max_side)[0]
        given = allowed.nonzero()[:, 0].tolist()
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
        log_p = grammar.log_probabilities(torch.randn(64, 12), state, max_side)
        walks.append(log_p.exp().multinomial(1)[:, 0])
        state = grammar.advance(state, walks[-1])
    for walk in torch.stack(walks, dim=1).tolist():
        grid = grammar.decode_choices(walk[: walk.index(END) + 1])
        assert max(grid.shape) <= max_side
        assert spelled(grid) == walk[: walk.index(END) + 1]


def test_a_grid_survives_its_tokens_at_every_size():
    for grid in random_grids():
        choices, state = grammar.encode_choices(grid)
        height, width = grid.shape
        assert choices.tolist() == spelled(grid)
        assert len(choices) == grammar.num_tokens(grid) == height * (width + 1) + 1
        assert (state.y[-1], state.x[-1]) == (height, 0)
        assert (state.x[choices == ROW_END] == width).all()
        back = grammar.decode_choices(choices)
        assert back.dtype == np.uint8
        assert (back == grid).all()


def test_encoded_states_are_those_of_the_walk():
    for grid in random_grids(6):
        choices, states = grammar.encode_choices(grid)
        state = grammar.start(1)
        for place, choice in enumerate(choices.tolist()):
            assert all(getattr(states, name)[place] == getattr(state, name)[0] for name in FIELDS)
            state = grammar.advance(state, torch.tensor([choice]))
        assert state.finished[0]


def test_grids_spelled_together_are_those_spelled_alone():
    grids = random_grids(6)
    found = grammar.spell(grids)
    alone = [grammar.encode_choices(one) for one in grids]
    assert found.choices.tolist() == [c for choices, _ in alone for c in choices]
    for name in FIELDS:
        columns = torch.cat([getattr(state, name) for _, state in alone])
        assert torch.equal(getattr(found.states, name), columns)
    lengths = [len(choices) for choices, _ in alone]
    assert found.grid.tolist() == np.repeat(range(len(grids)), lengths).tolist()
    assert found.first.tolist() == (np.cumsum(lengths) - lengths).tolist()


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


def test_a_choice_without_alternative_costs_nothing_and_others_sum_to_one():
    grid = np.array([[1, 2], [3, 4]], dtype=np.uint8)
    choices, states = grammar.encode_choices(grid)
    log_p = grammar.log_probabilities(torch.randn(len(choices), 12), states, max_side=2)
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(len(choices)))
    forced = [place for place, row in enumerate(log_p) if row.isfinite().sum() == 1]
    assert [int(choices[place]) for place in forced] == [ROW_END, ROW_END, END]
    assert all(log_p[place, choices[place]] == 0 for place in forced)


def test_states_of_any_shape_agree():
    for grid in random_grids(4):
        _, states = grammar.encode_choices(grid)
        pair = GridState(*(torch.stack([getattr(states, name)] * 2) for name in FIELDS))
        flat = grammar.allowed(states)
        assert all((row == flat).all() for row in grammar.allowed(pair))


def test_the_bound_on_tokens_is_that_of_the_largest_grid():
    choices, _ = grammar.encode_choices(np.zeros((30, 30), dtype=np.uint8))
    assert len(choices) == MAX_OUTPUT_TOKENS == 931
    assert choices.sum() == 30 * ROW_END + END
