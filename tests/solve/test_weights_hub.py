"""Weights go to the hub and come back the same; what it refuses is one sentence."""

import shutil
import socket

import pytest
import torch
from huggingface_hub import ModelCard

from arctrm import Solver
from arctrm.checkpoints import META, MODEL, export_bundle
from arctrm.cli import main
from arctrm.errors import UserError
from hub_server import TOKEN, new_hub, point_to, serving

EXACT = {"inference.dtype": "float32"}
NAME = "org/small"


@pytest.fixture
def repos(monkeypatch, tmp_path):
    """The repositories of a hub on this machine: name -> path -> bytes. Nobody is logged in."""
    found: dict[str, dict[str, bytes]] = {}
    with serving(new_hub(found)) as address:
        point_to(monkeypatch, tmp_path, address)
        monkeypatch.chdir(tmp_path)
        yield found


def loaded(source) -> Solver:
    return Solver.from_pretrained(source, device="cpu", settings=EXACT)


def refused(action) -> str:
    with pytest.raises(UserError) as error:
        action()
    said = str(error.value)
    assert said.startswith(f"{NAME}: ")
    assert "\n" not in said
    return said


def test_a_run_goes_to_the_hub_as_a_bundle_and_comes_back(trained, repos, tmp_path):
    run = loaded(trained.run)
    address = run.push_to_hub(NAME, token=TOKEN)
    assert address.endswith(NAME)
    assert sorted(repos[NAME]) == sorted(["README.md", META, MODEL])
    back = loaded(NAME)
    bundle = loaded(export_bundle(trained.run, tmp_path / "bundle"))
    assert back.name == NAME
    assert (back.voices, back.rows) == (run.voices, run.rows)
    states = back.model.state_dict(), bundle.model.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])
    # A bundle is uploaded as it is, and a card that someone wrote stays.
    repos[NAME]["README.md"] = b"mine"
    back.push_to_hub(NAME, token=TOKEN)
    assert repos[NAME]["README.md"] == b"mine"
    assert repos[NAME][MODEL] == (tmp_path / "bundle" / MODEL).read_bytes()


def test_a_command_takes_a_checkpoint_of_the_hub(trained, repos, capsys):
    loaded(trained.run).push_to_hub(NAME, token=TOKEN)
    with pytest.raises(SystemExit) as stop:
        main(["solve", str(trained.folder), "--checkpoint", NAME, "--dry-run"])
    assert stop.value.code == 0
    assert f"{NAME}, reader and trm" in capsys.readouterr().out


def test_the_model_card_says_what_the_metadata_says(trained, repos, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    loaded(trained.run).push_to_hub(NAME)
    card = ModelCard(repos[NAME]["README.md"].decode())
    assert card.data.library_name == "arctrm"
    assert f'from_pretrained("{NAME}")' in card.text
    for row in ("| voices | reader and trm |", "| trained | 30 steps,", "| task embeddings | 4 |"):
        assert row in card.text


def test_without_a_login_nothing_is_uploaded(trained, repos):
    assert "needs a login" in refused(lambda: loaded(trained.run).push_to_hub(NAME))
    wrong = refused(lambda: loaded(trained.run).push_to_hub(NAME, token="hf_wrong"))
    assert "refuses" in wrong
    assert "401" in wrong
    assert repos == {}


def test_a_name_that_the_hub_does_not_know_or_that_is_no_checkpoint_is_refused(repos):
    assert "no model on the Hugging Face hub that you may see" in refused(lambda: loaded(NAME))
    repos[NAME] = {"config.json": b"{}"}
    assert refused(lambda: loaded(NAME)).endswith(f"is no checkpoint: it has no {META}")


def test_without_a_network_what_was_loaded_before_loads_and_the_rest_is_refused(
    trained, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    with serving(new_hub({})) as address:
        point_to(monkeypatch, tmp_path, address)
        loaded(trained.run).push_to_hub(NAME, token=TOKEN)
        loaded(NAME)
    assert loaded(NAME).name == NAME
    said = refused(lambda: loaded(trained.run).push_to_hub(NAME, token=TOKEN))
    assert said.startswith(f"{NAME}: the hub cannot be reached; connect")
    shutil.rmtree(tmp_path / "cache")
    assert "is no local folder, is not in the cache" in refused(lambda: loaded(NAME))


def test_a_path_that_is_misspelt_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *given, **named: pytest.fail("asked"))
    (tmp_path / "runs").mkdir()
    for path in ("runs/small", "./small", "a/b/c", "small", "~/small"):
        with pytest.raises(UserError, match="not a folder"):
            loaded(path)
