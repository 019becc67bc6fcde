"""The mkdocs hook that replaces links into the repository, which the site does not hold, by paths in a clone."""

import re


def on_page_markdown(markdown: str, **_: object) -> str:
    """Replace the links of one page; mkdocs calls this with each page."""
    return re.sub(r"\[([^\]]*)\]\(\.\./([^)]*)\)", r"\1 (`\2`)", markdown)
