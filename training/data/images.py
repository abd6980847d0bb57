"""Images from files."""

from pathlib import Path

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
            image = ImageOps.exif_transpose(opened)
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
