"""Settings of the documentation site: `make site` builds it with Sphinx from README.md, docs/ and the docstrings.

The documents are read where they lie, so a link between two of them works here and on the forge.  The API reference is
made from the source, which is read and not imported, so that a build needs neither PyTorch nor a framework.
"""

from __future__ import annotations

import re
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[2]

project = "paci-schedule"
author = project_copyright = "paci-schedule contributors"
version = re.findall(r'^__version__ = "(.+)"$', (ROOT / "paci_schedule" / "__init__.py").read_text(), re.MULTILINE)[0]

extensions = ["myst_parser", "autoapi.extension", "sphinx.ext.napoleon"]
root_doc = "README"
include_patterns = ["*.md", "docs/*.md", "docs/api/**/*.rst"]
myst_heading_anchors = 4
default_role = "code"

html_theme = "furo"
html_title = f"paci-schedule {version}"
templates_path = ["templates"]
html_additional_pages = {"index": "index.html"}

autoapi_dirs = ["paci_schedule"]
autoapi_root = "docs/api"
autoapi_ignore = ["*/__main__.py"]
autoapi_options = ["members", "undoc-members", "show-inheritance", "show-module-summary"]
autoapi_member_order = "bysource"
autoapi_add_toctree_entry = False
napoleon_use_ivar = True  # otherwise an attribute that a class's docstring lists is described twice
napoleon_use_rtype = False  # the names in a list of what is returned are no types

CONTENTS = """
```{toctree}
:hidden:
:glob:

docs/deepspeed
docs/megatron
docs/what-works
docs/choosing
docs/*
Reference <docs/api/paci_schedule/index>
CONTRIBUTING
SECURITY
CHANGELOG
```
"""


def add_contents(app: Sphinx, document: str, source: list[str]) -> None:
    """Put the table of contents, which the forge has no use for, below the front page."""
    if document == root_doc:
        source[0] += CONTENTS


def keep_grids(app: Sphinx, kind: str, name: str, target: object, options: object, lines: list[str]) -> None:
    """Show an indented block after a colon as it is written: it is a schedule's grid or an example."""
    for at, (line, blank, block) in enumerate(zip(lines, lines[1:], lines[2:], strict=False)):
        indent = len(line) - len(line.lstrip())
        if line.endswith(":") and not blank.strip() and block.startswith(" " * (indent + 4)):
            lines[at] += "" if line.endswith("::") else ":"


def setup(app: Sphinx) -> None:
    """What Sphinx calls to let these settings take part in a build."""
    app.connect("source-read", add_contents)
    app.connect("autodoc-process-docstring", keep_grids, priority=400)  # before napoleon, at 500
