"""One joint training step: gradient in every part, no leak, counts that mean what they say."""

import math
from types import SimpleNamespace

import pytest
import torch
from joint_parts import SEEN, drawn, fill_drafts, make, new_config, process, small_base
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from arctrm.adapters import DraftAdapter
from arctrm.config import OptimiserConfig
from arctrm.data.dataset import base_set_from_tasks
from arctrm.data.sources import load_tasks
from arctrm.errors import ResourceError
from arctrm.training import reader_stream as reading
from arctrm.training.joint import gradient_norms, joint_stage
from arctrm.training.joint_step import JOINT_COUNTS
from arctrm.training.optimisers import FlatGradients, Optimisers
from arctrm.training.source import OUTPUT
from arctrm.training.stages import is_captured
from arctrm.training.step import GraphedStep

EACH = pytest.mark.parametrize("form", SEEN)


def stepped(changes=None, form="pair"):
    hybrid, step = make(changes, form=form)
    fill_drafts(step)
    torch.manual_seed(5)
    step()
    return hybrid, step


def logits_of(step, batch):
    """Per row: cell logits [cells, V] and halting logit after the last attempt."""
    with torch.no_grad():
        return [said for attempt in predictions(step, batch) for said in attempt[-1:]][-1]


def predictions(step, batch):
    """What every supervision step of every attempt says, by repeating the step's own attempts."""
    found, hybrid = [], step.hybrid
    original = hybrid.refine

    def kept(*args, **options):
        found.append([])
        for latents, said in original(*args, **options):
            found[-1].append(said)
            yield latents, said

    hybrid.refine = kept
    try:
        step.attempts(batch)
    finally:
        del hybrid.refine
    return found


# -- gradient


@EACH
def test_every_part_has_a_gradient(form):
    hybrid, _ = stepped(form=form)
    norms = gradient_norms(hybrid)
    assert set(norms) == {"reader", "trm", "context", "draft", "back"}
    assert all(norm > 0 for norm in norms.values()), norms


@EACH
def test_every_parameter_of_the_adapters_has_a_gradient(form):
    hybrid, _ = stepped(form=form)
    for name, parameter in hybrid.adapters.named_parameters():
        assert parameter.grad.norm() > 0, name


@EACH
def test_trms_loss_alone_reaches_every_weight_of_the_reader(form):
    """All but the head, which nothing but its own loss uses."""
    hybrid, _ = stepped({"coupling.reader_weight": 0.0, "coupling.contrast_weight": 0.0}, form)
    for name, parameter in hybrid.reader.named_parameters():
        if "lm_head" not in name:
            assert parameter.grad is not None, name
            assert parameter.grad.norm() > 0, name
    assert hybrid.reader.llama.lm_head.weight.grad is None


def test_the_back_adapter_has_no_gradient_in_a_single_attempt():
    hybrid, _ = stepped({"max_attempts": 1})
    assert gradient_norms(hybrid)["back"] == 0


@EACH
def test_nothing_of_a_frozen_reader_moves(form):
    hybrid, step = make({"llama_frozen": True}, form=form)
    fill_drafts(step)
    before = {name: p.clone() for name, p in hybrid.reader.named_parameters()}
    trained = [p for p in hybrid.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(trained, lr=0.1)
    step.prepare()
    step()
    norms = gradient_norms(hybrid)
    assert set(norms) == {"trm", "context", "draft", "back"}
    assert all(norm > 0 for norm in norms.values())
    optimiser.step()
    for name, parameter in hybrid.reader.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name]), name


@EACH
def test_gradient_checkpointing_gives_the_same_gradient_and_keeps_less(form):
    """Bytes that autograd keeps, of both attempts and the reader's own loss together."""
    gradients, kept = [], []
    for flag in (False, True):
        changes = {"reader.gradient_checkpointing": flag, "reader.num_layers": 6}
        hybrid, step = make(changes, form=form)
        fill_drafts(step)
        batch, bytes_of = drawn(step), {}

        def pack(tensor, bytes_of=bytes_of):
            storage = tensor.untyped_storage()
            bytes_of[storage.data_ptr()] = storage.nbytes()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            total, _ = step.loss(batch)
        kept.append(sum(bytes_of.values()))
        total.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in hybrid.parameters()]))
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-6)
    assert kept[1] < 0.6 * kept[0]


