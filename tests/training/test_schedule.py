"""The learning-rate schedule keeps to its length, in steps and in time."""

import pytest

from arctrm.config import ScheduleConfig
from arctrm.training.schedule import Schedule


def test_steps_warm_up_stay_constant_and_decay_to_zero():
    schedule = Schedule(ScheduleConfig(max_steps=100, warmup_steps=10, constant_fraction=0.4))
    factors = [schedule.factor(step, elapsed=0.0) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[4] == pytest.approx(0.5)
    assert factors[9:41] == [1.0] * 32
    assert factors[70] == pytest.approx(0.5)
    assert factors[100] == 0.0


def test_a_time_budget_decays_on_the_clock_whatever_the_step():
    schedule = Schedule(ScheduleConfig(budget="10m", warmup_steps=0, constant_fraction=0.5))
    assert schedule.factor(step=7, elapsed=300.0) == 1.0
    assert schedule.factor(step=7, elapsed=450.0) == pytest.approx(0.5)
    assert schedule.factor(step=123456, elapsed=450.0) == pytest.approx(0.5)
    assert not schedule.finished(step=10**9, elapsed=599.9)
    assert schedule.finished(step=1, elapsed=600.0)


def test_steps_end_on_the_last_step_whatever_the_time():
    schedule = Schedule(ScheduleConfig(max_steps=5))
    assert not schedule.finished(4, elapsed=1e9)
    assert schedule.finished(5, elapsed=0.0)
    assert schedule.progress(50, elapsed=0.0) == 1.0


@pytest.mark.parametrize("max_steps", [1, 2, 10, 100, 199, 201, 399])
def test_a_run_shorter_than_its_warmup_still_reaches_a_useful_rate(max_steps):
    schedule = Schedule(ScheduleConfig(max_steps=max_steps, warmup_steps=200))
    factors = [schedule.factor(step, 0.0) for step in range(max_steps)]
    assert all(0 < factor <= 1 for factor in factors)
    assert max(factors) > 0.8 or max_steps < 3


def test_a_time_budget_too_short_for_the_warmup_still_reaches_a_useful_rate():
    schedule = Schedule(ScheduleConfig(budget=10.0, warmup_steps=200))
    factors = [schedule.factor(step, elapsed=0.5 * step) for step in range(20)]
    assert max(factors) > 0.8


def test_no_decay_when_the_constant_part_is_the_whole_run():
    schedule = Schedule(ScheduleConfig(max_steps=10, warmup_steps=0, constant_fraction=1.0))
    assert [schedule.factor(step, 0.0) for step in range(11)] == [1.0] * 11
