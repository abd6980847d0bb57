"""The reference has every export, its build refuses broken docstrings, and links lead somewhere."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

import fused_route

ROOT = Path(__file__).parent.parent
REFERENCE = sorted(ROOT.glob("docs/reference/*.md"))
PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "bench" / "README.md",
        ROOT / "kernels" / "README.md",
        *ROOT.glob("docs/**/*.md"),
    ]
)
EXPORTS = [
    name
    for name, value in vars(fused_route).items()
    if not name.startswith("_") and not isinstance(value, ModuleType)
]


def anchors(page: Path) -> list[str]:
    return re.findall(r'<a id="([^"]+)"></a>', page.read_text(encoding="utf-8"))


def test_every_export_is_in_the_reference_once() -> None:
    documented = Counter(anchor for page in REFERENCE for anchor in anchors(page))
    missing = [name for name in EXPORTS if f"fused_route.{name}" not in documented]
    assert not missing, f"name {missing} in a page of docs/api, then run `make docs`"
    assert {name: n for name, n in documented.items() if n > 1} == {}


def test_nothing_private_is_in_the_reference() -> None:
    names = [anchor for page in REFERENCE for anchor in anchors(page)]
    assert [name for name in names if re.search(r"\._(?!_)", name)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_to_files(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("https://", "http://")):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        if target in REFERENCE and anchor:
            assert anchor in anchors(target), link


SOUND = '''\
"""Subject."""

class _Private: ...

class Made:
    """By `make` alone."""

    def __init__(self, how: _Private) -> None: ...

    def size(self) -> int:
        """B."""

def make(x: int, hidden_states: int = 1, *, route: str = "mul", dropout: float = 0.0) -> Made:
    """y = `x Aᵀ`, as in `Made` or `NotThere`.

        y = x_h
              Aᵀ

    Then:

        with make(1):
            pass

    Args:
        x, hidden_states: both "at once",
            in two lines.
        route: another.

    Raises:
        ValueError: no.
    """
'''
RENDERED = """\
# Page

Subject.

<a id="subject.Made"></a>

## `Made`

```python
class subject.Made
```

By [`make`](#subject.make) alone.

<a id="subject.Made.size"></a>

### `Made.size`

```python
size() -> int
```

B.

<a id="subject.make"></a>

## `make`

```python
subject.make(
    x: int,
    hidden_states: int = 1,
    *,
    route: str = 'mul',
    dropout: float = 0.0,
) -> Made
```

y = `x Aᵀ`, as in [`Made`](#subject.Made) or `NotThere`.

```text
y = x_h
      Aᵀ
```

Then:

```python
with make(1):
    pass
```

* **Parameters:**
  * **x, hidden_states** – both "at once",
    in two lines.
  * **route** – another.
* **Raises:**
  **ValueError** – no.
"""


def built(source: str, folder: Path) -> tuple[int, str, str]:
    """(exit status, warnings, Markdown) of a page about a module, as `make docs` builds its own."""
    (folder / "subject.py").write_text(source, encoding="utf-8")
    page = "Page\n====\n\n.. automodule:: subject\n"
    (folder / "index.rst").write_text(page, encoding="utf-8")
    done = subprocess.run(
        [
            sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "markdown",
            "-c", ROOT / "docs" / "api", folder, folder / "out",
        ],
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )  # fmt: skip
    rendered = folder / "out" / "index.md"
    text = rendered.read_text(encoding="utf-8") if rendered.is_file() else ""
    return done.returncode, done.stderr, text


def test_a_sound_docstring_is_rendered(tmp_path: Path) -> None:
    assert built(SOUND, tmp_path) == (0, "", RENDERED)


@pytest.mark.parametrize(
    ("docstring", "warning"),
    [
        ("Like :py:func:`nowhere`.", "nowhere"),
        ("An *unclosed emphasis.", "emphasis"),
        ("Sum.\n\n    Returns:\n        A ratio: at most one.\n    ", "A ratio"),
    ],
    ids=["reference", "markup", "type"],
)
def test_a_broken_docstring_fails_the_build(docstring: str, warning: str, tmp_path: Path) -> None:
    source = f'"""Subject."""\n\ndef f() -> None:\n    """{docstring}"""\n'
    status, warnings, _ = built(source, tmp_path)
    assert status == 1 and warning in warnings
