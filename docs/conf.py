"""How Sphinx builds these pages: `make docs`. On a forge they read as plain Markdown."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import dbpool  # noqa: E402  # from this checkout

project = "dbpool"
author = "the dbpool authors"
release = version = dbpool.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "README.md", "requirements.txt"]
html_theme = "furo"
html_title = f"dbpool {release}"
html_extra_path = ["llms.txt"]
html_copy_source = True  # so that each page's Markdown can be fetched
html_show_sourcelink = False
html_theme_options = {"navigation_with_keys": True}

myst_enable_extensions = ["colon_fence", "attrs_inline"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]

# API reference
autodoc_typehints = "none"  # signatures carry them
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
add_module_names = False
default_role = "code"  # docstrings put names between single backticks
# Without a network there is no inventory of other projects to link to.
nitpick_ignore_regex = [(r"py:.*", r".*")]
