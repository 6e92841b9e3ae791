"""The pooled clones of two teachers beside their nulls: R², cosine and L2 on held-out photos, and time per image.

    python benchmarks/organic_pooled.py [--data FOLDER] [--lessons FOLDER] [--bundle]

Learns on the train photos of imagenet-1k-sample (every twelfth chooses the ridge and how many neurons are kept) and
measures on its 100 val photos, which chose nothing. Nulls: the mean of the training targets, and a linear map of an 8×8
thumbnail. Times are medians of processor time on one thread from a uint8 256² array, clone and teacher in turn. What
the teachers say is kept in --lessons and read from there the next time. --bundle writes the clone of kl-f8-small to
src/omnilatent/weights/ovae. With the lessons at hand 3 minutes on one core; TAEF2 and kl-f8-small need 5 minutes each
for theirs.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from safetensors.torch import load_file, save_file
from torch import Tensor

import omnilatent
from omnilatent import hub
from omnilatent.codec import Codec
from omnilatent.data import open_images
from omnilatent.organic.pairs import fit_readout
from omnilatent.organic.pooled import KIND, PooledEncoder, checkpoint_of, spec_of
from omnilatent.organic.pooled_learning import Agreement, PooledConfig, agreement, learn_from
from omnilatent.organic.teaching import Lessons, teach

ROOT = Path(__file__).parents[1]
OUTPUTS = 4
CARD = """---
license: other
license_name: mit-trained-on-imagenet
library_name: omnilatent
---
# ovae

Pooled organic clone of kl-f8-small: an image of any size, seen at 256² → 4 numbers, the mean of the teacher's normalised latent over its grid. It only encodes. {neurons} tanh neurons on 8×8 patches at four scales, their means over the picture, and a linear map; {parameters:,} numbers, stored as fp16. Learned without gradients: the neurons come from pairs of patches, chosen by forward selection, the map from forward evaluations.

Measured on the fp16 file as loaded, on the 100 val photos of the ImageNet sample, which took no part in learning ({pictures} train photos did):

| | R² | cosine | L2 | ms an image | faster than its teacher |
| --- | --- | --- | --- | --- | --- |
| ovae | {r2:.3f} | {cosine:.3f} | {l2:.3f} | {ms:.2f} | {times:.0f}× |
| null: linear on an 8×8 thumbnail | {linear_r2:.3f} | {linear_cosine:.3f} | {linear_l2:.3f} | | |
| null: the mean | {mean_r2:.3f} | {mean_cosine:.3f} | {mean_l2:.3f} | | |

Licence: MIT for the weights as far as they are ours; the training photos are ImageNet's, for non-commercial research and education.

Command: `python benchmarks/organic_pooled.py --bundle`.
"""


@dataclass(frozen=True)
class Options:
    """The pooled clones of kl-f8-small and TAEF2 beside their nulls."""

    data: Path = ROOT.parent / "shared" / "data"
    """holds imagenet-1k-sample/ and taef2/"""
    lessons: Path = ROOT / "runs" / "lessons"
    """where the teachers' latents are kept"""
    out: Path = ROOT / "benchmarks" / "results" / "organic_pooled.json"
    teachers: tuple[str, ...] = ("kl-f8-small", "taef2")
    neurons: int = 512
    candidates: int = 768
    seed: int = 0
    bundle: bool = False


def lessons_of(teacher: Codec, name: str, part: str, options: Options) -> Lessons:
    """The teacher's latents for the photos of train.tar or val.tar, from --lessons or made now."""
    file = options.lessons / f"{name}-{teacher.provenance.weights_hash}-{part}.safetensors"
    if not file.exists():
        photos = open_images(str(options.data / "imagenet-1k-sample" / f"{part}.tar"))
        made = teach(teacher, photos, progress=print)
        options.lessons.mkdir(parents=True, exist_ok=True)
        save_file({"pictures": made.pictures, "latents": made.latents}, file)
    return Lessons(**load_file(file))


