"""The planner's promises: who is asked again, with what, which attempt is kept, what is counted."""

import numpy as np
import pytest
import torch

from arctrm.data.task import Pair
from arctrm.errors import ConfigError
from arctrm.planner import ARCPlanner, GridVerifier, Verdict
from arctrm.planner.verifier import HEADING

PROBLEMS = ["first", "second problem", "3"]


def scripted(plan):
    """A batch verifier: `plan[row]` gives the verdict of each attempt; its calls are kept."""
    calls = []
    made = dict.fromkeys(plan, 0)

    def verify(z_init, texts, rows):
        calls.append((z_init, list(texts), list(rows)))
        said = []
        for row in rows:
            said.append(plan[row][made[row]])
            made[row] += 1
        return said

    verify.calls = calls
    return verify


def wrong(score, feedback="wrong", **more):
    return Verdict(False, score, feedback, **more)


RIGHT = Verdict(True, 1.0, "all right")


def test_a_row_that_is_right_is_not_sent_again(reader):
    plan = {0: [wrong(0.1)] * 3, 1: [RIGHT], 2: [wrong(0.2), RIGHT]}
    verify = scripted(plan)
    results = ARCPlanner(reader, max_attempts=3).solve_batch(PROBLEMS, verify)
    assert [rows for _, _, rows in verify.calls] == [[0, 1, 2], [0, 2], [0]]
    starts = [[prompt.split("\n")[0] for prompt in call] for call in reader.prompts]
    assert starts == [PROBLEMS, ["first", "3"], ["first"]]
    assert [r.total_attempts for r in results] == [3, 1, 2]
    assert [r.success for r in results] == [False, True, True]


def test_without_time_for_more_the_first_attempt_stands(reader):
    plan = {row: [wrong(0, "fault")] * 4 for row in range(3)}
    times = iter([True, False])
    results = ARCPlanner(reader, max_attempts=4).solve_batch(
        PROBLEMS, scripted(plan), more=lambda: next(times)
    )
    assert [result.total_attempts for result in results] == [2, 2, 2]


def test_each_row_gets_its_own_latest_feedback_and_reads_it(reader):
    plan = {row: [wrong(0, f"fault {row}.{n}") for n in range(3)] for row in range(3)}
    results = ARCPlanner(reader, max_attempts=3).solve_batch(PROBLEMS, scripted(plan))
    assert reader.prompts[0] == PROBLEMS
    for n in (1, 2):
        expected = [f"{p}\n\n{HEADING}\nfault {row}.{n - 1}" for row, p in enumerate(PROBLEMS)]
        assert reader.prompts[n] == expected
    assert [r.final_feedback for r in results] == [f"fault {row}.2" for row in range(3)]
    one, two, three = results[0].reasoning_history
    assert not torch.equal(one.z_init, two.z_init)
    assert not torch.equal(two.z_init, three.z_init)


def test_the_latent_prefix_reaches_the_next_attempt_of_its_row(reader):
    prefixes = torch.randn(3, 2, 16)
    plan = {row: [wrong(0, "", latent_prefix=prefixes[row]), wrong(0, "")] for row in range(3)}
    results = ARCPlanner(reader, max_attempts=2).solve_batch(PROBLEMS, scripted(plan))
    assert reader.prefixes[0] is None
    assert torch.equal(reader.prefixes[1], prefixes)
    for result in results:
        one, two = result.reasoning_history
        assert not torch.equal(one.z_init, two.z_init)


def test_rows_with_unequal_prefixes_are_read_apart_and_put_back_in_order(reader, make_reader):
    prefixes = [torch.randn(2, 16), None, torch.randn(16), torch.randn(2, 16)]
    problems = ["a", "b", "c", "d"]
    plan = {row: [wrong(0, "", latent_prefix=p), wrong(0, "")] for row, p in enumerate(prefixes)}
    results = ARCPlanner(reader, max_attempts=2).solve_batch(problems, scripted(plan))
    assert reader.prompts[1:] == [["a", "d"], ["b"], ["c"]]
    for row, prefix in enumerate(prefixes):
        alone = scripted({0: [wrong(0, "", latent_prefix=prefix), wrong(0, "")]})
        (single,) = ARCPlanner(make_reader(), max_attempts=2).solve_batch([problems[row]], alone)
        got = results[row].reasoning_history[1]
        assert torch.equal(got.z_init, single.reasoning_history[1].z_init)
        assert got.text == single.reasoning_history[1].text


