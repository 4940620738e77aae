"""Hub readers in joint training: every make, LoRA and all weights, what a checkpoint holds."""

import json
import shutil

import pytest
import torch
from hub_models import save_model
from joint_parts import FORMS, drawn, fill_drafts, make, new_config, process, small_base
from runs import end_of, plain, refused
from torch.optim import AdamW

from arctrm.errors import CheckpointError, ConfigError
from arctrm.reader.tokens import PREFIX
from arctrm.training import joint
from arctrm.training import reader_stream as reading
from arctrm.training.checkpoints import latest_checkpoint, read_model
from arctrm.training.joint import gradient_norms, joint_stage
from arctrm.training.losses import IGNORE
from arctrm.training.optimisers import FlatGradients, Optimisers

pytestmark = pytest.mark.usefixtures("one_thread")

MAKES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral")
ROOM = {"max_position_embeddings": 4096}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a small random model, saved once for each make."""
    folders = {}

    def folder(architecture="llama", tokenizer="byte-level, digits merge"):
        key = (architecture, tokenizer)
        if key not in folders:
            path = tmp_path_factory.mktemp(architecture)
            folders[key] = save_model(path, architecture, tokenizer, **ROOM)
        return folders[key]

    return folder


def hub(folder, **changes):
    own = {"llama_model": str(folder), "batch_size": 6, "hub.lora_rank": 4}
    return {**own, "coupling.draft_batch_size": 4, "coupling.drafted_pairs": 2, **changes}


def seen(reader, shown, index):
    """Token ids of one sequence of a packed batch."""
    begin, end = shown.packing.offsets[index : index + 2].tolist()
    return reader.ids[shown.tokens[begin:end]].tolist()


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("architecture", MAKES)
def test_a_step_runs_and_gradients_reach_every_trained_weight(saved, architecture, mode):
    hybrid, step = make(hub(saved(architecture), **{"hub.mode": mode}), form="task")
    with torch.no_grad():  # LoRA begins as a product with zero, which keeps the gradient from A
        for name, parameter in hybrid.reader.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    fill_drafts(step)
    step()
    norms = gradient_norms(hybrid)
    assert set(norms) == {"reader", "trm", "context", "draft", "back"}
    assert all(norm > 0 for norm in norms.values()), norms
    for name, parameter in hybrid.reader.named_parameters():
        assert name.startswith("pretrained.")
        assert parameter.grad is not None, name
        assert parameter.grad.norm() > 0, name
        assert ("lora_" in name) == (mode == "lora")


@pytest.mark.parametrize("form", FORMS)
def test_nothing_of_a_frozen_model_is_trained_and_trm_still_learns_from_it(saved, form):
    hybrid, step = make(hub(saved(), llama_frozen=True), form=form)
    fill_drafts(step)
    step()
    assert not any(p.requires_grad for p in hybrid.hub.model.parameters())
    assert all(p.grad is None for p in hybrid.hub.model.parameters())
    norms = gradient_norms(hybrid)
    assert set(norms) == {"trm", "context", "draft", "back"}
    assert all(norm > 0 for norm in norms.values())


@pytest.mark.parametrize(
    "tokenizer", ["byte-level, digits merge", "sentence pieces", "words with the space"]
)
@pytest.mark.parametrize("form", FORMS)
def test_the_model_is_shown_in_training_what_it_is_asked_in_decoding(saved, form, tokenizer):
    """The packed layout in the model's tokens is `pairs_prompt`, token for token."""
    _, step = make(hub(saved("llama", tokenizer), **{"hub.cells": "auto"}), form=form)
    chosen = torch.arange(6)
    torch.manual_seed(4)
    asked = step.stream.drafts.questions(chosen)
    torch.manual_seed(4)
    stream, uniform = step.stream.reader, torch.rand(6, 2, dtype=torch.float64)
    task = stream.source.pairs[chosen, 0]
    _, dihedral, colours = stream.source.draw_views(task, uniform[:, 0])
    others = stream.others(chosen, task, uniform[:, 1])[:, : stream.num_pairs - 1]
    rows = stream.sequences(torch.cat((others, chosen[:, None]), 1), task, dihedral, colours)
    packed = stream.pack(rows.flatten(0, 1), 6, 2560)
    for index, question in enumerate(asked):
        expected = step.reader.prompt(question.pairs, question.query, question.condition)
        got = seen(step.reader, packed, index)
        count = len(expected.tokens)
        assert got[:count] == expected.tokens.tolist()
        spelt = step.reader.reader.grid_tokens
        assert got[-1] == spelt.end
        assert len(got) - count == question.view.apply(question.answer).size + 1 + sum(
            token == spelt.row_end for token in got[count:]
        )


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@torch.no_grad()
def test_states_are_those_of_the_model_reading_each_sequence_alone(saved, architecture):
    hybrid, step = make(hub(saved(architecture)), form="task")
    fill_drafts(step)
    shown = step.stream.shown_sequences(drawn(step), with_soft=True)
    soft = torch.randn(len(shown.tokens), hybrid.hidden_size)
    hidden = step.reader.hidden(shown, soft)
    for index in range(4):
        begin, end = shown.packing.offsets[index : index + 2].tolist()
        model = hybrid.hub.model
        embedded = model.get_input_embeddings()(step.reader.ids[shown.tokens[begin:end]])
        is_soft = shown.tokens[begin:end] == PREFIX
        assert is_soft.tolist()[-4:] == [True] * 4  # after the text
        embedded[is_soft] = soft[begin:end][is_soft]
        alone = model.get_decoder()(inputs_embeds=embedded[None]).last_hidden_state[0]
        torch.testing.assert_close(hidden[begin:end], alone, atol=1e-4, rtol=1e-4)


