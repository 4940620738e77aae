"""Reader and TRM in one pool: who answers, what each ablation leaves out, no effect of packing."""

import numpy as np
import pytest
import torch

from arctrm.config import EvalConfig
from arctrm.solving.candidates import answer
from arctrm.solving.pool import pooled, proposals, questions
from arctrm.solving.reading import turned_back
from arctrm.solving.weights import load_solver

CONFIG = EvalConfig.model_validate(
    {"inference": {"views": 4, "steps": 2, "tokens_per_batch": 1024, "dtype": "float32"}}
)


@pytest.fixture(scope="module")
def solvers(trained, tiny_reader, joined):
    """A solver by kind."""
    folders = {
        "trm": lambda: trained.run,
        "reader": lambda: tiny_reader,
        "pooled": lambda: joined(False),
        "coupled": lambda: joined(True),
        "coupled_tasks": lambda: joined(True, "task"),
        "ensemble": lambda: joined(ensemble=True),
    }
    device = torch.device("cpu")
    return lambda kind: load_solver(folders[kind](), CONFIG.inference, device)


@pytest.fixture(scope="module")
def tasks(trained):
    return [task.without_answers() for task in (*trained.known[:2], *trained.others[:2])]


def asked_of(solver, tasks):
    asked = questions(solver, tasks, CONFIG.inference.views, CONFIG.seed)
    return asked, proposals(solver, asked, CONFIG) if solver.reader is not None else None


def said(found, source=None):
    """(test input, grid, q) of each candidate, of one source."""
    return [
        (key, None if c.grid is None else c.grid.tolist(), c.q)
        for key, c in found
        if source in (None, c.source)
    ]


def same(a, b, tolerance=1e-4):
    grids = [entry[:2] for entry in a] == [entry[:2] for entry in b]
    return grids and np.allclose([e[2] for e in a], [e[2] for e in b], atol=tolerance)


@pytest.mark.parametrize(
    ("kind", "sources"),
    [
        ("trm", {"trm"}),
        ("reader", {"reader"}),
        ("pooled", {"reader", "trm"}),
        ("coupled", {"reader", "hybrid"}),
        ("ensemble", {"reader", "reader2", "hybrid"}),
    ],
)
def test_every_model_answers_every_question_once(solvers, tasks, kind, sources):
    solver = solvers(kind)
    asked, drafts = asked_of(solver, tasks)
    found = pooled(solver, asked, drafts, CONFIG)
    inputs = sum(len(task.test) for task in tasks)
    assert len(asked) == inputs * CONFIG.inference.views
    assert {candidate.source for _, candidate in found} == sources
    assert len(found) == len(asked) * len(sources)


def test_both_models_are_asked_for_the_same_input_under_the_same_view(solvers, tasks):
    for kind in ("pooled", "coupled_tasks"):
        for question in asked_of(solvers(kind), tasks)[0]:
            assert question.query.key == question.reading.key
            assert question.query.view == question.reading.view
            assert question.query.row == question.reading.prompt.condition[0]


# -- ablations


@pytest.mark.parametrize("kind", ["pooled", "coupled"])
def test_no_reader_is_trm_alone(solvers, tasks, kind):
    solver = solvers(kind)
    asked, drafts = asked_of(solver, tasks)
    found = pooled(solver, asked, drafts, CONFIG, ablation="no-reader")
    alone = answer(solver, [question.query for question in asked], CONFIG.inference)
    assert {candidate.source for _, candidate in found} == {"trm"}
    assert said(found) == said(alone)


@pytest.mark.parametrize("kind", ["pooled", "coupled"])
def test_no_trm_is_the_reader_alone(solvers, tasks, kind):
    solver = solvers(kind)
    asked, drafts = asked_of(solver, tasks)
    found = pooled(solver, asked, drafts, CONFIG, ablation="no-trm")
    assert said(found) == said(pooled(solver, asked, drafts, CONFIG), "reader")
    for (_, candidate), question, own in zip(found, asked, drafts[0], strict=True):
        expected = turned_back(question.reading, own[0].grid)
        assert np.array_equal(candidate.grid, expected) or candidate.grid is expected is None


