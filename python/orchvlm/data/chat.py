"""Conversations: the shapes that data sets write them in, and their tokens with labels."""
import re
from dataclasses import dataclass, field

from .assets import DataError, need

ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant",
         "user": "user", "assistant": "assistant", "system": "system", "tool": "tool",
         "observation": "tool", "developer": "system"}
MEDIA = ("image", "video", "audio")
_MARK = re.compile(r"<(image|video|audio)>")  # media inside text, as LLaVA's data sets mark them


@dataclass
class Message:
    """One turn: its role, its parts (("text", str) or (medium, source, options)) and weight."""

    role: str
    parts: list = field(default_factory=list)
    weight: float = None
    plain: bool = False  # written as one string, and handed to templates as one


def read_messages(sample):
    """The turns of a sample, whichever way it is written.

    Parameters
    ----------
    sample : dict
        ``messages``: a list of ``{"role", "content"}``, where content is a string or a list of
        parts ``{"type": "text", "text": ...}``, ``{"type": "image", "image": source}``,
        ``{"type": "image_url", "image_url": {"url": ...}}``, and so for video and audio.  A part
        without source, or a mark ``<image>`` inside a string, takes the next one of the sample's
        ``images`` (``image``), ``videos`` or ``audios``; where the sample has no such list, a mark
        is text.  Or ``conversations``: a list of ``{"from": "human", "value": ...}``.  A message
        with ``weight`` scales its labels; 0 takes them out.  A video part may say ``fps``, the
        frames per second to take, and, for a list or folder of frames, ``sample_fps``, those that
        it has.  Calls of tools are refused; other fields of a message are not read.

    Returns
    -------
    list of Message
        Each with ``role``, ``parts``, ``weight``.

    Raises
    ------
    TypeError
        A sample that is no dict.
    DataError
        Unknown roles or parts, media that are missing or left over.

    Examples
    --------
    >>> import orchvlm
    >>> sample = {"conversations": [{"from": "human", "value": "<image>What?"},
    ...                             {"from": "gpt", "value": "A cat."}], "image": "cat.png"}
    >>> [message.parts for message in orchvlm.data.read_messages(sample)]
    [[('image', 'cat.png', {}), ('text', 'What?')], [('text', 'A cat.')]]
    """
    if not isinstance(sample, dict):
        raise TypeError(f"a sample must be a dict; got {type(sample).__name__}")
    where = getattr(sample, "where", None) or (
        f"sample {sample['id']!r:.60}" if "id" in sample else "sample")
    turns = sample.get("messages", sample.get("conversations"))
    if not isinstance(turns, (list, tuple)) or not turns:
        raise DataError(f"{where}: needs 'messages' or 'conversations', a list that is not empty; "
                        f"fields: {', '.join(map(str, sample))[:80]}")
    waiting = {medium: _listed(sample, medium) for medium in MEDIA}
    given = {medium: len(sources or ()) for medium, sources in waiting.items()}
    messages = [_message(turn, f"{where}, message {k}", waiting) for k, turn in enumerate(turns)]
    for medium in MEDIA:
        if waiting[medium]:
            raise DataError(f"{where}: {given[medium]} {medium}s are given and "
                            f"{given[medium] - len(waiting[medium])} are placed; mark the others "
                            f"with <{medium}> or parts of type '{medium}'")
    return messages


def _listed(sample, medium):
    """The sample's own list of media, to be taken from the front; None where it has no list."""
    value = sample.get(medium + "s", sample.get(medium))
    if value is None:
        return None
    if isinstance(value, (list, tuple)) and not (
            medium == "audio" and isinstance(value, tuple)):  # (samples, rate) is one sound
        return list(value)
    return [value]


def _message(turn, where, waiting):
    if not isinstance(turn, dict):
        raise DataError(f"{where}: must be an object; got {type(turn).__name__}")
    role = turn.get("role", turn.get("from"))
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f"{where}: unknown role {role!r:.40}; known: {', '.join(ROLES)}")
    for call in ("tool_calls", "function_call"):
        if turn.get(call):  # an answer without them would be learned as an empty one
            raise DataError(f"{where}: {call!r} is not read; write the call into 'content'")
    content = turn.get("content", turn.get("value"))
    message = Message(ROLES[role], weight=_weight(turn.get("weight"), where))
    if isinstance(content, str):
        message.parts = _marked(content, where, waiting)
        message.plain = all(part[0] == "text" for part in message.parts)
    elif isinstance(content, (list, tuple)):
        for k, part in enumerate(content):
            message.parts.append(_part(part, f"{where}, part {k}", waiting))
    else:
        raise DataError(f"{where}: 'content' must be a string or a list of parts; got "
                        f"{type(content).__name__}")
    if message.role == "assistant" and any(part[0] != "text" for part in message.parts):
        raise DataError(f"{where}: an assistant's turn holds text only")
    return message


