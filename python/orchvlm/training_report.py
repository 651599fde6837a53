"""The report of a training run: curves, a table per task, and what the model says; one HTML file
that needs no other, and a PNG of the curves where matplotlib is installed."""
import base64
import html
import io

import numpy as np

from ._files import write_whole
from .tables import html_table

_INK, _PALE, _RIGHT, _WRONG = "#0072B2", "#B8D4E8", "#1E7F45", "#C62828"
_CURVES = (("loss", "loss", True), ("tokens_per_s", "tokens per second", False),
           ("grad_norm", "norm of the gradient", True), ("lr", "learning rate", False),
           ("eval_loss", "loss of held-out samples", False),
           ("patches_per_s", "patches per second", False),
           ("exposed_comm_share", "exposed communication, share of the step", True),
           ("expert_load", "slots of the fullest expert over the mean", True),
           ("expert_rank_load", "slots of the fullest rank's experts over the mean", True))
_STYLE = """body{font:15px/1.5 system-ui,sans-serif;color:#222;max-width:1020px;margin:2em auto;
padding:0 1em}h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2em}table{border-collapse:collapse}
td,th{padding:.25em .9em;border-bottom:1px solid #ddd;text-align:left}.curves,.examples{display:
flex;flex-wrap:wrap;gap:14px}figure{margin:0;width:170px;font-size:13px;line-height:1.35}
figure img{width:168px;height:168px;object-fit:contain;image-rendering:pixelated;background:#f4f4f4;
border:1px solid #ddd}.right{color:#1E7F45}.wrong{color:#C62828}svg text{font:11px sans-serif;
fill:#555}.small{color:#666;font-size:13px}pre{background:#f6f6f6;padding:.6em 1em;overflow:auto}"""
WIDTH, HEIGHT, EDGE = 490, 210, 44  # of a curve, and room for its labels


def smoothed(values, share=0.05):
    """Running means that forget: each row's weight in the next falls with the share of the run."""
    keep = 1 - 1 / max(1.0, share * len(values))
    out, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = keep * mean + value, keep * weight + 1
        out.append(mean / weight)
    return out


def column(rows, key):
    """(steps, values) of what was a number."""
    pairs = [(row["step"], row[key]) for row in rows if row.get(key) is not None
             and np.isfinite(row[key])]
    return [p[0] for p in pairs], [p[1] for p in pairs]


# ---------------------------------------------------------------- curves


def ticks(low, high):
    """Three to six round numbers in between."""
    span = high - low or abs(high) or 1.0
    size = 10.0 ** np.floor(np.log10(span / 4))
    step = next(size * k for k in (1, 2, 5, 10) if span / (size * k) <= 5)
    return [k * step for k in range(int(np.ceil(low / step - 1e-9)), int(high / step + 1e-9) + 1)]


