"""The reader's packed rows are the numpy codec's pairs under the drawn view; only outputs are
labelled; sequences are packed in order and none is preferred.
"""

import numpy as np
import pytest
import torch
from larger import larger, side_by_side

from arctrm.config import DataConfig, ReaderConfig
from arctrm.config.reader import PAIR_TOKENS
from arctrm.data.dataset import base_set_from_tasks
from arctrm.data.sources import load_tasks
from arctrm.data.task import Pair, Task
from arctrm.data.views import View, fixed_colours
from arctrm.reader.tokens import END, PAD, SEPARATOR, pair_length, pair_tokens
from arctrm.training import reader_stream as s
from arctrm.training.losses import IGNORE
from arctrm.training.source import PairSource

CPU = torch.device("cpu")
TOKENS, SEQUENCES = 4096, 64
FORMS = ("pair", "task")


@pytest.fixture(scope="module")
def base():
    tasks = {name: load_tasks(name, max_tasks=12) for name in ("training", "evaluation")}
    return base_set_from_tasks(tasks, "evaluation", 50)


def make(base, form, data=None, seed=0, **reader):
    config = ReaderConfig(hidden_size=16, num_heads=2, num_layers=1, sequence=form, **reader)
    torch.manual_seed(seed)
    source = PairSource(base, data or DataConfig(num_aug=50), seed, CPU)
    return s.ReaderStream(source, config, torch.float32, alone=True)


def batches(stream, count, num_tokens=TOKENS, num_sequences=SEQUENCES):
    queue = stream.draw(num_sequences)
    for _ in range(count):
        yield stream.next_batch(queue, num_tokens)


def sequences(batch, stream):
    """(rows [K, columns], slice of the token axis) of each sequence that is there."""
    rows = batch.rows.view(-1, stream.num_pairs, s.NUM_COLUMNS)
    for index, own in enumerate(rows):
        begin, end = batch.packing.offsets[index : index + 2].tolist()
        if end > begin:
            yield own, slice(begin, end)


def as_seen(base, row, scaling=None):
    view = View(int(row[s.DIHEDRAL]), tuple(row[s.COLOURS].tolist()))
    assert view.identity_colours == bool(row[s.FLAG] % s.INVERSE)
    given, asked = seen_grids(base, row, s.PAIR, view)
    if axis := int(row[s.MOSAIC]):
        assert row[s.SCALE] == 0
        both = zip((given, asked), seen_grids(base, row, s.SECOND, view), strict=True)
        return Pair(*(side_by_side(*grids, axis, view.colours[0]) for grids in both))
    return Pair(*(larger(grid, row[s.SHOWN], scaling or {}) for grid in (given, asked)))


def seen_grids(base, row, column, view):
    pair = base.pair(int(row[column]))
    grids = (view.apply(pair.input), view.apply(pair.output))
    return grids[::-1] if row[s.FLAG] >= s.INVERSE else grids


def lengths(rows_NKC):
    """Tokens of each sequence."""
    return rows_NKC[..., s.LENGTH].sum(1)


# -- what a sequence is


@pytest.mark.parametrize("form", FORMS)
def test_tokens_and_positions_are_the_codecs_of_the_drawn_view(base, form):
    stream = make(base, form)
    seen = several = 0
    for batch in batches(stream, 12):
        for rows, where in sequences(batch, stream):
            present = [row for row in rows if row[s.LENGTH]]
            pairs = [as_seen(base, row) for row in present]
            parts = [pair_tokens(pair, index) for index, pair in enumerate(pairs)]
            tokens, positions = (np.concatenate(x) for x in zip(*parts, strict=True))
            np.testing.assert_array_equal(batch.tokens[where].numpy(), tokens)
            np.testing.assert_array_equal(batch.positions[where].numpy(), positions)
            assert [int(row[s.LENGTH]) for row in present] == [pair_length(p) for p in pairs]
            seen, several = seen + 1, several + (len(pairs) > 1)
    assert seen > 12
    assert (several > 6) == (form == "task")


