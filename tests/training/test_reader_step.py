"""One training step of the tiny reader: its loss, its gradient, its counts, and no leak."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from arctrm.config import DataConfig, OptimiserConfig, ReaderConfig
from arctrm.data.dataset import base_set_from_tasks
from arctrm.data.sources import load_tasks
from arctrm.data.task import NUM_COLOURS, Pair, Task
from arctrm.reader.tiny import GridRotary, TinyReader, llama_config
from arctrm.reader.tokens import (
    END,
    OUTPUT_PART,
    PARTS_PER_PAIR,
    ROW_END,
    SEPARATOR,
    SIDE,
    START,
    VOCABULARY,
)
from arctrm.training.joint_reader import TinyJointReader
from arctrm.training.losses import IGNORE
from arctrm.training.optimisers import FlatGradients, Optimisers
from arctrm.training.reader_step import ReaderStep, reader_losses
from arctrm.training.reader_stream import DIHEDRAL, FLAG, MOSAIC, PAIR, SCALE, TASK, ReaderStream
from arctrm.training.source import OUTPUT, PairSource
from arctrm.training.step import COUNTS, GraphedStep

CPU = torch.device("cpu")
TOKENS = 2048
SMALL = {"hidden_size": 32, "num_heads": 2, "num_layers": 2}
PLAIN = DataConfig(num_aug=1)
"""One view, the identity."""
FORMS = ("pair", "task")


def grid(*rows):
    return np.array(rows, dtype=np.uint8)


PAIR_A = Pair(grid([1, 2], [3, 4]), grid([4, 3], [2, 1]))
PAIR_B = Pair(grid([5, 6, 7]), grid([7, 7], [6, 5]))
LENGTH_A, LABELS_A = 3 + 6 + 6, 7


def base_of(*pairs):
    """One task per pair, each in a subset of its own."""
    tasks = {s: [Task(f"task_{s}", (p,))] for s, p in zip("abc", pairs, strict=False)}
    return base_set_from_tasks(tasks, None, 1)


@pytest.fixture(scope="module")
def real():
    tasks = {name: load_tasks(name, max_tasks=8) for name in ("training", "evaluation")}
    return base_set_from_tasks(tasks, "evaluation", 50)


def make(
    base,
    sequences=8,
    scale=1.0,
    data=PLAIN,
    tokens=TOKENS,
    device=CPU,
    dtype=torch.float32,
    **reader,
):
    config = ReaderConfig(**{**SMALL, **reader})
    torch.manual_seed(0)
    model = TinyReader(config, base.num_tasks).to(device)
    model.dtype = dtype
    gradients = FlatGradients(list(model.parameters()))
    stream = ReaderStream(PairSource(base, data, 0, device), config, dtype)
    step = ReaderStep(TinyJointReader(model), stream, tokens, sequences, scale)
    return model, gradients, step


def counts(step):
    return dict(zip(COUNTS, step.counts.tolist(), strict=True))


def logits_of(model, batch):
    rows = batch.rows
    condition = model.condition(rows[:, TASK], rows[:, DIHEDRAL], rows[:, FLAG])
    of_token = condition[batch.row.clamp(max=len(rows) - 1)]
    return model.head(model.hidden(batch.tokens, batch.positions, of_token, batch.packing))


# -- what is counted


def logits_for(predicted, margin=3.0):
    """Logits whose largest entry is `predicted`, by `margin` over the others."""
    logits = torch.zeros(len(predicted), VOCABULARY)
    logits[torch.arange(len(predicted)), torch.tensor(predicted)] = margin
    return logits


def cross_entropy(right, margin=3.0):
    total = math.exp(margin) + VOCABULARY - 1
    return -math.log((math.exp(margin) if right else 1.0) / total)


LABELLED = [  # row, label, predicted: the places of two input tokens are ignored
    (0, IGNORE, 9),
    (0, 4, 4),
    (0, 3, 3),
    (0, ROW_END, ROW_END),
    (0, END, END),
    (1, IGNORE, START),
    (1, 4, 5),  # another colour: the shape is right
    (1, ROW_END, ROW_END),
    (1, END, END),
    (2, 4, ROW_END),  # the row ends too early: the shape is wrong
    (2, ROW_END, ROW_END),
    (2, END, 7),
    (3, IGNORE, 1),  # a row without output
    (5, IGNORE, 1),  # no row
]


def by_hand():
    row, labels, predicted = (list(column) for column in zip(*LABELLED, strict=True))
    return reader_losses(logits_for(predicted), torch.tensor(labels), torch.tensor(row), 4)


def test_a_grid_is_exact_where_every_output_token_is_right():
    losses = by_hand()
    assert losses.rows["exact"].tolist() == [True, False, False, False]
    assert losses.rows["rows"].tolist() == [True, True, True, False]
    assert losses.num_labels == 10


def test_the_shape_is_right_where_cells_and_ends_stand_in_their_places():
    assert by_hand().rows["shape"].tolist() == [True, True, False, False]


def test_cell_accuracy_is_the_share_of_output_tokens_that_are_right():
    assert by_hand().rows["cell_accuracy"].tolist() == pytest.approx([1, 2 / 3, 1 / 3, 0])


def test_the_loss_is_summed_and_its_mean_is_counted_for_each_row():
    losses, right, wrong = by_hand(), cross_entropy(True), cross_entropy(False)
    assert losses.total.item() == pytest.approx(7 * right + 3 * wrong, rel=1e-5)
    expected = [right, (2 * right + wrong) / 3, (right + 2 * wrong) / 3, 0]
    assert losses.rows["cell_loss"].tolist() == pytest.approx(expected, rel=1e-5)


def test_a_batch_without_outputs_costs_nothing_and_is_no_row():
    labels, row = torch.full((3,), IGNORE), torch.tensor([0, 1, 2])
    losses = reader_losses(logits_for([1, 2, 3]), labels, row, 2)
    assert losses.total == losses.num_labels == 0
    for values in losses.rows.values():
        assert values.sum() == 0


# -- the loss is that of each sequence alone


def plain_loss(plain, model, batch, where, rows):
    """Summed cross entropy of one sequence by transformers' own LLaMA, eager attention."""
    tokens, labels = batch.tokens[where], batch.labels[where]
    of_row = model.condition(*rows[:, [TASK, DIHEDRAL, FLAG]].unbind(1))
    condition = of_row[batch.row[where] - batch.row[where.start]]
    out = plain(
        inputs_embeds=(plain.model.embed_tokens(tokens) + condition)[None],
        position_ids=batch.positions[where][None],
        attention_mask=torch.ones(1, len(tokens), dtype=torch.long),
    )
    return F.cross_entropy(out.logits[0], labels, ignore_index=IGNORE, reduction="sum")


