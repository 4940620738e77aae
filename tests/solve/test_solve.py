"""`solve` gives two grids for every test input, in time, and never sees an answer."""

import time
from dataclasses import replace

import numpy as np
import pytest

from arctrm.config import SolveConfig
from arctrm.data.task import Pair, Task
from arctrm.solve import solve as room
from arctrm.solve.budget import Clock, Session
from arctrm.solve.propose import JOINT, READER, TRM, Candidate
from arctrm.solve.questions import keys_of, questions
from arctrm.solve.solve import Answers, TimedJudge, answer_first, read_views, refine_views
from arctrm.solve.weights import Voices
from helpers import is_grid

KINDS, VOICES = ("both", "reader", "trm"), (READER, TRM, JOINT)


def interrupted(*given, **named):
    raise KeyboardInterrupt


def config(budget=30.0, steps=2, **top) -> SolveConfig:
    """Ends at `steps` steps of adaptation and a few views, long before the budget."""
    tables = {"inference": {"views": 3, "dtype": "float32"}, "judge": {"scoring_views": 2}}
    tables["adaptation"] = {"max_steps": steps, "tokens_per_batch": 256}
    return SolveConfig.model_validate({"budget": budget, **tables, **top})


@pytest.fixture(scope="module")
def solvers(solver):
    """By kind: both voices, or one alone."""

    def of(kind):
        def only(voices: Voices) -> Voices:
            trm = (None, None) if kind == "reader" else voices[1:]
            return Voices(None if kind == "trm" else voices.reader, *trm)

        if kind == "both":
            return solver
        speak = lambda model: only(solver.speak(model))
        return replace(solver, speakers=only(solver.speakers), speak=speak, voices=(kind,))

    return of


def session_of(solver, task, settings=None):
    settings = settings or config()
    clock, known = Clock(settings.budget), solver.row_of(task) is not None
    return Session(solver, task.without_answers(), settings, clock, known=known)


def first_answers(solver, task, budget=30.0):
    answers = Answers(session_of(solver, task, config(budget)))
    answer_first(answers)
    return answers


def shown(solution):
    """What a user sees of a solution, but for the time."""
    found = [(solution.adaptation_steps, solution.leave_one_out)]
    for one in solution.answers:
        votes = [(e.votes, e.mean_q, e.reader_scores, e.inverse_scores) for e in one.evidence]
        found.append(([grid.tolist() for grid in one.attempts], votes, one.num_candidates))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_weights_gives_two_grids_with_evidence(solvers, trained, kind):
    for task in (trained.known[0], trained.others[1]):
        unknown = task is not trained.known[0]
        solution = room.solve_task(solvers(kind), task.without_answers(), config(steps=1))
        assert solution.adaptation_steps == (2 if unknown else 0)
        assert (solution.leave_one_out is not None) == unknown
        assert solution.known == (not unknown)
        assert len(solution.answers) == len(task.test)
        for answer in solution.answers:
            assert [is_grid(grid) for grid in answer.attempts] == [True, True]
            for entry in filter(None, answer.evidence):
                assert sum(entry.votes_by.values()) == entry.votes <= answer.num_candidates
                assert kind == "trm" or entry.reader_score is None or entry.reader_score <= 0


def test_strange_but_valid_tasks_get_two_grids(solver, trained):
    cell, large = np.full((1, 1), 3, np.uint8), np.zeros((30, 30), np.uint8)
    large[::3, ::2] = 5
    shapes = [pair.input.shape for known in trained.known for pair in known.demonstrations]
    assert max(map(max, shapes)) < 6  # of all that the weights have seen
    task = trained.others[0]
    for strange in (
        replace(task, demonstrations=task.demonstrations[:1], test=task.test[:1]),
        replace(task, demonstrations=task.demonstrations[:2]),
        replace(task, test=(task.test[0],) * 10),
        replace(task, test=(Pair(large), task.test[0])),
        Task("cell", (Pair(cell, cell),), (Pair(cell),)),
        Task("large", (Pair(large, large), Pair(large.T, large.T)), (Pair(large),)),
        Task("copies", (Pair(cell, cell),) * 3, (Pair(cell),)),
    ):
        solution = room.solve_task(solver, strange, config(budget=0.2, steps=1))
        assert len(solution.attempts) == len(strange.test)
        assert all(is_grid(grid) for both in solution.attempts for grid in both)


@pytest.mark.parametrize("kind", KINDS)
def test_two_grids_come_even_when_the_budget_is_over_at_once(solvers, trained, kind):
    for task in (trained.known[0], trained.others[0]):
        solution = room.solve_task(solvers(kind), task.without_answers(), config(budget=0.001))
        assert [len(both) for both in solution.attempts] == [2] * len(task.test)


