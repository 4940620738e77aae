"""Adaptation learns a task's demonstrations on a copy, in time, and sees nothing else."""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from arctrm.config import AdaptationConfig, InferenceConfig, SolveConfig
from arctrm.data.task import Pair, Task
from arctrm.errors import CheckpointError
from arctrm.model.trunk import TASK_TABLES
from arctrm.reader.scoring import score
from arctrm.solve.adapt import (
    Adapter,
    adapt,
    held_out,
    probe_task,
    require_adaptable,
    share_of_adaptation,
)
from arctrm.solve.budget import Clock, Session
from arctrm.solve.questions import questions
from arctrm.solve.weights import load_solver

CONFIG = AdaptationConfig(tokens_per_batch=256)
TRM_ONLY = {"own_head.weight", "halt_head.weight", "halt_head.bias", "voice_emb"}


def adapted(solver, task, steps, seed=0, demonstrations=None, config=CONFIG):
    adapter = Adapter(solver, task, config, seed)
    trained_on = replace(task, demonstrations=tuple(demonstrations or task.demonstrations))
    adapter.train(trained_on, time.monotonic() + 60.0, steps)  # ends at its steps
    return adapter


def weights_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def session_of(solver, task, budget=30.0, **adaptation):
    given = {"tokens_per_batch": 256, **adaptation}
    config = SolveConfig.model_validate({"adaptation": given, "inference": {"views": 2}})
    known = solver.row_of(task) is not None
    return Session(solver, task.without_answers(), config, Clock(budget), known=known)


def demonstration_score(solver, task):
    """Mean log-probability of the demonstrations' outputs under four views, as solving asks."""
    asked = questions(solver, Task(task.id, task.demonstrations, task.demonstrations), 4, seed=0)
    outputs = [task.demonstrations[one.key.index].output for one in asked]
    grids = [[one.shown(output)] for one, output in zip(asked, outputs, strict=True)]
    return np.mean(score(solver.reader, [one.prompt for one in asked], grids))


def test_adaptation_changes_a_copy_and_leaves_the_solver_bit_identical(solver, trained):
    before = weights_of(solver.model)
    adapter = adapted(solver, trained.others[0], 3)
    after = weights_of(adapter.model)
    assert adapter.steps == 3
    assert equal(weights_of(solver.model), before)
    assert not any(parameter.requires_grad for parameter in solver.model.parameters())
    learned = {name for name in before if name not in TASK_TABLES}
    learned = {name for name in learned if not torch.equal(before[name], after[name])}
    assert {"head.weight", "layers.0.qkv_proj.weight", "embed_tokens"} <= learned
    assert not learned & TRM_ONLY  # the reader's voice is adapted


def test_an_unknown_task_starts_at_the_mean_and_a_known_one_at_its_own(solver, trained):
    renamed = replace(trained.known[1], id="renamed")
    for task, row in ((trained.others[0], solver.mean_row), (renamed, solver.row_of(renamed))):
        model = Adapter(solver, task, CONFIG, 0).model
        for name in TASK_TABLES:
            assert torch.equal(getattr(model, name), getattr(solver.model, name)[[row]])


def test_before_any_step_the_copy_answers_as_the_solver_does(solver, trained):
    for task in (trained.known[0], trained.others[0]):
        copy = Adapter(solver, task, CONFIG, 0).answering()
        assert copy.row_of(task) == 0
        assert copy.adapted
        assert demonstration_score(copy, task) == pytest.approx(
            demonstration_score(solver, task), abs=1e-4
        )


def test_answers_are_computed_in_the_readers_own_arithmetic(solver, trained):
    from arctrm.reader.tiny import TinyReader

    def speak(model):
        return solver.speakers._replace(reader=TinyReader(model.cast(torch.bfloat16)))

    narrow = replace(solver, speakers=speak(solver.model), speak=speak)
    adapter = adapted(narrow, trained.others[0], 2)
    assert adapter.model.dtype == torch.bfloat16
    assert {p.dtype for p in adapter.model.parameters()} == {torch.float32}
    assert adapter.answering().reader.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_demonstrations_become_likelier(solver, trained, kind):
    task = trained.others[0]
    config = AdaptationConfig(tokens_per_batch=256, kind=kind, adamw_lr=1e-2, muon_lr=2e-2)
    adapter = adapted(solver, task, 15, config=config)
    before = demonstration_score(solver, task)
    assert demonstration_score(adapter.answering(), task) > 0.8 * before


def test_where_only_trm_answers_trm_is_adapted(solver, trained):
    speak = lambda model: solver.speak(model)._replace(reader=None)
    alone = replace(solver, speakers=solver.speakers._replace(reader=None), speak=speak)
    adapter = adapted(alone, trained.others[0], 3)
    before, after = weights_of(solver.model), weights_of(adapter.model)
    assert not torch.equal(before["own_head.weight"], after["own_head.weight"])
    assert torch.equal(before["head.weight"], after["head.weight"])
    assert adapter.answering().reader is None


def test_batches_are_short_and_hold_the_largest_demonstration(solver, trained):
    short = AdaptationConfig()
    assert Adapter(solver, trained.others[0], short, 0).num_tokens == 256
    large = np.zeros((30, 30), np.uint8)
    task = Task("large", (Pair(large, large), *trained.others[0].demonstrations))
    adapter = adapted(solver, task, 1, config=short)
    assert adapter.num_tokens == 3 + 2 * 30 * 31
    assert adapter.steps == 1