@pytest.mark.parametrize("form", FORMS)
def test_some_sequences_are_shown_larger_by_blocks_and_in_shapes(base, form):
    factors, shapes = ((2, 2), (1, 3)), ("pad", "lines", "tile", "stretch")
    scaling = {"share": 0.8, "factors": factors, "shapes": shapes, "sides": 30}
    stream = make(base, form, scaling=scaling)
    seen = [0] * 7
    for batch in batches(stream, 40 if form == "pair" else 200):
        for rows, where in sequences(batch, stream):
            present = [row for row in rows if row[s.LENGTH]]
            pairs = [as_seen(base, row, scaling) for row in present]
            parts = [pair_tokens(pair, index) for index, pair in enumerate(pairs)]
            tokens, positions = (np.concatenate(x) for x in zip(*parts, strict=True))
            np.testing.assert_array_equal(batch.tokens[where].numpy(), tokens)
            np.testing.assert_array_equal(batch.positions[where].numpy(), positions)
            seen[int(present[-1][s.SCALE])] += 1
    assert min(seen) > 2


@pytest.mark.parametrize("form", FORMS)
def test_what_would_be_too_large_is_shown_as_it_is(base, form):
    factors = torch.tensor([(1, 1), (2, 2), (1, 3)])
    scaling = {"share": 0.5, "factors": factors[1:].tolist(), "sides": 30}
    stream = make(base, form, scaling=scaling)
    rows = stream.draw(4000)
    assert (rows[..., s.SCALE] == rows[:, -1:, s.SCALE]).all()
    scale = rows[:, -1, s.SCALE]
    sides = torch.zeros(len(rows), 2, dtype=torch.long)
    for k in range(stream.num_pairs):
        pairs = stream.source.pairs[rows[:, k, s.PAIR]]
        for grid in (s.INPUT, s.OUTPUT):
            seen = torch.stack(stream.source.seen_size(pairs[:, grid], rows[:, k, s.DIHEDRAL]), 1)
            sides = sides.maximum(seen * (rows[:, k, s.LENGTH] > 0)[:, None])
    assert ((sides * factors[scale]).amax(1) <= 30)[scale > 0].all()
    small = sides.amax(1) <= 10
    shares = torch.bincount(scale[small], minlength=3) / small.sum()
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.25, 0.25]), atol=0.08, rtol=0)
    assert (scale[sides.amin(1) > 15] == 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_some_sequences_ask_for_the_input_of_an_output(base, form):
    stream = make(base, form, inverse_share=0.3, scaling={"share": 0.5})
    seen = {False: 0, True: 0}
    for batch in batches(stream, 12):
        for rows, where in sequences(batch, stream):
            present = [row for row in rows if row[s.LENGTH]]
            inverse = {bool(row[s.FLAG] >= s.INVERSE) for row in present}
            pairs = [as_seen(base, row, stream.config.scaling.model_dump()) for row in present]
            parts = [pair_tokens(pair, index) for index, pair in enumerate(pairs)]
            tokens, positions = (np.concatenate(x) for x in zip(*parts, strict=True))
            np.testing.assert_array_equal(batch.tokens[where].numpy(), tokens)
            np.testing.assert_array_equal(batch.positions[where].numpy(), positions)
            assert [int(row[s.LENGTH]) for row in present] == [pair_length(p) for p in pairs]
            seen[inverse.pop()] += 1
            assert not inverse  # all pairs of a sequence are asked for alike
    assert min(seen.values()) > 3
    share = (stream.draw(2000)[:, -1, s.FLAG] >= s.INVERSE).float().mean()
    assert abs(share - 0.3) < 0.05


def test_some_sequences_show_two_pairs_as_one(base):
    scaling = {"share": 0.4, "shapes": ("pad", "lines"), "sides": 30}
    stream = make(base, "pair", inverse_share=0.3, scaling=scaling, mosaic_share=0.7)
    seen = np.zeros((3, 2), dtype=int)
    for batch in batches(stream, 60):
        for (row,), where in sequences(batch, stream):
            pair = as_seen(base, row, stream.config.scaling.model_dump())
            tokens, positions = pair_tokens(pair, 0)
            np.testing.assert_array_equal(batch.tokens[where].numpy(), tokens)
            np.testing.assert_array_equal(batch.positions[where].numpy(), positions)
            assert int(row[s.LENGTH]) == pair_length(pair)
            assert max(*pair.input.shape, *pair.output.shape) <= 30
            if row[s.MOSAIC]:
                both = stream.source.pairs[row[[s.PAIR, s.SECOND]]]
                assert row[s.PAIR] != row[s.SECOND]
                assert both[0, 0] == both[1, 0] == row[s.TASK]
            seen[int(row[s.MOSAIC]), int(row[s.FLAG] >= s.INVERSE)] += 1
    assert seen.min() > 5


def test_a_share_of_what_is_not_shown_larger_and_has_room_is_two_pairs():
    base = base_set_from_tasks({"a": [big_task("small", 4, 5)]}, None, 0)
    stream = make(base, "pair", scaling={"share": 0.5, "sides": 10}, mosaic_share=0.3)
    rows = stream.draw(4000)[:, 0]
    as_it_is = rows[:, s.SCALE] == 0
    shares = torch.bincount(rows[as_it_is, s.MOSAIC], minlength=3) / as_it_is.sum()
    torch.testing.assert_close(shares, torch.tensor([0.7, 0.15, 0.15]), atol=0.04, rtol=0)
    assert (rows[~as_it_is, s.MOSAIC] == 0).all()
    small = make(base, "pair", scaling={"sides": 9}, mosaic_share=0.9).draw(200)
    assert (small[..., s.MOSAIC] == 0).all()  # two of five rows do not fit in nine


def test_a_pair_without_another_is_shown_alone():
    """The others may be there, but not to be drawn."""
    tasks = {"a": [big_task("one", 1, 4)], "b": [big_task("one", 3, 4, seed=1)]}
    base = base_set_from_tasks(tasks, None, 0)
    for weight, expected in ((0.0, {0}), (1.0, {0, 1, 2})):
        data = DataConfig(num_aug=50, weights={"b": weight})
        rows = make(base, "pair", data, mosaic_share=0.9).draw(200)
        assert set(rows[..., s.MOSAIC].unique().tolist()) == expected


def test_views_of_inverse_tasks_keep_the_colours_that_only_inputs_have(base):
    stream = make(base, "pair", DataConfig(num_aug=0, identity_colours=0.0), inverse_share=0.5)
    names = ("training", "evaluation")
    tasks = {task.id: task for name in names for task in load_tasks(name, max_tasks=12)}
    drawn = stream.draw(4000)[:, 0]
    moved = {False: 0, True: 0}
    for row in drawn:
        inverse = bool(row[s.FLAG] >= s.INVERSE)
        task = tasks[base.meta.task_ids[int(row[s.TASK])]]
        fixed = fixed_colours(inverse_task(task) if inverse else task)
        colours = row[s.COLOURS].numpy()
        assert (colours == np.arange(10))[fixed].all()
        moved[inverse] += int((colours != np.arange(10))[~fixed].any())
    assert min(moved.values()) > 1000


def inverse_task(task):
    pairs = tuple(Pair(pair.output, pair.input) for pair in task.demonstrations)
    return Task(task.id, pairs, ())


def test_a_stream_that_is_not_alone_draws_what_one_without_scaling_and_inverse_tasks_draws(base):
    stream = make(base, "pair", scaling={"share": 0.5}, inverse_share=0.5, mosaic_share=0.5)
    plain = s.ReaderStream(stream.source, stream.config, torch.float32)
    drawn = []
    for each in (plain, make(base, "pair")):
        torch.manual_seed(0)
        drawn.append(each.draw(200))
    assert torch.equal(*drawn)
    assert (drawn[0][..., [s.SCALE, s.MOSAIC]] == 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_labels_are_the_next_token_of_outputs_and_of_nothing_else(base, form):
    """From each separator to the last row end of its output; never across pairs."""
    stream = make(base, form)
    for batch in batches(stream, 3):
        expected = torch.full_like(batch.labels, IGNORE)
        for _, where in sequences(batch, stream):
            output = False
            for place in range(where.start, where.stop):
                token = int(batch.tokens[place])
                output = (output or token == SEPARATOR) and token != END
                if output:
                    expected[place] = batch.tokens[place + 1]
        assert torch.equal(batch.labels, expected)
        assert (batch.labels != IGNORE).any()


def test_every_token_knows_its_row_and_unused_room_belongs_to_none(base):
    stream = make(base, "task")
    batch = next(batches(stream, 1))
    ends = batch.rows[:, s.LENGTH].cumsum(0)
    used = int(ends[-1])
    for index, (end, length) in enumerate(zip(ends, batch.rows[:, s.LENGTH], strict=True)):
        assert (batch.row[end - length : end] == index).all()
    assert 0 < used < TOKENS
    assert (batch.row[used:] >= len(batch.rows)).all()
    assert (batch.tokens[used:] == PAD).all()
    assert (batch.positions[used:] == 0).all()
    assert (batch.labels[used:] == IGNORE).all()


@pytest.mark.parametrize("form", FORMS)
def test_offsets_cover_every_token_in_pieces_no_longer_than_a_sequence(base, form):
    stream = make(base, form)
    for num_tokens in (TOKENS, 9000):
        for batch in batches(stream, 2, num_tokens, 8):
            offsets = batch.packing.offsets
            assert offsets.dtype == torch.int32
            assert (offsets[0], offsets[-1]) == (0, num_tokens)
            assert offsets.diff().min() >= 0
            assert offsets.diff().max() <= batch.packing.max_len == stream.config.longest_sequence
            assert sum(length for length, _ in batch.packing.lengths) == num_tokens


# -- pairs that come first


def test_context_pairs_are_others_of_the_same_task_under_the_same_view(base):
    stream = make(base, "task")
    rows = stream.draw(600)
    firsts = 0
    for own in rows:
        present = own[own[:, s.LENGTH] > 0]
        pairs = present[:, s.PAIR].tolist()
        assert own[-1, s.LENGTH] > 0
        assert len(set(pairs)) == len(pairs) <= stream.config.max_pairs
        assert {int(stream.source.pairs[pair, 0]) for pair in pairs} == {int(own[-1, s.TASK])}
        assert present[:, s.INDEX].tolist() == list(range(len(pairs)))
        for column in (s.TASK, s.DIHEDRAL, s.FLAG, s.COLOURS):
            assert (own[:, column] == own[-1, column]).all()
        firsts += len(pairs) - 1
    assert firsts > 1000


def test_all_other_pairs_come_first_where_there_is_room_in_any_order(base):
    stream = make(base, "task", max_pairs=20, max_tokens=40000)
    rows = stream.draw(800)
    orders = {}
    for own in rows:
        pairs = own[own[:, s.LENGTH] > 0, s.PAIR].tolist()
        task = int(own[-1, s.TASK])
        everything = (stream.source.pairs[:, 0] == task).nonzero()[:, 0].tolist()
        assert sorted(pairs) == everything
        orders.setdefault(task, set()).add(tuple(pairs))
    assert all(len(found) > 1 for found in orders.values())


def test_the_number_of_pairs_is_bounded(base):
    rows = make(base, "task", max_pairs=3).draw(300)
    assert rows.shape[1] == 3
    assert ((rows[..., s.LENGTH] > 0).sum(1) <= 3).all()
    alone = make(base, "task", max_pairs=1).draw(50)
    assert ((alone[..., s.LENGTH] > 0).sum(1) == 1).all()


def big_task(id_, count, side, seed=0):
    rng = np.random.default_rng(seed)
    grids = rng.integers(0, 10, (count, 2, side, side), dtype=np.uint8)
    return Task(id_, tuple(Pair(a, b) for a, b in grids))


def test_a_sequence_is_never_longer_than_allowed_and_always_has_its_last_pair():
    base = base_set_from_tasks({"a": [big_task("large", 8, 30), big_task("small", 8, 5)]}, None, 0)
    for max_tokens in (PAIR_TOKENS, 2 * PAIR_TOKENS, 2 * PAIR_TOKENS + 63, 4096):
        stream = make(base, "task", max_tokens=max_tokens, max_pairs=8)
        rows = stream.draw(200)
        assert lengths(rows).max() <= max_tokens
        assert (rows[:, -1, s.LENGTH] > 0).all()
        large = rows[:, -1, s.TASK] == 0
        assert (lengths(rows)[large] == max_tokens // PAIR_TOKENS * PAIR_TOKENS).all()
        assert (lengths(rows)[~large] == 8 * 63).all()


def test_a_pair_that_is_alone_in_its_task_stands_alone():
    base = base_set_from_tasks({"a": [big_task("one", 1, 4)]}, None, 0)
    stream = make(base, "task")
    rows = stream.draw(20)
    assert (rows[:, -1, s.LENGTH] == 3 + 2 * 4 * 5).all()
    assert (rows[:, :-1, s.LENGTH] == 0).all()
    assert (rows[:, -1, s.INDEX] == 0).all()


def test_context_comes_from_all_of_a_large_task():
    base = base_set_from_tasks({"a": [big_task("large", 60, 3), big_task("small", 2, 3)]}, None, 0)
    stream = make(base, "task", max_pairs=6, max_tokens=4096)
    rows = stream.draw(4000)
    many = rows[rows[:, -1, s.TASK] == 0]
    pairs = many[:, :, s.PAIR]
    assert (many[:, :, s.LENGTH] > 0).all()
    assert (pairs.sort(1).values.diff(dim=1) > 0).all()
    share = torch.bincount(pairs[:, :-1].flatten(), minlength=62)[:60] / pairs[:, :-1].numel()
    assert (share * 60 - 1).abs().max() < 0.35


# -- how sequences are chosen


@pytest.mark.parametrize("form", FORMS)
def test_weights_choose_the_subset(base, form):
    stream = make(base, form, DataConfig(num_aug=50, weights={"training": 0.0}))
    rows = stream.draw(300)
    subset = stream.source.pairs[rows[rows[..., s.LENGTH] > 0][:, s.PAIR], 1]
    assert (subset == base.meta.subsets.index("evaluation")).all()


def test_a_pair_of_weight_zero_is_no_context_either():
    """Another source may bring more pairs of the same task."""
    first, more = big_task("same", 3, 4), big_task("same", 40, 4, seed=1)
    base = base_set_from_tasks({"training": [first], "re_arc": [more]}, None, 0)
    stream = make(base, "task", DataConfig(num_aug=50, weights={"re_arc": 0.0}))
    rows = stream.draw(200)
    pairs = rows[rows[..., s.LENGTH] > 0][:, s.PAIR]
    assert (stream.source.pairs[pairs, 1] == 0).all()
    assert ((rows[..., s.LENGTH] > 0).sum(1) == 3).all()


@pytest.mark.parametrize("form", FORMS)
def test_long_sequences_are_packed_as_often_as_drawn(base, form):
    stream = make(base, form)
    drawn = lengths(stream.draw(10000)).float()
    packed = torch.cat(
        [lengths(b.rows.view(-1, stream.num_pairs, s.NUM_COLUMNS)) for b in batches(stream, 400)]
    ).float()
    packed = packed[packed > 0]
    assert packed.mean() == pytest.approx(drawn.mean().item(), rel=0.06)
    long = drawn.quantile(0.9)
    assert (packed >= long).float().mean() == pytest.approx(0.1, abs=0.03)


def test_sequences_come_in_the_order_of_the_queue(base):
    """What did not fit comes first next time; nothing is lost and nothing comes twice."""
    stream = make(base, "task")
    queue = stream.draw(SEQUENCES)
    for _ in range(10):
        before = queue.clone()
        batch = stream.next_batch(queue, TOKENS)
        rows = batch.rows.view_as(queue)
        taken = int((lengths(rows) > 0).sum())
        assert 0 < taken < SEQUENCES
        assert torch.equal(rows[:taken], before[:taken])
        assert (rows[taken:] == 0).all()
        assert torch.equal(queue[: SEQUENCES - taken], before[taken:])
        assert int(lengths(before)[: taken + 1].sum()) > TOKENS >= int(lengths(rows).sum())


@pytest.mark.parametrize("form", FORMS)
def test_batches_are_well_filled_and_never_overfull(base, form):
    stream = make(base, form)
    used = [int(batch.rows[:, s.LENGTH].sum()) for batch in batches(stream, 40, 3 * TOKENS, 128)]
    assert max(used) <= 3 * TOKENS
    assert min(used) > 3 * TOKENS - stream.config.longest_sequence
    assert np.mean(used) > 0.85 * 3 * TOKENS


def test_the_smallest_allowed_batch_holds_every_sequence():
    base = base_set_from_tasks({"a": [big_task("large", 4, 30)]}, None, 0)
    for form, longest in (("pair", PAIR_TOKENS), ("task", 2 * PAIR_TOKENS)):
        stream = make(base, form, max_tokens=longest)
        for batch in batches(stream, 3, longest, 2):
            assert int(batch.rows[:, s.LENGTH].sum()) == longest


@pytest.mark.parametrize("form", FORMS)
def test_the_seed_decides_what_is_drawn(base, form):
    first, same, other = (
        next(batches(make(base, form, seed=seed), 1)).tokens for seed in (0, 0, 1)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
