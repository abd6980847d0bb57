"""Bad arguments of the command line."""

from collections.abc import Callable
from pathlib import Path

from bad_inputs import Bad, Later, bad
from PIL import Image

from fused_route import RoutedConfig, attach


def file(name: str, content: bytes) -> Later:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return Later(make, f"file {name}")


def folder(name: str, *files: str) -> Later:
    def make(parent: Path) -> Path:
        (parent / name).mkdir()
        for inner in files:
            (parent / name / inner).write_text("{}")
        return parent / name

    return Later(make, f"folder {name} {' '.join(files)}".strip())


def picture(parent: Path) -> Path:
    Image.new("RGB", (8, 8), "red").save(parent / "picture.png")
    return parent / "picture.png"


def foreign_adapter(parent: Path) -> Path:
    from bad_inputs_models import Model

    attach(Model(), RoutedConfig(["first"])).save(parent / "foreign")
    return parent / "foreign"


def no_counts() -> list[Bad]:
    rows = [bad("range", text, "at least 1") for text in ("0", "-3")]
    rows += [bad("text", text, "positive") for text in ("x", "1.5", "1e3", "nan", "inf", "True")]
    return [*rows, bad("empty", "", "positive", "''"), bad("huge", "9" * 30, "at most")]


LONG = bad("huge", "x" * 5000, "too long", "xxxx", "ame")  # what the system calls it
PNG = b"\x89PNG\r\n\x1a\n"
OPTIONS: dict[str, dict[str, list[Bad]]] = {
    "demo": {
        "--steps": no_counts(),
        "--seeds": no_counts(),
        "--batch": no_counts(),
        "--rank": no_counts(),
        "--lr": [
            *(bad("not finite", text, "finite number") for text in ("nan", "inf", "-inf")),
            *(bad("range", text, "greater than 0") for text in ("0", "-1", "-0.001", "0.0")),
            bad("text", "x", "float"),
            bad("text", "1,5", "float"),
            bad("empty", "", "float", "''"),
            bad("huge", "1e400", "finite number", "inf"),
        ],
        "--out": [
            bad("name", file("file", b""), "is a file", "file"),
            bad("name", folder("mine", "notes.txt"), "new or an empty folder", "mine"),
            LONG,
        ],
        "--bundle": [
            bad("name", "no/such.tar", "does not exist", "no/such.tar"),
            bad("empty", file("empty.tar", b""), "no bundle", "empty.tar"),
            bad("name", file("text.tar", b"no tar"), "no bundle", "text.tar"),
            bad("name", folder("nothing"), "no bundle", "nothing"),
            bad("name", folder("other", "manifest.json"), "no bundle", "other"),
            LONG,
        ],
    },
    "predict": {
        "--adapter": [
            bad("name", "no/such", "directory", "no/such"),
            bad("empty", folder("empty"), "adapter checkpoint", "empty"),
            bad("name", file("file", b""), "directory", "file"),
            bad("type", folder("damaged", "adapter_config.json"), "VqaClassifier", "damaged"),
            bad("name", Later(foreign_adapter, "of another model"), "VqaClassifier", "foreign"),
            LONG,
        ],
        "--image": [
            bad("empty", "", "file"),
            bad("name", "no/such.png", "exist", "no/such.png"),
            bad("name", folder("pictures"), "file", "pictures"),
            bad("type", file("notes.txt", b"text"), "not an image", "notes.txt"),
            bad("empty", file("empty.png", b""), "image", "empty.png"),
            bad("type", file("cut.png", PNG + b"\0" * 20), "image", "cut.png"),
            LONG,
        ],
        "--question": [
            bad("empty", "", "question", "empty"),
            bad("empty", "  \n", "question", "empty"),
        ],
    },
}
RECIPE: dict[str, list[Bad]] = {
    "recipe": [
        bad("empty", "", "vqa-roberta-base-lora", "''"),
        bad("name", "no/such.yaml", "vqa-roberta-base-lora", "no/such.yaml"),
        bad("name", folder("recipes"), "vqa-roberta-base-lora", "recipes"),
        bad("type", file("list.yaml", b"- 1"), "a recipe has", "list.yaml"),
        bad("type", file("binary.yaml", b"\xff\xfe\x00"), "no YAML", "binary.yaml"),
        bad("empty", file("empty.yaml", b""), "a recipe has", "empty.yaml"),
        LONG,
    ]
}
RUN = [
    bad("name", "no/such", "a run of `fused-route train`", "no/such"),
    bad("empty", folder("empty"), "a run of `fused-route train`", "empty"),
    bad("name", file("file", b""), "a run of `fused-route train`", "file"),
]
FLAG: list[Bad] = []
OPTIONS |= {
    "train": {**RECIPE, "--dry-run": FLAG, "--skip-broken": FLAG},
    "eval": {
        "folder": RUN,
        "--split": FLAG,  # of a run: tests/test_experiment_cli.py
        "--task": FLAG,
        "--to": FLAG,
        "--skip-broken": FLAG,
    },
    "generate": {
        "--adapter": RUN,
        "--image": FLAG,
        "--task": FLAG,
        "--beams": no_counts(),
        "--tokens": no_counts(),
    },
    "encode": {
        **RECIPE,
        "--dtype": [bad("name", "int8", "float16"), bad("empty", "", "float16", "''")],
        "--workers": [
            bad("range", "-1", "at least 0"),
            bad("text", "x", "whole"),
            bad("huge", "9" * 30, "at most"),
        ],
        "--batch": no_counts(),
        "--verify": FLAG,
        "--skip-broken": FLAG,
    },
    "doctor": RECIPE,
    "compare": {
        "file": [
            bad("empty", "", "easy-vqa-routes", "''"),
            bad("name", "no/such.yaml", "easy-vqa-routes", "no/such.yaml"),
            bad("name", folder("comparisons"), "easy-vqa-routes", "comparisons"),
            bad("type", file("list.yaml", b"- 1"), "a comparison has", "list.yaml"),
            bad("type", file("binary.yaml", b"\xff\xfe\x00"), "no YAML", "binary.yaml"),
            bad("empty", file("empty.yaml", b""), "a comparison has", "empty.yaml"),
            LONG,
        ],
        "--out": [
            bad("name", file("file", b""), "name a folder", "file"),
            bad("name", folder("mine", "notes.txt"), "a new or an empty folder", "mine"),
            LONG,
        ],
        "--arm": [
            bad("name", "no_such", "none, add, mul, gram", "no_such"),
            bad("empty", "", "none, add, mul, gram", "''"),
        ],
        "--dry-run": FLAG,
        "--skip-broken": FLAG,
    },
}
OPTIONS["predict"]["--task"] = FLAG
VALID: dict[str, dict[str, Callable[[Path], object]]] = {
    "demo": {"--steps": lambda _: 1},
    "predict": {
        "--adapter": lambda _: "no/such",
        "--image": picture,
        "--question": lambda _: "what color is the shape?",
    },
    "train": {"recipe": lambda _: "no/such"},
    "eval": {"folder": lambda _: "no/such"},
    "generate": {"--adapter": lambda _: "no/such", "--image": picture},
    "encode": {"recipe": lambda _: "no/such"},
    "doctor": {},
    "compare": {"file": lambda _: "easy-vqa-routes"},
}
COMMANDS: list[Bad] = [
    bad("empty", [], "COMMAND"),
    bad("name", ["fly"], "demo"),
    bad("name", ["DEMO"], "demo"),
    bad("name", ["demo", "--what"], "--what"),
    bad("name", ["demo", "surplus"], "surplus"),
    bad("empty", ["demo", "--steps"], "expected one argument"),
    bad("empty", ["predict"], "--adapter"),
    bad("empty", ["predict", "--adapter", "x"], "--image"),
]
