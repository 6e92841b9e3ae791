"""Clones of a teacher: learned without gradients or solvers, better than the mean, and nothing mixed up when loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import omnilatent
from omnilatent import hub
from omnilatent.codec import Codec, Provenance
from omnilatent.data.structured import structured_image
from omnilatent.errors import UserError
from omnilatent.latent import Latent, LatentSpec, Point
from omnilatent.organic import dropin, pooled
from omnilatent.organic.dropin import Dropin, DropinCodec
from omnilatent.organic.dropin_learning import debug_decoder, debug_encoder, learn_decoder, learn_encoder
from omnilatent.organic.pairs import forward_selection
from omnilatent.organic.pooled import PooledCodec, PooledEncoder, Retina
from omnilatent.organic.pooled_learning import agreement, debug, learn


class Pictures:
    """Structured pictures of 64² pixels, as a source."""

    def __init__(self, count: int, first: int = 0) -> None:
        self.name, self.count, self.first = "pictures", count, first

    def __len__(self) -> int:
        return self.count

    def key(self, i: int) -> str:
        return str(self.first + i)

    def read(self, i: int) -> np.ndarray:
        return structured_image(0, self.first + i, 64)


class Halves(nn.Module):
    """A made-up autoencoder of 6 channels whose encoder is not linear."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inward = nn.Conv2d(3, channels, 8, 8)
        self.outward = nn.ConvTranspose2d(channels, 3, 8, 8)
        self.inward.weight.data.mul_(4)


class Teacher(Codec):
    def __init__(self, channels: int = 6, weights_hash: str = "0123") -> None:
        spec = LatentSpec(channels=channels, downsampling=8, kind="point")
        super().__init__(Halves(channels), spec, Provenance("toy", "toy", weights_hash))

    def _encode(self, images: Tensor) -> Latent:
        return Point(torch.tanh(self.module.inward(images)) + 0.5)

    def _decode(self, raw: Tensor) -> Tensor:
        return torch.sigmoid(self.module.outward(raw))


PHOTOS, HELD_OUT = Pictures(40), Pictures(12, 100)


@contextmanager
def forward_only() -> Iterator[None]:
    """Gradients and solvers raise."""
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a clone is learned from forward evaluations")

    places = [(torch.linalg, name) for name in ("solve", "lstsq", "inv", "pinv", "solve_triangular")]
    places += [(torch, name) for name in ("inverse", "pinverse", "cholesky_solve", "lu_solve", "triangular_solve")]
    places += [(torch.autograd, "backward"), (torch.autograd, "grad"), (Tensor, "backward")]
    with pytest.MonkeyPatch.context() as patch:
        for place, name in places:
            patch.setattr(place, name, refuse)
        yield


@pytest.fixture(scope="module")
def clone() -> PooledEncoder:
    with forward_only():
        return learn(Teacher(), PHOTOS, HELD_OUT, debug())[0]


@pytest.fixture(scope="module")
def halves() -> Dropin:
    with forward_only():
        encoder, seen = learn_encoder(Teacher(), PHOTOS, HELD_OUT, debug_encoder())
        decoder, shown = learn_decoder(Teacher(), PHOTOS, HELD_OUT, debug_decoder())
    assert seen.r2 > 0.5 and shown.r2 > 0.5  # of the mean's loss, on held-out pictures
    return Dropin(encoder, decoder)


def test_the_check_refuses_a_gradient_and_a_solver() -> None:
    with forward_only():
        with pytest.raises(AssertionError, match="from forward evaluations"):
            torch.ones(1, requires_grad=True).sum().backward()
        with pytest.raises(AssertionError, match="from forward evaluations"):
            torch.linalg.solve(torch.eye(2), torch.ones(2))


def fresh(count: int = 16) -> Tensor:
    """Pictures that no clone has seen, uint8."""
    source = Pictures(count, 500)
    return torch.stack([torch.from_numpy(source.read(i).transpose(2, 0, 1).copy()) for i in range(count)])


def test_the_pooled_clone_beats_the_mean_on_fresh_pictures(clone: PooledEncoder) -> None:
    wanted = Teacher().encode(fresh()).mode()[:, :4].mean((2, 3))
    found = agreement(clone(fresh()), wanted)
    assert found.r2 > 0.5
    assert found.r2 > agreement(clone(fresh().flip(0)), wanted).r2 + 0.5  # null: other pictures' latents