def test_a_budget_is_used_and_kept(solver, trained):
    """By adaptation, then by answers; of a known task by answers."""
    settings = config(budget=1.5, steps=100_000, inference={"views": 500, "dtype": "float32"})
    # Of some tasks eight views exist, which are soon answered.
    known = next(t for t in trained.known if len(questions(solver, t, 500, 0)) == 500)
    for task in (trained.others[1], known):
        begin = time.monotonic()
        solution = room.solve_task(solver, task.without_answers(), settings)
        assert 0.8 < time.monotonic() - begin < 5  # far less than 500 views take
        assert (solution.adaptation_steps > 0) == (task is trained.others[1])
        assert 1 <= solution.answers[0].num_candidates < 1000


def test_the_time_line_has_every_stage_once_in_order_and_no_gap(solver, trained):
    told = []
    task = trained.others[1]
    solution = room.solve_task(solver, task.without_answers(), config(steps=1), told.append)
    stages = ["first answer", "adapting", "refining", "reading", "refining", "planning", "judging"]
    assert [event.stage for event in solution.events] == stages
    ends = [0.0, *(event.start + event.seconds for event in solution.events)]
    assert all(e.start >= end for e, end in zip(solution.events, ends, strict=False))
    assert ends[-1] >= solution.seconds
    assert [one.stage for one in told if not one.detail] == stages
    assert list(told[0].best) == []
    assert [is_grid(grid) for grid in told[-1].best] == [True] * len(task.test)
    assert [one.seconds for one in told] == sorted(one.seconds for one in told)
    assert {one.budget for one in told} == {30.0}


def test_test_outputs_change_no_answer_and_the_seed_gives_the_same_again(solver, trained):
    task = trained.others[1]
    wrong = replace(task, test=tuple(Pair(p.input, (p.output + 1) % 10) for p in task.test))
    # (the budget may not decide how far anything goes)
    settings = config(budget=600.0, steps=1)
    first, *others = (shown(room.solve_task(solver, own, settings)) for own in (task, task, wrong))
    assert others == [first, first]  # bit for bit


def test_trm_gives_the_first_answer_where_there_is_one_else_the_reader(solvers, trained):
    task = trained.known[0]
    for kind, source in (("both", TRM), ("trm", TRM), ("reader", READER)):
        first = first_answers(solvers(kind), task)
        assert first.complete
        assert {source for _, source, _ in first.candidates} == {source}
        assert first.session.pass_seconds(1000) > 0  # so the judgement can be foretold


def test_the_first_answer_of_many_tests_ends_with_the_budget(solver, trained):
    """One test input is answered whatever the time; the inputs of the rest stand for answers."""
    task = replace(trained.known[0], test=trained.known[0].test[:1] * 9)
    first = first_answers(solver, task, budget=1e-6)
    assert len(first.candidates) == 1
    assert [len(both) for both in first.solution(None).attempts] == [2] * 9


def test_adapted_weights_replace_the_first_answer(solver, trained):
    first = first_answers(solver, trained.others[0])
    later = room.adapted(first)
    assert later is not first
    assert later.steps == 4
    assert later.session.solver.adapted
    assert {source for _, source, _ in later.candidates} == {TRM}  # what the reader follows
    known = first_answers(solver, trained.known[0])
    assert room.adapted(known) is known


def test_two_attempts_differ_where_any_weights_proposed_two_grids(solver, trained):
    """The grid of the adapted weights comes first, then that of the weights before."""
    session = session_of(solver, trained.others[0])
    before, after = Answers(session), Answers(session, steps=4)
    key, given = keys_of([session.task])[0], session.task.test[0].input
    propose = lambda answers, grid: answers.add([Candidate(key, grid, 0.0, READER)])
    first_attempts = lambda: [*map(np.unique, after.solution(None, before).attempts[0])]
    propose(after, None)  # it wrote no grid
    assert np.array_equal(after.solution(None, before).attempts[0][0], given)
    propose(before, np.full((2, 2), 1, np.uint8))
    assert first_attempts() == [1, 1]
    propose(after, given)  # which every demonstration changes
    assert np.array_equal(after.solution(None, before).attempts[0][1], given)
    propose(after, np.full((2, 2), 2, np.uint8))
    assert first_attempts() == [2, 1]
    [first, second] = after.solution(None, before).candidates[0]
    assert (first.votes, second.votes) == (1, 0)


def test_every_view_has_one_vote_of_each_source(solver, trained):
    answers = first_answers(solver, trained.known[0])
    room.answer_later(answers)
    sources = [source for _, source, _ in answers.candidates]
    written = sum(draft is not None for draft in answers.drafts)
    assert sources.count(READER) == sources.count(TRM) == 3
    assert sources.count(JOINT) == written


def test_the_reader_follows_what_trm_answered(solver, trained, monkeypatch):
    """Seen from outside: what `write` is told to expect."""
    given, write = [], room.write

    def spied(*arguments, **options):
        given.append(options["expected"])
        return write(*arguments, **options)

    monkeypatch.setattr(room, "write", spied)
    answers = first_answers(solver, trained.known[0])
    best = answers.expected()
    read_views(answers, answers.session.questions(), 0.0)
    assert [key for key in given[0]] == list(keys_of([answers.session.task]))
    assert all(np.array_equal(given[0][key], grid) for key, grid in best.items())