@pytest.mark.parametrize("form", FORMS)
def test_loss_and_gradient_are_those_of_plain_transformers_one_sequence_at_a_time(real, form):
    data = DataConfig(num_aug=50)
    model, gradients, step = make(real, data=data, sequence=form, max_tokens=2048)
    batch = step.stream.next_batch(step.queue, TOKENS)
    losses = step.reader.losses(batch)
    losses.total.backward()
    packed = gradients.flat.clone()
    gradients.zero()
    plain = LlamaForCausalLM(llama_config(model.config))
    plain.load_state_dict(model.llama.state_dict())
    plain.model.rotary_emb = GridRotary(16, model.config.rope_base)
    plain.set_attn_implementation("eager")
    pairs, offsets = step.stream.num_pairs, batch.packing.offsets
    total = 0.0
    for index in range(len(step.queue)):
        where = slice(*offsets[index : index + 2].tolist())
        if where.start == where.stop:
            continue
        rows = batch.rows[index * pairs : (index + 1) * pairs]
        first = batch.row[where.start] - index * pairs  # rows of length 0 may come before it
        total += plain_loss(plain, model, batch, where, rows[first:])
    total.backward()
    torch.testing.assert_close(losses.total, total, atol=1e-3, rtol=1e-6)
    own = dict(plain.named_parameters())
    for name, parameter in model.llama.named_parameters():
        parameter.grad += own[name].grad
    torch.testing.assert_close(gradients.flat, packed, atol=2e-3, rtol=1e-4)
    assert packed.norm() > 1


# -- no leak


