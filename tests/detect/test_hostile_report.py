"""A report whose every text is hostile: the page and the terminal show it and do nothing else."""

from __future__ import annotations

import copy
import io
from collections import Counter
from html.parser import HTMLParser

import pytest
from rich.console import Console

from swkernels.detect import page, table
from swkernels.detect.report import ScanReport
from swkernels.errors import InvalidInput
from tests.detect import fake_report

HOSTILE = {
    "tags": "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "attribute": '" onmouseover="alert(1)" x=\'',
    "entities": "&lt;script&gt;&#60;b&#62;",
    "closing": "</code></td></table></svg></style></title>--><b>",
    "template": "{{ 7 * 6 }}{% raw %}{# x #}",
    "ansi": "\x1b[31m\x1b]8;;http://x\x07link\x1b[2J\r\b",
    "bidirectional": "\u202eesrever\u2066\u200b\ufeff",
    "markup": "[bold red]x[/bold red][link=http://x]y[/][/]",
    "lines": "a\nb\tc\x85d\u2028e",
}
# Texts that decide something, which a report may not choose freely.
FIXED = {"schema", "verdict"}


class Tags(HTMLParser):
    """Which tags with which attribute names a page has, and its text."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: Counter = Counter()
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags[tag, tuple(sorted(name for name, _ in attributes))] += 1

    handle_startendtag = handle_starttag

    def handle_data(self, data):
        self.text += data


def replaced(value, text: str):
    """The document with ``text`` for every free text, and as a key where any key may be."""
    if isinstance(value, dict):
        return {key: item if key in FIXED else replaced(item, text) for key, item in value.items()}
    if isinstance(value, list):
        return [replaced(item, text) for item in value]
    return text if isinstance(value, str) else value


def hostile(text: str) -> dict:
    document = replaced(copy.deepcopy(fake_report.found()), text)
    # What a reader may not know of: shown where everything of a part is shown.
    for part in ("model", "inputs", "settings", "versions"):
        document[part][text] = text
    document["settings"]["more"] = [text, text]
    document["created"] = text
    return document


def loaded(document: dict, tmp_path) -> dict:
    ScanReport(document).save(tmp_path / "report.json")
    return ScanReport.load(tmp_path / "report.json").data


def test_the_page(tmp_path):
    together = "".join(HOSTILE.values())
    wanted, got = (
        Tags(page.render(d)) for d in (hostile("plain"), loaded(hostile(together), tmp_path))
    )
    assert got.tags == wanted.tags  # not a tag and not an attribute more or less
    assert all(c.isprintable() or c == "\n" for c in got.text)
    for text in HOSTILE.values():
        assert table.visible(text) in got.text


@pytest.mark.parametrize("name", HOSTILE)
def test_the_terminal(name, tmp_path):
    def printed(document: dict) -> str:
        console = Console(
            file=io.StringIO(), width=100, color_system="truecolor", force_terminal=True
        )
        table.render(document, console)
        return console.file.getvalue()

    wanted, got = printed(hostile("plain")), printed(loaded(hostile(HOSTILE[name]), tmp_path))
    assert got.count("\x1b") == wanted.count("\x1b")  # the table's own colours alone
    assert all(c.isprintable() or c in "\n\x1b" for c in got)
    assert "http://x\x07" not in got
    assert table.visible(HOSTILE[name])[:60] in got.replace("\n", "")


def test_a_verdict_is_no_free_text(tmp_path):
    for part in ("candidates", "sets"):
        document = fake_report.found()
        document[part][0]["verdict"] = HOSTILE["tags"]
        with pytest.raises(InvalidInput, match=rf"at {part}\[0\].verdict"):
            loaded(document, tmp_path)
