"""A hub model and TRM together: what each hears of the other, and where gradients go."""

import numpy as np
import pytest
import torch

from arctrm.config import CouplingConfig, HubConfig, TrunkConfig
from arctrm.data.task import Pair
from arctrm.model.hybrid import HybridModel, HybridRefiner
from arctrm.model.layout import Condition, output_tokens, prompt
from arctrm.model.trm import Asked, TrunkRefiner, lay_out
from arctrm.model.trunk import Trunk
from arctrm.reader.decoding import decode
from arctrm.reader.hub import with_soft
from arctrm.reader.hub_loading import load_hub_reader
from arctrm.reader.scoring import score
from helpers import random_grid

WIDTH = 16
EVERYTHING = {"context": True, "aligned": True, "back": True}


@pytest.fixture
def hybrid(hub_model):
    """A lively hybrid: `hybrid(mode, context=, aligned=, back=)`."""

    def new(mode="frozen", **paths):
        torch.manual_seed(0)
        reader = load_hub_reader(HubConfig(name=str(hub_model), mode=mode, lora_rank=4))
        trunk = Trunk(TrunkConfig(hidden_size=WIDTH, num_layers=1, loops=2, num_heads=2), 3)
        with torch.no_grad():  # weights that begin at zero, or that say nearly nothing
            for parameter in trunk.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.3)
            for name, parameter in reader.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
        config = CouplingConfig(**paths, num_context_slots=4, num_back_vectors=3, adapter_heads=2)
        return HybridModel(reader, trunk, config)

    return new


def questions(drafted=True):
    rng = np.random.default_rng(0)
    asked = []
    for number, (shape, height, width) in enumerate(
        [((2, 3), 3, 2), ((1, 4), 2, 5), ((3, 3), 1, 1)]
    ):
        query, condition = random_grid(rng, height, width), Condition(task=number, dihedral=number)
        pairs = tuple(Pair(random_grid(rng, 2, 2), random_grid(rng, 1, 3)) for _ in range(number))
        draft = random_grid(rng, *shape)
        given = draft if drafted else None
        asked.append(Asked(query, prompt(query, condition), shape, given, pairs))
    return asked


def logits_of(hybrid, asked, heard=True, steps=2):
    rows, _ = lay_out(asked, hybrid.trunk.device, hybrid.trunk.dtype)
    told = hybrid.listen(asked, len(rows.tokens)) if heard else None
    return rows, list(hybrid.steps(rows, told, steps))


def test_each_token_of_trm_gets_the_state_of_the_same_token_of_the_reader(hybrid):
    whole, asked = hybrid(), questions()
    rows, _ = lay_out(asked, whole.trunk.device, whole.trunk.dtype)
    heard = whole.listen(asked, len(rows.tokens))
    begin = 0
    for one in asked:
        layout = whole.reader.prompt(one.query, pairs=one.pairs).layout
        tokens = np.append(layout, output_tokens(one.shape, one.draft)[0])
        alone = whole.reader.run_packed(torch.from_numpy(tokens), torch.tensor([0, len(tokens)]))
        own = len(one.prompt.tokens) + one.shape[0] * (one.shape[1] + 1) + 1
        states = heard.hidden[heard.state[begin : begin + own]]
        torch.testing.assert_close(states, alone[-own:], atol=1e-5, rtol=1e-5)
        begin += own
    assert begin == len(heard.state)


