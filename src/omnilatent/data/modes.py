"""Every Pillow mode → 8-bit RGB, without clipping what has more than 8 bits.

- `to_rgb`: the one conversion; `UnknownRange` when the values do not say what white is.

Wide-gamut colour profiles are not applied, as in the published protocols that we compare with.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

WHITE_16 = 65535


class UnknownRange(Exception):
    """The pixels hold numbers that cannot be mapped to brightness; the message says which."""


def to_rgb(image: Image.Image) -> np.ndarray:
    """A loaded image of any mode → uint8 `(h, w, 3)`.

    Transparency is composited on white. 16-bit grey is scaled by 1/257 and rounded, so that 65535 is white; 32-bit
    integers count as 16-bit values; floats are brightness in [0, 1]. Pillow itself keeps the high byte of each
    channel of 16-bit colour.

    Raises:
        UnknownRange: 32-bit values outside 0..65535, floats outside [0, 1] or not finite.
    """
    if image.mode.startswith("I"):
        return np.repeat(_grey_16(image)[..., None], 3, axis=2)
    if image.mode == "F":
        return np.repeat(_grey_float(image)[..., None], 3, axis=2)
    if image.mode == "LAB":
        image = _lab_to_rgb(image)
    if image.has_transparency_data:
        image = _on_white(image)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _grey_16(image: Image.Image) -> np.ndarray:
    """Modes I, I;16 and its byte orders → uint8 `(h, w)`; the inverse of 8 bits widened by v · 257 is exact."""
    values = np.asarray(image).astype(np.int64)
    white = _white_level(image)
    if values.min() < 0 or values.max() > white:
        raise UnknownRange(f"holds values from {values.min()} to {values.max()}, and white is {white} in 16 bits")
    grey = ((values * 255 * 2 + white) // (2 * white)).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return grey


def _white_level(image: Image.Image) -> int:
    """65535, but 4095 in TIFF files that store 12 bits: Pillow unpacks these into I;16 unscaled."""
    tags = getattr(image, "tag_v2", None)
    return 4095 if tags is not None and tags.get(258) == (12,) else WHITE_16


def _grey_float(image: Image.Image) -> np.ndarray:
    """Mode F → uint8 `(h, w)`. Stretching each image to its own extremes would invent a brightness, so we refuse."""
    values = np.asarray(image)
    if not np.isfinite(values).all():
        raise UnknownRange("holds pixels that are NaN or infinite")
    if values.min() < 0 or values.max() > 1:
        raise UnknownRange(f"holds floats from {values.min():.4g} to {values.max():.4g}, outside [0, 1]")
    return np.rint(values * 255).astype(np.uint8)


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode == "La":  # Pillow un-premultiplies grey only into LA
        image = image.convert("LA")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)


def _lab_to_rgb(image: Image.Image) -> Image.Image:
    """CIE L*a*b* through LittleCMS: Pillow's own convert does not know it."""
    from PIL import ImageCms

    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    assert converted is not None  # None only where it works in place
    return converted
