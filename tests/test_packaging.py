"""What is installed, and what importing it does."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import fused_route

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "fused_route": "fused_route",
    "kernels": "fused_route/kernels",
    "training": "fused_route/training",
}
INSTALLED = (".py", "py.typed", "kernels/README.md", "training/demo-packages.txt", ".yaml")


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tracked() -> list[str]:
    return run("git", "ls-files").splitlines()


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(sdist, wheel built from it), from the tracked files as they are now."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in tracked():
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            target.symlink_to((ROOT / name).readlink())
        elif (ROOT / name).is_file():
            target.write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def test_wheel_holds_the_tracked_files(distributions: tuple[Path, Path]) -> None:
    expected = set()
    for name in tracked():
        top, _, rest = name.partition("/")
        is_link = (ROOT / name).is_symlink()
        if top in PACKAGES and not is_link and name.endswith(INSTALLED):
            expected.add(f"{PACKAGES[top]}/{rest}")
    with zipfile.ZipFile(distributions[1]) as wheel:
        found = {name for name in wheel.namelist() if ".dist-info/" not in name}
        (top_level,) = (n for n in wheel.namelist() if n.endswith("top_level.txt"))
        assert wheel.read(top_level).split() == [b"fused_route"]
    assert found == expected


def test_sdist_builds_the_wheel_and_has_the_licence(distributions: tuple[Path, Path]) -> None:
    with tarfile.open(distributions[0]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {
        "LICENSE",
        "README.md",
        "pyproject.toml",
        "kernels/README.md",
        "training/cli.py",
    } <= names


def test_wheel_installs_alone_and_imports_elsewhere(
    distributions: tuple[Path, Path], tmp_path: Path
) -> None:
    """An empty environment; only its dependencies come, by path, from the one tests run in."""
    venv.create(tmp_path / "env", with_pip=False)
    scheme = {"base": str(tmp_path / "env"), "platbase": str(tmp_path / "env")}
    site = Path(sysconfig.get_path("purelib", "venv", vars=scheme))
    python = Path(sysconfig.get_path("scripts", "venv", vars=scheme), "python")
    before = {path.name for path in site.iterdir()}
    run(
        sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps",
        "--no-index", distributions[1],
    )  # fmt: skip
    new = {path.name for path in site.iterdir()} - before
    assert {name for name in new if not name.endswith(".dist-info")} == {"fused_route"}
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (tmp_path / "elsewhere").mkdir()
    code = (
        "import fused_route, fused_route.training.cli; "
        "print(fused_route.__version__, fused_route.__file__)"
    )
    version, file = run(python, "-c", code, cwd=tmp_path / "elsewhere").split()
    assert version == fused_route.__version__ and Path(file).is_relative_to(site)
    command = python.with_name("fused-route")
    assert run(command, "--version", cwd=tmp_path).split() == ["fused-route", version]


@pytest.mark.slow
def test_wheel_installs_with_its_dependencies(
    distributions: tuple[Path, Path], tmp_path: Path
) -> None:
    run(sys.executable, "-m", "venv", tmp_path / "env")
    python = tmp_path / "env" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", distributions[1])
    code = (
        "import torch, fused_route as f; l = f.RoutedLinear(torch.nn.Linear(4, 4), 2)\n"
        "with l.context.using(torch.randn(1, 4)): print(l(torch.randn(1, 2, 4)).shape)"
    )
    assert "torch.Size([1, 2, 4])" in run(python, "-W", "error", "-c", code, cwd=tmp_path)


def test_import_brings_torch_alone_and_leaves_cuda_alone() -> None:
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import fused_route\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new - set(sys.stdlib_module_names)))"
    )
    untouched = (
        "import torch\n"
        "def touched(*a, **k): raise AssertionError('import asked for CUDA')\n"
        "for name in ('is_available', 'device_count', 'init', '_lazy_init', 'current_device'):\n"
        "    setattr(torch.cuda, name, touched)\n"
    )
    assert run(sys.executable, "-W", "error", "-c", untouched + code).strip() == "['fused_route']"


def test_kernels_has_no_init() -> None:
    """With one, our folder would hide Hugging Face's `kernels` package from transformers."""
    assert not [name for name in tracked() if name == "kernels/__init__.py"]
    code = "import transformers.integrations.hub_kernels"
    run(sys.executable, "-c", code)  # at the root of the repository, where the folder could win


def test_version_is_one() -> None:
    assert fused_route.__version__ in (ROOT / "CHANGELOG.md").read_text()


