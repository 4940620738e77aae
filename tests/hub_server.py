"""A small Hugging Face hub on this machine: it takes commits of files and gives them back."""

import base64
import hashlib
import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote

import huggingface_hub.constants

TOKEN = "hf_test"


def point_to(monkeypatch, cache, address):
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        address + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)


@contextmanager
def serving(handler):
    """The address of a server with this handler."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def new_hub(repos: dict[str, dict[str, bytes]]):
    """A handler that keeps the files of every repository in `repos`: name -> path -> bytes."""

    class Hub(BaseHTTPRequestHandler):
        def send(self, status, content=b"", **headers):
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def body(self):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def do_POST(self):
            body, path = self.body(), unquote(self.path).partition("?")[0]
            if path == "/api/validate-yaml":
                return self.send(200, {"errors": [], "warnings": []})
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.send(401, {"error": "Invalid username or password."})
            address = f"http://{self.headers['Host']}"
            if path == "/api/repos/create":
                told = json.loads(body)
                name = f"{told['organization']}/{told['name']}"
                repos.setdefault(name, {})
                return self.send(200, {"url": f"{address}/{name}", "name": name})
            name = "/".join(path.split("/")[3:5])
            if "/preupload/" in path:
                files = [
                    {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for one in json.loads(body)["files"]
                ]
                return self.send(200, {"files": files})
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    repos[name][value["path"]] = base64.b64decode(value["content"])
            commit = {"commitUrl": f"{address}/{name}/commit/{self.sha(name)}"}
            return self.send(200, commit | {"commitOid": self.sha(name)})

        def sha(self, name):
            return hashlib.sha1(json.dumps(sorted(repos[name])).encode()).hexdigest()

        def do_GET(self):
            parts = unquote(self.path).partition("?")[0].strip("/").split("/")
            name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
            if name not in repos:
                return self.send(404, X_Error_Code="RepoNotFound")
            files = repos[name]
            if "tree" in parts:
                found = [
                    {"type": "file", "path": path, "size": len(content), "oid": oid(content)}
                    for path, content in files.items()
                ]
                return self.send(200, found)
            if parts[0] == "api":
                siblings = [{"rfilename": path} for path in files]
                return self.send(200, {"id": name, "sha": self.sha(name), "siblings": siblings})
            if parts[-1] not in files:
                return self.send(404, X_Error_Code="EntryNotFound")
            content = files[parts[-1]]
            return self.send(200, content, ETag=oid(content), X_Repo_Commit=self.sha(name))

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    return Hub


def oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
