"""The 4 × 4 coherence matrix of the digits world: one model, one run, read by judges that never saw what a model made.

    python benchmarks/omni_digits.py --data ../shared/data [--steps 12000] [--out runs/omni]      trains, measures, prints
    python benchmarks/omni_digits.py --data ../shared/data --model RUN                            measures a run
    python benchmarks/omni_digits.py --data ../shared/data --without all --steps 2000             speakers that were not heard
    python benchmarks/omni_digits.py --data digits --small --steps 60 --count 40                  a trial on a CPU

Judges are trained first (on training data, measured on held-out real data). Every cell: accuracy as the judge reads it, the null
(digits of other examples), the judge's own accuracy, Fréchet distance in its features; PSNR where the target is the source;
by regression and by flow; and the PSNR of the class's mean in place of a copy. `--without` trains audio and text alone on all
speakers but one and reads the one's recordings.
Writes results/omni_digits.json, so that several runs add up under their `--label`; a `--small` trial writes only into `--results`.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from omni_tables import cells_table

from omnilatent.data.digit_world import DigitWorld, heard, open_world
from omnilatent.hub import locate
from omnilatent.metrics.digit_readers import Reader, fit_reader
from omnilatent.omni.coherence import Cell, coherence, recognition
from omnilatent.omni.config import OmniTraining
from omnilatent.omni.evaluation import psnr
from omnilatent.omni.examples import DigitExamples
from omnilatent.omni.recipes import debug_omni, omni
from omnilatent.omni.saving import load
from omnilatent.omni.task import OmniTask
from omnilatent.training.checkpoint import stated_step
from omnilatent.training.loop import launch_fabric, train

RESULTS = Path(__file__).parent / "results" / "omni_digits.json"
FUSED = (("image", "audio"), ("audio", "text"), ("image", "audio", "text", "video"))


@dataclass(frozen=True)
class OmniDigits:
    """Train on the digits world and measure what goes in against what comes out."""

    data: str
    """'digits', or a folder with mnist/ and fsdd/."""
    model: Path | None = None
    """A run to measure instead of training one."""
    steps: int | None = None
    """By default the recipe's."""
    batch_size: int | None = None
    out: Path = Path("runs/omni-digits")
    count: int = 1_000
    """Held-out examples."""
    guidance: float | None = None
    """By default the model's."""
    reader_steps: int = 1_500
    workers: int = -1
    small: bool = False
    """The recipe debug-omni."""
    without: str | None = None
    """A speaker that training does not hear; 'all': each of them in turn, by a model of its own."""
    label: str = "omni"
    results: Path | None = None
    """The file to write; by default results/omni_digits.json, and none of a trial."""


def readers_of(training: DigitWorld, test: DigitWorld, steps: int, device: torch.device) -> dict[str, Reader]:
    """The judges, by modality."""
    found = {}
    for name, most in (("image", 20_000), ("audio", 6_000), ("video", 6_000)):
        samples, held = ([world.sample(i) for i in range(min(count, len(world)))] for world, count in ((training, most), (test, 2_000)))
        data, held_data = (torch.stack([getattr(s, name) for s in part]).to(device) for part in (samples, held))
        labels, held_labels = (torch.tensor([s.label for s in part], device=device) for part in (samples, held))
        if name == "audio" and test.recordings:  # each recording once, as it is
            held_data = torch.stack([heard(r.wave) for r in test.recordings]).to(device)
            held_labels = torch.tensor([r.digit for r in test.recordings], device=device)
        began = time.monotonic()
        found[name] = fit_reader(data, labels, held_data, held_labels, steps)
        print(f"judge of {name}: {found[name].accuracy:.4f} on {len(held_data)} held out, {time.monotonic() - began:.0f} s", flush=True)
    return found


def prototypes(training: DigitWorld, test: DigitWorld, count: int) -> dict[str, float]:
    """What a copy is worth that is only its class's mean over 2,000 training examples, in dB."""
    learned, held = ([world.sample(i) for i in range(min(most, len(world)))] for world, most in ((training, 2_000), (test, count)))
    found = {}
    for name in ("image", "audio", "video"):
        means = {label: torch.stack([getattr(s, name) for s in learned if s.label == label]).mean(0) for label in {s.label for s in held}}
        found[name] = float(psnr(torch.stack([means[s.label] for s in held]), torch.stack([getattr(s, name) for s in held])).mean())
    return found


