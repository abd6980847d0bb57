"""The study's text model: the first layers of the MiniLM that a package ships."""

from pathlib import Path

from bench.study.folders import made_once
from fused_route.training.demo.models import load_encoder
from fused_route.training.demo.task import encoder_directory

LAYERS = 3  # of 6: half the seconds of a run, of which there are 236


def write_text_model(out: Path, layers: int = LAYERS) -> Path:
    """A folder with the first layers of all-MiniLM-L6-v2 and its tokenizer, of no use without
    what is trained on top; made once.

    Raises:
        ValueError: the package is not installed, or `out` holds something else.
    """

    def fill(folder: Path) -> None:
        encoder, tokenizer = load_encoder(encoder_directory(), layers)
        encoder.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return made_once(out, "config.json", fill)
