"""A reader is asked under many views; what it says comes back in the task's own colours and turn.

The reader here is a real one that has learned two tasks by heart, so that its answer is known.
"""

import json
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from arctrm.config import InferenceConfig, PretrainConfig, ReaderConfig
from arctrm.config.decoding import DecodingConfig
from arctrm.data.sources import load_tasks
from arctrm.data.task import Pair, Task
from arctrm.data.views import IDENTITY, View
from arctrm.reader.decoding import decode
from arctrm.reader.tiny import TinyReader
from arctrm.reader.tokens import SEPARATOR, START, pair_length, pair_tokens, prompt
from arctrm.solving import reading as reading_module
from arctrm.solving.reading import (
    Reading,
    as_candidates,
    as_logit,
    batch_size,
    judge,
    output_room,
    propose,
    reranked,
    task_readings,
    to_judge,
    turned_back,
)
from arctrm.solving.vote import Candidate, vote
from arctrm.solving.weights import Solver, load_solver
from arctrm.training import pretrain

CPU = torch.device("cpu")
OUTPUTS = {
    "a": np.array([[1, 2, 3], [4, 5, 6]], dtype=np.uint8),
    "b": np.array([[7, 8], [1, 7], [0, 8]], dtype=np.uint8),
}
"""Always the same, whatever the input: colours that no view may move, seen from eight sides."""
VIEWS = 16


def read(reader, readings, decoding):
    """What `eval` makes of the reader's proposals."""
    return as_candidates(readings, propose(reader, readings, decoding))


def memory_task(name):
    """The inputs of both tasks are the same: only its embedding says which one is asked."""
    inputs = np.random.default_rng(0).choice([0, 9], (4, 2, 3)).astype(np.uint8)
    pairs = [Pair(grid, OUTPUTS[name]) for grid in inputs]
    return Task(name, tuple(pairs[:3]), tuple(pairs[3:]))


@pytest.fixture(scope="module")
def known(tmp_path_factory, write_tasks):
    """A solver with a reader that knows two tasks, and the tasks with their answers."""
    torch.set_num_threads(1)
    tasks = [memory_task("a"), memory_task("b")]
    folder = str(write_tasks(tmp_path_factory.mktemp("memory"), tasks))
    config = PretrainConfig.model_validate(
        {
            "model": "reader",
            "data": {"subsets": [folder], "test_set": folder, "num_aug": 0},
            "reader": {"hidden_size": 32, "num_heads": 2, "num_layers": 2},
            "training": {
                "tokens_per_batch": 2048,
                "max_rows": 48,
                "ema_decay": 0.0,
                "optimiser": {"muon_lr": 0.02, "adamw_lr": 0.01},
                "schedule": {"max_steps": 140, "warmup_steps": 5},
            },
        }
    )
    out = tmp_path_factory.mktemp("run")
    pretrain.run(config, out, False)
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["loss"] < 0.1
    solver = load_solver(out, InferenceConfig(dtype="float32"), CPU)
    return SimpleNamespace(solver=solver, reader=solver.reader, tasks=tasks)


def readings_of(known, views=VIEWS):
    return [r for t in known.tasks for r in task_readings(known.solver, t, views, 0)]


def untrained(seed=0, **reader):
    """A solver with a reader that has learned nothing and knows no task."""
    torch.manual_seed(seed)
    reader = {"hidden_size": 32, "num_heads": 2, "num_layers": 1, **reader}
    model = TinyReader(ReaderConfig(**reader), 1).requires_grad_(False)
    return Solver(model, {}, True, {}, "untrained")


def same(a, b):
    return a is b is None or (a is not None and b is not None and np.array_equal(a, b))


# -- what the reader is asked


