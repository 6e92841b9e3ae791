"""`omnilatent info`, `export` and `push`, and loading by hub id; the hub is a server in this process."""

import base64
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

import omnilatent
from omnilatent import hub
from omnilatent.cli.main import main

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random AutoencoderKL as a diffusers folder with a card."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        block_out_channels=(16, 16), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=3, scaling_factor=0.7, shift_factor=0.2,
    ).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: openrail\n---\n# Tiny\n\nPSNR 12.3 dB\n", encoding="utf-8")
    return folder


def sentence(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run a command that is to fail as a user's mistake."""
    assert main(list(argv)) == 2
    error = capsys.readouterr().err
    assert error.startswith("omnilatent: ") and error.count("\n") == 1, error
    return error


# info


def test_info_lists_recipes_and_codecs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for name in [*hub.RECIPES, *hub.WEIGHTLESS, *hub.bundled_names()]:
        assert f"  {name}\n" in text
    assert "Expected" in text and "not described" not in text


@pytest.mark.parametrize(
    ("argv", "code"),
    [(["info"], 0), (["info", "--help"], 0), (["export", "--help"], 0), (["push", "--help"], 0), (["export", "x"], 2),
     (["export", "x", "--to", "pdf", "--out", "y"], 2), (["push", "x", "not-a-repository"], 2), (["push", "x"], 2)],
)
def test_answers_without_torch(argv: list[str], code: int) -> None:
    script = ("import sys; from omnilatent.cli.main import main; code = main(sys.argv[1:]); "
              "assert 'torch' not in sys.modules, 'torch was imported'; sys.exit(code)")
    done = subprocess.run([sys.executable, "-c", script, *argv], capture_output=True, text=True)
    assert done.returncode == code, done.stderr


def test_info_describes_a_codec(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", f"Mine:{model}"]) == 0
    text = capsys.readouterr().out
    codec = omnilatent.load(model)
    for fact in ("Mine", "gaussian, 3 channels, f2", "3x128x128", "(z - 0.2) * 0.7", f"{codec.parameter_count():,}",
                 codec.provenance.weights_hash, "openrail", "PSNR 12.3 dB"):
        assert fact in text, fact
    assert "license:" not in text  # the card without its front matter
    assert "no such" not in text


# export


@torch.no_grad()
def test_export_opens_in_diffusers_with_equal_output(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "exported"
    assert main(["export", str(model), "--to", "diffusers", "--out", str(out)]) == 0
    theirs = diffusers.AutoencoderKL.from_pretrained(out)
    codec = omnilatent.load(model)
    images = torch.rand(1, 3, 16, 16)
    latent = codec.encode(images)
    z = (theirs.encode(images * 2 - 1).latent_dist.mode() - theirs.config.shift_factor) * theirs.config.scaling_factor
    assert (latent.mode() - z).abs().max() <= 1e-5
    raw = z / theirs.config.scaling_factor + theirs.config.shift_factor
    assert (codec.decode(latent) - (theirs.decode(raw).sample / 2 + 0.5).clamp(0, 1)).abs().max() <= 1e-5
    card = (out / "README.md").read_text(encoding="utf-8")
    assert hub.card_licence(out) == "openrail" and "PSNR 12.3 dB" in card and codec.provenance.weights_hash in card
    assert torch.equal(omnilatent.load(out).decode(latent), codec.decode(latent))


def test_export_of_a_checkpoint_of_ours(tmp_path: Path) -> None:
    from omnilatent.autoencoders.config import KLConfig
    from omnilatent.autoencoders.kl import build_vae

    config = KLConfig(widths=(8, 8), layers=1, norm_groups=4)
    spec = omnilatent.LatentSpec(config.latent_channels, 2, scale=(0.5,), shift=(0.25,))
    with hub.new_folder(tmp_path / "ours") as folder:
        from dataclasses import asdict

        hub.write_model(folder, "kl", asdict(config), spec, build_vae(config, spec).state_dict(), "# Ours\n")
    ours = omnilatent.load(tmp_path / "ours")
    latent = ours.encode(torch.rand(1, 3, 9, 8))
    for to, out in (("diffusers", tmp_path / "d"), ("safetensors", tmp_path / "s.safetensors")):
        assert main(["export", str(tmp_path / "ours"), "--to", to, "--out", str(out)]) == 0
        other = omnilatent.load(out)
        assert (other.spec.shift, other.spec.scale) == ((0.25,), (0.5,))
        assert (other.decode(latent) - ours.decode(latent)).abs().max() <= 1e-5
    assert omnilatent.load(tmp_path / "ours" / "model.safetensors").provenance.kind == "kl"


@pytest.mark.parametrize("name", ["AutoencoderKL", "AutoencoderDC"])
def test_one_file_carries_its_configuration(tmp_path: Path, name: str) -> None:
    """Neither 4 norm groups nor a scaling factor, nor anything of a DC autoencoder, could be told from shapes."""
    config: dict[str, Any] = dict(latent_channels=4, scaling_factor=0.123)
    if name == "AutoencoderKL":
        config |= dict(block_out_channels=(16,), norm_num_groups=4)
    else:
        config["attention_head_dim"] = 4
        for half in ("encoder", "decoder"):
            config |= {f"{half}_block_types": "ResBlock", f"{half}_block_out_channels": (8, 8),
                       f"{half}_layers_per_block": (1, 1), f"{half}_qkv_multiscales": ((), ())}
    getattr(diffusers, name)(**config).save_pretrained(tmp_path / "m")
    out = tmp_path / "one.safetensors"
    assert main(["export", str(tmp_path / "m"), "--to", "safetensors", "--out", str(out), "--dtype", "float16"]) == 0
    codec = omnilatent.load(out, dtype=torch.float16)
    original = omnilatent.load(tmp_path / "m")
    assert codec.spec == original.spec
    for key, tensor in codec.module.state_dict().items():
        assert torch.equal(tensor, original.module.state_dict()[key].half()), key


def test_export_destroys_nothing(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.jpg").write_bytes(b"x")
    export = ("export", str(model), "--to", "diffusers", "--out", str(photos))
    assert "is a folder with something in it: give a new one, or add --overwrite" in sentence(capsys, *export)
    assert "holds other things than a model" in sentence(capsys, *export, "--overwrite")
    assert (photos / "a.jpg").exists()
    out = tmp_path / "model"
    for extra in ([], ["--overwrite"]):
        assert main(["export", str(model), "--to", "diffusers", "--out", str(out), *extra]) == 0
    file = tmp_path / "m.safetensors"
    export = ("export", str(model), "--to", "safetensors", "--out", str(file))
    assert main(list(export)) == 0
    assert "exists: add --overwrite" in sentence(capsys, *export)
    assert main([*export, "--overwrite"]) == 0
    assert "ends with .safetensors" in sentence(capsys, *export[:-1], str(tmp_path / "x.bin"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.safetensors", "model", "photos"]


def test_what_cannot_be_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = sentence(capsys, "export", "pixels", "--to", "diffusers", "--out", str(tmp_path / "x"))
    assert "pixels cannot be exported: diffusers has no class for a codec of the kind pixels" in error
    assert not (tmp_path / "x").exists()


# push, and loading by hub id


class Hub(ThreadingHTTPServer):
    """As much of the hub as push and load need: `repositories` maps owner/name to {path: content}."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.requests: list[tuple[str, str, Any]] = []
        self.tokens: set[str | None] = set()
        self.refuse: int | None = None
        self.gated: set[str] = set()
        self.private: set[str] = set()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answers(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for key, text in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.split("?")[0]
        lines = [json.loads(line) for line in body.splitlines()]
        self.server.requests.append(("POST", path, lines))
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.server.refuse:
            self.answer({"error": "no"}, self.server.refuse)
        elif path == "/api/repos/create":
            name = f"{lines[0]['organization']}/{lines[0]['name']}"
            if name not in self.server.repositories and "private" in json.dumps(lines[0]):
                self.server.private.add(name)
            self.server.repositories.setdefault(name, {})
            self.answer({"url": f"{self.server.address}/{name}"})
        elif path == "/api/validate-yaml":
            head = lines[0]["content"].split("---")[1]
            made_up = [{"message": '"license" must be one of apache-2.0, mit, other'}] if "license: our own" in head else []
            self.answer({"warnings": [], "errors": made_up}, 400 if made_up else 200)
        elif path.endswith("/preupload/main"):
            self.answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                                   for f in lines[0]["files"]]})
        elif path.endswith("/commit/main"):
            name = path.removeprefix("/api/models/").removesuffix("/commit/main")
            for line in lines:
                if line["key"] == "file":
                    self.server.repositories[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitUrl": f"{self.server.address}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40})
        else:
            self.answer({"error": f"unexpected {path}"}, 404)

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.server.requests.append((self.command, path, None))
        commit = {"X-Repo-Commit": "0" * 40}
        if path.startswith("/api/models/"):
            name = "/".join(path.split("/")[3:5])
            if name not in self.server.repositories:
                return self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            content = self.server.repositories[name]
            if "/tree/" in path:
                return self.answer([{"type": "file", "path": file, "size": len(data), "oid": f"{hash(data) & 0xFFFF:x}"}
                                    for file, data in content.items()])
            return self.answer({"id": name, "sha": "0" * 40, "private": name in self.server.private,
                                "siblings": [{"rfilename": file} for file in content]})
        _, owner, repository, _, _, *file = path.split("/")  # /owner/repository/resolve/REVISION/file
        content = self.server.repositories.get(f"{owner}/{repository}")
        if content is None:
            self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif f"{owner}/{repository}" in self.server.gated:
            self.answer({"error": "Access is restricted"}, 403, {"X-Error-Code": "GatedRepo"})
        elif "/".join(file) not in content:
            self.answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound", **commit})
        else:
            data = content["/".join(file)]
            self.answer(data, headers={"ETag": f'"{hash(data) & 0xFFFF:x}"', **commit})

    do_HEAD = do_GET


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    import huggingface_hub
    from huggingface_hub import constants, hf_api

    stub = Hub()
    thread = threading.Thread(target=stub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", stub.address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                        stub.address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(hf_api.api, "endpoint", stub.address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_stub")
    huggingface_hub.utils.disable_progress_bars()
    yield stub
    stub.shutdown()
    stub.server_close()
    thread.join()


def test_push_and_load_back(
    model: Path, server: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    folder = shutil.copytree(model, tmp_path / "mine")
    (folder / "training.pt").write_bytes(b"state")
    (folder / "secret").mkdir()
    (folder / "secret" / "x.json").write_text("{}", encoding="utf-8")
    assert main(["push", str(folder), "me/tiny", "--private", "--endpoint", server.address]) == 0
    assert f"pushed to {server.address}/me/tiny/commit/" in capsys.readouterr().out
    created = next(body[0] for _, path, body in server.requests if path == "/api/repos/create")
    assert (created["organization"], created["name"]) == ("me", "tiny")
    assert created.get("visibility") == "private" or created.get("private") is True
    assert server.tokens == {"Bearer hf_stub"}
    pushed = server.repositories["me/tiny"]
    assert sorted(pushed) == ["README.md", "config.json", "diffusion_pytorch_model.safetensors"]
    assert all(content == (model / name).read_bytes() for name, content in pushed.items())

    monkeypatch.chdir(tmp_path)
    codec = omnilatent.load("Theirs:me/tiny")
    assert codec.label == "Theirs" and codec.provenance.licence == "openrail"
    assert codec.provenance.weights_hash == omnilatent.load(model).provenance.weights_hash
    server.repositories.clear()  # from the cache, without the hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert omnilatent.load("me/tiny").provenance.weights_hash == codec.provenance.weights_hash


def test_a_pipelines_vae_is_loaded_and_nothing_else(
    model: Path, server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {f"vae/{file.name}": file.read_bytes() for file in model.iterdir() if file.name != "README.md"}
    server.repositories["sd/pipe"] = {
        **files, "README.md": b"---\nlicense: mit\n---\n", "model_index.json": b"{}", "unet/x.safetensors": b"huge"}
    codec = omnilatent.load("sd/pipe")
    assert codec.provenance.licence == "mit" and codec.spec.scale == (0.7,)
    assert not any("unet" in path for _, path, _ in server.requests)


def test_what_the_hub_has_not(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(omnilatent.UserError, match="me/none is no path here, and the hub has no such model"):
        omnilatent.load("me/none")
    server.repositories["me/gated"] = {}
    server.gated.add("me/gated")
    with pytest.raises(omnilatent.UserError, match="gives me/gated only to those who accepted its terms"):
        omnilatent.load("me/gated")
    server.repositories["me/text"] = {"README.md": b"x"}
    with pytest.raises(omnilatent.UserError, match="me/text holds no config.json, neither at its root nor in vae/"):
        omnilatent.load("me/text")


def test_what_cannot_be_pushed(
    model: Path, server: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "write owner/repo" in sentence(capsys, "push", str(model), "tiny")
    assert "pixels has no weights to upload" in sentence(capsys, "push", "pixels", "me/x")
    file = str(model / "diffusion_pytorch_model.safetensors")
    assert "is one file: make a folder of it with 'omnilatent export" in sentence(capsys, "push", file, "me/x")
    assert "is neither an existing path" in sentence(capsys, "push", "nonsense", "me/x")
    server.refuse = 403
    refused = sentence(capsys, "push", str(model), "me/x", "--endpoint", server.address)
    assert "refused the upload to me/x (HTTP 403): use a token that may write there" in refused
    monkeypatch.delenv("HF_TOKEN")
    assert "run 'hf auth login'" in sentence(capsys, "push", str(model), "me/x")


def test_what_was_to_be_private_does_not_become_public(
    model: Path, server: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    server.repositories["me/open"] = {}
    push = ["push", str(model), "me/open", "--endpoint", server.address]
    assert "me/open exists on the hub and is public: make it private" in sentence(capsys, *push, "--private")
    assert server.repositories["me/open"] == {}
    server.private.add("me/open")
    assert main([*push, "--private"]) == 0 and "config.json" in server.repositories["me/open"]


def test_a_card_that_the_hub_refuses(
    model: Path, server: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    folder = shutil.copytree(model, tmp_path / "mine")
    (folder / "README.md").write_text("---\nlicense: our own\n---\n# Mine\n", encoding="utf-8")
    refused = sentence(capsys, "push", str(folder), "me/x", "--endpoint", server.address)
    assert refused.startswith(f"omnilatent: The hub refused the README.md of {folder} (") and "license" in refused
    assert not server.repositories.get("me/x")


def test_push_without_a_network(model: Path, server: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = "http://127.0.0.1:9"  # the discard port: nothing listens
    error = sentence(capsys, "push", str(model), "me/x", "--endpoint", nowhere)
    assert f"The hub {nowhere} could not be reached" in error
