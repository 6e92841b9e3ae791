"""The training room without a model: schedule, average, checkpoints, log, configuration, memory, NaN."""

import json
import math
import os
import shutil
import signal
import weakref
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from omnilatent import hub
from omnilatent.cli.main import main
from omnilatent.errors import UserError, is_out_of_memory
from omnilatent.training.checkpoint import checkpoints, furthest, load_state, prune, remove_beyond, resume_point
from omnilatent.training.config import OptimizerConfig, RunConfig, from_json
from omnilatent.training.ema import EMA
from omnilatent.training.logs import RunLog, progress_bar
from omnilatent.training.loop import Stopped, launch_fabric, train
from omnilatent.training.memory import step_within_memory
from omnilatent.training.schedule import warmup_cosine

# ---------------------------------------------------------------------------------------------------------------
# Schedule and average


def test_the_schedule_in_closed_form() -> None:
    rate = [warmup_cosine(step, steps=110, warmup=10, final=0.2) for step in range(111)]
    assert rate[:10] == pytest.approx([0.1 * k for k in range(1, 11)]), "linear, the first step is not 0"
    assert rate[10] == pytest.approx(1) and rate[60] == pytest.approx(0.6) and rate[110] == pytest.approx(0.2)
    assert rate[35] == pytest.approx(0.2 + 0.8 * (0.5 + math.sqrt(2) / 4)), "an eighth of the circle"
    assert all(a >= b for a, b in zip(rate[10:], rate[11:], strict=False))
    assert warmup_cosine(500, steps=110, warmup=10, final=0.2) == pytest.approx(0.2), "constant beyond the end"


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_short_runs_warm_up_for_at_most_half(steps: int) -> None:
    rate = [warmup_cosine(step, steps, warmup=500, final=0.0) for step in range(steps)]
    assert max(rate) == pytest.approx(1) and min(rate) > 0