def svg_curve(rows, key, title, smooth=False):
    """One quantity over the steps as an SVG element.

    Parameters
    ----------
    rows : list of dict
        Of ``metrics.jsonl``.
    key : str
    title : str
    smooth : bool
        Draw running means above the values.

    Returns
    -------
    str
    """
    steps, values = column(rows, key)
    if not values:
        return ""
    low, high = min(min(values), 0.0), max(values)
    if smooth and len(values) > 20:  # a few first values must not flatten the rest
        high = min(high, 3 * float(np.quantile(values[len(values) // 20:], 0.98)))
    high = high if high > low else low + 1.0
    first, last = steps[0], max(steps[-1], steps[0] + 1)

    def place(step, value):
        x = EDGE + (step - first) / (last - first) * (WIDTH - EDGE - 12)
        y = 26 + (high - min(value, high)) / (high - low) * (HEIGHT - 52)
        return x, y

    def line(numbers, colour, width):
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, steps, numbers))
        return (f'<polyline fill="none" stroke="{colour}" stroke-width="{width}" '
                f'points="{points}"/>')

    parts = [f'<svg role="img" width="{WIDTH}" height="{HEIGHT}" '
             f'viewBox="0 0 {WIDTH} {HEIGHT}"><text x="{EDGE}" y="14">{html.escape(title)}'
             '</text>']
    for tick in ticks(low, high):
        y = place(first, tick)[1]
        parts.append(f'<line x1="{EDGE}" x2="{WIDTH - 12}" y1="{y:.1f}" y2="{y:.1f}" '
                     f'stroke="#e4e4e4"/><text x="{EDGE - 5}" y="{y + 4:.1f}" '
                     f'text-anchor="end">{tick:.4g}</text>')
    for tick in ticks(first, last):
        parts.append(f'<text x="{place(tick, low)[0]:.1f}" y="{HEIGHT - 8}" '
                     f'text-anchor="middle">{tick:.0f}</text>')
    parts.append(line(values, _PALE if smooth else _INK, 1))
    if smooth:
        parts.append(line(smoothed(values), _INK, 1.8))
    return "".join(parts) + "</svg>"


def plot_training(rows, path=None, evaluation=None):
    """Curves of a run, and right answers by task.

    Parameters
    ----------
    rows : list of dict
        Of ``metrics.jsonl``.
    path : path-like, optional
        PNG to write.
    evaluation : Evaluation, optional
        Adds a panel of exact answers.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ImportError
        matplotlib is not installed.

    Examples
    --------
    >>> from orchvlm.training_report import plot_training
    >>> rows = [{"step": k, "loss": 1 / k, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_s": 3e3}
    ...         for k in range(1, 9)]
    >>> figure = plot_training(rows)                                         # doctest: +SKIP
    """
    from .plots import _figure, _finish, _tidy
    figure = _figure(10, 5.6, path)
    grid = figure.subplots(2, 2).ravel()
    curves = _CURVES[:3] if evaluation is not None else _CURVES[:4]
    for axes, (key, title, smooth) in zip(grid, curves):
        _tidy(axes)
        steps, values = column(rows, key)
        axes.plot(steps, values, color=_PALE if smooth else _INK, linewidth=1)
        if smooth:
            axes.plot(steps, smoothed(values), color=_INK, linewidth=1.6)
            if len(values) > 20:
                axes.set_ylim(0, 1.1 * min(max(values), 3 * float(np.quantile(
                    values[len(values) // 20:], 0.98))) or 1)
        else:
            axes.set_ylim(bottom=0)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("step")
    if evaluation is not None:
        _draw_kinds(grid[3], evaluation)
    return _finish(figure, path)


def _draw_kinds(axes, evaluation):
    kinds = [(kind, 100 * exact / n) for kind, (_, exact, n) in evaluation.by_kind().items()
             if kind != "all"]
    bars = axes.barh([kind for kind, _ in kinds], [share for _, share in kinds], color=_INK)
    axes.bar_label(bars, fmt="%.0f", padding=3, fontsize=8)
    axes.set_xlim(0, 108)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("exact answers on held-out samples, %", fontsize=10, loc="left")


# ---------------------------------------------------------------- examples


def _picture(sample, said):
    """The sample's first picture as a PNG's data URI; where a place is asked for, with the region
    that counts and the place or box that the model named."""
    from PIL import Image, ImageDraw

    from .data import load_image, read_messages
    from .data.verify import numbers
    source = next((part[1] for message in read_messages(sample) for part in message.parts
                   if part[0] == "image"), None)
    if source is None:
        return None
    picture = Image.fromarray(load_image(source))
    scale = max(1, 168 // max(picture.size))
    picture = picture.resize([side * scale for side in picture.size], Image.Resampling.NEAREST)
    if sample.get("check") in ("point", "box"):
        draw, (width, height) = ImageDraw.Draw(picture), picture.size
        found = [value / 999 for value in numbers(said)[:4]]
        draw.rectangle([v / 999 * side for v, side in zip(sample["region"], (width, height) * 2)],
                       outline=_RIGHT)
        if sample["check"] == "box" and len(found) == 4 and all(
                a <= b for a, b in zip(found, found[2:])):
            draw.rectangle([v * side for v, side in zip(found, (width, height) * 2)],
                           outline=_WRONG)
        elif sample["check"] == "point" and len(found) >= 2:
            x, y = found[0] * width, found[1] * height
            draw.line([x - 6, y, x + 6, y], "black", 2)
            draw.line([x, y - 6, x, y + 6], "black", 2)
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def _question(sample):
    from .data import read_messages
    said = [" ".join(part[1] for part in message.parts if part[0] == "text")
            for message in read_messages(sample) if message.role == "user"]
    return said[-1].strip() if said else ""


def _example(sample, said, value):
    return {"picture": _picture(sample, said), "question": _question(sample)[:200],
            "said": said[:120], "answer": sample["answer"][:120],
            "right": value >= 1 or (sample.get("check") == "box" and value >= 0.5)}


def shown(evaluation, examples=6):
    """What a report shows of an evaluation, as JSON takes it.

    Parameters
    ----------
    evaluation : Evaluation
    examples : int
        Samples of each kind, in the order they came in: none is picked by its outcome.

    Returns
    -------
    dict
        ``table`` (header and rows) and ``examples`` (by kind), pictures among them.
    """
    kinds = {}
    for row in evaluation.rows:
        kinds.setdefault(str(row[0].get("kind", "sample")), []).append(row)
    return {"table": list(evaluation.table()),
            "examples": {kind: [_example(*row) for row in rows[:examples]]
                         for kind, rows in sorted(kinds.items())}}


def _figure(example):
    """An example as HTML; whoever reads it from a file may read anything."""
    kind = "right" if example["right"] else "wrong"
    picture, (question, said, answer) = example["picture"], (
        html.escape(str(example[key])) for key in ("question", "said", "answer"))
    image = f'<img alt="" src="{html.escape(str(picture))}">' if picture else ""
    return (f'<figure>{image}<figcaption>{question}<br><b class="{kind}">{said or "(nothing)"}</b>'
            + ("" if kind == "right" else f" &nbsp; {answer}") + "</figcaption></figure>")


def _examples(kinds):
    for kind, examples in kinds.items():
        yield f"<h3>{html.escape(kind)}</h3><div class=examples>"
        yield from map(_figure, examples)
        yield "</div>"


def write_report(path, rows, evaluation=None, *, title="Training run", facts=(), command="",
                 examples=6, timeline=()):
    """Writes one self-contained HTML file.

    Parameters
    ----------
    path : path-like
        Of the file.
    rows : list of dict
        Of ``metrics.jsonl``.
    evaluation : Evaluation or dict, optional
        Adds the table per task and example pictures; the dict is what :func:`shown` gave.
    title : str
        Heading.
    facts : sequence of (str, str)
        What was trained, how, where: a table of two columns.
    command : str
        What repeats it.
    examples : int
        Samples shown of each kind; the first ones.
    timeline : list of list of (str, float, float)
        Of a run over ranks: one step, by rank (phase, start, end).

    Examples
    --------
    >>> import pathlib, tempfile
    >>> from orchvlm.training_report import write_report
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "report.html")
    ...     write_report(path, [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}])
    ...     "<svg" in path.read_text()
    True
    """
    from .ranks_report import ranks_section
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}"
             f"</title><style>{_STYLE}</style><h1>{html.escape(title)}</h1>"]
    if command:
        parts.append(f"<pre>{html.escape(command)}</pre>")
    if facts:
        parts.append(html_table(["", ""], facts))
    seen = shown(evaluation, examples) if hasattr(evaluation, "rows") else evaluation
    if seen:
        parts += ["<h2>Held-out samples</h2>", html_table(*seen["table"]),
                  "<p class=small>Blind: the commonest answer, or the middle, every time.</p>"]
    curves = [svg_curve(rows, *curve) for curve in _CURVES]
    if any(curves):
        parts += ["<h2>Curves</h2><div class=curves>", *curves, "</div>"]
    parts += ranks_section(rows, timeline)
    if seen and seen["examples"]:
        parts += ['<h2>What it says</h2><p class=small>The first held-out samples of each task. '
                  '<span class=right>Green</span> is right; <span class=wrong>red</span> is wrong '
                  "and followed by the answer. Green boxes mark where a place counts, crosses "
                  "the place that was said.</p>", *_examples(seen["examples"])]
    write_whole(path, lambda stream: stream.write("\n".join(parts).encode()))