def test_where_reading_takes_too_long_one_view_is_tried_and_trm_answers_the_rest(solver, trained):
    answers = first_answers(solver, trained.known[0])
    asked = answers.session.questions()
    read_views(answers, asked[:1], 0.0)
    answers.session.clock.record("read", 1, 1e6)
    read_views(answers, asked, 0.0)
    assert len(answers.drafts) == 1
    refine_views(answers, asked, 0.0)
    assert {view for _, source, view in answers.candidates if source == TRM} == {0, 1, 2}


def test_trm_answers_the_views_that_it_may_and_all_where_it_is_alone(solver, solvers, trained):
    settings = config(inference={"views": 3, "trm_views": 1, "dtype": "float32"})
    answer = room.solve_task(solver, trained.known[0], settings).answers[0]
    views = {s: {v for one in answer.ranked for v in one.views_by.get(s, ())} for s in VOICES}
    assert views == {READER: {0, 1, 2}, TRM: {0}, JOINT: {0}}
    answer = room.solve_task(solvers("trm"), trained.known[0], settings).answers[0]
    assert {view for one in answer.ranked for view in one.views_by[TRM]} == {0, 1, 2}


def test_where_all_steps_of_one_view_take_too_long_fewer_are_taken(solver, trained):
    answers = Answers(session_of(solver, trained.known[0], config(budget=30.0)))
    asked = answers.session.questions()
    answers.session.clock.record("refine", room.refining_work(asked[:1], 1, 2), 12.0)
    refine_views(answers, asked, 0.0)
    assert {one.steps for one in answers.candidates.values()} == {1}


def test_time_is_kept_for_the_judgement(solver, trained):
    """Where refining would take it, it is left out."""
    answers = Answers(session_of(solver, trained.known[0]))
    answers.session.clock.record("read", 1, 1e-6)
    answers.session.clock.record("refine", 1, 1000.0)
    asked = answers.session.questions()
    read_views(answers, asked, 0.0)
    refine_views(answers, asked, 1.0)
    assert {source for _, source, _ in answers.candidates} == {READER}


def test_reading_that_takes_longer_than_foretold_is_given_up_at_the_end(solver, trained):
    answers = Answers(session_of(solver, trained.known[0], config(budget=1e-3)))
    answers.session.clock.record("read", 1, 1e-9)
    asked = answers.session.questions()
    read_views(answers, asked, 0.0)
    assert 1 <= len(answers.drafts) < 3  # the first view is read to its end
    assert answers.session.clock.elapsed() < 2.0


def test_what_comes_too_late_replaces_no_answer(solvers, trained):
    answers = first_answers(solvers("reader"), trained.known[0])
    before = dict(answers.candidates)
    answers.add([replace(one, grid=None) for one in before.values()])
    assert answers.candidates == before
    read_views(answers, answers.session.questions(2), 0.0)
    assert [view for _, _, view in answers.candidates] == [0, 1]  # the first is not read again
    assert len(answers.drafts) == 2


def judge_of(solver, task, budget=30.0):
    session = session_of(solver, task, config(budget=budget, judge={"scoring_views": 4}))
    asked = session.questions(4)
    grids = {one.key: [one.query * 0 + n for n in range(4)] for one in asked if not one.number}
    return TimedJudge(session), asked, grids


def test_the_judge_scores_view_by_view_while_there_is_time(solver, trained):
    judge, asked, grids = judge_of(solver, trained.known[0])
    scores = judge(asked, grids)
    assert [len(own) for _, own in scores] == [4] * len(asked)
    late, asked, grids = judge_of(solver, trained.known[0], budget=1e-6)
    late.session.clock.record("judge", 1, 1.0)
    assert late(asked, grids) == []
    # Where one view of all grids would take too long, fewer are judged.
    judge, asked, grids = judge_of(solver, trained.known[0])
    work = room.judging_work(asked[:1], {key: own[:2] for key, own in grids.items()})
    judge.session.clock.record("judge", work, 25.0)
    assert {len(own) for _, own in judge(asked, grids)} == {2}


@pytest.mark.parametrize("where", ["read_views", "refine_views", "judged"])
def test_an_interrupt_keeps_the_best_so_far(solver, trained, monkeypatch, where):
    monkeypatch.setattr(room, where, interrupted)
    with pytest.raises(room.Stopped) as stop:
        room.solve_task(solver, trained.known[0].without_answers(), config())
    [answer] = stop.value.solution.answers
    assert all(is_grid(grid) for grid in answer.attempts)
    assert answer.evidence[0] is not None
    found = {"read_views": 3, "refine_views": 6}
    assert answer.num_candidates == found.get(where, answer.num_candidates)


def test_an_interrupt_before_any_answer_is_one(solver, trained, monkeypatch):
    monkeypatch.setattr(room, "refine", interrupted)
    with pytest.raises(KeyboardInterrupt) as stop:
        room.solve_task(solver, trained.known[0], config())
    assert not isinstance(stop.value, room.Stopped)
