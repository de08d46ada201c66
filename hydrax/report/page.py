"""The page of a report: one file of HTML that needs nothing else, and the same in Markdown with pictures beside it."""

import base64
import csv
import dataclasses
import decimal
import html
import io
import math
import string
from collections.abc import Iterable, Sequence
from typing import Any

Row = Sequence[Any]


@dataclasses.dataclass(frozen=True)
class Table:
    """`name` is that of its CSV file. Cells that are numbers are written in full there, in brief on the page."""

    name: str
    columns: Sequence[str]
    rows: Sequence[Row]

    def csv(self) -> str:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(self.rows)
        return text.getvalue()


@dataclasses.dataclass(frozen=True)
class Picture:
    """A plot on the page."""

    title: str
    caption: str
    svg: bytes
    table: Table


@dataclasses.dataclass(frozen=True)
class Page:
    """All that a report says. `commands` and `environment` are lines of text, by heading."""

    title: str
    summary: Sequence[str]  # paragraphs
    results: Table
    pictures: Sequence[Picture]
    left_out: Table
    settings: Table
    commands: dict[str, Sequence[str]]
    environment: Table


def as_html(page: Page) -> str:
    """A page without scripts or references to anything outside it."""
    body = [f"<h1>{_escaped(page.title)}</h1>"]
    body += [f"<p>{_escaped(text)}</p>" for text in page.summary]
    body += ["<h2>Results</h2>", _table(page.results), _csv_link(page.results)]
    body += [_figure(picture) for picture in page.pictures]
    if page.left_out.rows:
        body += ["<h2>Runs left out</h2>", _table(page.left_out)]
    body.append("<h2>How these runs were made</h2>")
    body += [_details(f"Commands: {name}", _lines(lines)) for name, lines in page.commands.items()]
    body.append(_details("Environment", _table(page.environment)))
    body.append(_details("Settings that all runs have in common", _table(page.settings)))
    return TEMPLATE.substitute(title=_escaped(page.title), body="\n".join(body))


def as_markdown(page: Page) -> str:
    """The same; pictures and tables are files in figures/ and tables/."""
    lines = [f"# {page.title}", "", *_joined(page.summary), "## Results", "", *_pipes(page.results)]
    lines += [f"[CSV](tables/{page.results.name}.csv)", ""]
    for picture in page.pictures:
        name = picture.table.name
        lines += [f"## {picture.title}", "", f"![{picture.title}](figures/{name}.png)", ""]
        lines += [f"{picture.caption} [Table](tables/{name}.csv), [vector graphics](figures/{name}.svg).", ""]
    if page.left_out.rows:
        lines += ["## Runs left out", "", *_pipes(page.left_out)]
    lines += ["## How these runs were made", ""]
    for name, commands in page.commands.items():
        lines += [f"{name[:1].upper()}{name[1:]}:", "", "```bash", *commands, "```", ""]
    lines += _pipes(page.environment)
    lines += ["### Settings that all runs have in common", "", *_pipes(page.settings)]
    return "\n".join(lines).rstrip() + "\n"


def brief(table: Table) -> list[list[str]]:
    """The rows for reading: numbers of a column with equally many decimals, four digits of the largest at least."""
    columns = [_column([row[i] for row in table.rows]) for i in range(len(table.columns))]
    return [list(row) for row in zip(*columns, strict=True)]


def _column(cells: Sequence[Any]) -> list[str]:
    sizes = [abs(x) for x in cells if isinstance(x, float) and x and math.isfinite(x)]
    if not sizes:
        return [_text(cell, 0) for cell in cells]
    wanted = max(3 - math.floor(math.log10(max(sizes))), -math.floor(math.log10(min(sizes))), 0)
    wide = max(sizes) >= 1e13 or wanted > 7
    return [_text(cell, None if wide else min(wanted, max(map(_decimals, sizes)))) for cell in cells]


def _decimals(x: float) -> int:
    """How many it takes to write the number in full."""
    exponent = decimal.Decimal(repr(x)).normalize().as_tuple().exponent
    return max(0, -exponent) if isinstance(exponent, int) else 0


def _text(value: Any, decimals: int | None) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.3g}" if decimals is None else f"{value:,.{decimals}f}"
    return str(value)


def _escaped(text: object) -> str:
    return html.escape(str(text))


def _figure(picture: Picture) -> str:
    source = f"data:image/svg+xml;base64,{base64.b64encode(picture.svg).decode()}"
    image = f'<img alt="{_escaped(picture.title)}; its numbers are in the table below" src="{source}">'
    caption = f"<figcaption>{_escaped(picture.caption)}</figcaption>"
    behind = _details("The table behind this plot", _table(picture.table) + _csv_link(picture.table))
    return f"<section><h2>{_escaped(picture.title)}</h2>\n<figure>{image}{caption}</figure>\n{behind}</section>"


def _table(table: Table) -> str:
    head = "".join(f"<th>{_escaped(c)}</th>" for c in table.columns)
    numbers = [[isinstance(cell, (int, float)) and not isinstance(cell, bool) for cell in row] for row in table.rows]
    cells = [map(_cell, row, number) for row, number in zip(brief(table), numbers, strict=True)]
    rows = "\n".join(f"<tr>{''.join(row)}</tr>" for row in cells)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>'


def _cell(text: str, number: bool) -> str:
    return f"<td{' class=n' if number else ''}>{_escaped(text)}</td>"


def _csv_link(table: Table) -> str:
    data = base64.b64encode(table.csv().encode()).decode()
    return f'<p class="csv"><a download="{_escaped(table.name)}.csv" href="data:text/csv;base64,{data}">CSV</a></p>'


def _details(title: str, content: str) -> str:
    return f"<details><summary>{_escaped(title)}</summary>\n{content}</details>"


def _lines(lines: Iterable[str]) -> str:
    return f"<pre>{_escaped(chr(10).join(lines))}</pre>"


def _joined(paragraphs: Iterable[str]) -> list[str]:
    return [line for text in paragraphs for line in (text, "")]


def _pipes(table: Table) -> list[str]:
    def row(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    return [row(table.columns), row("---" for _ in table.columns), *map(row, brief(table)), ""]


TEMPLATE = string.Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { max-width: 46rem; margin: 0 auto; padding: 1rem; background: #fff; color: #1f2430;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 0.4rem; }
figure { margin: 0.5rem 0; }
img { width: 100%; height: auto; display: block; }
figcaption { color: #4a505c; font-size: 0.9rem; }
details { margin: 0.5rem 0; }
summary { cursor: pointer; padding: 0.25rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.85rem; margin: 0.5rem 0; }
th, td { padding: 0.2rem 0.7rem 0.2rem 0; text-align: left; vertical-align: top; white-space: nowrap; }
th { border-bottom: 1.5px solid #1f2430; white-space: normal; vertical-align: bottom; }
td { border-bottom: 1px solid #e6e8ec; }
.n { text-align: right; font-variant-numeric: tabular-nums; }
.csv { margin: 0; font-size: 0.85rem; }
pre { overflow-x: auto; background: #f5f6f8; padding: 0.7rem; font-size: 0.8rem; line-height: 1.4; }
@media print {
  body { max-width: none; padding: 0; font-size: 11pt; }
  section { break-inside: avoid; }
  h2 { break-after: avoid; }
  .wide, pre { overflow: visible; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; }
  td, th { white-space: normal; }
  .csv { display: none; }
}
</style>
</head>
<body>
$body
</body>
</html>
""")