def _weight(value, where):
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e9:
        raise DataError(f"{where}: 'weight' must be a number >= 0; got {value!r:.40}")
    return float(value)


def _rate(value, where):
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1e6:
        raise DataError(f"{where}: must be frames per second above 0; got {value!r:.40}")
    return float(value)


def _next(medium, where, waiting):
    if not waiting[medium]:
        raise DataError(f"{where}: one {medium} more is marked than the sample gives")
    return waiting[medium].pop(0)


def _marked(text, where, waiting):
    """Cuts a string at its marks; those of a medium that the sample has no list of are text."""
    parts, place = [], 0
    for match in _MARK.finditer(text):
        if waiting[match[1]] is None:
            continue
        if match.start() > place:
            parts.append(("text", text[place:match.start()]))
        parts.append((match[1], _next(match[1], where, waiting), {}))
        place = match.end()
    if place < len(text) or not parts:
        parts.append(("text", text[place:]))
    return parts


def _part(part, where, waiting):
    if isinstance(part, str):
        return "text", part
    if not isinstance(part, dict):
        raise DataError(f"{where}: must be an object; got {type(part).__name__}")
    kind = part.get("type")
    if kind is None:
        kind = next((key for key in ("text", *MEDIA, "image_url") if key in part), None)
    if kind in ("text", "input_text", "output_text"):
        if not isinstance(part.get("text"), str):
            raise DataError(f"{where}: 'text' must be a string; got "
                            f"{type(part.get('text')).__name__}")
        return "text", part["text"]
    if isinstance(kind, str):
        medium = kind.removeprefix("input_").removesuffix("_url")
    if not isinstance(kind, str) or medium not in MEDIA:
        raise DataError(f"{where}: unknown type {kind!r:.40}; known: text, {', '.join(MEDIA)}")
    for key in (medium, kind, f"{medium}_url", "url", "path", "data", "bytes"):
        source = part.get(key)
        if isinstance(source, dict) and "url" in source:
            source = source["url"]
        if source is not None:
            break
    else:
        source = _next(medium, where, waiting)
    if part.get("use_audio_in_video"):
        raise DataError(f"{where}: use_audio_in_video, the sound of a video between its frames, is "
                        "not done here; take it out and give the sound as a part of its own")
    options = {}
    for key in ("fps", "sample_fps"):
        if medium == "video" and part.get(key) is not None:
            options[key] = _rate(part[key], f"{where}, {key}")
    return medium, source, options


def encode_bytes(messages, tokenizer, markups, prompt=False):
    """Tokens of a conversation, each turn between its role's token and ``<|im_end|>``.

    Parameters
    ----------
    messages : list of Message
        Turns.
    tokenizer : ByteTokenizer
        Anything whose ``encode`` knows no special tokens.
    markups : list of list
        For each medium, in order: texts, and (special token, count) pairs.
    prompt : bool
        End with the opening of an assistant's turn.

    Returns
    -------
    (list of int, list of float)
        Tokens, and the weight of each as a label: 0 where it is none.
    """
    ids, weights, media = [], [], iter(markups)

    def add(tokens, weight=0.0):
        ids.extend(tokens)
        weights.extend([weight] * len(tokens))

    end = tokenizer.special["<|im_end|>"]
    for message in messages:
        weight = _label_weight(message)
        add([tokenizer.special[f"<|{message.role}|>"]])
        for part in message.parts:
            if part[0] == "text":
                add(tokenizer.encode(part[1]), weight)
                continue
            for mark in next(media):
                add(tokenizer.encode(mark) if isinstance(mark, str)
                    else [tokenizer.special[mark[0]]] * mark[1])
        add([end], weight)  # where to stop is learned
    if prompt:
        add([tokenizer.special["<|assistant|>"]])
    return ids, weights


def _label_weight(message):
    if message.role != "assistant":
        return 0.0
    return 1.0 if message.weight is None else message.weight


CHATML = ("{% for message in messages %}<|im_start|>{{ message.role }}\n"
          "{% if message.content is string %}{{ message.content }}{% else %}"
          "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}"
          "{% elif part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
          "{% elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
          "{% else %}<|audio_start|><|audio_pad|><|audio_end|>{% endif %}{% endfor %}"
          "{% endif %}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")

# How templates write one medium: between its markers, or bare.
_PLACE = re.compile(r"(?:<\|vision_start\|>)?(<\|(?:image|video)_pad\|>)(?:<\|vision_end\|>)?"
                    r"|(?:<\|audio_start\|>)?(<\|audio_pad\|>)(?:<\|audio_end\|>)?")


