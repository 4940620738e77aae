"""Grids out of free text, and readers of grids behind the interface of text."""

import numpy as np
import pytest
import torch

from arctrm.config import HubConfig, TrunkConfig
from arctrm.data.task import Pair
from arctrm.errors import UserError
from arctrm.model import layout
from arctrm.model.layout import Condition
from arctrm.model.trunk import Trunk
from arctrm.reader.decoding import decode
from arctrm.reader.hub_loading import load_hub_reader
from arctrm.reader.text import GridText, grid_text, pairs_in_text, parse_grid_text
from arctrm.reader.text_module import TextReasoningModule
from arctrm.reader.tiny import TinyReader
from helpers import random_grid
from hub_models import save_model

GRID = [[0, 1, 2], [3, 4, 5]]

WAYS = {
    "spaced": "0 1 2\n3 4 5",
    "unspaced": "012\n345",
    "comma separated": "0, 1, 2\n3, 4, 5",
    "JSON": "[[0, 1, 2], [3, 4, 5]]",
    "JSON over lines": "[\n  [0, 1, 2],\n  [3, 4, 5]\n]",
    "rows as JSON": "[0, 1, 2]\n[3, 4, 5]",
    "numpy": "np.array([[0, 1, 2], [3, 4, 5]])",
    "object": '{"output": [[0, 1, 2], [3, 4, 5]]}',
    "fence with language": "```text\n012\n345\n```",
    "text around": "Let me think. The shape is 2x3.\n\n0 1 2\n3 4 5\n\nThat is my answer.",
    "label": "Output:\n0 1 2\n3 4 5",
    "label on the first line": "Output: 0 1 2\n3 4 5",
    "numbered rows": "Row 1: 0 1 2\nRow 2: 3 4 5",
    "carriage returns": "0 1 2\r\n3 4 5\r\n",
    "table": "| 0 | 1 | 2 |\n|---|---|---|\n| 3 | 4 | 5 |",
    "quoted rows": '"012",\n"345"',
    "echo of the input first": "Input:\n7 7\n7 7\n\nOutput:\n0 1 2\n3 4 5",
    "echo of the input last": "Answer:\n0 1 2\n3 4 5\n\nTest input:\n7 7\n7 7",
    "echo of the input in JSON": '{"output": [[0,1,2],[3,4,5]], "input": [[7,7],[7,7]]}',
    "fenced echo of the input": "Output:\n```\n012\n345\n```\nInput:\n```\n77\n```",
    "two tries, the last counts": "First 7 7:\n7 7\n7 7\n\nNo, better:\n0 1 2\n3 4 5",
    "rows, then JSON": "77\n77\nSo: [[0, 1, 2], [3, 4, 5]]",
    "thoughts": "<think>maybe [[1]]?</think>\n0 1 2\n3 4 5",
}


@pytest.mark.parametrize("way", WAYS)
def test_a_grid_is_read_in_every_usual_way_of_writing_it(way):
    grid = parse_grid_text(WAYS[way])
    assert grid is not None
    assert grid.dtype == np.uint8
    assert grid.tolist() == GRID


NONE = {
    "nothing": "",
    "prose": "I do not know the answer to this one.",
    "ragged": "0 1 2\n3 4",
    "cut off in a row": "0 1 2\n3 4 5\n6",
    "JSON cut off": "[[0, 1, 2], [3, 4, 5",
    "JSON over lines cut off": "[\n  [0, 1, 2],\n  [3, 4, 5],\n  [6",
    "empty JSON": "[]",
    "colour 10": "0 1 10\n2 3 4",
    "a letter in unspaced digits": "012\n3x5\n678",
    "a word in the middle": "0 1\n? 2\n3 4",
    "31 rows": "\n".join(["0 1"] * 31),
    "only an echo of the input": "Input:\n0 1 2\n3 4 5",
    "nesting": "[" * 5000,
    "flat list": "The colours are [1, 2, 3].",
}


@pytest.mark.parametrize("case", NONE)
def test_what_is_no_grid_is_none(case):
    assert parse_grid_text(NONE[case]) is None


def test_what_grid_text_writes_is_read_back_at_every_size():
    rng = np.random.default_rng(0)
    for _ in range(30):
        grid = rng.integers(0, 10, rng.integers(1, 31, 2)).astype(np.uint8)
        for between in ("", " ", ",", ", "):
            assert np.array_equal(parse_grid_text(grid_text(grid, between)), grid)
        assert np.array_equal(parse_grid_text(str(grid.tolist())), grid)


RNG = np.random.default_rng(0)
PAIRS = [
    Pair(random_grid(RNG, 3, 2), random_grid(RNG, 1, 4)),
    Pair(random_grid(RNG, 2, 2), random_grid(RNG, 5, 5)),
]
QUERY = random_grid(RNG, 3, 3)
CONDITION = Condition(task=2, keeps_colours=1)


