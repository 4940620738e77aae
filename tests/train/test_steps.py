"""Training steps of both voices: loss, gradient, counts, and when they are made."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from arctrm.config import DataConfig, PretrainConfig, ScalingConfig, TrunkConfig
from arctrm.data.base_set import base_set_from_tasks
from arctrm.data.sources import load_tasks
from arctrm.data.task import NUM_COLOURS, Pair, Task
from arctrm.model.layout import VOCABULARY
from arctrm.model.trm import first_state, supervision_step
from arctrm.model.trunk import Trunk
from arctrm.train import sequences as s
from arctrm.train.losses import halting_mean, row_counts
from arctrm.train.optim import EMA, trained_parameters
from arctrm.train.refining import questions
from arctrm.train.sequences import Sequences
from arctrm.train.source import OUTPUT, PairSource
from arctrm.train.steps import (
    COUNTS,
    READER,
    TRM,
    ReaderStep,
    TrmStep,
    metrics_of,
    read,
    voice_steps,
)
from helpers import grid, random_task

CPU = torch.device("cpu")
TOKENS = 2048
SMALL = TrunkConfig(hidden_size=32, num_heads=2, num_layers=2, loops=1)
PLAIN = DataConfig(num_aug=1)
"""One view, the identity."""


PAIR_A = Pair(grid([1, 2], [3, 4]), grid([4, 3], [2, 1]))
PAIR_B = Pair(grid([5, 6, 7]), grid([7, 7], [6, 5]))
LENGTH_A = 3 + 6 + 6


def base_of(*pairs):
    """One task per pair, each in a subset of its own."""
    tasks = {name: [Task(f"task_{name}", (p,))] for name, p in zip("abc", pairs, strict=False)}
    return base_set_from_tasks(tasks, None, 1)


@pytest.fixture(scope="module")
def real():
    tasks = {name: load_tasks(name, max_tasks=8) for name in ("training", "evaluation")}
    return base_set_from_tasks(tasks, "evaluation", 50)


def config_of(voice="both", data=PLAIN, tokens=2 * TOKENS, trunk=SMALL, **tables):
    training = {"tokens_per_batch": tokens, "dtype": "float32", **tables.pop("training", {})}
    return PretrainConfig(voice=voice, data=data, trunk=trunk, training=training, **tables)


def make(base, sequences=8, voice=READER, data=PLAIN, tokens=TOKENS, scale=1.0, **options):
    """A trunk and one step of a voice."""
    torch.manual_seed(0)
    ways = data.scaling.num_ways if data.scaling.share else 0
    trunk = Trunk(options.pop("trunk", SMALL), base.num_tasks, ways)
    source = PairSource(base, data, 0, CPU)
    inverse_share = options.pop("inverse_share", 0.0)
    own = Sequences(source, torch.float32, whole=voice == TRM, inverse_share=inverse_share)
    if voice == READER:
        return trunk, ReaderStep(trunk, own, tokens, sequences, scale=scale, **options)
    trm = config_of(trm=options).trm
    return trunk, TrmStep(trunk, own, tokens, sequences, trm, scale=scale)


def steps_of(base, config):
    torch.manual_seed(0)
    scaling = config.data.scaling
    trunk = Trunk(config.trunk, base.num_tasks, scaling.num_ways if scaling.share else 0)
    return trunk, voice_steps(config, trunk, base)


def counts(step, voice=READER):
    return dict(zip(COUNTS, step.counts[voice].tolist(), strict=True))


def flat_gradient(trunk):
    return torch.cat(
        [
            torch.zeros_like(p).ravel() if p.grad is None else p.grad.ravel()
            for p in trunk.parameters()
        ]
    )


both_voices = pytest.mark.parametrize("voice", [READER, TRM], ids=["reader", "trm"])


def test_a_changed_output_changes_nothing_before_it_and_no_other_sequence(real):
    """The last cell of one output is changed in the data set itself; the same rows are drawn."""
    data = DataConfig(num_aug=50)
    trunk, step = make(real, sequences=16, data=data, tokens=12288)
    pair = int(step.queue[1, -1, s.PAIR])
    offset, height, width = real.pairs[pair, OUTPUT]
    cells = real.cells.copy()
    last = offset + height * width - 1
    cells[last] = (cells[last] + 1) % 10
    _, twin = make(replace(real, cells=cells), sequences=16, data=data, tokens=12288)
    assert torch.equal(twin.queue, step.queue)
    before, after = step.next_batch(), twin.next_batch()
    changed = before.tokens != after.tokens
    assert 0 < changed.sum() <= 16
    with torch.no_grad():
        one, other = (trunk.logits(read(trunk, batch)) for batch in (before, after))
    difference = (one - other).abs().amax(1) > 1e-6
    places = torch.arange(12288)
    reached = torch.zeros(12288, dtype=torch.bool)
    for place in changed.nonzero()[:, 0]:
        reached |= (before.row == before.row[place]) & (places >= place)
        assert before.labels[place - 1] == before.tokens[place]  # it is an output token
    assert not difference[~reached].any()
    assert difference[changed].all()
    assert (before.labels != after.labels).sum() == changed.sum()


def test_the_readers_gradient_is_the_mean_over_output_tokens():
    trunk, step = make(base_of(PAIR_A, PAIR_B))
    torch.manual_seed(5)
    step()
    twin, own = make(base_of(PAIR_A, PAIR_B))
    torch.manual_seed(5)
    batch = own.next_batch()
    row_counts(twin.logits(read(twin, batch)), batch.labels, batch.row, 8).mean.backward()
    torch.testing.assert_close(flat_gradient(trunk), flat_gradient(twin))
    assert flat_gradient(trunk).norm() > 1e-3


@pytest.mark.parametrize("num_steps", [1, 3])
def test_the_gradient_of_trm_is_the_mean_over_supervision_steps_that_share_values_only(num_steps):
    trunk, step = make(base_of(PAIR_A, PAIR_B), voice=TRM, supervision_steps=num_steps)
    torch.nn.init.normal_(trunk.feedback.layers[0].weight, std=0.1)
    torch.nn.init.normal_(trunk.halt_head.weight, std=0.1)
    torch.manual_seed(5)
    step()
    got, sums = flat_gradient(trunk).clone(), counts(step, TRM)
    trunk.zero_grad()
    _, own = make(base_of(PAIR_A, PAIR_B), voice=TRM)
    torch.manual_seed(5)
    batch = own.next_batch()
    asked = questions(batch, own.sequences, own.config)
    state = first_state(trunk, asked.rows)
    for _ in range(num_steps):
        found = supervision_step(trunk, asked.rows, state)
        losses = row_counts(found.logits, asked.labels, batch.row, 8)
        ((losses.mean + halting_mean(found.q_halt, losses)) / num_steps).backward()
        state = type(state)(*(tensor.detach().clone() for tensor in found.state))
    torch.testing.assert_close(got, flat_gradient(trunk))
    assert sums["cell_loss"] == pytest.approx(losses.loss.sum().item(), rel=1e-5)
    assert (trunk.feedback.layers[0].weight.grad.abs().sum() > 0) == (num_steps > 1)


@both_voices
def test_absent_rows_and_dummy_tokens_add_nothing(voice):
    options = {"hidden_whole": 1.0} if voice == TRM else {}
    one, step_of_one = make(base_of(PAIR_A), sequences=1, voice=voice, **options)
    many, step_of_many = make(base_of(PAIR_A), sequences=300, voice=voice, **options)
    step_of_one()
    step_of_many()
    assert counts(step_of_one, voice)["rows"] == 1
    assert counts(step_of_many, voice)["rows"] == TOKENS // LENGTH_A
    assert counts(step_of_many, voice)["tokens"] == TOKENS // LENGTH_A * LENGTH_A
    torch.testing.assert_close(flat_gradient(one), flat_gradient(many), atol=1e-5, rtol=1e-3)


@both_voices
def test_every_part_of_the_trunk_that_the_voice_has_gets_gradient(real, voice):
    scaling = ScalingConfig(share=0.6, shapes=("pad", "lines", "tile", "stretch"))
    options = {"supervision_steps": 2} if voice == TRM else {"inverse_share": 0.4}
    data = DataConfig(num_aug=50, scaling=scaling)
    trunk_config = SMALL.model_copy(update={"loops": 2})
    trunk, step = make(
        real, sequences=64, tokens=4096, voice=voice, data=data, trunk=trunk_config, **options
    )
    step()
    untouched = {n for n, p in trunk.named_parameters() if p.grad is None or not p.grad.any()}
    others = {"inverse_emb", "head.weight"}
    own = {"own_head.weight", "halt_head.weight", "halt_head.bias", "voice_emb", "own_task_emb"}
    own.add("feedback.layers.0.weight")
    assert untouched == (others if voice == TRM else own)


@both_voices
def test_a_step_from_a_restored_carry_is_the_same_step(real, voice):
    data = DataConfig(num_aug=50)
    trunk, step = make(real, sequences=32, voice=voice, data=data)
    addresses = {name: tensor.data_ptr() for name, tensor in step.carry().items()}
    step.prepare()
    step()
    held = {name: tensor.clone() for name, tensor in step.carry().items()}
    random_state = torch.get_rng_state()
    trunk.zero_grad()
    step.prepare()
    step()
    assert {name: t.data_ptr() for name, t in step.carry().items()} == addresses
    assert not torch.equal(step.queue, held["queue"])
    twin, again = make(real, sequences=32, voice=voice, data=data)
    for name, tensor in again.carry().items():
        tensor.copy_(held[name])
    torch.set_rng_state(random_state)
    again.prepare()
    again()
    assert torch.equal(flat_gradient(twin), flat_gradient(trunk))
    for name, tensor in step.carry().items():
        assert torch.equal(tensor, again.carry()[name])


@pytest.mark.slow
@both_voices
def test_two_pairs_are_learned(voice):
    """By plain AdamW; TRM from answers of which half are hidden as a whole."""
    options = {"hidden_whole": 0.5, "supervision_steps": 2} if voice == TRM else {}
    trunk, step = make(base_of(PAIR_A, PAIR_B), tokens=96, voice=voice, **options)
    optimiser = torch.optim.AdamW(trunk.parameters(), lr=0.005)
    means = []
    for _ in range(200 if voice == TRM else 80):
        optimiser.zero_grad()
        step.counts.zero_()
        step()
        optimiser.step()
        got = counts(step, voice)
        means.append(got["cell_loss"] / got["rows"])
    assert means[0] > 2.0
    assert means[-1] < 0.1
    assert got["exact"] == got["shape"] == got["rows"]
    assert got["halt_loss"] / got["rows"] < 0.3  # the halting head knows that it is right


def test_counts_are_sums_over_the_rows_of_all_steps():
    _, step = make(base_of(PAIR_A), sequences=4)
    step()
    first = counts(step)
    assert (first["rows"], first["tokens"], first["attempts"]) == (4, 4 * LENGTH_A, 4)
    assert 0 < first["cell_loss"] / 4 < 2 * math.log(VOCABULARY)
    assert first["halt_loss"] == first["trm_steps"] == first["drafted"] == 0
    step()
    assert counts(step) == pytest.approx({name: 2 * value for name, value in first.items()})
    assert not step.counts[TRM].any()


@pytest.mark.parametrize(("bias", "expected"), [(-1.0, 3), (1.0, 1)])
def test_steps_are_counted_up_to_the_first_positive_halting_logit(bias, expected):
    trunk, step = make(base_of(PAIR_A), sequences=4, voice=TRM, supervision_steps=3)
    torch.nn.init.constant_(trunk.halt_head.bias, bias)
    step()
    assert counts(step, TRM)["trm_steps"] == 4 * expected
    metrics = metrics_of(step.counts)
    assert metrics["avg_trm_steps"] == expected
    assert metrics["avg_attempts"] == 1
    assert metrics["avg_reasoning_length"] == 0


SEVEN = (
    "loss",
    "exact_match",
    "shape_match",
    "cell_accuracy",
    "avg_attempts",
    "avg_trm_steps",
    "avg_reasoning_length",
)


def test_the_seven_metrics_are_the_readers_alone_and_trms_beside_it():
    sums = torch.zeros(2, len(COUNTS), dtype=torch.float64)
    place = {name: COUNTS.index(name) for name in COUNTS}
    sums[READER, place["rows"]], sums[READER, place["cell_loss"]] = 4, 2
    sums[READER, place["exact"]] = 1
    alone = metrics_of(sums)
    assert tuple(alone)[:7] == SEVEN
    assert (alone["loss"], alone["exact_match"], alone["avg_trm_steps"]) == (0.5, 0.25, 0)
    assert not any(name.startswith("reader_") for name in alone)
    sums[TRM, place["rows"]], sums[TRM, place["cell_loss"]] = 2, 3
    sums[TRM, place["halt_loss"]], sums[TRM, place["trm_steps"]] = 2, 5
    sums[TRM, place["drafted"]], sums[TRM, place["draft_tokens"]] = 1, 30
    together = metrics_of(sums)
    assert tuple(together)[:7] == SEVEN
    assert together["loss"] == pytest.approx(1.5 + 0.5 * 1)
    assert (together["avg_trm_steps"], together["avg_reasoning_length"]) == (2.5, 30)
    assert (together["reader_loss"], together["reader_exact_match"]) == (0.5, 0.25)
    assert together["examples"] == 6
    assert set(SEVEN) <= set(metrics_of(torch.zeros_like(sums)))


def parts(steps):
    return [(type(x).__name__, x.num_tokens, x.scale, x.begin, x.end) for x in steps]


def test_one_voice_has_the_whole_batch_and_both_share_it(real):
    for voice, name in (("reader", "ReaderStep"), ("trm", "TrmStep")):
        _, steps = steps_of(real, config_of(voice))
        assert parts(steps) == [(name, 4096, 1.0, 0.0, 1.0)]
    _, steps = steps_of(
        real, config_of(tokens=8192, trm={"share": 0.25}, training={"grad_accum": 2})
    )
    one = [("ReaderStep", 6144, 0.375, 0.0, 1.0), ("TrmStep", 2048, 0.125, 0.0, 1.0)]
    assert parts(steps) == 2 * one


def test_the_reader_has_whole_batches_until_trm_begins(real):
    _, steps = steps_of(real, config_of(trm={"begin": 0.75}))
    assert parts(steps) == [
        ("ReaderStep", 4096, 1.0, 0.0, 0.75),
        ("ReaderStep", 2048, 0.5, 0.75, 1.0),
        ("TrmStep", 2048, 0.5, 0.75, 1.0),
    ]


def test_a_later_begin_gives_the_own_cell_head_the_readers_colours_once(real):
    trunk, steps = steps_of(real, config_of(trm={"begin": 0.5}))
    assert not torch.equal(trunk.own_head.weight, trunk.head.weight[:NUM_COLOURS])
    step, ema = steps[-1], EMA(trained_parameters(trunk), 0.9)
    step.prepare()
    assert torch.equal(trunk.own_head.weight, trunk.head.weight[:NUM_COLOURS])
    assert torch.equal(ema.state()["own_head.weight"], trunk.own_head.weight)
    with torch.no_grad():
        trunk.own_head.weight.add_(1)
    step.prepare()
    assert not torch.equal(trunk.own_head.weight, trunk.head.weight[:NUM_COLOURS])
    twin, others = steps_of(real, config_of(trm={"begin": 0.5}))
    others[-1].carry()["has_begun"].copy_(step.carry()["has_begun"])
    own = twin.own_head.weight.clone()
    others[-1].prepare()
    assert torch.equal(twin.own_head.weight, own)  # a resumed run does not do it again
    from_the_start, steps = steps_of(real, config_of())
    own = from_the_start.own_head.weight.clone()
    steps[-1].prepare()
    assert torch.equal(from_the_start.own_head.weight, own)


def test_both_voices_learn_from_drafts_of_the_reader():
    """Drafted rows appear, begin with the reader's states, and the run can be carried on."""
    rng = np.random.default_rng(0)
    tasks = [random_task(rng, f"{i}", side=2) for i in range(3)]
    base = base_set_from_tasks({"a": tasks}, None, 1)
    trm = {"draft_share": 1.0, "draft_every": 2, "drafted_pairs": 12, "draft_temperature": 1.0}
    config = config_of(trm=trm, training={"grad_accum": 2})
    _, steps = steps_of(base, config)
    of_trm = [step for step in steps if isinstance(step, TrmStep)]
    assert [any("drafts" in name for name in step.carry()) for step in of_trm] == [True, False]
    for step in steps:
        step.prepare()
        step()
    pool = of_trm[0].drafts
    assert pool is of_trm[1].drafts
    assert pool.steps == 1
    pool.write(0, tasks[0].demonstrations[0].output)
    pool.there[:] = True
    pool.source.pairs[pool.num_pairs :, OUTPUT] = pool.source.pairs[: pool.num_pairs, OUTPUT]
    for step in of_trm:
        step()
        assert counts(step, TRM)["drafted"] > 0
    metrics = metrics_of(sum(step.counts for step in steps))
    assert metrics["avg_reasoning_length"] == 2 * 3 + 1
    assert 0 < metrics["drafted_share"] < 1
