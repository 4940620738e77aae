"""Adaptation of hybrids with a hub reader: its LoRA learns, the model is there once."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hub_runs import CPU, NO_PATH, QUICK, config
from torch.optim import AdamW

from arctrm.cli import main
from arctrm.config import EvalConfig
from arctrm.data.task import Pair
from arctrm.errors import ResourceError
from arctrm.reader.hub_module import HubModule
from arctrm.solving import evaluate, parts
from arctrm.solving.adaptation import Adapter
from arctrm.solving.learners import least_tokens, new_step
from arctrm.solving.side_by_side import adapt
from arctrm.solving.weights import load_solver
from arctrm.training import reader_stream as reading

TRAINED = ("lora", "full")
COUPLED = ({}, NO_PATH)
LEARNING = config().adaptation.model_copy(update={"kind": "muon", "adamw_lr": 0.01})


def solver_of(folder, **inference):
    return load_solver(folder, config(inference={**QUICK, **inference}).inference, CPU)


def adapted(solver, task, steps=2):
    adapter = Adapter(solver, [task], LEARNING, 0)
    adapter.train([task], time.monotonic() + 60, steps)
    assert adapter.steps == steps
    return adapter


def weights_of(solver):
    """Copies of everything: TRM, adapters, and all of the hub model."""
    tensors = {**solver.model.state_dict(), **solver.hub.model.state_dict(prefix="hub.")}
    return {name: tensor.clone() for name, tensor in tensors.items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@torch.no_grad()
def logits_of(solver):
    """Of a text, through the path that decodes and the one that learns."""
    reader = solver.hub
    prompt = torch.from_numpy(reader.text_prompt("input 123 output 321").tokens)[None]
    places, mask = torch.arange(prompt.shape[1])[None], torch.ones_like(prompt)
    cache = reader.new_cache(prompt.shape[1])
    decoded = reader.logits(prompt, places, torch.zeros(1, 3), mask, cache)
    read = reader.head(reader.run(prompt, places, mask))
    torch.testing.assert_close(decoded, read, atol=1e-4, rtol=1e-4)
    return decoded


@torch.no_grad()
def loss_of(solver, task):
    """The reader's own loss on some views of the demonstrations, nats a token."""
    step = new_step(solver.model.reader, [task], LEARNING, 0, 0.2)
    torch.manual_seed(7)
    rows = step.stream.draw(4).flatten(0, 1)
    losses = step.reader.losses(step.stream.pack(rows, 4, 4096))
    return float(losses.total / losses.num_labels)


# -- what is trained


@pytest.mark.parametrize("coupling", COUPLED, ids=["coupled", "apart"])
@pytest.mark.parametrize("mode", TRAINED)
def test_the_reader_learns_the_demonstrations(joined_hub, trained, mode, coupling):
    solver, task = solver_of(joined_hub(mode, **coupling)), trained.others[0]
    adapter = adapted(solver, task, steps=20)
    before, after = loss_of(solver, task), loss_of(adapter.solver, task)
    assert after < 0.9 * before
    assert loss_of(adapter.frozen(), task) == after
    for name, parameter in adapter.solver.hub.model.named_parameters():
        assert parameter.requires_grad == (mode == "full" or "lora_" in name)


@pytest.mark.parametrize("coupling", COUPLED, ids=["coupled", "apart"])
@pytest.mark.parametrize("mode", TRAINED)
def test_a_few_steps_change_every_part_and_nothing_of_what_was_loaded(
    joined_hub, trained, mode, coupling
):
    solver = solver_of(joined_hub(mode, **coupling))
    before, said = weights_of(solver), logits_of(solver)
    adapter = adapted(solver, trained.others[0])
    assert equal(weights_of(solver), before)
    assert not any(p.requires_grad for p in solver.hub.model.parameters())
    after = weights_of(adapter.solver)
    assert after.keys() == before.keys()  # as a checkpoint would hold it
    still = {n for n in after if n.startswith(("reader.", "adapters.")) and n in before}
    still = {n for n in still if torch.equal(after[n], before[n])}
    assert still <= {"adapters.draft.output_head.weight"}  # a random model ends no grid
    base = {n for n in after if n.startswith("hub.") and ".lora_" not in n}
    assert mode == "full" or all(torch.equal(after[n], before[n]) for n in base)
    assert not torch.equal(logits_of(adapter.solver), said)
    assert torch.equal(logits_of(solver), said)  # both answer, in any order


