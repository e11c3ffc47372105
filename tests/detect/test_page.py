"""The three faces of a report (terminal, figures, page) on synthetic reports and a real scan."""

from __future__ import annotations

import io
import math
import re
import struct
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
from rich.console import Console

from swkernels.detect import page, plots, table
from swkernels.detect.scan import scan
from tests.detect import fake_report
from tests.detect.planting import plant
from tests.models.tiny import tiny_model, token_ids

PAGES: dict[str, str] = {}
VOID = {"meta", "br", "link", "img", "hr", "input"}


class Page(HTMLParser):
    """Collects tags, attributes, texts and numbers; raises on a tag that is not closed."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.rows, self.values = [], [], [], []
        self.cells, self.open, self.text = None, [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attributes]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "data":
            self.values.append(dict(attributes)["value"])
        if tag == "tr":
            self.cells = []
        if tag == "td" and self.cells is not None:
            self.cells.append("")

    def handle_startendtag(self, tag, attributes):
        self.attributes += [(tag, name, value or "") for name, value in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "tr":
            self.rows.append(self.cells)
            self.cells = None

    def handle_data(self, data):
        self.text += data
        if self.cells:
            self.cells[-1] += data


@pytest.fixture(scope="module", params=fake_report.ALL)
def document(request):
    return fake_report.ALL[request.param]()


@pytest.fixture(scope="module")
def html(document):
    return rendered(document)


def rendered(document) -> str:
    """Render each document once: a page has three figures."""
    key = repr(document)
    if key not in PAGES:
        PAGES[key] = page.render(document)
    return PAGES[key]


def terminal(document, width=100) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    table.render(document, console)
    return console.file.getvalue()


def scanned(**settings) -> dict:
    model = tiny_model("llama")
    plant(model, 1)
    return scan(model, token_ids(2, 24), length=24, eval_length=12, **settings).to_dict()


def shape(value):
    """Keys and nesting of a document: what a reader relies on."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [shape(value[0])]
    return None


def test_page_needs_nothing_but_itself(html):
    parsed = Page(html)
    assert not {"script", "link", "iframe", "img", "object"} & set(parsed.tags)
    for _, name, value in parsed.attributes:
        if name in ("src", "href", "xlink:href", "action", "data"):
            assert value.startswith("#"), value
        assert not name.startswith("on")
    assert "@import" not in html and not re.search(r"url\((?!#)", html)


def test_ids_of_the_figures_are_unique_and_resolve(html):
    attributes = Page(html).attributes
    ids = [value for _, name, value in attributes if name == "id"]
    used = {value[1:] for _, name, value in attributes if name == "xlink:href"}
    used |= set(re.findall(r"url\(#([^)]+)\)", html))
    assert len(ids) == len(set(ids))
    assert used and used <= set(ids)


def test_page_names_every_candidate_with_its_verdict(document, html):
    rows = [row for row in Page(html).rows if row]
    expert = any(c["expert"] is not None for c in document["candidates"])
    for c in document["candidates"]:
        start = [str(c["id"]), str(c["layer"])] + [str(c["expert"])] * expert
        start.append(f"[{c['row']}, {c['column']}]")
        (row,) = [row for row in rows if row[: len(start)] == start]
        assert row[-2] == c["verdict"]
    if not document["candidates"]:
        assert "No super weight found" in html


def test_numbers_of_the_page_are_the_reports(document, html):
    values = {float(value) for value in Page(html).values}
    written = Page(html).values
    for entry in document["candidates"] + document["sets"]:
        names = ["ratio", "damage"]
        if "row" in entry:
            names += ["weight", "in_peak", "out_peak", "share", "dominance", "prominence", "kl"]
            names += ["persistence", "signed_share"]
        for name in names:
            value = entry[name]
            if value is not None:
                assert "nan" in written if math.isnan(value) else value in values, name
    for s in document["sets"]:
        assert {entry["ratio"] for entry in s["leave_one_out"]} <= values
    if document["baseline"]:
        assert document["baseline"]["perplexity"] in values
        assert document["null_distribution"]["ratio_max"] in values


def test_rounding_of_numbers():
    assert table.number(None) == "-"
    assert table.number(4.953956) == "4.954"
    assert table.number(23281.23) == "23281"
    assert table.number(470793.79) == "470794"
    assert table.number(7887692.8) == "7.888e+06"
    assert table.number(math.nan) == "NaN" and table.number(-math.inf) == "-inf"
    assert table.percent(0.0022) == "0.2%" and table.percent(0.73) == "73%"
    assert table.percent(0.996) == "99.6%" and table.percent(math.inf) == "inf"
    assert table.percent(0.0) == "0%" and table.percent(1.0) == "100%"


def test_hostile_text_stays_text():
    document = fake_report.nasty()
    html = rendered(document)
    parsed = Page(html)
    assert "script" not in parsed.tags and "b" not in parsed.tags
    assert "<script>alert('x')</script>" in parsed.text and "{{ 7 * 6 }}" in parsed.text
    assert "\\x1b[31mred" in parsed.text and "\\u202e" in parsed.text and "\\ud800" in parsed.text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\ud800-\udfff]", html)
    html.encode("utf-8")
    tokens = re.findall(r"token <code>(.*?)</code>", html)
    assert len(tokens) == len(fake_report.NASTY) and max(map(len, tokens)) < 120
    shown = terminal(document)
    assert "\x1b" not in shown and "[/red] <b>bold</b> \\x1b[2J" in shown


