"""The device stream draws the same views and canvases that the numpy codec defines."""

import numpy as np
import pytest
import torch
from larger import larger

from arctrm.config import DataConfig, TRMConfig
from arctrm.data import canvas
from arctrm.data.dataset import base_set_from_tasks
from arctrm.data.sources import load_tasks
from arctrm.data.views import View
from arctrm.errors import DataError
from arctrm.training import stream as s
from arctrm.training.losses import IGNORE
from arctrm.trm.model import TRM

SMALL = {"hidden_size": 16, "num_heads": 2, "num_layers": 1}
CPU = torch.device("cpu")
TOKENS, ROWS = 4096, 40


@pytest.fixture(scope="module")
def base():
    tasks = {
        "training": load_tasks("training", max_tasks=12),
        "evaluation": load_tasks("evaluation", max_tasks=12),
    }
    return base_set_from_tasks(tasks, "evaluation", 50)


def make(base, data=None, seed=0, scaled=False, **trm):
    config = TRMConfig(**SMALL, **trm)
    torch.manual_seed(seed)
    model = TRM(config, base.num_tasks * (50 if config.task_embedding == "per_view" else 1))
    data = data or DataConfig(num_aug=50)
    stream = s.PairStream(base, data, config, seed, CPU, scaled=scaled)
    return model, stream, stream.new_state(model, TOKENS, ROWS)


def canvases(batch, config):
    """(row, codes, labels) of each row that is there, as 2-D arrays."""
    for index, row in enumerate(batch.rows):
        if row[s.LENGTH] == 0:
            continue
        mine = (batch.tokens.row == index) & (batch.tokens.slot >= config.num_prefix_slots)
        shape = (int(row[s.HEIGHT]), int(row[s.WIDTH]))
        yield row, batch.codes[mine].view(shape).numpy(), batch.labels[mine].view(shape).numpy()


@pytest.mark.parametrize(
    ("layout", "translate"), [("compact", 0.0), ("compact", 1.0), ("reference", 1.0)]
)
def test_rows_are_the_codecs_canvases_of_the_drawn_view(base, layout, translate):
    data = DataConfig(num_aug=50, translate=translate)
    model, stream, state = make(base, data, layout=layout, condition_cells=layout == "compact")
    seen = 0
    for _ in range(4):
        batch = stream.next_batch(state, model)
        state.halted.fill_(True)
        for row, codes, labels in canvases(batch, stream.trm):
            pair = base.pair(int(row[s.PAIR]))
            view = View(int(row[s.DIHEDRAL]), tuple(row[s.COLOURS].tolist()))
            assert view.identity_colours == bool(row[s.FLAG])
            where = (int(row[s.SHIFT_Y]), int(row[s.SHIFT_X]))
            output = canvas.encode(view.apply(pair.output), *labels.shape, where).astype(int)
            np.testing.assert_array_equal(
                codes, canvas.encode(view.apply(pair.input), *codes.shape, where)
            )
            np.testing.assert_array_equal(labels, np.where(output > 0, output, IGNORE))
            seen += 1
    assert seen > 12


def test_some_rows_are_shown_larger_by_blocks_and_in_shapes(base):
    factors, shapes = ((2, 2), (1, 3)), ("pad", "lines", "tile", "stretch")
    scaling = {"share": 0.8, "factors": factors, "shapes": shapes, "sides": 28}
    model, stream, state = make(base, scaled=True, scaling=scaling)
    seen = [0] * 7
    for _ in range(24):
        batch = stream.next_batch(state, model)
        state.halted.fill_(True)
        for row, codes, labels in canvases(batch, stream.trm):
            view = View(int(row[s.DIHEDRAL]), tuple(row[s.COLOURS].tolist()))
            scale = int(row[s.SCALE])
            pair = base.pair(int(row[s.PAIR]))
            shown = [
                larger(view.apply(grid), row[s.SHOWN], scaling)
                for grid in (pair.input, pair.output)
            ]
            given, output = (canvas.encode(grid, *codes.shape, (0, 0)) for grid in shown)
            np.testing.assert_array_equal(codes, given)
            np.testing.assert_array_equal(labels, np.where(output > 0, output.astype(int), IGNORE))
            assert not scale or max(max(grid.shape) for grid in shown) <= 28
            seen[scale] += 1
    assert min(seen) > 5