def recipe_of(options: OmniDigits) -> OmniTraining:
    recipe = debug_omni() if options.small else omni()
    return replace(recipe, run=replace(recipe.run, steps=options.steps or recipe.run.steps, workers=options.workers,
                                       batch_size=options.batch_size or recipe.run.batch_size, validate_every=10**6, save_every=10**6))


def unheard(options: OmniDigits, speaker: str, device: torch.device) -> float:
    """Audio → text on all recordings of a speaker, of whom training heard none."""
    recipe = recipe_of(options)
    recipe = replace(recipe, model=replace(recipe.model, modalities=("text", "audio")))
    task = OmniTask(recipe, options.data, None, lambda file, reason: None)
    assert isinstance(task.examples, DigitExamples) and isinstance(task.held_out, DigitExamples)
    world, known = task.examples.world, task.examples.world.recordings
    own = [r for r in (*known, *task.held_out.world.recordings) if r.speaker == speaker]
    if not own:
        raise SystemExit(f"{options.data} holds no recordings of {speaker}; the speakers are {', '.join(sorted({r.speaker for r in known}))}")
    task.examples = replace(task.examples, world=replace(world, recordings=tuple(r for r in known if r.speaker != speaker)))
    out = options.out / f"without-{speaker}"
    train(task, recipe.run, out, launch_fabric(recipe.run))
    return recognition(load(out, device), own)


def write(options: OmniDigits, record: dict[str, Any]) -> None:
    results = options.results or (None if options.small else RESULTS)
    if results is None:
        return
    kept = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}
    kept[options.label] = kept.get(options.label, {}) | record
    results.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def main(options: OmniDigits) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    training, test = open_world(options.data)
    if options.without is not None:
        speakers = sorted({r.speaker for r in training.recordings}) if options.without == "all" else [options.without]
        found = {}
        for speaker in speakers:
            found[speaker] = unheard(options, speaker, device)
            print(f"audio → text on the recordings of {speaker}, of whom training heard none: {found[speaker]:.4f}", flush=True)
        return write(options, {"speakers": found, "speakers_steps": recipe_of(options).run.steps})
    began, seconds = time.monotonic(), None
    if options.model is None:
        recipe = recipe_of(options)
        train(OmniTask(recipe, options.data, None, lambda file, reason: None), recipe.run, options.out, launch_fabric(recipe.run))
        seconds = time.monotonic() - began
        print(f"trained in {seconds:.0f} s", flush=True)
    model = load(options.model or options.out, device)
    if options.guidance is not None:
        model.config = replace(model.config, guidance=options.guidance)
    readers = readers_of(training, test, options.reader_steps, device)
    sources = [(name,) for name in model.modalities] + list(FUSED)
    record: dict[str, Any] = {
        "data": Path(options.data).name, "count": options.count, "seconds": seconds,
        "steps": stated_step(locate(str(options.model or options.out))),
        "guidance": model.config.guidance, "flow_steps": model.config.flow_steps,
        "parameters": sum(p.numel() for p in model.parameters()), "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "class_mean_psnr": prototypes(training, test, options.count),
        "judges": {name: reader.accuracy for name, reader in readers.items()}, "ways": {}}
    for way, steps in (("regression", 0), ("flow", model.config.flow_steps)):
        cells: dict[tuple[str, str], Cell] = coherence(model, test, readers, options.count, sources, steps)
        record["ways"][way] = {f"{source}→{target}": asdict(cell) for (source, target), cell in cells.items()}
        print(f"\nby {way}:\n{cells_table(record['ways'][way])}", flush=True)
    if test.recordings:
        record |= {"recordings": recognition(model, test.recordings), "recordings_count": len(test.recordings)}
        print(f"\naudio → text on the {len(test.recordings)} test recordings: {record['recordings']:.4f}", flush=True)
    write(options, record)


if __name__ == "__main__":
    main(tyro.cli(OmniDigits))
