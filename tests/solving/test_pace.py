"""What work costs is learned, each kind apart."""

import pytest

from arctrm.solving.pace import Pace


def test_nothing_is_known_at_first():
    pace = Pace(10.0)
    assert not pace.knows("read")
    assert pace.seconds("read", 1000) == 0.0
    assert 9.0 < pace.left() <= 10.0
    assert pace.elapsed() < 1.0


def test_each_kind_of_work_has_a_pace_of_its_own():
    pace = Pace(10.0)
    for _ in range(2):
        pace.record("read", 100, 5.0)
        pace.record("refine", 10, 1.0)
    assert pace.seconds("read", 200) == pytest.approx(10.0)
    assert pace.seconds("refine", 5) == pytest.approx(0.5)


@pytest.mark.parametrize(("seconds", "guess"), [(1.0, 0.5), (60.0, 59.0)])
def test_warming_up_is_taken_off_the_first_batch_only(seconds, guess):
    pace = Pace(10.0)
    pace.record("read", 1, seconds)
    assert pace.seconds("read", 1) == pytest.approx(guess)
    pace.record("read", 1, 4.0)
    assert pace.seconds("read", 1) == pytest.approx(4.0)
    pace.record("read", 1, 2.0)
    assert pace.seconds("read", 1) == pytest.approx(3.0)


def test_time_that_is_over_is_not_negative():
    assert Pace(-1.0).left() == 0.0