@pytest.mark.parametrize("kind", ["pooled", "coupled"])
def test_no_coupling_pools_what_each_says_alone(solvers, tasks, kind):
    solver = solvers(kind)
    asked, drafts = asked_of(solver, tasks)
    apart = pooled(solver, asked, drafts, CONFIG, ablation="no-coupling")
    no_trm = pooled(solver, asked, drafts, CONFIG, ablation="no-trm")
    assert said(apart) == said(no_trm) + said(
        pooled(solver, asked, drafts, CONFIG, ablation="no-reader")
    )


def test_what_joins_the_models_is_what_changes_trms_answers(solvers, tasks):
    """Each of draft, context and reader matters to a coupled TRM, none to one that only pools."""
    for kind, source in (("coupled", "hybrid"), ("pooled", "trm")):
        solver = solvers(kind)
        asked, drafts = asked_of(solver, tasks)
        whole = said(pooled(solver, asked, drafts, CONFIG), source)
        for ablation in ("no-draft", "swap-context"):
            other = said(pooled(solver, asked, drafts, CONFIG, ablation=ablation), source)
            assert same(other, whole) == (kind == "pooled"), (kind, ablation)


def test_no_draft_is_a_reader_that_proposed_nothing(solvers, tasks):
    solver = solvers("coupled")
    asked, drafts = asked_of(solver, tasks)
    ablated = pooled(solver, asked, drafts, CONFIG, ablation="no-draft")
    nothing = pooled(solver, asked, [[[] for _ in asked]], CONFIG)
    assert said(ablated, "hybrid") == said(nothing, "hybrid")


def test_swap_context_gives_a_question_what_was_said_of_another(solvers, tasks):
    """Swapped among questions, by half of them: swapping twice is not swapping."""
    solver = solvers("coupled")
    asked, drafts = asked_of(solver, tasks)
    count = len(asked) // 2 * 2
    asked, drafts = asked[:count], drafts[0][:count]
    half = count // 2
    whole = said(pooled(solver, asked, [drafts], CONFIG), "hybrid")
    order = [*range(half, count), *range(half)]
    mixed = [
        type(question)(question.query, asked[other].reading)
        for question, other in zip(asked, order, strict=True)
    ]
    swapped = said(
        pooled(solver, mixed, [[drafts[i] for i in order]], CONFIG, ablation="swap-context"),
        "hybrid",
    )
    assert same(swapped, whole)


def test_every_reader_of_an_ensemble_proposes_as_it_would_alone(solvers, tasks, trained_reader):
    solver = solvers("ensemble")
    asked, drafts = asked_of(solver, tasks)
    second = load_solver(trained_reader(seed=1), CONFIG.inference, torch.device("cpu"))
    alone = said(pooled(second, asked, proposals(second, asked, CONFIG), CONFIG))
    whole = pooled(solver, asked, drafts, CONFIG)
    assert same(said(whole, "reader2"), alone)
    assert not same(said(whole, "reader"), alone)


def test_without_its_ensemble_a_hybrid_answers_as_one_that_has_none(solvers, tasks):
    """TRM hears the first reader only; what the second proposed is left out."""
    solver = solvers("ensemble")
    asked, drafts = asked_of(solver, tasks)
    left = said(pooled(solver.without_ensemble(), asked, drafts, CONFIG))
    whole = pooled(solver, asked, drafts, CONFIG)
    assert left == said(whole, "reader") + said(whole, "hybrid")


# -- packing


@pytest.mark.parametrize("kind", ["pooled", "coupled", "coupled_tasks"])
def test_a_batch_of_one_answers_as_a_batch_of_many(solvers, tasks, kind):
    solver = solvers(kind)
    asked, drafts = asked_of(solver, tasks)
    together = said(pooled(solver, asked, drafts, CONFIG))
    alone = [
        entry
        for question, own in zip(asked, drafts[0], strict=True)
        for entry in said(pooled(solver, [question], [[own]], CONFIG))
    ]
    by_input = lambda entries: sorted(entries, key=lambda e: (e[0], round(e[2], 3), str(e[1])))
    assert same(by_input(alone), by_input(together), tolerance=1e-5)


def test_test_outputs_change_no_candidate(solvers, trained):
    solver = solvers("coupled_tasks")
    task = trained.others[1]
    found = []
    for version in (task, task.without_answers()):
        asked, drafts = asked_of(solver, [version])
        found.append(said(pooled(solver, asked, drafts, CONFIG)))
    assert found[0] == found[1]
