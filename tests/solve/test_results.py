"""Files of answers: they come back as they were, whole, and only to those who may go on."""

import json
import math

import numpy as np
import pytest

from arctrm.config import EvalConfig
from arctrm.data.task import Pair, Task
from arctrm.errors import CheckpointError, DataError, TaskError
from arctrm.solve.propose import Candidate
from arctrm.solve.questions import Key, keys_of
from arctrm.solve.rank import Ranked, by_experts, vote
from arctrm.solve.results import (
    EVERYTHING,
    INTERRUPTED,
    Store,
    as_record,
    content_of,
    from_records,
    open_store,
    read_candidates,
    read_submission,
    write_candidates,
    write_submission,
)

RED, BLUE, GREEN = (np.full((1, 2), colour, np.uint8) for colour in (2, 1, 3))
CONFIG = EvalConfig()


def task(name: str, num_test: int = 1) -> Task:
    return Task(name, (Pair(RED, BLUE),), tuple(Pair(GREEN) for _ in range(num_test)))


def ranked():
    """RED by both voices, BLUE by the reader alone, GREEN (not judged) by TRM alone."""
    key = Key("a", 0)
    found = [
        *(Candidate(key, RED, 1.0, "reader", n) for n in (0, 3)),
        Candidate(key, RED, 2.0, "joint", 1),
        *(Candidate(key, BLUE, 4.0, "reader", n) for n in (1, 2)),
        Candidate(key, GREEN, 0.0, "joint", 2),
    ]
    return by_experts(vote(found, seed=0), [[-5.0, -3.0], [-1.0, -math.inf]])


def equal(a: Ranked, b: Ranked) -> bool:
    names = ("votes", "mean_q", "votes_by", "views_by", "reader_scores", "inverse_scores", "broken")
    same = all(getattr(a, name) == getattr(b, name) for name in names)
    return same and np.array_equal(a.grid, b.grid)


# -- candidates


def test_candidates_come_back_as_they_were(tmp_path):
    write_candidates(tmp_path / "kept", [task("a")], {Key("a", 0): ranked()})
    (back,) = read_candidates(tmp_path / "kept")["a"]
    assert len(back) == 3
    assert all(map(equal, back, ranked()))
    assert back[1].reader_scores == (-3.0, -math.inf)
    records = json.loads(
        json.dumps([{"task": "a", **as_record(task("a"), {Key("a", 0): ranked()})}])
    )
    assert all(map(equal, from_records(records)[Key("a", 0)], ranked()))


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "kept").write_text("no candidates")
    with pytest.raises(DataError, match="keep_candidates=true"):
        read_candidates(tmp_path / "kept")


# -- answers so far


def record(name):
    return {"test": [[]], "trm_steps": [len(name), 1]}


def begun(path, names=("a", "b"), config=CONFIG, weights="0123"):
    store = open_store(path, config, [], resume=False)
    store.begin(config, "the model", weights)
    store.add(EVERYTHING, [(task(name), record(name)) for name in names], seconds=3.0)
    return store


