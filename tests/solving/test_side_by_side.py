"""`eval` adapts to all tasks in one job: on their demonstrations, and on nothing else of them."""

import json
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from arctrm.config import EvalConfig, LearningConfig
from arctrm.data.task import Pair
from arctrm.errors import CheckpointError, OverlapError, ResourceError
from arctrm.hybrid import Hybrid
from arctrm.reader.hub_module import HubModule
from arctrm.reader.tiny import TinyReader
from arctrm.solving import learners, parts, side_by_side
from arctrm.solving.adaptation import Adapter
from arctrm.solving.evaluate import load, run
from arctrm.solving.learners import batch_tokens
from arctrm.solving.side_by_side import adapt
from arctrm.solving.weights import load_solver
from arctrm.trm.model import TRM

CPU = torch.device("cpu")
KINDS = ("trm", "reader", "pooled", "coupled")


def config(checkpoint=None, test_set="training", seed=0, **evaluation) -> EvalConfig:
    return EvalConfig.model_validate(
        {
            "seed": seed,
            "checkpoint": checkpoint,
            "evaluation": {"test_set": str(test_set), "adapt_steps": 2, **evaluation},
            "inference": {"views": 2, "steps": 1, "dtype": "float32"},
            "reader": {"rank": "votes"},
            "adaptation": {"tokens_per_batch": 256},
        }
    )


@pytest.fixture(scope="module")
def checkpoint_of(trained, tiny_reader, joined):
    folders = {
        "trm": lambda: trained.run,
        "reader": lambda: tiny_reader,
        "pooled": lambda: joined(False),
        "coupled": lambda: joined(True),
    }
    return lambda kind: folders[kind]()


@pytest.fixture(scope="module")
def solver_of(checkpoint_of):
    return lambda kind: load_solver(checkpoint_of(kind), config().inference, CPU)


@pytest.fixture(scope="module")
def tasks(trained):
    """Two that the checkpoints do not know between two that they do, not in the order of ids."""
    mixed = (trained.others[1], trained.known[3], trained.others[0], trained.known[0])
    return [task.without_answers() for task in mixed]


