"""Clones for use: better than the mean on pictures that nobody has seen, and nothing mixed up when they are loaded."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from clones import Pictures, Teacher, forward_only, lesson_stores, run_steps, task_on, tiny
from safetensors.torch import load_file, save_file
from torch import Tensor

import omnilatent
from omnilatent import OrganicEncoder, hub
from omnilatent.codec import Codec
from omnilatent.data import EvaluationImages, demo_photos
from omnilatent.errors import UserError
from omnilatent.organic.cloning import check_teacher, way_of
from omnilatent.organic.dropin import Dropin, DropinCodec
from omnilatent.organic.fovea import Fovea
from omnilatent.organic.native import NativeAutoencoder, NativeConfig
from omnilatent.organic.pooled import Pooled, PooledCodec, PooledEncoder, Retina
from omnilatent.organic.pooled_learning import PooledConfig, agreement


@pytest.fixture(scope="module")
def pooled(tmp_path_factory: pytest.TempPathFactory) -> Pooled:
    torch.set_num_threads(1)
    config = tiny("pooled")
    stores = lesson_stores(tmp_path_factory.mktemp("lessons"), config, Pictures(40, side=256), Pictures(12, 100, 256))
    with forward_only():
        return run_steps(task_on(stores, config))._model()


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Dropin:
    torch.set_num_threads(1)
    config = tiny("grid", neurons=16)
    stores = lesson_stores(tmp_path_factory.mktemp("lessons"), config, Pictures(40), Pictures(12, 100))
    with forward_only():
        return run_steps(task_on(stores, config))._model()


def save(folder: Path, model: torch.nn.Module, latent: str, teacher: Codec | None = None) -> Path:
    """As a run does it, but in full precision."""
    folder.mkdir()
    way = way_of(teacher or Teacher(), tiny(latent), torch.device("cpu"), None)
    kind, config, spec = way.saved(model)
    hub.write_model(folder, kind, config, spec, dict(model.state_dict()), "")
    return folder


def fresh(count: int = 16, side: int = 64) -> Tensor:
    """Pictures that no clone has seen, uint8."""
    source = Pictures(count, 500, side)
    return torch.stack([torch.from_numpy(source.read(i).transpose(2, 0, 1).copy()) for i in range(count)])


# ---------------------------------------------------------------------------------------------------------------
# Pooled


def test_the_pooled_clone_beats_the_mean_on_fresh_pictures(pooled: Pooled) -> None:
    images = fresh(side=256)
    wanted = Teacher().encode(images).mode()[:, :4].mean((2, 3))
    found = agreement(pooled.encoder(images), wanted)
    assert found.r2 > 0.8
    assert found.r2 > agreement(pooled.encoder(images.flip(0)), wanted).r2 + 0.5  # null: other pictures' latents
    with pytest.raises(UserError, match=r"Dimension mismatch: .*\(16, 4\) against the teacher's \(16, 3\)"):
        agreement(wanted, wanted[:, :3])


def test_four_numbers_are_decoded_to_the_size_asked_for(pooled: Pooled, tmp_path: Path) -> None:
    codec, images = hub.load(save(tmp_path / "clone", pooled, "pooled")), fresh(side=256)
    small = torch.nn.functional.avg_pool2d(images / 255, 4)
    shown = torch.nn.functional.avg_pool2d(codec.decode(codec.encode(images)), 4)
    assert (shown - small).square().mean() < 0.7 * (small - small.mean(0)).square().mean()  # of the mean picture's
    odd = codec.encode(images[:2, :, :51, :37])
    assert odd.mode().shape == (2, 4, 1, 1) and codec.decode(odd).shape == (2, 3, 51, 37)
    assert codec.decode(odd.mode()).shape == (2, 3, 256, 256) and codec.decode(odd.mode(), (9, 300)).shape == (2, 3, 9, 300)
    assert codec.decode(odd).min() >= 0 and codec.decode(odd).max() <= 1


def test_any_size_goes_in_and_8_bits_are_the_same_picture(pooled: Pooled) -> None:
    images, encoder = fresh(2, 256), pooled.encoder
    assert torch.allclose(encoder(images), encoder(images.float() / 255), atol=1e-6)
    large = images.float().div(255).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.allclose(encoder(large), encoder(images), atol=0.15)
    with pytest.raises(ValueError, match=r"\(b, 3, h, w\); got \(2, 1, 256, 256\)"):
        encoder(images[:, :1])


def test_a_saved_pooled_clone_is_the_same_and_only_encodes(pooled: Pooled, tmp_path: Path) -> None:
    codec = hub.load(save(tmp_path / "clone", Pooled(pooled.encoder), "pooled"))
    latent = codec.encode(fresh(3))
    assert latent.mode().shape == (3, 4, 1, 1) and torch.equal(latent.mode()[..., 0, 0], pooled.encoder(fresh(3)))
    assert latent.size == (64, 64) and isinstance(codec, PooledCodec) and codec.parameter_count() > 0
    with pytest.raises(UserError, match="only encodes: it has no decoder.$"):
        codec.decode(latent)


def edit(folder: Path, part: str, change: dict[str, object]) -> None:
    """Change entries of the saved model."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    place = config["model"]
    for name in part.split("."):
        place = place[name]
    place |= change
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize(("change", "words"), [
    ({"kind": "dense"}, "retina dense 8×8 .* computes only pooled-patches"),
    ({"low": -1.0}, r"in \[-1, 1\], and this version computes only pooled-patches in \[0, 1\]"),
    ({"patch": 4}, r"is not the pooled clone of its config.json .*\[\d+, 192\].*\[\d+, 48\]"),
    ({"scales": [1, 2]}, "4 groups of neurons, but the retina pooled-patches 8×8 at 1/1, 1/2 of 256² .* has 2 scales"),
])
def test_another_retina_is_refused_by_name(pooled: Pooled, tmp_path: Path, change: dict[str, object], words: str) -> None:
    folder = save(tmp_path / "clone", pooled, "pooled")
    edit(folder, "retina", change)
    with pytest.raises(UserError, match=words):
        hub.load(folder)


