"""What a report shows of a run over ranks: how even phases were, and one step as it went by."""
import html

from .training_report import EDGE, HEIGHT, WIDTH, column, smoothed, ticks

_LINES = (("sampled", "as read", "#999999"), ("planned", "as planned", "#0072B2"),
          ("measured", "as measured", "#D55E00"))
_COLOURS = {"vision": "#009E73", "audio": "#CC79A7", "llm": "#0072B2"}
_TRANSFER, _ROW = "#E69F00", 26


def balanced_phases(rows):
    """Names of the phases that the ranks of a run shared out; none where there was one rank."""
    return [name for name in ("vision", "audio", "llm")
            if any(f"{name}_planned" in row for row in rows)]


def imbalance_svg(rows, phase):
    """Largest load over mean of one phase, over the steps: as read, as planned, as measured.

    Parameters
    ----------
    rows : list of dict
        Of ``metrics.jsonl``.
    phase : str

    Returns
    -------
    str
        An SVG element.
    """
    lines = [(word, colour, *column(rows, f"{phase}_{key}")) for key, word, colour in _LINES]
    lines = [(word, colour, steps, smoothed(values)) for word, colour, steps, values in lines
             if values]
    if not lines:
        return ""
    high = max(1.05, *(max(values) for *_, values in lines))
    first, last = lines[0][2][0], max(lines[0][2][-1], lines[0][2][0] + 1)

    def place(step, value):
        x = EDGE + (step - first) / (last - first) * (WIDTH - EDGE - 12)
        return x, 26 + (high - value) / (high - 1) * (HEIGHT - 52)

    parts = [f'<svg role="img" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}">'
             f'<text x="{EDGE}" y="14">{html.escape(phase)}: largest load over mean</text>']
    for tick in ticks(1.0, high):
        y = place(first, tick)[1]
        parts.append(f'<line x1="{EDGE}" x2="{WIDTH - 12}" y1="{y:.1f}" y2="{y:.1f}" '
                     f'stroke="#e4e4e4"/><text x="{EDGE - 5}" y="{y + 4:.1f}" '
                     f'text-anchor="end">{tick:.4g}</text>')
    for tick in ticks(first, last):
        parts.append(f'<text x="{place(tick, 1)[0]:.1f}" y="{HEIGHT - 8}" '
                     f'text-anchor="middle">{tick:.0f}</text>')
    for k, (word, colour, steps, values) in enumerate(lines):
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, steps, values))
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.8" '
                     f'points="{points}"/><text x="{WIDTH - 12}" y="{26 + 14 * k}" '
                     f'text-anchor="end" style="fill:{colour}">{word}</text>')
    return "".join(parts) + "</svg>"


def _words(group):
    """What a title says of a label such as 0+2."""
    first, _, degree = group.partition("+")
    return f", group of {degree} from rank {first} on" if degree else ""


def timeline_svg(timeline):
    """One step over the ranks, a row for each.

    Parameters
    ----------
    timeline : list of list of (str, float, float)
        By rank: phase or transfer, start and end in seconds; a phase that a group ran has its first
        rank and degree behind it: ``llm 0+2``.

    Returns
    -------
    str
        An SVG element.
    """
    events = [event for rank in timeline for event in rank]
    if not events:
        return ""
    start, end = min(e[1] for e in events), max(e[2] for e in events)
    wide, high = 2 * WIDTH, 44 + _ROW * len(timeline)
    scale = (wide - 80) / max(end - start, 1e-9)
    parts = [f'<svg role="img" width="{wide}" height="{high}" viewBox="0 0 {wide} {high}">']
    for rank, row in enumerate(timeline):
        y = 22 + _ROW * rank
        parts.append(f'<text x="56" y="{y + 14}" text-anchor="end">rank {rank}</text>')
        for name, begun, ended in row:
            phase, _, group = name.partition(" ")
            title = html.escape(f"{phase}{_words(group)}: {1e3 * (ended - begun):.1f} ms")
            x, long = 64 + scale * (begun - start), max(0.5, scale * (ended - begun))
            parts.append(f'<rect x="{x:.1f}" y="{y}" width="{long:.1f}" height="{_ROW - 6}" '
                         f'fill="{_COLOURS.get(phase, _TRANSFER)}"><title>{title}</title></rect>')
            if group and long > 8 * len(group):
                parts.append(f'<text x="{x + long / 2:.1f}" y="{y + 14}" text-anchor="middle" '
                             f'style="fill:#fff;pointer-events:none">{html.escape(group)}</text>')
    x = 64
    for name, colour in (*_COLOURS.items(), ("transfer, and waiting for it", _TRANSFER)):
        parts.append(f'<rect x="{x}" y="4" width="10" height="10" fill="{colour}"/>'
                     f'<text x="{x + 14}" y="13">{name}</text>')
        x += 34 + 7 * len(name)
    parts.append(f'<text x="{wide - 12}" y="{high - 6}" text-anchor="end">'
                 f'{1e3 * (end - start):.0f} ms</text>')
    return "".join(parts) + "</svg>"


def trace_of(timeline):
    """A timeline as a Chrome trace, which chrome://tracing and Perfetto show.

    Parameters
    ----------
    timeline : list of list of (str, float, float)

    Returns
    -------
    dict
        Fit for JSON.
    """
    start = min((event[1] for rank in timeline for event in rank), default=0.0)
    return {"traceEvents": [
        {"name": name, "ph": "X", "pid": 0, "tid": rank, "ts": 1e6 * (begun - start),
         "dur": 1e6 * (ended - begun)}
        for rank, row in enumerate(timeline) for name, begun, ended in row]}


def timeline_of(trace):
    """The timeline that :func:`trace_of` wrote.

    Parameters
    ----------
    trace : dict

    Returns
    -------
    list of list of (str, float, float)
    """
    events = trace.get("traceEvents", [])
    ranks = 1 + max((event["tid"] for event in events), default=-1)
    return [[(event["name"], event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6)
             for event in events if event["tid"] == rank] for rank in range(ranks)]


def ranks_section(rows, timeline):
    """The part of a report that is about ranks, as HTML; empty where there was one."""
    phases = balanced_phases(rows)
    if not phases:
        return []
    parts = ["<h2>Over the ranks</h2><p class=small>1 is even. As read: every item computed where "
             "it was sampled; as planned: by the cost model; as measured: what the ranks' threads "
             "computed.</p><div class=curves>", *(imbalance_svg(rows, name) for name in phases),
             "</div>"]
    if timeline:
        groups = any(" " in name for rank in timeline for name, *_ in rank)
        words = " 0+2 is a group of two ranks, from rank 0 on, in one micro-batch." * groups
        parts += [f"<p class=small>The last step:{words}</p>", timeline_svg(timeline)]
    return parts
