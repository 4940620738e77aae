"""Random trunks, and plain ways to count what they say: no cache, no batch, no grammar of tensors.

`PlainReader` is a `Reader` whose stores compute everything anew for every token. The forward of a
trunk itself is compared with transformers elsewhere (`tests/model/test_trunk.py`).
"""

import math
import sys
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F

from arctrm.config import TrunkConfig
from arctrm.model import layout
from arctrm.model.attention import prefix_mask
from arctrm.model.layout import CHOICES, SIDE, Condition
from arctrm.model.trunk import Trunk

ONCE = TrunkConfig(hidden_size=64, num_layers=2, num_heads=4, loops=1, injection=False)
LOOPED = ONCE.model_copy(update={"loops": 2})
INJECTED = LOOPED.model_copy(update={"injection": True})
CONFIGS = {"once": ONCE, "looped": LOOPED, "injected": INJECTED}
TASKS = 3


def new_trunk(config=INJECTED, device="cpu", dtype=torch.float32, weights=torch.float32, sharp=3):
    """Random, with logits far apart, that ends rows and grids now and then."""
    torch.manual_seed(0)
    trunk = Trunk(config, TASKS, num_scales=2)
    with torch.no_grad():
        for name, parameter in trunk.named_parameters():
            if parameter.ndim == 2 and not name.endswith("_emb"):
                parameter.mul_(4)
        trunk.head.weight.mul_(sharp)
        for matrix in trunk.injections.parameters():
            matrix.normal_(std=0.02)
    trunk.dtype = dtype
    return trunk.to(device, weights).eval().requires_grad_(False)


def grid(rng, largest=6):
    """Random, of random size."""
    return rng.integers(0, 10, rng.integers(1, largest + 1, 2)).astype(np.uint8)


def new_prompts(count, seed=0, largest=6):
    """Of different lengths and conditions, one of them twice."""
    rng = np.random.default_rng(seed)
    made = [
        layout.prompt(grid(rng, largest), Condition(i % TASKS, i % 8, i % 2, i % 4 // 3, i % 3))
        for i in range(max(1, count - 1))
    ]
    return [*made, made[0]][:count]


def plain_logits(trunk, prompt, choices) -> np.ndarray:
    """Logits [len(choices) + 1, 12] of what comes behind a prompt and `choices`: one forward of the
    whole, of which the prompt is seen whole.
    """
    y = x = 0
    tokens, positions = prompt.tokens.tolist(), prompt.positions.tolist()
    for choice in choices:
        tokens.append(CHOICES[choice])
        positions.append(prompt.output_start + y * SIDE + x)
        y, x = (y + 1, 0) if choice == 10 else (y, x + 1)
    mask = prefix_mask(len(tokens), len(prompt.tokens), trunk.device)

    def seen(layer, *qkv):
        q, k, v = (part.transpose(0, 1) for part in qkv)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(0, 1)

    with torch.no_grad():
        condition = trunk.condition(torch.tensor([prompt.condition], device=trunk.device))
        embedded = trunk.embed(torch.tensor(tokens, device=trunk.device), condition)
        hidden = trunk.hidden(embedded, torch.tensor(positions, device=trunk.device), seen)
        logits = trunk.logits(hidden[len(prompt.tokens) - 1 :])
    return logits[:, list(CHOICES)].double().cpu().numpy()


def continuations(choices, max_side: int) -> list[int]:
    """Which choices (10 row end, 11 end) may follow, read off the definition of a grid."""
    rows, open_row = [], []
    for choice in choices:
        if choice == 10:
            rows.append(open_row)
            open_row = []
        else:
            open_row.append(choice)
    width = len(rows[0]) if rows else None
    cells = list(range(10))
    if not rows:
        return (cells if len(open_row) < max_side else []) + ([10] if open_row else [])
    if not open_row:
        return (cells if len(rows) < max_side else []) + [11]
    return cells if len(open_row) < width else [10]


def plain_log_p(trunk, prompt, choices, max_side: int) -> float:
    """Log-probability of choices after a prompt, from one forward of the whole."""
    logits = plain_logits(trunk, prompt, choices[:-1])
    total = 0.0
    for place, choice in enumerate(choices):
        values = {i: logits[place, i] for i in continuations(choices[:place], max_side)}
        top = max(values.values())
        norm = top + math.log(sum(math.exp(value - top) for value in values.values()))
        total += values[choice] - norm
    return total


def plain_greedy(trunk, prompt, max_side: int, bound: int = 1000) -> list[int]:
    """The likeliest choice after each other, up to the end or a bound."""
    choices = []
    while len(choices) < bound and choices[-1:] != [11]:
        logits = plain_logits(trunk, prompt, choices)[-1]
        choices.append(max(continuations(choices, max_side), key=lambda choice: logits[choice]))
    return choices


def spelled(grid) -> list[int]:
    """The choices that spell a grid."""
    return [c for row in grid.tolist() for c in (*row, 10)] + [11]


class PlainReader:
    """A `Reader` without a cache, as a hub model follows it: no drafts, candidates side by side."""

    name = "plain"
    asks_inverse, follows_drafts = True, False
    batch_rows, capacity = 8, sys.maxsize

    def __init__(self, trunk):
        self.trunk = trunk
        self.released = []

    device = property(lambda self: self.trunk.device)
    dtype = property(lambda self: self.trunk.dtype)
    width = property(lambda self: self.trunk.width)

    def prompt(self, query, condition=Condition(), pairs=()):
        return layout.prompt(query, condition)

    def opened(self, sizes):
        return self

    def store(self, prompts, room):
        return PlainStore(self, prompts)


class PlainStore:
    """Follows `Store`: what was written is a list of choices."""

    def __init__(self, reader, prompts):
        self.reader, self.prompts, self.written = reader, prompts, [[] for _ in prompts]

    @cached_property
    def first(self):
        logits = [plain_logits(self.reader.trunk, prompt, []) for prompt in self.prompts]
        return torch.from_numpy(np.concatenate(logits)).float()

    def read(self):
        return self.first

    def append(self, rows, choices, states):
        assert rows.tolist() == sorted(rows.tolist())
        for row, choice in zip(rows.tolist(), choices.tolist(), strict=True):
            self.written[row].append(choice)
        numbers, counts = (part.tolist() for part in rows.unique(return_counts=True))
        found = [
            plain_logits(self.reader.trunk, self.prompts[row], self.written[row])[-count:]
            for row, count in zip(numbers, counts, strict=True)
        ]
        return torch.from_numpy(np.concatenate(found)).float()

    def rewind(self, row, length):
        del self.written[row][length:]

    def release(self, rows):
        self.reader.released += rows