def test_headline_says_what_was_found():
    def headline(document):
        return re.search(r"<strong>(.*?)</strong>", rendered(document)).group(1)

    assert headline(fake_report.found()) == "1 super weight, 1 critical set"
    assert headline(fake_report.none_found()) == "No super weight found"
    assert headline(fake_report.deep()) == "No super weight found"
    assert headline(fake_report.unverified()) == "3 candidates, not verified"


def test_methods_are_counted():
    document = fake_report.found()
    for c, outlier in zip(document["candidates"], (True, True, False, False, True, True)):
        c["methods"]["outlier"] = outlier
    rows = [row for row in Page(page.render(document)).rows if row]
    assert ["dominance", "yes", "6", "3"] in rows
    assert ["outlier", "no, for comparison only", "4", "2"] in rows
    rows = [row for row in Page(rendered(fake_report.found())).rows if row]
    assert ["outlier", "no, for comparison only", "–", "–"] in rows


def test_terminal_says_everything_in_100_columns(document):
    shown = terminal(document)
    lines = shown.splitlines()
    assert max(map(len, lines)) <= 100
    for c in document["candidates"]:
        coordinates = f"[{c['row']}, {c['column']}]"
        mine = [x for x in lines if x.split()[:1] == [str(c["id"])] and coordinates in x]
        (line,) = [x for x in mine if "#" not in x]  # the others are rows of the sets
        assert c["verdict"].split()[0] in line
        assert table.number(c["weight"]) in line and table.number(c["ratio"]) in line
        assert f"{c['spikes']}/4" in line
        assert c["expert"] is None or f" {c['expert']} " in line
    assert ("[row, column]" in shown) == bool(document["candidates"])
    assert shown.index("Baseline:") < shown.index("Null:") < shown.index("Consistency:")
    summary = table.visible(document["summary"])
    assert lines[-1] == summary


def test_terminal_shows_sets_with_leave_one_out():
    shown = terminal(fake_report.found())
    assert re.search(r"#1 layer 4 \[2533, 7890\] +187\.2 +#1: 1\.25 +critical set", shown)
    assert re.search(r"#2 layer 4 \[2533, 10411\] +170..210 +#2: 1\.5", shown)
    assert "100 %: 2, >= 50 %: 6" in shown
    assert "perplexity 16.75 on 1530 tokens" in shown and "largest ratio 1.00016" in shown


@pytest.mark.parametrize("name", ["found", "none_found", "single_layer", "deep", "nasty"])
def test_png_is_a_picture(name):
    picture = plots.spikes_png(fake_report.ALL[name]())
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", picture[16:24]) == (1380, 840)


def test_figures_are_well_formed_and_their_ground_is_clear(html):
    figures = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(figures) == 3 + ("<h2>Experts<" in html)
    for figure in figures:
        assert ElementTree.fromstring(figure).tag == "{http://www.w3.org/2000/svg}svg"
        assert "mathdefault" not in figure
        ground = re.search(r'<g id="\w+-patch_1">.*?</g>', figure, re.DOTALL).group()
        assert "fill: none" in ground


def test_a_narrow_range_of_peaks_has_plain_labels():
    document = fake_report.mixture()
    for entry in document["layers"]:
        entry["in_peak"]["value"], entry["in_median"] = 0.05, 0.013
    document["candidates"] = []
    svg = plots.spikes_svg(document)
    assert "mathdefault" not in svg and ">0.02<" in svg and ">0.03<" in svg


def test_page_is_repeatable():
    assert rendered(fake_report.mixture()) == page.render(fake_report.mixture())


def test_spikes_show_the_strongest_expert_and_name_its_channel():
    document = fake_report.mixture()
    before = plots.spikes_svg(document)
    assert "ch 2533" in before and "ch 4001" not in before
    entry = next(e for e in document["layers"] if (e["layer"], e["expert"]) == (2, 5))
    entry["out_peak"].update(value=1e6, channel=4001)
    assert "ch 4001" in plots.spikes_svg(document)


def test_figures_mark_verdicts_in_their_colours():
    for draw in (plots.spikes_svg, plots.ratios_svg):
        svg = draw(fake_report.found())
        for role in ("super-weight", "part-of-set", "mild", "inert"):
            assert plots.COLORS[role] in svg
        assert plots.COLORS["candidate"] not in svg
        assert "part of a critical set" in svg
    assert plots.COLORS["candidate"] in plots.spikes_svg(fake_report.unverified())


def test_ratio_figure_names_rows_and_what_cannot_be_drawn():
    svg = plots.ratios_svg(fake_report.found())
    assert "#0  layer 2 [3968, 7003]" in svg and "set 0  {#1, #2}" in svg
    assert "null: 3 random weights" in svg
    assert ">inf<" in plots.ratios_svg(fake_report.not_finite())
    assert ">NaN<" in plots.ratios_svg(fake_report.not_finite())
    assert "Not verified" in plots.ratios_svg(fake_report.unverified())
    assert "No candidate" in plots.ratios_svg(fake_report.none_found())


def test_a_real_scan_has_the_format_of_the_synthetic_ones_and_renders():
    document = scanned(null_draws=2)
    expected = fake_report.found()
    assert document["candidates"], "the planted weight is a candidate"
    if not document["sets"]:
        expected["sets"] = []
    assert shape(document) == shape(expected)
    assert Page(page.render(document)).values
    assert document["summary"].split()[0] in terminal(document)
