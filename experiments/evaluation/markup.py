"""HTML from nested calls. Text is escaped unless it was made here."""

import base64
import html


class Markup(str):
    """A piece of finished HTML."""

    __slots__ = ()


def text(value: object) -> Markup:
    """`value` as HTML text; finished markup stays as it is."""
    return value if isinstance(value, Markup) else Markup(html.escape(str(value)))


def join(*pieces: object) -> Markup:
    """Pieces in a row, each escaped unless it is markup."""
    return Markup("".join(text(piece) for piece in pieces))


def element(tag: str, *children: object, **attributes: object) -> Markup:
    """`<tag attributes>children</tag>`.

    Attribute names lose a trailing underscore (`class_`); True stands for an attribute without value,
    False and None for none.
    """
    written = ""
    for name, value in attributes.items():
        if value is None or value is False:
            continue
        name = name.rstrip("_").replace("_", "-")
        written += f" {name}" if value is True else f' {name}="{html.escape(str(value))}"'
    return Markup(f"<{tag}{written}>{join(*children)}</{tag}>")


def image(png: bytes, alt: str) -> Markup:
    """A picture that lies inside the page."""
    return Markup(f'<img src="{_inline(png, "image/png")}" alt="{html.escape(alt)}">')


def video(mp4: bytes, label: str) -> Markup:
    """A looping video that lies inside the page."""
    source = _inline(mp4, "video/mp4")
    return element("video", src=source, controls=True, loop=True, muted=True, playsinline=True, aria_label=label)


def table(header: list, rows: list[list], *, caption: str, class_: str | None = None) -> Markup:
    """A table whose first column names the rows. On a narrow screen it scrolls by itself."""
    head = element("tr", *(element("th", cell, scope="col") for cell in header))
    body = []
    for first, *rest in rows:
        cells = (element("td", cell) for cell in rest)
        body.append(element("tr", element("th", first, scope="row"), *cells))
    inner = element(
        "table", element("caption", caption), element("thead", head), element("tbody", *body), class_=class_
    )
    return element("div", inner, class_="scroll", tabindex="0", role="region", aria_label=caption)


def _inline(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
