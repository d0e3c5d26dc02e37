"""Values, tables and paragraphs as Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from coalign.formatting import percent

WIDTH = 138
Values = dict[str, Any]  # the content of a file in results/


def paragraph(text: str) -> str:
    """Returns text in lines of at most `WIDTH` characters."""
    return textwrap.fill(" ".join(text.split()), WIDTH, break_long_words=False, break_on_hyphens=False)


def bullet(text: str, indent: str = "") -> str:
    return textwrap.fill(
        " ".join(text.split()),
        WIDTH,
        initial_indent=f"{indent}- ",
        subsequent_indent=f"{indent}  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page(*blocks: str) -> str:
    """Joins the blocks of a page with blank lines between them."""
    return "\n\n".join(block for block in blocks if block) + "\n"


def commands(*lines: str) -> str:
    """Returns a block of commands that train for hours."""
    return "\n".join(["<!-- not run: takes hours -->", "```bash", *lines, "```"])


def results_link(name: str) -> str:
    return f"[{name}.json](../../results/{name}.json)"


def interval(metric: Values) -> tuple[float, float, float]:
    """Returns a metric with its interval over seeds, or over items if there is a single seed."""
    return (metric["value"], *(metric["over_seeds"] or metric["over_items"] or [metric["value"]] * 2))


def value_text(metric: Values) -> str:
    middle, _, high = interval(metric)
    if metric["kind"] == "distance":
        return f"{middle:.2f} ± {high - middle:.2f}"
    return f"{100 * middle:.1f} ± {100 * (high - middle):.1f}"


def percents(value: float, low: float, high: float) -> str:
    return f"{100 * value:.1f} ± {50 * (high - low):.1f}"


def chance_text(metric: Values) -> str:
    return "" if metric["chance"] is None else percent(metric["chance"]).removesuffix(" %")


def difference_text(metric: Values) -> str:
    spans = [metric[f"difference_over_{unit}"] for unit in ("items", "seeds")]
    return f"{signed(metric['difference'])} ({'; '.join(span_text(span) for span in spans if span)})"


def signed(number: float) -> str:
    return minus(f"{100 * number:+.1f}")


def span_text(edges: Sequence[float] | None) -> str:
    return "–" if edges is None else f"{signed(edges[0])} to {signed(edges[1])}"


def minus(text: str) -> str:
    return text.replace("-", "−")


def factor_text(efficiency: Values | None) -> str:
    """Returns a data-efficiency factor with its interval over seeds and items. ≥ and ≤: the curves cross beyond the fractions tried."""
    if efficiency is None:
        return ""
    factor, (low, high) = efficiency["factor"], efficiency["interval"] or (1.0, 1.0)
    value = f"{'≥' if factor > 1 else '≤'} {factor:.2g}" if efficiency["bound"] else f"{factor:.2f}"
    return value + (f" ({low:.2f} to {high:.2f})" if low < high else "")


def metric_title(values: Values, metric: str) -> str:
    return values["groups"][0]["metrics"][metric]["title"]


def group(values: Values, name: str) -> Values:
    """Returns the group of runs of one arm."""
    return next(each for each in values["groups"] if each["name"] == name)


def shared_settings(values: Values) -> Values:
    """Returns the settings of the first arm, which the others share except for what their names say."""
    return {**values["settings"], **values["groups"][0]["settings"]}
