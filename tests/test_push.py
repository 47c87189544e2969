"""push, against a server that answers as the Hub does: what is sent is the file, its card and its pictures."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from adapters import LINEAR, Maker
from conftest import ROOT

from lora_vision import save_adapter
from lora_vision.adapter import Adapter


class Hub(BaseHTTPRequestHandler):
    """The three calls of an upload: make the repository, ask how to send each file, commit."""

    said: list[tuple[str, bytes]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.said.append((self.path, body))
        address = f"http://{self.headers['Host']}/ada/ink"
        answer: dict[str, Any] = {"url": address, "commitUrl": f"{address}/commit/1", "commitOid": "1" * 40}
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        text = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *words: object) -> None:
        """Says nothing."""


@pytest.fixture
def hub() -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """The address of a server that answers as the Hub does, and what it was told."""
    said: list[tuple[str, bytes]] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Listening", (Hub,), {"said": said}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", said
    server.shutdown()


def test_file_card_and_pictures_are_uploaded(hub: tuple[str, list[tuple[str, bytes]]], tmp_path: Path) -> None:
    address, said = hub
    file = save_adapter(Adapter({LINEAR: Maker().lora()}), tmp_path / "ink.safetensors")
    (tmp_path / "ink-training").mkdir()
    (tmp_path / "ink-training" / "loss.png").write_bytes(b"a picture")
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_TOKEN": "hf_x", "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
    command = [sys.executable, "-m", "lora_vision", "push", str(file), "ada/ink", "--licence", "mit", "--private"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"uploaded README.md, ink.safetensors, loss.png: {address}/ada/ink/commit/1\n"
    paths = dict(said)
    assert b"private" in paths["/api/repos/create"]
    lines = [json.loads(line) for line in paths["/api/models/ada/ink/commit/main"].splitlines()]
    sent = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
    }
    assert sent["ink.safetensors"] == file.read_bytes() and sent["loss.png"] == b"a picture"
    assert b"license: mit" in sent["README.md"]
