"""Everything that an experiment is, as one value: a YAML file and what the command line overrides.

model:    {language: FacebookAI/roberta-base, vision: google/vit-base-patch16-224-in21k, …}
adapter:  {route: mul, r: 128, target_modules: [query, value], …}
tasks:    {vqa: {layout: vqav2, root: data/vqav2, …}}
training: {learning_rate: 3e-4, …}           # names of transformers.TrainingArguments
"""

from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from fused_route import RoutedConfig
from fused_route.checks import one_of, whole
from fused_route.functional import IMPLS, PLANS
from fused_route.training.data.layouts import LAYOUTS
from fused_route.training.data.samples import BROKEN, Source
from fused_route.training.metrics.vqa_accuracy import NORMALIZE
from fused_route.training.vlm_config import FEATURES, PROJECTIONS, VISUAL_TOKENS

KINDS = ("classifier", "decoder", "encoder-decoder")
HEADS = ("native", "two-layer")
METHODS = ("routed", "cross-attention", "full")
MODULES = ("shared", "per-task")
SAMPLING = ("proportional", "balanced")
COMPAT = ("none", "eccv24")
FEATURES_FROM = ("cache", "tower")
AUGMENTATIONS = ("none", "crop")
CONTROLS = ("none", "shuffled", "constant", "noise")
PROJECTOR_INITS = ("random", "pca")
SELECTION = ("score", "loss")


@dataclass(frozen=True)
class ModelRecipe:
    """The frozen models.

    Attributes:
        language: directory or hub name of a language model of transformers, with its tokenizer; or
            "packaged/all-minilm-l6-v2", of a package with its weights.
        vision: the same of a vision tower, with its image processor; timm's have hub names too; or
            "packaged/efficientnet-lite0".
        kind: what the language model does: "classifier" chooses among the answers that training
            has, "decoder" goes on with the prompt, "encoder-decoder" translates it.
        features, visual_tokens, projection: as in `VisionLanguageConfig`.
        head: of a classifier: "native", transformers' own; "two-layer", Linear(d, 2d), LayerNorm,
            GELU, Linear(2d, answers) on the tanh pooler, as the published code has it.
    """

    language: str
    vision: str
    kind: str
    features: str = "pooled"
    visual_tokens: str = "none"
    projection: str = "none"
    head: str = "native"

    def __post_init__(self) -> None:
        one_of("model.kind", self.kind, KINDS)
        one_of("model.features", self.features, FEATURES)
        one_of("model.visual_tokens", self.visual_tokens, VISUAL_TOKENS)
        one_of("model.projection", self.projection, PROJECTIONS)
        one_of("model.head", self.head, HEADS)
        if self.head != "native" and self.kind != "classifier":
            raise ValueError(f"model.head={self.head!r} has no meaning for kind={self.kind!r}")


@dataclass(frozen=True)
class TaskRecipe:
    """A task: where its data are, what the model reads and how it answers.

    Attributes:
        layout: how the files lie, one of `LAYOUTS`; it says what the task is.
        root, images: their folder, and that of the images where it is another.
        train, validation, test: splits of the layout, joined by "+"; null for none.
        prompt: stands before every text.
        max_length: tokens of prompt and text; of a decoder, with the answer.
        max_new_tokens: of an answer.
        num_beams: 1 decodes greedily.
        batch_size: of training, on each device; null: training.per_device_train_batch_size.
        answers: file of the answers that a classifier chooses among; null: those that occur in
            at least `least` questions of the split `answers_from`: "train", "validation" or
            "test" of this task, or another of the layout; null: of the training split.
        normalize: of VQA's accuracy, as in `vqa_accuracy`.
        limit: rows of each split, for trials; null: all.
    """

    layout: str
    root: str | None = None
    images: str | None = None
    train: str | None = "train"
    validation: str | None = None
    test: str | None = None
    prompt: str = ""
    max_length: int = 40
    max_new_tokens: int = 20
    num_beams: int = 1
    batch_size: int | None = None
    answers: str | None = None
    answers_from: str | None = None
    least: int = 1
    normalize: str = "official"
    limit: int | None = None

    def __post_init__(self) -> None:
        one_of("layout", self.layout, LAYOUTS)
        one_of("normalize", self.normalize, NORMALIZE)
        for name in ("max_length", "max_new_tokens", "num_beams", "least"):
            whole(name, getattr(self, name))
        for name in ("batch_size", "limit"):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name))

    @property
    def source(self) -> Source:
        """Where the rows come from."""
        folders = [None if f is None else Path(f).expanduser() for f in (self.root, self.images)]
        return Source(self.layout, *folders)

    def split(self, name: str) -> str:
        """The layout's split that is this recipe's "train", "validation" or "test".

        Raises:
            ValueError: there is none.
        """
        if name not in ("train", "validation", "test"):
            return name
        split: str | None = getattr(self, name)
        if split is None:
            raise ValueError(f"tasks: {name} is null, layout {self.layout!r} has {self.splits}")
        return split

    @property
    def splits(self) -> str:
        """Those of the layout, for messages."""
        return ", ".join(LAYOUTS[self.layout].splits)