def test_another_latent_size_is_refused_with_both_shapes(pooled: Pooled, tmp_path: Path) -> None:
    folder = save(tmp_path / "clone", pooled, "pooled")
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor[:3].clone() if "readout" in name else tensor for name, tensor in tensors.items()},
              folder / "model.safetensors")
    with pytest.raises(UserError, match=r"readout_bias: .*\[3\]\) from checkpoint.*\[4\]") as refusal:
        hub.load(folder)
    assert "\n" not in str(refusal.value)


def test_no_retina_that_does_not_tile_its_picture() -> None:
    with pytest.raises(UserError, match="patches fit the size at every scale"):
        Retina(size=100)
    with pytest.raises(UserError, match="41 neurons cannot be chosen among 40 candidates"):
        PooledConfig(neurons=41, candidates=10)
    with pytest.raises(UserError, match="a window of 9 pixels at 1/1 cannot be centred on a cell of 8"):
        Fovea(sides=(9, 8, 8, 7))
    with pytest.raises(UserError, match="Dimension mismatch: 1 groups of neurons"):
        PooledEncoder(Retina(), [3], 4)


# ---------------------------------------------------------------------------------------------------------------
# The bundled one


def test_the_bundled_encoder_runs_as_its_author_wrote_it() -> None:
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


def test_the_bundled_encoder_follows_its_teacher_and_only_encodes() -> None:
    images = torch.stack([image for _, image in EvaluationImages(demo_photos(), 256, limit=6)])
    codec = omnilatent.load("ovae")
    reference = json.loads((hub.BUNDLED / "ovae" / "config.json").read_text())["model"]["teacher"]
    teacher = omnilatent.load(reference["name"])
    assert teacher.provenance.weights_hash == reference["weights_hash"]
    wanted = torch.cat([teacher.encode(image[None]).mode().mean((2, 3)) for image in images])
    latent = codec.encode(images)
    found = agreement(latent.mode()[..., 0, 0], wanted)
    assert found.r2 > 0.9 and found.cosine > 0.9
    assert agreement(latent.mode()[..., 0, 0].roll(1, 0), wanted).r2 < 0.5  # null: another photo's
    with pytest.raises(UserError, match="^ovae only encodes: it has no decoder.$"):
        codec.decode(latent)


# ---------------------------------------------------------------------------------------------------------------
# Drop-ins


def test_drop_ins_beat_the_mean_and_need_the_right_picture(halves: Dropin) -> None:
    teacher, images = Teacher(), fresh().float() / 255
    z = teacher.encode(images).mode()
    found = halves.encoder(images)
    assert found.shape == z.shape
    assert (found - z).square().mean() < 0.4 * (z - z.mean((0, 2, 3), keepdim=True)).square().mean()
    shown = halves.decoder(z)
    assert shown.shape == images.shape
    assert (shown - images).square().mean() < 0.5 * (images - images.mean()).square().mean()
    assert (halves.decoder(z.flip(0)) - images).square().mean() > 3 * (shown - images).square().mean()