@pytest.mark.parametrize("coupling", COUPLED, ids=["coupled", "apart"])
def test_nothing_of_a_frozen_reader_is_trained_and_trm_still_is(joined_hub, trained, coupling):
    solver = solver_of(joined_hub("frozen", **coupling))
    before = weights_of(solver)
    adapter = adapted(solver, trained.others[0])
    assert adapter.solver.hub is solver.hub
    assert adapter.frozen().hub is solver.hub
    assert adapter.answering() is adapter.solver
    assert equal(weights_of(solver), before)
    after = adapter.solver.model.state_dict()
    same_shape = {n for n in after if after[n].shape == before[n].shape}
    moved = {n for n in same_shape if not torch.equal(after[n], before[n])}
    assert any(name.startswith("trm.") for name in moved)
    assert any(name.startswith("adapters.") for name in moved) == (not coupling)


@pytest.mark.parametrize("coupling", COUPLED, ids=["coupled", "apart"])
def test_adamw_trains_the_lora_as_in_joint_training(joined_hub, trained, coupling):
    adapter = Adapter(solver_of(joined_hub(**coupling)), [trained.others[0]], LEARNING, 0)
    learner = adapter.learners[-1]
    held = learner.update.optimisers.all
    assert isinstance(held["adamw"], AdamW)
    with_adamw = {id(p) for group in held["adamw"].param_groups for p in group["params"]}
    lora = [p for n, p in adapter.solver.hub.model.named_parameters() if "lora_" in n]
    assert lora
    assert {id(p) for p in lora} <= with_adamw
    assert ("muon" in held) == (not coupling)  # of TRM, which has another learner without adapters


def test_several_tasks_side_by_side_train_the_lora(joined_hub, trained):
    solver = solver_of(joined_hub())
    settings = EvalConfig.model_validate(
        {
            "evaluation": {"test_set": str(trained.folder), "adapt_steps": 2},
            "adaptation": {"tokens_per_batch": 256},
        }
    )
    done = adapt(solver, trained.others[:2], settings, Accelerator(cpu=True))
    assert done.steps == 2
    assert not torch.equal(logits_of(done.solver), logits_of(solver))
    assert not any(p.requires_grad for p in done.solver.model.parameters())


# -- what is there once


def test_the_model_is_there_once_and_its_lora_twice(joined_hub, trained):
    solver = solver_of(joined_hub())
    adapter = adapted(solver, trained.others[0])
    loaded, learned, answering = (
        dict(one.hub.model.named_parameters()) for one in (solver, adapter.solver, adapter.frozen())
    )
    assert loaded.keys() == learned.keys() == answering.keys()
    for name, tensor in loaded.items():
        is_lora = "lora_" in name
        assert (learned[name] is tensor) == (answering[name] is tensor) == (not is_lora)
        if is_lora:
            assert learned[name].data_ptr() not in (tensor.data_ptr(), answering[name].data_ptr())
    buffers = dict(solver.hub.model.named_buffers())
    assert all(buffer is buffers[n] for n, buffer in adapter.solver.hub.model.named_buffers())
    assert adapter.solver.hub.tokenizer is solver.hub.tokenizer


def test_a_frozen_copy_stays_as_it_is_while_the_solver_learns_on(joined_hub, trained):
    adapter = adapted(solver_of(joined_hub()), trained.others[0])
    kept = adapter.frozen()
    said = logits_of(kept)
    assert torch.equal(said, logits_of(adapter.solver))
    adapter.train([trained.others[0]], time.monotonic() + 60, 1)
    assert torch.equal(said, logits_of(kept))
    assert not torch.equal(said, logits_of(adapter.solver))


def test_all_weights_learn_in_float32_and_answer_in_what_they_were_loaded_in(joined_hub, trained):
    solver = solver_of(joined_hub("full"), dtype="bfloat16")
    adapter = adapted(solver, trained.others[0])
    answering = adapter.answering().hub
    assert {p.dtype for p in solver.hub.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in adapter.solver.hub.model.parameters()} == {torch.float32}
    learned = dict(adapter.solver.hub.model.named_parameters())
    for name, parameter in answering.model.named_parameters():
        assert torch.equal(parameter, learned[name].to(torch.bfloat16))


def test_lora_is_float32_beside_a_narrower_model(joined_hub, trained):
    solver = solver_of(joined_hub(), dtype="bfloat16")
    adapter = adapted(solver, trained.others[0])
    for name, parameter in adapter.solver.hub.model.named_parameters():
        assert parameter.dtype == (torch.float32 if "lora_" in name else torch.bfloat16)
    assert adapter.answering() is adapter.solver


# -- batches