def test_answers_are_kept_line_by_line_and_gone_when_all_are_scored(tmp_path):
    path = tmp_path / "unfinished.jsonl"
    store = begun(path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert set(lines[0]) == {"config", "weights", "checkpoint"}
    assert [(one["row"], one["task"], one["seconds"]) for one in lines[1:]] == [
        ("everything", "a", 1.5),
        ("everything", "b", 1.5),
    ]
    assert lines[1]["content"] == content_of(task("a"))
    assert store.left([task("a"), task("c")]) == [task("c")]
    assert store.left([task("a")], (EVERYTHING, "no-trm")) == [task("a")]
    store.finish([task("a")])
    assert path.exists()  # "b" was answered, too
    store.finish([task("a"), task("b"), task("c")])
    assert not path.exists()


def test_a_torn_line_is_answered_again_and_the_others_are_not(tmp_path):
    path = tmp_path / "u"
    begun(path)
    text = path.read_text()
    path.write_text(text[:-20])
    store = open_store(path, CONFIG, [task("a"), task("b")], resume=True)
    assert [one.id for one in store.left([task("a"), task("b")])] == ["b"]
    store.begin(CONFIG, "the model moved", "0123")
    store.add(EVERYTHING, [(task("b"), record("b"))], 1.5)
    again = open_store(path, CONFIG, [], resume=True)
    assert again.rows == store.rows
    assert again.head["checkpoint"] == "the model moved"


def test_processes_that_answer_together_hold_what_all_have_added(tmp_path):
    """A line that a process tore as it died is gone; the next one is whole."""
    path, tasks = tmp_path / "u", [task(name) for name in "abc"]
    first, second = begun(path, names=()), Store(path)
    second.begin(CONFIG, "the model", "0123", writes=False)
    second.writes = True
    with first.exclusive():
        first.add(EVERYTHING, [(tasks[0], record("a"))], 1.0)
        first.keep_time(2.5)
    with path.open("a") as file:
        file.write('{"row": "everyth')
    with second.exclusive():
        assert second.left(tasks) == tasks[1:]
        assert second.used == 2.5
        second.add(INTERRUPTED, [(tasks[1], record("b"))], 1.0)
    with first.exclusive():
        assert first.left(tasks) == tasks[1:]
        assert first.rows[INTERRUPTED].keys() == {"b"}
        assert first.rankings(tasks) == {key: [] for key in keys_of(tasks)}
    again = open_store(path, CONFIG, tasks, resume=True)
    assert (again.rows, again.used) == (first.rows, 2.5)


def test_what_is_kept_is_not_lost_by_accident(tmp_path):
    path = tmp_path / "out" / "u"
    with pytest.raises(DataError, match=f"{tmp_path / 'out'}: holds nothing unfinished"):
        open_store(path, CONFIG, [], resume=True)
    path.parent.mkdir()
    begun(path, names=())
    open_store(path, CONFIG, [], resume=False)  # a head alone is no loss
    begun(path)
    with pytest.raises(DataError, match="interrupted run; add --resume, or delete it"):
        open_store(path, CONFIG, [], resume=False)


def test_another_configuration_other_weights_and_other_tasks_are_refused(tmp_path):
    path = tmp_path / "u"
    begun(path)
    before = path.read_bytes()
    other = CONFIG.model_copy(update={"seed": 3})
    with pytest.raises(CheckpointError, match="seed = 0 then, 3 now"):
        open_store(path, other, [], resume=True)
    moved = CONFIG.model_copy(update={"out": tmp_path, "checkpoint": tmp_path})
    store = open_store(path, moved, [task("a")], resume=True)
    with pytest.raises(DataError, match=r"begun with other weights \(the model, 0123\)"):
        store.begin(CONFIG, "another", "4567")
    changed = Task("a", (Pair(RED, GREEN),), task("a").test)
    with pytest.raises(DataError, match="task a was another one then"):
        open_store(path, CONFIG, [changed], resume=True)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "text", ['{"a": 1}\n{"b": 2}\n', "hello\n", '{"a": 1}\n', "[]\n", "\xff\n"]
)
def test_a_store_of_something_else_is_refused(tmp_path, text):
    (tmp_path / "u").write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match="is not what arctrm keeps"):
        open_store(tmp_path / "u", CONFIG, [], resume=True)


# -- the submission


def rankings(*tasks, grids=(RED, BLUE)):
    return {key: [Ranked(own, 1, 0.0) for own in grids] for key in keys_of(tasks)}


def test_a_submission_survives_the_round_trip(tmp_path):
    tasks = [task("b", 2), task("a")]
    out = tmp_path / "new folder"
    write_submission(out, tasks, rankings(*tasks))
    back = read_submission(out / "submission.json")
    assert {name: len(own) for name, own in back.items()} == {"a": 1, "b": 2}
    assert list(back) == ["a", "b"]
    for own in back.values():
        for first, second in own:
            assert first.dtype == np.uint8
            assert np.array_equal(first, RED)
            assert np.array_equal(second, BLUE)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("[]", DataError, "no part of a submission"),
        ('{"a": {"b": 1}}', DataError, "a is no part of a submission"),
        ('{"a": 3}', DataError, "a is no part of a submission"),
        ('{"a": [{"attempt_1": [[1]]}]}', DataError, "attempt_1 and attempt_2"),
        ('{"a": [{"attempt_1": [[1]], "attempt_2": [[]]}]}', TaskError, r"a\[0\]\.attempt_2"),
        ('{"a": [{"attempt_1": [[1]], "attempt_2": [[10]]}]}', TaskError, r"a\[0\]\.attempt_2"),
        ('{"a"', TaskError, "not JSON"),
    ],
)
def test_a_bad_submission_is_refused_with_its_place(tmp_path, text, error, message):
    path = tmp_path / "s.json"
    path.write_text(text)
    with pytest.raises(error, match=message):
        read_submission(path)
