"""The reader's drafts of training pairs: what is asked, what is kept, and when."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from arctrm.config import DataConfig, TRMConfig, TrunkConfig
from arctrm.data.base_set import base_set_from_tasks
from arctrm.model.layout import pair_tokens
from arctrm.model.trunk import Trunk
from arctrm.reader.tiny import TinyReader
from arctrm.train import sequences as s
from arctrm.train.drafts import DraftPool, questions_of
from arctrm.train.source import OUTPUT, PairSource
from helpers import random_task


@pytest.fixture
def pool():
    """Drafts of four small tasks by an untrained reader: `pool(num_pairs, **trm)`."""

    def new(num_pairs=1, weights=None, longest=4096, **trm):
        rng = np.random.default_rng(0)
        tasks = {n: [random_task(rng, n + m, side=3) for m in "xy"] for n in "ab"}
        base = base_set_from_tasks(tasks, None, 50)
        torch.manual_seed(0)
        trunk = Trunk(TrunkConfig(hidden_size=32, num_heads=2, num_layers=1), base.num_tasks)
        with torch.no_grad():  # so that it writes grids at all
            trunk.head.weight.normal_(std=0.5)
        data = DataConfig(num_aug=50, weights=weights or {})
        source = PairSource(base, data, 0, torch.device("cpu"))
        sequences = s.Sequences(source, torch.float32, num_pairs=num_pairs, longest=longest)
        return DraftPool(sequences, TRMConfig(**trm), TinyReader(trunk))

    return new


def stored(pool, pair):
    offset, height, width = pool.source.pairs[pool.num_pairs + pair, OUTPUT].tolist()
    return pool.source.cells[offset : offset + height * width].view(height, width).numpy()


def test_a_question_is_the_last_pair_of_a_sequence_as_its_view_shows_it(pool):
    own = pool(num_pairs=3)
    sequences = own.sequences
    rows = sequences.draw(20)
    batch = sequences.pack(rows.flatten(0, 1), 20, 4096)
    for number, one in enumerate(questions_of(own.source.base, rows)):
        begin, end = batch.seen.offsets[number : number + 2].tolist()
        pairs = (*one.pairs, replace(one.pairs[0], input=one.query, output=one.answer))
        spelt = [pair_tokens(pair, index)[0] for index, pair in enumerate(pairs)]
        np.testing.assert_array_equal(batch.tokens[begin:end].numpy(), np.concatenate(spelt))
        assert tuple(one.condition) == tuple(batch.condition[3 * number + 2].tolist())


def test_drafts_are_kept_in_the_tasks_own_colours_and_known_to_be_right(pool):
    own = pool()
    rng = np.random.default_rng(3)
    for pair in (0, 3):
        grid = rng.integers(0, 10, (4, 7)).astype(np.uint8)
        own.write(pair, grid, right=pair == 3)
        np.testing.assert_array_equal(stored(own, pair), grid)
        assert own.there[pair]
    assert own.there.sum() == 2
    assert own.right.tolist() == [pair == 3 for pair in range(own.num_pairs)]
    own.write(0, None)
    assert not own.there[0]


def test_a_round_drafts_pairs_that_are_drawn_and_no_others(pool):
    own = pool(weights={"a": 0.0}, draft_temperature=50)  # so hot that some grids soon end
    share = own.refresh(1000)
    assert own.there.any()
    assert not own.there[~own.source.drawable].any()
    assert share == own.right.float().sum() / own.source.drawable.sum()
    for pair in own.there.nonzero()[:, 0].tolist():
        grid = stored(own, pair)
        assert grid.max() < 10
        assert max(grid.shape) <= 30


def test_rounds_come_every_so_many_steps_and_go_on_where_a_run_is_resumed(pool):
    own = pool(draft_every=3, drafted_pairs=2, draft_temperature=1.0)
    rounds = []
    for _ in range(7):
        before = torch.get_rng_state()
        own.prepare()
        rounds.append(not torch.equal(before, torch.get_rng_state()))
    assert rounds == [True, False, False, True, False, False, True]
    held, state = {n: t.clone() for n, t in own.carry().items()}, torch.get_rng_state()
    twin = pool(draft_every=3, drafted_pairs=2, draft_temperature=1.0)
    for name, tensor in twin.carry().items():
        tensor.copy_(held[name])
    torch.set_rng_state(state)
    twins = [twin.prepare() or twin.carry() for _ in range(4)][-1]
    torch.set_rng_state(state)
    for _ in range(4):
        own.prepare()
    for name, tensor in own.carry().items():
        assert torch.equal(tensor, twins[name])


def test_pairs_that_do_not_fit_are_not_drafted(pool):
    own = pool(longest=20)
    assert own.refresh(100) == 0
    assert not own.there.any()
    assert len(questions_of(own.source.base, own.sequences.draw(3))) == 3
