"""Lets pages link to files of the project that lie outside docs/, as they do where the repository is shown.

A link such as ``../scripts/results/compare/ranks.md`` leads to a page, one to a picture or another file to a
copy of it. Both lie below ``project/`` on the built site.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
_LINK = re.compile(r"(\]\()((?:\.\./)+[^)#\s]+)")
_ROLE = re.compile(r":(?:class|func|meth|attr|data|mod):(?=<code>)")


def on_files(files: Any, config: Any) -> Any:
    """Adds what the pages link to outside their folder; of results also what lies beside it."""
    wanted: set[str] = set()
    for page in Path(config.docs_dir).rglob("*.md"):
        folder = page.parent.relative_to(ROOT).as_posix()
        for _, target in _LINK.findall(page.read_text(encoding="utf-8")):
            path = posixpath.normpath(posixpath.join(folder, target))
            if not path.startswith("docs/"):
                wanted.add(path)
    for file in (ROOT / path for path in sorted(wanted)):
        beside = file.parent.iterdir() if file.suffix == ".md" else [file]
        for source in beside:
            name = _on_site(source.relative_to(ROOT).as_posix())
            # A link to what is not there fails the build.
            if source.is_file() and files.get_file_from_path(name) is None:
                files.append(File.generated(config, name, abs_src_path=str(source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns links from and to outside docs/ to where their targets lie on the site."""
    here = page.file.src_uri
    source = here.removeprefix("project/") if here.startswith("project/") else f"docs/{here}"

    def turned(match: re.Match[str]) -> str:
        target = _on_site(posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2])))
        return match[1] + posixpath.relpath(target, posixpath.dirname(here) or ".")

    return _LINK.sub(turned, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Takes out Sphinx's roles, which docstrings write before names of code."""
    return _ROLE.sub("", html)


def _on_site(path: str) -> str:
    """Where a file of the project lies on the site; files in hidden folders would not be built."""
    return path.removeprefix("docs/") if path.startswith("docs/") else f"project/{path.lstrip('.')}"