def test_a_batch_holds_the_longest_sequence_with_the_models_marks(joined_hub, trained):
    """Under any view: a grid that is wider than high has more tokens when it is turned."""
    wide = [Pair(np.full((2, 20), n, np.uint8), np.full((1, 20), n, np.uint8)) for n in range(4)]
    task = replace(trained.others[0], demonstrations=tuple(wide))
    adapter = Adapter(solver_of(joined_hub(**NO_PATH)), [task], config().adaptation, 0)
    part = adapter.parts[-1]
    assert isinstance(part, HubModule)
    step = adapter.new_steps([task])[-1]
    lengths = step.stream.draw(200)[..., reading.LENGTH].sum(1)
    assert int(lengths.max()) == least_tokens(part, [task]) == step.num_tokens > 256
    for _ in range(20):
        assert step.stream.next_batch(step.queue, step.num_tokens).rows[:, reading.LENGTH].any()


def test_out_of_memory_with_the_smallest_batch_asks_for_a_smaller_model(
    joined_hub, trained, monkeypatch
):
    def full(self, step, factor):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("arctrm.solving.adaptation.Learner.learn", full)
    pair = Pair(np.zeros((9, 9), np.uint8), np.zeros((9, 9), np.uint8))
    task = replace(trained.others[0], demonstrations=(pair,) * 4)
    for coupling in COUPLED:
        adapter = Adapter(solver_of(joined_hub(**coupling)), [task], config().adaptation, 0)
        with pytest.raises(ResourceError, match="no batch holds less"):
            adapter.learn(adapter.new_steps([task]), 1.0)
        assert max(adapter.num_tokens) == adapter.smallest > 256


def test_no_room_for_a_copy_is_one_sentence(joined_hub, trained, monkeypatch):
    def full(*given):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(HubModule, "trainable_copy", full)
    with pytest.raises(ResourceError, match=r"adaptation\.enabled = false"):
        Adapter(solver_of(joined_hub("full")), [trained.others[0]], LEARNING, 0)


@pytest.mark.parametrize("context", [True, False])
def test_sequences_come_in_twos_of_a_task_only_where_contexts_are_told_apart(
    joined_hub, trained, context
):
    solver = solver_of(joined_hub("frozen", **({} if context else {"context": False})))
    learning = LEARNING.model_copy(update={"tokens_per_batch": 4096})
    adapter = Adapter(solver, trained.others, learning, 0)
    [step] = adapter.new_steps(trained.others)
    tasks = torch.cat([step.stream.draw().sequences[:, -1, reading.TASK] for _ in range(4)])
    twos = tasks.view(-1, 2)
    assert len(tasks.unique()) > 1
    assert (twos[:, 0] == twos[:, 1]).all() == context


# -- the commands


@pytest.mark.parametrize("coupling", COUPLED, ids=["coupled", "apart"])
def test_eval_answers_with_the_adapted_reader(joined_hub, trained, tmp_path, coupling, monkeypatch):
    asked = []
    answer_all = parts.answer_all
    monkeypatch.setattr(
        parts, "answer_all", lambda s, *rest: asked.append(s) or answer_all(s, *rest)
    )
    settings = EvalConfig.model_validate(
        {
            "checkpoint": joined_hub(**coupling),
            "evaluation": {
                "test_set": str(trained.folder),
                "tasks": [trained.known[0].id],
                "adapt_steps": 2,
                "ablate": ["no-adaptation"],
            },
            "inference": QUICK,
            "reader": {"rank": "experts", "scoring_views": 1, "scored_candidates": 2},
            "adaptation": {"tokens_per_batch": 256},
        }
    )
    evaluate.run(settings, tmp_path)
    assert json.loads((tmp_path / "scores.json").read_text())["adaptation"]["steps"] == 2
    assert list(json.loads((tmp_path / "ablations.json").read_text())) == [
        "everything",
        "no-adaptation",
    ]
    adapted_solver, loaded = asked
    assert not torch.equal(logits_of(adapted_solver), logits_of(loaded))


@pytest.mark.parametrize("coupling", COUPLED, ids=["coupled", "apart"])
def test_solve_adapts_the_reader_from_the_command_line(
    joined_hub, trained, write_tasks, tmp_path, capfd, coupling, monkeypatch
):
    learned = []
    train = Adapter.train
    monkeypatch.setattr(
        Adapter, "train", lambda self, *given: learned.append(self) or train(self, *given)
    )
    write_tasks(tmp_path / "tasks", [trained.others[1]])
    words = [
        *("solve", tmp_path / "tasks" / f"{trained.others[1].id}.json", "--budget", "60s"),
        *("--checkpoint", joined_hub(**coupling), "--views", "1", "--set", "inference.steps=1"),
        *("--set", "adaptation.max_steps=2", "--set", "adaptation.tokens_per_batch=256"),
        *("--set", "inference.dtype=float32", "--set", "reader.rank=votes"),
    ]
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    assert stop.value.code == 0
    assert "4 adaptation steps" in capfd.readouterr().out
    loaded = solver_of(joined_hub(**coupling))
    assert not torch.equal(logits_of(learned[-1].solver), logits_of(loaded))
