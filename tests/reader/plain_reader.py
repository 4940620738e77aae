"""A small random reader on any transformers architecture, and plain ways to count probabilities.

The vocabulary is larger than the 12 grid tokens and out of order, positions are 1-D, and the task
in the condition changes every embedding. Nothing here uses the code under test.
"""

import math

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    StaticCache,
)

from arctrm.reader.interface import GridTokens, Prompt

VOCABULARY = 40
TOKENS = GridTokens((31, 4, 17, 9, 22, 38, 2, 13, 26, 7), row_end=20, end=11)
IDS = [*TOKENS.colours, TOKENS.row_end, TOKENS.end]
ARCHITECTURES = {
    "llama": LlamaConfig,
    "gemma": GemmaConfig,
    "mistral with a window": MistralConfig,
}
TASKS = 5


class PlainReader:
    """A random causal LM as a `GridReader`; with `rare` > 0 most colours and rows are improbable.

    The layers are gentle (rounding must not be what a test sees), the last product is not.
    """

    def __init__(self, architecture: str = "llama", seed: int = 0, rare: float = 0.0):
        torch.manual_seed(seed)
        config = ARCHITECTURES[architecture](
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            initializer_range=0.2,
            tie_word_embeddings=False,
        )
        if "window" in architecture:
            config.sliding_window = 6
        self.model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            self.model.lm_head.weight.mul_(1.2)
        self.bias = torch.zeros(VOCABULARY)
        self.bias[[*TOKENS.colours[3:]]] -= rare
        self.bias[TOKENS.end] += rare / 4
        self.task_embedding = nn.Embedding(TASKS, 32)
        self.grid_tokens, self.hidden_size = TOKENS, 32
        self.device = torch.device("cpu")
        self.calls: list[tuple[int, ...]] = []

    def new_cache(self, length):
        return StaticCache(config=self.model.config, max_cache_len=length)

    def output_positions(self, start_B, count, y_B, x_B):
        return start_B + count

    def logits(self, tokens_BS, positions_BS, condition_B3, attention_mask, cache, keep=0):
        self.calls.append(tuple(tokens_BS.shape))
        assert attention_mask.dtype == torch.long
        task = self.task_embedding(condition_B3[:, 0])[:, None]
        logits = self.model(
            inputs_embeds=self.model.get_input_embeddings()(tokens_BS) + task,
            position_ids=positions_BS,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=True,
        ).logits
        return logits[:, -keep:].float() + self.bias

    @torch.no_grad()
    def plain_logits(self, prompt: Prompt, tokens) -> np.ndarray:
        """Logits [len(tokens) + 1, 12] of what follows the prompt: one row, no cache."""
        ids = torch.tensor([[*prompt.tokens.tolist(), *tokens]])
        task = self.task_embedding(torch.tensor([prompt.condition[0]]))[:, None]
        embedded = self.model.get_input_embeddings()(ids) + task
        out = self.model(inputs_embeds=embedded, use_cache=False).logits
        return (out + self.bias)[0, len(prompt.tokens) - 1 :, IDS].double().numpy()


def prompts(count: int, longest: int = 40, seed: int = 0) -> list[Prompt]:
    """Random prompts of very different lengths, of all tasks."""
    rng = np.random.default_rng(seed)
    lengths = np.linspace(1, longest, count).round().astype(int)
    return [
        Prompt(
            rng.integers(VOCABULARY, size=length),
            np.arange(length),
            output_start=int(length),
            condition=(int(rng.integers(TASKS)), 0, 0),
        )
        for length in rng.permutation(lengths)
    ]


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


def plain_log_p(reader: PlainReader, prompt: Prompt, choices, max_side: int) -> float:
    """Log-probability of choices after a prompt, from one forward of the whole."""
    logits = reader.plain_logits(prompt, [IDS[choice] for choice in choices[:-1]])
    total = 0.0
    for place, choice in enumerate(choices):
        values = {i: logits[place, i] for i in continuations(choices[:place], max_side)}
        top = max(values.values())
        norm = top + math.log(sum(math.exp(value - top) for value in values.values()))
        total += values[choice] - norm
    return total


def spelled(grid) -> list[int]:
    """The choices that spell a grid."""
    return [c for row in grid.tolist() for c in (*row, 10)] + [11]


def depth_first(reader: PlainReader, prompt: Prompt, min_probability: float, max_side: int) -> dict:
    """Choices -> log-probability of all grids above a threshold, without a cache."""
    found = {}

    def visit(choices, total):
        if choices and choices[-1] == 11:
            found[tuple(choices)] = total
            return
        logits = reader.plain_logits(prompt, [IDS[choice] for choice in choices])[-1]
        options = continuations(choices, max_side)
        norm = np.logaddexp.reduce(logits[options])
        for choice in options:
            reached = total + logits[choice] - norm
            if reached >= math.log(min_probability):
                visit([*choices, choice], reached)

    visit([], 0.0)
    return found
