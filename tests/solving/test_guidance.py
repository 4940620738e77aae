"""What the reader tells TRM at solve time is what it told TRM in training."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "training"))
from hub_models import save_model
from joint_parts import FORMS, SEEN, drawn, fill_drafts, make

from arctrm.data.task import Pair
from arctrm.data.views import View
from arctrm.hybrid import NO_CELL, visible_states
from arctrm.reader.tokens import prompt
from arctrm.solving.guidance import Guide, longest_visible, states
from arctrm.training import reader_stream as reading

TINY = {"rtol": 1e-4, "atol": 1e-5}


def pair_of(step, row, draft=False):
    """A pair (or its input and draft) as its row's view shows it."""
    source = step.stream.reader.source
    number = int(row[reading.PAIR]) + draft * step.stream.drafts.num_pairs
    table = source.pairs[number].tolist()
    view = View(int(row[reading.DIHEDRAL]), tuple(row[reading.COLOURS].tolist()))

    def grid(offset, height, width):
        cells = source.cells[offset : offset + height * width].numpy()
        return view.apply(cells.reshape(height, width))

    return Pair(grid(*table[3:6]), grid(*table[6:9]))


def asked(step, batch, with_draft=True):
    """The guide of each sequence's last pair, and its row in the batch."""
    guides, places = [], []
    for number, rows in enumerate(batch.sequences):
        there = rows[rows[:, reading.LENGTH] > 0]
        if len(there) == 0:
            continue
        last = there[-1]
        condition = tuple(last[[reading.TASK, reading.DIHEDRAL, reading.FLAG]].tolist())
        pairs = [pair_of(step, row) for row in there[:-1]]
        draft = pair_of(step, last, draft=True).output if with_draft else None
        guides.append(Guide(prompt(pairs, pair_of(step, last).input, condition), draft))
        places.append((number + 1) * len(rows) - 1)
    return guides, places


@torch.no_grad()
def trained(hybrid, step, batch, soft_NPH=None):
    """The states as training lays them out, those of rows' own cells marked."""
    shown = step.stream.shown_sequences(batch, with_soft=soft_NPH is not None)
    on_tokens = None
    if soft_NPH is not None:
        per = shown.rows.shape[0] // step.stream.num_sequences
        row = shown.row.clamp(max=shown.rows.shape[0] - 1)
        is_soft = (shown.row < shown.rows.shape[0]) & (row % per == per - 1)
        slot = torch.where(is_soft, shown.positions % soft_NPH.shape[1], 0)
        on_tokens = soft_NPH[row // per, slot] * is_soft[:, None]
    return step.stream.states(batch, shown, step.reader.hidden(shown, on_tokens))


def seen_by(found, row):
    """Hidden states that a row sees, and (kind, y, x) of the cells among them that are its own."""
    begin, visible = int(found.begin[row]), int(found.visible[row])
    own = slice(begin, begin + visible)
    is_own = (found.row[own] == row) & (found.kind[own] != NO_CELL)
    cells = torch.stack((found.kind[own], found.y[own], found.x[own]), dim=1)
    return found.hidden[own], torch.where(is_own[:, None], cells, NO_CELL)


@pytest.fixture(scope="module")
def hub_model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), max_position_embeddings=4096)


@pytest.mark.parametrize(
    ("reader", "form"), [*(("tiny", form) for form in SEEN), *(("hub", form) for form in FORMS)]
)
@pytest.mark.parametrize("how", ["draft", "no_draft", "soft_prefix"])
def test_states_are_those_of_the_training_layout(form, how, reader, hub_model):
    changes = {"coupling.no_draft_share": 1.0} if how == "no_draft" else {}
    if reader == "hub":
        changes |= {"llama_model": str(hub_model), "llama_frozen": True}
    hybrid, step = make(changes, form=form)
    fill_drafts(step)
    batch = drawn(step)
    soft = None
    if how == "soft_prefix":
        soft = torch.randn(step.stream.num_sequences, step.stream.num_soft, 32)
    there = trained(hybrid, step, batch, soft)
    guides, places = asked(step, batch, with_draft=how != "no_draft")
    per = batch.sequences.shape[1]
    own_soft = None if soft is None else soft[[place // per for place in places]]
    with torch.no_grad():
        here = states(hybrid, guides, len(guides) + 2, own_soft)
    assert len(places) > 4
    for row, place in enumerate(places):
        hidden, cells = seen_by(here, row)
        expected, expected_cells = seen_by(there, place)
        torch.testing.assert_close(hidden, expected, **TINY)
        assert torch.equal(cells, expected_cells)


def test_rows_without_a_guide_see_nothing():
    hybrid, step = make()
    fill_drafts(step)
    guides, _ = asked(step, drawn(step))
    found = states(hybrid, guides, len(guides) + 3)
    _, mask = visible_states(found, longest_visible(found))
    assert mask[: len(guides)].any(1).all()
    assert not mask[len(guides) :].any()
    assert int(found.row.max()) < len(guides)


def test_a_guide_says_the_same_alone_and_among_many():
    hybrid, step = make(form="task")
    fill_drafts(step)
    guides, _ = asked(step, drawn(step))
    with torch.no_grad():
        together = states(hybrid, guides, len(guides))
        for row, guide in enumerate(guides):
            alone, cells = seen_by(states(hybrid, [guide], 1), 0)
            among, among_cells = seen_by(together, row)
            torch.testing.assert_close(alone, among, rtol=1e-5, atol=1e-5)
            assert torch.equal(cells, among_cells)


def test_draft_cells_are_there_only_with_a_draft():
    hybrid, step = make()
    fill_drafts(step)
    guides, _ = asked(step, drawn(step))
    bare = [Guide(guide.prompt, None) for guide in guides]
    for row, guide in enumerate(guides):
        _, cells = seen_by(states(hybrid, guides, len(guides)), row)
        _, without = seen_by(states(hybrid, bare, len(guides)), row)
        assert int((cells[:, 0] == 1).sum()) == np.size(guide.draft)
        assert not (without[:, 0] == 1).any()
        assert int((without[:, 0] == 0).sum()) == int((cells[:, 0] == 0).sum())
