"""`data build`: the shipped default builds small and fast, the guard refuses, prepare is strict."""

import gzip
import json
from io import StringIO

import pytest
from pydantic import ValidationError
from rich.console import Console

from arctrm.config.data import DataConfig
from arctrm.data.base_set import build, open_base_set, prepare
from arctrm.data.sources import load_tasks
from arctrm.data.task import held_out_ids, pair_key
from arctrm.errors import DataError, OverlapError

PAIR = {"input": [[1, 2]], "output": [[5]]}
TASK = {"train": [PAIR], "test": [{"input": [[3]], "output": [[6]]}]}


def rendered(report):
    console = Console(width=120, record=True, file=StringIO())
    console.print(report)
    return console.export_text()


def map_of(path, tasks):
    path.write_bytes(gzip.compress(json.dumps(tasks).encode()))
    return str(path)


@pytest.fixture(scope="module")
def default(tmp_path_factory):
    """The set of the default configuration, the report on it, its folder."""
    folder = tmp_path_factory.mktemp("default") / "set"
    return *build(DataConfig(num_aug=10**6), folder), folder


def test_the_default_is_small_whatever_num_aug_is(default):
    base, report, folder = default
    assert sum(file.stat().st_size for file in folder.iterdir()) < 2e6
    assert base.meta.num_aug == 10**6
    assert base.meta.counts == {
        "training": {"tasks": 399, "demonstrations": 1300, "test_pairs": 415},
        "evaluation": {"tasks": 400, "demonstrations": 1363, "test_pairs": 0},
    }
    assert (base.num_tasks, base.num_pairs) == (799, 3078)
    text = rendered(report)
    for part in ("799 tasks", "3,078 pairs", "training", "1,300", "40853293", "8719f442"):
        assert part in text


def test_the_default_holds_the_evaluation_sets_demonstrations_and_none_of_its_test_pairs(default):
    base, _, _ = default
    held = {task_id: set() for task_id in base.meta.task_ids}
    for index, row in enumerate(base.pairs):
        held[base.meta.task_ids[row[0]]].add(pair_key(base.pair(index)))
    everything = set().union(*held.values())
    for task in load_tasks("evaluation"):
        assert held[task.id] == {pair_key(pair) for pair in task.demonstrations}
        assert everything.isdisjoint({pair_key(pair) for pair in task.test})
    assert sum(base.meta.in_test_set) == 400


def test_the_same_sources_give_the_same_fingerprint():
    found = [build(DataConfig(subsets=("evaluation",), max_tasks=n))[0].meta for n in (5, 5, 6)]
    assert found[0] == found[1]
    assert found[0].fingerprint != found[2].fingerprint
    assert [counts["tasks"] for counts in found[2].counts.values()] == [6]


@pytest.mark.slow
def test_arc_agi_2_training_beside_arc_agi_1_evaluation_is_refused_by_name():
    with pytest.raises(OverlapError, match=r"training2.*00576224.*365 more.*drop_overlap"):
        build(DataConfig(subsets=("training", "evaluation", "training2")))


@pytest.mark.slow
def test_drop_overlap_leaves_the_offending_tasks_out():
    config = DataConfig(subsets=("evaluation", "training2"), drop_overlap=True)
    base, report = build(config)
    # 8719f442, the 376th, is excluded by default.
    assert "left out by data.drop_overlap: 375 tasks" in rendered(report)
    assert "00576224" not in {t for t, label, _ in base.labelled_pairs() if label == "training2"}
    assert base.meta.counts["evaluation"]["tasks"] == 400
    assert base.meta.counts["training2"]["tasks"] == 1000 - 375 - 1


