"""Packed sequences are the spelt pairs of the drawn views; only outputs are labelled; what sees
what is as asked; sequences are packed in order and none is preferred.
"""

import numpy as np
import pytest
import torch
from larger import larger

from arctrm.config import PAIR_TOKENS, DataConfig, ScalingConfig
from arctrm.data.base_set import base_set_from_tasks
from arctrm.data.sources import load_tasks
from arctrm.data.task import Pair, Task
from arctrm.data.views import View, fixed_colours
from arctrm.model.layout import END, PAD, SEPARATOR, pair_length, pair_tokens
from arctrm.train import sequences as s
from arctrm.train.losses import IGNORE
from arctrm.train.source import PairSource

CPU = torch.device("cpu")
TOKENS, SEQUENCES = 4096, 64
KINDS = {"reader": {}, "trm": {"whole": True}, "hub": {"num_pairs": 6, "longest": TOKENS}}
ALL_WAYS = ScalingConfig(
    share=0.8, factors=((2, 2), (1, 3)), shapes=("pad", "lines", "tile", "stretch"), sides=30
)
every_kind = pytest.mark.parametrize("kind", KINDS)


def make(base, kind="reader", data=None, seed=0, **options):
    torch.manual_seed(seed)
    source = PairSource(base, data or DataConfig(num_aug=50), seed, CPU)
    return s.Sequences(source, torch.float32, **KINDS[kind], **options)


def batches(sequences, count, num_tokens=TOKENS, num_sequences=SEQUENCES):
    queue = sequences.draw(num_sequences)
    for _ in range(count):
        yield sequences.next_batch(queue, num_tokens)


def pieces(batch):
    """(rows of the pairs that are there, slice of the token axis) of each sequence."""
    rows = batch.rows.view(batch.num_sequences, -1, s.NUM_COLUMNS)
    for index, own in enumerate(rows):
        begin, end = batch.seen.offsets[index : index + 2].tolist()
        if end > begin:
            yield [row for row in own if row[s.LENGTH]], slice(begin, end)


def as_seen(base, row, scaling=None):
    view = View(int(row[s.DIHEDRAL]), tuple(row[s.COLOURS].tolist()))
    assert view.identity_colours == bool(row[s.KEEPS_COLOURS])
    pair = base.pair(int(row[s.PAIR]))
    grids = [view.apply(pair.input), view.apply(pair.output)]
    shown = [larger(grid, row[s.SHOWN], scaling or {}) for grid in grids]
    return Pair(*(shown[::-1] if row[s.INVERSE] else shown))


def lengths(rows_NKC):
    """Tokens of each sequence."""
    return rows_NKC[..., s.LENGTH].sum(1)


def assert_spelt(batch, where, pairs):
    parts = [pair_tokens(pair, index) for index, pair in enumerate(pairs)]
    tokens, positions = (np.concatenate(x) for x in zip(*parts, strict=True))
    np.testing.assert_array_equal(batch.tokens[where].numpy(), tokens)
    np.testing.assert_array_equal(batch.positions[where].numpy(), positions)


def big_task(id_, count, side, seed=0):
    rng = np.random.default_rng(seed)
    grids = rng.integers(0, 10, (count, 2, side, side), dtype=np.uint8)
    return Task(id_, tuple(Pair(a, b) for a, b in grids))


@every_kind
def test_tokens_and_positions_are_the_spelling_of_the_drawn_view(base, kind):
    seen = several = 0
    for batch in batches(make(base, kind), 12):
        for rows, where in pieces(batch):
            pairs = [as_seen(base, row) for row in rows]
            assert_spelt(batch, where, pairs)
            assert [int(row[s.LENGTH]) for row in rows] == [pair_length(p) for p in pairs]
            seen, several = seen + 1, several + (len(pairs) > 1)
    assert seen > 12
    assert (several > 6) == (kind == "hub")


@pytest.mark.parametrize("kind", ["reader", "trm", pytest.param("hub", marks=pytest.mark.slow)])
def test_some_sequences_are_shown_larger_by_blocks_and_in_shapes(base, kind):
    scaling = ALL_WAYS.model_dump()
    sequences = make(base, kind, DataConfig(num_aug=50, scaling=ALL_WAYS))
    seen = [0] * (1 + ALL_WAYS.num_ways)
    for batch in batches(sequences, 90 if kind == "hub" else 40):
        for rows, where in pieces(batch):
            assert_spelt(batch, where, [as_seen(base, row, scaling) for row in rows])
            seen[int(rows[-1][s.SCALE])] += 1
    assert min(seen) > 2