def test_learning_is_a_function_of_its_seed(clone: PooledEncoder) -> None:
    again, report = learn(Teacher(), PHOTOS, HELD_OUT, debug())
    other, _ = learn(Teacher(), PHOTOS, HELD_OUT, debug(), seed=1)
    assert torch.equal(again(fresh()), clone(fresh())) and not torch.equal(other(fresh()), clone(fresh()))
    assert 0 < sum(report.neurons) <= debug().neurons and report.held_out.r2 > report.mean_null.r2


def test_any_size_goes_in_and_8_bits_are_the_same_picture(clone: PooledEncoder) -> None:
    images = fresh(2)
    assert torch.allclose(clone(images), clone(images.float() / 255), atol=1e-6)
    large = images.float().div(255).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.allclose(clone(large), clone(images), atol=0.15)
    with pytest.raises(ValueError, match=r"\(b, 3, h, w\); got \(2, 1, 64, 64\)"):
        clone(images[:, :1])


def save_pooled(folder: Path, clone: PooledEncoder) -> Path:
    folder.mkdir()
    hub.write_model(folder, pooled.KIND, pooled.checkpoint_of(clone, Teacher().provenance), pooled.spec_of(clone),
                    dict(clone.state_dict()), "")
    return folder


def test_a_saved_pooled_clone_is_the_same_and_only_encodes(clone: PooledEncoder, tmp_path: Path) -> None:
    codec = hub.load(save_pooled(tmp_path / "clone", clone))
    latent = codec.encode(fresh(3))
    assert latent.mode().shape == (3, 4, 1, 1) and torch.equal(latent.mode()[..., 0, 0], clone(fresh(3)))
    assert latent.size == (64, 64) and isinstance(codec, PooledCodec) and codec.parameter_count() > 0
    with pytest.raises(UserError, match="only encodes: it has no decoder.$"):
        codec.decode(latent)


