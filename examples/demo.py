"""The bundled any-to-any model in half a minute: ten words become sounds, pictures and videos, and these become each other.

    python examples/demo.py [--model NAME] [--out demo]

What goes in is the ten digits' words and what the model itself makes of them, so that no data is needed: the demo shows that the
modalities agree, `omnilatent evaluate` how well the model does on data that it never saw. Writes OUT/pictures.png: what each
modality, and all together, are turned into as a picture, at the left what is likeliest on average, at the right a drawn example;
and OUT/three.wav, the word "three" spoken. Another model is a run of a recipe that learns the digits world.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from omnilatent import LatentNeuralHook
from omnilatent.data.digit_world import WORDS
from omnilatent.data.mel import write_sound
from omnilatent.errors import UserError
from omnilatent.omni.model import OmniLatentModel
from omnilatent.omni.saving import load
from omnilatent.omni.tokenizer import pad


def pictures(model: OmniLatentModel, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(likeliest, drawn) from sources `(b, …)`: `(b, 3, h, w)` each."""
    source = model.read(inputs)
    likeliest, drawn = (model.answer(source, "image", steps=steps).clamp(0, 1) for steps in (0, model.config.flow_steps))
    return likeliest, drawn


def labelled(rows: dict[str, tuple[Tensor, Tensor]], scale: int = 2) -> Image.Image:
    """A row of pictures each, likeliest and drawn, with its name."""
    h, w = next(iter(rows.values()))[0].shape[-2:]
    strips = [torch.cat([*likeliest, torch.ones(3, h, w // 2), *drawn], 2) for likeliest, drawn in rows.values()]
    sheet = Image.fromarray((torch.cat(strips, 1) * 255).round().byte().permute(1, 2, 0).numpy())
    sheet = sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST)
    page = Image.new("RGB", (sheet.width + 100, sheet.height + 24), "white")
    page.paste(sheet, (100, 24))
    write = ImageDraw.Draw(page)
    for number, name in enumerate(rows):
        write.text((8, 24 + (number + 0.4) * h * scale), name, fill="black")
    for name, left in (("likeliest", 0), ("drawn", len(WORDS) * w + w // 2)):
        write.text((104 + left * scale, 6), name, fill="black")
    return page


def main(argv: list[str] | None = None) -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--model", default="omni-small", help="a bundled any-to-any model, or a run of the digits world")
    arguments.add_argument("--out", type=Path, default=Path("demo"))
    chosen = arguments.parse_args(argv)
    try:
        model = load(chosen.model)
    except UserError as failure:
        raise SystemExit(str(failure)) from None
    chosen.out.mkdir(parents=True, exist_ok=True)

    with torch.no_grad():
        words = pad([model.tokenizer.encode(word) for word in WORDS])
        source = model.read({"text": words})
        data = {"text": words} | {name: model.answer(source, name).clamp(0, 1) for name in ("audio", "image", "video")}

        print("every modality to itself and to every other: the shapes that come out of two")
        for name in model.modalities:
            out = model.forward_multimodal({name: data[name][:2]}, list(model.modalities))
            print(f"  {name:>6} → " + ", ".join(f"{target} {tuple(result['output'].shape)}" for target, result in out.items()))

        print("\nthe ten words, and how each modality that was made of them is read")
        for name in model.modalities:
            read = [model.tokenizer.decode(row.tolist()) for row in model.generate(name, data[name])]
            right = sum(a == b for a, b in zip(read, WORDS, strict=True))
            print(f"  from {name:>5}: {right:>2} of {len(WORDS)}   {', '.join(read)}")

        rows = {f"from {name}": pictures(model, {name: data[name]}) for name in model.modalities}
        rows["from all four"] = pictures(model, data)
        labelled(rows).save(chosen.out / "pictures.png")
        write_sound(chosen.out / "three.wav", model.mel.to_wave(data["audio"][WORDS.index("three")]), model.mel.rate)

    image = data["image"]
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