def shown(pairs, query, between="", words=("input", "output")):
    pairs = [(p.input, p.output) for p in pairs]
    grids = [grid for pair in pairs for grid in pair] + [query]
    lines = [f"{words[i % 2]}\n{grid_text(g, between)}" for i, g in enumerate(grids)]
    return "\n".join([*lines, f"{words[1]}\n"])


@pytest.fixture(params=["tiny", "hub"])
def reader(request, tmp_path):
    torch.manual_seed(0)
    if request.param == "hub":
        return GridText(load_hub_reader(HubConfig(name=str(save_model(tmp_path)))), CONDITION)
    trunk = Trunk(TrunkConfig(hidden_size=32, num_layers=2, loops=1, num_heads=2), 3)
    for parameter in trunk.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return GridText(TinyReader(trunk), CONDITION)


@pytest.mark.parametrize("between", ["", " "])
@pytest.mark.parametrize("words", [("input", "output"), ("**Input:**", "Output")])
def test_a_text_reads_as_the_prompt_of_its_pairs(between, words, reader):
    got = reader.text_prompt(shown(PAIRS, QUERY, between, words))
    expected = reader.reader.prompt(QUERY, CONDITION, PAIRS)
    assert np.array_equal(got.tokens, expected.tokens)
    assert got.output_start == expected.output_start
    told = "\nFeedback: demonstration 1: 3 of 9 cells wrong: (0,1) 3/5"
    assert np.array_equal(reader.text_prompt(shown(PAIRS, QUERY) + told).tokens, got.tokens)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "reads rows of digits after the words input and output only"),
        ("What is the rule?", "give such a text or use a reader from the hub"),
        ("input\n12\noutput\n34\n", "an input last"),
        ("output\n12\n", "inputs and outputs in turn"),
        ("input\n12\n3\n", "some reader: grid 0 row 1: has 1 cells"),
    ],
)
def test_texts_that_ask_for_no_grid_are_refused(text, said):
    with pytest.raises(UserError, match="some reader") as error:
        pairs_in_text(text, "some reader")
    assert said in str(error.value)


TEXTS = [shown(PAIRS, QUERY), shown([], QUERY), shown([], random_grid(RNG, 1, 1))]


def test_what_is_written_is_what_the_decoder_writes(reader):
    out = TextReasoningModule(reader).generate_latent(TEXTS, max_length=12)
    prompts = [reader.text_prompt(text) for text in TEXTS]
    for own, text in zip(
        decode(reader.reader, prompts, max_output_tokens=12), out.text, strict=True
    ):
        assert parse_grid_text(text) is not None or own.grid is None
        assert text == reader.text_of([choice for choice in own.choices if choice != 11])


@pytest.mark.parametrize("with_prefix", [False, True])
def test_latents_are_the_same_alone_in_a_batch_and_with_gradient(with_prefix, reader):
    module = TextReasoningModule(reader)
    prefix = torch.randn(3, 4, 32, requires_grad=True) if with_prefix else None
    many = module.generate_latent(TEXTS, prefix, 10)
    for row, text in enumerate(TEXTS):
        one = module.generate_latent(text, None if prefix is None else prefix[row], 10)
        torch.testing.assert_close(many.z_init[row], one.z_init, atol=1e-5, rtol=1e-5)
        assert many.text[row] == one.text
    if prefix is not None:
        many.z_init.square().sum().backward()
        assert (prefix.grad.norm(dim=-1) > 0).all()
        plain = module.generate_latent(TEXTS, None, 10).z_init
        assert not torch.allclose(plain, many.z_init)


def test_latents_of_the_trunk_are_those_of_its_own_forward_and_reach_its_weights():
    torch.manual_seed(0)
    trunk = Trunk(TrunkConfig(hidden_size=32, num_layers=1, loops=2, num_heads=2), 3)
    reader, answer = GridText(TinyReader(trunk), CONDITION), random_grid(RNG, 3, 4)
    prompt = reader.text_prompt(TEXTS[0])
    new = [*np.pad(answer, ((0, 0), (0, 1)), constant_values=10).ravel().tolist()]
    got = reader.latents([prompt], None, [new])
    tokens, positions = layout.pair_tokens(Pair(QUERY, answer))
    from arctrm.model.attention import spans

    count = len(tokens) - 1  # no end is read
    seen = spans(
        torch.tensor([0, count]).int(), count, torch.float32, torch.tensor([len(prompt.tokens)])
    )
    condition = trunk.condition(torch.tensor([CONDITION])).expand(count, -1)
    embedded = trunk.embed(torch.from_numpy(tokens[:-1]), condition)
    hidden = trunk.hidden(embedded, torch.from_numpy(positions[:-1]), seen)
    torch.testing.assert_close(got[0], hidden[-1], atol=1e-5, rtol=1e-5)
    got.square().sum().backward()
    assert trunk.layers[0].qkv_proj.weight.grad.norm() > 0
    assert trunk.task_emb.grad[2].norm() > 0
