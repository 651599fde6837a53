"""Tokenizers: bytes for tiny models, and the Hub's ``tokenizer.json``."""
import json
import re
from pathlib import Path

from .assets import DataError, need, read_file
from .words import WORDS

# What marks roles and media in the text, under the names that the Qwen families use.
SPECIAL = ("<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>",
           "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|audio_start|>", "<|audio_end|>",
           "<|audio_pad|>")
# A name for each role would cost as many bytes as a short question has.
ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
_BYTES_ONLY, _FIRST_WORD, _WITH_WORDS = 272, 272, 512
# What belongs to a tokenizer.json and may stand beside it.
_BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
           "chat_template.json")
# A space belongs to the word behind it.
_PIECE = re.compile(" ?[A-Za-z]+|[^A-Za-z]", re.DOTALL)


class ByteTokenizer:
    """One token per byte of UTF-8, fifteen special ones, and in most models common words.

    Ids 0 to 255 are bytes; then come, in this order, ``<|pad|>`` (256), ``<|endoftext|>``,
    ``<|im_start|>``, ``<|im_end|>`` (259), ``<|vision_start|>``, ``<|vision_end|>``,
    ``<|image_pad|>`` (262), ``<|video_pad|>``, ``<|audio_start|>``, ``<|audio_end|>``,
    ``<|audio_pad|>`` (266), and one for each role, from ``<|system|>`` to ``<|tool|>`` (270), which
    opens its turn; ``<|im_end|>`` closes it.  A vocabulary of 512 has tokens for 239 words of
    questions and answers about pictures besides, from 272 on: a small model then reads half as many
    tokens.

    Parameters
    ----------
    vocab_size : int
        Of the model: with at least 512 there are words.

    Raises
    ------
    TypeError
        A size that is no integer; something else than a string is encoded.
    ValueError
        A size below 272.

    Examples
    --------
    >>> import orchvlm
    >>> tokenizer = orchvlm.data.ByteTokenizer()
    >>> tokenizer.encode("Hé"), tokenizer.decode([72, 105, 259])
    ([72, 195, 169], 'Hi')
    >>> words = orchvlm.data.ByteTokenizer(512)
    >>> words.encode("How many?"), words.decode(words.encode("a redder star"))
    ([273, 344, 63], 'a redder star')
    """

    def __init__(self, vocab_size=_BYTES_ONLY):
        if isinstance(vocab_size, bool) or not isinstance(vocab_size, int):
            raise TypeError(f"vocab_size must be an integer; got {type(vocab_size).__name__}")
        if vocab_size < _BYTES_ONLY:
            raise ValueError(f"vocab_size must be >= {_BYTES_ONLY}; got {vocab_size}")
        has_words = vocab_size >= _WITH_WORDS
        self.vocab_size = _WITH_WORDS if has_words else _BYTES_ONLY
        self._words = WORDS if has_words else ()
        self._word_ids = {word: _FIRST_WORD + k for k, word in enumerate(self._words)}
        self.special = {name: 256 + k for k, name in enumerate(SPECIAL + ROLE_TOKENS)}
        self.stop = (self.special["<|im_end|>"], self.special["<|endoftext|>"])
        self.template = None
        self.files = {}  # it is built in

    def encode(self, text):
        """The tokens of a text; what looks like a special token in it is only bytes.

        Parameters
        ----------
        text : str
            Any; lone surrogates become question marks.

        Returns
        -------
        list of int

        Raises
        ------
        TypeError
            Not a string.
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a string; got {type(text).__name__}")
        if not self._words:
            return list(text.encode("utf-8", "replace"))
        ids = []
        for piece in _PIECE.findall(text):
            word = self._word_ids.get(piece)
            ids += piece.encode("utf-8", "replace") if word is None else (word,)
        return ids

    def decode(self, ids, special=False):
        """The text of tokens; broken UTF-8 becomes replacement characters.

        Parameters
        ----------
        ids : sequence of int
            Ids beyond the vocabulary's named tokens are left out.
        special : bool
            Write special tokens by their names instead of leaving them out.

        Returns
        -------
        str
        """
        names = {number: name for name, number in self.special.items()}
        out = bytearray()
        for number in map(int, ids):
            if 0 <= number < 256:
                out.append(number)
            elif _FIRST_WORD <= number < _FIRST_WORD + len(self._words):
                out += self._words[number - _FIRST_WORD].encode()
            elif special and number in names:
                out += names[number].encode()
        return out.decode("utf-8", "replace")

    def __repr__(self):
        return f"<ByteTokenizer: {self.vocab_size} tokens>"


class HubTokenizer:
    """A tokenizer of the Hub, with its chat template.

    Parameters
    ----------
    folder : path
        Holds ``tokenizer.json``; the chat template is looked for in ``chat_template.jinja``,
        ``chat_template.json`` and ``tokenizer_config.json``.  The path of a ``tokenizer.json``
        serves too.

    Attributes
    ----------
    files : dict of str to bytes
        What it was made of, as :meth:`Processor.save_pretrained` writes it.

    Raises
    ------
    DataError
        A file that is missing or broken.
    ImportError
        The package ``tokenizers`` is not installed.

    Examples
    --------
    >>> import orchvlm
    >>> orchvlm.data.HubTokenizer("no/such/folder")     # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    orchvlm.data.assets.DataError: no/such/folder/tokenizer.json: No such file or directory
    """

    def __init__(self, folder):
        try:
            path = Path(folder)
        except TypeError:
            raise TypeError(f"folder must be a path; got {type(folder).__name__}") from None
        if path.suffix == ".json":
            path = path.parent if path.name == "tokenizer.json" else path
        file = path if path.suffix == ".json" else path / "tokenizer.json"
        content = read_file(file)
        tokenizers = need("tokenizers", "tokenizers")
        try:
            self._inner = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # the library raises bare Exceptions
            raise DataError(f"{file}: not a tokenizer ({str(error)[:80]})") from None
        self._inner.no_padding()
        self._inner.no_truncation()
        self.vocab_size = self._inner.get_vocab_size(with_added_tokens=True)
        self.special = {token.content: number for number, token
                        in self._inner.get_added_tokens_decoder().items()}
        folder = file.parent
        self.files = {"tokenizer.json": content, **{
            name: read_file(folder / name) for name in _BESIDE if (folder / name).exists()}}
        config = _json(folder / "tokenizer_config.json")
        self.variables = {key: _content(config[key]) for key in ("bos_token", "eos_token",
                                                                 "pad_token", "unk_token")
                          if _content(config.get(key)) is not None}
        self.template = _template(folder, config)
        ends = (self.variables.get("eos_token"), "<|im_end|>", "<|endoftext|>")
        self.stop = tuple(dict.fromkeys(self.special[name] for name in ends
                                        if name in self.special))

    def encode(self, text):
        """The tokens of a text; special tokens written in it are recognised.

        Parameters
        ----------
        text : str
            Any.

        Returns
        -------
        list of int
        """
        return self._inner.encode(text, add_special_tokens=False).ids

    def spans(self, text):
        """Tokens with the characters that each covers.

        Parameters
        ----------
        text : str
            Any.

        Returns
        -------
        (list of int, list of (int, int))
            Ids, and first and past-the-last character.
        """
        encoded = self._inner.encode(text, add_special_tokens=False)
        return encoded.ids, encoded.offsets

    def decode(self, ids, special=False):
        """The text of tokens.

        Parameters
        ----------
        ids : sequence of int
            Tokens.
        special : bool
            Write special tokens by their names instead of leaving them out.

        Returns
        -------
        str
        """
        return self._inner.decode([int(i) for i in ids], skip_special_tokens=not special)

    def __repr__(self):
        return f"<HubTokenizer: {self.vocab_size} tokens>"


def _json(path):
    """An object from a file; {} where there is none."""
    if not path.exists():
        return {}
    try:
        value = json.loads(read_file(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not JSON ({str(error)[:60]})") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: must hold an object; got {type(value).__name__}")
    return value


def _content(token):
    """A token's text, which tokenizer_config.json keeps plain or in an object."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _template(folder, config):
    if (folder / "chat_template.jinja").exists():
        return read_file(folder / "chat_template.jinja").decode("utf-8", "replace")
    for value in (_json(folder / "chat_template.json").get("chat_template"),
                  config.get("chat_template")):
        if isinstance(value, list):  # several, by name
            value = next((entry.get("template") for entry in value if isinstance(entry, dict)
                          and entry.get("name") == "default"), None)
        if isinstance(value, str):
            return value
    return None
