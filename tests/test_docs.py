"""What the pages point at is there."""

import re
from pathlib import Path

import pytest
from commands import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def heading(text: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.is_file(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(heading, headings), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_are_named_exist(page: Path) -> None:
    file = ""
    for name in re.findall(r"\btest_\w+(?:\.py)?", page.read_text(encoding="utf-8")):
        if name.endswith(".py"):
            (found,) = (ROOT / "tests").rglob(name)
            file = found.read_text(encoding="utf-8")
        else:
            assert f"\ndef {name}(" in file, name


def test_every_page_is_linked() -> None:
    linked = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for page in PAGES[1:]:
        assert f"{page.name})" in linked or f"{page.name}#" in linked, page.name
