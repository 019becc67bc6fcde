"""Replace links into the repository, which the site does not hold, by the path, to be found in a clone."""

import re


def on_page_markdown(markdown: str, **_: object) -> str:
    """mkdocs calls this with each page."""
    return re.sub(r"\[([^\]]*)\]\(\.\./([^)]*)\)", r"\1 (`\2`)", markdown)