def milliseconds(calls: dict[str, Callable[[], object]], repeats: dict[str, int]) -> dict[str, float]:
    """Median processor time of each on one thread, the calls taking turns: a busy machine preempts the longer call more
    often, and processor time is what the wall clock shows on an idle one."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for name, call in calls.items():
        call()
    for _ in range(5):
        for name, call in calls.items():
            for _ in range(repeats[name]):
                start = time.process_time()
                call()
                times[name].append(1e3 * (time.process_time() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def thumbnails(pictures: Tensor) -> Tensor:
    return torch.cat([F.adaptive_avg_pool2d(part.float() / 255, 8).flatten(1) for part in pictures.split(32)])


def measure(teacher: Codec, encoder: PooledEncoder, train: Lessons, exam: Lessons, val: Lessons) -> dict[str, object]:
    targets, wanted = train.pooled(OUTPUTS).flatten(1), val.pooled(OUTPUTS).flatten(1)
    linear, _ = fit_readout(thumbnails(train.pictures), targets, thumbnails(exam.pictures),
                            exam.pooled(OUTPUTS).flatten(1), ridges=(1e-4, 1e-3, 1e-2, 1e-1, 1.0))
    picture = val.pictures[:1]
    ms = milliseconds({"clone": lambda: encoder(picture), "teacher": lambda: teacher.encode(picture)},
                      {"clone": 40, "teacher": 1})
    rows: dict[str, Agreement] = {
        "clone": agreement(torch.cat([encoder(part) for part in val.pictures.split(20)]), wanted),
        "linear on an 8×8 thumbnail": agreement(linear(thumbnails(val.pictures)), wanted),
        "mean": agreement(targets.mean(0).expand_as(wanted), wanted),
    }
    return {"rows": {name: asdict(row) for name, row in rows.items()}, "clone_ms": ms["clone"],
            "teacher_ms": ms["teacher"], "times_faster": ms["teacher"] / ms["clone"], "n": len(val),
            "learned_on": len(train)}


def write_bundle(encoder: PooledEncoder, teacher: Codec, figures: dict[str, object] | None) -> PooledEncoder:
    """Write weights/ovae, with its card once there are figures, and return the fp16 file as it is loaded."""
    card = ""
    if figures:
        rows = figures["rows"]
        card = CARD.format(
            neurons=encoder.readout_weight.shape[1], parameters=sum(b.numel() for b in encoder.buffers()),
            pictures=figures["learned_on"], ms=figures["clone_ms"], times=figures["times_faster"], **rows["clone"],
            **{f"mean_{k}": v for k, v in rows["mean"].items()},
            **{f"linear_{k}": v for k, v in rows["linear on an 8×8 thumbnail"].items()})
    with hub.new_folder(hub.BUNDLED / "ovae") as folder:
        half = {name: tensor.half() for name, tensor in encoder.state_dict().items()}
        hub.write_model(folder, KIND, checkpoint_of(encoder, teacher.provenance), spec_of(encoder), half, card)
    return hub.load("ovae").module


def main(options: Options) -> None:
    config = PooledConfig(outputs=OUTPUTS, neurons=options.neurons, candidates=options.candidates)
    results: dict[str, object] = {"torch": torch.__version__, "threads": torch.get_num_threads(), "seed": options.seed,
                                  "neurons": options.neurons, "retina": config.retina.identity()}
    for name in options.teachers:
        teacher = omnilatent.load(options.data / "taef2" if name == "taef2" else name)
        lessons, val = lessons_of(teacher, name, "train", options), lessons_of(teacher, name, "val", options)
        held = torch.arange(len(lessons)) % 12 == 0
        train, exam = lessons[~held], lessons[held]
        encoder, report = learn_from(train, exam, config, print, options.seed)
        bundled = options.bundle and name == "kl-f8-small"
        if bundled:
            encoder = write_bundle(encoder, teacher, None)
        figures = measure(teacher, encoder, train, exam, val)
        if bundled:
            write_bundle(encoder, teacher, figures)
        results[name] = figures | {"weights_hash": teacher.provenance.weights_hash, "learning_s": report.seconds,
                                   "neurons_at_each_scale": report.neurons}
        print(name, json.dumps(figures, indent=1))
    options.out.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print("\n| teacher | | R² | cosine | L2 | ms | × teacher |\n| --- | --- | --- | --- | --- | --- | --- |")
    for name in options.teachers:
        figures = results[name]
        for row, values in figures["rows"].items():
            speed = f"{figures['clone_ms']:.2f} | {figures['times_faster']:.0f}" if row == "clone" else " | "
            print(f"| {name} | {row} | {values['r2']:.3f} | {values['cosine']:.3f} | {values['l2']:.3f} | {speed} |")


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    main(tyro.cli(Options))
