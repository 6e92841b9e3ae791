"""Pictures with captions: COCO's own JSON beside a folder of pictures, or tars in WebDataset layout (`.jpg` and `.txt`).

- `Captioned`: pictures and the captions of each. `open_captioned`: by DATA. `read_coco`: COCO's JSON.
- `CocoCaptionsDataset`: a torch data set of dictionaries.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import UserError
from .images import UnreadableImage, resize_and_crop
from .keyed import EpochOrder, below, draws
from .patterns import paths_of
from .protocols import ImageSource
from .sources import open_images
from .splits import split, subset


@dataclass(frozen=True)
class Captioned:
    """Pictures, and for each its captions.

    Attributes:
        source: the pictures that have captions.
        captions: the name of a picture without folder and ending → its captions, at least one.
        varied: whether order, crop's mirroring and caption are drawn anew in every epoch; else the first caption, unmirrored.
    """

    source: ImageSource
    captions: Mapping[str, tuple[str, ...]]
    size: int
    seed: int = 0
    varied: bool = True

    @property
    def name(self) -> str:
        return self.source.name

    def __len__(self) -> int:
        return len(self.source)

    def sample(self, position: int) -> tuple[Tensor, str, list[tuple[str, str]]]:
        """A picture `(3, size, size)` in [0, 1], its short side resized, its centre cut out; one of its captions; and the (key,
        reason) of the unreadable pictures whose place it took.

        Raises:
            UserError: no picture can be read.
        """
        n = len(self)
        epoch, place = divmod(position, n)
        order = EpochOrder(n, self.seed, epoch) if self.varied else range(n)
        skipped: list[tuple[str, str]] = []
        for ahead in range(n):
            index = order[(place + ahead) % n]
            try:
                picture = resize_and_crop(self.source.read(index), self.size)
            except UnreadableImage as unreadable:
                skipped.append((self.source.key(index), unreadable.reason))
                continue
            pixels = torch.from_numpy(picture).permute(2, 0, 1).float() / 255
            own = self.captions[stem(self.source.key(index))]
            which, mirrored = draws("captions", self.seed, position, count=2) if self.varied else (0, 0)
            return pixels.flip(2) if mirrored >> 63 else pixels, own[below(which, len(own))], skipped
        raise UserError(f"None of the {n} pictures of {self.name} can be read; the first: {skipped[0][0]} {skipped[0][1]}.")


def stem(key: str) -> str:
    """A picture's key → its name without folder and ending."""
    return PurePosixPath(key).stem


def read_coco(file: Path) -> dict[str, tuple[str, ...]]:
    """COCO's captions_*.json: the name of a picture without ending → its captions.

    Raises:
        UserError: it is no such file.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        names = {image["id"]: stem(image["file_name"]) for image in content["images"]}
        found: dict[str, list[str]] = {}
        for annotation in content["annotations"]:
            found.setdefault(names[annotation["image_id"]], []).append(annotation["caption"].strip())
    except (OSError, ValueError, KeyError, TypeError) as failure:
        raise UserError(f"{file} is not COCO's JSON of captions ({type(failure).__name__}: {failure}): expected images with id and "
                        "file_name, and annotations with image_id and caption.") from failure
    return {name: tuple(captions) for name, captions in found.items()}


def read_texts(tar: Path) -> dict[str, tuple[str, ...]]:
    """The `.txt` members of a tar, a caption a line."""
    with tarfile.open(tar) as archive:
        texts = {stem(m.name): archive.extractfile(m) for m in archive.getmembers() if m.isfile() and m.name.endswith(".txt")}
        read = {name: file.read().decode("utf-8").splitlines() for name, file in texts.items() if file is not None}
    return {name: kept for name, lines in read.items() if (kept := tuple(line.strip() for line in lines if line.strip()))}


def find_captions(data: str) -> dict[str, tuple[str, ...]]:
    """The captions that belong to DATA: of tars their texts, of a folder the JSON files in it or in annotations/."""
    found: dict[str, tuple[str, ...]] = {}
    for path in paths_of(data):
        if path.suffix == ".tar":
            found |= read_texts(path)
        elif path.is_dir():
            for file in sorted([*path.glob("captions*.json"), *path.glob("annotations/captions*.json")]):
                found |= read_coco(file)
            for tar in sorted(path.glob("*.tar")):
                found |= read_texts(tar)
    return found


def open_captioned(data: str, val: str | None, size: int, seed: int = 0, held_out: float = 0.1) -> tuple[Captioned, Captioned]:
    """(training, held out) pictures with captions; without `val` a share of DATA is held out, chosen by the files' names.

    Raises:
        UserError: there are no pictures, or none of them has a caption.
    """
    training = _with_captions(data)
    if val is None:
        kept, aside = split(training[0], held_out)
        parts = (kept, training[1]), (aside, training[1])
    else:
        parts = training, _with_captions(val)
    first, second = (Captioned(source, captions, size, seed, varied) for (source, captions), varied in zip(parts, (True, False)))
    return first, second


def _with_captions(data: str) -> tuple[ImageSource, dict[str, tuple[str, ...]]]:
    source, captions = open_images(data), find_captions(data)
    has = [i for i in range(len(source)) if stem(source.key(i)) in captions]
    if not has:
        raise UserError(f"{data} holds {len(source)} pictures and no caption of any of them: expected tars with .txt beside each "
                        "picture, or COCO's captions_*.json in the folder or in its annotations/.")
    return subset(source, has, source.name), captions


class CocoCaptionsDataset(Dataset[dict[str, Tensor]]):
    """COCO's pictures and captions for a `Trainer`: `image` `(3, size, size)` in [0, 1], `text` ids `(n,)`.

    Args:
        image_dir: the pictures.
        annotation_file: COCO's captions_*.json.
        encode: a string → ids; by default each UTF-8 byte plus 3, as the model's own tokenizer has it.
        max_tokens: of a caption; what is longer is cut.
        size: side of the pictures.
        seed: of which caption a picture has; each gives another one in every epoch of `set_epoch`.
    """

    def __init__(self, image_dir: str | Path, annotation_file: str | Path, encode: Callable[[str], list[int]] | None = None,
                 max_tokens: int = 128, size: int = 224, seed: int = 0) -> None:
        source, captions = open_images(str(image_dir)), read_coco(Path(annotation_file))
        has = [i for i in range(len(source)) if stem(source.key(i)) in captions]
        if not has:
            raise UserError(f"{annotation_file} has no caption for any picture of {image_dir}.")
        self.examples = Captioned(subset(source, has, source.name), captions, size, seed, varied=False)
        self.encode = encode or (lambda text: [byte + 3 for byte in text.encode("utf-8")])
        self.max_tokens, self.epoch = max_tokens, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        image, _, skipped = self.examples.sample(i)
        if skipped:
            raise UserError(f"{skipped[0][0]} {skipped[0][1]}.")
        own = self.examples.captions[stem(self.examples.source.key(i))]
        caption = own[below(draws("coco", self.examples.seed, self.epoch, i, count=1)[0], len(own))]
        return {"image": image, "text": torch.tensor(self.encode(caption)[: self.max_tokens])}
