"""Models of the hub: one revision, whole, whatever is cached; a stand-in of the hub answers on the loopback."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
from transformers import AutoModelForCausalLM

from megalens.config import ConfigError, config_from_dict
from megalens.families.loading import commit_of, load_tokenizer, subject_fingerprint
from megalens.lens.subject import load_subject
from megalens.tiny import make_model

COMMITS = {"main": "a" * 40, "old": "b" * 40}


class Hub(ThreadingHTTPServer):
    """Serves ``folders`` by their commit as the model ``org/subject``; ``asked`` lists the files that were sent."""

    def __init__(self, folders: dict[str, Path]):
        super().__init__(("127.0.0.1", 0), Answers)
        self.folders, self.asked = folders, []


class Answers(BaseHTTPRequestHandler):
    def log_message(self, *_):
        """Silent."""

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:3] == ["api", "models", "org"]:
            commit = COMMITS.get(parts[5] if len(parts) > 5 else "main", parts[5] if len(parts) > 5 else "")
            if commit not in self.server.folders:
                return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
            paths = sorted(self.server.folders[commit].iterdir())
            if parts[4:5] == ["tree"]:
                tree = [{"type": "file", "path": path.name, "size": path.stat().st_size, "oid": path.name} for path in paths]
                return self.send(200, json.dumps(tree).encode(), {}, body)
            files = [{"rfilename": path.name} for path in paths]
            info = {"id": "org/subject", "modelId": "org/subject", "sha": commit, "siblings": files, "tags": [], "private": False}
            return self.send(200, json.dumps(info).encode(), {}, body)
        commit = COMMITS.get(parts[3], parts[3])
        path = self.server.folders.get(commit, Path("/nowhere")) / parts[-1]
        if not path.is_file():
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, body)
        data = path.read_bytes()
        if body:
            self.server.asked.append(path.name)
        return self.send(200, data, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}, body)

    def send(self, code, data, headers, body):
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(data)), "Content-Type": "application/json"}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two revisions of a model, the newer one in two files beside one that it is not loaded from."""
    place = tmp_path_factory.mktemp("revisions")
    new, old = make_model(place / "new"), make_model(place / "old", seed=1)
    whole = AutoModelForCausalLM.from_pretrained(new)
    (new / "model.safetensors").unlink()
    whole.save_pretrained(new, max_shard_size="300KB")
    shutil.copy(old / "model.safetensors", new / "consolidated.safetensors")
    return {COMMITS["main"]: new, COMMITS["old"]: old}


@pytest.fixture
def hub(folders, tmp_path, monkeypatch):
    """The stand-in, asked by an empty cache."""
    server = Hub(folders)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    place = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", place)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", place + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    go_online(monkeypatch, True)
    yield server
    server.shutdown()
    server.server_close()


def go_online(monkeypatch, online):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", not online)


def config_of(**keys):
    return config_from_dict({"model_name": "org/subject", "layer_l": 1, "dtype": "fp32", "device": "cpu", **keys})


def test_fingerprint_is_that_of_the_files_whatever_is_cached(hub, folders, monkeypatch):
    found = subject_fingerprint(config_of())
    assert found == subject_fingerprint(config_of(model_name=str(folders[COMMITS["main"]])))
    assert "consolidated.safetensors" not in hub.asked
    sent = len(hub.asked)
    go_online(monkeypatch, False)
    assert subject_fingerprint(config_of()) == found
    assert len(hub.asked) == sent


def test_revision_is_loaded_and_told(hub, folders):
    config = config_of(revision="old")
    assert commit_of(config) == COMMITS["old"]
    assert subject_fingerprint(config) == subject_fingerprint(config_of(model_name=str(folders[COMMITS["old"]])))
    loaded, wanted = load_subject(config), AutoModelForCausalLM.from_pretrained(folders[COMMITS["old"]])
    assert all(torch.equal(a, b) for a, b in zip(loaded.lm.model.parameters(), wanted.parameters(), strict=True))
    assert load_tokenizer(config)("a river")["input_ids"]
    assert commit_of(config_of()) == COMMITS["main"]
    with pytest.raises(ConfigError, match=r"cannot load org/subject of revision gone: .* \(hf download org/subject --revision gone\)"):
        subject_fingerprint(config_of(revision="gone"))
    with pytest.raises(ConfigError, match="is a folder; leave revision out"):
        subject_fingerprint(config_of(revision="old", model_name=str(folders[COMMITS["old"]])))


def test_cache_that_holds_a_part_is_filled_or_told_in_a_line(hub, tmp_path, monkeypatch):
    whole = subject_fingerprint(config_of())
    (last,) = (tmp_path / "cache").rglob("model-00002-of-*.safetensors")
    last.unlink()
    go_online(monkeypatch, False)
    with pytest.raises(ConfigError, match=r"^cannot load org/subject: its cache in .* lacks model-00002-of.*; fetch it where"):
        subject_fingerprint(config_of())
    go_online(monkeypatch, True)
    assert subject_fingerprint(config_of()) == whole


def test_empty_cache_without_a_network_is_told_in_a_line(hub, monkeypatch):
    go_online(monkeypatch, False)
    for ask in (subject_fingerprint, load_tokenizer, load_subject):
        with pytest.raises(
            ConfigError, match=r"cannot load org/subject: .*; fetch it where there is a network \(hf download org/subject\)"
        ) as e:
            ask(config_of())
        assert "\n" not in str(e.value)
    assert huggingface_hub.constants.HF_HUB_OFFLINE
