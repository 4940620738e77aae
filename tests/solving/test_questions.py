"""What hub models are asked and how their answers are read; which models cannot be asked."""

import json

import numpy as np
import pytest
import torch
from baseline_runs import answered, config, prompts_of
from hub_models import END, save_model
from safetensors.torch import load_file, save_file

from arctrm.data.parse import parse_grid
from arctrm.data.views import View
from arctrm.errors import CheckpointError, ConfigError
from arctrm.reader.grid_text import parse_grid_text
from arctrm.solving.baseline import run
from arctrm.solving.questions import load_respondent
from arctrm.solving.submission import check_complete

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def hub_model(tmp_path_factory):
    """A random Llama of 4096 positions with a chat template."""
    path = tmp_path_factory.mktemp("hub")
    return str(save_model(path, chat=True, max_position_embeddings=4096))


@pytest.fixture(scope="module")
def sevens(tmp_path_factory):
    """A chat model that writes 7 or 3 at every place."""
    return with_head(tmp_path_factory.mktemp("sevens"), {"7": (0, 5.0), "3": (0, -5.0)})


@pytest.fixture(scope="module")
def speller(tmp_path_factory):
    """A model that also ends rows and grids."""
    head = {"7": (0, 5.0), "3": (0, -5.0), "Ċ": (1, 5.0), END: (1, -5.0)}
    return with_head(tmp_path_factory.mktemp("speller"), head)


def with_head(folder, head) -> str:
    """A random Llama whose logits are 0 but for these: token -> (dimension of D, weight)."""
    save_model(folder, chat=True, max_position_embeddings=4096)
    tokenizer = load_respondent(config("training", hub={"name": str(folder)}), CPU).reader.tokenizer
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"].zero_()
    for token, (dimension, weight) in head.items():
        weights["lm_head.weight"][tokenizer.convert_tokens_to_ids(token), dimension] = weight
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def test_a_hub_model_spells_grids_under_views(trained, speller, tmp_path):
    settings = config(trained.folder, hub={"name": speller}, evaluation={"max_tasks": 2})
    results = answered(settings, tmp_path / "results.json")
    check_complete(json.loads((tmp_path / "submission.json").read_text()), trained.known[:2])
    assert results["model"]["name"] == speller
    turned = 0
    for task_id, index, prompt in prompts_of(results):
        task = next(task for task in trained.known if task.id == task_id)
        view = View(prompt["dihedral"], tuple(prompt["colours"]))
        shown = [pair.input for pair in task.demonstrations] + [task.test[index].input]
        parts = prompt["prompt"].split("input\n")[1:]
        for part, grid in zip(parts, shown, strict=True):
            text = "\n".join("".join(map(str, row)) for row in view.apply(grid).tolist())
            assert part.startswith(text)
        for candidate in prompt["candidates"]:
            assert candidate["log_probability"] < 0
            if candidate["grid"] is not None:
                written = parse_grid_text(candidate["text"])
                assert np.array_equal(written, view.apply(parse_grid(candidate["grid"], "grid")))
                turned += view.dihedral > 0
    assert turned
    assert not any(record["notes"] for record in results["tasks"].values())


def test_a_hub_model_ranks_grids_by_its_own_probability(trained, speller, tmp_path):
    reader = {"rank": "experts", "scoring_views": 2}
    settings = config(trained.folder, hub={"name": speller}, attempts=9, reader=reader, views=8)
    results = answered(settings, tmp_path / "results.json")
    kept = [test["attempts"] for r in results["tasks"].values() for test in r["test"]]
    assert max(map(len, kept)) > 1
    for attempts in kept:
        scores = [attempt["reader_score"] for attempt in attempts]
        assert scores == sorted(scores, reverse=True)