def test_the_best_attempt_is_kept_and_of_equals_the_earlier(reader):
    plan = {
        0: [wrong(0.2), wrong(0.9), wrong(0.5)],
        1: [wrong(0.4), wrong(0.4), wrong(0.1)],
        2: [wrong(0.9), wrong(0.3), Verdict(True, 0.5, "")],
    }
    results = ARCPlanner(reader, max_attempts=3).solve_batch(PROBLEMS, scripted(plan))
    assert [r.best.number for r in results] == [2, 1, 3]


def test_one_problem_is_a_batch_of_one(reader, make_reader):
    said = [wrong(0.3, "again", latent_prefix=torch.ones(2, 16)), wrong(0.2), RIGHT]
    seen = []

    def verify(z_init, text):
        seen.append((z_init, text))
        return said[len(seen) - 1]

    single = ARCPlanner(reader).multi_attempt_solve("problem", verify)
    (batch,) = ARCPlanner(make_reader()).solve_batch(["problem"], scripted({0: said}))
    assert [dict(a) for a in single.reasoning_history] == [dict(a) for a in batch.reasoning_history]
    assert single.metrics == batch.metrics
    assert seen[0][0].shape == (16,)
    assert isinstance(seen[0][1], str)


def test_results_are_read_by_attribute_and_by_name(reader):
    result = ARCPlanner(reader).multi_attempt_solve("a", lambda z_init, text: (True, "fine"))
    for name in ("success", "total_attempts", "reasoning_history", "final_feedback", "metrics"):
        assert result[name] == getattr(result, name)
        assert name in dict(result)
    assert result.success is True
    assert result["final_feedback"] == "fine"
    with pytest.raises(KeyError, match="answer"):
        result["answer"]


def test_a_success_and_feedback_tuple_is_a_verdict(reader):
    said = iter([(False, "the corner"), (True, "done")])
    result = ARCPlanner(reader).multi_attempt_solve("a", lambda z_init, text: next(said))
    assert [(a.score, a.success) for a in result.reasoning_history] == [(0, False), (1, True)]
    assert "the corner" in reader.prompts[1][0]


@pytest.mark.parametrize("max_attempts", [0, -1])
def test_no_attempts_are_refused(reader, max_attempts):
    with pytest.raises(ConfigError, match=f"max_attempts = {max_attempts}"):
        ARCPlanner(reader, max_attempts=max_attempts)


def test_metrics_are_those_of_the_best_attempt_and_count_new_tokens(reader):
    known = {"exact_match": 1.0}
    plan = {0: [wrong(0.5, "a much longer feedback", metrics=known), wrong(0.1)]}
    (result,) = ARCPlanner(reader, max_attempts=2).solve_batch(["a"], scripted(plan))
    assert result.metrics == {
        "avg_attempts": 2,
        "success_rate": 0,
        "best_score": 0.5,
        "avg_reasoning_length": 4,  # the reader writes four letters, whatever the prompt's length
        "exact_match": 1,
    }


def test_the_loop_closes_over_the_grid_verifier(reader):
    """Probes decoded from the reader's latent; feedback in its own words comes back to it."""
    truths = [np.array([[1, 0], [0, 1]], dtype=np.uint8), np.array([[1, 1, 1]], dtype=np.uint8)]
    verifier = GridVerifier([[3]], [Pair(truth, truth) for truth in truths])

    def decode(z_init):
        bits = (z_init > 0).long()
        return [bits[:4].view(2, 2), bits[4:7].view(1, 3)]

    def verify(z_init, text):
        return verifier.verify(decode(z_init), latent_prefix=z_init)

    result = ARCPlanner(reader, max_attempts=6).multi_attempt_solve("problem", verify)
    scores = [a.score for a in result.reasoning_history]
    assert len(set(scores)) > 1
    assert result.best.score == max(scores)
    assert result.best.number == scores.index(max(scores)) + 1
    for attempt, prompt in zip(result.reasoning_history, reader.prompts[1:], strict=False):
        assert attempt.feedback in prompt[0]
    assert result.metrics["exact_match"] == 0
