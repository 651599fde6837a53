"""Contact sheets: samples with their questions and answers, in one picture to look at."""
from .assets import need
from .chat import read_messages
from .images import load_image

TILE = 160   # pixels of a picture's side on the sheet
LINE = 13


def contact_sheet(samples, path=None, columns=4, said=None):
    """A picture of samples: each one's image, question and answer.

    Parameters
    ----------
    samples : sequence of dict
        As :func:`read_messages` takes them; the first picture of each is shown.
    path : path, optional
        Where to write it as PNG.
    columns : int
        Samples side by side, 1 to 32.
    said : sequence of str, optional
        A model's answers; those that :func:`score` finds wrong are red.

    Returns
    -------
    PIL.Image.Image

    Raises
    ------
    TypeError
        Columns that are no integer.
    ValueError
        No sample, more than 1,024, or another number of answers.
    ImportError
        Pillow is not installed.

    Examples
    --------
    >>> import orchvlm
    >>> tasks = orchvlm.data.Tasks(seed=0)
    >>> orchvlm.data.contact_sheet([tasks[i] for i in range(8)]).size
    (680, 432)
    """
    need("PIL", "pillow")
    from PIL import Image, ImageDraw, ImageFont
    if isinstance(columns, bool) or not isinstance(columns, int):
        raise TypeError(f"columns must be an integer; got {type(columns).__name__}")
    if not 1 <= columns <= 32:
        raise ValueError(f"columns must be in 1 .. 32; got {columns}")
    samples = list(samples)
    said = [None] * len(samples) if said is None else list(said)
    if not 1 <= len(samples) <= 1024 or len(said) != len(samples):
        raise ValueError(f"samples must be 1 to 1,024 with as many answers; got {len(samples)} and "
                         f"{len(said)}")
    wide, high = TILE + 10, TILE + 10 + 3 * LINE + 7
    rows = -(-len(samples) // columns)
    sheet = Image.new("RGB", (columns * wide, rows * high), (250, 250, 250))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for k, (sample, answer) in enumerate(zip(samples, said)):
        left, top = (k % columns) * wide + 5, (k // columns) * high + 5
        picture, lines = _tile(sample, answer)
        if picture is not None:
            picture = Image.fromarray(picture)
            # Small pictures grow by whole factors, so that their pixels can be seen.
            scale = min(TILE / picture.width, TILE / picture.height)
            scale = int(scale) if scale >= 1 else scale
            size = [max(1, round(side * scale)) for side in picture.size]
            how = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
            sheet.paste(picture.resize(size, how),
                        (left + (TILE - size[0]) // 2, top + (TILE - size[1]) // 2))
        draw.rectangle([left - 1, top - 1, left + TILE, top + TILE], outline=(200, 200, 200))
        for row, (text, ink) in enumerate(lines):
            text = text.encode("latin-1", "replace").decode("latin-1")
            while text and draw.textlength(text, font) > TILE:
                text = text[:-1]
            draw.text((left, top + TILE + 4 + row * LINE), text, ink, font)
    if path is not None:
        from .._files import write_whole
        write_whole(path, lambda stream: sheet.save(stream, "PNG"))
    return sheet


def _tile(sample, said):
    """The first picture and up to three lines with their colours."""
    from .verify import score
    picture, question, answer = None, "", ""
    for message in read_messages(sample):
        words = " ".join(part[1] for part in message.parts if part[0] == "text")
        for part in message.parts:
            if part[0] == "image" and picture is None:
                picture = load_image(part[1])
        if message.role == "assistant":
            answer = words
        elif not answer:
            question = words
    lines = [(question.replace("\n", " "), (40, 40, 40)), (answer, (20, 90, 180))]
    if said is not None:
        right = "check" in sample and score(sample, said) >= 0.5
        lines.append((said.replace("\n", " "), (30, 130, 50) if right else (200, 30, 30)))
    return picture, lines
