"""Turn a run of omni-small into bundled weights: fp16, with its card and the figures of the file as it is loaded.

    python benchmarks/bundle_omni.py RUN --data ../shared/data --trained-on "…"

Measures the fp16 file by omni_digits.py, whose results it writes too, under the label omni-small.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import omni_digits
import tyro
from omni_tables import cells_table
from safetensors.torch import load_file

from omnilatent import hub

NAME = "omni-small"
LICENCE = ("CC-BY-SA-4.0, that of the Free Spoken Digit Dataset (Zohar Jackson and others), from whose recordings it learned to speak; "
           "the handwriting is MNIST's (Y. LeCun, C. Cortes)")


@dataclass(frozen=True)
class BundleOmni:
    """Turn a run of omni-small into bundled weights."""

    run: tyro.conf.Positional[Path]
    data: str
    """A folder with mnist/ and fsdd/."""
    trained_on: str
    """One clause: data, hardware and time."""


def main(options: BundleOmni) -> None:
    source, out = hub.locate(str(options.run)), hub.BUNDLED / NAME
    saved = hub.read_config(source)
    half = {name: t.half() if t.is_floating_point() else t for name, t in load_file(source / "model.safetensors").items()}
    training = saved["training"] | {"recipe": NAME}

    def write(card: str) -> None:
        with hub.new_folder(out) as folder:
            hub.write_model(folder, saved["kind"], saved["model"], None, half, card, mel=saved["mel"], codecs=saved["codecs"],
                            training=training, versions=saved["versions"])
            (folder / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())

    write("")
    omni_digits.main(omni_digits.OmniDigits(data=options.data, model=out, label=NAME))
    measured = json.loads(omni_digits.RESULTS.read_text(encoding="utf-8"))[NAME]
    copies = ", ".join(f"{name} {measured['ways']['regression'][f'{name}→{name}']['psnr']:.1f} dB" for name in ("audio", "image", "video"))
    judges = ", ".join(f"{name} {100 * share:.1f} %" for name, share in measured["judges"].items())
    write(
        f"---\nlicense: cc-by-sa-4.0\nlibrary_name: omnilatent\n---\n# {NAME}\n\n"
        f"Any-to-any model of the ten digits as text, sound, picture and video, {measured['parameters']:,} parameters, stored as fp16. "
        f"Trained on {options.trained_on}.\n\n"
        f"Measured on the fp16 file as loaded (fp32 arithmetic) on {measured['count']:,} held-out examples: what a judge reads rightly "
        f"of what is made by flow, in %, *of* what it reads rightly on real data ({judges}); in brackets the null, the digit of another "
        f"example; then the Fréchet distance in its features, and the PSNR of copies. By default copies are regressed instead: {copies}."
        f"\n\n{cells_table(measured['ways']['flow'])}\n"
        f"Audio to text on the {measured['recordings_count']} test recordings: {100 * measured['recordings']:.1f} %. Speakers that it "
        "did not hear are understood less well, and what is no digit becomes one all the same.\n\n"
        f"Licence: {LICENCE}.\n\n"
        f"Command: `omnilatent train {NAME} --data ../shared/data --steps {training['step']}`, then `python benchmarks/bundle_omni.py`; it "
        "ran as `omni --hidden-dim 96 --num-layers 5 --num-heads 6`, which is the same, and was saved more seldom.\n"
    )
    print((out / "README.md").read_text(encoding="utf-8"))
    print({p.name: p.stat().st_size for p in out.iterdir()})


if __name__ == "__main__":
    main(tyro.cli(BundleOmni))