def test_a_saved_drop_in_is_the_same_in_any_size(halves: Dropin, tmp_path: Path) -> None:
    codec, images = hub.load(save(tmp_path / "both", halves, "grid")), fresh(2).float() / 255
    assert isinstance(codec, DropinCodec) and codec.teacher is None
    assert torch.equal(codec.encode(images).mode(), halves.encoder(images))
    assert torch.equal(codec.decode(halves.encoder(images)), halves.decoder(halves.encoder(images)).clamp(0, 1))
    assert codec.reconstruct(images[..., :51, :37]).shape == (2, 3, 51, 37)


def test_the_teacher_does_the_missing_half_and_must_be_the_same(
    halves: Dropin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [save(tmp_path / "encoder", Dropin(halves.encoder, None), "grid"),
               save(tmp_path / "decoder", Dropin(None, halves.decoder), "grid")]
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


def test_a_drop_in_finds_its_teacher_from_anywhere(
    halves: Dropin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    model = NativeAutoencoder(NativeConfig(channels=6, sizes=((2, 192),)))
    torch.nn.init.normal_(model.analysis, std=0.1)
    Path("teacher").mkdir()
    hub.write_model(Path("teacher"), "ovae", vars(model.config), Teacher().spec, dict(model.state_dict()), "")
    teacher = hub.load("teacher")
    folder = save(tmp_path / "clone", Dropin(halves.encoder, None), "grid", teacher)
    monkeypatch.chdir(tmp_path)
    z = torch.randn(1, 6, 4, 4)
    assert torch.equal(hub.load(folder).decode(z), teacher.decode(z))
    shutil.move(tmp_path / "work" / "teacher", tmp_path / "moved")
    with pytest.raises(UserError, match=r"from teacher, which is not at .*work/teacher any more: put it back"):
        hub.load(folder)


def test_a_teacher_from_the_hub_is_asked_for_there_where_its_folder_is_gone(
    halves: Dropin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = Teacher()
    teacher.provenance = replace(teacher.provenance, name="owner/toy", path=str(tmp_path / "cache"))
    folder = save(tmp_path / "clone", Dropin(halves.encoder, None), "grid", teacher)
    asked: list[str] = []

    def load(name: str) -> Codec:
        asked.append(name)
        return teacher

    whole = hub.load  # of the clone itself; what it asks for goes through `dropin.hub`
    monkeypatch.setattr("omnilatent.organic.dropin.hub.load", load)
    assert whole(folder).teacher is teacher and asked == ["owner/toy"]


def test_another_eye_or_another_shape_is_refused(halves: Dropin, tmp_path: Path) -> None:
    folder = save(tmp_path / "clone", halves, "grid")
    shutil.copytree(folder, tmp_path / "other")
    edit(folder, "encoder.fovea", {"kind": "pinhole"})
    with pytest.raises(UserError, match=r"behind the retina pinhole \(.*8 px at 1/1.*computes only fovea in \[0, 1\]"):
        hub.load(folder)
    edit(tmp_path / "other", "encoder.fovea", {"components": [9, 9, 9, 9]})
    with pytest.raises(UserError, match=r"is not a whole drop-in .*kernel_1.*\[9, 3, 8, 8\]") as refusal:
        hub.load(tmp_path / "other")
    assert "\n" not in str(refusal.value)
    lean = NativeAutoencoder(NativeConfig(channels=5, sizes=((2, 192),))).decoder
    with pytest.raises(UserError, match=r"Dimension mismatch: the encoder gives .*\(b, 6, h, w\), .*takes \(b, 5, h, w\)"):
        Dropin(halves.encoder, lean)


@pytest.mark.parametrize(("latent", "changed", "says"), [
    ("grid", {"downsampling": 4}, r"toy has one latent pixel for 4² pixels, and the retina fovea .* one for 8²"),
    ("pooled", {"downsampling": 256}, r"toy gives 1 latent pixels a side of 256 pixels, .* choose another teacher"),
    ("grid", {"image_channels": 1}, r"toy works on pictures of 1 channels, and an organic retina sees three"),
])
def test_a_teacher_without_such_a_latent_is_refused(latent: str, changed: dict[str, int], says: str) -> None:
    teacher = Teacher()
    check_teacher(teacher, tiny(latent))
    teacher.spec = replace(teacher.spec, **changed)
    with pytest.raises(UserError, match=says):
        check_teacher(teacher, tiny(latent))
