"""An HTML page in one file: no script, no link, nothing from elsewhere; all text is escaped as the tree is written out.

Text that a model has sampled may look like anything, HTML included. Elements are built by `element` from strings that
stay text, and a Content-Security-Policy in the page forbids scripts and every request, whatever they say.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from xml.etree.ElementTree import Element, SubElement, tostring

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
CSS = """
:root { --ink: #0f172a; --soft: #64748b; --line: #e2e8f0; --paper: #ffffff; --ground: #f8fafc; --accent: #2563eb;
  --bad: #dc2626; --good: #059669; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 28px 24px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 18px; margin: 36px 0 4px; }
h3 { font-size: 15px; margin: 18px 0 6px; }
p { margin: 0 0 12px; color: var(--soft); max-width: 110ch; }
code { font: 13px ui-monospace, monospace; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(168px, 1fr)); gap: 12px; margin: 18px 0; }
.tile, figure, .scroll, details { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; }
.tile { padding: 10px 14px; }
.tile b { display: block; font-size: 18px; white-space: nowrap; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: 12.5px; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(370px, 1fr)); gap: 14px; margin: 12px 0; }
figure { margin: 0; padding: 10px; }
@media (min-width: 900px) { figure.wide { grid-column: span 2; } }
figure img { display: block; width: 100%; height: auto; }
.badge { border-radius: 99px; padding: 2px 10px; font-size: 12.5px; color: #fff; background: var(--soft);
  vertical-align: middle; margin-left: 10px; font-weight: 600; letter-spacing: 0; }
.badge.finished { background: var(--good); } .badge.failed { background: var(--bad); }
.alarm { border-left: 4px solid var(--bad); background: #fef2f2; padding: 6px 12px; margin: 6px 0; border-radius: 4px; }
.scroll { overflow-x: auto; margin: 12px 0; }
.scroll.tall { max-height: 640px; overflow-y: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
th { position: sticky; top: 0; background: var(--paper); text-align: left; color: var(--soft); font-weight: 600;
  box-shadow: inset 0 -1px var(--line); }
th, td { padding: 6px 10px; vertical-align: top; }
tr + tr td { border-top: 1px solid var(--line); }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
th.number { text-align: right; }
td.text { font: 12.5px/1.45 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; min-width: 90px;
  unicode-bidi: isolate; }
tr.differs td.number { color: var(--bad); font-weight: 600; }
tr.best td { background: #f0fdf4; }
details { padding: 10px 16px; margin: 14px 0; }
summary { cursor: pointer; font-weight: 600; }
footer { margin-top: 40px; color: var(--soft); font-size: 12.5px; }
@media print { .scroll.tall { max-height: none; } details { break-inside: avoid; } }
"""

Part = Element | str


def element(tag: str, *parts: Part, **attributes: str) -> Element:
    """`<tag class="...">parts</tag>`: strings are text, never markup; `class_` is the attribute class."""
    made = Element(tag, {name.rstrip("_"): value for name, value in attributes.items()})
    last: Element | None = None
    for part in parts:
        if isinstance(part, Element):
            made.append(part)
            last = part
        elif last is None:
            made.text = (made.text or "") + part
        else:
            last.tail = (last.tail or "") + part
    return made


def picture(svg: str, title: str, wide: bool = False) -> Element:
    """A drawing within the page; as an image it can neither run a script nor clash with another's names."""
    data = base64.b64encode(svg.encode()).decode()
    image = element("img", src=f"data:image/svg+xml;base64,{data}", alt=title)
    return element("figure", image, class_="wide" if wide else "narrow")


def tiles(numbers: Mapping[str, str]) -> Element:
    """Few large numbers, each above its name."""
    return element(
        "div",
        *(element("div", element("b", value), element("span", name), class_="tile") for name, value in numbers.items()),
        class_="tiles",
    )


def table(
    rows: Sequence[Mapping[str, str]],
    text: Sequence[str] = (),
    marked: Mapping[int, str] | None = None,
    tall: bool = False,
) -> Element:
    """A row a mapping, whose keys are the columns; those not in `text` are numbers. `marked` rows have a class."""
    marked = marked or {}
    columns = list(rows[0]) if rows else []
    kinds = {name: "text" if name in text else "number" for name in columns}
    head = element("tr", *(element("th", name, class_=kinds[name]) for name in columns))
    body = [
        element("tr", *(element("td", row[name], class_=kinds[name]) for name in columns), class_=marked.get(index, ""))
        for index, row in enumerate(rows)
    ]
    made = element("table", element("thead", head), element("tbody", *body))
    return element("div", made, class_="scroll tall" if tall else "scroll")


def folded(title: str, *parts: Part) -> Element:
    """What is opened by a click."""
    return element("details", element("summary", title), *parts)


def html(title: str, *parts: Part) -> str:
    """The whole page."""
    root = Element("html", {"lang": "en"})
    head = SubElement(root, "head")
    SubElement(head, "meta", {"charset": "utf-8"})
    SubElement(head, "meta", {"http-equiv": "Content-Security-Policy", "content": POLICY})
    SubElement(head, "meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"})
    SubElement(head, "title").text = title
    SubElement(head, "style").text = CSS
    SubElement(root, "body").append(element("main", *parts))
    return "<!doctype html>\n" + tostring(root, encoding="unicode", method="html") + "\n"
