"""Queries in, candidates out: views undone exactly, order and packing without influence."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from arctrm.config import DataConfig, InferenceConfig, TRMConfig
from arctrm.data import canvas
from arctrm.data.dataset import base_set_from_tasks
from arctrm.data.sources import load_tasks
from arctrm.data.task import Pair, Task
from arctrm.data.views import IDENTITY, View
from arctrm.errors import ResourceError
from arctrm.solving.candidates import (
    answer,
    batch_of,
    by_key,
    refined,
    task_queries,
)
from arctrm.solving.canvas_rules import query_canvas
from arctrm.solving.weights import Solver, load_solver
from arctrm.training.stream import COLOURS, DIHEDRAL, HEIGHT, LENGTH, PAIR, WIDTH, PairStream
from arctrm.trm.model import TRM, Prediction

CPU = torch.device("cpu")
INFERENCE = InferenceConfig(tokens_per_batch=4096, dtype="float32")


@pytest.fixture
def solver(trained):
    return load_solver(trained.run, INFERENCE, CPU)


@pytest.fixture(scope="module")
def tasks():
    """Real tasks of many sizes whose canvas rule leaves room for the answer."""

    def fits(task):
        return all(
            np.all(np.array(query_canvas(task, pair.input)) >= pair.output.shape)
            for pair in task.test
        )

    return [task for task in load_tasks("training", max_tasks=60) if fits(task)]


class Oracle(TRM):
    """Answers each query with the codes that `truth` has for its task embedding row; q = row."""

    def __init__(self, truth: list[np.ndarray], layout: str = "compact"):
        config = TRMConfig(hidden_size=8, num_heads=1, layout=layout, condition_cells=False)
        super().__init__(config, len(truth))
        self.truth = truth

    def prefix(self, embedding_row, dihedral, colour_flag, blank=False, context=None):
        self.asked = embedding_row.tolist(), dihedral.tolist(), colour_flag.tolist()
        return super().prefix(embedding_row, dihedral, colour_flag, blank, context)

    def supervision_step(self, latents, x_TD, seq, first_token):
        slots = self.config.num_prefix_slots
        codes = [np.pad(self.truth[row].ravel(), (slots, 0)) for row in self.asked[0]]
        logits = torch.nn.functional.one_hot(torch.from_numpy(np.concatenate(codes)).long(), 12)
        return latents, Prediction(logits.float(), torch.tensor(self.asked[0]).float())


def oracle_for(tasks, num_views, layout="compact"):
    """A solver that knows every answer under every view, and the queries that ask for them."""
    asker = Solver(Oracle([np.zeros((1, 1))], layout), {}, False, {}, "asker")
    queries, truth, answers = [], [], []
    for task in tasks:
        for query in task_queries(asker, task, num_views, seed=5):
            output = task.test[query.key[1]].output
            truth.append(canvas.encode(query.view.apply(output), *query.codes.shape))
            queries.append(replace(query, row=len(queries)))
            answers.append(output)
    return replace(asker, model=Oracle(truth, layout)), queries, answers


def same(a, b):
    return a is b is None or (a.shape == b.shape and np.array_equal(a, b))


# -- views and order


@pytest.mark.parametrize("tokens_per_batch", [1024, 32768])
@pytest.mark.parametrize("layout", ["compact", "reference"])
def test_a_model_that_knows_every_view_of_the_answer_is_read_as_the_answer(
    tasks, layout, tokens_per_batch
):
    chosen = tasks[:40] if layout == "compact" else tasks[:8]
    solver, queries, answers = oracle_for(chosen, 20, layout)
    found = answer(solver, queries, InferenceConfig(tokens_per_batch=tokens_per_batch, steps=1))
    assert [key for key, _ in found] == [query.key for query in queries]
    assert [candidate.q for _, candidate in found] == list(range(len(queries)))
    for (_, candidate), truth in zip(found, answers, strict=True):
        assert same(candidate.grid, truth)
    assert len({query.view.dihedral for query in queries}) == 8


def test_a_query_shows_the_test_input_under_its_view(tasks):
    _, queries, _ = oracle_for(tasks[:30], 12)
    inputs = {(task.id, i): pair.input for task in tasks for i, pair in enumerate(task.test)}
    for query in queries:
        shown = canvas.decode(query.codes)
        assert same(shown, query.view.apply(inputs[query.key]))


def test_the_model_is_told_row_dihedral_and_whether_colours_are_kept(tasks):
    solver, queries, _ = oracle_for(tasks[:1], 16)
    answer(solver, queries, InferenceConfig(steps=1, tokens_per_batch=32768))
    rows, dihedrals, flags = solver.trm.asked
    assert rows == list(range(len(queries)))
    assert dihedrals == [query.view.dihedral for query in queries]
    assert flags == [query.view.identity_colours for query in queries]
    assert {0, 1} == set(flags)


def test_what_is_not_a_grid_is_no_grid():
    task = load_tasks("training", max_tasks=1)[0]
    solver, queries, _ = oracle_for([task], 4)
    for truth in solver.trm.truth[1:3]:
        truth[0, 0] = canvas.EOS
    found = answer(solver, queries, InferenceConfig(steps=1))
    assert [candidate.grid is None for _, candidate in found] == [False, True, True, False]


# -- views of a task


def test_a_task_is_asked_under_distinct_views_beginning_with_itself(solver, trained):
    task = trained.known[0]
    queries = task_queries(solver, task, 20, seed=0)
    assert queries[0].view == IDENTITY
    assert len({query.view for query in queries}) == 20
    assert {query.row for query in queries} == {solver.row_of(task)}


def test_every_test_input_is_asked_under_every_view(solver, trained):
    task = next(task for task in trained.others if len(task.test) == 3)
    queries = task_queries(solver, task, 5, seed=0)
    assert [query.key for query in queries] == [(task.id, i) for i in range(3)] * 5
    for begin in range(0, 15, 3):
        assert len({query.view for query in queries[begin : begin + 3]}) == 1


def test_the_views_depend_on_seed_and_task_alone(solver, trained):
    first, second = trained.known[:2]

    def views(task, seed):
        return [query.view for query in task_queries(solver, task, 10, seed)]

    before = views(first, 0)
    views(second, 0)
    assert views(first, 0) == before
    assert views(first, 1) != before
    assert views(second, 0) != before
    assert views(first, 0)[:5] == [q.view for q in task_queries(solver, first, 5, 0)]


def test_an_unknown_task_is_asked_with_the_mean_embedding(solver, trained):
    queries = task_queries(solver, trained.others[0], 3, seed=0)
    assert {query.row for query in queries} == {solver.mean_row}


def test_a_turned_canvas_is_turned(solver):
    grid = np.ones((2, 5), np.uint8)
    task = Task("wide", (Pair(grid, grid),), (Pair(grid),))
    for query in task_queries(solver, task, 8, seed=0):
        turned = query.view.dihedral in (1, 3, 6, 7)
        assert query.codes.shape == ((6, 3) if turned else (3, 6))


def test_test_outputs_change_no_query_and_no_candidate(solver, trained):
    for task in (trained.known[0], trained.others[0]):
        other = replace(task, test=tuple(Pair(p.input, p.input[:1] * 0 + 9) for p in task.test))
        versions = [
            task_queries(solver, version, 6, seed=0)
            for version in (task, other, task.without_answers())
        ]
        found = [answer(solver, queries, INFERENCE) for queries in versions]
        for queries, candidates in zip(versions[1:], found[1:], strict=True):
            for a, b in zip(versions[0], queries, strict=True):
                assert (a.key, a.view, a.row) == (b.key, b.view, b.row)
                assert same(a.codes, b.codes)
            for (_, a), (_, b) in zip(found[0], candidates, strict=True):
                assert same(a.grid, b.grid)
                assert a.q == b.q


# -- packing


def test_a_batch_holds_as_many_queries_as_its_tokens_and_one_at_least(solver, trained):
    queries = [q for task in trained.known for q in task_queries(solver, task, 20, seed=0)]
    few, many = (InferenceConfig(tokens_per_batch=tokens) for tokens in (1024, 2048))
    count = batch_of(solver, queries, few)
    sizes = [8 + query.codes.size for query in queries]
    assert sum(sizes[:count]) <= 1024 < sum(sizes[: count + 1]) or count == 1024 // 64
    assert batch_of(solver, queries, many) > count
    assert batch_of(solver, queries[:1], few) == 1


def test_no_query_needs_no_answer(solver):
    assert answer(solver, [], INFERENCE) == []


def test_an_answer_does_not_depend_on_what_it_is_packed_with(solver, trained, monkeypatch):
    queries = [q for task in trained.known for q in task_queries(solver, task, 3, seed=0)][:16]
    queries.sort(key=lambda query: query.codes.size)
    seen = []
    read_out = solver.trm.read_out

    def spy(z_H, first_token):
        prediction = read_out(z_H, first_token)
        seen.append(prediction.logits)
        return prediction

    monkeypatch.setattr(solver.trm, "read_out", spy)
    together = answer(solver, queries, INFERENCE)
    packed = seen[-1].split([8 + query.codes.size for query in queries])
    assert len({query.codes.shape for query in queries}) > 2
    for query, (key, candidate), logits in zip(queries, together, packed, strict=True):
        [(key_alone, alone)] = answer(solver, [query], INFERENCE)
        torch.testing.assert_close(seen[-1], logits, atol=1e-5, rtol=0)
        assert key == key_alone
        assert same(candidate.grid, alone.grid)
        assert candidate.q == pytest.approx(alone.q, abs=1e-5)


def test_every_answer_is_told_of(solver, trained):
    queries = task_queries(solver, trained.known[3], 40, seed=0)
    done = []
    answer(solver, queries, InferenceConfig(tokens_per_batch=1024, steps=1), done.append)
    assert sum(done) == len(queries)
    assert len(done) > 1


def test_candidates_are_grouped_by_test_input(solver, trained):
    task = next(task for task in trained.others if len(task.test) == 3)
    queries = task_queries(solver, task, 4, seed=0)
    grouped = by_key(answer(solver, queries, INFERENCE))
    assert {key: len(found) for key, found in grouped.items()} == {
        (task.id, index): 4 for index in range(3)
    }


# -- inference options


def logits_of(solver, task, monkeypatch, **options):
    seen = []
    read_out = solver.trm.read_out

    def spy(z_H, first_token):
        seen.append(read_out(z_H, first_token))
        return seen[-1]

    monkeypatch.setattr(solver.trm, "read_out", spy)
    answer(solver, task_queries(solver, task, 2, seed=0), InferenceConfig(**options))
    monkeypatch.setattr(solver.trm, "read_out", read_out)
    return [prediction.logits for prediction in seen]


def test_a_blank_task_embedding_changes_the_answers(solver, trained, monkeypatch):
    task = trained.known[2]
    normal = logits_of(solver, task, monkeypatch)[-1]
    blank = logits_of(solver, task, monkeypatch, blank_task_embedding=True)[-1]
    assert (normal - blank).abs().max() > 1e-3
    assert torch.equal(normal, logits_of(solver, task, monkeypatch)[-1])


def test_with_a_blank_task_embedding_no_task_is_known(solver, trained, monkeypatch):
    task = trained.known[2]
    unknown = replace(task, demonstrations=(*task.demonstrations, task.demonstrations[0]))
    assert solver.row_of(unknown) is None
    for blank in (False, True):
        a, b = (
            logits_of(solver, t, monkeypatch, blank_task_embedding=blank)[-1]
            for t in (task, unknown)
        )
        assert torch.equal(a, b) == blank


def test_supervision_steps_are_the_checkpoints_unless_given(solver, trained, monkeypatch):
    task = trained.known[0]
    assert len(logits_of(solver, task, monkeypatch)) == 4
    assert len(logits_of(solver, task, monkeypatch, steps=2)) == 2
    assert len(logits_of(solver, task, monkeypatch, steps=9)) == 9


def test_out_of_memory_names_the_key_to_lower(solver, trained):
    def full(*given):
        raise torch.OutOfMemoryError("CUDA out of memory")

    solver.trm.level = full
    with pytest.raises(ResourceError, match=r"--set inference\.tokens_per_batch=2048"):
        answer(solver, task_queries(solver, trained.known[0], 2, seed=0), INFERENCE)


def test_the_model_reads_a_query_as_it_was_trained_to(solver, trained):
    """The stream's codes and the query's are the same for the same pair, view and canvas."""
    base = base_set_from_tasks({"training": trained.known}, None, 0)
    data = DataConfig(subsets=("training",), test_set=None, enlarge_canvas=0.5)
    torch.manual_seed(0)
    stream = PairStream(base, data, solver.trm.config, 0, CPU)
    state = stream.new_state(solver.trm, 2048, 32)
    batch = stream.next_batch(state, solver.trm)
    compared = 0
    for index, row in enumerate(batch.rows):
        if row[LENGTH] == 0:
            continue
        view = View(int(row[DIHEDRAL]), tuple(row[COLOURS].tolist()))
        pair = base.pair(int(row[PAIR]))
        cells = batch.codes[batch.tokens.row == index][8:].reshape(row[HEIGHT], row[WIDTH])
        codes = canvas.encode(view.apply(pair.input), int(row[HEIGHT]), int(row[WIDTH]))
        assert np.array_equal(cells.numpy(), codes)
        compared += 1
    assert compared > 10


def test_static_shapes_give_the_same_answers(trained):
    """What a GPU computes, with dummy rows and tokens, and what a CPU computes without them."""
    inference = InferenceConfig(dtype="float32", steps=3, tokens_per_batch=4096)
    solver = load_solver(trained.run, inference, torch.device("cpu"))
    tasks = [task.without_answers() for task in (*trained.known, *trained.others)]
    queries = [query for task in tasks for query in task_queries(solver, task, 3, 0)]
    exact, static = (refined(solver, queries, inference, static=way) for way in (False, True))
    for a, b in zip(exact, static, strict=True):
        np.testing.assert_array_equal(a.codes, b.codes)
        assert a.q_halt == pytest.approx(b.q_halt, abs=1e-5)
