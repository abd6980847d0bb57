"""Recipes: those that come with the package, overrides, and what is refused."""

from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from experiments import written

from fused_route import RoutedConfig
from fused_route.training.experiment.arguments import arguments_of
from fused_route.training.experiment.compat import published
from fused_route.training.experiment.recipe import NAMED, ModelRecipe, Recipe, TaskRecipe
from fused_route.training.experiment.recipe_file import SHORT, read_recipe, shipped


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return written(tmp_path, "roberta")


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes_are_whole_and_come_back_from_their_own_yaml(
    name: str, tmp_path: Path
) -> None:
    recipe = read_recipe(name)
    assert recipe.training["output_dir"] == f"runs/{name}"
    again = tmp_path / "recipe.yaml"
    again.write_text(recipe.to_yaml())
    assert read_recipe(again) == recipe
    alpha = yaml.safe_load(again.read_text())["adapter"]["alpha"]
    assert (alpha is not None) == (recipe.adapter.host == "lora")  # runs of before have a number
    arguments_of(recipe, validated=True)


def test_the_three_settings_are_shipped() -> None:
    kinds = {read_recipe(name).model.kind for name in shipped()}
    assert kinds == {"classifier", "decoder", "encoder-decoder"}
    hosts = {(read_recipe(n).model.kind, read_recipe(n).adapter.host) for n in shipped()}
    assert hosts == {(kind, host) for kind in kinds for host in ("lora", "adapter")}


OVERRIDES = [
    (["--route", "gram"], lambda r: r.adapter.route, "gram"),
    (["--route=gram"], lambda r: r.adapter.route, "gram"),
    (["--adapter.route", "gram"], lambda r: r.adapter.route, "gram"),
    (["--lr", "1e-4"], lambda r: r.training["learning_rate"], 1e-4),
    (["--learning_rate", "1e-4"], lambda r: r.training["learning_rate"], 1e-4),
    (["--learning-rate", "1e-4"], lambda r: r.training["learning_rate"], 1e-4),
    (["--epochs", "7"], lambda r: r.training["num_train_epochs"], 7),
    (["--steps", "5"], lambda r: r.training.get("max_steps"), 5),
    (["--rank", "16"], lambda r: r.adapter.r, 16),
    (["--target_modules", "[key]"], lambda r: r.adapter.target_modules, ("key",)),
    (["--tasks.vqa.limit", "3"], lambda r: r.tasks["vqa"].limit, 3),
    (["--limit", "3"], lambda r: r.tasks["vqa"].limit, 3),
    (["--features", "tokens"], lambda r: r.model.features, "tokens"),
    (["--compat", "eccv24"], lambda r: r.compat, "eccv24"),
    (["--out", "elsewhere"], lambda r: r.training["output_dir"], "elsewhere"),
    (["--bf16", "true"], lambda r: r.training.get("bf16"), True),
]


@pytest.mark.parametrize(
    ("given", "value", "expected"), OVERRIDES, ids=[" ".join(given) for given, *_ in OVERRIDES]
)
def test_overrides(file: Path, given: list[str], value: object, expected: object) -> None:
    assert value(read_recipe(file, given)) == expected  # type: ignore[operator]
    assert value(read_recipe(file)) != expected  # type: ignore[operator]


def test_short_names_are_those_of_settings() -> None:
    of = {"adapter": {f.name for f in fields(RoutedConfig)}, "training": None}
    for full in SHORT.values():
        section, name = full.split(".")
        assert of[section] is None or name in of[section]  # type: ignore[operator]


