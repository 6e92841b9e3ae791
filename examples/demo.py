"""The any-to-any model in two minutes: train it on embedded digits, turn modalities into each other, add a hook, look at gradients.

    python examples/demo.py [--run RUN] [--out demo] [--steps 400]

Writes OUT/pictures.png: held-out digits above, below them what each of their modalities, and all together, were turned into as
a picture, at the left what is likeliest on average, at the right a drawn example; and OUT/three.wav, what the word "three" was
turned into as sound. In so few steps not every pair is learned: the printed figures tell which, beside the mean picture's.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from omnilatent import LatentNeuralHook
from omnilatent.cli.main import main as command
from omnilatent.data.mel import write_sound
from omnilatent.omni.evaluation import psnr
from omnilatent.omni.examples import collate, open_examples
from omnilatent.omni.model import OmniLatentModel
from omnilatent.omni.saving import load
from omnilatent.training.checkpoint import stated_step

MODEL = "--hidden-dim 96 --num-layers 3 --num-heads 4 --batch-size 32 --lr 6e-3 --warmup 20 --ema-decay 0.95 --validation-examples 32"


def pictures(model: OmniLatentModel, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(likeliest, drawn) from sources `(b, …)`: `(b, 3, 32, 32)` each."""
    source = model.read(inputs)
    likeliest, drawn = (model.answer(source, "image", (32, 32), steps=steps).clamp(0, 1) for steps in (0, None))
    return likeliest, drawn


def labelled(rows: dict[str, tuple[Tensor, Tensor]], columns: int = 8, scale: int = 2) -> Image.Image:
    """A row of pictures each, likeliest and drawn, with its name."""
    strips = [torch.cat([*likeliest[:columns], torch.zeros(3, 32, 16), *drawn[:columns]], 2) for likeliest, drawn in rows.values()]
    sheet = Image.fromarray((torch.cat(strips, 1) * 255).round().byte().permute(1, 2, 0).numpy())
    sheet = sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST)
    page = Image.new("RGB", (sheet.width + 100, sheet.height + 24), "white")
    page.paste(sheet, (100, 24))
    write = ImageDraw.Draw(page)
    for number, name in enumerate(rows):
        write.text((8, 24 + (number + 0.4) * 32 * scale), name, fill="black")
    for name, left in (("likeliest", 0), ("drawn", columns * 32 + 16)):
        write.text((104 + left * scale, 6), name, fill="black")
    return page


def main(argv: list[str] | None = None) -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--run", type=Path, help="a run of an omni recipe instead of training one")
    arguments.add_argument("--out", type=Path, default=Path("demo"))
    arguments.add_argument("--steps", type=int, default=400, help="train to so many; an earlier demo's run in OUT goes on from where it is")
    chosen = arguments.parse_args(argv)
    run = chosen.run or chosen.out / "run"
    if chosen.run is None and stated_step(run / "final") < chosen.steps:
        begun = (run / "run.json").exists()
        how = ["--resume", str(run)] if begun else ["omni", "--data", "digits", "--out", str(run), *MODEL.split()]
        code = command(["train", *how, "--steps", str(chosen.steps)])
        if code:
            raise SystemExit(code)
    model = load(run)
    training, held_out = open_examples("digits", None, 0, model.config)
    data = collate([held_out.sample(i) for i in range(32)], model.tokenizer)
    mean = torch.stack([torch.as_tensor(training.sample(i)["image"]) for i in range(500)]).mean(0)

    with torch.no_grad():
        print("\nevery modality to itself and to every other: the shapes that come out")
        for source in model.modalities:
            out = model.forward_multimodal({source: data[source][:8]}, list(model.modalities))
            print(f"  {source:>6} → " + ", ".join(f"{target} {tuple(result['output'].shape)}" for target, result in out.items()))
        print("\nthe digits named from each modality, held out")
        true = [model.tokenizer.decode(row.tolist()) for row in data["text"]]
        for source in model.modalities:
            words = [model.tokenizer.decode(row.tolist()) for row in model.generate(source, data[source])]
            right = sum(a == b for a, b in zip(words, true, strict=True))
            print(f"  from {source:>5}: {right:>2} of {len(true)}   {', '.join(words[:8])}")
        print(f"  they are:           {', '.join(true[:8])}")
        rows = {"they are": (data["image"], data["image"])}
        rows |= {f"from {source}": pictures(model, {source: data[source]}) for source in model.modalities}
        rows["from all four"] = pictures(model, data)
        print("\ndigits as pictures, held out: likeliest, drawn")
        for name, (likeliest, drawn) in list(rows.items())[1:]:
            print(f"  {name:>13} {psnr(likeliest, data['image']).mean():6.1f} {psnr(drawn, data['image']).mean():6.1f} dB")
        null = psnr(mean.expand_as(data["image"]), data["image"]).mean()
        print(f"  {'mean picture':>13} {null:6.1f} dB; what is no better is not learned yet: "
              f"train longer{'' if chosen.run else ', with --steps'}")
        ids = torch.tensor([model.tokenizer.encode("three")])
        wave = model.mel.to_wave(model("text", ids, "audio")["output"][0].clamp(0, 1))
    chosen.out.mkdir(parents=True, exist_ok=True)
    labelled(rows).save(chosen.out / "pictures.png")
    write_sound(chosen.out / "three.wav", wave, model.mel.rate)

    image = data["image"][:8]
    hook = LatentNeuralHook("demo", num_tokens=4, dim=model.config.hidden_dim, target_layers=range(model.config.num_layers))
    with torch.no_grad():
        before = model("image", image, "text")["output"]
        model.register_hook(hook)
        after = model("image", image, "text")["output"]
    model.freeze_base()
    learning, all_of_them = model.trainable_parameters()
    model("image", image, "text")["output"].square().mean().backward()
    print(f"\na hook of {learning:,} of {all_of_them:,} parameters moves the logits by {(after - before).abs().max():.2g} before it has "
          f"learned anything; its gates' gradient is {hook.gate_bias.grad.norm():.2g}")
    model.remove_hook("demo")
    with torch.no_grad():
        same = torch.equal(model("image", image, "text")["output"], before)
    print(f"without it the logits are {'the same, bit by bit' if same else 'OTHERS'}\n\n{chosen.out / 'pictures.png'}")
    print(chosen.out / "three.wav")


if __name__ == "__main__":
    main()
