"""`report.html` in a real headless Chromium, and the pictures beside it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from chromium import browser
from PIL import Image
from test_compare import made, noise
from test_convert import quantkit
from test_scoring import place  # noqa: F401  (a fixture)

from quantkit.compare import compare, recommended
from quantkit.page import page
from quantkit.plots import draw, rendered


@pytest.fixture(scope="module")
def out(place, tmp_path_factory) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("page") / "out"
    options = ("--no-calibration", "--eval-text", place / "a.txt", "--eval-chunks", 1, "--device", "cpu")
    targets = ("--to", "Q8_0", "--to", "Q4_K_M", "--to", "fp16")
    code, stdout, stderr = quantkit("convert", place / "source.gguf", "-o", folder, *targets, *options)
    assert code == 0, stderr
    assert str(folder / "report.html") in stdout
    return folder


def column(tab, number: int) -> list[str]:
    return tab.locator(f"#variants tbody tr td:nth-child({number})").all_inner_texts()


def test_the_page_opens_sorts_and_names_its_choice(out):
    """At a phone's width and in the dark, with no word on the console and no request but for the page itself."""
    report = json.loads((out / "report.json").read_text())
    sizes = {v["target"]: v["bytes"] for v in report["variants"]}
    with browser() as chromium:
        tab = chromium.new_page(viewport={"width": 390, "height": 844}, color_scheme="dark")
        said, asked = [], []
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(out.joinpath("report.html").as_uri())
        assert column(tab, 2)[0] == "fp16"
        tab.get_by_role("button", name="size").click()
        assert column(tab, 2) == sorted(sizes, key=sizes.get)
        tab.get_by_role("button", name="size").click()
        assert column(tab, 2) == sorted(sizes, key=sizes.get, reverse=True)
        tab.get_by_role("button", name="variant").click()
        assert column(tab, 2) == sorted(sizes, key=str.lower)
        chosen = tab.locator("tr.recommended td:nth-child(2)").inner_text()
        assert chosen in sizes and f"Recommended: {chosen}" in tab.locator("body").inner_text()
        tab.locator("summary", has_text="Q4_K_M").click()
        assert tab.locator("details[open] table tbody tr").count() == 3
        assert "eval_chunks: 1" in tab.locator("pre").inner_text()
        dark = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert dark == "rgb(21, 21, 23)"
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
        assert tab.evaluate("document.querySelector('picture img').naturalWidth") > 100
        tab.close()
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [out.joinpath("report.html").as_uri()]


def test_pictures_lie_beside_the_page(out):
    with Image.open(out / "pareto.png") as picture:
        assert picture.size[0] > 1000 and picture.convert("L").getextrema()[0] < 100
    assert "</svg>" in (out / "pareto.svg").read_text()


def test_compare_takes_what_convert_measured(out, monkeypatch, tmp_path):
    """Nothing is run again, and the page of a comparison is that of the conversion but for its subtitle."""
    monkeypatch.setattr("quantkit.scoring.predict", lambda *_: pytest.fail("the model ran again"))
    args = (out, "--ctx", 512, "--chunks", 1, "--device", "cpu", "--json", "--report", tmp_path / "made")
    code, stdout, stderr = quantkit("compare", *args)
    assert code == 0, stderr
    found = {r["name"]: r["kl_divergence"]["mean"] for r in json.loads(stdout)["rows"]}
    report = json.loads((out / "report.json").read_text())
    assert found == {v["target"]: v["kl_divergence"]["mean"] for v in report["variants"]}
    assert {p.name for p in (tmp_path / "made").iterdir()} == {"report.html", "pareto.png", "pareto.svg"}


def test_names_from_files_are_escaped_and_pictures_repeat():
    rows = compare([made("<script>alert(1)</script>", 0.1 * noise(1), 10)])
    assert "<script>alert" not in page(rows, "<b>", "x & y")
    assert rendered(draw(rows, ""), "svg") == rendered(draw(rows, ""), "svg")


def test_the_recommendation_is_the_smallest_that_stays_near():
    flat = torch.zeros(400, dtype=torch.float64)
    rows = compare([made("a", flat + 0.001, 100), made("b", flat + 0.01, 60), made("c", flat + 0.1, 30)])
    assert recommended(rows)[0].candidate.name == "b"
    assert recommended(compare([made("c", flat + 0.1, 30), made("d", flat + 0.2, 20)]))[0].candidate.name == "c"
    assert recommended(compare([made("nan", flat * math.nan, 1)])) is None


def test_broken_rows_are_on_the_page_and_leave_the_picture_as_it_was():
    good, bad = made("good", 0.1 * noise(1), 10), made("bad", noise(1) + 3, 20)
    html = page(compare([good, bad]), "t", "s")
    assert 'class="broken"' in html and "BROKEN" in html
    assert rendered(draw(compare([good, bad]), ""), "svg") == rendered(draw(compare([good]), ""), "svg")