def test_a_step_works_on_real_tasks():
    tasks = {name: load_tasks(name, max_tasks=4) for name in ("training", "evaluation")}
    base = base_set_from_tasks(tasks, "evaluation", 50)
    hybrid, step = make({"coupling.drafted_pairs": 2, "batch_size": 4}, base=base)
    step.prepare()
    step()
    counts = dict(zip(JOINT_COUNTS, step.counts.tolist(), strict=True))
    assert counts["rows"] > 0
    assert math.isfinite(sum(counts.values()))
    assert all(norm > 0 for name, norm in gradient_norms(hybrid).items() if name != "draft")


# -- the reader matters


@EACH
def test_another_reader_input_gives_other_logits_on_the_same_grid(form):
    _, step = make(form=form)
    fill_drafts(step)
    batch = drawn(step)
    before = logits_of(step, batch)
    pool, row = step.stream.drafts, batch.sequences[0, -1]
    if form != "task":
        place = pool.begin + int(row[reading.PAIR]) * 900
    else:  # a demonstration that stands before it
        shown = next(own for own in batch.sequences[0, :-1] if own[reading.LENGTH] > 0)
        place = int(step.stream.reader.source.pairs[shown[reading.PAIR], OUTPUT.start])
    cells = step.stream.reader.source.cells
    cells[place] = (cells[place] + 1) % 10
    after = logits_of(step, batch)
    own = batch.rows.tokens.row == batch.sequences.shape[1] - 1
    assert own.any()
    assert not torch.equal(before.logits[own], after.logits[own])


@EACH
@torch.no_grad()
def test_a_row_says_the_same_alone_and_among_16_sequences(form):
    changes = {"training.tokens_per_batch": 9216, "batch_size": 16} if form == "task" else {}
    _, step = make(changes, form=form)
    fill_drafts(step)
    stream = step.stream
    assert stream.num_sequences == 16
    stream.trm_tokens = 4096
    many = drawn(step)
    assert (many.sequences[:, -1, reading.LENGTH] > 0).all()
    said = logits_of(step, many)
    pairs = many.sequences.shape[1]
    for number in (0, 5, 15):
        one = torch.zeros_like(many.sequences)
        one[0] = many.sequences[number]
        one[1, -1] = 0
        drafted = many.drafted[[number] + [0] * 15]
        stream._fitting = lambda drawn, drafted, rows: drawn[:, -1, reading.LENGTH] > 0
        alone = stream.lay_out(one, drafted)
        del stream._fitting
        answer = logits_of(step, alone)
        for index in range(pairs):
            here = alone.rows.tokens.row == index
            there = many.rows.tokens.row == number * pairs + index
            assert here.sum() == there.sum()
            torch.testing.assert_close(
                answer.logits[here], said.logits[there], atol=1e-5, rtol=1e-5
            )
            if here.any():
                torch.testing.assert_close(
                    answer.q_halt[index], said.q_halt[number * pairs + index], atol=1e-5, rtol=1e-5
                )


# -- no leak


@EACH
def test_an_answer_changes_nothing_that_its_row_sees(form):
    """The cells of one output are changed in the data set; states, start and logits are compared.

    Rows before which that output stands as a demonstration do change.
    """
    _, step = make(form=form)
    fill_drafts(step)
    batch = drawn(step)
    source, num_pairs = step.stream.reader.source, batch.sequences.shape[1]
    pair = int(batch.sequences[0, -1, reading.PAIR])
    if form == "task":  # a demonstration of the first sequence: the answer of a probe
        rows = batch.sequences[0]
        pair = int(rows[rows[:, reading.LENGTH] > 0][0, reading.PAIR])
    before = seen_by_rows(step, batch)
    offset, height, width = source.pairs[pair, OUTPUT].tolist()
    answer = source.cells[offset : offset + height * width]
    answer.copy_((answer + 1) % 10)
    after = seen_by_rows(step, batch)
    changed = []
    for row, (old, new) in enumerate(zip(before, after, strict=True)):
        sequence, index = divmod(row, num_pairs)
        own = batch.sequences[sequence]
        stands = (own[:index, reading.PAIR] == pair) & (own[:index, reading.LENGTH] > 0)
        same = all(torch.equal(a, b) for a, b in zip(old, new, strict=True))
        assert same or stands.any(), row
        changed.append(not same)
    assert any(changed) == (form == "task")
    codes, labels = step.stream.trm.cells_of(trm_rows(batch, step), batch.rows.tokens)
    assert torch.equal(codes, batch.rows.codes)
    assert not torch.equal(labels, batch.labels)  # it was the answer