def test_the_average_by_hand() -> None:
    """decay₀ = 1/10, decay₁ = 2/11, decay₂ = min(0.2, 3/12) = 0.2."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    ema = EMA(model, decay=0.2)
    oracle = 1.0
    for position, (value, decay) in enumerate([(2.0, 1 / 10), (4.0, 2 / 11), (-3.0, 0.2), (5.0, 0.2)]):
        nn.init.constant_(model.weight, value)
        ema.update(position)
        oracle = decay * oracle + (1 - decay) * value
        assert ema.average.weight.item() == pytest.approx(oracle, rel=1e-6)
        assert model.weight.item() == value, "the model itself stays"


def test_the_average_is_no_part_of_the_model_and_survives_saving() -> None:
    model = nn.Linear(3, 2)
    ema = EMA(model, 0.999)
    assert not any(p.requires_grad for p in ema.average.parameters()) and not ema.average.training
    nn.init.zeros_(model.weight)
    assert ema.average.weight.abs().sum() > 0
    ema.update(100)
    other = EMA(model, 0.999)
    other.load_state_dict(ema.state_dict())
    model.weight.data.fill_(7.0)
    for average in (ema, other):
        average.update(101)
    assert torch.equal(ema.average.weight, other.average.weight) and ema.average.weight.abs().max() > 0


# ---------------------------------------------------------------------------------------------------------------
# Checkpoints


def checkpoint(run: Path, name: str, step: int | None = None) -> Path:
    """A folder as a run holds it; without a step it is a model without training state."""
    folder = run / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    if step is not None:
        torch.save({"step": step, "task": {"w": torch.arange(3.0)}}, folder / "state.pt")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    return run


def test_pruning_keeps_the_newest_by_number(run: Path) -> None:
    for step in (2, 10, 9, 100):
        checkpoint(run, f"step-{step}", step)
    for stranger in ("step-old", "step-3-mine", "final", "best"):
        checkpoint(run, stranger, 1)
    checkpoint(run, "step-1000")  # a model alone
    assert [p.name for p in checkpoints(run)] == ["step-2", "step-9", "step-10", "step-100"]
    prune(run, keep=2)
    assert sorted(p.name for p in run.iterdir() if p.is_dir()) == [
        "best", "final", "step-10", "step-100", "step-1000", "step-3-mine", "step-old"]


def test_a_run_goes_on_from_its_furthest_checkpoint(run: Path) -> None:
    assert resume_point(run) is None and furthest(run) is None, "killed before the first save: from the start"
    for step in (4, 12, 8):
        checkpoint(run, f"step-{step}", step)
    assert resume_point(run) == run / "step-12"
    assert resume_point(run / "step-8") == run / "step-8", "the one that was named"
    checkpoint(run, "final", 16)
    assert resume_point(run) == run / "final"
    checkpoint(run, "step-20", 20)  # the run was resumed with more --steps, then killed
    assert resume_point(run) == run / "step-20"


def test_only_training_state_can_be_resumed(run: Path) -> None:
    best = checkpoint(run, "best")
    with pytest.raises(UserError, match=r"best holds a model but no training state: resume from the run .*run inst"):
        resume_point(best)


def test_resuming_restores_what_a_kill_interrupted(run: Path) -> None:
    checkpoint(run, ".retired-final", 12)
    checkpoint(run, ".writing-step-16-123", 16)
    (run / ".writing-log.jsonl").write_text("half")
    assert resume_point(run) == run / "final"
    assert sorted(p.name for p in run.iterdir()) == ["final", "run.json"]


def stated(folder: Path, step: object) -> Path:
    (folder / "config.json").write_text(json.dumps({"training": {"step": step}}))
    return folder


def test_what_lies_beyond_the_step_is_removed(run: Path) -> None:
    for step in (4, 8, 12):
        checkpoint(run, f"step-{step}", step)
    stated(checkpoint(run, "best"), 8)
    stated(checkpoint(run, "final", 16), 16)
    checkpoint(run, "step-99")  # a model alone, which somebody keeps
    assert remove_beyond(run, 16) == [], "a run that goes on with more --steps keeps all"
    assert sorted(remove_beyond(run, 8)) == ["final", "step-12"]
    assert sorted(p.name for p in run.iterdir() if p.is_dir()) == ["best", "step-4", "step-8", "step-99"]
    assert sorted(remove_beyond(run, 4)) == ["best", "step-8"]
    stated(checkpoint(run, "best"), "of another maker")
    assert remove_beyond(run, 4) == [] and (run / "best").exists()


def test_a_removal_that_a_kill_interrupts_is_finished(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(run, "step-4", 4)
    (checkpoint(run, "step-8", 8) / "model.safetensors").write_text("weights")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda folder, **more: (folder / "model.safetensors").unlink(missing_ok=True))
        remove_beyond(run, 4)
    assert resume_point(run) == run / "step-4", "no half of a checkpoint is gone on from"
    assert sorted(p.name for p in run.iterdir()) == ["run.json", "step-4"]


def test_a_damaged_state_is_one_sentence(run: Path) -> None:
    folder = checkpoint(run, "step-4", 4)
    assert load_state(folder)["task"]["w"].tolist() == [0, 1, 2]
    os.truncate(folder / "state.pt", (folder / "state.pt").stat().st_size // 2)
    with pytest.raises(UserError, match=r"state\.pt cannot be read .*: resume from an earlier step-N/ of the run\.$"):
        load_state(folder)


class Attack:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch attacked",)


def test_a_state_that_would_run_code_does_not(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    folder = checkpoint(run, "step-4", 4)
    torch.save({"step": 4, "task": Attack()}, folder / "state.pt")
    with pytest.raises(UserError, match="cannot be read"):
        load_state(folder)
    assert not (run / "attacked").exists()


# ---------------------------------------------------------------------------------------------------------------
# The log


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_a_resumed_log_drops_what_lies_beyond(tmp_path: Path) -> None:
    with RunLog(tmp_path, 0) as log:
        for step in (2, 4, 6):
            log.write(step, {"loss": 1 / step}, "train")
        log.write(4, {"psnr": 20.0}, "validation")
    with (tmp_path / "log.jsonl").open("ab") as handle:
        handle.write(b'{"step": 3, "part"')  # torn by a kill, as are bytes that the disk never got
    with RunLog(tmp_path, 4) as log:
        log.write(5, {"loss": 0.2}, "train")
    assert [(row["step"], row["part"]) for row in rows(tmp_path)] == [
        (2, "train"), (4, "train"), (4, "validation"), (5, "train")]
    assert rows(tmp_path)[0] == {"step": 2, "part": "train", "loss": 0.5}


def test_numbers_that_are_not_finite_leave_valid_json(tmp_path: Path) -> None:
    with RunLog(tmp_path, 0) as log:
        log.write(1, {"gradient_norm": math.inf, "kl": math.nan, "loss": 0.5}, "train")
        log.write(2, {"psnr": -math.inf}, "validation")
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    found = [json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON")) for line in lines]
    assert found == [{"step": 1, "part": "train", "gradient_norm": None, "kl": None, "loss": 0.5},
                     {"step": 2, "part": "validation", "psnr": None}]


@pytest.mark.parametrize("torn", [b'{"step": 1}', b"\x00\x00\xff\xfe\n", b"[1]\n", b"3\n", b'{"loss": 1}\n'])
def test_a_damaged_row_is_dropped_and_the_others_stay(tmp_path: Path, torn: bytes) -> None:
    """A row without its line's end may be half a number; rewriting is whole or not at all."""
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 1, "loss": 0.5}\n' + torn)
    with RunLog(tmp_path, 10):
        pass
    assert rows(tmp_path) == [{"step": 1, "loss": 0.5}]
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_runs_name_is_not_markup() -> None:
    with progress_bar(False) as bar:
        bar.add_task("run[/b] [red]", total=2, numbers="[/x]")
        assert "run[/b] [red]" in str(bar.columns[0].render(bar.tasks[0]))
        assert "[/x]" in str(bar.columns[-1].render(bar.tasks[0]))


