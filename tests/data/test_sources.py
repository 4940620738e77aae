"""Every kind of source gives the same tasks; what cannot be used says why."""

import gzip
import json

import pytest

from arctrm.data.sources import load_solutions, load_tasks
from arctrm.errors import DataError, TaskError

GRID = [[1, 2], [3, 4]]
PAIR = {"input": GRID, "output": [[5]]}
TASK = {"train": [PAIR], "test": [{"input": GRID, "output": [[6]]}]}
OPEN = {"train": [PAIR], "test": [{"input": GRID}]}


def write(path, obj):
    data = json.dumps(obj).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def ids(tasks):
    return [task.id for task in tasks]


@pytest.mark.parametrize(
    ("name", "num_tasks", "num_tests"),
    [
        ("training", 400, 416),
        ("evaluation", 400, 419),
        ("evaluation2", 120, 167),
    ],
)
def test_bundled_sets_are_complete_and_sorted(name, num_tasks, num_tests):
    tasks = load_tasks(name)
    assert len(tasks) == num_tasks
    assert sum(len(task.test) for task in tasks) == num_tests
    assert ids(tasks) == sorted(ids(tasks))
    assert all(task.has_answers for task in tasks)


def test_an_unknown_bundled_id_suggests_near_ones():
    with pytest.raises(
        DataError, match=r"arc1 has no task .007bbfb8. .*800; its ids are like 007bbfb7"
    ):
        load_tasks("arc1:007bbfb8")
    with pytest.raises(DataError, match=r"arc2 has no task .*its ids are like"):
        load_tasks("arc2:?")


def test_a_folder_gives_its_task_files_sorted_by_id(tmp_path):
    for name in ("b.json", "a.json", "c.json.gz"):
        write(tmp_path / name, TASK)
    (tmp_path / "readme.txt").write_text("no task")
    assert ids(load_tasks(str(tmp_path))) == ["a", "b", "c"]
    assert ids(load_tasks(str(tmp_path), max_tasks=2)) == ["a", "b"]


@pytest.mark.parametrize("name", ["map.json", "map.json.gz"])
def test_a_map_of_tasks_gives_its_tasks(tmp_path, name):
    tasks = load_tasks(write(tmp_path / name, {"b": TASK, "a": OPEN}))
    assert ids(tasks) == ["a", "b"]
    assert [task.has_answers for task in tasks] == [False, True]


def test_a_map_of_pairs_gives_demonstrations_only(tmp_path):
    (task,) = load_tasks(write(tmp_path / "map.json.gz", {"a": [PAIR, PAIR, PAIR]}))
    assert len(task.demonstrations) == 3
    assert task.test == ()


def test_kaggle_solutions_beside_the_challenges_are_found_by_name(tmp_path):
    path = write(tmp_path / "arc_evaluation_challenges.json", {"a": OPEN, "b": OPEN})
    write(tmp_path / "arc_evaluation_solutions.json", {"a": [[[7, 8]]]})
    first, second = load_tasks(path)
    assert first.test[0].output.tolist() == [[7, 8]]
    assert not second.has_answers


@pytest.mark.parametrize("name", ["a.json", "."])
def test_given_solutions_that_answer_nothing_are_refused(tmp_path, name):
    write(tmp_path / "a.json", OPEN)
    answers = tmp_path / "solutions.json"
    with pytest.raises(TaskError, match=r"solutions.json: cannot be read"):
        load_tasks(str(tmp_path / name), solutions=answers)
    write(answers, {"other": [[[9]]]})
    with pytest.raises(DataError, match=r"solutions.json: has no answer for any task of"):
        load_tasks(str(tmp_path / name), solutions=answers)


@pytest.mark.parametrize("task_id", ["", "\ud800", "\x1b[2J", "a\nb"])
def test_ids_that_cannot_be_printed_are_refused(tmp_path, task_id):
    with pytest.raises(TaskError, match=r"printable.* rename it") as caught:
        load_tasks(write(tmp_path / "map.json", {"a": TASK, task_id: TASK}))
    assert str(caught.value).isprintable()
    write(tmp_path / "solutions.json", {task_id: [GRID]})
    with pytest.raises(TaskError, match=r"printable.* rename it"):
        load_solutions(tmp_path / "solutions.json")


def test_an_entry_of_a_map_that_is_no_task_is_named(tmp_path):
    path = write(tmp_path / "map.json", {"a": TASK, "version": 3})
    with pytest.raises(TaskError, match=r"map.json: version: is not an ARC task.*got 3"):
        load_tasks(path)
    errors = []
    assert ids(load_tasks(path, on_error=errors.append)) == ["a"]
    assert len(errors) == 1


