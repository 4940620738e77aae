"""The dry run's arithmetic."""

import pytest

from arctrm.config import (
    OptimiserConfig,
    ReaderConfig,
    ScheduleConfig,
    TrainingConfig,
    TRMConfig,
)
from arctrm.training.estimate import block_parameters, estimate, memory_bytes, operations_per_token

TRM_SMALL = TRMConfig(hidden_size=64, num_heads=2, num_layers=2, H_cycles=3, L_cycles=4)


def test_operations_are_counted_as_by_hand():
    weights = 4 * 64 * 64 + 3 * 64 * 256  # q, k, v, out; gate, up, down
    one_pass = 2 * 2 * weights  # two layers, multiply and add
    passes = 3 * (4 + 1)  # H cycles x (L updates + the H update)
    with_gradient = 4 + 1  # the last H cycle goes backward too, at twice the cost
    assert operations_per_token(TRM_SMALL) == one_pass * (passes + 2 * with_gradient)


def test_a_checkpointed_reader_goes_forward_once_more_and_keeps_the_inputs_of_its_layers():
    plain = ReaderConfig(hidden_size=64, num_heads=2, num_layers=20)
    again = plain.model_copy(update={"gradient_checkpointing": True})
    assert operations_per_token(again) == pytest.approx(operations_per_token(plain) * 4 / 3)
    training = TrainingConfig(tokens_per_batch=2**20)
    assert memory_bytes(again, training, 0) < 0.2 * memory_bytes(plain, training, 0)


def test_injection_is_one_matrix_more_in_every_pass():
    plain = ReaderConfig(hidden_size=64, num_heads=2, num_layers=2, loops=3)
    more = plain.model_copy(update={"injection": True})
    assert block_parameters(more) - block_parameters(plain) == 6 * 64**2
    assert operations_per_token(more) - operations_per_token(plain) == 6 * 6 * 64**2


def test_memory_is_linear_in_the_tokens_on_top_of_the_weights():
    at = [
        memory_bytes(TRM_SMALL, TrainingConfig(tokens_per_batch=n), 1000)
        for n in (1024, 2048, 4096)
    ]
    assert at[2] - at[1] == pytest.approx(2 * (at[1] - at[0]))
    assert at[1] > at[0] > 0


def test_adamw_alone_keeps_one_number_more_per_weight_of_the_blocks():
    muon = memory_bytes(TRM_SMALL, TrainingConfig(), 10**6)
    adamw = memory_bytes(TRM_SMALL, TrainingConfig(optimiser=OptimiserConfig(kind="adamw")), 10**6)
    assert adamw - muon == 4 * block_parameters(TRM_SMALL)


def test_without_an_average_one_number_less_is_kept_per_weight():
    kept = memory_bytes(TRM_SMALL, TrainingConfig(), 10**6)
    assert kept - memory_bytes(TRM_SMALL, TrainingConfig(ema_decay=0.0), 10**6) == 4 * 10**6


def test_a_budget_is_the_length_and_steps_follow_from_the_speed():
    by_time = TrainingConfig(schedule=ScheduleConfig(budget="10m"))
    assert estimate(TRM_SMALL, by_time, 1000)["length"].startswith("10.0 min")
    by_steps = TrainingConfig(schedule=ScheduleConfig(max_steps=1234))
    assert "1,234 steps" in estimate(TRM_SMALL, by_steps, 1000)["length"]


def test_all_lines_are_there():
    lines = estimate(TRM_SMALL, TrainingConfig(), 1000)
    assert {"device", "memory", "speed", "length"} <= set(lines)
