"""A codec's latents as the tokens of pictures and videos: they are the codec's, it stays as it is, and the model learns in them."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from metrics_codecs import Blur, Levels
from PIL import Image
from torch import Tensor, nn

import omnilatent
from omnilatent import OmniLatentConfig, OmniLatentModel
from omnilatent.cli.main import main
from omnilatent.codec import Codec, Provenance
from omnilatent.hub import BUNDLED
from omnilatent.latent import DiagonalGaussian, Latent, LatentSpec, Point
from omnilatent.omni.config import PairConfig
from omnilatent.omni.learning import OmniLearning
from omnilatent.omni.pairs import Job
from omnilatent.omni.saving import load, save
from omnilatent.omni.tokenizer import ByteTokenizer
from omnilatent.training.ema import EMA

SMALL = dict(hidden_dim=32, num_layers=2, num_heads=2, vocab_size=259, image_size=(16, 16), image_patch=8, video_size=(8, 8),
             video_frames=4, video_patch=(2, 8), mel_frames=8, mel_bands=4, flow_steps=2, gradient_checkpointing=False)


class Random(Codec):
    """A convolution with random weights each way, f4, 5 channels, a mean and a deviation each."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        module = nn.ModuleList([nn.Conv2d(3, 10, 4, 4), nn.ConvTranspose2d(5, 3, 4, 4)])
        spec = LatentSpec(5, 4, shift=(0.1, 0.2, 0.3, 0.4, 0.5), scale=(1.0, 2.0, 3.0, 4.0, 5.0))
        super().__init__(module, spec, Provenance("random", "test", weights_hash=f"{seed:016}"))

    def _encode(self, images: Tensor) -> Latent:
        return DiagonalGaussian(*self.module[0](images).chunk(2, 1), self.spec)

    def _decode(self, raw: Tensor) -> Tensor:
        return self.module[1](raw).sigmoid()


class Whole(Random):
    """One latent for a whole picture."""

    def _encode_any(self, images: Tensor) -> Latent:
        return Point(F.adaptive_avg_pool2d(super()._encode_any(images).mode(), 1))


def small(codecs: dict[str, Codec] | None = None, **changes: object) -> OmniLatentModel:
    torch.manual_seed(0)
    return OmniLatentModel(OmniLatentConfig(**{**SMALL, **changes}), codecs).eval()  # type: ignore[arg-type]


def both(codec: Codec | None = None) -> dict[str, Codec]:
    codec = codec or Random()
    return {"image": codec, "video": codec}


def rand(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", [(16, 24), (13, 18), (1, 1), (5, 33)])
@pytest.mark.parametrize("patch", [1, 2])
def test_what_is_cut_and_joined_is_the_codecs_own_reconstruction(size: tuple[int, int], patch: int) -> None:
    codec = Random()
    model = small(both(codec), latent_patch=patch)
    image, video = rand(2, 3, *size), rand(2, 3, 3, *size)
    part = model.part("image")
    patches = part.cut(image)
    assert patches.shape == (2, part.count(size), 5 * patch**2) and len(part.positions(size, image.device)) == part.count(size)
    assert torch.equal(part.join(patches, size), codec.reconstruct(image))
    part = model.part("video")
    patches, frames = part.cut(video), video.transpose(1, 2).flatten(0, 1)
    assert patches.shape == (2, part.count((3, *size)), 5 * 2 * patch**2)
    expected = codec.reconstruct(frames).unflatten(0, (2, 3)).transpose(1, 2)
    assert torch.allclose(part.join(patches, (3, *size)), expected, atol=1e-6)


def test_few_frames_at_a_time_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    part, video = small(both()).part("video"), rand(2, 3, 5, 9, 8)
    whole = part.cut(video)
    monkeypatch.setattr("omnilatent.omni.latents.PIXELS", 3 * 9 * 8)
    assert torch.allclose(part.cut(video), whole, atol=1e-6)


def test_the_identity_as_codec_gives_the_patches_of_pixels() -> None:
    image, video = rand(2, 3, 13, 18), rand(2, 3, 3, 13, 18)
    plain, through = small(), small(both(omnilatent.load("pixels")), latent_patch=8)
    for name, data in (("image", image), ("video", video)):
        assert torch.allclose(plain.part(name).cut(data), through.part(name).cut(data), atol=1e-6)
        with torch.no_grad():
            outputs = [model("image", image, name)["output"] for model in (plain, through)]
        assert torch.allclose(outputs[0].clamp(0, 1), outputs[1], atol=1e-4)


def test_tokens_and_pictures_are_the_codecs() -> None:
    first, second = (small(both(Random(seed))) for seed in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))
    ids, image, video = torch.randint(3, 259, (2, 5)), rand(2, 3, 13, 18), rand(2, 3, 5, 9, 8)
    with torch.no_grad():
        for source, data, target in (("image", image, "text"), ("video", video, "text"), ("text", ids, "image"),
                                     ("text", ids, "video")):
            one, other = (model(source, data, target)["output"] for model in (first, second))
            assert not torch.allclose(one, other, atol=1e-4)
        made = first("text", ids, "image", size=(10, 7))["output"]
        assert made.shape == (2, 3, 10, 7) and made.min() >= 0 and made.max() <= 1
        assert first.reconstruct("video", video)["output"].shape == video.shape
        assert first("text", ids, "image")["output"].shape == (2, 3, 16, 16)


