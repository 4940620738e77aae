"""What the tests of joint training share: small tasks, a small hybrid and its step. Not a test."""

from types import SimpleNamespace

import numpy as np
import torch

from arctrm.config import JointConfig
from arctrm.data.dataset import base_set_from_tasks
from arctrm.data.task import Pair, Task
from arctrm.training.joint import joint_stage

FORMS = {
    "pair": {},
    "task": {
        "reader.sequence": "task",
        "reader.max_pairs": 3,
        "reader.max_tokens": 1900,
        "training.tokens_per_batch": 5600,
    },
}
SEEN = {**FORMS, "whole": {"reader.input_attention": "full"}}
"""The forms, and pairs whose inputs are seen whole (tiny readers only)."""
SMALL = {
    "trm.hidden_size": 32,
    "trm.num_heads": 2,
    "trm.num_layers": 1,
    "trm.H_cycles": 2,
    "trm.L_cycles": 1,
    "trm.num_prefix_slots": 4,
    "reader.hidden_size": 32,
    "reader.num_heads": 2,
    "reader.num_layers": 2,
    "coupling.num_context_slots": 3,
    "coupling.adapter_heads": 2,
    "coupling.draft_every": 4,
    "coupling.drafted_pairs": 64,
    "coupling.no_draft_share": 0.0,
    "coupling.reader_tokens_per_batch": 3840,
    "training.tokens_per_batch": 2048,
    "training.log_every": 2,
    "training.schedule.max_steps": 6,
    "training.schedule.warmup_steps": 0,
    "data.subsets": ["training"],
    "data.test_set": None,
    "data.num_aug": 50,
    "data.enlarge_canvas": 0.0,
    "batch_size": 16,
}
TRM_TOKENS, READER_TOKENS = 1792, 2560
"""Budgets that hold 16 sequences of the small tasks: what is packed, is computed."""


def new_config(changes=None):
    """A `JointConfig` from `SMALL` and dotted overrides."""
    tree = {}
    for dotted, value in (SMALL | (changes or {})).items():
        *tables, key = dotted.split(".")
        place = tree
        for table in tables:
            place = place.setdefault(table, {})
        place[key] = value
    return JointConfig.model_validate(tree)


def small_tasks(num_tasks=4, num_pairs=5, seed=0, num_tests=0):
    """Tasks of random grids, 2 to 4 cells a side; the output is as large as the input, or not."""
    draw = np.random.default_rng(seed)

    def grid():
        return draw.integers(0, 10, size=draw.integers(2, 5, size=2)).astype(np.uint8)

    return [
        Task(
            f"task_{number}",
            tuple(Pair(grid(), grid()) for _ in range(num_pairs)),
            tuple(Pair(grid(), grid()) for _ in range(num_tests)),
        )
        for number in range(num_tasks)
    ]


def small_base(**options):
    return base_set_from_tasks({"training": small_tasks(**options)}, None, 50)


def process():
    """What a stage asks of accelerate, of one process on the CPU."""
    return SimpleNamespace(device=torch.device("cpu"), process_index=0, num_processes=1)


def make(changes=None, base=None, form="pair"):
    """The hybrid and its step, with small budgets and a halting head that says something."""
    stage = joint_stage(new_config(SEEN[form] | (changes or {})), base or small_base(), process())
    (step,) = stage.steps
    step.stream.trm_tokens, step.stream.reader_tokens = TRM_TOKENS, READER_TOKENS
    torch.manual_seed(1)
    with torch.no_grad():
        stage.model.trm.q_head.weight.normal_(std=0.2)
    return stage.model, step


def fill_drafts(step, seed=2):
    """Drafts of random sizes and cells for all pairs, as if a reader had written them."""
    draw = np.random.default_rng(seed)
    pool = step.stream.drafts
    written = []
    for pair in range(pool.num_pairs):
        grid = draw.integers(0, 10, size=draw.integers(2, 6, size=2)).astype(np.uint8)
        pool.write(pair, grid)
        written.append(grid)
    return written


def drawn(step, seed=3):
    torch.manual_seed(seed)
    return step.stream.draw()