def test_a_kaggle_folder_gives_each_task_once_and_with_its_answer(tmp_path):
    write(tmp_path / "arc_test_challenges.json", {"a": OPEN})
    write(tmp_path / "arc_evaluation_challenges.json", {"a": OPEN, "b": OPEN})
    write(tmp_path / "arc_evaluation_solutions.json", {"a": [[[7]]], "b": [[[8]]]})
    write(tmp_path / "sample_submission.json", {"a": [{"attempt_1": [[0]], "attempt_2": [[0]]}]})
    tasks = load_tasks(str(tmp_path))
    assert ids(tasks) == ["a", "b"]
    assert all(task.has_answers for task in tasks)


def test_solutions_that_do_not_fit_are_refused(tmp_path):
    path = write(tmp_path / "challenges.json", {"a": OPEN})
    write(tmp_path / "solutions.json", {"a": [[[7]], [[8]]]})
    with pytest.raises(TaskError, match=r"a: 1 test inputs, but 2 solutions"):
        load_tasks(path)
    write(tmp_path / "solutions.json", {"a": [[[77]]]})
    with pytest.raises(TaskError, match=r"solutions.json: a: output\[0\] row 0 column 0"):
        load_tasks(path)
    write(tmp_path / "solutions.json", [1])
    with pytest.raises(TaskError, match="not a solutions file"):
        load_tasks(path)


def test_two_different_tasks_of_one_id_are_refused(tmp_path):
    write(tmp_path / "x.json", {"a": TASK})
    write(tmp_path / "y.json", {"a": {"train": [PAIR, PAIR], "test": [PAIR]}})
    with pytest.raises(TaskError, match=r"y.json: a: another task of that id"):
        load_tasks(str(tmp_path))


def test_with_on_error_bad_tasks_are_reported_and_the_others_kept(tmp_path):
    write(tmp_path / "a.json", TASK)
    (tmp_path / "b.json").write_text("{")
    (tmp_path / "gone.json").symlink_to(tmp_path / "nowhere")
    write(tmp_path / "map.json", {"m": TASK, "n": {"train": []}})
    write(tmp_path / "z.json", TASK)
    errors = []
    tasks = load_tasks(str(tmp_path), on_error=errors.append)
    assert ids(tasks) == ["a", "m", "z"]
    reported = "\n".join(map(str, errors))
    assert len(errors) == 3
    assert all(name in reported for name in ("b.json", "gone.json", "map.json: n"))


@pytest.mark.parametrize(
    ("source", "meant"),
    [
        ("trainin", "did you mean training or training2?"),
        ("45737921", "did you mean arc1:45737921 or arc2:45737921?"),
        ("45737921.json", "did you mean arc1:45737921 or arc2:45737921?"),
        ("arc3:45737921", "did you mean arc1:45737921 or arc2:45737921?"),
        ("45737922", "did you mean arc1:45737921 or arc2:45737921?"),
        ("conceptarc", "did you mean concept_arc?"),
        ("nothing like it", "not one of training, evaluation, training2, evaluation2, concept_arc"),
    ],
)
def test_a_path_that_does_not_exist_offers_what_it_is_like(source, meant):
    with pytest.raises(DataError, match=rf"{source}: no such file or folder.*") as caught:
        load_tasks(source)
    assert meant in str(caught.value)


def test_a_misspelt_file_is_offered_from_its_folder(tmp_path):
    write(tmp_path / "my_tasks.json", TASK)
    with pytest.raises(DataError, match=r"did you mean .*my_tasks.json\?"):
        load_tasks(str(tmp_path / "my_task.json"))


def test_a_folder_of_folders_names_those_that_hold_tasks(tmp_path):
    (tmp_path / "data/training").mkdir(parents=True)
    write(tmp_path / "data/training/a.json", TASK)
    with pytest.raises(DataError, match=r"has no usable task; .* give .*data/training$"):
        load_tasks(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ({"a": [GRID], "b": [GRID, GRID]}, "solutions"),
        ({"a": [{"attempt_1": GRID, "attempt_2": GRID}]}, "submission"),
    ],
)
def test_answers_given_as_tasks_are_recognised(tmp_path, content, kind):
    with pytest.raises(TaskError, match=rf"x.json: is a {kind} file.*give the challenges file"):
        load_tasks(write(tmp_path / "x.json", content))