def test_a_codec_is_no_part_of_the_model_and_learning_leaves_it() -> None:
    codec = Random()
    before = copy.deepcopy(codec.module.state_dict())
    model, image, ids = small(both(codec)), rand(2, 3, 13, 18).requires_grad_(), torch.randint(3, 259, (2, 5))
    own, plain = {id(p) for p in codec.module.parameters()}, small()
    assert not own & {id(p) for p in model.parameters()} and model.state_dict().keys() == plain.state_dict().keys()
    assert model.trainable_parameters()[0] == sum(p.numel() for p in model.parameters())
    assert EMA(model, 0.9).average.part("image").codec is codec  # a copy shares it
    learning = OmniLearning(model, PairConfig()).train()
    jobs = [Job((source,), target, flowing) for source in ("text", "image", "video") for target in ("image", "video")
            for flowing in (False, True)]
    data = {"text": ids, "image": image, "video": rand(2, 3, 5, 9, 8)}
    for job in jobs:
        learning(job, learning.needs(job, data, torch.Generator().manual_seed(0)))["loss"].backward()
    parts = [p for name in ("image", "video") for p in model.part(name).parameters()]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parts)
    assert image.grad is None and all(p.grad is None for p in codec.module.parameters())
    assert not codec.module.training and all(torch.equal(before[name], value) for name, value in codec.module.state_dict().items())


@pytest.mark.parametrize("flowing", [False, True])
def test_it_learns_in_latents(flowing: bool) -> None:
    model = small({"image": omnilatent.load("kl-f8-small")}, modalities=("text", "image"), latent_patch=1)
    learning, job = OmniLearning(model, PairConfig()), Job(("text",), "image", flowing)
    data = {"text": torch.arange(3, 11)[:, None], "image": F.interpolate(rand(8, 3, 2, 2), (32, 32), mode="bilinear")}
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)

    def loss(seed: int) -> Tensor:
        needed = learning.needs(job, data, torch.Generator().manual_seed(seed))
        terms = learning.terms(model.prefix({"text": data["text"]}), job, needed)
        return torch.stack(list(terms.values())).sum()

    with torch.no_grad():
        before = sum(float(loss(1_000 + i)) for i in range(4))
    for step in range(60):
        loss(step).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        assert sum(float(loss(1_000 + i)) for i in range(4)) < before / 2


