"""Tables for people: aligned plain text, and HTML for notebooks."""
import html as _html
from itertools import zip_longest

_BYTES = ("B", "kB", "MB", "GB", "TB", "PB")


def format_bytes(count):
    """Bytes with a decimal unit, as datasheets give memory and bandwidth.

    Parameters
    ----------
    count : float
        Bytes, >= 0.

    Returns
    -------
    str

    Examples
    --------
    >>> from orchvlm.tables import format_bytes
    >>> format_bytes(0), format_bytes(1536), format_bytes(80e9)
    ('0 B', '1.536 kB', '80 GB')
    """
    for unit in _BYTES:
        if count < 999.95 or unit == _BYTES[-1]:  # 999,960 B are 1 MB, not 1000 kB
            return f"{count:.4g} {unit}"
        count /= 1000


def format_seconds(seconds):
    """Seconds with the unit that reads best.

    Parameters
    ----------
    seconds : float
        >= 0.

    Returns
    -------
    str

    Examples
    --------
    >>> from orchvlm.tables import format_seconds
    >>> format_seconds(0), format_seconds(0.00123), format_seconds(12.345)
    ('0 s', '1.23 ms', '12.3 s')
    """
    if seconds == 0:
        return "0 s"
    for unit, size in (("s", 1), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size or unit == "us":
            return f"{seconds / size:.3g} {unit}" if seconds < 1000 else f"{seconds:.0f} s"


def format_percent(share, digits=1):
    """A share as a percentage; nothing for None.

    Parameters
    ----------
    share : float or None
        1.0 is 100 %.
    digits : int
        Digits behind the point.

    Returns
    -------
    str

    Examples
    --------
    >>> from orchvlm.tables import format_percent
    >>> format_percent(0.4163), format_percent(None)
    ('41.6 %', '')
    """
    return "" if share is None else f"{100 * share:.{digits}f} %"


def _numeric(cell):
    return cell[:1].isdigit() or cell[:1] in "-+." and cell[1:2].isdigit()


def _right(columns):
    """A column is set flush right when its cells are numbers, but for empty ones and dashes."""
    return [all(_numeric(c) for c in column if c not in ("", "-")) and any(column)
            for column in columns]


def _columns(header, rows):
    """(rows of strings, columns, which of them are set flush right)"""
    rows = [[str(c) for c in row] for row in rows]
    columns = list(zip(*rows)) if rows else [()] * len(header)
    return rows, columns, _right(columns)


def format_count(count, noun):
    """A number of things, singular or plural.

    Parameters
    ----------
    count : int
        >= 0.
    noun : str
        Singular.

    Returns
    -------
    str

    Examples
    --------
    >>> from orchvlm.tables import format_count
    >>> format_count(1, "micro-batch"), format_count(0, "micro-batch"), format_count(2, "GPU")
    ('1 micro-batch', '0 micro-batches', '2 GPUs')
    """
    ending = "" if count == 1 else "es" if noun.endswith("ch") else "s"
    return f"{count} {noun}{ending}"


def text_table(header, rows, title=None):
    """An aligned plain-text table; columns of numbers are set flush right.

    Parameters
    ----------
    header : sequence of str
        Names of the columns; a name may have several lines.
    rows : sequence of sequences
        Cells; anything that ``str`` takes.
    title : str, optional
        A line above.

    Returns
    -------
    str
        Without a newline at the end.

    Examples
    --------
    >>> from orchvlm.tables import text_table
    >>> print(text_table(["rank", "load"], [["a", 1.5], ["bb", 10]]))
    rank  load
    ----  ----
    a      1.5
    bb      10
    """
    rows, columns, right = _columns(header, rows)
    names = list(zip_longest(*(name.split("\n") for name in header), fillvalue=""))
    width = [max(map(len, (*name, *column))) for name, column in zip(zip(*names), columns)]

    def line(cells):
        put = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, width, right))
        return "  ".join(put).rstrip()

    lines = [*map(line, names), "  ".join("-" * w for w in width), *map(line, rows)]
    return "\n".join([title, *lines] if title else lines)


def html_table(header, rows, title=None):
    """The same table as an HTML fragment; every cell is escaped.

    Parameters
    ----------
    header : sequence of str
        Names of the columns; a name may have several lines.
    rows : sequence of sequences
        Cells; anything that ``str`` takes.
    title : str, optional
        A caption.

    Returns
    -------
    str

    Examples
    --------
    >>> from orchvlm.tables import html_table
    >>> "<td>&lt;8K</td>" in html_table(["mix"], [["<8K"]])
    True
    """
    rows, _, right = _columns(header, rows)
    style = [' style="text-align:right"' if r else "" for r in right]

    def line(cells, tag):
        inner = "".join(f"<{tag}{s}>{_html.escape(c)}</{tag}>".replace("\n", "<br>")
                        for c, s in zip(cells, style))
        return f"<tr>{inner}</tr>"

    caption = f"<caption>{_html.escape(title)}</caption>" if title else ""
    return ("<table>" + caption + "<thead>" + line(header, "th")
            + "</thead><tbody>" + "".join(line(r, "td") for r in rows) + "</tbody></table>")
