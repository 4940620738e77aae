"""Every architecture of the hub decodes and scores grids, as its own forward pass counts them."""

import numpy as np
import pytest
import torch
from hub_models import ARCHITECTURES, save_model
from transformers import AutoModelForCausalLM

from arctrm.config.reader_hub import HubReaderConfig
from arctrm.data.task import Pair, Task
from arctrm.reader import grammar
from arctrm.reader.decoding import decode
from arctrm.reader.hub_loading import load_hub_reader
from arctrm.reader.prompts import task_prompt
from arctrm.reader.scoring import score
from arctrm.reader.search import threshold_search

RNG = np.random.default_rng(0)
SIDE, BOUND = 5, 31


def random_grid(height, width):
    return RNG.integers(0, 10, (height, width)).astype(np.uint8)


TASKS = [
    Task(
        f"task{n}",
        tuple(Pair(random_grid(n, n + 1), random_grid(2, n)) for _ in range(n)),
        (Pair(random_grid(3, n)),),
    )
    for n in (1, 3, 2)
]
CANDIDATES = [[random_grid(2, 3), random_grid(1, 1)], [random_grid(4, 4)], []]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def loaded(request, tmp_path_factory):
    """A reader, its prompts, and the plain model of the same weights."""
    path = save_model(tmp_path_factory.mktemp("model"), request.param)
    reader = load_hub_reader(HubReaderConfig(name=str(path)), torch.device("cpu"))
    prompts = [task_prompt(reader, task, 0, 1000).prompt for task in TASKS]
    return reader, prompts, AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


@torch.no_grad()
def plain_score(model, reader, prompt, grid):
    """Log-probability of a grid from one plain forward pass, without cache or padding."""
    ids, _, _ = grammar.encode_grid(grid, reader.grid_tokens)
    whole = np.concatenate([prompt.tokens, ids])
    logits = model(torch.tensor(whole)[None], use_cache=False).logits[
        0, len(prompt.tokens) - 1 : -1
    ]
    logits = logits[:, list(grammar.choice_ids(reader.grid_tokens))]
    choices, state = grammar.encode_choices(grid)
    logs = grammar.log_probabilities(logits, state, SIDE)
    return float(logs.gather(1, torch.as_tensor(choices)[:, None]).sum())


def test_scores_are_those_of_a_plain_forward_pass(loaded):
    reader, prompts, model = loaded
    scores = score(reader, prompts, CANDIDATES, max_side=SIDE)
    for prompt, grids, own in zip(prompts, CANDIDATES, scores, strict=True):
        expected = [plain_score(model, reader, prompt, grid) for grid in grids]
        assert own == pytest.approx(expected, abs=1e-4)


def test_decoded_grids_are_well_formed_and_have_the_score_they_say(loaded):
    reader, prompts, _ = loaded
    sampled = decode(
        reader, prompts * 4, mode="sampled", max_output_tokens=BOUND, max_side=SIDE, batch_size=5
    )
    greedy = decode(reader, prompts, max_output_tokens=BOUND, max_side=SIDE)
    complete = [
        (p, d) for p, d in zip(prompts * 5, sampled + greedy, strict=True) if d.grid is not None
    ]
    assert complete
    scores = score(reader, [p for p, _ in complete], [[d.grid] for _, d in complete], max_side=SIDE)
    for (_, decoded), [value] in zip(complete, scores, strict=True):
        assert max(decoded.grid.shape) <= SIDE
        assert value == pytest.approx(decoded.log_probability, abs=1e-4)


def test_one_prompt_alone_gives_what_it_gives_among_others(loaded):
    reader, prompts, _ = loaded
    many = decode(reader, prompts, max_output_tokens=BOUND, max_side=SIDE)
    for prompt, among in zip(prompts, many, strict=True):
        [alone] = decode(reader, [prompt], max_output_tokens=BOUND, max_side=SIDE)
        assert alone.tokens == among.tokens
        assert alone.log_probability == pytest.approx(among.log_probability, abs=1e-4)


def test_the_threshold_search_holds_the_greedy_grid(loaded):
    reader, prompts, _ = loaded
    found = threshold_search(reader, prompts, 0.05, max_output_tokens=BOUND, max_side=SIDE)
    greedy = decode(reader, prompts, max_output_tokens=BOUND, max_side=SIDE)
    for own, best in zip(found, greedy, strict=True):
        assert best.tokens in [candidate.tokens for candidate in own]
