"""Every ```python block of the README and of docs/*.md runs, in order, in one namespace a file.

A block whose line before is `<!-- no test: reason -->` is left out.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^(?:(?P<skip><!-- no test: \S.* -->)\n)?```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text):
    """(line of the first statement, code) of each block that runs."""
    return [
        (text.count("\n", 0, match.start("code")) + 1, match["code"])
        for match in FENCE.finditer(text)
        if not match["skip"]
    ]


def run(text, name):
    """Run the blocks one after another; a traceback names the file and its own line."""
    namespace = {"__name__": "__main__"}
    for line, code in blocks(text):
        exec(compile("\n" * (line - 1) + code, name, "exec"), namespace)  # noqa: S102 - our own documentation
    return namespace


@pytest.mark.parametrize("path", [path for path in FILES if blocks(path.read_text())], ids=lambda path: path.name)
def test_the_blocks_of_a_page_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(path.read_text(), str(path))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_block_is_missed(path):
    text = path.read_text()
    started = len(re.findall(r"^\s*```python", text, re.MULTILINE))
    assert started == len(FENCE.findall(text)), "a block is indented, or its fence carries more than the language"


LINK = re.compile(r"\]\((?!https?://)([^)#\s]*)(?:#([^)\s]*))?\)")


def broken(text, folder):
    """Links of a page that lead to no file, or to no heading of one."""
    found = []
    for target, anchor in LINK.findall(re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)):
        path = folder / target
        if not path.exists():
            found.append(target)
        elif anchor and anchor not in headings(path.read_text() if target else text):
            found.append(f"{target}#{anchor}")
    return found


def headings(text):
    """As GitHub names them."""
    lines = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize(
    "path", [*FILES, *sorted((ROOT / "docs" / "decisions").glob("*.md"))], ids=lambda path: path.name
)
def test_links_lead_somewhere(path):
    assert not broken(path.read_text(), path.parent)


def test_a_link_that_leads_nowhere_is_found(tmp_path):
    (tmp_path / "there.md").write_text("# One `line` (of it)\n")
    page = "[a](there.md) [b](there.md#one-line-of-it) [c](gone.md) [d](there.md#two) [e](https://example.org/x)\n"
    assert broken(page, tmp_path) == ["gone.md", "there.md#two"]


def test_a_block_that_fails_is_found_with_its_line(tmp_path):
    page = "Text.\n\n```python\nx = 1\n```\n\nMore.\n\n```python\ny = x\ny / 0\n```\n"
    with pytest.raises(ZeroDivisionError) as caught:
        run(page, str(tmp_path / "page.md"))
    assert caught.traceback[-1].lineno + 1 == 11
    assert str(caught.traceback[-1].path) == str(tmp_path / "page.md")


def test_blocks_share_names_and_a_marked_one_is_left_out():
    page = "```python\nx = 1\n```\n<!-- no test: needs a cloud -->\n```python\nx = 2\n```\n```python\ny = x\n```\n"
    assert run(page, "page.md")["y"] == 1
    with pytest.raises(ZeroDivisionError):
        run("<!-- no test: -->\n```python\n1 / 0\n```\n", "page.md")  # no reason, no exception
