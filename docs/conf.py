"""The site's settings, and the reference pages, which are generated from the code at each build.

make docs        # docs/_build/index.html
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from reference import write_reference

project = "Ekiden"
author = "the Ekiden authors"
extensions = ["myst_parser"]
html_theme = "furo"
html_title = "Ekiden"
html_static_path: list[str] = []
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
# Blocks of the other pages are commands and output, in no language.
highlight_language = "none"
suppress_warnings = ["myst.xref_missing", "myst.header", "misc.highlighting_failure"]
# The list of how-to pages names some that are written beside this one.
suppress_warnings += ["toc.not_readable", "toc.not_included"]

write_reference(Path(__file__).parent / "reference")
