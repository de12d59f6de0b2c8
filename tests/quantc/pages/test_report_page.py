"""The HTML report: self-contained, escaped, complete."""

import re
from html.parser import HTMLParser
from typing import Any

from quantc.pages.report_page import render


class Page(HTMLParser):
    """Collects tags and attributes, and checks that every tag is closed."""

    VOID = frozenset({"meta"})

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag


def linear(name: str, error: float, **more: Any) -> dict[str, Any]:
    spec = {"bits": 4, "group_size": 128, "grouping": "per_oc", "symmetric": False, "rank": 0}
    base = {
        "name": name,
        "spec": spec,
        "shape": [256, 128],
        "experts": 0,
        "bits_per_weight": 4.156,
        "error": error,
    }
    return {**base, "method": "gptq", "rows": 1024, "fallbacks": 0, **more}


def report(linears: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    base = {
        "model": "tiny",
        "output": "tiny-w4",
        "bits_per_weight": 4.156,
        "expert_fallbacks": 0,
        "kept": {},
        "rewrites": {},
        "refused": {},
    }
    sizes = {"weights_bytes": 2_500_000, "source_bytes": 10_000_000, "peak_rss_bytes": 10**9}
    times = {"wall_seconds": 65.0, "cpu_seconds": 120.0, "calibration": "builtin", "notes": []}
    return {**base, **sizes, **times, "linears": linears, **more}


def blocks(count: int) -> list[dict[str, Any]]:
    kinds = ("self_attn.q_proj", "mlp.up_proj")
    return [linear(f"model.layers.{i}.{kind}", 0.01 * (i + 1)) for i in range(count) for kind in kinds]


def test_the_page_has_totals_a_row_per_linear_and_a_bar_per_linear() -> None:
    text = render(report(blocks(5)))
    page = Page(text)
    assert page.tags.count("tr") == 1 + 10
    assert page.tags.count("rect") == 10
    assert page.tags.count("figure") == 2
    for wanted in ("4.156", "0.250 of the source's 10.0 MB", "1 min 05 s", "w4g128", "256 x 128"):
        assert wanted in text


def test_bars_share_one_scale() -> None:
    text = render(report([linear("h.0.a", 0.1), linear("h.1.a", 0.05), linear("h.0.b", 0.025)]))
    assert re.findall(r'<rect[^>]* height="([\d.]+)"', text) == ["64.00", "32.00", "16.00"]


def test_nothing_is_loaded_from_anywhere() -> None:
    page = Page(render(report(blocks(2))))
    assert not {"link", "img", "iframe", "object"} & set(page.tags)
    assert not {"src", "href"} & {name for name, _ in page.attributes}
    assert any(value and value.startswith("default-src 'none'") for _, value in page.attributes)


def test_all_text_is_escaped() -> None:
    evil = '<script>alert("x")</script>'
    everywhere = report(
        [linear(f"model.layers.0.{evil}", 0.1, method=evil)],
        model=evil, output=evil, calibration=evil, kept={evil: evil}, refused={evil: evil}, notes=[evil],
    )  # fmt: skip
    text = render(everywhere)
    assert evil not in text
    assert text.count("&lt;script&gt;") >= 8
    assert Page(text).tags.count("script") == 1


def test_dark_and_light() -> None:
    assert "prefers-color-scheme: dark" in render(report(blocks(1)))


def test_errors_that_are_no_number_sort_last_and_draw_nothing_tall() -> None:
    text = render(report([linear("h.0.a", float("nan")), linear("h.1.a", 0.5)]))
    assert '<td class="n" data-v="1e+300">n/a</td>' in text
    assert 'height="0.75"><title>h.0.a: n/a' in text


def test_stacks_show_their_experts() -> None:
    text = render(report([linear("h.0.experts", 0.1, experts=8, fallbacks=3)], expert_fallbacks=3))
    assert "8 x 256 x 128" in text
    assert "3 expert fallbacks" in text


def test_a_report_without_linears_is_a_page_without_chart() -> None:
    page = Page(render(report([])))
    assert "svg" not in page.tags
    assert "table" in page.tags


def test_what_was_rewritten_and_what_was_not_is_told() -> None:
    told = report([], rewrites={"scale": {"normed": 1200, "value": 4}}, refused={"rotate value": "nothing writes it"})
    assert "<p>scale: 1,200 normed, 4 value</p>" in render(told)
    assert "nothing writes it" in render(told)
