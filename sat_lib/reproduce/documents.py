"""The tables that README and REPRODUCE quote, kept in step with the files they come from."""

import re
from pathlib import Path

from ..common import files
from ..common.errors import require

DOCUMENTS = ("README.md", "REPRODUCE.md")
QUOTED = re.compile(r"(<!-- (figures/paper/[\w.]+\.md) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def quote(document: Path, root: Path) -> None:
    """Put the present text of each table between its two marks in a document.

    Raises:
        InputError: marks with text between them name a table that isn't there (with nothing between: it may come).
    """
    if not document.exists():
        return

    def renewed(match: re.Match) -> str:
        table = root / match[2]
        if not match[3] and not table.exists():
            return match[0]
        require(table.exists(), f"{document.name} quotes {match[2]}, which doesn't exist. Make it, or drop the marks")
        return match[1] + table.read_text() + match[4]

    before = document.read_text()
    after = QUOTED.sub(renewed, before)
    if after != before:
        files.write(document, after)
