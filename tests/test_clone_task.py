"""A clone as a run: lessons that go on where they were interrupted, steps that can be cut anywhere, two processes.

Run as a program with a folder, this file is what the test of two real processes starts.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from clones import Pictures, Teacher, forward_only, lesson_stores, run_steps, task_on, tiny
from safetensors.torch import load_file
from test_organic_layers import plain, saved
from test_organic_learner import assert_equal, together
from torch import Tensor

from omnilatent import hub
from omnilatent.cli import clone as command
from omnilatent.data import EvaluationImages, resize_and_crop
from omnilatent.errors import UserError
from omnilatent.latent import Latent
from omnilatent.organic.clone_config import CloneConfig
from omnilatent.organic.clone_task import GradientTask, OrganicTask, run_config
from omnilatent.organic.dropin_learning import decoder_responses
from omnilatent.organic.lessons import Lessons, LessonStore, write_lessons
from omnilatent.store import Store
from omnilatent.training.checkpoint import checkpoints
from omnilatent.training.config import RunConfig
from omnilatent.training.loop import launch_fabric

CPU = RunConfig(device="cpu", amp=False)
KINDS = {"grid": tiny("grid"), "native": tiny("native", sweeps=2), "pooled": tiny("pooled"),
         "grid decoder": tiny("grid", part="decoder", layers=3)}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


Stores = tuple[LessonStore, LessonStore]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stores]:
    """Lessons by kind; those of 64² are shared."""
    folder = tmp_path_factory.mktemp("lessons")
    small = lesson_stores(folder / "64", KINDS["grid"], Pictures(40), Pictures(12, 100))
    large = lesson_stores(folder / "256", KINDS["pooled"], Pictures(40, side=256), Pictures(12, 100, 256))
    return {kind: large if kind == "pooled" else small for kind in KINDS}


# ---------------------------------------------------------------------------------------------------------------
# Lessons


class Silent(Teacher):
    """A teacher that is not to be asked."""

    def _encode(self, images: Tensor) -> Latent:
        raise AssertionError("the teacher is asked again")


def rows(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """All lessons by their keys."""
    store = Store(folder)
    return {key: (store.array(i, "picture").copy(), store.array(i, "latent").copy()) for i, key in enumerate(store.keys)}


def assert_same_rows(a: Path, b: Path) -> None:
    first, second = rows(a), rows(b)
    assert first.keys() == second.keys() and first
    for key, (picture, latent) in first.items():
        assert (picture == second[key][0]).all()
        np.testing.assert_allclose(latent, second[key][1], atol=2e-3)  # batches of other sizes round otherwise


def test_lessons_are_the_protocols_square_and_random_ones(tmp_path: Path) -> None:
    photos = Pictures(5, side=80)
    write_lessons(tmp_path / "a", Teacher(), photos, 64, views=3)
    found = rows(tmp_path / "a")
    assert set(found) == {f"{i:04}#{view}" for i in range(5) for view in range(3)}
    shown = dict(EvaluationImages(photos, 64))
    for i in range(5):
        views = [found[f"{i:04}#{view}"] for view in range(3)]
        square = resize_and_crop(photos.read(i), 64).transpose(2, 0, 1)
        assert (views[0][0] == square).all() and torch.allclose(shown[f"{i:04}"], torch.from_numpy(square) / 255)
        for picture, latent in views:
            wanted = Teacher().encode(torch.from_numpy(picture)[None]).mode()[0].half()
            np.testing.assert_allclose(latent, wanted.numpy(), atol=2e-3)
    write_lessons(tmp_path / "b", Teacher(), photos, 64, views=3, seed=1)
    other = rows(tmp_path / "b")
    assert (other["0000#0"][0] == found["0000#0"][0]).all() and (other["0000#1"][0] != found["0000#1"][0]).any()


class Grey(Pictures):
    """Of one colour."""

    def read(self, i: int) -> np.ndarray:
        return np.full((70, 70, 3), 128, np.uint8)


class GreyPictures(Pictures):
    """Without colour."""

    def read(self, i: int) -> np.ndarray:
        return np.repeat(super().read(i)[..., :1], 3, 2)


class Plain(Pictures):
    """Each of one brightness, brighter towards the right."""

    def read(self, i: int) -> np.ndarray:
        return np.broadcast_to((40 * i + np.arange(90) // 3).astype(np.uint8)[:, None], (80, 90, 3))


def test_every_view_is_of_the_photo_of_its_key(tmp_path: Path) -> None:
    write_lessons(tmp_path, Teacher(), Plain(5), 64, views=5)
    found = {key: picture.astype(int) for key, (picture, _) in rows(tmp_path).items()}
    for key, picture in found.items():
        assert abs(picture.mean() - 40 * int(key[:4]) - 15) < 8, key
    mirrored = [bool(picture[0, 0, 0] > picture[0, 0, -1]) for key, picture in found.items() if not key.endswith("#0")]
    spans = {int(np.ptp(picture)) for picture in found.values()}
    assert 4 < sum(mirrored) < 16 and min(spans) < 24 and max(spans) > 25  # 64 to 80 of 90 columns


def test_lessons_written_twice_are_written_once(tmp_path: Path) -> None:
    for teacher in (Teacher(), Silent()):
        assert write_lessons(tmp_path / "a", teacher, Pictures(9), 64, views=2) == []
    write_lessons(tmp_path / "b", Teacher(), Pictures(9), 64, views=2)
    assert_same_rows(tmp_path / "a", tmp_path / "b")
    with pytest.raises(AssertionError, match="asked again"):
        write_lessons(tmp_path / "a", Silent(), Pictures(10), 64, views=2)


def test_interrupted_lessons_go_on_and_keep_their_order(tmp_path: Path) -> None:
    stop: list[int] = []

    def told(done: int, total: int) -> None:
        assert total == 18
        if done == 11:
            stop.append(1)

    write_lessons(tmp_path / "a", Teacher(), Pictures(9), 64, 2, told=told, stop=stop)
    before = LessonStore(tmp_path / "a")
    assert len(before) == 11
    write_lessons(tmp_path / "a", Teacher(), Pictures(9), 64, 2)
    write_lessons(tmp_path / "b", Teacher(), Pictures(9), 64, 2)
    assert_same_rows(tmp_path / "a", tmp_path / "b")
    after, whole = LessonStore(tmp_path / "a"), LessonStore(tmp_path / "b")
    assert torch.equal(after.read(slice(0, 11)).pictures, before.read(slice(0, 11)).pictures)
    assert torch.equal(after.read(slice(0, 18)).pictures, whole.read(slice(0, 18)).pictures)


def test_processes_share_the_views(tmp_path: Path) -> None:
    for part in range(3):
        write_lessons(tmp_path / "a", Teacher(), Pictures(7), 64, 2, part=part, parts=3)
        assert len(LessonStore(tmp_path / "a")) == (5, 10, 14)[part]
    write_lessons(tmp_path / "b", Teacher(), Pictures(7), 64, 2)
    assert_same_rows(tmp_path / "a", tmp_path / "b")


def test_lessons_of_another_teacher_or_size_are_refused(tmp_path: Path) -> None:
    write_lessons(tmp_path, Teacher(), Pictures(2), 64, 1)
    others = ((Teacher(weights_hash="4567"), 64, 0), (Teacher(), 32, 0), (Teacher(), 64, 1), (None, 64, 0))
    for teacher, size, seed in others:
        with pytest.raises(UserError, match=str(tmp_path)):
            write_lessons(tmp_path, teacher, Pictures(2), size, 1, seed)
    assert len(rows(tmp_path)) == 2


def test_a_store_is_read_in_one_order(stores: dict[str, Stores]) -> None:
    store = stores["grid"][0]
    whole = store.read(slice(0, len(store)))
    parts = [store.read(slice(i, i + 16)) for i in range(0, len(store), 16)]
    assert len(whole) == len(store) == 40 and [len(part) for part in parts] == [16, 16, 8]
    for name in ("pictures", "latents"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
        assert torch.equal(getattr(store.read([7, 0, 7]), name), getattr(whole, name)[[7, 0, 7]])
    assert whole.latents.dtype == torch.float16 and whole.images.max() <= 1
    pooled = whole.pooled(2, windows=2)
    assert torch.allclose(pooled[3, 1, 0, 1], whole.taught[3, 1, :4, 4:].mean(), atol=1e-6)
    with pytest.raises(ValueError, match=r"7 channels in 1×1 windows of latents of shape \(40, 6, 8, 8\)"):
        whole.pooled(7)


def test_photos_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    photos = Pictures(6, unreadable=(0, 4))
    failures = write_lessons(tmp_path / "a", Teacher(), photos, 64, 2)
    assert [failure.name for failure in failures] == ["0000", "0004"] * 2
    assert {key[:4] for key in rows(tmp_path / "a")} == {"0001", "0002", "0003", "0005"}
    broken, config = Pictures(3, unreadable=(0, 1, 2)), KINDS["native"]
    with pytest.raises(UserError, match="None of the 3 images of pictures can be read"):
        command.clone_run(Teacher(), broken, Pictures(2), config, tmp_path / "run", launch_fabric(CPU), quiet=True)


def test_lessons_without_a_teacher_are_pictures(tmp_path: Path) -> None:
    write_lessons(tmp_path, None, Pictures(3), 64, 1)
    lessons = LessonStore(tmp_path).read(slice(0, 3))
    assert lessons.latents is None and len(lessons) == 3
    with pytest.raises(AssertionError, match="have a teacher"):
        lessons.taught  # noqa: B018


# ---------------------------------------------------------------------------------------------------------------
# Steps


@pytest.mark.parametrize("kind", KINDS)
def test_going_on_in_the_middle_of_a_round_is_going_through(kind: str, stores: dict[str, Stores]) -> None:
    config, states = KINDS[kind], []
    with forward_only():
        whole = task_on(stores[kind], config)
        total, each = whole.rounds * whole.per_round, whole.per_round
        for step in range(total):
            run_steps(whole, step, step + 1)
            states.append(saved(whole.state()))
        cuts = {1, each - 1, each, each + 2, total - each + 3, total - 2}  # while it reads and while it sweeps
        for cut in sorted(cut for cut in cuts if 0 < cut < total):
            again, stop = task_on(stores[kind], config), min(cut + each + 1, total)
            again.load_state(states[cut - 1])
            for step in range(cut, stop):
                run_steps(again, step, step + 1)
            assert_equal(plain(saved(again.state())), plain(states[stop - 1]))
    assert_equal(again._model().state_dict(), whole._model().state_dict())
    figures = whole.validate()
    assert again.validate() == figures and figures["explained"] > 0.5
    assert whole.parts.keys() == again.parts.keys() and all(part.left < 0.6 for part in whole.parts.values())


def test_every_kind_is_learned_alike_by_two_processes(stores: dict[str, Stores]) -> None:
    for kind in ("grid", "native", "pooled"):
        config = replace(KINDS[kind], sweeps=2)
        one = run_steps(task_on(stores[kind], config)).validate()["explained"]
        two = together(2, lambda peers: run_steps(task_on(stores[kind], config, peers=peers)))
        assert_equal(*(task._model().state_dict() for task in two))
        assert two[0].validate()["explained"] == pytest.approx(one, abs=0.1), kind


def test_a_learned_model_is_saved_and_one_that_is_not_there_yet_says_so(
    stores: dict[str, Stores], tmp_path: Path
) -> None:
    task = task_on(stores["native"], KINDS["native"])
    for stop, files in ((5, {"README.md"}), (None, {"README.md", "config.json", "model.safetensors"})):
        folder = tmp_path / str(stop)
        folder.mkdir()
        run_steps(task, 0 if stop else 5, stop)
        figures = task.validate()
        task.export(folder, figures, 7)
        assert {file.name for file in folder.iterdir()} == files
        assert (figures == {"explained": 0.0}) == (stop is not None)
    assert "Nothing that could be used" in (tmp_path / "5" / "README.md").read_text()
    codec = hub.load(tmp_path / "None")
    training = json.loads((tmp_path / "None" / "config.json").read_text())["training"]
    assert training["step"] == 7 and training["explained"] == figures["explained"] and training["neurons"] == 8
    images = stores["native"][1].read(slice(0, 12)).images
    said = codec.decode(codec.encode(images))
    explained = 1 - (said - images).square().sum() / (images - images.mean((0, 2, 3), keepdim=True)).square().sum()
    assert float(explained) == pytest.approx(figures["explained"], abs=0.01)  # clamped, and of fp16 weights


def test_a_run_has_the_steps_that_its_task_needs(stores: dict[str, Stores]) -> None:
    task = task_on(stores["grid"], KINDS["grid"])
    config = run_config(task, CPU)
    reads = 3 + 1  # batches of 16 of 40 lessons, and the 12 that are held out
    assert task.per_round == reads + KINDS["grid"].sweeps + 1 and task.rounds == 3
    assert config.steps == 3 * task.per_round and config.keep == 3 and config.device == "cpu" and not config.amp
    assert config.validate_every == config.save_every == task.per_round  # a model after each layer
    decoder = task_on(stores["grid"], tiny("grid", part="decoder", layers=4))
    assert decoder.rounds == 4 and task_on(stores["native"], KINDS["native"]).rounds == 1 + 5 + 1 + 2
    gradients = run_config(task_on(stores["grid"], tiny("grid", gradients=True, steps=50)), CPU)
    assert gradients.steps == 50 and gradients.save_every == gradients.validate_every == 5


def test_other_lessons_than_it_was_begun_with_are_refused(stores: dict[str, Stores]) -> None:
    train, held = stores["grid"]
    state = run_steps(task_on((train, held), KINDS["grid"]), stop=3).state()
    for pair, says in (((train, train), r"begun with 12 held-out lessons, and now there are 40"),
                       ((held, held), r"begun with 40 lessons, and now there are 12: put back")):
        with pytest.raises(UserError, match=says):
            task_on(pair, KINDS["grid"]).load_state(state)
    trained = task_on((train, held), replace(KINDS["grid"], gradients=True))
    trained.setup(launch_fabric(CPU))
    with pytest.raises(UserError, match="begun with 39 lessons, and now there are 40"):
        trained.load_state({**trained.state(), "layout": [39, 12, 1]})


def test_held_out_photos_that_say_nothing_are_refused(stores: dict[str, Stores], tmp_path: Path) -> None:
    grey = replace(KINDS["grid"])
    write_lessons(tmp_path / "grey", Teacher(), Grey(3), 64, views=1)
    with pytest.raises(UserError, match="held-out photos are all of one colour"):
        task_on((stores["grid"][0], LessonStore(tmp_path / "grey")), grey)
    write_lessons(tmp_path / "one", Teacher(), Pictures(1, side=256), 256, views=1)
    with pytest.raises(UserError, match="One held-out photo says nothing"):
        task_on((stores["pooled"][0], LessonStore(tmp_path / "one")), KINDS["pooled"])


def test_figures_are_those_of_the_file(stores: dict[str, Stores], tmp_path: Path) -> None:
    task = run_steps(task_on(stores["grid"], KINDS["grid"]))
    task.export(tmp_path, figures := task.validate(), 1)
    weights = load_file(tmp_path / "model.safetensors")
    assert all((weights[name].float() == value).all() for name, value in task._model().state_dict().items())
    model = task._model()
    model.load_state_dict({name: value.float() for name, value in weights.items()})
    held = stores["grid"][1].read(slice(None))
    assert task.way.figures(model, [held]) == pytest.approx(figures, rel=1e-3)


def test_weights_too_large_for_fp16_are_not_written(stores: dict[str, Stores], tmp_path: Path) -> None:
    task = run_steps(task_on(stores["native"], KINDS["native"]))
    model = task._model()
    model.analysis.data *= 1e6
    with pytest.raises(UserError, match="analysis of the clone does not fit into fp16"):
        task.way.write(tmp_path, model, "", {})


def test_grey_photos_leave_spare_channels_small(tmp_path: Path) -> None:
    config = tiny("native", channels=80, layers=1, sweeps=1)
    found = lesson_stores(tmp_path, config, GreyPictures(40), GreyPictures(12, 100))
    model = run_steps(task_on(found, config))._model()
    assert model.analysis.abs().max() < 2000


def test_what_is_over_reads_no_more_lessons(stores: dict[str, Stores]) -> None:
    task = task_on(stores["grid"], tiny("grid", part="decoder"))
    before = [turn.lessons is None for turn in task.batches(0, task.per_round)]
    task.parts["decoder"].over = True
    after = [turn.lessons is None for turn in task.batches(0, task.per_round)]
    assert before == [False] * 4 + [True] * 5 and after == [True] * 9


def test_learning_is_a_function_of_its_seed(stores: dict[str, Stores]) -> None:
    first, again, other = (run_steps(task_on(stores["grid"], tiny("grid", layers=1, seed=seed)))._model()
                           for seed in (0, 0, 1))
    assert_equal(first.state_dict(), again.state_dict())
    images = stores["grid"][1].read(slice(0, 4)).images
    assert not torch.allclose(first.encoder(images), other.encoder(images), atol=1e-3)


def test_the_retina_sees_pictures_alone(stores: dict[str, Stores]) -> None:
    """Its code is the same whatever the teacher says of them."""
    codes = []
    for turned in (False, True):
        learning = task_on(stores["grid"], KINDS["grid"]).parts["encoder"]
        for position in range(2):
            lessons = stores["grid"][0].read(slice(16 * position, 16 * position + 16))
            latents = lessons.latents.flip(0) * 3 if turned else lessons.latents
            learning.see(Lessons(lessons.pictures, latents), False, position)
        learning.see(stores["grid"][1].read(slice(0, 12)), True, 3)  # nor what is held out
        learning.work(True)
        codes.append(learning.code)
    assert_equal(*(code.state_dict() for code in codes))
    lessons = stores["grid"][0].read(slice(0, 32))
    code = codes[0](lessons.images).movedim(1, 3).flatten(0, 2)[:, : sum(codes[0].fovea.components)]
    assert 0.7 < float(code.std(0).mean()) < 1.3 and float(code.mean(0).abs().max()) < 0.3  # of an eighth of the windows


def test_the_decoder_tells_which_errors_show(stores: dict[str, Stores]) -> None:
    teacher, lessons = Teacher(), stores["grid"][0].read(slice(0, 6))
    teacher.module.outward.weight.data[0] *= 10
    teacher.module.outward.weight.data[1] = teacher.module.outward.weight.data[2]
    with forward_only():
        weighing = decoder_responses(teacher, lessons, torch.Generator().manual_seed(0))
    assert weighing.shape == (6, 6)
    shown = weighing @ weighing.mT
    assert shown.diagonal().argmax() == 0 and shown[0, 0] > 20 * shown[3, 3]
    assert shown[1, 2] > 0.9 * (shown[1, 1] * shown[2, 2]).sqrt()  # they change a picture in the same way


def test_an_encoder_spends_its_neurons_on_the_channels_that_show(stores: dict[str, Stores]) -> None:
    config, errors = tiny("grid", part="encoder", layers=1, neurons=3, candidates=300, sweeps=8), {}
    held = stores["grid"][1].read(slice(0, 12))
    for channel in (1, 5):
        teacher = Teacher()  # the same latents, of which the decoder shows one most
        teacher.module.outward.weight.data[channel] *= 30
        model = run_steps(task_on(stores["grid"], config, teacher))._model()
        errors[channel] = (model.encoder(held.images) - held.taught).square().mean((0, 2, 3))
    assert errors[1][1] < 0.95 * errors[5][1] and errors[5][5] < 0.85 * errors[1][5]


def test_a_pooled_readout_learns_from_quarters_of_a_picture_too(stores: dict[str, Stores]) -> None:
    task = task_on(stores["pooled"], KINDS["pooled"])
    run_steps(task, 0, task.per_round + 4)  # all lessons of the second round are read
    seen = task.parts["encoder"].seen
    assert seen[False].count == 40 * (1 + 4) and seen[True].count == 12  # by whole pictures it is measured


def test_a_pooled_clone_without_a_decoder_that_helps_is_an_encoder(stores: dict[str, Stores], tmp_path: Path) -> None:
    task = run_steps(task_on(stores["pooled"], KINDS["pooled"]))
    assert task._model().decoder is not None and "psnr_64" in task.validate()
    task.parts["decoder"].stack.layers = torch.nn.ModuleList()  # none did better than the mean
    task.export(tmp_path, figures := task.validate(), 1)
    assert figures["explained"] > 0.5 and "psnr_64" not in figures and not hub.load(tmp_path).spec.decodes
    task.parts["encoder"].encoder = None
    assert task._model() is None


@pytest.mark.parametrize("kind", ["grid", "native", "pooled"])
def test_gradients_train_the_same_student(kind: str, stores: dict[str, Stores]) -> None:
    config, fabric = replace(KINDS[kind], gradients=True, steps=8, lr=0.01, layers=2), launch_fabric(CPU)

    def begun() -> GradientTask:
        task = task_on(stores[kind], config)
        assert isinstance(task, GradientTask)
        task.setup(fabric)
        return task

    whole, states, losses = begun(), [], []
    drawn = [batch.pictures for batch in whole.batches(0, 3)]
    assert len(drawn[0]) == 16 and torch.equal(drawn[2], next(whole.batches(2, 3)).pictures)
    assert not torch.equal(drawn[0], drawn[1])
    before = whole.validate()["explained"]
    for step, batch in enumerate(whole.batches(0, 8)):
        losses.append(float(whole.step(batch, step)["loss"]))
        states.append(saved(whole.state()))
    again = begun()
    again.load_state(states[4])
    for step, batch in enumerate(again.batches(5, 8), start=5):
        again.step(batch, step)
    assert_equal(plain(again.state()), plain(whole.state()))
    assert whole.validate()["explained"] > before and losses[-1] < losses[0]
    learned = run_steps(task_on(stores[kind], KINDS[kind]))._model()
    sizes = {name: tensor.shape for name, tensor in learned.named_parameters()}
    student = {name: tensor.shape for name, tensor in whole.student.named_parameters()}
    assert sizes.keys() <= student.keys()  # the student has all layers that a clone may have
    ends = ("skip", "kernel_1", "analysis", "readout_bias")
    assert [sizes[name] for name in sizes if name.endswith(ends)] == [student[name] for name in sizes if name.endswith(ends)]


# ---------------------------------------------------------------------------------------------------------------
# Runs


def run_of(folder: Path, config: CloneConfig, photos: Pictures = Pictures(40), **more: object) -> dict[str, float]:
    return command.clone_run(Teacher(), photos, Pictures(12, 100), config, folder, launch_fabric(CPU), quiet=True, **more)


def test_a_run_keeps_the_model_after_each_round(tmp_path: Path) -> None:
    figures = run_of(tmp_path / "run", KINDS["native"], card=lambda reached: f"explained {reached['explained']:.3f}")
    found = checkpoints(tmp_path / "run")
    models = [folder for folder in found if (folder / "config.json").exists()]
    layers = [len(json.loads((folder / "config.json").read_text())["model"]["sizes"]) for folder in models]
    assert len(found) == 8 and layers == [1] and figures["explained"] > 0.5  # the last round's is final/
    final = json.loads((tmp_path / "run" / "final" / "config.json").read_text())
    assert final["training"]["explained"] == figures["explained"] and len(final["model"]["sizes"]) == 2
    assert f"explained {figures['explained']:.3f}" in (tmp_path / "run" / "final" / "README.md").read_text()
    with pytest.MonkeyPatch.context() as patch:  # a run that is finished has nothing more to do
        patch.setattr(OrganicTask, "step", None)
        (tmp_path / "run" / "run.json").write_text("{}")
        assert run_of(tmp_path / "run", KINDS["native"]) == figures


def test_two_clones_share_their_lessons(tmp_path: Path) -> None:
    shared, config = tmp_path / "lessons", KINDS["grid decoder"]
    run_of(tmp_path / "a", replace(config, views=2, sweeps=1), lessons=shared)
    before = {file: file.stat().st_mtime_ns for file in (shared / "lessons").rglob("*") if file.suffix != ".json"}
    fewer = Pictures(24)  # of the same photos, and of their views the first
    again = command.clone_run(Silent(), fewer, Pictures(12, 100), config, tmp_path / "b", launch_fabric(CPU), shared,
                              quiet=True)
    assert before == {file: file.stat().st_mtime_ns for file in before} and len(LessonStore(shared / "lessons")) == 80
    assert again == run_of(tmp_path / "c", config, fewer) and not (tmp_path / "b" / "lessons").exists()


def test_two_real_processes_learn_one_clone(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, __file__, str(tmp_path)], env={**os.environ, "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    states = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert_equal(*states)
    one = run_of(tmp_path / "one", KINDS["grid"])
    assert states[0]["figures"]["explained"] == pytest.approx(one["explained"], abs=0.1)
    assert len(LessonStore(tmp_path / "run" / "lessons")) == 40
    codec = hub.load(tmp_path / "run" / "final")
    images = LessonStore(tmp_path / "run" / "held-out").read(slice(0, 12)).images
    wanted = Teacher().encode(images).mode()
    error = (codec.encode(images).mode() - wanted).square().sum()
    assert 1 - error / (wanted - wanted.mean((0, 2, 3), keepdim=True)).square().sum() > 0.5
    (only,) = (tmp_path / "runs").iterdir()  # whatever the processes' clocks say
    assert hub.load(only).spec.channels == 4


def one_of_two(folder: Path, rank: int, port: int) -> int:
    """A child that is one of two processes, as torchrun starts them."""
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
        os.environ.update({
            "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test",
            "TORCHELASTIC_USE_AGENT_STORE": "False", "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_MAX_RESTARTS": "0"})
        learned, validate = {}, OrganicTask.validate

        def watched(task: OrganicTask) -> dict[str, float]:
            learned["model"] = (task._model() or torch.nn.Identity()).state_dict()
            return validate(task)

        OrganicTask.validate = watched
        figures = run_of(folder / "run", KINDS["grid"])
        torch.save({"figures": figures, **learned}, folder / f"rank{rank}.pt")
        OrganicTask.validate = validate
        os.chdir(folder)
        time.strftime = lambda *_: f"clock-{rank}"
        command.main(("clone pixels --latent native --data synthetic --most 40 --shown 1 --size 64 --views 1 --neurons 4 "
                      "--candidates 8 --layers 1 --sites 500 --sweeps 1 --channels 4 --device cpu").split()[1:])
        os._exit(0)
    return pid


if __name__ == "__main__":
    import lightning_fabric  # noqa: F401  # before the children are forked, so that it is paid for once
    import torch.utils.tensorboard  # noqa: F401

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    children = [one_of_two(Path(sys.argv[1]), rank, free) for rank in range(2)]
    sys.exit(max(abs(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])) for child in children))