def test_nothing_of_an_unseen_test_set_is_trained_on_not_even_demonstrations(tmp_path):
    other = [{"input": [[7, 7]], "output": [[8]]}]
    copy = [{"input": [[1], [2]], "output": [[5]]}]  # of PAIR, turned
    more = map_of(tmp_path / "more.json.gz", {"copy": copy, "other": other})
    told = map_of(tmp_path / "told.json.gz", {"asked": TASK})
    config = DataConfig(subsets=(more, told), test_set=told, unseen_test_set=True)
    with pytest.raises(OverlapError, match=r"copy \(test pair of asked\)"):
        build(config)
    base, _ = build(config.model_copy(update={"drop_overlap": True}))
    assert (base.meta.task_ids, base.num_pairs) == (("other",), 1)
    with pytest.raises(ValidationError, match=r"unseen_test_set = true, but no data\.test_set"):
        DataConfig(test_set=None, unseen_test_set=True)


@pytest.mark.slow
def test_without_the_known_leaks_excluded_the_guard_finds_them():
    with pytest.raises(OverlapError, match=r"40853293 \(test pair of 070dd51e\)"):
        build(DataConfig(exclude=()))
    _, report = build(DataConfig(exclude=(), allow_overlap=("40853293",)))
    assert "may be trained on: 40853293" in rendered(report)


def test_without_a_test_set_everything_is_trained_on():
    base, _ = build(DataConfig(subsets=("evaluation",), test_set=None, max_tasks=9))
    tests = sum(len(task.test) for task in load_tasks("evaluation", max_tasks=9))
    assert base.meta.counts["evaluation"]["test_pairs"] == tests


def test_a_map_is_one_more_subset_under_its_stem(tmp_path):
    path = map_of(tmp_path / "extra.json.gz", {"mine": TASK, "007bbfb7": [PAIR]})
    base, _ = build(DataConfig(subsets=("training", "evaluation", path), max_tasks=4))
    assert base.meta.subsets == ("training", "evaluation", "extra")
    assert base.meta.counts["extra"] == {"tasks": 2, "demonstrations": 2, "test_pairs": 1}
    assert base.num_tasks == 9


def test_prepare_builds_once_and_then_opens(tmp_path):
    config = DataConfig(path=tmp_path / "set", max_tasks=4)
    first = prepare(config)
    written = (tmp_path / "set" / "base.safetensors").stat().st_mtime_ns
    second = prepare(config.model_copy(update={"num_aug": 3}))
    assert (tmp_path / "set" / "base.safetensors").stat().st_mtime_ns == written
    assert first.meta.fingerprint == second.meta.fingerprint
    assert (first.meta.num_aug, second.meta.num_aug) == (1000, 3)


@pytest.mark.parametrize("other", [{"test_set": "training"}, {"max_tasks": 5}, {"exclude": ("a",)}])
def test_prepare_refuses_a_set_that_was_built_from_something_else(tmp_path, other):
    prepare(DataConfig(path=tmp_path / "set", max_tasks=4))
    with pytest.raises(DataError, match=r"was built with data.*but the configuration says"):
        prepare(DataConfig(path=tmp_path / "set", **({"max_tasks": 4} | other)))
    assert open_base_set(tmp_path / "set").num_tasks == 8


def test_held_out_tasks_keep_their_demonstrations_and_lose_their_test_pairs():
    config = DataConfig(subsets=("training",), test_set=None, max_tasks=30, held_out=10)
    whole, _ = build(config.model_copy(update={"held_out": 0}))
    base, _ = build(config)
    tasks = load_tasks("training", max_tasks=30)
    chosen = held_out_ids((task.id for task in tasks), 10)
    assert len(chosen) == 10
    assert chosen == held_out_ids((task.id for task in reversed(tasks)), 10)
    lost = whole.num_pairs - base.num_pairs
    assert lost == sum(len(task.test) for task in tasks if task.id in chosen)
    names = [base.meta.task_ids[row] for row in base.pairs[base.pairs[:, 2] == 1, 0]]
    assert names
    assert not chosen & set(names)
    assert chosen <= set(base.meta.task_ids)