def test_a_prompt_is_the_input_as_its_view_shows_it(known):
    readings = readings_of(known)
    assert len(readings) == 2 * VIEWS
    assert readings[0].view == IDENTITY
    assert len({r.view for r in readings[:VIEWS]}) == VIEWS
    tasks = {task.id: task for task in known.tasks}
    for r in readings:
        query = tasks[r.key[0]].test[r.key[1]].input
        tokens, positions = pair_tokens(Pair(r.view.apply(query)), 0)
        assert r.prompt.tokens.tolist() == tokens.tolist()
        assert r.prompt.positions.tolist() == positions.tolist()
        row = known.solver.row_of(tasks[r.key[0]])
        assert r.prompt.condition == (row, r.view.dihedral, int(r.view.identity_colours))
        assert np.array_equal(r.query, query)
    assert {r.prompt.condition[2] for r in readings} == {0, 1}


def test_every_test_input_is_asked_under_every_view(known):
    task = replace(known.tasks[0], test=known.tasks[0].test * 3)
    readings = task_readings(known.solver, task, 5, 0)
    assert [r.key[1] for r in readings] == [0, 1, 2] * 5
    assert [r.view for r in readings[::3]] == [r.view for r in readings[2::3]]


def test_an_unknown_task_is_asked_with_the_mean_embedding(known, small_tasks):
    readings = task_readings(known.solver, small_tasks[0], 2, 0)
    assert {r.prompt.condition[0] for r in readings} == {2}
    mean = known.reader.puzzle_emb.weights[:2].mean(0)
    torch.testing.assert_close(known.reader.puzzle_emb.weights[2], mean)


def test_there_is_room_for_the_answer_under_every_view(small_tasks):
    for task in small_tasks:
        for pair in task.test:
            for dihedral in range(8):
                height, width = View(dihedral).apply(pair.output).shape
                room = output_room(task, pair.input, View(dihedral))
                assert room >= height * (width + 1) + 1, task.id


@pytest.mark.parametrize("form", ["pair", "task"])
def test_the_answer_is_not_among_what_the_reader_is_told(form, small_tasks):
    solver = untrained(sequence=form)
    for task in small_tasks:
        tampered = replace(task, test=tuple(Pair(p.input, 9 - p.output) for p in task.test))
        versions = [
            task_readings(solver, version, 4, 0)
            for version in (task, tampered, task.without_answers())
        ]
        for a, *others in zip(*versions, strict=True):
            for b in others:
                assert a.prompt.tokens.tolist() == b.prompt.tokens.tolist()
                assert a.prompt.positions.tolist() == b.prompt.positions.tolist()
                assert (a.prompt.condition, a.view) == (b.prompt.condition, b.view)
                assert a.max_output_tokens == b.max_output_tokens


# -- the form "task": demonstrations before the query


def split_pairs(tokens):
    """Token lists of the pairs of a sequence."""
    begins = [*(tokens == START).nonzero()[0], len(tokens)]
    return [tokens[a:b].tolist() for a, b in pairwise(begins)]


def test_demonstrations_come_first_under_the_same_view_and_the_query_last(small_tasks):
    solver = untrained(sequence="task", max_pairs=20)
    task, orders = small_tasks[0], set()
    for r in task_readings(solver, task, 8, 0):
        seen = [
            pair_tokens(Pair(r.view.apply(p.input), r.view.apply(p.output)), 0)[0].tolist()
            for p in task.demonstrations
        ]
        *context, query = split_pairs(r.prompt.tokens)
        assert sorted(context) == sorted(seen)
        orders.add(tuple(seen.index(pair) for pair in context))
        assert query == pair_tokens(Pair(r.view.apply(r.query)), 0)[0].tolist()
        assert query[-1] == SEPARATOR
        expected = prompt(
            [Pair(r.view.apply(p.input), r.view.apply(p.output)) for p in task.demonstrations],
            r.view.apply(r.query),
        )
        assert r.prompt.positions[-1] == expected.positions[-1]
        assert r.prompt.output_start == expected.output_start
    assert len(orders) > 1


