"""Both models see the same pairs under the same view; no row sees its answer; drafts lie on their
cells.
"""

import numpy as np
import pytest
import torch
from joint_parts import SEEN, drawn, fill_drafts, make, small_base

from arctrm.adapters import cell_table, place_hidden
from arctrm.adapters.draft import INPUT, OUTPUT
from arctrm.data.canvas import COLOUR, EOS
from arctrm.data.task import NUM_COLOURS, Pair
from arctrm.data.views import View
from arctrm.hybrid import NO_CELL
from arctrm.reader.tokens import END, PREFIX, ROW_END, prompt
from arctrm.training import reader_stream as reading
from arctrm.training.joint_stream import JointBatch
from arctrm.training.losses import IGNORE
from arctrm.training.source import IS_TEST

EACH = pytest.mark.parametrize("form", SEEN)


def pair_of(step, row, draft=False):
    """A pair as its row's view shows it, by the numpy codec."""
    source, number = step.stream.reader.source, int(row[reading.PAIR])
    table = source.pairs[number + draft * step.stream.drafts.num_pairs].tolist()
    view = View(int(row[reading.DIHEDRAL]), tuple(row[reading.COLOURS].tolist()))

    def grid(offset, height, width):
        cells = source.cells[offset : offset + height * width].numpy()
        return view.apply(cells.reshape(height, width))

    return Pair(grid(*table[3:6]), grid(*table[6:9]))


def seen(step, batch, with_soft=False):
    """The shown sequences and the states whose hidden vectors are the token numbers."""
    shown = step.stream.shown_sequences(batch, with_soft)
    numbers = torch.arange(len(shown.tokens), dtype=torch.float32)[:, None]
    return shown, step.stream.states(batch, shown, numbers)


def tokens_of(shown, states, row):
    begin, visible = int(states.begin[row]), int(states.visible[row])
    return shown.tokens[begin : begin + visible].tolist()


def spelt(grid):
    return [token for line in grid.tolist() for token in (*line, ROW_END)]


@EACH
def test_sequences_come_in_twos_of_one_task_with_nothing_in_common(form):
    _, step = make(form=form)
    for seed in range(5):
        rows = drawn(step, seed).sequences.unflatten(0, (-1, 2))
        assert (rows[..., reading.TASK] == rows[:, :1, :1, reading.TASK]).all()
        for two in rows:
            pairs = [set(own[own[:, reading.LENGTH] > 0][:, reading.PAIR].tolist()) for own in two]
            assert not pairs[0] & pairs[1]
            if form == "task":  # a task of five pairs: three and two
                assert sorted(map(len, pairs)) == [2, 3]


def test_without_a_contrastive_loss_each_sequence_is_drawn_by_weight():
    changes = {"coupling.context": False, "data.test_pair_weight": 1e9, "batch_size": 64}
    _, step = make(changes, base=small_base(num_tests=1))
    step.stream.trm_tokens = step.stream.reader_tokens = 8192
    assert not step.stream.in_twos
    pairs = drawn(step).sequences[:, -1]
    assert (pairs[:, reading.LENGTH] > 0).all()
    assert step.stream.trm.source.pairs[pairs[:, reading.PAIR], IS_TEST].all()
    tasks = pairs[:, reading.TASK].view(-1, 2)
    assert (tasks[:, 0] != tasks[:, 1]).any()


@EACH
def test_both_models_are_given_the_same_pairs_under_the_same_view(form):
    _, step = make(form=form)
    batch = drawn(step)
    flat, tokens = batch.sequences.flatten(0, 1), batch.rows.tokens
    slots = step.stream.trm.trm.num_slots
    assert (flat[:, reading.LENGTH] > 0).sum() > 8
    for number, row in enumerate(flat):
        own = (tokens.row == number) & (tokens.slot >= slots)
        if row[reading.LENGTH] == 0:
            assert not own.any()
            continue
        pair = pair_of(step, row)
        for values, grid in ((batch.rows.codes, pair.input), (batch.labels, pair.output)):
            cells = values[own]
            got = cells[(cells != IGNORE) & (cells >= COLOUR)] - COLOUR
            assert got.tolist() == grid.ravel().tolist()
        assert (batch.labels[own] == EOS).any()
        assert batch.rows.embedding[number] == row[reading.TASK]
        assert batch.rows.dihedral[number] == row[reading.DIHEDRAL]


