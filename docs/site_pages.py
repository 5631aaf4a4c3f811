"""A hook of mkdocs: pages that lie outside of docs/ become pages of the site, links included."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent

OUTSIDE = {
    "README.md": "index.md",
    **{
        name: name
        for name in (
            "CHANGELOG.md",
            "CONTRIBUTING.md",
            "SECURITY.md",
            "benchmarks/README.md",
            "integrations/lorax/README.md",
        )
    },
}
"""Pages in the repository, and their names in the site."""

_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?:|#)([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages outside of docs/."""
    for path, uri in OUTSIDE.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links between files of the repository to pages; files that are no pages get no link."""
    uri = page.file.src_uri
    source = next((path for path, name in OUTSIDE.items() if name == uri), f"docs/{uri}")

    def point(link: re.Match[str]) -> str:
        image, text, path, anchor = link.groups()
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if target in OUTSIDE:
            place = OUTSIDE[target]
        elif target.startswith("docs/"):
            place = target.removeprefix("docs/")
        elif (ROOT / target).exists():
            return f"{text} (`{target}`)"
        else:
            return link[0]  # mkdocs reports it
        relative = posixpath.relpath(place, posixpath.dirname(uri) or ".")
        return f"{image}[{text}]({relative}{anchor or ''})"

    return _LINK.sub(point, markdown)