def test_demonstrations_that_do_not_fit_are_left_out_and_the_query_never():
    large = max(load_tasks("training"), key=lambda t: sum(pair_length(p) for p in t.demonstrations))
    for max_tokens in (1863, 2500, 4096):
        solver = untrained(sequence="task", max_tokens=max_tokens, max_pairs=20)
        for r in task_readings(solver, large, 4, 0):
            pairs = split_pairs(r.prompt.tokens)
            assert len(r.prompt.tokens) + r.max_output_tokens <= max(max_tokens, 1863)
            assert pairs[-1] == pair_tokens(Pair(r.view.apply(r.query)), 0)[0].tolist()
            assert len(pairs) < 1 + len(large.demonstrations)


def test_no_more_demonstrations_are_shown_than_in_training(small_tasks):
    for max_pairs in (1, 2, 3):
        solver = untrained(sequence="task", max_pairs=max_pairs)
        for r in task_readings(solver, small_tasks[0], 4, 0):
            assert len(split_pairs(r.prompt.tokens)) == max_pairs


# -- what it says


def test_answers_from_every_view_are_turned_back_to_the_task(known):
    """A reader that knows the answer gives the same grid from every side, in every colour."""
    found = read(known.reader, readings_of(known), DecodingConfig())
    assert len(found) == 2 * VIEWS
    right = [same(c.grid, OUTPUTS[key[0]]) for key, c in found]
    assert np.mean(right) >= 0.9
    assert {c.source for _, c in found} == {"reader"}
    assert max(c.q for _, c in found) > 0  # more likely than not
    for key in {key for key, _ in found}:
        ranked = vote([c for k, c in found if k == key], 0)
        assert same(ranked[0].grid, OUTPUTS[key[0]])


def test_the_first_view_is_the_draft_of_the_others_and_changes_no_answer(known, monkeypatch):
    """The input is, of the first, where the size is kept; what is expected, of all."""
    readings, asked = readings_of(known), []
    plain = decode(
        known.reader,
        [r.prompt for r in readings],
        max_output_tokens=[r.max_output_tokens for r in readings],
    )

    def listening(*given, drafts=None, **options):
        asked.append(drafts)
        return decode(*given, drafts=drafts, **options)

    monkeypatch.setattr(reading_module, "decode", listening)
    kept = [replace(r, keeps_size=r.key[0] == readings[0].key[0]) for r in readings]
    found = propose(known.reader, kept, DecodingConfig())
    assert [one.tokens for (one,) in found] == [one.tokens for one in plain]
    first, rest = asked
    keys = list(dict.fromkeys(r.key for r in readings))
    assert same(first[0], kept[0].view.apply(kept[0].query))
    assert first[1:] == [None] * (len(keys) - 1)
    answers = {}
    for r, one in zip(readings, plain, strict=True):
        answers.setdefault(r.key, r.view.inverse(one.grid))
    others = [r for i, r in enumerate(readings) if r.key in {q.key for q in readings[:i]}]
    assert len(others) == len(rest)
    assert all(same(d, r.view.apply(answers[r.key])) for r, d in zip(others, rest, strict=True))

    asked.clear()
    propose(known.reader, readings, DecodingConfig(), with_drafts=False)
    assert asked == [None]
    asked.clear()
    expected = {key: np.full((2, 2), 7, np.uint8) for key in keys}
    again = propose(known.reader, readings, DecodingConfig(), expected=expected)
    assert [one.tokens for (one,) in again] == [one.tokens for one in plain]
    assert len(asked) == 1
    assert all(
        same(d, r.view.apply(expected[r.key])) for r, d in zip(readings, asked[0], strict=True)
    )


def test_the_task_embedding_decides_which_task_is_answered(known):
    readings = task_readings(known.solver, known.tasks[0], VIEWS, 0)
    others = [
        replace(r, prompt=replace(r.prompt, condition=(1, *r.prompt.condition[1:])))
        for r in readings
    ]
    found = propose(known.reader, others, DecodingConfig())
    expected = [View(r.view.dihedral).apply(OUTPUTS["b"]) for r in readings]
    assert (
        np.mean([same(own.grid, grid) for [own], grid in zip(found, expected, strict=True)]) >= 0.9
    )