@pytest.mark.parametrize("form", FORMS)
def test_a_changed_output_changes_nothing_before_it_and_no_other_sequence(real, form):
    """The cells of one output are changed in the data set itself; the same rows are drawn."""
    data = DataConfig(num_aug=50)
    make_one = partial(make, data=data, sequence=form, sequences=16, tokens=12288)
    model, _, step = make_one(real)
    pair = int(step.queue[1, -1, PAIR])
    offset, height, width = real.pairs[pair, OUTPUT]
    cells = real.cells.copy()
    last_cell = offset + height * width - 1
    cells[last_cell] = (cells[last_cell] + 1) % 10
    _, _, twin = make_one(replace(real, cells=cells))
    assert torch.equal(twin.queue, step.queue)
    before, after = (s.stream.next_batch(s.queue, 12288) for s in (step, twin))
    changed = before.tokens != after.tokens
    assert 0 < changed.sum() <= len(step.queue)
    with torch.no_grad():
        difference = (logits_of(model, before) != logits_of(model, after)).any(1)
    pairs = step.stream.num_pairs
    sequence = before.row // pairs
    places = torch.arange(12288)
    reached = torch.zeros(12288, dtype=torch.bool)
    for place in changed.nonzero()[:, 0]:
        reached |= (sequence == sequence[place]) & (places >= place)
        assert before.labels[place - 1] == before.tokens[place]  # it is an output token
    assert not difference[~reached].any()
    assert difference[changed].all()
    assert len(sequence[~changed & ~reached].unique()) > 2
    assert (before.labels != after.labels).sum() == changed.sum()


def test_the_labels_of_a_token_are_not_among_what_it_is_told(real):
    """Input, position and condition of every token are the same whatever comes after it."""
    _, _, step = make(real, sequence="task", data=DataConfig(num_aug=50))
    batch = step.stream.next_batch(step.queue, TOKENS)
    rows = batch.rows[:, [TASK, DIHEDRAL, FLAG]].view(-1, step.stream.num_pairs, 3)
    assert (rows == rows[:, :1]).all()  # one condition for the whole sequence
    separators = batch.tokens == SEPARATOR
    assert (batch.labels[separators] == batch.tokens.roll(-1)[separators]).all()
    assert (batch.positions % 32)[separators].sum() == 0


# -- the step


def test_the_gradient_is_the_mean_over_output_tokens():
    _, gradients, step = make(base_of(PAIR_A, PAIR_B))
    torch.manual_seed(5)
    step()
    got = gradients.flat.clone()
    _, expected, twin = make(base_of(PAIR_A, PAIR_B))  # the same weights and queue
    torch.manual_seed(5)
    losses = twin.reader.losses(twin.stream.next_batch(twin.queue, TOKENS))
    (losses.total / losses.num_labels).backward()
    torch.testing.assert_close(got, expected.flat)
    assert got.norm() > 1e-3


def test_absent_rows_and_dummy_tokens_add_nothing():
    _, gradient_of_one, step_of_one = make(base_of(PAIR_A), sequences=1)
    _, gradient_of_many, step_of_many = make(base_of(PAIR_A), sequences=300)  # more than fit
    step_of_one()
    step_of_many()
    assert counts(step_of_one)["rows"] == 1
    assert counts(step_of_many)["rows"] == TOKENS // LENGTH_A
    assert counts(step_of_many)["tokens"] == TOKENS // LENGTH_A * LENGTH_A
    torch.testing.assert_close(gradient_of_one.flat, gradient_of_many.flat, atol=1e-5, rtol=1e-3)


def test_the_loss_scale_scales_the_gradient_and_steps_add_up():
    _, whole, step = make(base_of(PAIR_A))
    _, half, half_step = make(base_of(PAIR_A), scale=0.5)
    step()
    half_step()
    torch.testing.assert_close(half.flat, whole.flat / 2)
    half_step()
    torch.testing.assert_close(half.flat, whole.flat)


def test_counts_are_sums_over_the_rows_of_all_steps():
    _, _, step = make(base_of(PAIR_A), sequences=4)
    step()
    first = counts(step)
    assert (first["rows"], first["tokens"]) == (4, 4 * LENGTH_A)
    assert 0 < first["cell_loss"] / 4 < 2 * math.log(VOCABULARY)
    assert first["halt_loss"] == first["finished"] == first["finished_steps"] == 0
    step()
    assert counts(step) == pytest.approx({name: 2 * value for name, value in first.items()})