@EACH
def test_a_row_sees_what_stands_before_its_output_and_its_draft_never_its_answer(form):
    _, step = make(form=form)
    fill_drafts(step)
    batch = drawn(step)
    shown, states = seen(step, batch, with_soft=True)
    num_soft, num_pairs = step.stream.num_soft, batch.sequences.shape[1]
    assert batch.drafted.any()
    for number, rows in enumerate(batch.sequences):
        before = []
        for index, row in enumerate(rows):
            got = tokens_of(shown, states, number * num_pairs + index)
            if row[reading.LENGTH] == 0:
                assert got == []
                continue
            pair = pair_of(step, row)
            asked = prompt(before, pair.input).tokens.tolist()
            if index == num_pairs - 1:
                assert batch.drafted[number]
                asked += [*spelt(pair_of(step, row, draft=True).output), END, *[PREFIX] * num_soft]
            assert got == asked
            before.append(pair)


@EACH
def test_without_a_draft_the_query_ends_at_its_separator(form):
    _, step = make({"coupling.no_draft_share": 1.0}, form=form)
    fill_drafts(step)
    batch = drawn(step)
    assert not batch.drafted.any()
    shown, states = seen(step, batch)
    assert (states.kind != OUTPUT).all()
    num_pairs = batch.sequences.shape[1]
    for number, rows in enumerate(batch.sequences):
        there = [pair_of(step, row) for row in rows if row[reading.LENGTH] > 0]
        if there:
            got = tokens_of(shown, states, number * num_pairs + num_pairs - 1)
            assert got == prompt(there[:-1], there[-1].input).tokens.tolist()


def test_a_pair_without_a_draft_is_shown_without_one():
    _, step = make()
    assert not drawn(step).drafted.any()
    step.stream.drafts.write(3, np.zeros((2, 2), np.uint8))
    there = [drawn(step, seed) for seed in range(6)]
    for batch in there:
        assert (batch.sequences[batch.drafted][:, -1, reading.PAIR] == 3).all()
    assert any(batch.drafted.any() for batch in there)


def test_right_drafts_are_shown_as_rarely_as_configured():
    _, step = make({"coupling.right_draft_share": 0.25})
    fill_drafts(step)
    drafts = step.stream.drafts
    drafts.right[::2] = True
    shown = {True: [], False: []}
    for seed in range(60):
        batch = drawn(step, seed)
        there = batch.sequences[:, -1, reading.LENGTH] > 0
        right = drafts.right[batch.sequences[:, -1, reading.PAIR]]
        for known in shown:
            shown[known] += batch.drafted[there & (right == known)].tolist()
    assert all(shown[False])
    assert 0.15 < sum(shown[True]) / len(shown[True]) < 0.35


def test_where_test_pairs_alone_are_heard_demonstrations_are_told_nothing():
    _, step = make({"coupling.heard_pairs": "test"}, base=small_base(num_tests=2))
    fill_drafts(step)
    batch = drawn(step)
    _, states = seen(step, batch)
    is_test = step.stream.trm.source.pairs[batch.sequences[:, -1, reading.PAIR], IS_TEST].bool()
    there = batch.sequences[:, -1, reading.LENGTH] > 0
    assert (is_test & there).any()
    assert (~is_test & there).any()
    assert torch.equal(batch.heard, is_test & there)
    assert torch.equal(states.visible > 0, batch.heard)
    told = states.row[states.kind != NO_CELL].unique()
    assert torch.equal(told, batch.heard.nonzero()[:, 0])