def test_some_sequences_ask_for_the_input_of_an_output(base):
    data = DataConfig(num_aug=50, scaling=ScalingConfig(share=0.5))
    sequences = make(base, data=data, inverse_share=0.3)
    seen = {0: 0, 1: 0}
    for batch in batches(sequences, 12):
        for (row,), where in pieces(batch):
            assert_spelt(batch, where, [as_seen(base, row, data.scaling.model_dump())])
            seen[int(row[s.INVERSE])] += 1
    assert min(seen.values()) > 3
    share = sequences.draw(2000)[:, -1, s.INVERSE].float().mean()
    assert abs(share - 0.3) < 0.05


@pytest.mark.slow
def test_views_of_inverse_tasks_keep_the_colours_that_only_inputs_have(base):
    sequences = make(base, data=DataConfig(num_aug=0, identity_colours=0.0), inverse_share=0.5)
    names = ("training", "evaluation")
    tasks = {task.id: task for name in names for task in load_tasks(name, max_tasks=12)}
    moved = {0: 0, 1: 0}
    for row in sequences.draw(1500)[:, 0]:
        task, inverse = tasks[base.meta.task_ids[int(row[s.TASK])]], int(row[s.INVERSE])
        if inverse:
            task = Task("", tuple(Pair(p.output, p.input) for p in task.demonstrations))
        fixed, colours = fixed_colours(task), row[s.COLOURS].numpy()
        assert (colours == np.arange(10))[fixed].all()
        moved[inverse] += int((colours != np.arange(10))[~fixed].any())
    assert min(moved.values()) > 400


@every_kind
def test_labels_are_the_next_token_of_outputs_and_of_nothing_else(base, kind):
    """From each separator to the last row end of its output; never across pairs."""
    for batch in batches(make(base, kind), 3):
        expected = torch.full_like(batch.labels, IGNORE)
        for _, where in pieces(batch):
            output = False
            for place in range(where.start, where.stop):
                token = int(batch.tokens[place])
                output = (output or token == SEPARATOR) and token != END
                if output:
                    expected[place] = batch.tokens[place + 1]
        assert torch.equal(batch.labels, expected)
        assert (batch.labels != IGNORE).any()


def test_every_token_knows_its_row_and_unused_room_belongs_to_none(base):
    batch = next(batches(make(base, "hub"), 1))
    ends = batch.rows[:, s.LENGTH].cumsum(0)
    used = int(ends[-1])
    for index, (end, length) in enumerate(zip(ends, batch.rows[:, s.LENGTH], strict=True)):
        assert (batch.row[end - length : end] == index).all()
        assert batch.slot[end - length : end].tolist() == list(range(length))
    assert 0 < used < TOKENS
    assert (batch.row[used:] >= len(batch.rows)).all()
    assert (batch.own_row < len(batch.rows)).all()
    assert (batch.tokens[used:] == PAD).all()
    assert (batch.positions[used:] == 0).all()
    assert (batch.labels[used:] == IGNORE).all()


@every_kind
def test_offsets_cover_every_token_in_pieces_no_longer_than_a_sequence(base, kind):
    sequences = make(base, kind)
    for num_tokens in (TOKENS, 9000):
        for batch in batches(sequences, 2, num_tokens, 8):
            offsets = batch.seen.offsets
            assert offsets.dtype == torch.int32
            assert (offsets[0], offsets[-1]) == (0, num_tokens)
            assert offsets.diff().min() >= 0
            assert offsets.diff().max() <= batch.seen.max_len == sequences.longest
            assert sum(length for length, _ in batch.seen.lengths) == num_tokens


def test_the_reader_sees_prompts_whole_and_trm_whole_sequences(base):
    for kind in ("reader", "trm"):
        batch = next(batches(make(base, kind), 1))
        seen = iter(batch.seen.lengths)
        for index, ((row,), _) in enumerate(pieces(batch)):
            pair = as_seen(base, row)
            prompt = pair_length(Pair(pair.input)) - 1
            assert batch.prompts[index] == prompt
            length = pair_length(pair)
            assert next(seen) == (length, length if kind == "trm" else prompt)
        assert (batch.prompts[batch.num_sequences :] == 0).all()


def test_other_rows_of_the_same_sizes_are_spelt_in_the_places_of_a_batch(base):
    """As drafts of the right size are."""
    sequences = make(base, "trm", DataConfig(num_aug=50, scaling=ALL_WAYS))
    batch = next(batches(sequences, 1))
    assert torch.equal(sequences.tokens_of(batch, batch.rows), batch.tokens)
    rows = batch.rows.clone()
    rows[:, s.COLOURS] = torch.arange(9, -1, -1)
    turned = sequences.tokens_of(batch, rows)
    repacked = sequences.pack(rows, batch.num_sequences, TOKENS)
    assert torch.equal(turned, repacked.tokens)
    assert (turned != batch.tokens).any()