def test_in_the_form_task_every_pair_is_a_row_of_its_own():
    task = Task("one", (PAIR_A, PAIR_B, PAIR_A, Pair(PAIR_A.output, PAIR_B.output)))
    base = base_set_from_tasks({"a": [task]}, None, 1)
    _, _, step = make(base, sequences=2, sequence="task")
    step()
    assert counts(step)["rows"] == 2 * base.num_pairs == 2 * 3  # equal pairs are one


def test_tasks_that_are_not_drawn_get_no_gradient():
    data = PLAIN.model_copy(update={"weights": {"a": 0.0}})
    model, _, step = make(base_of(PAIR_A, PAIR_B), data=data)
    step()
    assert (model.puzzle_emb.weights.grad.abs().sum(1) > 0).tolist() == [False, True]


@pytest.mark.parametrize("form", FORMS)
def test_every_parameter_gets_gradient(real, form):
    model, _, step = make(real, data=DataConfig(num_aug=50), sequence=form)
    for _ in range(3):
        step()
    untouched = [n for n, p in model.named_parameters() if not p.grad.abs().sum() > 0]
    assert untouched == []


def test_without_task_embedding_its_rows_are_not_trained():
    model, _, step = make(base_of(PAIR_A, PAIR_B), task_embedding=False)
    step()
    assert model.puzzle_emb.weights.grad.abs().sum() == 0
    assert model.dihedral_emb.weights.grad.abs().sum() > 0


def test_what_a_resumed_run_needs_is_updated_in_place():
    _, _, step = make(base_of(PAIR_A, PAIR_B), data=DataConfig(num_aug=50), sequences=200)
    carry = step.carry()
    assert set(carry) == {"queue", "counts"}
    before = {name: tensor.clone() for name, tensor in carry.items()}
    addresses = {name: tensor.data_ptr() for name, tensor in carry.items()}
    step()
    for name, tensor in step.carry().items():
        assert tensor.data_ptr() == addresses[name]
        assert not torch.equal(carry[name], before[name])


@pytest.mark.parametrize(("kind", "adamw_lr"), [("muon", 0.02), ("adamw", 0.005)])
def test_two_pairs_are_learned_in_sixty_steps(kind, adamw_lr):
    model, gradients, step = make(base_of(PAIR_A, PAIR_B), tokens=256)
    optimisers = Optimisers(model, OptimiserConfig(kind=kind, muon_lr=0.02, adamw_lr=adamw_lr))
    losses = []
    for _ in range(60):
        gradients.zero()
        step.counts.zero_()
        step()
        optimisers.step(1.0)
        got = counts(step)
        losses.append(got["cell_loss"] / got["rows"])
    assert losses[0] > 2.0
    assert losses[-1] < 0.1
    assert got["exact"] == got["shape"] == got["rows"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "reader",
    [{}, {"sequence": "task"}, {"dropout": 0.1, "loops": 2, "input_attention": "full"}],
    ids=["pair", "task", "dropout"],
)
def test_a_captured_step_learns_like_an_eager_one(reader):
    cuda = torch.device("cuda")
    task = Task("one", (PAIR_A, PAIR_B))
    losses = {}
    for captured in (False, True):
        model, gradients, step = make(
            base_set_from_tasks({"a": [task]}, None, 1),
            device=cuda,
            dtype=torch.bfloat16,
            tokens=4096,
            **reader,
        )
        optimisers = Optimisers(model, OptimiserConfig(muon_lr=0.02, adamw_lr=0.02))
        run = GraphedStep(step) if captured else step
        for _ in range(60):
            gradients.zero()
            step.counts.zero_()
            run()
            optimisers.step(1.0)
        got = counts(step)
        losses[captured] = got["cell_loss"] / got["rows"]
    assert losses[False] < 0.3
    assert losses[True] < 0.3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("form", FORMS)
