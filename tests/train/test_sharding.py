"""Processes that share the weights of a hub model train it as those that each hold all of it."""

import shutil

import pytest
import torch
from training_runs import finish, small_joint

from arctrm.checkpoints import read_model, read_state
from arctrm.errors import ConfigError
from arctrm.train.run import joint

CHANGES = {
    "evaluate": False,
    "hub.max_pairs": 3,
    "hub.max_tokens": 700,
    "coupling.back": True,
    "coupling.num_context_slots": 4,
    "coupling.adapter_heads": 2,
    "coupling.reader_tokens_per_batch": 2000,
    "trm.supervision_steps": 1,
    "trm.draft_share": 0.5,
    "trm.drafted_pairs": 2,
    "training.ema_decay": 0.9,
    "training.optimiser.clip_norm": 0.1,
    "training.schedule.max_steps": 3,
    "training.checkpoint_every_steps": 1,
    "training.keep_last": 3,
}


def run(out, changes, *more):
    finish(out, CHANGES | changes, *more, processes=2, kind="joint")


def state(out, step):
    folder = out / "checkpoints" / f"step_{step:08d}"
    return read_model(folder) | read_state(folder, 0)[0]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_shared_weights_are_trained_saved_and_resumed_as_whole_ones(mode, tmp_path, hub_model):
    changes = {"llama_model": str(hub_model), "hub.mode": mode}
    changes["hub.gradient_checkpointing"] = mode == "full"
    run(tmp_path / "whole", {**changes, "training.schedule.max_steps": 1})
    changes["hub.sharded"] = True
    run(tmp_path / "shared", changes)
    one, alone = (state(tmp_path / name, 1) for name in ("shared", "whole"))
    assert one.keys() == alone.keys()
    gradients = [name for name in one if name.endswith("exp_avg")]  # a tenth of the gradient
    largest = max(float(alone[name].abs().max()) for name in gradients)
    for name in gradients:
        torch.testing.assert_close(one[name], alone[name], atol=1e-5 * largest, rtol=1e-3)
    before = state(tmp_path / "shared", 3)
    assert all(torch.any(before[name] != one[name]) for name in one if name.startswith("hub."))
    for step in (2, 3):
        shutil.rmtree(tmp_path / "shared" / "checkpoints" / f"step_{step:08d}")
    run(tmp_path / "shared", changes, "--resume")
    after = state(tmp_path / "shared", 3)
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, msg=name)


def test_one_process_has_nobody_to_share_with(tmp_path, hub_model):
    changes = {"llama_model": str(hub_model), "hub.sharded": True}
    with pytest.raises(ConfigError, match="one process has nobody to share with"):
        joint(small_joint(tmp_path / "out", CHANGES | changes))
