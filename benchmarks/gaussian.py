"""Gaussian filters against plain ones of as many parameters, on MNIST: one place for every figure of docs/gaussian.md.

    python benchmarks/gaussian.py [--data ../shared/data/mnist] [--only tuning main few ablation]

- `tuning`: learning rate and batch size of each model, on 2,000 of the training images that it does not see.
- `main`: test MSE after 5 epochs with what was chosen there, three seeds; the same on test pictures that are
  shrunk and enlarged, by ½ to 2.
- `ablation`: the Gaussian model with round Gaussians at first, and with one learning rate for everything.
- `few`: the same from 100 to 10,000 training images, as many steps for all; the best weights by the 2,000 count.

Test images choose nothing. Points that the JSON holds already are not run again. One CPU thread, about half an hour.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from omnilatent import __version__, load
from omnilatent.autoencoders.gaussian import GaussianAutoencoder
from omnilatent.autoencoders.gaussian_task import GaussianTask
from omnilatent.autoencoders.recipes import gaussian
from omnilatent.data import open_images
from omnilatent.data.digits import Digits
from omnilatent.nn.gaussian_conv import GaussianConv2d
from omnilatent.training.loop import launch_fabric, train

RESULTS = Path(__file__).parent / "results"
MODELS = ("gaussian", "plain")
RATES, BATCHES = (3e-3, 6e-3, 1.2e-2, 2.4e-2), (64, 128)
SEEDS = (0, 1, 2)
KEPT_BACK = 2_000  # of the training images, for choosing
FEW, FEW_STEPS = (100, 300, 1_000, 10_000), 782  # 5 epochs of 10,000
SCALES = (0.5, 0.6, 0.7, 0.85, 1.0, 1.2, 1.4, 1.7, 2.0)
ABLATIONS = ("round at first", "geometry at --lr")
REACH = 0.0070


@dataclass(frozen=True)
class Setting:
    """One training run."""

    model: str
    lr: float
    batch_size: int
    seed: int = 0
    images: int = 20_000
    steps: int | None = None

    @property
    def key(self) -> str:
        steps = f"/steps {self.steps}" if self.steps else ""
        return f"{self.model}/lr {self.lr:g}/batch {self.batch_size}/images {self.images}{steps}/seed {self.seed}"


def fit(setting: Setting, images: Digits, held_out: Digits, best: bool = False, geometry_lr: float | None = None
        ) -> tuple[GaussianAutoencoder, float]:
    """Train through the package's one loop; (the model, seconds). `best`: of eight validations, not the last."""
    config = gaussian()
    config = replace(config, geometry_lr=config.geometry_lr if geometry_lr is None else geometry_lr)
    steps = setting.steps or config.steps(10**9)
    run = replace(config.run, batch_size=setting.batch_size, seed=setting.seed, device="cpu", workers=0, steps=steps,
                  validate_every=max(1, steps // 8) if best else steps, save_every=10**9, log_every=100)
    config = replace(config, run=run, epochs=10**6 if setting.steps else config.epochs,
                     model=replace(config.model, plain=setting.model == "plain"),
                     optimizer=replace(config.optimizer, lr=setting.lr))
    task = GaussianTask(config, images, held_out, lambda file, reason: None)
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        train(task, task.config.run, Path(folder), launch_fabric(config.run), quiet=True)
        seconds = time.perf_counter() - begun
        return load(Path(folder) / ("best" if best else "final")).module, seconds


def part(digits: Digits, rows: slice) -> Digits:
    return Digits(digits.pixels[rows], None, digits.name)


def pictures(digits: Digits) -> Tensor:
    """`(n, 1, 28, 28)` in [0, 1]."""
    return torch.from_numpy(digits.pixels.copy())[:, None].float() / 255


@torch.no_grad()
def mse(model: GaussianAutoencoder, images: Tensor) -> float:
    return sum(float((model(x)[0] - x).square().double().sum()) for x in images.split(500)) / images.numel()


def rescaled(images: Tensor, scale: float) -> Tensor:
    """What is drawn, enlarged about the middle; black around it, or cut off at the border."""
    corners = torch.tensor([[1 / scale, 0, 0], [0, 1 / scale, 0]]).expand(len(images), 2, 3)
    if scale < 1:  # blurred first, or pixels would be left out
        sigma = 0.5 * (1 / scale**2 - 1) ** 0.5
        taps = torch.exp(-0.5 * (torch.arange(-4.0, 5) / sigma) ** 2)
        taps = taps / taps.sum()
        across = F.conv2d(images, taps.view(1, 1, 1, 9), padding=(0, 4))
        images = F.conv2d(across, taps.view(1, 1, 9, 1), padding=(4, 0))
    grid = F.affine_grid(corners, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bicubic", align_corners=False).clamp(0, 1)


class Record:
    """The points in the JSON; each is written as soon as it is there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.all: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def point(self, part: str, key: str, make: Any) -> dict[str, Any]:
        points = self.all.setdefault(part, {})
        if key not in points:
            points[key] = make()
            self.write()
            print(part, key, json.dumps({k: v for k, v in points[key].items() if k != "setting"}), flush=True)
        return points[key]

    def write(self) -> None:
        self.path.write_text(json.dumps(self.all, indent=1) + "\n")


def tune(record: Record, train_set: Digits) -> dict[str, Setting]:
    """Each model's best setting on the images kept back."""
    learned, kept = part(train_set, slice(0, -KEPT_BACK)), part(train_set, slice(-KEPT_BACK, None))

    def run(setting: Setting) -> dict[str, Any]:
        model, seconds = fit(setting, learned, kept)
        return {"mse": mse(model, pictures(kept)), "seconds": seconds, "setting": asdict(setting)}

    chosen = {}
    for name in MODELS:
        settings = [Setting(name, lr, batch, images=len(learned)) for lr in RATES for batch in BATCHES]
        found = {setting: record.point("tuning", setting.key, lambda s=setting: run(s))["mse"] for setting in settings}
        chosen[name] = min(found, key=found.get)
    return chosen


def main_result(record: Record, chosen: dict[str, Setting], train_set: Digits, test: Tensor) -> dict[str, Any]:
    """Test MSE of the chosen settings, on the test pictures as they are and rescaled; returns the models of one seed,
    which are trained each time, for the picture."""
    models = {}
    for name in MODELS:
        for seed in SEEDS:
            setting = replace(chosen[name], seed=seed, images=len(train_set))
            if seed != SEEDS[0] and setting.key in record.all.get("main", {}):
                continue
            model, seconds = fit(setting, train_set, part(train_set, slice(-100, None)))  # these choose nothing
            models.setdefault(name, model)
            record.point("main", setting.key, lambda: _measured(model, test, seconds, setting))
    return models


def _measured(model: GaussianAutoencoder, test: Tensor, seconds: float, setting: Setting) -> dict[str, Any]:
    return {"mse": mse(model, test), "rescaled": {str(s): mse(model, rescaled(test, s)) for s in SCALES},
            "parameters": sum(p.numel() for p in model.parameters()), "seconds": seconds, "setting": asdict(setting)}


def ablate(record: Record, chosen: dict[str, Setting], train_set: Digits, test: Tensor) -> None:
    """Test MSE of the Gaussian model without what makes its parameters learn."""
    def run(setting: Setting, what: str) -> dict[str, Any]:
        with round_at_first() if what == "round at first" else nullcontext():
            model, seconds = fit(setting, train_set, part(train_set, slice(-100, None)),
                                 geometry_lr=1.0 if what == "geometry at --lr" else None)
        return {"mse": mse(model, test), "seconds": seconds, "what": what, "setting": asdict(setting)}

    for what in ABLATIONS:
        for seed in SEEDS:
            setting = replace(chosen["gaussian"], seed=seed, images=len(train_set))
            record.point("ablation", f"{what}/{setting.key}", lambda s=setting, w=what: run(s, w))


@contextmanager
def round_at_first() -> Iterator[None]:
    """Gaussians that begin round: their angles have no gradient until their widths differ."""
    usual = GaussianConv2d.reset_parameters

    @torch.no_grad()
    def reset(layer: GaussianConv2d) -> None:
        usual(layer)
        layer.log_sigma.copy_(layer.log_sigma.mean(-1, keepdim=True).expand_as(layer.log_sigma))

    GaussianConv2d.reset_parameters = reset
    try:
        yield
    finally:
        GaussianConv2d.reset_parameters = usual


def few(record: Record, chosen: dict[str, Setting], train_set: Digits, test: Tensor) -> None:
    """Test MSE by training images."""
    kept = part(train_set, slice(-KEPT_BACK, None))

    def run(setting: Setting) -> dict[str, Any]:
        model, seconds = fit(setting, part(train_set, slice(0, setting.images)), kept, best=True)
        return {"mse": mse(model, test), "seconds": seconds, "setting": asdict(setting)}

    for n in FEW:
        for seed in SEEDS:
            for name in MODELS:
                setting = replace(chosen[name], seed=seed, images=n, steps=FEW_STEPS, batch_size=64)
                record.point("few", setting.key, lambda s=setting: run(s))


def principal(train_images: Tensor, test: Tensor, components: int) -> float:
    """Test MSE of as many principal components, the linear null."""
    x, y = train_images.flatten(1), test.flatten(1)
    mean = x.mean(0)
    basis = torch.linalg.svd((x - mean).T @ (x - mean)).U[:, :components]
    return float(((y - mean) - (y - mean) @ basis @ basis.T).square().mean())


def summary(record: Record) -> dict[str, Any]:
    """Mean ± standard deviation over the seeds of every curve."""
    found: dict[str, Any] = {}
    for name in MODELS:
        rows = [p for p in record.all.get("main", {}).values() if p["setting"]["model"] == name]
        if rows:
            used = {key: rows[0]["setting"][key] for key in ("lr", "batch_size")}
            found.setdefault("main", {})[name] = {
                **_spread([p["mse"] for p in rows]), "parameters": rows[0]["parameters"], **used}
            found.setdefault("rescaled", {})[name] = {
                scale: _spread([p["rescaled"][scale] for p in rows]) for scale in rows[0]["rescaled"]}
        rows = [p for p in record.all.get("few", {}).values() if p["setting"]["model"] == name]
        for n in sorted({p["setting"]["images"] for p in rows}):
            values = [p["mse"] for p in rows if p["setting"]["images"] == n]
            found.setdefault("few", {}).setdefault(name, {})[str(n)] = _spread(values)
    for what in ABLATIONS if "ablation" in record.all else ():
        values = [p["mse"] for p in record.all["ablation"].values() if p["what"] == what]
        found.setdefault("ablation", {})[what] = _spread(values)
    return found


def _spread(values: list[float]) -> dict[str, float]:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.mean(values), "std": deviation, "n": len(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="../shared/data/mnist")
    parser.add_argument("--only", nargs="+", choices=("tuning", "main", "few", "ablation"),
                        default=("tuning", "main", "few", "ablation"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    train_set = open_images(options.data)
    if not isinstance(train_set, Digits) or train_set.test is None:
        parser.error(f"--data {options.data} holds no MNIST: give the folder of its idx files")
    test = pictures(train_set.test)
    record = Record(RESULTS / "gaussian.json")
    record.all["conditions"] = {
        "data": "../shared/data/mnist", "train": len(train_set), "test": len(test), "latent": 32, "epochs": 5,
        "reach": REACH, "threads": 1, "device": "cpu",
        "versions": {"omnilatent": __version__, "torch": torch.__version__}, "command": "python benchmarks/gaussian.py"}
    record.all["pca_32"] = principal(pictures(train_set), test, 32)
    chosen = tune(record, train_set)
    models = main_result(record, chosen, train_set, test) if "main" in options.only else {}
    if "few" in options.only:
        few(record, chosen, train_set, test)
    if "ablation" in options.only:
        ablate(record, chosen, train_set, test)
    record.all["summary"] = summary(record)
    record.write()
    print(json.dumps(record.all["summary"].get("main"), indent=1))
    if len(models) == len(MODELS):
        from gaussian_plot import draw

        draw(record.all, models, test, rescaled, RESULTS / "gaussian.png")


if __name__ == "__main__":
    main()