def test_the_readers_own_loss_is_that_of_the_12_grid_tokens(saved):
    hybrid, step = make(hub(saved()), form="task")
    batch = step.stream.true_sequences(drawn(step))
    losses = step.reader.losses(batch)
    spelt, model = hybrid.hub.grid_tokens, hybrid.hub.model
    ids = [*spelt.colours, spelt.row_end, spelt.end]
    total = 0.0
    with torch.no_grad():
        for index in range(batch.num_sequences):
            begin, end = batch.packing.offsets[index : index + 2].tolist()
            labels = batch.labels[begin:end]
            if begin == end:
                continue
            tokens = step.reader.ids[batch.tokens[begin:end]]
            log_p = model(input_ids=tokens[None]).logits[0][:, ids].log_softmax(-1)
            for place in (labels != IGNORE).nonzero()[:, 0].tolist():
                total -= log_p[place, ids.index(int(tokens[place + 1]))].item()
    assert losses.num_labels > 50
    assert losses.total.item() == pytest.approx(total, rel=1e-4)


def test_drafts_are_decoded_with_the_model(saved):
    _, step = make(hub(saved()), form="pair")
    share, length = step.stream.drafts.refresh(step.reader, 3, batch_size=2)
    assert 0 <= share <= 1
    assert length > 0


@torch.no_grad()
def test_a_sequence_says_the_same_alone_and_in_a_batch(saved):
    _, step = make(hub(saved(), batch_size=16), form="pair")
    fill_drafts(step)
    step.stream.trm_tokens = 4096
    many = drawn(step)
    shown = step.stream.shown_sequences(many, with_soft=False)
    states = step.stream.states(many, shown, step.reader.hidden(shown))
    one = torch.zeros_like(many.sequences)
    one[0] = many.sequences[9]
    step.stream._fitting = lambda drawn, drafted, rows: drawn[:, -1, reading.LENGTH] > 0
    alone = step.stream.lay_out(one, many.drafted[[9] * 16])
    own = step.stream.shown_sequences(alone, with_soft=False)
    said = step.stream.states(alone, own, step.reader.hidden(own))
    begin, count = int(states.begin[9]), int(states.visible[9])
    assert count == said.visible[0] > 5
    torch.testing.assert_close(
        said.hidden[:count], states.hidden[begin : begin + count], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_adamw_trains_the_reader_and_muon_the_blocks_of_trm(saved, mode):
    stage = joint_stage(new_config(hub(saved(), **{"hub.mode": mode})), small_base(), process())
    hybrid = stage.model
    FlatGradients([p for p in hybrid.parameters() if p.requires_grad])
    optimisers = Optimisers(hybrid, new_config().training.optimiser)
    with_adamw = optimisers.all["adamw"]
    assert isinstance(with_adamw, AdamW)
    held = {id(p) for group in with_adamw.param_groups for p in group["params"]}
    assert all(id(p) in held for p in hybrid.reader.parameters())
    assert not any(id(p) in held for n, p in hybrid.trm.named_parameters() if "gate_up" in n)


def test_gradient_checkpointing_gives_the_same_gradient(saved):
    found = []
    for flag in (False, True):
        changes = {"hub.gradient_checkpointing": flag, "hub.mode": "full", "batch_size": 2}
        hybrid, step = make(hub(saved(), **changes))
        fill_drafts(step)
        torch.manual_seed(5)
        step()
        found.append(torch.cat([p.grad.flatten() for p in hybrid.reader.parameters()]))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)


