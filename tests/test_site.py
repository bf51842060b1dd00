"""The documentation's pages have one another, the code's names and its messages right; `make site` makes a site of them."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest
from test_documents import FENCE

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(DOCS.rglob("*.md"))
BESIDE = {"contributing.md": "CONTRIBUTING.md", "changes.md": "CHANGELOG.md"}
"""Pages of the site that lie beside docs/, as docs/hooks.py has them."""
LINK = re.compile(r"\]\((?!https?://)([^)#\s]*)(?:#([^)\s]*))?\)")
PACKAGES = ("", ".functional", ".modules", ".checkpoint", ".training", ".inspection")


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """What GitHub and the site both make of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_every_page_is_in_the_sites_navigation_and_there():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    named = re.findall(r": (\S+)$", navigation, re.MULTILINE)
    assert sorted(named) == sorted([*(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")), *BESIDE])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page):
    for link, anchor in LINK.findall(prose(page)):
        target = (page.parent / link).resolve() if link else page
        assert target.exists() and target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), f"{link}#{anchor}"


def documented() -> list[str]:
    return [name for page in DOCS.glob("api/*.md") for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)]


def named(path: str) -> object:
    """What `path` leads to; an attribute goes before a submodule of the same name."""
    package, _, name = path.rpartition(".")
    try:
        found = importlib.import_module(package)
    except ModuleNotFoundError:
        found = named(package)
    return getattr(found, name) if hasattr(found, name) else importlib.import_module(path)


def test_the_reference_has_every_public_name():
    told = []
    for found in map(named, documented()):
        told += vars(found).values() if isinstance(found, ModuleType) else [found]
    identities = {id(one) for one in told}
    for package in (importlib.import_module(f"crate_fast{name}") for name in PACKAGES):
        public = {name: getattr(package, name) for name in package.__all__}
        missing = [name for name, value in public.items() if not isinstance(value, ModuleType) and id(value) not in identities]
        assert not missing, package.__name__


def words_of_code() -> str:
    """Every text in the package's code, with `...` for what is put in it, as docs/errors.md writes it."""
    texts = []
    for path in (ROOT / "crate_fast").rglob("*.py"):
        if "kernels" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def test_errors_that_are_explained_are_those_that_are_told():
    code = words_of_code()
    lines = re.findall(r"^\| `(.*?)` \|", (DOCS / "errors.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(lines) > 30
    for line in lines:
        for part in re.split(r"\.\.\.", line):
            assert part.strip(" :;") in code, line
