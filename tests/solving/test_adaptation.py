"""Adaptation learns a task's demonstrations on a copy, in time, and sees nothing else."""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from arctrm.config import InferenceConfig, LearningConfig
from arctrm.data import canvas
from arctrm.data.task import Pair, Task
from arctrm.solving.adaptation import Adapter, held_out, probe_task
from arctrm.solving.candidates import answer, task_queries
from arctrm.solving.weights import load_solver

CONFIG = LearningConfig(tokens_per_batch=512)
LONG = 60.0
"""Seconds: more than any of these adaptations takes; they end at their max_steps."""


@pytest.fixture
def solver(trained):
    return load_solver(trained.run, InferenceConfig(dtype="float32"), torch.device("cpu"))


def adapted(solver, task, steps, seed=0, demonstrations=None):
    adapter = Adapter(solver, [task], CONFIG, seed)
    trained_on = replace(task, demonstrations=tuple(demonstrations or task.demonstrations))
    adapter.train([trained_on], time.monotonic() + LONG, steps)
    return adapter


def weights_of(solver):
    return {name: tensor.clone() for name, tensor in solver.trm.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def demonstration_loss(solver, task, monkeypatch):
    """Mean cross entropy of the demonstrations' cells under four views, as solving would ask."""
    probe = Task(task.id, task.demonstrations, task.demonstrations)
    queries = sorted(task_queries(solver, probe, 4, seed=0), key=lambda q: q.codes.size)
    seen = []
    read_out = solver.trm.read_out

    def spy(z_H, first_token):
        seen.append(read_out(z_H, first_token))
        return seen[-1]

    monkeypatch.setattr(solver.trm, "read_out", spy)
    answer(solver, queries, InferenceConfig(steps=3, tokens_per_batch=32768))
    monkeypatch.setattr(solver.trm, "read_out", read_out)
    rows = seen[-1].logits.split([8 + query.codes.size for query in queries])
    losses = []
    for query, logits in zip(queries, rows, strict=True):
        output = task.demonstrations[query.key[1]].output
        codes = torch.from_numpy(
            canvas.encode(query.view.apply(output), *query.codes.shape).ravel()
        ).long()
        asked = codes != canvas.PAD
        losses.append(torch.nn.functional.cross_entropy(logits[8:][asked], codes[asked]).item())
    return float(np.mean(losses))


# -- the copy


def test_adaptation_changes_a_copy_and_leaves_the_solver_bit_identical(solver, trained):
    before = weights_of(solver)
    adapter = adapted(solver, trained.others[0], 3)
    assert adapter.steps == 3
    assert equal(weights_of(solver), before)
    after = weights_of(adapter.solver)
    learned = [name for name in before if name not in ("puzzle_emb.weights", "H_init", "L_init")]
    assert all(not torch.equal(after[name], before[name]) for name in learned)
    assert not any(parameter.requires_grad for parameter in solver.trm.parameters())


def test_an_unknown_task_starts_at_the_mean_of_the_trained_embeddings(solver, trained):
    adapter = Adapter(solver, [trained.others[0]], CONFIG, 0)
    embedding = adapter.solver.trm.puzzle_emb.weights
    trained_rows = solver.trm.puzzle_emb.weights[: len(trained.known)]
    assert adapter.num_known == 0
    assert embedding.shape[0] == 1
    torch.testing.assert_close(embedding[0].detach(), trained_rows.mean(0))


def test_a_known_task_starts_at_its_own_embedding(solver, trained):
    task = replace(trained.known[4], id="renamed")
    adapter = Adapter(solver, [task], CONFIG, 0)
    assert adapter.num_known == 1
    row = solver.trm.puzzle_emb.weights[solver.row_of(task)]
    assert torch.equal(adapter.solver.trm.puzzle_emb.weights[0], row)


def test_before_any_step_the_copy_answers_as_the_solver_does(solver, trained):
    for task in (trained.known[0], trained.others[0]):
        copy = Adapter(solver, [task], CONFIG, 0).solver
        queries = task_queries(solver, task, 4, seed=0)
        copied = task_queries(copy, task, 4, seed=0)
        assert {query.row for query in copied} == {0}
        assert [q.view for q in copied] == [q.view for q in queries]
        for (_, a), (_, b) in zip(
            answer(solver, queries, InferenceConfig()),
            answer(copy, copied, InferenceConfig()),
            strict=True,
        ):
            assert (a.grid is None) == (b.grid is None)
            assert a.grid is None or np.array_equal(a.grid, b.grid)
            assert a.q == b.q


# -- learning


def test_the_loss_on_the_demonstrations_falls(solver, trained, monkeypatch):
    task = trained.others[0]
    before = demonstration_loss(Adapter(solver, [task], CONFIG, 0).solver, task, monkeypatch)
    adapter = adapted(solver, task, 40)
    after = demonstration_loss(adapter.solver, task, monkeypatch)
    assert after < 0.8 * before
    embedding = adapter.solver.trm.puzzle_emb.weights[0]
    assert not torch.equal(embedding, solver.trm.puzzle_emb.weights[solver.mean_row])


def test_the_same_seed_adapts_to_the_same_weights(solver, trained):
    a, b, c = (weights_of(adapted(solver, trained.others[0], 4, seed).solver) for seed in (0, 0, 1))
    assert equal(a, b)
    assert not equal(a, c)


# -- the clock


def test_no_step_is_taken_after_the_end(solver, trained):
    adapter = Adapter(solver, [trained.others[0]], CONFIG, 0)
    before = weights_of(adapter.solver)
    adapter.train(trained.others[:1], time.monotonic() - 1, 10)
    assert adapter.steps == 0
    assert equal(weights_of(adapter.solver), before)


def test_adaptation_ends_on_time(solver, trained):
    adapter = Adapter(solver, [trained.others[0]], CONFIG, 0)
    begin = time.monotonic()
    adapter.train(trained.others[:1], begin + 1.5, 2000)
    assert time.monotonic() - begin < 2.5
    assert adapter.steps > 3


# -- no answer is seen


def test_test_pairs_change_nothing_that_is_learned(solver, trained):
    for task in (trained.others[0], trained.known[0]):
        pair = task.test[0]
        versions = (
            task,
            replace(task, test=(Pair(pair.input, 9 - pair.output), *task.test[1:])),
            replace(task, test=(Pair(pair.input * 0, pair.output),)),
            task.without_answers(),
        )
        first, *others = (weights_of(adapted(solver, version, 4).solver) for version in versions)
        assert all(equal(first, other) for other in others)


def test_what_is_held_out_changes_nothing_that_is_learned_before_the_probe(solver, trained):
    """The held-out pair is in the task that the adapter knows, not in what it is trained on."""
    task = trained.others[0]
    index = held_out(task, 0)
    pair = task.demonstrations[index]
    changed = list(task.demonstrations)
    changed[index] = Pair(9 - pair.input, pair.output[:1] * 0)
    rest = [p for i, p in enumerate(task.demonstrations) if i != index]
    a, b = (
        weights_of(adapted(solver, version, 4, demonstrations=rest).solver)
        for version in (task, replace(task, demonstrations=tuple(changed)))
    )
    assert equal(a, b)


def test_held_out_names_one_demonstration_where_enough_remain(small_tasks):
    for task in small_tasks:
        index = held_out(task, 0)
        assert 0 <= index < len(task.demonstrations)
        assert held_out(task, 0) == index
    many = next(task for task in small_tasks if len(task.demonstrations) >= 5)
    assert len({held_out(many, seed) for seed in range(30)}) > 2
    few = replace(small_tasks[0], demonstrations=small_tasks[0].demonstrations[:2])
    assert held_out(few, 0) is None
    assert held_out(replace(few, demonstrations=few.demonstrations[:1]), 0) is None


def test_a_probe_asks_for_one_demonstration_from_the_others(small_tasks):
    for task in small_tasks:
        for index, pair in enumerate(task.demonstrations):
            probe = probe_task(task, index)
            assert len(probe.test) == 1
            assert np.array_equal(probe.test[0].input, pair.input)
            assert probe.test[0].output is None
            assert [id(p) for p in probe.demonstrations] == [
                id(p) for i, p in enumerate(task.demonstrations) if i != index
            ]


def test_the_probes_queries_do_not_depend_on_the_held_out_output(solver, trained):
    task = trained.others[0]
    pair = task.demonstrations[1]
    larger = Pair(pair.input, np.full((25, 25), 9, np.uint8))
    other = replace(task, demonstrations=(task.demonstrations[0], larger, task.demonstrations[2]))
    a, b = (
        task_queries(solver, probe_task(version, 1), 6, seed=0)
        for version in (replace(task, demonstrations=task.demonstrations[:3]), other)
    )
    assert len(a) == len(b) == 6
    for x, y in zip(a, b, strict=True):
        assert (x.view, x.row) == (y.view, y.row)
        assert np.array_equal(x.codes, y.codes)