def test_what_the_reader_is_shown_is_no_answer(hybrid):
    """TRM's own first answer may be the true one with cells hidden: the reader reads the draft."""
    whole, asked = hybrid(**EVERYTHING), questions(drafted=False)
    rows, _ = lay_out(asked, whole.trunk.device, whole.trunk.dtype)
    before = whole.listen(asked, len(rows.tokens))
    shown = rows._replace(tokens=torch.where(rows.cells, 7, rows.tokens))
    for one, other in zip(whole.said(before, rows), whole.said(before, shown), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("path", ["context", "aligned"])
@pytest.mark.parametrize("drafted", [True, False])
def test_leaving_a_path_out_changes_the_answers(hybrid, path, drafted):
    asked = questions(drafted)
    both = hybrid(context=True, aligned=True)
    one = hybrid(**{"context": path != "context", "aligned": path != "aligned"})
    one.load_state_dict({n: t for n, t in both.state_dict().items() if f"adapters.{path}" not in n})
    rows, with_it = logits_of(both, asked)
    _, without = logits_of(one, asked)
    difference = (with_it[0].logits - without[0].logits)[rows.cells].abs().max()
    assert difference > 1e-3


def test_a_hybrid_that_does_not_listen_is_the_trunk_alone(hybrid):
    whole, asked = hybrid(), questions()
    alone = TrunkRefiner(whole.trunk, 3, aligned=False).refine(asked, 2)
    deaf = HybridRefiner(whole, 3, coupled=False).refine(asked, 2)
    for one, other in zip(alone, deaf, strict=True):
        assert np.array_equal(one.grid, other.grid)
        assert one.log_p == pytest.approx(other.log_p, abs=1e-4)
    heard = HybridRefiner(whole, 3).refine(asked, 2)
    assert any(abs(a.log_p - b.log_p) > 1e-3 for a, b in zip(alone, heard, strict=True))


def test_a_question_alone_is_answered_as_among_others(hybrid):
    refiner, asked = HybridRefiner(hybrid(), 2), questions() + questions(drafted=False)
    together = refiner.refine(asked, 2, tokens_per_batch=70, keep_history=True)
    for one, expected in zip(asked, together, strict=True):
        [alone] = refiner.refine([one], 2)
        assert np.array_equal(alone.grid, expected.grid)
        assert alone.log_p == pytest.approx(expected.log_p, abs=1e-4)
        assert len(expected.history) == expected.steps == 2


def test_gradients_of_every_step_reach_the_reader(hybrid):
    """Nothing but values passes from step to step, so each step must hear the reader itself."""
    whole = hybrid("lora")
    rows, predictions = logits_of(whole, questions(), steps=3)
    for prediction in predictions:
        whole.zero_grad()
        prediction.logits[rows.cells].square().mean().backward(retain_graph=True)
        for name in ("reader", "context", "aligned"):
            assert sum(p.grad.norm() for p in whole.parts()[name] if p.grad is not None) > 0


@pytest.mark.parametrize("mode", ["frozen", "lora"])
def test_the_loss_behind_the_prefix_trains_the_way_back(hybrid, mode):
    whole, asked = hybrid(mode, **EVERYTHING), questions()
    rows, predictions = logits_of(whole, asked)
    soft = whole.soft_prefix(rows, predictions[-1])
    assert soft.shape == (3, 3, whole.reader.width)
    loss = whole.written_loss(asked, [one.draft for one in asked], soft)
    assert loss.shape == (3,)
    loss.mean().backward()
    for name in ("back", "trunk", "reader"):
        reached = [p.grad.norm() > 0 for p in whole.parts()[name] if p.grad is not None]
        assert any(reached) == (name != "reader" or mode != "frozen"), name


@torch.no_grad()
def test_the_prefix_is_trained_as_it_is_used(hybrid):
    """The loss of an answer is its score behind the prefix, where the grammar leaves a choice."""
    whole, asked = hybrid(**EVERYTHING), questions()
    rows, predictions = logits_of(whole, asked)
    soft = whole.soft_prefix(rows, predictions[-1])
    prompts = [whole.reader.prompt(one.query, pairs=one.pairs) for one in asked]
    answers = [np.array([[3]], np.uint8)] * 3
    asked = [Asked(o.query, o.prompt, (1, 1), None, o.pairs) for o in asked]
    written = whole.written_loss(asked, answers, soft) * 3  # 3, row end, end
    read = whole.reader.store(with_soft(prompts, soft), [3] * 3)
    first = read.read().log_softmax(-1)
    from arctrm.reader import grammar

    spelt = grammar.spell(answers)
    after = read.append(spelt.grid, spelt.choices, spelt.states).log_softmax(-1).view(3, 3, 12)
    expected = first[:, 3] + after[:, 0, grammar.ROW_END] + after[:, 1, grammar.END]
    torch.testing.assert_close(written, -expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_what_the_reader_writes_and_scores_hangs_on_the_prefix(hybrid):
    whole, asked = hybrid(**EVERYTHING), questions()
    rows, predictions = logits_of(whole, asked)
    soft = whole.soft_prefix(rows, predictions[-1]) * 100
    prompts = [whole.reader.prompt(one.query, pairs=one.pairs) for one in asked]
    candidates = [[one.draft] for one in asked]
    plain, told = (score(whole.reader, p, candidates) for p in (prompts, with_soft(prompts, soft)))
    assert all(abs(a[0] - b[0]) > 1e-3 for a, b in zip(plain, told, strict=True))
    assert len(decode(whole.reader, with_soft(prompts, soft), max_output_tokens=5)) == 3


def test_checkpoints_hold_what_is_trained_and_no_frozen_model(hybrid):
    names = list(hybrid("frozen", **EVERYTHING).state_dict())
    assert not any(name.startswith("reader") for name in names)
    assert {name.split(".")[1] for name in names if "adapters" in name} == set(EVERYTHING)
    assert any("lora_A" in name for name in hybrid("lora").state_dict())
