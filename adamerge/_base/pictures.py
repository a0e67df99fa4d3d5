"""A picture as every part of the program sees it, whatever its file's bits."""

from __future__ import annotations

import numpy as np
from PIL import Image

_UP = 0x0112  # EXIF's orientation


def eight_bits(image: Image.Image) -> Image.Image:
    """An image of 8 bits per channel: 16 become 8 by their high byte, as Pillow itself reads 16-bit
    colours. Others are given back.

    Raises:
        ValueError: values of which white is not known.
    """
    if image.mode == "F":
        raise ValueError("mode F (floats), of which white is not known: save it with 8 or 16 bits")
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.copy()
        del image.info["transparency"]  # left out of RGB anyway, but with a warning
    if image.mode != "I" and not image.mode.startswith("I;"):
        return image
    values = np.asarray(image)
    low, high = values.min(), values.max()
    tiff = image.format == "TIFF"  # whose `I` has 32 bits, or signs; that of others has 16
    if low < 0 or high > 0xFFFF or (tiff and image.mode == "I" and 0 < high <= 0xFF):
        raise ValueError(
            f"mode {image.mode} with values from {low} to {high}, of which white is not known: "
            "expected 8 bits, or 16, of which 65535 is white"
        )
    twelve = tiff and getattr(image, "tag_v2", {}).get(258) == (12,)  # bits of a sample
    scaled = Image.fromarray((values >> (4 if twelve else 8)).astype(np.uint8))
    upright = Image.Exif()
    upright[_UP] = image.getexif().get(_UP, 1)
    scaled.info["exif"] = upright.tobytes()
    return scaled