REFUSED = [
    (["--rout", "gram"], "--rout is no setting of a recipe; did you mean --route?"),
    (["--normalize", "always"], "--adapter.normalize, --tasks.vqa.normalize"),
    (["--route", "nothing"], "route must be one of"),
    (["--lr"], "learning_rate"),
    (["--kind", "encoder"], "model.kind must be one of"),
    (["--head", "three-layer"], "model.head must be one of"),
    (["--layout", "vqa"], "layout must be one of"),
    (["--rank", "0"], "r must be"),
    (["--rank", "many"], "adapter.r"),
    (["--limit", "0"], "limit must be"),
    (["--alpha", "x"], "alpha"),
    (["--tasks.gqa.limit", "3"], "is no setting of a recipe"),
    (["--training.lr", "3"], "is no setting of a recipe"),
    (["--augmentation", "crop"], "features_from='tower'"),
    (["--lr", "abc"], "training.learning_rate must be float, got 'abc'"),
    (["--lr", "nan"], "training.learning_rate must be"),
    (["--lr", "null"], "training.learning_rate must be"),
    (["--lr", "true"], "training.learning_rate must be"),
    (["--lr", "-1"], "training.learning_rate must be at least"),
    (["--steps", "2.5"], "training.max_steps must be int"),
    (["--steps", "0"], "greater than 0"),
    (["--epochs", "0"], "greater than 0"),
    (["--epochs", "abc"], "training.num_train_epochs must be"),
    (["--seed", "abc"], "training.seed must be int"),
    (["--gradient_accumulation_steps", "0"], "training.gradient_accumulation_steps must be"),
    (["--batch_size", "0"], "training.per_device_train_batch_size must be at least 1"),
    (["--max_grad_norm", "x"], "training.max_grad_norm must be"),
    (["--push_to_hub", "true"], "push the adapter's folder yourself"),
    (["--resume_from_checkpoint", "x"], "goes on by itself"),
    (["--label_smoothing_factor", "0.1"], "label_smoothing_factor has no meaning"),
    (["--dryrun", "true"], "did you mean --dry-run?"),
    (["--out", "null"], "training.output_dir must be given"),
    (["--kind", "decoder", "--head", "two-layer"], "model.head='two-layer' has no meaning"),
    *([[f"--{name}", "unheard-of"], f"{name} must be one of"] for name in NAMED),
]


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=lambda x: str(x)[:40])
def test_refused_in_one_line(file: Path, given: list[str], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        read_recipe(file, given)
    assert message in str(caught.value) and "\n" not in str(caught.value)


BROKEN: dict[str, tuple[str | bytes, str]] = {
    "no yaml": ("model: [", "is no YAML file"),
    "a list": ("- 1\n- 2\n", "holds no mapping"),
    "empty": ("", "holds no mapping"),
    "unknown section": ("modell: {}\n", "did you mean model?"),
    "no section": ("tasks: {}\n", "model.language"),
    "a key twice": ("model: {}\nmodel: {}\n", "'model' is there twice, again in line 2"),
    "a section that is a list": ("model: [1]\n", "must be a mapping"),
    "an empty section": ("training:\n", "must be a mapping"),
    "an empty task": ("tasks: {vqa: }\n", "tasks.vqa must be a mapping"),
    "a task that names no file": ("tasks: {a/b: {}}\n", "letters, digits and _"),
    "an empty setting": ("cache:\n", "cache is empty"),
    "an empty setting of a task": ("tasks: {vqa: {prompt: }}\n", "tasks.vqa.prompt is empty"),
    "itself": ("a: &a [*a]\n", "is no setting"),
    "binary": (b"\xff\xfe\x00\x00", "is no YAML file"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_files(what: str, tmp_path: Path) -> None:
    content, message = BROKEN[what]
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as caught:
        read_recipe(path)
    assert message in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("where", ["top", "model", "adapter", "tasks.vqa", "training"])
def test_unknown_keys_are_refused_wherever_they_are(file: Path, where: str) -> None:
    tree = yaml.safe_load(file.read_text())
    place = tree
    for part in [] if where == "top" else where.split("."):
        place = place[part]
    place["learning_rat"] = 1
    file.write_text(yaml.safe_dump(tree))
    with pytest.raises(ValueError, match="learning_rat"):
        read_recipe(file)


@pytest.mark.parametrize("section", ["model", "adapter", "tasks"])
def test_missing_sections_are_named(file: Path, section: str) -> None:
    tree = yaml.safe_load(file.read_text())
    del tree[section]
    file.write_text(yaml.safe_dump(tree))
    with pytest.raises(ValueError, match=section):
        read_recipe(file)


def test_no_such_recipe_lists_those_that_there_are() -> None:
    with pytest.raises(ValueError, match="vqa-roberta-base-lora"):
        read_recipe("vqa-roberta")


def test_trainings_arguments_are_refused_in_one_line(file: Path) -> None:
    with pytest.raises(ValueError, match=r"^training: ") as caught:
        arguments_of(read_recipe(file, ["--eval_strategy", "sometimes"]), validated=True)
    assert "\n" not in str(caught.value)


class TestCompat:
    def test_none_changes_nothing(self, file: Path) -> None:
        recipe = read_recipe(file)
        assert published(recipe) is recipe

    def test_classifiers_have_the_published_head(self) -> None:
        told = read_recipe("vqa-roberta-base-lora", ["--compat", "eccv24", "--head", "native"])
        assert published(told).model.head == "two-layer"

    def test_lora(self) -> None:
        recipe = published(read_recipe("coco-gpt2-lora", ["--compat", "eccv24"]))
        adapter = recipe.adapter
        assert (adapter.transpose, adapter.segments) == ("eccv24", "joint")
        assert adapter.train == ("host_bias", "norms")
        assert published(recipe) == recipe

    @pytest.mark.parametrize(
        ("name", "residual", "share"),
        [("coco-gpt2-adapter", True, "block"), ("vqa-roberta-base-adapter", False, "none")],
    )
    def test_adapter(self, name: str, residual: bool, share: str) -> None:
        adapter = published(read_recipe(name, ["--compat", "eccv24"])).adapter
        assert (adapter.residual, adapter.share) == (residual, share)
        assert adapter.train == ("norms",)

    def test_plain_lora_has_no_modes(self) -> None:
        given = ["--compat", "eccv24", "--route", "none"]
        assert published(read_recipe("coco-gpt2-lora", given)).adapter.transpose == "exact"

    @pytest.mark.parametrize(
        ("name", "given", "message"),
        [
            ("multitask-bart-lora", [], "no encoder-decoder"),
            ("coco-gpt2-lora", ["--visual_tokens", "none"], "visual_tokens=before"),
            ("coco-gpt2-lora", ["--layout", "gqa", "--tasks.caption.train", "val"], "captions"),
            ("coco-gpt2-lora", ["--method", "cross-attention"], "method='routed'"),
        ],
    )
    def test_refused(self, name: str, given: list[str], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            published(read_recipe(name, ["--compat", "eccv24", *given]))


@pytest.mark.parametrize("of", [Recipe, ModelRecipe, TaskRecipe])
def test_every_setting_is_documented(of: type) -> None:
    for field in fields(of):
        assert f"{field.name}" in str(of.__doc__), field.name