def edit(folder: Path, change: dict[str, object]) -> None:
    """Change entries of the saved retina."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["model"]["retina"] |= change
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize(("change", "words"), [
    ({"kind": "dense"}, "retina dense 8×8 .* computes only pooled-patches"),
    ({"low": -1.0}, r"in \[-1, 1\], and this version computes only pooled-patches in \[0, 1\]"),
    ({"patch": 4}, r"neurons of shape \(\d+, 192\) on patches of 48 numbers"),
])
def test_another_retina_is_refused_by_name(
    clone: PooledEncoder, tmp_path: Path, change: dict[str, object], words: str
) -> None:
    folder = save_pooled(tmp_path / "clone", clone)
    edit(folder, change)
    with pytest.raises(UserError, match=words):
        hub.load(folder)


def test_another_latent_size_is_refused_with_both_shapes(clone: PooledEncoder, tmp_path: Path) -> None:
    folder = save_pooled(tmp_path / "clone", clone)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"readout_weight": tensors["readout_weight"][:3].clone(),
                         "readout_bias": tensors["readout_bias"][:3].clone()}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"\(b, 3, 1, 1\), but its config.json states \(b, 4, 1, 1\)"):
        hub.load(folder)
    with pytest.raises(UserError, match=r"latents of shape \(b, 2, h, w\), and the clone is to give \(b, 4\)"):
        learn(Teacher(2), PHOTOS, HELD_OUT, debug())


def test_no_retina_that_does_not_tile_its_picture() -> None:
    with pytest.raises(UserError, match="patches fit the size at every scale"):
        Retina(size=100)
    with pytest.raises(UserError, match="40 neurons cannot be chosen among 20 candidates"):
        replace(debug(), neurons=40, candidates=10)


def test_the_bundled_encoder_runs_as_its_author_wrote_it() -> None:
    from omnilatent import OrganicEncoder

    encoder = OrganicEncoder().eval()
    with torch.no_grad():
        tensor = torch.rand(1, 3, 256, 256)
        latent = encoder(tensor)
    assert latent.shape == (1, 4) and latent.isfinite().all()
    with pytest.raises(ValueError, match=r"images are in \[0, 1\].*got values from -1"):
        encoder(tensor * 2 - 1)
    with pytest.raises(UserError, match="pixels is a codec of the kind pixels"):
        OrganicEncoder("pixels")
    files = sum(file.stat().st_size for file in (hub.BUNDLED / "ovae").iterdir())
    assert files <= 1_300_000


def test_the_bundled_encoder_follows_its_teacher() -> None:
    from omnilatent.data import EvaluationImages, demo_photos

    images = torch.stack([image for _, image in EvaluationImages(demo_photos(), 256, limit=8)])
    wanted = torch.cat([omnilatent.load("kl-f8-small").encode(image[None]).mode().mean((2, 3)) for image in images])
    found = agreement(omnilatent.load("ovae").encode(images).mode()[..., 0, 0], wanted)
    assert found.r2 > 0.9 and found.cosine > 0.9


def test_forward_selection_finds_what_the_targets_are_made_of() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(400, 30, generator=generator)
    features[:, 9] = features[:, 4] + 0.01 * torch.randn(400, generator=generator)  # a copy adds nothing
    targets = features[:, [4, 17]] @ torch.tensor([[2.0, 0.0], [1.0, 1.5]]) + 0.3 * features[:, 2:3]
    assert set(forward_selection(features, targets, 3).tolist()) in ({4, 17, 2}, {9, 17, 2})
    assert forward_selection(features, targets, 2, forced=5).min() >= 5


def test_drop_ins_beat_the_mean_and_need_the_right_picture(halves: Dropin) -> None:
    teacher, images = Teacher(), fresh().float() / 255
    z = teacher.encode(images).mode()
    found = halves.encoder(images)
    assert found.shape == z.shape
    assert (found - z).square().mean() < 0.5 * (z - z.mean((0, 2, 3), keepdim=True)).square().mean()
    shown = halves.decoder(z)
    assert shown.shape == images.shape
    assert (shown - images).square().mean() < 0.5 * (images - images.mean()).square().mean()
    assert (halves.decoder(z.flip(0)) - images).square().mean() > 4 * (shown - images).square().mean()


def test_a_saved_drop_in_is_the_same_in_any_size(halves: Dropin, tmp_path: Path) -> None:
    folder = save_dropin(tmp_path / "both", halves)
    codec, images = hub.load(folder), fresh(2).float() / 255
    assert isinstance(codec, DropinCodec) and codec.teacher is None
    assert torch.equal(codec.encode(images).mode(), halves.encoder(images))
    assert torch.equal(codec.decode(halves.encoder(images)), halves.decoder(halves.encoder(images)).clamp(0, 1))
    assert codec.reconstruct(images[..., :51, :37]).shape == (2, 3, 51, 37)


def save_dropin(folder: Path, module: Dropin) -> Path:
    teacher = Teacher()
    spec = LatentSpec(channels=module.channels, downsampling=8, kind="point")
    folder.mkdir()
    hub.write_model(folder, dropin.KIND, dropin.checkpoint_of(module, teacher), spec, dict(module.state_dict()), "")
    return folder


def test_the_teacher_does_the_missing_half_and_must_be_the_same(
    halves: Dropin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [save_dropin(tmp_path / "encoder", Dropin(halves.encoder, None)),
               save_dropin(tmp_path / "decoder", Dropin(None, halves.decoder))]
    load, teachers = hub.load, [Teacher()]
    monkeypatch.setattr(hub, "load", lambda name, *rest: teachers[0] if name == "toy" else load(name, *rest))
    images = fresh(2).float() / 255
    z = halves.encoder(images)
    encodes, decodes = (hub.load(folder) for folder in folders)
    assert torch.equal(encodes.encode(images).mode(), z)
    assert torch.equal(encodes.decode(z), teachers[0].decode(z))
    assert torch.equal(decodes.encode(images).mode(), teachers[0].encode(images).mode())
    teachers[0] = Teacher(weights_hash="4567")
    with pytest.raises(UserError, match="weights 0123, and toy now has 4567"):
        hub.load(folders[0])
    teachers[0] = Teacher(channels=5)
    with pytest.raises(UserError, match=r"latents of shape \(b, 6, h/8, w/8\), and toy on \(b, 5, h/8, w/8\)"):
        hub.load(folders[0])