def test_no_step_is_taken_after_the_end(solver, trained):
    adapter, task = Adapter(solver, trained.others[0], CONFIG, 0), trained.others[0]
    before, begin = weights_of(adapter.model), time.monotonic()
    adapter.train(task, begin - 1, 10)
    assert adapter.steps == 0
    assert equal(weights_of(adapter.model), before)
    adapter.train(task, begin + 0.5, 100_000)
    assert time.monotonic() - begin < 5
    assert 1 <= adapter.steps < 100_000


def test_the_seed_decides_what_is_learned_and_test_pairs_do_not(solver, trained):
    task = trained.others[0]
    pair = task.test[0]
    wrong = (Pair(pair.input * 0, 9 - pair.output), *task.test[1:])
    versions = (task, task, replace(task, test=wrong), task.without_answers())
    first, *others = (weights_of(adapted(solver, version, 2).model) for version in versions)
    assert all(equal(first, other) for other in others)
    assert not equal(first, weights_of(adapted(solver, task, 2, seed=1).model))


def test_what_is_held_out_changes_nothing_that_is_learned_before_the_probe(solver, trained):
    """The held-out pair is in the task that the adapter knows, not in what it is trained on."""
    task = trained.others[0]
    index = held_out(task, 0)
    changed, pair = list(task.demonstrations), task.demonstrations[index]
    changed[index] = Pair(9 - pair.input, pair.output[:1] * 0)
    rest = probe_task(task, index).demonstrations
    versions = (task, replace(task, demonstrations=tuple(changed)))
    a, b = (weights_of(adapted(solver, one, 2, demonstrations=rest).model) for one in versions)
    assert equal(a, b)


def test_held_out_names_one_demonstration_where_enough_remain(small_tasks):
    for task in small_tasks:
        assert 0 <= held_out(task, 0) == held_out(task, 0) < len(task.demonstrations)
    pairs = small_tasks[0].demonstrations * 2
    assert len({held_out(Task("many", pairs), seed) for seed in range(30)}) > 2
    assert held_out(Task("few", pairs[:2]), 0) is None


def test_a_probe_asks_for_one_demonstration_from_the_others(small_tasks):
    for task in small_tasks:
        for index, pair in enumerate(task.demonstrations):
            probe = probe_task(task, index)
            assert len(probe.test) == 1
            assert np.array_equal(probe.test[0].input, pair.input)
            assert probe.test[0].output is None
            rest = [one for one in task.demonstrations if one is not pair]
            assert list(map(id, probe.demonstrations)) == list(map(id, rest))


def test_an_unknown_task_is_probed_half_way_and_then_learned_whole(solver, trained):
    session = session_of(solver, trained.others[1], max_steps=3)
    done = adapt(session, 0.6)
    assert done.steps == 6
    assert 0 <= done.leave_one_out <= 1
    assert done.solver.row_of(trained.others[1]) == 0


def test_a_known_task_and_one_of_two_demonstrations_have_none_to_hold_out(solver, trained):
    few = replace(trained.others[0], demonstrations=trained.others[0].demonstrations[:2])
    for task in (trained.known[0], few):
        done = adapt(session_of(solver, task, max_steps=3), 0.6)
        assert (done.steps, done.leave_one_out) == (3, None)


def test_an_older_gpus_float16_answers_and_float32_adapts(trained):
    """Small gradients are zero in float16."""
    narrow = load_solver(trained.run, InferenceConfig(dtype="float16"), torch.device("cpu"))
    adapter = adapted(narrow, trained.others[0], 3)
    assert adapter.model.dtype == torch.float32
    answering = adapter.answering()
    assert answering.reader.dtype == answering.refiner.trunk.dtype == torch.float16
    scores = [demonstration_score(one, trained.others[0]) for one in (narrow, answering)]
    assert scores[0] < scores[1] < 0


def test_without_time_nothing_is_adapted_and_a_probe_that_takes_too_long_is_left_out(
    solver, trained
):
    assert adapt(session_of(solver, trained.others[0], budget=0.001), 0.6) is None
    session = session_of(solver, trained.others[0], max_steps=3)
    session.clock.record("read", 1, 0.1)
    session.clock.record("refine", 1, 1e-9)
    assert adapt(session, 0.6).leave_one_out is None


def test_the_share_depends_on_the_task_and_the_weights(solver, trained):
    shares = {"share": 0.5, "known_share": 0.1}
    assert share_of_adaptation(session_of(solver, trained.others[0], **shares)) == 0.5
    assert share_of_adaptation(session_of(solver, trained.known[0], **shares)) == 0.1
    off = session_of(solver, trained.others[0], enabled=False, **shares)
    assert share_of_adaptation(off) == 0.0
    published = replace(solver, views={"a task": []})
    assert share_of_adaptation(session_of(published, trained.others[0])) == 0.0
    with pytest.raises(CheckpointError, match=r"published TRM checkpoint .*arctrm eval"):
        require_adaptable(published, "solve", "`arctrm eval` takes any checkpoint")