def weights_of(solver):
    return {name: tensor.clone() for name, tensor in solver.model.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# -- the job


@pytest.mark.parametrize("kind", KINDS)
def test_one_job_trains_the_shared_weights_and_an_embedding_for_each_task(solver_of, tasks, kind):
    solver = solver_of(kind)
    before = weights_of(solver)
    adapted = adapt(solver, tasks, config(), Accelerator(cpu=True))
    assert (adapted.steps, adapted.num_known) == (2, 2)
    assert equal(weights_of(solver), before)
    after = weights_of(adapted.solver)
    embeddings = [name for name in after if name.endswith("puzzle_emb.weights")]
    assert all(after[name].shape[0] == len(tasks) for name in embeddings)
    still = {n for n in after if n not in embeddings and torch.equal(after[n], before[n])}
    assert all(name.split(".")[-1] in ("H_init", "L_init") for name in still)
    assert not any(parameter.requires_grad for parameter in adapted.solver.model.parameters())


def test_every_task_starts_at_its_own_embedding_or_at_the_mean(solver_of, tasks):
    solver = solver_of("trm")
    adapter = Adapter(solver, tasks, config().adaptation, 0)
    there, here = (s.model.puzzle_emb.weights.detach() for s in (solver, adapter.solver))
    for task in tasks:
        row = solver.row_of(task)
        expected = there[solver.mean_row if row is None else row]
        assert torch.equal(here[adapter.solver.row_of(task)], expected)


def test_every_demonstration_of_every_task_is_drawn_under_its_own_embedding(solver_of, tasks):
    adapter = Adapter(solver_of("trm"), tasks, config().adaptation, 0)
    [step] = adapter.new_steps(tasks)
    pairs = [(int(row), int(pair)) for pair, (row, *_) in enumerate(step.stream.source.pairs)]
    counts = np.bincount([row for row, _ in pairs]).tolist()
    by_id = sorted(tasks, key=lambda task: task.id)
    assert counts == [len(task.demonstrations) for task in by_id]
    assert [adapter.solver.rows[task.id] for task in by_id] == list(range(len(tasks)))
    drawn = step.stream.draw(500)
    assert set(zip(drawn[:, 1].tolist(), drawn[:, 0].tolist(), strict=True)) == set(pairs)


def test_a_batch_holds_the_largest_demonstration_of_any_task(solver_of, tasks):
    grid = np.zeros((30, 30), np.uint8)
    large = replace(tasks[1], demonstrations=(Pair(grid, grid),))
    for kind in KINDS:
        adapter = Adapter(
            solver_of(kind), [*tasks, replace(large, id="large")], config().adaptation, 0
        )
        assert min(adapter.num_tokens) >= 900
        for part in adapter.parts:
            assert batch_tokens(part, tasks, config().adaptation) < 900


@pytest.mark.parametrize(
    ("kind", "hub", "on_gpu", "on_cpu"),
    [
        (TRM, None, {1: 1024, 5: 5120, 16: 16384, 400: 16384}, {1: 256, 3: 768, 400: 1024}),
        (TinyReader, None, {1: 1024, 400: 16384}, {1: 256, 400: 1024}),
        (Hybrid, None, {1: 1024, 400: 16384}, {1: 256, 400: 1024}),
        (Hybrid, "a model", {1: 8192, 400: 8192}, {1: 256, 400: 1024}),
        (HubModule, None, {1: 8192, 400: 8192}, {1: 256, 400: 1024}),
    ],
)
def test_a_batch_grows_with_the_tasks_up_to_a_bound_except_of_a_hub_reader_on_a_gpu(
    kind, hub, on_gpu, on_cpu, tasks, monkeypatch
):
    monkeypatch.setattr(learners, "least_tokens", lambda part, tasks: 100)
    for is_cuda, expected in ((True, on_gpu), (False, on_cpu)):
        part = part_on(is_cuda, kind, hub)
        usual = {n: batch_tokens(part, tasks[:1] * n, LearningConfig()) for n in expected}
        assert usual == expected
        set_by_hand = LearningConfig(tokens_per_batch=2000)
        assert batch_tokens(part, tasks, set_by_hand) == 2000
        with monkeypatch.context() as patch:
            patch.setattr(learners, "least_tokens", lambda part, tasks: 20000)
            assert batch_tokens(part, tasks, set_by_hand) == 20000


def part_on(is_cuda, kind, hub):
    """Something of this kind that says where its weights are."""
    part = Mock(spec=kind, hub=hub)
    part.parameters.side_effect = lambda: iter([SimpleNamespace(is_cuda=is_cuda)])
    return part


def test_a_large_batch_has_few_rows_that_stay_empty(solver_of, tasks):
    """And as many as before where few are needed or grids are small."""
    pair = tasks[0].demonstrations[0]
    wide = Pair(np.zeros((19, 19), np.uint8), np.zeros((19, 19), np.uint8))
    for grids, tokens, rows in ((wide, 65536, 208), (wide, 1024, 16), (pair, 65536, 1024)):
        task = replace(tasks[0], demonstrations=(grids,))
        learning = config().adaptation.model_copy(update={"tokens_per_batch": tokens})
        for kind in ("trm", "reader"):
            adapter = Adapter(solver_of(kind), [task], learning, 0)
            [step] = adapter.new_steps([task])
            if kind == "trm":
                assert len(step.state.rows) == rows
            else:
                assert len(step.queue) <= rows


def test_a_wall_clock_budget_ends_the_job(solver_of, tasks):
    settings = config(adapt_steps=0, adapt_budget=0.5)
    adapted = adapt(solver_of("trm"), tasks, settings, Accelerator(cpu=True))
    assert adapted.steps > 1
    assert 0.5 <= adapted.seconds < 2


def test_out_of_memory_names_the_key(solver_of, tasks, monkeypatch):
    def full(self, step, factor):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("arctrm.solving.adaptation.Learner.learn", full)
    with pytest.raises(ResourceError, match=r"adaptation\.tokens_per_batch=128"):
        adapt(solver_of("trm"), tasks, config(), Accelerator(cpu=True))


# -- no answer is seen


def test_test_pairs_change_nothing_that_is_learned(solver_of, trained):
    tasks = [trained.others[0], trained.known[0]]
    wrong = [replace(t, test=tuple(Pair(p.input * 0, 9 - p.output) for p in t.test)) for t in tasks]
    learned = [
        weights_of(adapt(solver_of("trm"), version, config(), Accelerator(cpu=True)).solver)
        for version in (tasks, wrong, [task.without_answers() for task in tasks])
    ]
    assert equal(learned[0], learned[1])
    assert equal(learned[0], learned[2])


def test_a_demonstration_that_is_the_test_pair_of_another_task_is_refused(
    trained, write_tasks, tmp_path
):
    leaking, other = trained.known[:2]
    pair = Pair(other.test[0].input.T, other.test[0].output.T)  # turned, it is the same
    leaking = replace(leaking, demonstrations=(*leaking.demonstrations, pair))
    folder = write_tasks(tmp_path / "tasks", [leaking, other])
    with pytest.raises(OverlapError, match=f"{leaking.id} \\(test pair of {other.id}\\)"):
        load(config(trained.run, folder))
    assert len(load(config(trained.run, folder, adapt_steps=0))[0]) == 2


# -- eval


@pytest.mark.parametrize("kind", ["trm", "coupled"])
def test_the_scores_come_from_the_adapted_weights_and_one_row_from_those_before(
    checkpoint_of, tasks, trained, write_tasks, tmp_path, kind, monkeypatch
):
    whole = [task for task in (*trained.known, *trained.others) if task.id in {t.id for t in tasks}]
    folder = write_tasks(tmp_path / "tasks", whole)
    ablate = ["no-adaptation"] + ["no-reader"] * (kind == "coupled")
    asked = []
    answer_all = parts.answer_all
    monkeypatch.setattr(
        parts, "answer_all", lambda s, *rest: asked.append(s) or answer_all(s, *rest)
    )
    run(config(checkpoint_of(kind), folder, ablate=ablate), tmp_path / "out")
    plain = config(checkpoint_of(kind), folder, adapt_steps=0)
    run(plain, tmp_path / "plain")
    names = [solver.name for solver in asked[: len(ablate) + 1]]
    assert names == ["adapted", asked[-1].name, *["adapted"] * (len(ablate) - 1)]
    written, before = (
        json.loads((tmp_path / out / "scores.json").read_text()) for out in ("out", "plain")
    )
    assert written["checkpoint"] == before["checkpoint"]
    assert written["adaptation"]["steps"] == 2
    assert before["adaptation"] is None
    rows = json.loads((tmp_path / "out/ablations.json").read_text())
    assert list(rows) == ["everything", *ablate]
    assert rows["no-adaptation"]["tasks"] == before["tasks"]


def test_the_job_learns_the_demonstrations(solver_of, trained, monkeypatch):
    """From unknown tasks' first steps to the last, the loss that is shown falls."""
    shown = []
    update = side_by_side.TrainingProgress.update

    def recorded(self, step, elapsed, metrics=None):
        shown.extend([] if metrics is None else [metrics["loss"]])
        update(self, step, elapsed, metrics)

    monkeypatch.setattr(side_by_side.TrainingProgress, "update", recorded)
    settings = config(adapt_steps=120)
    adapt(solver_of("trm"), [t.without_answers() for t in trained.others], settings, Accelerator())
    assert len(shown) == 6
    assert shown[-1] < 0.85 * shown[0]


def test_a_checkpoint_that_cannot_adapt_is_refused_before_anything_is_written(
    trained, trained_per_view, tmp_path
):
    with pytest.raises(CheckpointError, match=r"per_view.*evaluation\.adapt_steps = 2"):
        run(config(trained_per_view, trained.folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()
