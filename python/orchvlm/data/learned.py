"""A tokenizer learned from the texts that a model is to read and write."""
import json
from pathlib import Path

from .._files import write_whole
from .._numbers import whole_number
from .assets import DataError, need
from .tokenizer import ROLE_TOKENS, SPECIAL, HubTokenizer

_LEAST = 256 + len(SPECIAL) + len(ROLE_TOKENS)
_MOST = 2**22  # the library reserves memory for all of them
# A turn as the built-in tokenizer writes it: one token opens it, one closes it.
_TEMPLATE = ("{% for message in messages %}<|{{ message.role }}|>"
             "{% if message.content is string %}{{ message.content }}{% else %}"
             "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}"
             "{% elif part.type == 'audio' %}<|audio_start|><|audio_pad|><|audio_end|>"
             "{% else %}<|vision_start|><|{{ part.type }}_pad|><|vision_end|>{% endif %}"
             "{% endfor %}{% endif %}<|im_end|>{% endfor %}"
             "{% if add_generation_prompt %}<|assistant|>{% endif %}")


def learn_tokenizer(texts, vocab_size, folder):
    """A tokenizer of bytes and of what is frequent in some texts (byte-pair encoding).

    Parameters
    ----------
    texts : iterable of str
        Read once.
    vocab_size : int
        Tokens at most, 271 to 2^22: 256 bytes, the special ones of :class:`ByteTokenizer` and
        pairs; as many as the texts have, where that is less.
    folder : path
        Where ``tokenizer.json``, ``tokenizer_config.json`` and ``chat_template.jinja`` go; is made
        where it is missing.

    Returns
    -------
    HubTokenizer
        Of that folder.

    Raises
    ------
    DataError
        Not one text.
    TypeError
        Something else than texts.
    ValueError
        A size out of range.
    ImportError
        The package ``tokenizers`` is not installed.

    References
    ----------
    R. Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units", ACL 2016.

    Examples
    --------
    >>> import tempfile, orchvlm
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     tokenizer = orchvlm.data.learn_tokenizer(["a red star", "a red sun"], 300, folder)
    ...     ids = tokenizer.encode("a red star")
    >>> len(ids) < len("a red star"), tokenizer.decode(ids)
    (True, 'a red star')
    """
    whole_number(vocab_size, "vocab_size", _LEAST, _MOST)
    if isinstance(texts, str) or not hasattr(texts, "__iter__"):
        raise TypeError(f"texts must be many strings; got {type(texts).__name__}")
    folder = Path(folder)
    tokenizers = need("tokenizers", "tokenizers")
    from tokenizers import decoders, models, pre_tokenizers, trainers
    count = 0

    def counted():
        nonlocal count
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"texts must be strings; got {type(text).__name__}")
            count += 1
            yield text.encode("utf-8", "replace").decode()
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(counted(), trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[*SPECIAL, *ROLE_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    if not count:
        raise DataError("there is no text to learn a tokenizer from")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>",
                "pad_token": "<|pad|>"}
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("tokenizer.json", made.to_str(pretty=True)),
                       ("tokenizer_config.json", json.dumps(settings, indent=2) + "\n"),
                       ("chat_template.jinja", _TEMPLATE)):
        write_whole(folder / name, lambda stream, text=text: stream.write(text.encode()))
    return HubTokenizer(folder)