def test_a_stream_that_is_not_to_scale_draws_what_one_without_scaling_draws(base):
    drawn = []
    for scaling in ({"share": 0.5}, {}):
        _, stream, _ = make(base, scaling=scaling)
        torch.manual_seed(0)
        drawn.append(stream.draw(200))
    assert torch.equal(*drawn)
    assert (drawn[0][:, s.SCALE] == 0).all()


def test_fixed_colours_are_never_moved(base):
    _, stream, _ = make(base)
    rows = stream.draw(2000)
    task = stream.source.pairs[rows[:, s.PAIR], 0]
    moved = rows[:, s.COLOURS] != torch.arange(10)
    assert moved.any()
    assert not (moved & stream.source.fixed[task]).any()
    assert (rows[:, s.COLOURS].sort(1).values == torch.arange(10)).all()


def test_num_aug_bounds_the_distinct_views_of_a_task(base):
    data = DataConfig(num_aug=3)
    small = base_set_from_tasks({"training": load_tasks("training", max_tasks=1)}, None, 3)
    config = TRMConfig(**SMALL)
    rows = s.PairStream(small, data, config, 0, CPU).draw(500)
    views = {(int(r[s.DIHEDRAL]), tuple(r[s.COLOURS].tolist())) for r in rows}
    assert 2 <= len(views) <= 3
    assert (0, tuple(range(10))) in views


def test_per_view_embeddings_have_one_row_per_task_and_view(base):
    _, stream, _ = make(base, task_embedding="per_view")
    rows = stream.draw(3000)
    by_row = {}
    for row in rows:
        view = (int(row[s.DIHEDRAL]), tuple(row[s.COLOURS].tolist()))
        assert by_row.setdefault(int(row[s.EMBEDDING]), view) == view
    assert max(by_row) < base.num_tasks * 50
    assert len(by_row) > base.num_tasks


def test_unfinished_rows_keep_their_latents_and_finished_ones_start_afresh(base):
    model, stream, state = make(base)
    first = stream.next_batch(state, model)
    marks = torch.where(first.tokens.row < ROWS, first.tokens.row + 1.0, 0.0)
    state.z_H.copy_(marks[:, None].expand_as(state.z_H))
    real = first.rows[:, s.LENGTH] > 0
    state.halted.copy_(real & (torch.arange(ROWS) % 2 == 0))
    kept = torch.nonzero(real & ~state.halted)[:, 0]
    second = stream.next_batch(state, model)
    assert len(kept) > 2
    for place, old in enumerate(kept):
        mine = second.tokens.row == place
        assert torch.equal(second.rows[place], first.rows[old])
        assert (second.latents.z_H[mine] == old + 1.0).all()
    fresh = (second.tokens.row >= len(kept)) & (second.tokens.row < ROWS)
    assert fresh.any()
    expected = model.H_init.expand(int(fresh.sum()), -1)
    assert torch.equal(second.latents.z_H[fresh], expected)


def test_large_canvases_are_drawn_as_often_as_their_weight_says(base):
    """Packing must not prefer rows that happen to fit."""
    model, stream, state = make(base)
    drawn = stream.draw(20000)[:, s.LENGTH].float().mean()
    packed = []
    for _ in range(400):
        batch = stream.next_batch(state, model)
        packed.append(batch.rows[batch.rows[:, s.LENGTH] > 0, s.LENGTH])
        state.halted.copy_(batch.rows[:, s.LENGTH] > 0)
    assert torch.cat(packed).float().mean() == pytest.approx(drawn.item(), rel=0.05)


def test_batches_are_well_filled_and_never_overfull(base):
    model, stream, state = make(base)
    for _ in range(20):
        batch = stream.next_batch(state, model)
        used = int(batch.rows[:, s.LENGTH].sum())
        assert TOKENS * 0.6 < used <= TOKENS
        state.halted.copy_(torch.rand(ROWS) < 0.5)


def test_weights_choose_the_subset(base):
    _, stream, _ = make(base, DataConfig(num_aug=50, weights={"training": 0.0}))
    pairs = stream.source.pairs[stream.draw(500)[:, s.PAIR], 1]
    assert (pairs == base.meta.subsets.index("evaluation")).all()


def test_a_weight_for_an_unknown_subset_is_refused(base):
    with pytest.raises(DataError, match=r"re_arc.*training, evaluation"):
        make(base, DataConfig(num_aug=50, weights={"re_arc": 0.5}))


@pytest.mark.parametrize("weight", [-1.0, float("inf"), float("nan")])
def test_a_weight_is_a_finite_number_of_at_least_zero(weight):
    with pytest.raises(ValueError, match="weights"):
        DataConfig(weights={"training": weight})
