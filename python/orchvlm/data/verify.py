"""Is an answer right?  Used for evaluation and as a reward."""
import math
import re

from .assets import DataError

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def normalized(text):
    """An answer without what does not matter: case, runs of blanks, a full stop, quotes.

    Parameters
    ----------
    text : str
        Any.

    Returns
    -------
    str
    """
    return " ".join(text.split()).strip("\"'` ").rstrip(".").strip("\"'` ").casefold()


def numbers(text, limit=64):
    """The numbers in a text.

    Parameters
    ----------
    text : str
        Any; only its first 10,000 characters are looked at.
    limit : int
        How many at most.

    Returns
    -------
    list of float
    """
    return [float(match[0]) for match, _ in zip(_NUMBER.finditer(text[:10_000]), range(limit))]


def iou(first, second):
    """Intersection over union of two boxes.

    Parameters
    ----------
    first, second : (float, float, float, float)
        Left, top, right, bottom.

    Returns
    -------
    float
        0 to 1; 0 for boxes that hold nothing.
    """
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    common = max(0.0, width) * max(0.0, height)
    whole = sum(max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1]) for box in (first, second))
    return common / (whole - common) if whole > common else 0.0


def score(sample, text):
    """How right an answer is.

    Parameters
    ----------
    sample : dict
        With ``check`` and ``answer``: ``exact`` (the same words, but for case and a full stop),
        ``number`` (the last number in the text), ``point`` (the first two numbers lie in
        ``region``), ``box`` (intersection over union of the first four numbers with ``region``).
        Regions are left, top, right, bottom in 0 .. 999.
    text : str
        What the model said.  What stands before a last ``</think>`` does not count.

    Returns
    -------
    float
        0 to 1; between them for boxes only.

    Raises
    ------
    TypeError
        A sample that is no dict, a text that is no string.
    DataError
        A sample without a check, an answer or a region.

    Examples
    --------
    >>> import orchvlm
    >>> sample = {"check": "point", "answer": "500 500", "region": [400, 400, 600, 600]}
    >>> orchvlm.data.score(sample, "at (410, 590)"), orchvlm.data.score(sample, "1 2")
    (1.0, 0.0)
    """
    if not isinstance(sample, dict) or not isinstance(text, str):
        raise TypeError(f"sample and text must be a dict and a string; got "
                        f"{type(sample).__name__} and {type(text).__name__}")
    check, answer = sample.get("check"), sample.get("answer")
    text = text.rpartition("</think>")[2]
    if check == "exact" and isinstance(answer, str):
        return float(normalized(text) == normalized(answer))
    if check == "number" and isinstance(answer, str) and numbers(answer):
        return float(numbers(text, 10_000)[-1:] == numbers(answer)[-1:])
    region = sample.get("region")
    if check in ("point", "box") and isinstance(region, (list, tuple)) and len(region) == 4 and all(
            isinstance(edge, (int, float)) and math.isfinite(edge) for edge in region):
        found = numbers(text)
        if check == "box":
            return iou(found[:4], region) if len(found) >= 4 else 0.0
        return float(len(found) >= 2 and region[0] <= found[0] <= region[2]
                     and region[1] <= found[1] <= region[3])
    raise DataError("sample: needs 'check' (exact, number, point or box) with 'answer' (a string) "
                    f"or 'region' (four numbers); got check {check!r:.40}")