def trm_rows(batch, step):
    torch.manual_seed(0)
    return step.stream._trm_rows(batch.sequences)


@torch.no_grad()
def seen_by_rows(step, batch):
    """Per row of TRM: hidden states it sees, its start, what it says, in all attempts."""
    reads = []
    original = step._read

    def kept(*args):
        reads.append(original(*args))
        return reads[-1]

    step._read = kept
    said = predictions(step, batch)
    del step._read
    attempts = step.attempts(batch)
    rows = []
    for row in range(len(batch.rows.embedding)):
        own = batch.rows.tokens.row == row
        found = []
        for states, steps, attempt in zip(reads, said, attempts, strict=True):
            begin, visible = int(states.begin[row]), int(states.visible[row])
            start = attempt.start
            found += [states.hidden[begin : begin + visible], start.context[row]]
            found += [start.z_H[own], start.z_L[own], start.injection[own]]
            found += [one.logits[own] for one in steps] + [one.q_halt[row] for one in steps]
        rows.append(found)
    return rows


# -- attempts


@EACH
def test_after_the_first_attempt_only_queries_count(form):
    _, step = make(form=form)
    fill_drafts(step)
    batch = drawn(step)
    attempts = step.attempts(batch)
    losses = attempts[1].losses[0]
    of_row = losses.cells + 0.5 * losses.halt
    num = batch.sequences.shape[1]
    queries = torch.arange(len(of_row)) % num == num - 1
    expected = of_row[queries & losses.real].mean()
    torch.testing.assert_close(step._trm_loss(batch, losses, 1), expected)
    torch.testing.assert_close(step._trm_loss(batch, losses, 0), of_row[losses.real].mean())


def test_the_number_of_attempts_is_max_attempts_where_the_loop_is_closed():
    for changes, expected in (
        ({"max_attempts": 3}, 3),
        ({"coupling.back": False}, 1),
        ({"coupling.context": False, "coupling.draft": False}, 1),
        ({"coupling.context": False}, 2),
    ):
        _, step = stepped(changes)
        assert len(step.attempts(step.batch)) == expected
        counts = dict(zip(JOINT_COUNTS, step.counts.tolist(), strict=True))
        assert counts["attempts"] / counts["batches"] == expected


def test_a_number_of_soft_vectors_that_divides_no_position_is_read_vector_by_vector():
    hybrid, step = make({"coupling.num_back_vectors": 3})
    batch = drawn(step)
    shown = step.stream.shown_sequences(batch, with_soft=True)
    given = []
    step.reader.hidden = lambda batch, soft=None: (
        given.append(soft) or torch.zeros(len(batch.tokens), hybrid.hidden_size)
    )
    soft = torch.randn(step.stream.num_sequences, 3, hybrid.hidden_size)
    step._read(batch, soft)
    there = given[0].abs().sum(1) > 0
    present = int((batch.sequences[:, -1, reading.LENGTH] > 0).sum())
    assert torch.equal(there, shown.tokens == 15)
    assert torch.equal(given[0][there].view(present, 3, -1), soft[:present])


# -- losses and measures


def test_the_joint_loss_is_the_weighted_sum_of_its_parts():
    values = {}
    for name in ("reader", "trm", "contrast", None):
        weights = {f"coupling.{n}_weight": float(n == name) for n in ("reader", "trm", "contrast")}
        if name is None:
            weights = {key: 2.0 for key in weights}
        _, step = make(weights)
        fill_drafts(step)
        with torch.no_grad():
            values[name] = step.loss(drawn(step))[0].item()
    assert all(value > 0 for value in values.values())
    assert values[None] == pytest.approx(
        2 * (values["reader"] + values["trm"] + values["contrast"]), rel=1e-5
    )


@EACH
def test_the_swap_difference_is_0_where_the_reader_is_ignored_and_not_where_it_matters(form):
    _, step = stepped(form=form)
    assert step.swap_difference() != 0
    deaf, silent = stepped(form=form)
    with torch.no_grad():
        for module in deaf.adapters["context"].modules():
            if isinstance(module, nn.Linear):
                module.weight.zero_()
        assert isinstance(deaf.adapters["draft"], DraftAdapter)
        deaf.adapters["draft"].project.weight.zero_()
    assert silent.swap_difference() == 0


