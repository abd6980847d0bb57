"""How the docstrings become the reference: HTML, and Markdown for a Git host (`make docs`)."""

import ast
import re
from itertools import groupby
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx_markdown_builder.translator import MarkdownTranslator

project = "fused_route"
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_markdown_builder"]
html_title = project
html_copy_source = False
smartquotes_action = "D"  # dashes only: "lora" is to be typed as it stands

autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # torch's do not describe our methods
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88

# "alpha, adapted, of: …" stays one item, and attributes are listed as parameters are.
napoleon_use_param = False
napoleon_custom_sections = [("Attributes", "params_style")]

markdown_anchor_signatures = True

# Single backticks hold names and formulas alike: names that the reference has become links.
default_role = "py:obj"
nitpicky = True
nitpick_ignore_regex = [
    ("py:obj", ".*"),
    ("py:class", r"(collections\.abc|contextlib|datasets|os|pathlib|PIL|torch|transformers)\..*"),
    ("py:class", r"numpy\..*"),
    ("py:class", r"(fused_route\.\w+\.)?[A-Z]"),  # type variables
    ("py:class", r"(Peft|Task)Type"),  # of PEFT
    ("py:class", "PreTrainedModel"),
]


def _is_code(lines: list[str]) -> bool:
    try:
        ast.parse("\n".join(lines))
    except SyntaxError:
        return False
    return True


def keep_blocks(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Indented blocks of a docstring keep their lines: as code if they are, else as text.

    Blocks are what a blank line comes before: sections such as Args begin without one. A line
    "B." is about B, not the second item of a list.
    """
    result: list[str] = []
    for is_indented, group in groupby(lines, lambda line: not line or line.startswith("    ")):
        block = list(group)
        if is_indented and block[0] == "" and any(block):
            language = "python" if _is_code([line[4:] for line in block]) else "text"
            result += ["", f".. code-block:: {language}", ""]
        result += block
    lines[:] = [re.sub(r"^([A-Za-z])\.", r"\\\1.", line) for line in result]


def hide_private_constructor(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str, returns: str
) -> tuple[str, str] | None:
    """A class whose constructor takes something private is made by something else."""
    if what == "class" and re.search(r"\b_[A-Z]\w*", signature or ""):
        return "", ""
    return None


class Translator(MarkdownTranslator):
    """A signature is a block of code under a short heading, which hosts do not break or colour."""

    def visit_desc_signature(self, node: addnodes.desc_signature) -> None:
        for anchor in node["ids"]:
            self._add_anchor(anchor)
        level, parent = self.status.section_level, node.parent
        while parent:
            level += isinstance(parent, addnodes.desc)
            parent = parent.parent
        self.add(f"{'#' * level} `{node['fullname']}`", prefix_eol=2, suffix_eol=2)
        self.add(f"```python\n{self._signature(node)}\n```", prefix_eol=2, suffix_eol=2)
        raise nodes.SkipNode

    def _signature(self, node: addnodes.desc_signature) -> str:
        signature = node.astext()
        if len(signature) <= self.config.python_maximum_signature_line_length:
            return signature
        text = ""
        for part in node:
            if isinstance(part, addnodes.desc_parameterlist) and len(part):
                parameters = "".join(f"    {parameter.astext()},\n" for parameter in part)
                text += f"(\n{parameters})"
            else:
                text += part.astext()
        return text


def setup(app: Sphinx) -> None:
    # Before napoleon, whose output has indented blocks of its own.
    app.connect("autodoc-process-docstring", keep_blocks, priority=400)
    app.connect("autodoc-process-signature", hide_private_constructor)
    app.set_translator("markdown", Translator, override=True)