def test_a_saved_model_finds_its_codec_again(tmp_path: Path) -> None:
    model = small(image_codec="kl-f8-small", video_codec="kl-f8-small", latent_patch=1)
    assert model.part("image").codec is model.part("video").codec
    save(tmp_path, model, ByteTokenizer(), None, "card")
    again, ids = load(tmp_path), torch.randint(3, 259, (1, 5))
    with torch.no_grad():
        for target in ("image", "video"):
            assert torch.equal(model("text", ids, target)["output"], again("text", ids, target)["output"])
    given = small(both())
    save(tmp_path, given, ByteTokenizer(), None, "card")
    sentence = r"tokens of image come from the codec random, which cannot be opened \(.* as image_codec into .*config.json"
    with pytest.raises(omnilatent.UserError, match=sentence):
        load(tmp_path)
    with pytest.raises(omnilatent.UserError, match="image from a codec with the weights 0{16}, and random has 0{15}1"):
        load(tmp_path, codecs=both(Random(1)))
    again = load(tmp_path, codecs=both())
    with torch.no_grad():
        assert torch.equal(given("text", ids, "image")["output"], again("text", ids, "image")["output"])


def test_a_codec_that_was_named_by_a_path_is_found_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(BUNDLED / "ovae-f8c4", tmp_path / "codec")
    monkeypatch.chdir(tmp_path)
    assert small(image_codec="codec").config.image_codec == str(tmp_path / "codec")


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(tmp_path / "run")
    flags = ["--image-codec", "kl-f8-small", "--video-codec", "ovae-f8c4", "--latent-patch", "1"]
    assert main(["train", "debug-omni", "--out", run, "--steps", "4", *flags]) == 0
    assert "Tokens of image: latents of kl-f8-small." in (tmp_path / "run" / "final" / "README.md").read_text(encoding="utf-8")
    assert not [name for name in load(run).state_dict() if "decoder" in name]
    capsys.readouterr()
    assert main(["info", run]) == 0
    told = capsys.readouterr().out
    assert "16 tokens of latents of kl-f8-small (f8, 4 channels; sha256" in told and "latents of ovae-f8c4" in told
    picture = tmp_path / "seven.png"
    assert main(["translate", run, "--text", "seven", "--to", "image", "--size", "30", "20", "--out", str(picture)]) == 0
    with Image.open(picture) as made:
        assert made.size == (20, 30)
    assert main(["train", "--resume", run, "--steps", "6"]) == 0
    assert main(["train", "debug-omni", "--init", run, "--out", str(tmp_path / "next"), "--steps", "2"]) == 0
    assert load(tmp_path / "next").config.video_codec == "ovae-f8c4"


@pytest.mark.parametrize(("argv", "sentence"), [
    (["--image-codec", "nowhere"], "nowhere is neither an existing path, a bundled model"),
    (["--image-codec", "lgq-small"], "lgq-small cannot give the tokens of image, since its latents are codes"),
    (["--video-codec", "ovae"], "ovae cannot give the tokens of video, since it only encodes"),
    (["--video-codec", "kl-f8-small", "--modalities", "text", "image"], "kl-f8-small is to give the tokens of video, and the mod"),
    (["--latent-patch", "0"], "latent_patch is at least 1; got 0"),
])
def test_a_command_that_cannot_be_ends_in_a_sentence(
    argv: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "debug-omni", "--out", str(tmp_path / "run"), *argv]) == 2
    told = capsys.readouterr()
    assert sentence in " ".join((told.err + told.out).replace("│", " ").split()) and "Traceback" not in told.err


@pytest.mark.parametrize(("codecs", "sentence"), [
    (lambda: {"audio": Random()}, "a codec gives the tokens of image and video; got one for audio"),
    (lambda: {"image": "kl-f8-small"}, "come from a codec, as omnilatent.load opens it; got str"),
    (lambda: {"image": Levels()}, "levels cannot give the tokens of image, since its latents are codes"),
    (lambda: {"image": Whole()}, "since it turns a picture of any size into a latent of 1x1"),
    (lambda: {"video": Grey()}, "since its pictures have 1 channels and the model's 3"),
])
def test_a_codec_that_gives_no_tokens_is_refused(codecs, sentence: str) -> None:  # noqa: ANN001
    with pytest.raises(omnilatent.UserError, match=sentence):
        small(codecs())


class Grey(Blur):
    """Of pictures with one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.spec = LatentSpec(1, 2, "point", 1)
