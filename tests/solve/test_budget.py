"""What work costs is learned, each kind apart; what fits is chosen by it."""

from dataclasses import replace

import numpy as np
import pytest

from arctrm.config import SolveConfig
from arctrm.solve.budget import (
    Clock,
    Session,
    judging_work,
    next_views,
    reading_work,
    refining_work,
)
from arctrm.solve.questions import inverse_questions


@pytest.fixture
def session(solver, trained):
    config = SolveConfig.model_validate({"inference": {"views": 6}, "judge": {"scoring_views": 4}})
    return Session(solver, trained.others[0].without_answers(), config, Clock(10.0))


def test_each_kind_of_work_has_a_cost_of_its_own_and_none_at_first():
    clock = Clock(10.0)
    assert clock.seconds("read") == 0.0
    assert 9.0 < clock.left() <= 10.0
    assert clock.elapsed() < 1.0
    assert Clock(-1.0).left() == 0.0
    clock.record("read", 100, 5.0)
    clock.record("refine", 10, 1.0)
    assert clock.seconds("read", 200) == pytest.approx(10.0)
    assert clock.seconds("refine", 5) == pytest.approx(0.5)


def test_later_batches_count_more():
    clock = Clock(10.0)
    clock.record("read", 1, 100.0, guess=True)  # is forgotten
    for seconds in (8.0, 4.0, 2.0):
        clock.record("read", 1, seconds)
    assert clock.seconds("read", 1) == pytest.approx(4.0)


@pytest.mark.parametrize(("seconds", "expected"), [(1.0, 0.5), (60.0, 59.0)])
def test_warming_up_is_taken_off_the_first_batch_which_is_then_forgotten(seconds, expected):
    clock = Clock(10.0, warms_up=True)
    clock.record("read", 1, seconds)
    assert clock.seconds("read", 1) == pytest.approx(expected)
    clock.record("read", 1, 4.0)
    assert clock.seconds("read", 1) == pytest.approx(4.0)
    clock.record("read", 1, 2.0)
    assert clock.seconds("read", 1) == pytest.approx(3.0)


def test_more_views_cost_more_than_one_and_less_than_each_alone(session):
    one, all_views = session.questions(1), session.questions()
    for work in (reading_work, lambda asked: refining_work(asked, 4)):
        assert work(one) < work(all_views) < len(all_views) * work(one)
    assert refining_work(one, 8) == 2 * refining_work(one, 4)


def test_judging_counts_grids_and_inverse_questions_count_each_as_a_prompt(session, trained):
    asked = session.questions(2)
    some = {one.key: [one.query] for one in asked}
    more = {key: grids * 3 for key, grids in some.items()}
    assert judging_work(asked, some) < judging_work(asked, more) < 3 * judging_work(asked, some)
    inverse = inverse_questions(session.solver, trained.known[:1], 2)
    grids = {one.key: [one.query] * 2 for one in inverse}
    fewer = {key: own[:1] for key, own in grids.items()}
    assert judging_work(inverse, grids) > judging_work(inverse, fewer)


def test_a_trunks_judgement_is_foretold_by_trm_until_it_has_judged(session):
    clock = session.clock
    assert session.judging_seconds() == 0.0
    clock.record("refine", 1000, 0.1)
    assert session.pass_seconds(500) == pytest.approx(0.05)
    clock.record("judge", 1000, 0.2)
    assert session.pass_seconds(500) == pytest.approx(0.1)
    assert session.judging_seconds() > 0


def test_the_judgement_gets_a_share_of_the_time_left_at_most(session):
    session.clock.record("judge", 1, 1000.0)
    assert session.judging_seconds(0.25) == pytest.approx(2.5, abs=0.1)
    assert session.judging_seconds(1.0) == pytest.approx(10.0, abs=0.1)


def test_a_model_without_a_reader_answers_by_trm_and_judges_nothing(session):
    voices = session.solver.speakers._replace(reader=None)
    alone = replace(session, solver=replace(session.solver, speakers=voices))
    alone.clock.record("refine", refining_work(alone.questions(1), alone.most_steps), 2.0)
    assert alone.reading_seconds(alone.questions(1)) == pytest.approx(2.0)
    assert alone.judging_seconds() == 0.0


def chosen(num, step, size, seconds, each=1.0):
    rest = [np.zeros(1)] * num
    return len(next_views(rest, step, size, seconds, lambda part: each * len(part)))


def test_views_come_whole_and_many_take_a_part_of_the_time():
    assert chosen(12, step=2, size=100, seconds=1000.0) == 12
    assert chosen(12, step=2, size=6, seconds=1000.0) == 6
    assert chosen(64, step=2, size=64, seconds=40.0) == 16
    assert chosen(12, step=2, size=1, seconds=1000.0) == 2
    # One may take all the time, and none comes without.
    assert chosen(12, step=2, size=12, seconds=2.0) == 2
    assert chosen(12, step=2, size=12, seconds=1.9) == 0
    assert chosen(0, step=2, size=12, seconds=9.0) == 0
