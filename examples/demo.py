"""The any-to-any model in a minute: train it on embedded digits, turn modalities into each other, add a hook, look at gradients.

    python examples/demo.py [--run RUN] [--out demo] [--steps 400]

Writes OUT/pictures.png: held-out digits above, below them what each of their modalities was turned into as a picture; and
OUT/three.wav, what the word "three" was turned into as sound.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image

from omnilatent import LatentNeuralHook
from omnilatent.cli.main import main as command
from omnilatent.data.mel import write_sound
from omnilatent.omni.examples import collate, open_examples
from omnilatent.omni.saving import load

MODEL = "--hidden-dim 96 --num-layers 3 --num-heads 4 --batch-size 32 --lr 6e-3 --warmup 20 --ema-decay 0.95 --validation-examples 32"


def main(argv: list[str] | None = None) -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--run", type=Path, help="a run of an omni recipe instead of training one")
    arguments.add_argument("--out", type=Path, default=Path("demo"))
    arguments.add_argument("--steps", type=int, default=400)
    chosen = arguments.parse_args(argv)
    run = chosen.run or chosen.out / "run"
    if chosen.run is None and not (run / "final").exists():
        code = command(["train", "omni", "--data", "digits", "--out", str(run), "--steps", str(chosen.steps), *MODEL.split()])
        if code:
            raise SystemExit(code)
    model = load(run)
    held_out = open_examples("digits", None, 0, model.config)[1]
    data = collate([held_out.sample(i) for i in range(8)], model.tokenizer)

    with torch.no_grad():
        print("\nevery modality to itself and to every other: the shapes that come out")
        for source in model.modalities:
            out = model.forward_multimodal({source: data[source]}, list(model.modalities))
            print(f"  {source:>6} → " + ", ".join(f"{target} {tuple(result['output'].shape)}" for target, result in out.items()))
        words = [model.tokenizer.decode(row.tolist()) for row in model.generate("image", data["image"])]
        true = [model.tokenizer.decode(row.tolist()) for row in data["text"]]
        print(f"\npictures read as: {', '.join(words)}\n(they are:        {', '.join(true)})")
        rows = [data["image"]]
        rows += [model(source, data[source], "image", size=(32, 32))["output"].clamp(0, 1) for source in model.modalities]
        every = model.forward_multimodal(data, ["image"], sizes={"image": (32, 32)})["image"]["output"].clamp(0, 1)
        sheet = torch.cat([torch.cat(list(row), 2) for row in [*rows, every]], 1)
        ids = torch.tensor([model.tokenizer.encode("three")])
        wave = model.mel.to_wave(model("text", ids, "audio")["output"][0].clamp(0, 1))
    chosen.out.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray((sheet * 255).round().byte().permute(1, 2, 0).numpy())
    picture.resize((picture.width * 3, picture.height * 3), Image.Resampling.NEAREST).save(chosen.out / "pictures.png")
    write_sound(chosen.out / "three.wav", wave, model.mel.rate)

    hook = LatentNeuralHook("demo", num_tokens=4, dim=model.config.hidden_dim, target_layers=range(model.config.num_layers))
    with torch.no_grad():
        before = model("image", data["image"], "text")["output"]
        model.register_hook(hook)
        after = model("image", data["image"], "text")["output"]
    model.freeze_base()
    learning, all_of_them = model.trainable_parameters()
    model("image", data["image"], "text")["output"].square().mean().backward()
    print(f"\na hook of {learning:,} of {all_of_them:,} parameters moves the logits by {(after - before).abs().max():.2g} before it has "
          f"learned anything; its gates' gradient is {hook.gate_bias.grad.norm():.2g}")
    model.remove_hook("demo")
    with torch.no_grad():
        same = torch.equal(model("image", data["image"], "text")["output"], before)
    print(f"without it the logits are {'the same, bit by bit' if same else 'OTHERS'}\n\n{chosen.out / 'pictures.png'}")
    print(chosen.out / "three.wav")


if __name__ == "__main__":
    main()