@dataclass(frozen=True)
class Recipe:
    """An experiment.

    Attributes:
        model, tasks, training: the sections; training holds arguments of TrainingArguments.
        adapter: which layers are adapted, and how.
        method: what is trained: "routed" bottlenecks (route "none" is plain LoRA); the
            "cross-attention" baseline in their place, of the same number of parameters at most;
            "full", beside them every parameter of the language model, for a ceiling.
        heads: of cross-attention.
        modules: of several tasks: "shared", the same for all; "per-task", an adapter for each.
        sampling: batches of several tasks: "proportional" to their rows; "balanced", as many of
            each, the shorter tasks repeated.
        compat: "eccv24": what the published code does, where it differs; docs/reproduce.md lists.
        features_from: "cache": each image is encoded once and its features are kept on the disk;
            "tower": encoded in every step, which augmentation needs.
        augmentation: of training images: "none"; "crop", a random part of 80 % or more.
        control: what a text gets in place of its own image, in training and in evaluation, to see
            what is known without it: "shuffled", another one of its split, drawn at random;
            "constant", ones; "noise", normal draws with the batch's mean and deviation of each
            feature. With "none" it gets its own.
        projector_init: how a projector of features to the layers' width starts, where there is
            one: "random"; "pca", centred, rotated and scaled by the training images' features. It
            trains, or not, as adapter.projector says.
        cache: folder of mapped data and features.
        broken: of rows whose image or answers are missing: "refuse" or "skip".
        select: what "best" means: "score", the mean of the tasks' main scores on the validation
            splits; "loss" there.
        patience: evaluations without progress after which training ends; null: never.
        impl, plan: of the routed layers, as in `RoutedLinear`; adapters have no plan.

    Raises:
        ValueError: a value that is not accepted, or settings that contradict each other.
    """

    model: ModelRecipe
    adapter: RoutedConfig
    tasks: dict[str, TaskRecipe]
    training: dict[str, Any] = field(default_factory=dict)
    method: str = "routed"
    heads: int = 4
    modules: str = "shared"
    sampling: str = "proportional"
    compat: str = "none"
    features_from: str = "cache"
    augmentation: str = "none"
    control: str = "none"
    projector_init: str = "random"
    cache: str = ".cache/fused_route"
    broken: str = "refuse"
    select: str = "score"
    patience: int | None = None
    impl: str = "auto"
    plan: str = "auto"

    def __post_init__(self) -> None:
        for name, accepted in NAMED.items():
            one_of(name, getattr(self, name), accepted)
        whole("heads", self.heads)
        if self.patience is not None:
            whole("patience", self.patience)
            if not any(task.validation for task in self.tasks.values()):
                raise ValueError(f"patience={self.patience} needs a validation split to look at")
        if not self.tasks:
            raise ValueError("tasks is empty: name at least one, with its layout")
        if self.augmentation != "none" and self.features_from == "cache":
            raise ValueError(
                f"augmentation={self.augmentation!r} changes images in every step: it needs "
                "features_from='tower'"
            )
        if self.projector_init != "random" and self.features_from != "cache":
            raise ValueError(
                f"projector_init={self.projector_init!r} reads features from the cache: it needs "
                f"features_from='cache', got {self.features_from!r}"
            )
        if self.model.kind == "classifier" and len(self.tasks) > 1:
            raise ValueError(
                f"tasks has {len(self.tasks)} entries, and a classifier one: take another kind"
            )

    def to_yaml(self) -> str:
        """The recipe with all its values, as a file that `read_recipe` takes."""
        listed = {name: _plain(value) for name, value in asdict(self).items()}
        listed["adapter"]["alpha"] = self.adapter.to_json().get("lora_alpha")  # a number, not null
        return str(yaml.safe_dump(listed, sort_keys=False, allow_unicode=True))


def default(name: str) -> Any:
    """What a setting is where a file does not say, by its whole name; None where there is none.

    Files of runs that are older than a setting lack it.
    """
    section, _, rest = name.partition(".")
    if section == "training":
        return None
    of = {"model": ModelRecipe, "adapter": RoutedConfig, "tasks": TaskRecipe}.get(section, Recipe)
    last = rest.rpartition(".")[2] if rest else section
    found = next((f.default for f in fields(of) if f.name == last), MISSING)
    return None if found is MISSING else _plain(found)


def _plain(value: Any) -> Any:
    """With lists in place of tuples, which YAML has no name for."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


NAMED = {
    "method": METHODS,
    "modules": MODULES,
    "sampling": SAMPLING,
    "compat": COMPAT,
    "features_from": FEATURES_FROM,
    "augmentation": AUGMENTATIONS,
    "control": CONTROLS,
    "projector_init": PROJECTOR_INITS,
    "broken": BROKEN,
    "select": SELECTION,
    "impl": IMPLS,
    "plan": PLANS,
}
