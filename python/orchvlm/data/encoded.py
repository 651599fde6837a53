"""Pictures that are still files: how many patches they give is read from their headers, and the
patches are cut by whoever needs them."""
import json
import struct
from dataclasses import asdict

import numpy as np

from .assets import DataError
from .images import ImageRule, load_image, open_image

_HEAD = struct.Struct("<I")           # bytes of the JSON that stands before the file
_FORMATS = ("JPEG", "PNG", "WEBP")    # what makes their size is read when they are opened
_TURNED = (5, 6, 7, 8)                # EXIF orientations that swap the sides
_PNG_TEXTS = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")


def upright_size(content, name):
    """Height and width of the picture that :func:`load_image` makes of a file.

    Parameters
    ----------
    content : bytes
    name : str
        What messages call it.

    Returns
    -------
    (int, int) or None
        None where only decoding tells, or would raise.

    Raises
    ------
    DataError
        No picture, or more pixels than are decoded.
    """
    from PIL import Image
    image = open_image(content, name)
    if image.format not in _FORMATS or getattr(image, "n_frames", 1) > 1 or (
            image.format == "PNG" and not _png_told(content)):
        return None
    try:  # Pillow's own of PNG would decode in search of an orientation behind the pixels
        turned = Image.Image.getexif(image).get(0x0112) in _TURNED
    except Exception:  # it raises whatever it likes on broken bytes
        return None
    return image.size if turned else image.size[::-1]


def _png_told(content):
    """Whether a PNG is whole and says all that it says before its pixels."""
    place, pixels = 8, False
    while place + 12 <= len(content):
        size, kind = struct.unpack_from(">I4s", content, place)
        if kind == b"IEND":
            return pixels
        pixels |= kind == b"IDAT"
        if pixels and kind in _PNG_TEXTS:
            return False
        place += 12 + size
    return False


def encode(content, name, rule):
    """A picture as it travels: what is to be made of it, and its file.

    Parameters
    ----------
    content : bytes
        Of the file.
    name : str
        What messages call it.
    rule : ImageRule
        What :func:`decode` cuts patches by.

    Returns
    -------
    item : bytes or None
        None where only decoding tells the size.
    grid : (int, int, int) or None

    Raises
    ------
    DataError
        No picture, or none that the rule takes.
    """
    size = upright_size(content, name) if type(rule) is ImageRule else None
    if size is None:
        return None, None
    try:
        height, width = rule.size(*size)
    except ValueError as error:
        raise DataError(f"{name}: {error}") from None
    head = json.dumps({"name": name, "rule": asdict(rule)}, default=int).encode()
    grid = (1, height // rule.patch_size, width // rule.patch_size)
    return b"".join([_HEAD.pack(len(head)), head, content]), grid


def decode(item):
    """The patches of a picture.

    Parameters
    ----------
    item : bytes
        From :func:`encode`, of any rank.

    Returns
    -------
    array[P, values]
        To the bit what eager reading gives.

    Raises
    ------
    DataError
        A file that is broken behind its header.
    """
    try:
        (size,) = _HEAD.unpack_from(item)
        head = json.loads(bytes(item[_HEAD.size:_HEAD.size + size]))
        name, rule = head["name"], ImageRule(**head["rule"])
    except (struct.error, ValueError, TypeError, KeyError, RecursionError):
        raise DataError("not a picture as encode() makes it") from None
    rows, _ = rule(load_image(bytes(item[_HEAD.size + size:]), name), name)
    return rows


def decoded(item, rows, values, dtype):
    """The same, where it is known what there must be: a DataError for another number of rows, a
    ValueError for rows of another kind."""
    found = decode(item)
    if found.shape[1] != values or found.dtype != dtype:
        raise ValueError(f"a picture gives patches of {found.shape[1]} {found.dtype}; others have "
                         f"{values} {np.dtype(dtype)}: use one rule on all ranks")
    if len(found) != rows:
        raise DataError(f"a picture of {len(found)} patches has a header of {rows}")
    return found