class Template:
    """A chat template, compiled once in Jinja's sandbox.

    Parameters
    ----------
    source : str
        Jinja, as the Hub has it.
    variables : dict
        Further names, such as ``bos_token``.
    """

    def __init__(self, source, variables=None):
        need("jinja2", "jinja2")
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message):
            raise DataError(f"chat template: {message}")

        import json
        world = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                              extensions=[loopcontrols])
        world.filters["tojson"] = lambda value, indent=None: json.dumps(
            value, ensure_ascii=False, indent=indent)
        world.globals["raise_exception"] = refuse
        self._errors, self._variables = TemplateError, variables or {}
        try:
            self._template = world.from_string(source)
        except TemplateError as error:
            raise DataError(f"chat template: {str(error)[:100]}") from None

    def render(self, messages, prompt=False):
        """The text of these turns.

        Parameters
        ----------
        messages : list of Message
            Turns.
        prompt : bool
            End with the opening of an assistant's turn.

        Returns
        -------
        str

        Raises
        ------
        DataError
            The template refuses them.
        """
        turns = []
        for message in messages:
            content = [{"type": "text", "text": part[1]} if part[0] == "text"
                       else {"type": part[0], part[0]: ""} for part in message.parts]
            if message.plain:
                content = "".join(part[1] for part in message.parts)
            turns.append({"role": message.role, "content": content})
        try:
            return self._template.render(messages=turns, add_generation_prompt=prompt,
                                         **self._variables)
        except DataError:
            raise
        except Exception as error:  # templates are programs: any error may come out of them
            raise DataError(f"chat template: {type(error).__name__}: {str(error)[:100]}") from None


def encode_template(messages, tokenizer, template, markups, prompt=False):
    """Tokens of a conversation through its chat template.

    An assistant's turn is what the template adds when the turn is appended to those before it; a
    template for which this is no plain addition cannot say where labels are.

    Parameters
    ----------
    messages : list of Message
        Turns.
    tokenizer : HubTokenizer
        Its ``spans`` tell which characters a token covers.
    template : Template
        Of the tokenizer.
    markups : list of list
        For each medium, in order: texts, and (special token, count) pairs.
    prompt : bool
        End with the opening of an assistant's turn.

    Returns
    -------
    (list of int, list of float)
        Tokens, and the weight of each as a label: 0 where it is none.

    Raises
    ------
    DataError
        Special tokens inside the text of a sample, a template that rewrites earlier turns.
    """
    _no_injection(messages, tokenizer)
    whole, counts = _placed(template.render(messages, prompt), markups)
    spans = []
    for k, message in enumerate(messages):
        weight = _label_weight(message)
        if not weight:
            continue
        before, _ = _placed(template.render(messages[:k], True), markups, partial=True)
        after, _ = _placed(template.render(messages[:k + 1]), markups, partial=True)
        if not after.startswith(before) or not whole.startswith(after.rstrip()):
            raise DataError(f"message {k}: the chat template rewrites earlier turns when this one "
                            "is added, so where its labels are cannot be told; give each "
                            "assistant's turn in a sample of its own")
        spans.append((len(before), len(after.rstrip()), weight))
    ids, places = tokenizer.spans(whole)
    weights = [0.0] * len(ids)
    spans.reverse()
    for t, (start, end) in enumerate(places):
        while spans and start >= spans[-1][1]:
            spans.pop()
        if spans and end > start >= spans[-1][0]:
            weights[t] = spans[-1][2]
    return _repeated(ids, weights, counts, tokenizer)


def _no_injection(messages, tokenizer):
    """The text of a sample must not hold what the tokenizer takes for markup."""
    for k, message in enumerate(messages):
        for part in message.parts:
            if part[0] == "text" and "<" in part[1]:
                for name in tokenizer.special:
                    # Some are plain words of the training text (<think>): those are allowed.
                    if name.startswith("<|") and name in part[1]:
                        raise DataError(f"message {k}: its text holds the special token {name}")


def _placed(text, markups, partial=False):
    """Puts each medium's markup where the template left its place."""
    media, counts = iter(markups), []

    def fill(match):
        markup = next(media, None)
        if markup is None:
            raise DataError("chat template: it writes more media than the messages hold")
        out = []
        for mark in markup:
            if isinstance(mark, str):
                out.append(mark)
            else:
                out.append(mark[0])
                if mark[0].endswith("_pad|>"):
                    counts.append(mark[1])
        return "".join(out)

    text = _PLACE.sub(fill, text)
    if not partial and next(media, None) is not None:
        raise DataError("chat template: it writes fewer media than the messages hold; is it for "
                        "text only?")
    return text, counts


def _repeated(ids, weights, counts, tokenizer):
    """Repeats each placeholder as often as its medium has tokens."""
    pads = {tokenizer.special.get(f"<|{medium}_pad|>") for medium in MEDIA} - {None}
    counts, out, out_weights = iter(counts), [], []
    for token, weight in zip(ids, weights):
        n = next(counts) if token in pads else 1
        out.extend([token] * n)
        out_weights.extend([weight] * n)
    return out, out_weights