def test_what_does_not_fit_is_left_out_and_noted_and_the_query_never_cut(
    trained, hub_model, tmp_path
):
    longest = max(trained.known, key=lambda task: max(p.input.size for p in task.test))
    bound = 40  # tokens: room for small queries only
    settings = config(trained.folder, hub={"name": hub_model, "max_tokens": bound}, views=1)
    results = answered(settings, tmp_path / "results.json")
    notes = [note for record in results["tasks"].values() for note in record["notes"]]
    assert any("demonstrations do not fit into 40 tokens" in note for note in notes)
    assert any(f"task {longest.id}, test input 0: the query alone takes" in n for n in notes)
    assert results["tasks"][longest.id]["test"][0] == {"prompts": [], "attempts": []}
    for _, _, prompt in prompts_of(results):
        assert prompt["prompt_tokens"] <= bound
    assert results["scores"]["num_pairs"] == sum(len(task.test) for task in trained.known)
    check_complete(json.loads((tmp_path / "submission.json").read_text()), trained.known)


def test_a_chat_model_is_asked_in_plain_language_and_its_last_grid_counts(
    trained, sevens, tmp_path
):
    hub = {"name": sevens, "prompt": "chat"}
    settings = config(trained.folder, hub=hub, max_new_tokens=6, evaluation={"max_tasks": 2})
    results = answered(settings, tmp_path / "results.json")
    counted = 0
    for task_id, index, prompt in prompts_of(results):
        assert prompt["prompt"].startswith("<|user|>\nEvery pair of grids")
        assert prompt["prompt"].endswith("<|assistant|>\n")
        assert prompt["prompt"].count("Demonstration") == len(
            next(task for task in trained.known if task.id == task_id).demonstrations
        )
        (candidate,) = prompt["candidates"]
        assert candidate["new_tokens"] == 6
        view = View(prompt["dihedral"], tuple(prompt["colours"]))
        assert set(candidate["text"]) <= set("37")
        grid = view.inverse(np.array([list(map(int, candidate["text"]))], dtype=np.uint8))
        assert candidate["grid"] == grid.tolist()
        votes = [a["votes"] for a in results["tasks"][task_id]["test"][index]["attempts"]]
        counted += sum(votes) > 0
    assert counted
    for record in results["tasks"].values():
        assert any("cut off at max_new_tokens = 6" in note for note in record["notes"])


def test_batches_do_not_change_what_a_chat_model_says(trained, hub_model, tmp_path):
    hub = {"name": hub_model, "prompt": "chat"}
    texts = []
    for size in (1, 5):
        settings = config(
            trained.folder,
            hub=hub,
            max_new_tokens=12,
            evaluation={"max_tasks": 1},
            reader={"batch_size": size},
        )
        results = answered(settings, tmp_path / str(size) / "results.json")
        texts.append([p["candidates"][0]["text"] for _, _, p in prompts_of(results)])
    assert texts[0] == texts[1]
    assert len(texts[0]) == 3


def test_a_checkpoint_without_a_reader_says_what_to_do(trained):
    with pytest.raises(CheckpointError, match=r"no reader.*pretrain_reader.toml.*--model"):
        load_respondent(config("training", checkpoint=trained.run), CPU)


def test_models_that_cannot_be_asked_are_refused_before_anything_is_written(
    trained, hub_model, tmp_path
):
    plain = save_model(tmp_path / "plain", chat=False)
    refused = [
        ({"hub": {"name": str(plain), "prompt": "chat"}, "max_new_tokens": 9}, "no chat template"),
        (
            {"hub": {"name": hub_model, "prompt": "chat"}, "max_new_tokens": 4096},
            "max_new_tokens = 4096 leaves no room",
        ),
        ({"hub": {"name": hub_model, "max_tokens": 3}}, "the query alone takes"),
        ({"hub": {"name": "meta-llama/Llama-3.2-8B-Instruct"}}, "does not exist; use"),
        ({"hub": {"name": "./nowhere"}}, "there is no such folder"),
    ]
    for given, said in refused:
        with pytest.raises(ConfigError, match=said):
            run(config(trained.folder, **given), tmp_path / "out" / "results.json", False)
        assert not (tmp_path / "out").exists()