QUICK = {
    "data.max_tasks": 2,
    "trm.hidden_size": 16,
    "training.checkpoint_every_steps": 1,
    "training.schedule.max_steps": 2,
    "training.log_every": 2,
    "coupling.draft": False,
    "batch_size": 2,
}


@pytest.mark.parametrize("mode", ["frozen", "lora", "full"])
def test_a_checkpoint_holds_what_is_trained_and_resumes_exactly(saved, tmp_path, mode):
    config = new_config(hub(saved(), **{"hub.mode": mode, **QUICK}))
    joint.run(config, tmp_path / "whole", False)
    weights = read_model(latest_checkpoint(tmp_path / "whole"), ema=False)
    of_reader = [name for name in weights if name.startswith("reader.")]
    assert {"frozen": not of_reader, "lora": all("lora_" in n for n in of_reader)}.get(mode, True)
    assert bool(of_reader) == (mode != "frozen")
    assert not any("embed_tokens" in n for n in of_reader) or mode == "full"
    meta = json.loads((latest_checkpoint(tmp_path / "whole") / "checkpoint.json").read_text())
    assert meta["config"]["hub"]["name"] == str(saved())
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step_00000002")
    torch.manual_seed(99)
    joint.run(config, tmp_path / "cut", True)
    assert end_of(tmp_path / "cut", 2) == end_of(tmp_path / "whole", 2)


def test_parts_of_a_hybrid_with_lora_are_taken_over(saved, tmp_path):
    config = new_config(hub(saved(), **QUICK))
    joint.run(config, tmp_path, False)
    path = latest_checkpoint(tmp_path)
    weights = read_model(path, ema=True)
    both = {"trm_checkpoint": path, "reader_checkpoint": path}
    tasks = joint.prepare(config.data)
    again = joint_stage(new_config(hub(saved(), **QUICK, **both)), tasks, process()).model
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    text = refused(
        CheckpointError,
        lambda: joint_stage(
            new_config(hub(saved(), **QUICK, **both, **{"hub.lora_rank": 8})), tasks, process()
        ),
    )
    assert "hub.lora_rank = 4 there, 8 here" in text
    tiny = QUICK | {"reader_checkpoint": path}
    text = refused(CheckpointError, lambda: joint_stage(new_config(tiny), tasks, process()))
    assert f"its reader is {saved()}, not the tiny reader" in text


def test_a_tiny_readers_checkpoint_is_no_hub_readers(saved, tmp_path):
    joint.run(new_config(QUICK), tmp_path, False)
    changes = hub(saved(), reader_checkpoint=tmp_path)
    text = refused(
        CheckpointError, lambda: joint_stage(new_config(changes), small_base(), process())
    )
    assert "its reader is the tiny one" in text


def test_a_model_with_too_few_positions_is_refused_with_both_numbers(tmp_path):
    folder = save_model(tmp_path / "short", max_position_embeddings=1024)
    text = refused(
        ConfigError, lambda: joint_stage(new_config(hub(folder)), small_base(), process())
    )
    assert "holds 1024" in text
    assert "reader.max_tokens" in text


def test_lora_without_peft_is_one_sentence(saved, monkeypatch):
    from arctrm.reader import hub_loading

    monkeypatch.setattr(hub_loading.importlib.util, "find_spec", lambda name: None)
    text = refused(
        ConfigError, lambda: joint_stage(new_config(hub(saved())), small_base(), process())
    )
    assert "pip install 'arctrm[peft]'" in text


def test_the_dry_run_reads_no_weights(saved, tmp_path):
    folder = shutil.copytree(saved(), tmp_path / "model")
    (folder / "model.safetensors").unlink()
    text = plain(joint.describe(new_config(hub(folder) | {"data.max_tasks": 2})))
    assert "lora" in text
    assert "adapters: context" in text
