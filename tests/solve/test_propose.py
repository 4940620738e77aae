"""The reader writes, TRM refines; what one tells the other, and what not."""

import numpy as np
import pytest
import torch

from arctrm.errors import ResourceError
from arctrm.model.trm import Refined
from arctrm.reader.decoding import decode
from arctrm.solve.propose import as_logit, refine, to_refine, write, written
from arctrm.solve.questions import all_questions


@pytest.fixture(scope="module")
def asked(solver, trained):
    return all_questions(solver, [task.without_answers() for task in trained.known], 4, seed=0)


@pytest.fixture(scope="module")
def drafts(solver, asked):
    return [one.grid for one in write(solver.reader, asked)]


# -- the reader


def test_the_reader_writes_what_plain_decoding_gives(solver, asked):
    told = []
    found = write(solver.reader, asked, batch_size=3, advance=told.append)
    prompts, rooms = [one.prompt for one in asked], [one.room for one in asked]
    plain = decode(solver.reader, prompts, max_output_tokens=rooms)
    assert sum(told) == len(asked)
    for a, b in zip(found, plain, strict=True):
        assert np.array_equal(a.grid, b.grid)
        assert a.log_probability == pytest.approx(b.log_probability, abs=1e-3)


def test_what_is_expected_changes_nothing_but_the_time(solver, asked):
    free = write(solver.reader, asked, follow=False)
    told = {one.key: np.full((3, 3), 5, np.uint8) for one in asked}
    led = write(solver.reader, asked, expected=told)
    assert [np.array_equal(a.grid, b.grid) for a, b in zip(free, led, strict=True)] == [True] * len(
        asked
    )


def test_the_first_view_is_followed_by_the_others(solver, asked, monkeypatch):
    """Seen from outside: the drafts that decoding is given."""
    from arctrm.solve import propose

    given = []

    def spied(*arguments, **options):
        given.append(options["drafts"])
        return decode(*arguments, **options)

    monkeypatch.setattr(propose, "decode", spied)
    found = write(solver.reader, asked)
    first, others = given
    own = {one.key: one for one in reversed(asked)}
    assert len(first) == len(own)
    firsts = {one.key: one.view.inverse(found[i].grid) for i, one in enumerate(asked)
              if one is own[one.key] and found[i].grid is not None}  # fmt: skip
    rest = [one for one in asked if one is not own[one.key]]
    for one, draft in zip(rest, others, strict=True):
        if one.key in firsts:
            np.testing.assert_array_equal(draft, one.shown(firsts[one.key]))


def test_written_candidates_are_turned_back_and_know_their_view(solver, asked):
    decoded = write(solver.reader, asked)
    for candidate, question, one in zip(written(asked, decoded), asked, decoded, strict=True):
        assert (candidate.key, candidate.view) == (question.key, question.number)
        assert (candidate.source, candidate.steps) == ("reader", None)
        assert candidate.log_p == one.log_probability
        assert candidate.q == as_logit(one.log_probability)
        if one.grid is not None:
            np.testing.assert_array_equal(question.shown(candidate.grid), one.grid)


def test_confidence_is_the_logit_of_the_probability():
    assert as_logit(np.log(0.5)) == pytest.approx(0.0)
    assert as_logit(np.log(0.9)) == pytest.approx(np.log(9))
    assert np.isfinite(as_logit(0.0))


# -- TRM


def test_a_draft_is_refined_both_ways_and_its_size_is_taken(solver, asked):
    draft = np.full((2, 6), 3, np.uint8)
    pairs = to_refine(asked[:2], [draft, None])
    assert [question for question, _ in pairs] == [asked[0], asked[0], asked[1]]
    assert [one.shape for _, one in pairs] == [(2, 6), (2, 6), asked[1].shape]
    assert pairs[0][1].draft is draft
    assert [one.draft for _, one in pairs[1:]] == [None, None]
    found = refine(solver.refiner, asked[:2], [draft, None])
    assert [one.source for one in found] == ["joint", "trm", "trm"]
    for one, (question, own) in zip(found, pairs, strict=True):
        assert question.shown(one.grid).shape == own.shape
        assert 1 <= one.steps <= solver.refiner.halt_max_steps


def test_the_steps_of_the_first_view_are_kept_where_asked(solver, asked, drafts):
    plain = refine(solver.refiner, asked, drafts)
    kept = refine(solver.refiner, asked, drafts, keep_history=True)
    by_question = {(one.key, one.number): draft for one, draft in zip(asked, drafts, strict=True)}
    assert not any(one.history for one in plain)
    for one in kept:
        assert bool(one.history) == (one.view == 0)
        if one.history:  # the first view shows the task as it is
            first, *steps = one.history
            draft = by_question[one.key, 0] if one.source == "joint" else None
            assert np.array_equal(first, draft) if draft is not None else first is None
            assert len(steps) == one.steps
            assert np.array_equal(steps[-1], one.grid)


def test_without_drafts_nothing_of_the_reader_is_heard(solver, asked):
    """The same candidates with and without a reader in the solver."""
    found = refine(solver.speakers.alone, asked, None)
    assert {one.source for one in found} == {"trm"}
    assert [one.key for one in found] == [one.key for one in asked]
    for one, question in zip(found, asked, strict=True):
        assert question.shown(one.grid).shape == question.shape


def test_the_draft_and_the_readers_states_change_the_answer(solver, asked, drafts):
    wrong = [None if draft is None else (draft + 3) % 10 for draft in drafts]
    answers = [refine(solver.refiner, asked, given, num_steps=1) for given in (drafts, wrong)]
    joint = [
        (a.grid, b.grid, a.log_p, b.log_p)
        for a, b in zip(*answers, strict=True)
        if a.source == "joint"
    ]
    assert joint
    assert any(abs(a - b) > 1e-4 for _, _, a, b in joint)
    hidden = [(a.log_p, b.log_p) for a, b in zip(*answers, strict=True) if a.source == "trm"]
    assert all(a == pytest.approx(b, abs=1e-3) for a, b in hidden)


def test_running_out_of_memory_names_the_key_to_lower(asked):
    class Large:
        halt_max_steps = 1

        def refine(self, asked, num_steps, **options) -> list[Refined]:
            raise torch.OutOfMemoryError

    with pytest.raises(ResourceError, match=r"--set inference\.tokens_per_batch=32"):
        refine(Large(), asked, None, tokens_per_batch=64)
