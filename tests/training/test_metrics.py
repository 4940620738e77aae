"""Counts on the device become means per sample."""

import pytest
import torch
from accelerate import Accelerator

from arctrm.training.metrics import Metrics
from arctrm.training.step import COUNTS
from arctrm.training.tracking import METRICS

FIRST = {
    "rows": 4.0,
    "cell_loss": 6.0,
    "halt_loss": 2.0,
    "exact": 1.0,
    "shape": 3.0,
    "cell_accuracy": 2.5,
    "finished": 2.0,
    "finished_steps": 5.0,
    "tokens": 400.0,
}
SECOND = {name: 2 * value for name, value in FIRST.items()} | {"exact": 5.0}


@pytest.fixture
def counts():
    return [torch.tensor([c[name] for name in COUNTS]).double() for c in (FIRST, SECOND)]


@pytest.fixture
def metrics(counts):
    return Metrics(Accelerator(cpu=True), counts)


def test_means_are_over_the_rows_of_all_batches(metrics):
    got = metrics()
    assert got["examples"] == 12
    assert got["cell_loss"] == pytest.approx(18 / 12)
    assert got["halt_loss"] == pytest.approx(6 / 12)
    assert got["loss"] == pytest.approx((18 + 0.5 * 6) / 12)
    assert got["exact_match"] == pytest.approx(6 / 12)
    assert got["shape_match"] == pytest.approx(9 / 12)
    assert got["cell_accuracy"] == pytest.approx(7.5 / 12)


def test_steps_are_averaged_over_the_rows_that_finished(metrics):
    assert metrics()["avg_trm_steps"] == pytest.approx(15 / 6)


def test_reading_starts_a_new_count_and_an_empty_one_is_zero(metrics, counts):
    metrics()
    assert not torch.stack(counts).any()
    again = metrics()
    assert again["examples"] == again["loss"] == again["avg_trm_steps"] == 0.0


def test_the_seven_metrics_of_every_stage_are_there(metrics):
    got = metrics()
    assert set(METRICS) <= set(got)
    assert got["avg_attempts"] == 1.0
    assert got["avg_reasoning_length"] == 0.0


def test_throughput_is_per_second_since_the_last_reading(metrics):
    metrics.read_at -= 2.0
    got = metrics()
    assert got["examples_per_second"] == pytest.approx(6, rel=0.05)
    assert got["tokens_per_second"] == pytest.approx(600, rel=0.05)
