"""Images from files."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


def load_image(path: str | Path) -> Image.Image:
    """The image in a file as RGB, upright, on white where it is transparent.

    Raises:
        ValueError: the file is missing, is a folder, or holds no readable image.
    """
    if not str(path):
        raise ValueError("image is empty: give the path of a file")
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not an image")
    try:
        with Image.open(path) as opened:
            image = _in_8_bits(ImageOps.exif_transpose(opened), opened.format)
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            return image.convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except PermissionError:
        raise ValueError(f"{path} may not be read: permission denied") from None
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not an image") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


def _in_8_bits(image: Image.Image, form: str | None) -> Image.Image:
    """A gray image of 16 bits as one of 8, which Pillow would cut off at 255; others as they are.

    Raises:
        ValueError: more than 16 bits, of which nothing says what is white.
    """
    # Pillow opens what PNG and PGM have 16 bits of as I in some versions.
    if image.mode.startswith("I;16") or (image.mode == "I" and form in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.int64)
        clear = image.info.get("transparency")
        if isinstance(clear, int):
            values[values == clear] = 0xFFFF  # on white
        return Image.fromarray(np.round(values / 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} has no white: save it with 8 or 16 bits")
    return image
