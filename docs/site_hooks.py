"""For mkdocs: what leads out of docs/. A link to a file of the checkout becomes the file's path, as the site has no such page.
Pictures come along."""

import posixpath
import re
from collections.abc import Callable
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(!?)\[([^\]]*)\]\((\.\./[^)\s#]*)[^)\s]*\)")
CODE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def _outside(text: str, page: str, put: Callable[[bool, str, str], str]) -> str:
    """A page's text in which put(whether it is a picture, words, path in the checkout) stands for each link that leads out of docs/."""

    def link(found: re.Match) -> str:
        picture, words, target = found.groups()
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
        return found.group() if path.startswith("docs/") else put(bool(picture), words, path)

    return "".join(part if part.startswith("```") else LINK.sub(link, part) for part in CODE.split(text))


def on_files(files, config):
    """Take the pictures along that pages show from elsewhere."""
    paths = []
    for page in files.documentation_pages():
        _outside(page.content_string, page.src_uri, lambda picture, _, path: paths.append(path) or "" if picture else "")
    for path in dict.fromkeys(paths):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, **_):
    """Paths for links, and for pictures the place that they have on the site."""
    folder = posixpath.dirname(page.file.src_uri)

    def put(picture: bool, words: str, path: str) -> str:
        if picture:
            return f"![{words}]({posixpath.relpath(path, folder or '.')})"
        return f"`{path}`" if words.strip("`") in (path, posixpath.basename(path)) else f"{words} (`{path}`)"

    return _outside(markdown, page.file.src_uri, put)
