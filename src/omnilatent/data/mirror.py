"""MNIST from its usual mirrors.

- `fetch_mnist`: its four files into a folder, each checked by size and SHA-256.
"""

from __future__ import annotations

from pathlib import Path

from ..download import Unreachable, fetch_file
from .idx import find_idx

MIRRORS = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/")
FILES = {  # name → bytes, SHA-256
    "train-images-idx3-ubyte.gz": (9_912_422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
    "train-labels-idx1-ubyte.gz": (28_881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
    "t10k-images-idx3-ubyte.gz": (1_648_877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
    "t10k-labels-idx1-ubyte.gz": (4_542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
}


def fetch_mnist(folder: Path) -> str | None:
    """Download what `folder` lacks; a file that lies there already, in any encoding, is left as it is.

    Returns:
        None when all four are there, else why the mirrors could not be reached.

    Raises:
        UserError: a mirror sent something else, or the disk is full.
    """
    for name, (size, digest) in FILES.items():
        if find_idx(folder, name.removesuffix(".gz")) is not None:
            continue
        for mirror in MIRRORS:
            try:
                fetch_file(mirror + name, folder / name, size, digest)
                break
            except Unreachable as failure:
                reason = str(failure)
        else:
            return reason
    return None
