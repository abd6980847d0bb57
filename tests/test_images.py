"""Images from files, in the modes that files have."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fused_route.training.data.images import load_image

RAMP = np.linspace(0, 65_535, 256).round().astype(np.uint16).reshape(16, 16)


@pytest.mark.parametrize("form", ["png", "tiff", "pgm"])
def test_sixteen_bits_are_scaled(form: str, tmp_path: Path) -> None:
    """A ramp stays one: cut off at 255 it would be white but for its first place."""
    path = tmp_path / f"ramp.{form}"
    Image.fromarray(RAMP).save(path)
    found = np.asarray(load_image(path))
    assert found.shape == (16, 16, 3)
    assert (found == np.arange(256).reshape(16, 16, 1)).all()


def test_what_is_clear_in_sixteen_bits_is_white(tmp_path: Path) -> None:
    Image.fromarray(RAMP).save(tmp_path / "clear.png", transparency=int(RAMP[0, 1]))
    found = np.asarray(load_image(tmp_path / "clear.png"))
    assert found[0, 1].tolist() == [255] * 3 and found[0, 2].tolist() == [2] * 3


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_what_has_no_white_is_refused(kind: type, tmp_path: Path) -> None:
    Image.fromarray(RAMP.astype(kind)).save(tmp_path / "deep.tiff")
    with pytest.raises(ValueError, match=r"deep\.tiff cannot be read as an image: mode [IF] has"):
        load_image(tmp_path / "deep.tiff")
