"""`baseline` with a server: what may pass is asked again, what cannot ends in one sentence."""

import json
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler

import pytest

from arctrm.config import BaselineConfig
from arctrm.errors import ConfigError
from arctrm.solve import server as room
from arctrm.solve.baseline import baseline
from hub_server import serving

KEY = "sk-a-secret"


class Chat:
    """A model behind HTTP: the first requests are answered by what `faults` says."""

    def __init__(self, *faults, text="012\n345\n"):
        self.faults, self.text, self.seen, self.lock = list(faults), text, [], threading.Lock()
        self.together = self.most = 0

    def handler(chat):
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with chat.lock:
                    fault = chat.faults.pop(0) if chat.faults else ""
                    chat.seen.append((self.path, self.headers["Authorization"], body))
                    chat.together += 1
                    chat.most = max(chat.most, chat.together)
                time.sleep(4.0 if fault == "stall" else 0.02)
                with chat.lock:
                    chat.together -= 1
                reply = {
                    "choices": [{"message": {"role": "assistant", "content": chat.text}}],
                    "usage": {"prompt_tokens": 7, "completion_tokens": 5},
                }
                status, content = 200, json.dumps(reply).encode()
                if isinstance(fault, tuple):
                    status, content = fault[0], fault[1].encode()
                elif fault:
                    status = 503 if fault == "busy" else 200
                    content = b"<html>" if fault == "html" else b'{"choices": []}'
                self.send_response(status)
                size = len(content) + 100 * (fault == "cut")
                self.send_header("Content-Length", str(size))
                self.end_headers()
                with suppress(BrokenPipeError):  # after a stall nobody listens
                    self.wfile.write(content)

            def log_message(self, *args):
                pass

        return Handler


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(room, "FIRST_WAIT", 0.001)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_hub")


def run(address, test_set, out, resume=False, **given):
    content = {
        "views": 2,
        "out": out,
        "server": f"{address}/v1",
        "server_timeout": 2.0,
        "hub": {"name": "small"},
        "evaluation": {"test_set": str(test_set)},
        **given,
    }
    baseline(BaselineConfig.model_validate(content), resume=resume)
    return json.loads((out / "results.json").read_text())


def test_faults_that_pass_change_nothing_and_tokens_are_counted(trained, tmp_path):
    faults = "html", "no choices", "busy", "cut", "stall"
    bad, good, results = Chat(*faults), Chat(), []
    for chat in (bad, good):
        with serving(chat.handler()) as address:
            out = tmp_path / str(len(chat.faults))
            results.append(run(address, trained.folder, out, batch_size=2))
    faulty, smooth = results
    assert len(bad.seen) == len(good.seen) + len(faults)
    for own in results:
        for record in own["tasks"].values():
            record["seconds"] = 0.0
            assert record["prompt_tokens"] == 7 * len(record["prompts"])
            assert record["new_tokens"] == 5 * len(record["prompts"])
    assert faulty["tasks"] == smooth["tasks"]
    path, key, body = bad.seen[0]
    assert (path, key) == ("/v1/chat/completions", f"Bearer {KEY}")
    assert body["model"] == "small"
    shown = [own["prompt"] for record in smooth["tasks"].values() for own in record["prompts"]]
    assert body["messages"][0]["content"] in shown
    assert "Demonstration 1" in shown[0]
    assert good.most == 2


def test_the_key_is_written_nowhere_and_the_login_of_the_hub_is_not_sent(
    trained, tmp_path, monkeypatch
):
    chat = Chat((400, f"no context for {KEY}"))
    with serving(chat.handler()) as address:
        results = run(address, trained.folder, tmp_path / "with", views=1)
        assert any("no context for ***" in n for r in results["tasks"].values() for n in r["notes"])
        for path in (tmp_path / "with").iterdir():
            assert KEY not in path.read_text()
        monkeypatch.delenv("OPENAI_API_KEY")
        run(address, trained.folder, tmp_path / "without", views=1)
    assert chat.seen[-1][1] == "Bearer none"


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ((401, f"wrong key {KEY}"), "refuses the key (401, wrong key ***); set OPENAI_API_KEY"),
        ((404, "no such model"), "refuses (404, no such model); check --server and --model"),
        ("busy", "5 requests failed (the last: 503"),
        ("html", "5 requests failed (the last: Expecting value"),
    ],
)
def test_what_does_not_pass_is_a_sentence_and_answers_are_kept(fault, said, trained, tmp_path):
    chat = Chat("", *[fault] * 5)
    with serving(chat.handler()) as address:
        with pytest.raises(ConfigError) as error:
            run(address, trained.folder, tmp_path, views=1, batch_size=1)
        assert str(error.value).startswith(f"{address}/v1: ")
        assert said in str(error.value)
        assert KEY not in str(error.value)
        chat.faults.clear()
        before = len(chat.seen)
        results = run(address, trained.folder, tmp_path, resume=True, views=1, batch_size=1)
    prompts = sum(len(record["prompts"]) for record in results["tasks"].values())
    assert len(chat.seen) - before == prompts - 1


def test_a_server_that_is_not_there_is_a_sentence(trained, tmp_path):
    with serving(Chat().handler()) as address:
        pass
    with pytest.raises(ConfigError, match=r"5 requests failed .*refused.*see that it runs"):
        run(address, trained.folder, tmp_path)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"server": "localhost:8000"}, "is no address such as http"),
        ({"server": "http://a:b@host/v1"}, "has a password, which would be written"),
        ({"server": "http://host/v1", "hub": {}}, "needs the name of its model; give --model"),
    ],
)
def test_addresses_that_cannot_be_used_are_refused(given, said):
    with pytest.raises(ValueError, match=said):
        BaselineConfig.model_validate({"hub": {"name": "small"}, **given})