def test_what_is_decoded_is_seen_under_the_view(known):
    readings = readings_of(known, 8)
    for r, [decoded] in zip(
        readings, propose(known.reader, readings, DecodingConfig()), strict=True
    ):
        if decoded.grid is not None:
            again = turned_back(r, decoded.grid)
            assert again is None or same(r.view.apply(again), decoded.grid)


@pytest.mark.parametrize("form", ["pair", "task"])
@pytest.mark.parametrize("min_probability", [0.0, 0.01])
def test_batch_size_and_order_do_not_matter(form, min_probability, small_tasks):
    solver = untrained(sequence=form)
    readings = [r for t in small_tasks[:2] for r in task_readings(solver, t, 3, 0)]
    answers = [
        read(
            solver.reader,
            own,
            DecodingConfig(batch_size=size, min_probability=min_probability),
        )
        for own, size in ((readings, 1), (readings, 16), (readings[::-1], 5))
    ]
    for other in answers[1:]:
        assert len(other) == len(answers[0]) >= len(readings)
    if not min_probability:
        answers[2].reverse()
        for (key, one), *rest in zip(*answers, strict=True):
            for other_key, other in rest:
                assert key == other_key
                assert same(one.grid, other.grid)
                assert one.q == pytest.approx(other.q, abs=1e-4)
    counted = [sorted(round(c.q, 3) for _, c in found) for found in answers]
    for other in counted[1:]:
        assert other == pytest.approx(counted[0], abs=2e-3)


def test_a_threshold_adds_candidates_to_the_greedy_one(known):
    readings = readings_of(known, 4)
    greedy = read(known.reader, readings, DecodingConfig())
    wider = read(known.reader, readings, DecodingConfig(min_probability=1e-4))
    assert len(wider) > len(greedy)
    for key, one in greedy:
        assert any(k == key and same(c.grid, one.grid) for k, c in wider)
    likely = {(k, round(c.q, 4)) for k, c in greedy}
    assert all(c.q >= np.log(1e-4) for k, c in wider if (k, round(c.q, 4)) not in likely)


# -- what is malformed


def reading(query, view=IDENTITY):
    asked = prompt((), view.apply(query), (0, view.dihedral, 0))
    return Reading(("a", 0), view, asked, query, 20)


def test_a_copy_of_the_input_is_malformed_under_every_view():
    query = np.array([[1, 2, 3], [0, 2, 1]], dtype=np.uint8)
    for dihedral in range(8):
        view = View(dihedral, (0, 2, 1, 3, 4, 5, 6, 7, 9, 8))
        asked = reading(query, view)
        assert turned_back(asked, view.apply(query)) is None
        changed = query.copy()
        changed[0, 0] = 5
        assert same(turned_back(asked, view.apply(changed)), changed)
        assert turned_back(asked, None) is None


def test_a_reader_that_repeats_the_input_gives_no_vote(known):
    readings = [replace(r, query=OUTPUTS[r.key[0]]) for r in readings_of(known)]
    before = read(known.reader, readings_of(known), DecodingConfig())
    after = read(known.reader, readings, DecodingConfig())
    for (key, a), (_, b) in zip(before, after, strict=True):
        assert (b.grid is None) == (a.grid is None or same(a.grid, OUTPUTS[key[0]]))
        assert a.q == b.q
    assert sum(c.grid is None for _, c in after) >= VIEWS


def test_a_grid_without_an_end_is_malformed(known):
    readings = [replace(r, max_output_tokens=3) for r in readings_of(known, 4)]
    found = read(known.reader, readings, DecodingConfig())
    assert [c.grid for _, c in found] == [None] * len(readings)
    assert vote([c for _, c in found], 0) == []


# -- what it judges


def test_a_score_is_what_decoding_gave_the_same_grid(known):
    readings = readings_of(known, 6)
    decoded = propose(known.reader, readings, DecodingConfig())
    for r, [one] in zip(readings, decoded, strict=True):
        grids = {r.key: [r.view.inverse(one.grid)]}
        [(key, [score])] = judge(known.reader, [r], grids, DecodingConfig())
        assert key == r.key
        assert score == pytest.approx(one.log_probability, abs=1e-4)