# ---------------------------------------------------------------------------------------------------------------
# Configuration


@pytest.mark.parametrize("recipe", hub.RECIPES)
def test_a_recipe_survives_json(recipe: str) -> None:
    module, function = hub.RECIPES[recipe].split(":")
    config = getattr(import_module(module), function)()
    changed = replace(config, optimizer=replace(config.optimizer, betas=(0.5, 0.9)), run=replace(config.run, seed=7))
    for value in (config, changed):
        assert from_json(type(config), json.loads(json.dumps(asdict(value)))) == value


def test_older_and_newer_fields() -> None:
    saved = {"steps": 7, "batch_size": 4, "no_longer_there": 1}
    assert from_json(RunConfig, saved) == RunConfig(steps=7, batch_size=4)
    assert from_json(OptimizerConfig, {}) == OptimizerConfig()


@pytest.mark.parametrize("field", [
    "steps", "batch_size", "accumulate", "save_every", "keep", "validate_every", "log_every"])
def test_impossible_settings_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"^--{field.replace('_', '-')} is 0; the least is 1$"):
        RunConfig(**{field: 0})


@pytest.mark.parametrize(("field", "value"), [
    ("lr", -1.0), ("lr", math.nan), ("lr", math.inf), ("warmup", -1), ("clip", -1.0), ("final_lr", -0.1),
    ("weight_decay", -1.0),
    ("ema_decay", 1.0), ("ema_decay", -0.1), ("betas", (0.9, 1.0)), ("betas", (-0.1, 0.9)),
])
def test_impossible_optimisers_are_refused(field: str, value: object) -> None:
    sentence = f"^--{field.replace('_', '-')} is .*; (the least is 0|possible are 0 up to, not incl)"
    with pytest.raises(ValueError, match=sentence):
        OptimizerConfig(**{field: value})


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_that_numpy_refuses_are_refused_at_once(seed: int) -> None:
    with pytest.raises(ValueError, match=f"^--seed is {seed}; possible are 0 to 4294967295$"):
        RunConfig(seed=seed)


