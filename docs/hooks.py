"""What `make site` adds to the pages of docs/: files beside docs/ that they link to, which GitHub shows where they are.

A link to a page beside docs/ (`BESIDE`) leads to that page in the site; one to a source file to a page of its own with its
lines; one to any other file to a copy. `<!-- README: results -->` stands for the README's table of measured speed.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
BESIDE = {"contributing.md": "CONTRIBUTING.md", "changes.md": "CHANGELOG.md"}
"""Page of the site: file at the top of the project that it is."""
LANGUAGES = {".cff": "yaml", ".py": "python", ".sh": "bash", ".toml": "toml", ".yml": "yaml"}
LINK = re.compile(r"(?<=\]\()(?!https?://|mailto:|#)(?P<path>[^)#\s]+)(?P<anchor>#[^)\s]*)?(?=\))")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
RESULTS = re.compile(r"<!-- results: .*?-->\n(.*?)<!-- end of results -->", re.DOTALL)


def on_files(files, config):
    for page, name in BESIDE.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    for page in list(files.documentation_pages()):
        for link in LINK.finditer(FENCE.sub("", _with_results(page.content_string, page.src_uri))):
            uri, path = _place(page.src_uri, link["path"])
            if path is not None and files.get_file_from_path(uri) is None:
                files.append(_file(config, uri, path))
    return files


def on_page_markdown(markdown, page, config, files):
    def moved(link: re.Match) -> str:
        uri, _ = _place(page.file.src_uri, link["path"])
        return posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or ".") + (link["anchor"] or "")

    if page.file.src_uri.startswith("source/"):
        return markdown
    markdown = _with_results(markdown, page.file.src_uri)
    prose, fences = FENCE.split(markdown), FENCE.findall(markdown)
    prose = [LINK.sub(moved, part) for part in prose]
    return "".join(part + fence for part, fence in zip(prose, [*fences, ""], strict=True))


def _place(page: str, link: str) -> tuple[str, Path | None]:
    """(place in the site, file to take there) of what `link` on `page` names; no file where it is a page already."""
    folder = "" if page in BESIDE else posixpath.join("docs", posixpath.dirname(page))
    path = posixpath.normpath(posixpath.join(folder, link))
    if path.startswith("docs/"):
        return path.removeprefix("docs/"), None
    for uri, name in BESIDE.items():
        if path == name:
            return uri, None
    return f"source/{path}" + (".md" if Path(path).suffix in LANGUAGES else ""), ROOT / path


def _file(config, uri: str, path: Path) -> File:
    """A source file as a page of its lines, any other file as it is."""
    if path.suffix not in LANGUAGES:
        return File.generated(config, uri, abs_src_path=str(path))
    text = path.read_text(encoding="utf-8")
    name = path.relative_to(ROOT).as_posix()
    head = f"---\ntitle: {name}\nsearch:\n  exclude: true\nhide: [toc]\n---\n\n# {name}\n\n"
    return File.generated(config, uri, content=f'{head}````{{.{LANGUAGES[path.suffix]} linenums="1"}}\n{text}````\n')


def _with_results(markdown: str, page: str) -> str:
    """The README's table in the place of its mark, its links as from docs/."""
    if page != "index.md":
        return markdown
    found = RESULTS.search((ROOT / "README.md").read_text(encoding="utf-8"))
    assert found, "README.md has no results"
    table = LINK.sub(lambda link: f"../{link['path']}", found[1])
    return markdown.replace("<!-- README: results -->", table)