def test_swapping_a_context_that_names_the_answer_costs_loss():
    """The reader's vector of a task tells TRM the one colour of all its outputs."""
    changes = {"coupling.draft": False, "coupling.reader_weight": 0.0, "max_attempts": 1}
    hybrid, step = make({**changes, "coupling.supervision_steps": 1}, base=small_base(num_tasks=6))
    step.stream.reader_tokens, step.stream.trm_tokens = 768, 512
    table = step.stream.reader.source
    for task in range(6):
        for pair in table.pairs[: step.stream.drafts.num_pairs]:
            if pair[0] == task:
                offset, height, width = pair[OUTPUT].tolist()
                table.cells[offset : offset + height * width] = 4 + task
    table.fixed[:] = True
    hybrid.trm.puzzle_emb.weights.requires_grad_(False)  # zero: only the reader knows the task
    with torch.no_grad():
        hybrid.reader.puzzle_emb.weights.mul_(20)
    optimiser = torch.optim.Adam([p for p in hybrid.parameters() if p.requires_grad], lr=4e-3)
    for _ in range(120):
        optimiser.zero_grad()
        step.prepare()
        step()
        optimiser.step()
    assert step.swap_difference() > 0.1


@EACH
def test_fixed_shapes_change_nothing_but_the_shapes(form):
    losses = []
    for fixed in (False, True):
        _, step = make(form=form)
        fill_drafts(step)
        step.fixed_shapes = fixed
        batch = drawn(step)
        losses.append(step.loss(batch)[0])
        assert step.attempts(batch)[0].start.context is not None
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("device", "setting", "dtype", "expected"),
    [
        ("cuda", "auto", "auto", True),
        ("cuda", "on", "auto", True),
        ("cuda", "off", "auto", False),
        ("cuda", "auto", "float32", False),
        ("cpu", "auto", "auto", False),
        ("cpu", "off", "auto", False),
    ],
)
def test_only_a_step_that_is_to_be_captured_has_the_largest_shapes(
    monkeypatch, device, setting, dtype, expected
):
    """As it would be decided on `device`; the parts themselves are on the CPU."""
    config = new_config({"training.cuda_graph": setting, "training.dtype": dtype})
    there = lambda training, _: is_captured(training, torch.device(device))
    monkeypatch.setattr("arctrm.training.joint.is_captured", there)
    (step,) = joint_stage(config, small_base(), process()).steps
    assert step.fixed_shapes == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("back", "checkpointed"), [(False, False), (True, False), (True, True)])
def test_a_captured_joint_step_learns_like_an_eager_one(back, checkpointed):
    """Drafting goes on between the replays."""
    accelerator = SimpleNamespace(
        device=torch.device("cuda"), process_index=0, num_processes=1, is_main_process=True
    )
    losses = []
    for captured in (False, True):
        changes = {"coupling.back": back, "reader.gradient_checkpointing": checkpointed}
        config = new_config({**changes, "reader.num_heads": 2})
        stage = joint_stage(config, small_base(), accelerator)
        assert stage.capturable
        (step,) = stage.steps
        assert step.fixed_shapes
        gradients = FlatGradients([p for p in stage.model.parameters() if p.requires_grad])
        optimisers = Optimisers(stage.model, OptimiserConfig(muon_lr=0.01, adamw_lr=0.01))
        run = GraphedStep(step, prepare=step.prepare) if captured else step
        for number in range(60):
            if number == 50:
                step.counts.zero_()
            gradients.zero()
            run.prepare()
            run()
            optimisers.step(1.0)
        counts = dict(zip(JOINT_COUNTS, step.counts.tolist(), strict=True))
        losses.append(counts["cell_loss"] / counts["rows"])
    assert losses[0] < 2.0
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


def test_out_of_memory_while_drafting_names_the_key_to_lower(monkeypatch):
    hybrid, step = make({"coupling.draft_batch_size": 8})

    def full(*args, **options):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(hybrid.reader, "logits", full)
    with pytest.raises(ResourceError, match=r"coupling\.draft_batch_size = 8; lower it"):
        step.prepare()


def test_the_carry_holds_what_the_next_step_needs():
    _, step = make()
    assert set(step.carry()) == {
        *("counts", "steps", "drafts_made"),
        *("drafts.cells", "drafts.sizes", "drafts.there", "drafts.right"),
    }
    assert new_config().coupling.draft
