"""What a run looks like: one self-contained page, a picture, a live dashboard.

`reading` turns a run directory into plain figures; `page`, `picture` and `dashboard` show them, `writer` keeps the page
up to date beside training. Nothing here imports torch except the dashboard's playground, on its first prompt.
"""

from __future__ import annotations

from ekiden.report.page import write_report
from ekiden.report.reading import RunReader

__all__ = ["RunReader", "write_report"]
