"""What a hub answers, or that it does not answer, as one sentence; a small hub stands in for it."""

import socket
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import huggingface_hub.constants
import pytest
from hub_models import save_model

from arctrm.config.reader_hub import HubReaderConfig
from arctrm.errors import ConfigError, UserError
from arctrm.reader.hub_loading import load_hub_reader

ANSWERS = {
    "/org/gated/": (403, "GatedRepo"),
    "/org/absent/": (401, "RepoNotFound"),
    "/org/model/": (404, "RevisionNotFound"),
    "/org/empty/": (404, "EntryNotFound"),
    "/org/broken/": (410, None),
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
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    point_to(monkeypatch, tmp_path, f"http://127.0.0.1:{server.server_port}")
    yield
    server.shutdown()
    server.server_close()


def point_to(monkeypatch, cache, address):
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        address + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def sentence(name, **options):
    with pytest.raises(UserError) as error:
        load_hub_reader(HubReaderConfig(name=name, **options))
    said = str(error.value)
    assert said.startswith(f"{name}: ")
    assert "\n" not in said
    assert error.value.exit_code == 2
    return said


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("org/gated", "accept its licence at https://huggingface.co/org/gated and log in with `hf"),
        ("org/absent", "the Hugging Face hub has no model of that name that you may see; check"),
        ("org/model", "has no such revision; leave revision out"),
        ("org/empty", "has no config.json that names a kind of model; give a model in the format"),
        ("org/broken", "the Hugging Face hub refused to send it"),
    ],
)
def test_each_refusal_of_the_hub_is_a_sentence(name, said, hub):
    assert said in sentence(name)


def test_a_hub_that_cannot_be_reached_is_a_sentence(monkeypatch, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    point_to(monkeypatch, tmp_path, f"http://127.0.0.1:{port}")
    assert "is not in the cache" in sentence("org/model")
    assert "cannot be reached; connect to the network" in sentence("org/model")


def test_offline_and_not_cached_is_a_sentence(monkeypatch, tmp_path):
    point_to(monkeypatch, tmp_path, "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "(and unset HF_HUB_OFFLINE), or give a local folder" in sentence("org/model")


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
    reader = load_hub_reader(HubReaderConfig(name=str(save_model(tmp_path))))
    assert reader.hidden_size == 32


def test_a_name_that_no_hub_can_have_is_a_sentence(no_network):
    assert "check the spelling" in sentence("what is this?")


def test_a_tokenizer_without_digits_is_refused_before_the_weights_are_read(tmp_path):
    from hub_models import words, wrapped

    folder = save_model(tmp_path)
    wrapped(words("input", "output")).save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="has no token of its own for the digit 0"):
        load_hub_reader(HubReaderConfig(name=str(folder)))