# ---------------------------------------------------------------------------------------------------------------
# The loop, on a task of one weight


class OneWeight:
    """w ← w − 0.1 (w − 1), with faults: steps whose loss is `poison`, or after which the weight is NaN."""

    monitor = "score"

    def __init__(self, poison: dict[int, float] | None = None, spoiled: int | None = None) -> None:
        self.poison, self.spoiled, self.steps = poison or {}, spoiled, 0

    def setup(self, fabric: Any) -> None:
        self.weight = torch.zeros(())

    def batches(self, start: int, stop: int) -> Iterator[int]:
        return iter(range(start, stop))

    def step(self, batch: int, position: int) -> dict[str, Any]:
        assert batch == position
        self.steps += 1
        loss = (self.weight - 1) ** 2
        self.weight = self.weight - 0.1 * (self.weight - 1)
        if position == self.spoiled:
            self.weight = self.weight * math.nan
        return {"loss": loss * self.poison.get(position, 1.0)}

    def halve(self, batch: int) -> None:
        return None

    def validate(self) -> dict[str, float]:
        assert torch.isfinite(self.weight), "a spoiled model must not be measured"
        return {"score": -abs(1 - float(self.weight))}

    def samples(self) -> None:
        return None

    def state(self) -> dict[str, Any]:
        return {"nested": [{"weight": self.weight}], "count": 3, "long": torch.tensor(1)}

    def load_state(self, state: dict[str, Any]) -> None:
        self.weight = state["nested"][0]["weight"]

    def export(self, folder: Path, figures: dict[str, float], step: int) -> None:
        config = {"weight": float(self.weight), "training": {"step": step}, "figures": figures}
        (folder / "config.json").write_text(json.dumps(config))


CONFIG = RunConfig(steps=10, batch_size=1, save_every=2, validate_every=5, log_every=3, keep=2, device="cpu", workers=0)


def run_task(task: OneWeight, run: Path, config: RunConfig = CONFIG, resume: Path | None = None) -> dict[str, float]:
    return train(task, config, run, launch_fabric(config), resume, quiet=True)


