"""`solve` with a reader in the checkpoint: alone, beside a TRM, and coupled to it."""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from arctrm.config import SolveConfig
from arctrm.data.task import Pair
from arctrm.reader.drafted_decoding import DraftedDecoder
from arctrm.solving import anytime, rounds
from arctrm.solving.adaptation import Adapter
from arctrm.solving.anytime import Interrupted, solve_task
from arctrm.solving.vote import is_well_formed
from arctrm.solving.weights import load_solver

QUICK = {"views": 3, "steps": 2, "tokens_per_batch": 1024, "dtype": "float32"}
KINDS = ("reader", "pooled", "coupled", "coupled_tasks", "ensemble")


def config(budget=30.0, steps=2, **top) -> SolveConfig:
    """Ends at `steps` steps of adaptation and a few views, long before the budget."""
    return SolveConfig.model_validate(
        {
            "budget": budget,
            "inference": QUICK,
            "reader": {"rank": "experts", "scoring_views": 2},
            "adaptation": {"parts": "all", "max_steps": steps, "tokens_per_batch": 256},
            **top,
        }
    )


@pytest.fixture(scope="module")
def solvers(tiny_reader, joined):
    """A solver by kind."""
    folders = {
        "reader": lambda: tiny_reader,
        "pooled": lambda: joined(False),
        "coupled": lambda: joined(True),
        "coupled_tasks": lambda: joined(True, "task"),
        "ensemble": lambda: joined(ensemble=True),
    }
    device = torch.device("cpu")
    return lambda kind: load_solver(folders[kind](), config().inference, device)