def test_the_packed_kernel_agrees_with_one_sequence_at_a_time(real, form):
    """The same batch in bfloat16 on the GPU, and in float32 with attention sequence by sequence."""
    data = DataConfig(num_aug=50)
    losses = {}
    for dtype in (torch.bfloat16, torch.float32):
        _, _, step = make(
            real, data=data, device=torch.device("cuda"), dtype=dtype, sequence=form, tokens=4096
        )
        batch = step.stream.next_batch(step.queue, 4096)
        assert (batch.packing.lengths is None) == (dtype == torch.bfloat16)
        losses[dtype] = step.reader.losses(batch).rows["cell_loss"]
    torch.testing.assert_close(*losses.values(), atol=0.03, rtol=0.02)


def test_layers_drop_out_of_the_loss_and_of_nothing_else(real):
    data = DataConfig(num_aug=50)
    (_, _, plain), (_, _, dropping) = make(real, data=data), make(real, data=data, dropout=0.3)
    batch = plain.stream.next_batch(plain.queue, plain.num_tokens)
    hidden = [step.reader.hidden(batch) for step in (plain, dropping)]
    assert torch.equal(*hidden)
    first, second = (dropping.reader.losses(batch).total for _ in range(2))
    assert first != second
    whole = plain.reader.losses(batch).total
    assert 0.8 < first / whole < 1.25
    assert plain.reader.losses(batch).total == whole


def batch_of_all_ways(real, column, **reader):
    """The reader, a batch shown in ways that `column` of its rows numbers, and each token's way."""
    _, _, step = make(real, **reader)
    stream = ReaderStream(step.stream.source, step.reader.config, torch.float32, alone=True)
    batch = stream.next_batch(stream.draw(64), 16384)
    way = batch.rows[:, column][batch.row.clamp(max=len(batch.rows) - 1)]
    assert set(way.tolist()) == {0, 1, 2}
    return step.reader, batch, way


def assert_told(reader, batch, way, table):
    """The second vector of the table is added where it should be, and both are learned."""
    before = reader.hidden(batch)
    with torch.no_grad():
        table.weights[1] += 1.0
    changed = (reader.hidden(batch) - before).abs().amax(1) > 1e-3
    assert torch.equal(changed, way == 2)
    reader.losses(batch).total.backward()
    assert (table.weights.grad.abs().sum(1) > 0).all()


def test_the_reader_is_told_by_a_vector_what_is_shown_larger(real):
    scaling = {"share": 0.7, "factors": ((2, 2), (2, 1)), "sides": 30}
    reader, batch, scale = batch_of_all_ways(real, SCALE, scaling=scaling)
    before = reader.hidden(batch)
    torch.testing.assert_close(
        reader.hidden(batch._replace(rows=batch.rows.index_fill(1, torch.tensor(SCALE), 0)))[
            scale == 0
        ],
        before[scale == 0],
    )
    assert_told(reader, batch, scale, reader.reader.scale_emb)


def test_the_reader_is_told_by_a_vector_that_two_pairs_are_shown_as_one(real):
    shown = {"mosaic_share": 0.9, "scaling": {"sides": 30}}
    reader, batch, way = batch_of_all_ways(real, MOSAIC, **shown)
    assert_told(reader, batch, way, reader.reader.mosaic_emb)


def test_noise_changes_output_cells_of_every_other_row_and_no_label(real):
    _, _, step = make(real, data=DataConfig(num_aug=50), output_noise=0.3)
    torch.manual_seed(1)
    batch = step.stream.next_batch(step.queue, step.num_tokens)
    noisy = step._noisy(batch)
    assert torch.equal(noisy.labels, batch.labels)
    assert torch.equal(noisy.positions, batch.positions)
    changed = noisy.tokens != batch.tokens
    part = batch.positions // SIDE**2 % PARTS_PER_PAIR
    cells = (part == OUTPUT_PART) & (batch.tokens < NUM_COLOURS)
    assert changed.any()
    assert (cells & (batch.row % 2 == 0))[changed].all()
    assert (noisy.tokens[changed] < NUM_COLOURS).all()
    assert 0.15 < changed[cells & (batch.row % 2 == 0)].float().mean() < 0.4
    _, _, plain = make(real)
    assert plain._noisy(batch) is batch
