"""How a stage is made: batches have room for the pairs of the data set, whatever their size."""

import pytest
import torch
from accelerate import Accelerator

from arctrm.config import PretrainConfig
from arctrm.data.dataset import base_set_from_tasks
from arctrm.data.sources import load_tasks
from arctrm.training.reader_stream import LENGTH
from arctrm.training.stages import (
    TOKENS_PER_PAIR_OF_MANY,
    TOKENS_PER_ROW,
    _mean_length,
    new_stage,
    rows_of,
)
from arctrm.training.stream import LENGTH as ROW_LENGTH

TOKENS = 8192


def stage_of(tasks, model, **training):
    config = PretrainConfig.model_validate(
        {
            "model": model,
            "data": {"num_aug": 0, "test_set": None},
            "reader": {"hidden_size": 16, "num_heads": 2, "num_layers": 1},
            "trm": {"hidden_size": 16, "num_heads": 2, "num_layers": 1},
            "training": {"tokens_per_batch": TOKENS, **training},
        }
    )
    base = base_set_from_tasks({"training": tasks, "evaluation": []}, None, 0)
    return new_stage(config, base, Accelerator(cpu=True))


@pytest.fixture(scope="module")
def small_grids():
    """Tasks whose pairs have some twenty tokens."""
    return [t for t in load_tasks("training") if max(p.input.size for p in t.demonstrations) <= 9]


def test_batches_of_small_pairs_are_full(small_grids):
    assert len(small_grids) > 10
    (step,) = stage_of(small_grids, "reader").steps
    used = [int(step.stream.next_batch(step.queue, TOKENS).rows[:, LENGTH].sum()) for _ in range(8)]
    assert sum(used) / len(used) > 0.95 * TOKENS
    (step,) = stage_of(small_grids, "trm").steps
    rows = step.stream.next_batch(step.state, step.model).rows
    assert int(rows[:, ROW_LENGTH].sum()) > 0.85 * TOKENS


def test_pairs_of_the_usual_size_have_the_usual_room():
    """More would cost time: attention launches blocks for every row."""
    tasks = [*load_tasks("training"), *load_tasks("evaluation")]
    (reader,), (trm,) = (stage_of(tasks, model).steps for model in ("reader", "trm"))
    assert reader.queue.shape[0] == rows_of(TOKENS, TOKENS_PER_PAIR_OF_MANY)
    assert trm.state.rows.shape[0] == rows_of(TOKENS) < TOKENS // TOKENS_PER_ROW


def test_a_bound_on_the_rows_is_kept(small_grids):
    (step,) = stage_of(small_grids, "reader", max_rows=5).steps
    assert step.queue.shape[0] == 5


def test_looking_at_the_lengths_leaves_the_generator_as_it_was(small_grids):
    (step,) = stage_of(small_grids, "reader").steps
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    _mean_length(step.stream)
    assert torch.equal(torch.rand(3), expected)
