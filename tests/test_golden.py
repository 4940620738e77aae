"""The bundled weights write and score what the code before this one wrote and scored with them.

`golden/reader.json` was made by the package of commit 4e986ca in float32 on a CPU; its conditions
are (task, dihedral, flag), with flag 0 or 1: the view keeps the colours, 2 more: an inverse task.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from arctrm.checkpoints import read_trunk
from arctrm.model.attention import spans
from arctrm.model.layout import CHOICES, Condition, Prompt, prompt
from arctrm.reader.decoding import decode
from arctrm.reader.scoring import score
from arctrm.reader.tiny import TinyReader
from arctrm.solve.weights import BUNDLED
from helpers import grid

GOLDEN = json.loads((Path(__file__).parent / "golden" / "reader.json").read_text())
SHOWN = ("greedy", "one_cell_changed", "input_as_output")
TOLERANCE = 2e-4
ENTRIES = GOLDEN["entries"]
FEW = [one for one in ENTRIES if len(one["greedy"]["output_tokens"]) <= 30][::4]


@pytest.fixture(scope="module")
def trunk():
    return read_trunk(BUNDLED)[0].eval().requires_grad_(False)


def condition(golden):
    task, dihedral, flag = golden
    return Condition(task, dihedral, keeps_colours=flag % 2, inverse=flag // 2)


def asked(entry):
    tokens, positions = np.array(entry["tokens"]), np.array(entry["positions"])
    return Prompt(tokens, positions, entry["output_start"], condition(entry["condition"]))


def check_written(reader, entries, **options):
    bounds = [entry["max_output_tokens"] for entry in entries]
    found = decode(reader, [asked(entry) for entry in entries], max_output_tokens=bounds, **options)
    for entry, one in zip(entries, found, strict=True):
        golden = entry["greedy"]
        assert np.array_equal(one.grid, grid(*golden["grid"]))
        assert [CHOICES[choice] for choice in one.choices] == golden["output_tokens"]
        assert one.log_probability == pytest.approx(golden["log_probability"], abs=TOLERANCE)


def check_scored(reader, entries):
    grids = [[grid(*entry[name]["grid"]) for name in SHOWN] for entry in entries]
    found = score(reader, [asked(entry) for entry in entries], grids)
    expected = [[entry[name]["score"] for name in SHOWN] for entry in entries]
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)
    inverse = [entry["inverse"] for entry in entries]
    back = [prompt(grid(*one["prompt_grid"]), condition(one["condition"])) for one in inverse]
    found = score(reader, back, [[grid(*one["scored_grid"])] for one in inverse])
    expected = [[entry["greedy"]["inverse_score"]] for entry in entries]
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)


def test_prompts_are_laid_out_as_before():
    for entry in ENTRIES:
        tokens = np.array(entry["tokens"])
        width = tokens.tolist().index(10) - 1
        query = tokens[1:-1].reshape(-1, width + 1)[:, :width].astype(np.uint8)
        own = prompt(query, condition(entry["condition"]))
        assert own.tokens.tolist() == entry["tokens"]
        assert own.positions.tolist() == entry["positions"]
        assert own.output_start == entry["output_start"]


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_small_grids_are_written_and_scored_as_before(trunk, packed):
    reader = TinyReader(trunk, packed=packed, max_places=10**4)
    assert len({entry["task"] for entry in FEW}) > 1
    check_written(reader, FEW)
    check_scored(reader, FEW)


def test_what_is_written_with_drafts_is_what_was_written_without(trunk):
    entries = FEW
    drafts = [grid(*entry["one_cell_changed"]["grid"]) for entry in entries]
    check_written(TinyReader(trunk), entries, drafts=drafts)


@pytest.mark.slow
def test_all_grids_are_written_and_scored_as_before(trunk):
    reader = TinyReader(trunk)
    check_written(reader, ENTRIES)
    check_scored(reader, ENTRIES)


@pytest.mark.parametrize("golden", GOLDEN["teacher_forced"], ids=lambda one: one["task"])
def test_logits_of_all_tokens_are_those_of_before(trunk, golden):
    """Of a whole pair in one forward, as in training."""
    tokens, positions = torch.tensor(golden["tokens"]), torch.tensor(golden["positions"])
    offsets = torch.tensor([0, len(tokens)], dtype=torch.int32)
    first = golden["prompt_length"]
    seen = spans(offsets, len(tokens), torch.float32, torch.tensor([first]))
    vector = trunk.condition(torch.tensor([condition(golden["condition"])]))
    with torch.no_grad():
        hidden = trunk.hidden(trunk.embed(tokens, vector), positions, seen)
        logits = trunk.logits(hidden)[first - 1 : -1]
    expected = torch.tensor(golden["logits"])
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.gpu
def test_a_gpu_in_float32_writes_and_scores_as_before(trunk):
    trunk = read_trunk(BUNDLED)[0].eval().requires_grad_(False).cuda()
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        check_written(TinyReader(trunk), ENTRIES)
        check_scored(TinyReader(trunk), ENTRIES)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
