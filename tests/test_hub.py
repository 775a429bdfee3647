"""--push_to_hub, against a small server here that speaks the hub's protocol."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from diffusers import StableDiffusionPipeline
from huggingface_hub import ModelCard, constants
from test_train import arguments, refused

import train

TOKEN = "hf_" + "Secret" * 5
FLAGS = ["--updates_per_epoch", "1", "--epochs", "1", "--push_to_hub", "someone/greener"]


class Hub(BaseHTTPRequestHandler):
    """Who asks, a repository, its small files in a commit and its large ones beside it; the server's `files` has what came."""

    def do_GET(self):
        if self.path == "/api/whoami-v2":
            return self.answer({"name": "someone", "type": "user", "orgs": []})
        self.answer({"error": f"no {self.path}"}, 404)

    def do_POST(self):
        body, server = self.rfile.read(int(self.headers["Content-Length"])), self.server
        if self.path == "/api/repos/create":
            server.created.append(json.loads(body))
            return self.answer({"url": f"{server.url}/someone/greener"})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if self.path.endswith("/preupload/main"):
            modes = [(f["path"], "lfs" if f["path"].endswith(".safetensors") else "regular") for f in json.loads(body)["files"]]
            return self.answer({"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes]})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{server.url}/large/{o['oid']}"}}} for o in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        if self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    server.files[value["path"]] = base64.b64decode(value["content"])
                if line["key"] == "lfsFile":
                    server.files[value["path"]] = server.large[value["oid"]]
            url = f"{server.url}/someone/greener/commit/{'0' * 40}"
            return self.answer({"success": True, "commitOid": "0" * 40, "commitUrl": url})
        self.answer({"error": f"no {self.path}"}, 404)

    def do_PUT(self):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.large[hashlib.sha256(data).hexdigest()] = data
        self.answer({})

    def answer(self, what, status=200):
        allowed = self.headers["Authorization"] == f"Bearer {TOKEN}" or self.path.startswith("/large/")
        data = json.dumps(what if allowed else {"error": "Invalid username or password."}).encode()
        self.send_response(status if allowed else 401)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url, server.files, server.large, server.created = f"http://127.0.0.1:{server.server_port}", {}, {}, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


def test_a_result_is_published_with_its_card_and_the_token_stays_secret(hub, model_folder, tmp_path, capfd):
    run = tmp_path / "run"
    train.main(arguments(model_folder, run, *FLAGS, "--lora_rank", "2"))
    told = capfd.readouterr()
    assert f"it is published at {hub.url}/someone/greener" in told.out and hub.created[0]["name"] == "greener"
    for name, data in hub.files.items():
        place = tmp_path / "published" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
    assert StableDiffusionPipeline.from_pretrained(tmp_path / "published").unet
    assert 'from_pretrained("someone/greener")' in ModelCard.load(tmp_path / "published" / "README.md").text
    of_run = {str(path.relative_to(run / "pipeline")) for path in (run / "pipeline").rglob("*") if path.is_file()}
    assert hub.files.keys() == of_run | {"lora/pytorch_lora_weights.safetensors"} and hub.large
    assert TOKEN not in told.out + told.err
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def test_who_may_not_publish_is_told_so_before_the_training(hub, model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN[:-1])
    line = refused(capsys, arguments(model_folder, tmp_path / "run", *FLAGS))
    assert "--push_to_hub someone/greener: Invalid user token" in line and TOKEN[:-1] not in line
    assert "must be USER/NAME" in refused(capsys, arguments(model_folder, tmp_path / "run", *FLAGS[:-1], "greener"))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_what_could_not_be_published_is_published_by_the_same_command(hub, model_folder, tmp_path, monkeypatch, capsys):
    argv = arguments(model_folder, tmp_path / "run", *FLAGS)
    with monkeypatch.context() as away:
        away.setattr(Hub, "do_PUT", lambda self: self.answer({"error": "full"}, 500))
        away.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        line = refused(capsys, argv)
    assert "cannot publish someone/greener: " in line and f"the result is in {tmp_path / 'run'}" in line
    train.main(argv)
    assert "unet/diffusion_pytorch_model.safetensors" in hub.files