def test_the_right_grid_is_likelier_than_a_wrong_one_from_every_side(known):
    wrong = {name: np.where(grid == grid[0, 0], 9, grid) for name, grid in OUTPUTS.items()}
    grids = {(name, 0): [wrong[name].astype(np.uint8), OUTPUTS[name]] for name in OUTPUTS}
    judged = judge(known.reader, readings_of(known, 8), grids, DecodingConfig(batch_size=3))
    assert len(judged) == 16
    assert all(scores[1] > scores[0] for _, scores in judged)
    again = judge(known.reader, readings_of(known, 8), grids, DecodingConfig(batch_size=64))
    for (key, a), (other, b) in zip(judged, again, strict=True):
        assert key == other
        assert a == pytest.approx(b, abs=1e-4)


def test_a_test_input_without_candidates_has_no_scores(known):
    grids = {("a", 0): [OUTPUTS["a"]]}
    judged = judge(known.reader, readings_of(known, 2), grids, DecodingConfig())
    assert [(key, len(scores)) for key, scores in judged] == [
        (("a", 0), 1),
        (("a", 0), 1),
        (("b", 0), 0),
        (("b", 0), 0),
    ]
    ranked = {("a", 0): vote([Candidate(OUTPUTS["a"], 0.0)], 0), ("b", 0): []}
    assert reranked(ranked, judged)["b", 0] == []


def test_experts_put_a_likely_grid_before_one_of_more_votes(known):
    right, wrong = OUTPUTS["a"], np.full((2, 3), 9, dtype=np.uint8)
    third = np.zeros((1, 1), dtype=np.uint8)
    candidates = [Candidate(g, 0.0) for g in (wrong, wrong, wrong, third, third, right)]
    ranked = {("a", 0): vote(candidates, 0)}
    assert same(ranked["a", 0][0].grid, wrong)
    readings = task_readings(known.solver, known.tasks[0], 8, 0)
    decoding = DecodingConfig(rank="experts", scored_candidates=3)
    judged = judge(known.reader, readings, to_judge(ranked, decoding), decoding)
    [best, *rest] = reranked(ranked, judged)["a", 0]
    assert same(best.grid, right)
    assert best.votes == 1
    assert best.reader_score == pytest.approx(np.mean([own[2] for _, own in judged]))
    scores = [r.reader_score for r in (best, *rest)]
    assert scores == sorted(scores, reverse=True)


def test_only_the_best_by_votes_are_scored_and_the_others_stay_behind(known):
    grids = [np.full((1, width), 5, dtype=np.uint8) for width in (1, 2, 3, 4)]
    candidates = [Candidate(g, 0.0) for i, g in enumerate(grids) for _ in range(4 - i)]
    ranked = {("a", 0): vote(candidates, 0)}
    decoding = DecodingConfig(rank="experts", scored_candidates=2)
    chosen = to_judge(ranked, decoding)
    assert [g.shape[1] for g in chosen["a", 0]] == [1, 2]
    readings = task_readings(known.solver, known.tasks[0], 2, 0)
    after = reranked(ranked, judge(known.reader, readings, chosen, decoding))["a", 0]
    assert sorted(r.grid.shape[1] for r in after[:2]) == [1, 2]
    assert [r.grid.shape[1] for r in after[2:]] == [3, 4]
    assert [r.reader_score is None for r in after] == [False, False, True, True]


def test_the_batch_size_is_the_configured_one_or_that_of_the_machine(known):
    assert batch_size(known.reader, DecodingConfig()) == 16
    assert batch_size(known.reader, DecodingConfig(batch_size=7)) == 7


@pytest.mark.parametrize("probability", [1e-30, 0.25, 0.5, 0.9])
def test_q_is_the_logit_of_the_probability(probability):
    assert as_logit(np.log(probability)) == pytest.approx(
        np.log(probability) - np.log1p(-probability)
    )
    assert np.isfinite(as_logit(0.0))