LAYERS = {  # what a file of fused_route/ may import from the rest of it
    "checks": set(),
    "routes": {"checks"},
    "routing": {"checks", "routes"},
    "routing_input": {"checks", "routes"},
    "together": {"routing_input"},
    "context": {"checks", "routing_input", "together"},
    "reference": {"checks", "routes", "routing", "routing_input"},
    "dropout": set(),
    "fusion": {"routes", "routing"},
    "layout": set(),
    "sizes": set(),
    "plan": {"dropout", "fusion", "kernels", "layout", "sizes"},
    "ops": {"dropout", "fusion", "layout", "plan", "sizes"},
    "autograd": {"__version__", "fusion", "layout", "ops", "plan", "sizes"},
    "coverage": {"reference", "routes", "routing", "routing_input", "sizes"},
    "fused": {
        "autograd",
        "checks",
        "coverage",
        "dropout",
        "fusion",
        "ops",
        "plan",
        "reference",
        "routes",
        "routing",
        "routing_input",
    },
    "known": {"checks", "coverage", "fused", "reference", "routing_input"},
    "arguments": {"checks", "routing", "routing_input"},
    "functional": {
        "arguments",
        "checks",
        "fused",
        "known",
        "reference",
        "routes",
        "routing",
        "routing_input",
    },
    "bases": {"checks"},
    "recording": set(),
    "bottleneck": {
        "checks",
        "context",
        "functional",
        "fused",
        "routes",
        "routing",
        "routing_input",
        "together",
    },
    "modules": {
        "arguments",
        "bases",
        "bottleneck",
        "checks",
        "context",
        "functional",
        "recording",
        "reference",
        "routes",
        "routing",
    },
    "fold": {
        "bases",
        "bottleneck",
        "checks",
        "modules",
        "reference",
        "routes",
        "routing",
        "routing_input",
        "together",
    },
    "merge": {"bases", "bottleneck", "fold", "modules"},
    "config": {"checks", "modules", "reference", "routes", "routing"},
    "targets": {"checks", "config"},
    "surroundings": set(),
    "checkpoint": {"checks"},
    "before": {"build", "checkpoint", "modules"},
    "card": {"__version__", "checkpoint"},
    "written": {"checkpoint", "config", "targets"},
    "published": {"bottleneck", "checkpoint", "checks", "modules"},
    "testing": set(),
    "freezing": {"config", "targets"},
    "text": {"config", "context", "routing_input", "targets"},
    "build": {"bases", "bottleneck", "config", "context", "modules", "surroundings", "targets"},
    "attach": {
        "__version__",
        "before",
        "bottleneck",
        "build",
        "card",
        "checkpoint",
        "checks",
        "config",
        "context",
        "fold",
        "freezing",
        "functional",
        "merge",
        "modules",
        "routing_input",
        "targets",
        "text",
        "together",
        "written",
    },
}


@pytest.mark.parametrize("module", LAYERS)
def test_layers_import_downward_only(module: str) -> None:
    import ast

    tree = ast.parse((ROOT / "fused_route" / f"{module}.py").read_text())
    imported: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            imported |= {node.module} if node.module else {alias.name for alias in node.names}
    assert imported <= LAYERS[module]


PEFT_LAYERS = {  # of fused_route/peft: each may import those before it, and all of fused_route
    "register": set(),
    "configs": {"register"},
    "layers": set(),
    "tuners": {"layers"},
}


@pytest.mark.parametrize("module", PEFT_LAYERS)
def test_peft_imports_downward_only(module: str) -> None:
    import ast

    tree = ast.parse((ROOT / "fused_route" / "peft" / f"{module}.py").read_text())
    nodes = [
        node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1
    ]
    assert {node.module for node in nodes} <= PEFT_LAYERS[module]
    files = {p.stem for p in (ROOT / "fused_route" / "peft").glob("*.py")} - {"__init__"}
    assert files == set(PEFT_LAYERS)


ALONE = {"devices", "files", "packages"}
REPORTING = {"plots", "tables"}
MODELS = {"vlm", "vlm_config", "vlm_generate", "visual_tokens", "towers"}
FEATURES = {"feature_cache", "feature_shards", "encoders"}
BASELINES = {"baselines", "cross_attention"}
TRAINING_LAYERS = {  # of training/: what a folder, or a group of files, may import beside itself
    ("metrics",): {"packages"},
    ("data",): {"metrics", *ALONE},
    tuple(sorted(MODELS)): ALONE,
    tuple(sorted(FEATURES)): {"towers", "data", *ALONE},
    tuple(sorted(BASELINES)): ALONE,
    tuple(sorted(REPORTING)): ALONE,
    ("projector",): set(),
    ("demo",): {"data", "projector", *FEATURES, *REPORTING, *ALONE},
    ("experiment",): {
        "data",
        "metrics",
        "demo",
        "projector",
        *MODELS,
        *FEATURES,
        *BASELINES,
        *ALONE,
    },
    ("comparison",): {"data", "experiment", *REPORTING, *ALONE},
    ("cli", "__main__"): {"comparison", "experiment", "demo"},
    ("devices",): set(),
    ("files",): set(),
    ("packages",): set(),
}


@pytest.mark.parametrize("group", TRAINING_LAYERS, ids=lambda group: group[0])
def test_training_imports_downward_only(group: tuple[str, ...]) -> None:
    import ast

    files = [*ROOT.glob("training/*.py"), *ROOT.glob("training/*/*.py")]
    for file in files:
        if file.relative_to(ROOT / "training").parts[0].removesuffix(".py") not in group:
            continue
        modules = [
            node.module or ""
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.ImportFrom) and node.level == 0
        ]
        theirs = {m.split(".")[2] for m in modules if m.startswith("fused_route.training.")}
        assert theirs <= TRAINING_LAYERS[group] | set(group), file
    assert {m for group in TRAINING_LAYERS for m in group} == {
        f.relative_to(ROOT / "training").parts[0].removesuffix(".py") for f in files
    } - {"__init__"}


def test_every_file_has_a_layer() -> None:
    files = {p.stem for p in (ROOT / "fused_route").glob("*.py")} - {"__init__"}
    assert files == set(LAYERS)