@EACH
def test_output_cells_are_those_of_drafts_only(form):
    _, step = make({"coupling.no_draft_share": 0.5}, form=form)
    drafts = fill_drafts(step)
    batch = drawn(step)
    shown, states = seen(step, batch)
    num_pairs = batch.sequences.shape[1]
    is_output = states.kind == OUTPUT
    rows = states.row[is_output]
    assert (rows % num_pairs == num_pairs - 1).all()
    assert batch.drafted[rows // num_pairs].all()
    expected = 0
    for number, row in enumerate(batch.sequences[:, -1]):
        if batch.drafted[number]:
            draft = pair_of(step, row, draft=True).output
            own = is_output & (states.row == number * num_pairs + num_pairs - 1)
            assert shown.tokens[own].tolist() == draft.ravel().tolist()
            assert draft.size == drafts[int(row[reading.PAIR])].size
            expected += draft.size
    assert is_output.sum() == expected > 0


@pytest.mark.parametrize("dihedral", range(8))
def test_draft_and_input_land_on_their_canvas_cells_under_every_view(dihedral):
    _, step = make({"coupling.reader_weight": 0.0})
    fill_drafts(step)
    stream = step.stream
    pairs = torch.arange(stream.num_sequences)[:, None] % stream.drafts.num_pairs
    task = stream.reader.source.pairs[pairs[:, 0], 0]
    colours = torch.stack([torch.randperm(NUM_COLOURS) for _ in pairs])
    turn = torch.full_like(task, dihedral)
    rows = stream.reader.sequences(pairs, task, turn, colours)
    batch = stream.lay_out(rows, torch.ones(len(rows), dtype=torch.bool))
    assert isinstance(batch, JointBatch)
    assert batch.drafted.all()
    shown = stream.shown_sequences(batch, with_soft=False)
    hidden = shown.tokens[:, None].float()
    states, tokens = stream.states(batch, shown, hidden), batch.rows.tokens
    table = cell_table(states.row, states.kind, states.y, states.x, len(states.begin))
    is_cell = tokens.slot >= stream.trm.trm.num_slots
    placed = place_hidden(states.hidden, table, tokens.row, tokens.y, tokens.x, is_cell)
    for number, row in enumerate(rows[:, 0]):
        own = is_cell & (tokens.row == number)
        for grid, value, has in (
            (pair_of(step, row).input, placed.input_hidden, placed.has_input),
            (pair_of(step, row, draft=True).output, placed.output_hidden, placed.has_output),
        ):
            y, x = tokens.y[own], tokens.x[own]
            inside = (y < grid.shape[0]) & (x < grid.shape[1])
            assert torch.equal(has[own], inside)
            expected = torch.from_numpy(grid.astype(np.float32))[y[inside], x[inside]]
            assert torch.equal(value[own][inside, 0], expected)
    assert (states.kind == INPUT).any()


@EACH
def test_a_batch_takes_whole_twos_from_the_first_on_and_stays_within_both_budgets(form):
    _, step = make(form=form)
    fill_drafts(step)
    stream, counts = step.stream, []
    for budget in (100, 250, 420):
        stream.trm_tokens, stream.reader_tokens = budget, budget
        batch = drawn(step)
        there = batch.sequences[:, -1, reading.LENGTH] > 0
        counts.append(int(there.sum()))
        assert counts[-1] % 2 == 0
        assert there[: counts[-1]].all()
        shown = stream.shown_sequences(batch, with_soft=True)
        assert int(shown.rows[:, reading.LENGTH].sum()) <= budget
        assert int((batch.rows.tokens.row < len(batch.rows.embedding)).sum()) <= budget
    assert 0 <= counts[0] < counts[1] < counts[2] < stream.num_sequences


@EACH
def test_the_packing_allows_for_drafts_longer_than_any_answer_and_for_the_soft_prefix(form):
    _, step = make(form=form)
    step.stream.reader_tokens = 8192
    for pair in range(step.stream.drafts.num_pairs):
        step.stream.drafts.write(pair, np.zeros((30, 30), np.uint8))
    shown = step.stream.shown_sequences(drawn(step), with_soft=True)
    offsets = shown.packing.offsets
    assert offsets.diff().max() <= shown.packing.max_len
    per = shown.rows.shape[0] // shown.num_sequences
    longest = shown.rows[:, reading.LENGTH].view(-1, per).sum(1).max()
    assert longest > 930


def test_many_pairs_in_a_sequence_have_contexts_too():
    changes = {"reader.max_pairs": 12, "training.tokens_per_batch": 22000, "batch_size": 2}
    _, step = make(changes, form="task")
    assert drawn(step).sequences.shape[:2] == (2, 12)