def test_context_pairs_are_others_of_the_same_task_under_the_same_view(base):
    sequences = make(base, "hub")
    firsts = 0
    for own in sequences.draw(600):
        present = own[own[:, s.LENGTH] > 0]
        pairs = present[:, s.PAIR].tolist()
        assert own[-1, s.LENGTH] > 0
        assert len(set(pairs)) == len(pairs) <= sequences.num_pairs
        assert {int(sequences.source.pairs[pair, 0]) for pair in pairs} == {int(own[-1, s.TASK])}
        assert present[:, s.INDEX].tolist() == list(range(len(pairs)))
        for column in (s.TASK, s.DIHEDRAL, s.KEEPS_COLOURS, s.COLOURS):
            assert (own[:, column] == own[-1, column]).all()
        firsts += len(pairs) - 1
    assert firsts > 1000


def several(base, num_pairs, longest=40000, data=None):
    torch.manual_seed(0)
    source = PairSource(base, data or DataConfig(num_aug=50), 0, CPU)
    return s.Sequences(source, torch.float32, num_pairs=num_pairs, longest=longest)


def test_a_sequence_is_never_longer_than_allowed_and_always_has_its_last_pair():
    base = base_set_from_tasks({"a": [big_task("large", 8, 30), big_task("small", 8, 5)]}, None, 0)
    for longest in (PAIR_TOKENS, 2 * PAIR_TOKENS, 2 * PAIR_TOKENS + 63, 4096):
        rows = several(base, 8, longest).draw(200)
        assert lengths(rows).max() <= longest
        assert (rows[:, -1, s.LENGTH] > 0).all()
        large = rows[:, -1, s.TASK] == 0
        assert (lengths(rows)[large] == longest // PAIR_TOKENS * PAIR_TOKENS).all()
        assert (lengths(rows)[~large] == 8 * 63).all()


def test_a_pair_of_weight_zero_is_no_context_either():
    """Another source may bring more pairs of the same task."""
    first, more = big_task("same", 3, 4), big_task("same", 40, 4, seed=1)
    base = base_set_from_tasks({"training": [first], "re_arc": [more]}, None, 0)
    sequences = several(base, 6, data=DataConfig(num_aug=50, weights={"re_arc": 0.0}))
    rows = sequences.draw(200)
    pairs = rows[rows[..., s.LENGTH] > 0][:, s.PAIR]
    assert (sequences.source.pairs[pairs, 1] == 0).all()
    assert ((rows[..., s.LENGTH] > 0).sum(1) == 3).all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["reader", "hub"])
def test_long_sequences_are_packed_as_often_as_drawn(base, kind):
    sequences = make(base, kind)
    drawn = lengths(sequences.draw(10000)).float()
    shape = (-1, sequences.num_pairs, s.NUM_COLUMNS)
    packed = torch.cat([lengths(b.rows.view(shape)) for b in batches(sequences, 300)]).float()
    packed = packed[packed > 0]
    assert packed.mean() == pytest.approx(drawn.mean().item(), rel=0.07)
    long = drawn.quantile(0.9)
    expected = (drawn >= long).float().mean().item()
    assert (packed >= long).float().mean() == pytest.approx(expected, abs=0.03)


def test_sequences_come_in_the_order_of_the_queue(base):
    """What did not fit comes first next time; nothing is lost and nothing comes twice."""
    sequences = make(base, "hub")
    queue = sequences.draw(SEQUENCES)
    for _ in range(10):
        before = queue.clone()
        batch = sequences.next_batch(queue, TOKENS)
        rows = batch.rows.view_as(queue)
        taken = int((lengths(rows) > 0).sum())
        assert 0 < taken < SEQUENCES
        assert torch.equal(rows[:taken], before[:taken])
        assert (rows[taken:] == 0).all()
        assert torch.equal(queue[: SEQUENCES - taken], before[taken:])
        assert int(lengths(before)[: taken + 1].sum()) > TOKENS >= int(lengths(rows).sum())


@every_kind
def test_batches_are_well_filled_and_never_overfull(base, kind):
    sequences = make(base, kind)
    room = 3 * TOKENS
    used = [int(batch.rows[:, s.LENGTH].sum()) for batch in batches(sequences, 40, room, 128)]
    assert max(used) <= room
    assert min(used) > room - sequences.longest
    assert np.mean(used) > 0.85 * room


@pytest.mark.parametrize("unused", [0, 1, 255, 256, 257, 1000, 1863, 5000])
def test_dummies_fill_exactly_what_is_unused(unused):
    for longest in (100, 932, 1863):
        found = s.dummy_lengths(5000, torch.tensor(unused), longest)
        assert found.sum() == unused
        assert found.min() >= 0
        assert found.max() <= longest