def exported(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def test_the_loop_saves_logs_and_keeps_the_best(run: Path) -> None:
    figures = run_task(OneWeight(), run)
    weight = 1 - 0.9**10
    assert figures == {"score": pytest.approx(weight - 1)}
    assert sorted(p.name for p in run.iterdir() if p.is_dir()) == ["best", "final", "step-6", "step-8"]
    assert exported(run / "final") == {
        "weight": pytest.approx(weight), "training": {"step": 10}, "figures": {"score": pytest.approx(weight - 1)}}
    assert load_state(run / "final")["step"] == 10 and not (run / "best" / "state.pt").exists()
    logged = [(row["step"], row["part"]) for row in rows(run)]
    assert logged == [(3, "train"), (5, "validation"), (6, "train"), (9, "train"), (10, "train"), (10, "validation")]
    assert rows(run)[0]["loss"] == pytest.approx((0.9**2) ** 2)


def test_a_checkpoint_states_only_figures_of_its_own_weights(run: Path) -> None:
    run_task(OneWeight(), run, replace(CONFIG, save_every=1, keep=10))
    figures = {step: exported(run / f"step-{step}")["figures"] for step in range(1, 10)}
    assert figures.pop(5) == {"score": pytest.approx(-(0.9**5))}
    assert set(map(str, figures.values())) == {"{}"}, "8 carries 5's weights' figures"
    assert load_state(run / "step-8")["figures"] == {"score": pytest.approx(-(0.9**5))}, "the state goes on with them"


def test_going_on_from_an_earlier_checkpoint_gives_up_the_later_branch(run: Path) -> None:
    run_task(OneWeight(), run, replace(CONFIG, keep=10))
    assert exported(run / "best")["training"]["step"] == 10
    assert sorted(p.name for p in run.glob("step-*")) == ["step-2", "step-4", "step-6", "step-8"]
    run_task(OneWeight(), run, replace(CONFIG, steps=4), resume=run / "step-4")  # no step is left to do
    assert (run / "final").exists() and (run / "step-8").exists()
    run_task(OneWeight(), run, replace(CONFIG, steps=7, keep=10), resume=run / "step-4")
    assert sorted(p.name for p in run.glob("step-*")) == ["step-2", "step-4", "step-6"]
    assert [exported(run / name)["training"]["step"] for name in ("best", "final")] == [7, 7]
    assert furthest(run) == run / "final" and load_state(run / "final")["best"] == pytest.approx(-(0.9**7))


def test_a_best_figure_without_its_weights_is_forgotten(run: Path) -> None:
    run_task(OneWeight(), run)
    state = load_state(run / "step-8")
    torch.save({**state, "best": 0.0}, run / "step-8" / "state.pt")
    run_task(OneWeight(), run, resume=run / "step-8")
    assert exported(run / "best")["training"]["step"] == 10
    torch.save({**state, "best": 0.0}, run / "step-8" / "state.pt")
    stated(run / "best", 5)
    run_task(OneWeight(), run, resume=run / "step-8")
    assert exported(run / "best") == {"training": {"step": 5}}, "with its weights it stands"


def test_a_state_is_loaded_on_the_cpu(run: Path) -> None:
    """On the GPU, AdamW's step counters would stay there, and each step would wait for them."""
    run_task(OneWeight(), run)

    class Looking(OneWeight):
        def load_state(self, state: dict[str, Any]) -> None:
            assert state["nested"][0]["weight"].device.type == state["long"].device.type == "cpu"
            raise EOFError

    elsewhere = SimpleNamespace(device=torch.device("meta"), is_global_zero=True, world_size=1)
    with pytest.raises(EOFError):
        train(Looking(), CONFIG, run, elsewhere, run / "step-8", quiet=True)


def test_the_loaded_state_is_freed_before_the_first_step(run: Path) -> None:
    run_task(OneWeight(), run)

    class Watching(OneWeight):
        def load_state(self, state: dict[str, Any]) -> None:
            super().load_state(state)
            self.loaded = weakref.ref(state["long"])
            assert self.loaded() is not None

        def step(self, batch: int, position: int) -> dict[str, Any]:
            assert self.loaded() is None, "a second copy of the weights stays in memory"
            return super().step(batch, position)

    run_task(watching := Watching(), run, resume=run / "step-8")
    assert watching.steps == 2


def test_the_loss_scaler_goes_on_from_its_scale(run: Path) -> None:
    """Set by hand: Fabric makes one for fp16 on a GPU only."""
    scales = []
    for scale, resume in ((64.0, None), (2.0, run / "step-8")):
        fabric = launch_fabric(CONFIG)
        fabric._precision.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        train(OneWeight(), CONFIG, run, fabric, resume, quiet=True)
        scales.append(fabric._precision.scaler.get_scale())
    state = load_state(run / "final")
    assert scales == [64, 64] and state["scaler"]["scale"] == 64 and "scaler" not in state["random"]


class Interrupted(OneWeight):
    """A task that gets `signals` while its third step runs."""

    def __init__(self, *signals: int) -> None:
        super().__init__()
        self.signals = signals

    def step(self, batch: int, position: int) -> dict[str, Any]:
        if position == 2:
            for number in self.signals:
                signal.raise_signal(number)
        return super().step(batch, position)


@pytest.mark.parametrize("signals", [
    [signal.SIGINT], [signal.SIGTERM], [signal.SIGTERM] * 2, [signal.SIGINT, signal.SIGTERM],
    [signal.SIGTERM, signal.SIGINT]])
def test_asked_to_stop_the_step_in_hand_is_saved(run: Path, signals: list[int]) -> None:
    with pytest.raises(KeyboardInterrupt) as stopped:
        run_task(Interrupted(*signals), run)
    assert isinstance(stopped.value, Stopped), "it stopped at once"
    assert stopped.value.folder == run / "step-3" and load_state(run / "step-3")["step"] == 3


def test_only_a_second_ctrl_c_stops_at_once(run: Path) -> None:
    with pytest.raises(KeyboardInterrupt) as stopped:
        run_task(Interrupted(signal.SIGINT, signal.SIGINT), run)
    assert not isinstance(stopped.value, Stopped) and furthest(run) == run / "step-2"


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(run: Path, loss: float) -> None:
    """At position 6 it happens, step 8 would save it: the newest good one is step 6."""
    task = OneWeight(poison={6: loss})
    sentence = (rf"^The loss is no longer finite by step 8, and training stopped: the last good checkpoint is "
                rf"{run}/step-6; begin a new run from it with --init {run}/step-6 and a lower --lr or --clip\.$")
    with pytest.raises(UserError, match=sentence):
        run_task(task, run)
    assert task.steps == 8 and not (run / "final").exists()
    assert torch.isfinite(load_state(run / "step-6")["task"]["nested"][0]["weight"])
    good = OneWeight()
    run_task(good, run, resume=resume_point(run))
    assert good.steps == 4 and float(good.weight) == pytest.approx(1 - 0.9**10)


@pytest.mark.parametrize(("spoiled", "noticed"), [(7, 8), (4, 5), (9, 10)])
def test_weights_that_are_not_finite_are_neither_saved_nor_measured(run: Path, spoiled: int, noticed: int) -> None:
    """The loss of the step that spoils them is still finite: saving (8), validating (5) and ending (10) look."""
    with pytest.raises(UserError, match=f"^The weights are no longer finite by step {noticed}, and training stopped: "):
        run_task(OneWeight(spoiled=spoiled), run)
    for folder in [*run.glob("step-*"), *run.glob("best")]:
        assert math.isfinite(json.loads((folder / "config.json").read_text())["weight"])
    assert not (run / "final").exists() and checkpoints(run)


def test_nothing_good_was_saved_yet(run: Path) -> None:
    with pytest.raises(UserError, match=r"nothing was saved yet; begin again with a lower --lr or --clip\.$"):
        run_task(OneWeight(poison={0: math.nan}), run)
    assert not checkpoints(run)


# ---------------------------------------------------------------------------------------------------------------
# Memory


class Hungry:
    """A task on `range(n)` images, in `accumulate` parts, whose memory holds `room` images at once."""

    def __init__(self, room: int, accumulate: int, failure: Any = torch.OutOfMemoryError) -> None:
        self.room, self.accumulate, self.failure = room, accumulate, failure

    def step(self, batch: list[int], position: int) -> dict[str, float]:
        if -(-len(batch) // self.accumulate) > self.room:
            raise self.failure
        return {"loss": 0.0}

    def halve(self, batch: list[int]) -> list[int] | None:
        half = max(len(batch) // 2, self.accumulate)
        return batch[:half] if half < len(batch) else None


def named_split(room: int, batch_size: int, accumulate: int = 1) -> int | None:
    """The --accumulate that the sentence names; None when it says that nothing fits."""
    config = RunConfig(batch_size=batch_size, accumulate=accumulate)
    with pytest.raises(UserError) as caught:
        step_within_memory(Hungry(room, accumulate), list(range(batch_size)), 3, config, world=1)
    sentence = str(caught.value)
    if "even with the smallest part" in sentence:
        return None
    size = f"--batch-size {batch_size}"
    start = f"Out of memory at step 3 with {size} --accumulate {accumulate}: {size} "
    assert sentence.startswith(start) and sentence.endswith(
        " fits and gives the same gradients; what was saved before is untouched.")
    return int(sentence.split("--accumulate ")[2].split()[0])


@pytest.mark.parametrize("batch_size", [2, 6, 12, 16, 24, 30])
def test_the_split_that_is_named_fits_and_is_possible(batch_size: int) -> None:
    for accumulate in (d for d in range(1, batch_size) if batch_size % d == 0):
        for room in range(1, batch_size // accumulate):
            parts = named_split(room, batch_size, accumulate)
            assert parts is not None and batch_size % parts == 0, "the command line takes it"
            assert batch_size // parts <= room, "it fits"


def test_halves_are_tried_until_one_fits() -> None:
    assert [named_split(room, 16) for room in (15, 8, 7, 4, 3, 1)] == [2, 2, 4, 4, 8, 16]
    assert named_split(5, 12) == 4 and named_split(1, 6) == 6


def test_not_even_one_image_fits() -> None:
    assert named_split(0, 8) is None and named_split(0, 8, 4) is None


def test_a_step_that_fits_is_not_disturbed() -> None:
    assert step_within_memory(Hungry(4, 1), [1, 2, 3, 4], 0, RunConfig(batch_size=4), 1) == {"loss": 0.0}


def test_several_processes_are_told_the_next_split() -> None:
    """They cannot try halves apart from each other; 8 images of 2 processes are 4 each, in 1 part until now."""
    with pytest.raises(UserError, match="--batch-size 8 --accumulate 1: --accumulate 2 needs less and gives the same"):
        step_within_memory(Hungry(1, 1), [1, 2, 3, 4], 0, RunConfig(batch_size=8), world=2)


CPU = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"


@pytest.mark.parametrize(("failure", "memory"), [
    (torch.OutOfMemoryError("CUDA"), True), (MemoryError(), True), (RuntimeError(CPU), True),
    (RuntimeError("MPS backend out of memory (MPS allocated: 5 GB)"), True),
    (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False), (ValueError("out of memory"), False),
])
def test_what_counts_as_out_of_memory(failure: Exception, memory: bool) -> None:
    assert is_out_of_memory(failure) == memory
    task = Hungry(1, 1, failure)
    with pytest.raises(UserError if memory else type(failure)):
        step_within_memory(task, [1, 2], 0, RunConfig(batch_size=2), 1)


def test_the_cpus_own_allocator() -> None:
    """What torch says today when memory ends is among the texts that are known."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**48)
    assert is_out_of_memory(caught.value)


def test_the_step_that_did_not_fit_is_freed_before_halves_are_tried() -> None:
    alive: list[int] = []

    class Activations:
        def __init__(self) -> None:
            alive.append(1)

        def __del__(self) -> None:
            alive.pop()

    class Keeping(Hungry):
        def step(self, batch: list[int], position: int) -> dict[str, float]:
            assert not alive, "the traceback of the step before still holds its activations"
            held = Activations()
            return super().step(batch, position) if held else {}

    with pytest.raises(UserError, match="--accumulate 4 fits"):
        step_within_memory(Keeping(2, 1), list(range(8)), 0, RunConfig(batch_size=8), 1)


def test_a_resumed_run_needs_its_init_no_more(tmp_path: Path) -> None:
    short = ["--data", "photos", "--device", "cpu", "--workers", "0", "--validate-every", "9"]
    assert main(["train", "debug", *short, "--out", str(tmp_path / "source"), "--steps", "1"]) == 0
    begun = ["--init", str(tmp_path / "source"), "--freeze", "encoder", "--out", str(tmp_path / "run"), "--steps", "2"]
    assert main(["train", "debug", *short, *begun]) == 0
    (tmp_path / "source").rename(tmp_path / "gone")
    before = hub.read_config(tmp_path / "run" / "final")["spec"]
    assert main(["train", "--resume", str(tmp_path / "run"), "--steps", "3"]) == 0
    after = hub.read_config(tmp_path / "run" / "final")
    assert after["training"]["step"] == 3 and after["spec"] == before == hub.read_config(tmp_path / "gone" / "final")["spec"]