def shown(solutions):
    """What a user sees of the solutions, but for the time."""
    return [
        ([grid.tolist() for grid in s.attempts], s.evidence, s.adaptation_steps) for s in solutions
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_checkpoint_gives_two_grids_with_evidence(solvers, trained, kind):
    solver = solvers(kind)
    for task in (trained.known[0], trained.others[1]):
        unknown = task is not trained.known[0]
        solutions = solve_task(solver, task.without_answers(), config())
        assert len(solutions) == len(task.test)
        for solution in solutions:
            assert [is_well_formed(grid) for grid in solution.attempts] == [True, True]
            assert solution.adaptation_steps == (4 if unknown else 0)
            assert (solution.evidence[0].leave_one_out is not None) == unknown
            for evidence in solution.evidence:
                assert sum(evidence.votes_by.values()) == evidence.votes <= evidence.views
                assert evidence.votes == 0 or evidence.reader_score <= 0


def answer_views(result, *common):
    """What `solve` does of it, without the planner."""
    common = (*common, lambda text: None)
    rounds.refine_views(result, rounds.read_views(result, *common), *common)


def test_pooled_answers_count_both_models(solvers, trained):
    """One answer per view of each; a coupled hybrid's TRM answers as "hybrid"."""
    task = trained.known[1].without_answers()
    for kind, sources in (
        ("reader", {"reader"}),
        ("pooled", {"reader", "trm"}),
        ("coupled", {"reader", "hybrid"}),
        ("ensemble", {"reader", "reader2", "hybrid"}),
    ):
        result = rounds.Round()
        settings = config()
        pace = anytime.Pace(30.0)
        answer_views(result, solvers(kind), task, settings, pace)
        candidates = result.candidates[task.id, 0]
        assert {candidate.source for candidate in candidates} == sources
        assert len(candidates) == QUICK["views"] * len(sources)


def test_the_first_answer_is_one_view_of_the_reader(solvers, trained):
    task = trained.known[1].without_answers()
    for kind in KINDS:
        first = rounds.Round()
        rounds.answer_first(first, solvers(kind), task, config(), anytime.Pace(30.0))
        [candidate] = first.candidates[task.id, 0]
        assert candidate.source == "reader"


def test_where_reading_takes_too_long_trm_answers_alone(solvers, trained, monkeypatch):
    """Also first, where the answer may be long; a short reading then tells the pace."""
    monkeypatch.setattr(rounds, "LONG_FIRST", 5)
    task = trained.known[1].without_answers()
    for kind, source in (("pooled", "trm"), ("coupled", "hybrid")):
        pace, common = anytime.Pace(30.0), (solvers(kind), task, config())
        first, later = rounds.Round(), rounds.Round()
        rounds.answer_first(first, *common, pace)
        assert [candidate.source for candidate in first.candidates[task.id, 0]] == [source]
        assert pace.knows("read")
        pace.record("read", 1, 1000.0)
        answer_views(later, *common, pace)
        sources = [candidate.source for candidate in later.candidates[task.id, 0]]
        assert sources == [source] * QUICK["views"]


def test_all_views_are_read_before_trm_refines_and_time_is_kept_for_the_judgement(
    solvers, trained, monkeypatch
):
    """Where refining would take the time of the judgement, it is left out."""
    task = trained.known[1].without_answers()
    pace, result = anytime.Pace(30.0), rounds.Round()
    pace.record("read", 1, 1e-6)
    pace.record("judge", 1, 1e-6)
    pace.record("refine", 1, 1000.0)
    answer_views(result, solvers("ensemble"), task, config(), pace)
    candidates = result.candidates[task.id, 0]
    assert {candidate.source for candidate in candidates} == {"reader", "reader2"}
    assert len(candidates) == 2 * QUICK["views"]


def test_reading_that_takes_longer_than_foretold_is_given_up_at_the_end_of_the_budget(
    solvers, trained, monkeypatch
):
    read, go_on, begun = rounds._read, DraftedDecoder._go_on, []

    def slow_but_the_first(*args, **options):
        begun.append(args)
        return read(*args, **options)

    def slow(*args):
        time.sleep(0.6 if len(begun) > 1 else 0.0)
        return go_on(*args)

    monkeypatch.setattr(rounds, "_read", slow_but_the_first)
    monkeypatch.setattr(DraftedDecoder, "_go_on", slow)
    task, pace, result = trained.known[1].without_answers(), anytime.Pace(1.0), rounds.Round()
    pace.record("read", 1, 1e-9)
    common = (solvers("reader"), task, config(), pace, lambda text: None)
    views = rounds.read_views(result, *common)
    assert len(begun) == 2
    grids = [several[0].grid for several in views.drafts]
    assert len(grids) == QUICK["views"]
    assert grids[0] is not None  # the first view is read to its end
    assert grids[1:] == [None, None]
    assert result.complete(task)
    assert pace.elapsed() < 2.5


@pytest.mark.parametrize("reads", [True, False])
def test_the_first_view_of_trm_goes_alone_so_that_its_pace_is_learned(
    solvers, trained, monkeypatch, reads
):
    asked = []
    refine = rounds._refine
    monkeypatch.setattr(
        rounds,
        "_refine",
        lambda result, solver, chunk, *rest: (
            asked.append(len(chunk)),
            refine(result, solver, chunk, *rest),
        ),
    )
    task, pace = trained.others[1].without_answers(), anytime.Pace(30.0)
    pace.record("read", 1, 1e-6 if reads else 1000.0)
    answer_views(rounds.Round(), solvers("pooled"), task, config(), pace)
    assert asked[0] == len(task.test)
    assert sum(asked) == len(task.test) * QUICK["views"]


@pytest.mark.parametrize("kind", KINDS)
def test_two_grids_come_even_when_the_budget_is_over_at_once(solvers, trained, kind):
    for task in (trained.known[0], trained.others[0]):
        solutions = solve_task(solvers(kind), task.without_answers(), config(budget=0.001))
        assert [len(solution.attempts) for solution in solutions] == [2] * len(task.test)


@pytest.mark.parametrize("kind", ["reader", "coupled"])
def test_a_budget_is_used_and_kept(solvers, trained, kind):
    """By adaptation, then by answers; at most a tenth and a chunk of tiny work beyond it."""
    settings = config(budget=5.0, steps=100_000, inference={**QUICK, "views": 5000})
    begin = time.monotonic()
    [solution] = solve_task(solvers(kind), trained.others[2].without_answers(), settings)
    assert 3.0 < time.monotonic() - begin < 7.0
    assert solution.adaptation_steps > 4
    assert solution.evidence[0].views > 1


@pytest.mark.parametrize("kind", KINDS)
def test_test_outputs_change_no_answer(solvers, trained, kind):
    task = trained.others[1]
    wrong = replace(task, test=tuple(Pair(p.input, (p.output + 1) % 10) for p in task.test))
    solver = solvers(kind)
    first, *others = (
        shown(solve_task(solver, version, config()))
        for version in (task.without_answers(), task, wrong)
    )
    assert all(other == first for other in others)


@pytest.mark.parametrize("kind", KINDS)
def test_solving_leaves_the_model_bit_identical(solvers, trained, kind):
    solver = solvers(kind)
    before = {name: tensor.clone() for name, tensor in solver.model.state_dict().items()}
    solve_task(solver, trained.others[0].without_answers(), config())
    after = solver.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


# -- adaptation


@pytest.mark.parametrize("kind", KINDS)
def test_adaptation_trains_every_part(solvers, trained, kind):
    solver, task = solvers(kind), trained.others[0]
    adapter = Adapter(solver, [task], config().adaptation, 0)
    before = {name: tensor.clone() for name, tensor in adapter.solver.model.state_dict().items()}
    adapter.train([task], time.monotonic() + 60, 3)
    after = adapter.solver.model.state_dict()
    still = {name for name in before if torch.equal(before[name], after[name])}
    fixed = {name for name in before if name.split(".")[-1] in ("H_init", "L_init")}
    assert adapter.steps == 3
    assert still <= fixed


@pytest.mark.parametrize("kind", KINDS)
def test_adaptation_of_the_reader_leaves_what_is_beside_it(solvers, trained, kind):
    solver, task = solvers(kind), trained.others[0]
    own = config().adaptation.model_copy(update={"parts": "reader"})
    adapter = Adapter(solver, [task], own, 0)
    before = {name: tensor.clone() for name, tensor in adapter.solver.model.state_dict().items()}
    adapter.train([task], time.monotonic() + 60, 3)
    after = adapter.solver.model.state_dict()
    learned = {name for name in before if not torch.equal(before[name], after[name])}
    of_reader = before if kind == "reader" else {n for n in before if n.startswith("reader.")}
    assert learned == set(of_reader)
    assert len(adapter.num_tokens) == 1


def test_solve_adapts_the_reader_by_adamw_in_short_batches(solvers, trained):
    """And TRM where there is no reader; of several tasks a batch holds more."""
    own = SolveConfig().adaptation
    for kind in ("pooled", "coupled"):
        adapter = Adapter(solvers(kind), [trained.others[0]], own, 0)
        assert adapter.parts == [adapter.solver.tiny]
        assert set(adapter.learners[0].update.optimisers.all) == {"adamw"}
        assert adapter.num_tokens == [256]
    assert Adapter(solvers("reader"), trained.others[:3], own, 0).num_tokens == [768]
    alone = replace(solvers("pooled"), model=solvers("pooled").trm)
    adapter = Adapter(alone, [trained.others[0]], own, 0)
    assert adapter.parts == [adapter.solver.trm]


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_task_starts_at_the_mean_of_the_trained_embeddings(solvers, trained, kind):
    solver = solvers(kind)
    model = Adapter(solver, [trained.others[0]], config().adaptation, 0).solver.model
    for name, tensor in model.state_dict().items():
        if name.endswith("puzzle_emb.weights"):
            rows = solver.model.state_dict()[name][: len(trained.known)]
            torch.testing.assert_close(tensor, rows.mean(0, keepdim=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_held_out_demonstration_changes_nothing_before_the_probe(solvers, trained, kind):
    solver, task = solvers(kind), trained.others[1]
    pair = task.demonstrations[0]
    other = Pair(9 - pair.input, pair.output[:1] * 0)
    learned = []
    for first in (pair, other):
        version = replace(task, demonstrations=(first, *task.demonstrations[1:]))
        adapter = Adapter(solver, [version], config().adaptation, 0)
        rest = replace(version, demonstrations=task.demonstrations[1:])
        adapter.train([rest], time.monotonic() + 60, 2)
        learned.append(adapter.solver.model.state_dict())
    assert all(torch.equal(learned[0][name], tensor) for name, tensor in learned[1].items())


def test_answers_of_an_adapted_reader_are_computed_in_its_own_arithmetic(solvers, trained):
    solver = solvers("pooled")
    assert solver.reader is not None
    solver.reader.to(torch.bfloat16).dtype = torch.bfloat16
    adapter = Adapter(solver, [trained.others[0]], config().adaptation, 0)
    weights = next(adapter.solver.reader.parameters())
    answering = adapter.answering().reader
    assert weights.dtype == torch.float32
    assert {p.dtype for p in answering.parameters()} == {torch.bfloat16}
    assert torch.equal(next(answering.parameters()), weights.to(torch.bfloat16))


@pytest.mark.parametrize("kind", ["pooled", "coupled"])
def test_everything_also_runs_in_bfloat16(joined, trained, kind):
    """Adaptation keeps float32 weights, and drafts with them in narrower arithmetic."""
    settings = config(inference={**QUICK, "dtype": "bfloat16"})
    solver = load_solver(joined(kind == "coupled"), settings.inference, torch.device("cpu"))
    solution = solve_task(solver, trained.others[1].without_answers(), settings)[0]
    assert solution.adaptation_steps == 4
    assert (solution.history is not None) == (kind == "coupled")


# -- the judgement, and Ctrl-C


def test_the_readers_judgement_decides_unless_votes_are_to(solvers, trained):
    solver, task = solvers("pooled"), trained.others[2].without_answers()
    for rank in ("experts", "votes"):
        settings = config(reader={"rank": rank, "scoring_views": 2}, adaptation={"enabled": False})
        [solution] = solve_task(solver, task, settings)
        first, second = solution.evidence
        if rank == "experts":
            assert first.reader_score >= second.reader_score
        else:
            assert first.reader_score is None
            assert first.votes >= second.votes


@pytest.mark.parametrize("kind", ["reader", "coupled"])
@pytest.mark.parametrize("where", ["read_views", "judge_best"])
def test_an_interrupt_keeps_the_best_so_far(solvers, trained, monkeypatch, kind, where):
    def stopped(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(anytime, where, stopped)
    task = trained.known[0].without_answers()
    with pytest.raises(Interrupted) as stop:
        solve_task(solvers(kind), task, config())
    [solution] = stop.value.solutions
    assert all(np.ndim(grid) == 2 for grid in solution.attempts)
    per_view = {"reader": 1, "coupled": 2}[kind]
    by_planner = kind == "coupled"
    answered = QUICK["views"] * per_view + by_planner
    assert solution.evidence[0].views == (1 if where == "read_views" else answered)
