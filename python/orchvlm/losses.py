"""The losses that a vision encoder is pre-trained with, and their gradients, computed in C.

Masked feature modelling, image-text pairs by sigmoid, and classification over a caption's tokens
(Seed1.5-VL Technical Report, section 3.1).  Each is a sum over samples divided by the samples of
the global batch, so that parts of a batch add up to the whole.
"""
import numpy as np

from . import _core
from ._numbers import finite_number, reals
from .batch import integers, refuse_masked
from .weights import _threads

__all__ = ["masked_cosine", "siglip", "superclass", "inverse_frequency"]

_CLASSES_MOST = 2**24  # a hundred times the largest vocabularies; a float64 for each


def _matrix(value, name, dtype=None):
    """C-contiguous, finite, float64 where it is that and float32 otherwise."""
    array = np.asarray(refuse_masked(value, name))
    if array.dtype.kind not in "iuf":
        raise TypeError(f"{name} must hold numbers; got dtype {array.dtype}")
    if array.ndim != 2 or not array.shape[1]:
        raise ValueError(f"{name} must be a matrix with columns; got shape {array.shape}")
    if dtype is None:
        dtype = np.float64 if array.dtype == np.float64 else np.float32
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(array, dtype)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite")
    return array


def _total(value, rows):
    """The global batch; this call's by default."""
    return float(max(1, rows)) if value is None else finite_number(value, "total", 1)


def _core_of(model):
    if model is None:
        return None
    if not hasattr(model, "_core"):
        raise TypeError(f"model must be a Model; got {type(model).__name__}")
    return model._core


def masked_cosine(student, teacher, masked, total=None):
    """Masked feature modelling: the mean of 1 - cos(student, teacher) over masked patches.

    Parameters
    ----------
    student, teacher : float32[P, C] or float64[P, C]
        Features of patches; the teacher's get no gradient.
    masked : bool[P]
        Which patches the student did not see.
    total : float, optional
        Masked patches of the global batch; by default those of this call.

    Returns
    -------
    loss : float
    dstudent : array like student
        0 for patches that are not masked.

    Raises
    ------
    TypeError
        No numbers, or a mask that is not bool.
    ValueError
        Shapes that do not fit, values that are not finite.

    References
    ----------
    Fang et al., "EVA-02: A Visual Representation for Neon Genesis", 2023, section 2.2.

    Examples
    --------
    >>> import numpy as np, orchvlm
    >>> student = np.array([[2.0, 0.0], [1.0, 1.0]])
    >>> teacher = np.array([[0.0, 3.0], [1.0, 1.0]])
    >>> loss, dstudent = orchvlm.losses.masked_cosine(student, teacher, [True, False])
    >>> loss, dstudent.tolist()
    (1.0, [[0.0, -0.5], [0.0, 0.0]])
    """
    student = _matrix(student, "student")
    teacher = _matrix(teacher, "teacher", student.dtype)
    masked = np.asarray(refuse_masked(masked, "masked"))
    if masked.dtype != np.bool_:
        raise TypeError(f"masked must be bool; got dtype {masked.dtype}")
    if masked.shape != (len(student),) or teacher.shape != student.shape:
        raise ValueError(f"student {student.shape} needs a teacher of its shape and a mask of its "
                         f"length; got {teacher.shape} and {masked.shape}")
    return _core.masked_cosine(student, teacher, np.ascontiguousarray(masked).view(np.uint8),
                               _total(total, int(masked.sum())))


def siglip(image, text, scale, bias, *, offset=0, total=None, threads=None,
           model=None):
    """Sigmoid loss of image-text pairs.

    -(1/total) sum_ij log sigmoid(z_ij (scale <x_i, y_j> + bias)) with z = 1 for an image's own text
    and -1 for all others; features are scaled to length 1 here.

    The loss is exact however a batch is split: give each part of the images all texts, say where
    its own begin, and add up losses and gradients of all parts.

    Parameters
    ----------
    image : float32[n, C] or float64[n, C]
        Features of this part's images.
    text : float32[B, C] or float64[B, C]
        Features of the whole batch's texts.
    scale, bias : float
        The learned temperature (its exponential, where that is learned) and bias.
    offset : int
        The text of image i is offset + i.
    total : float, optional
        Images of the global batch; by default the texts given.
    threads : int, optional
        By default OMP_NUM_THREADS, or one per core of this process.
    model : Model, optional
        Computes on this model's device, with its threads, instead of on the CPU; float64 only
        where that device has it (``"ref"``).

    Returns
    -------
    loss : float
    dimage : array like image
    dtext : array like text
        This part's share: those of all parts are added.
    dscale, dbias : float
        As dtext.

    Raises
    ------
    TypeError
        No numbers.
    ValueError
        Shapes that do not fit, an image without a text, values that are not finite, float64 on a
        model's device that does not compute in it.
    RuntimeError
        The model is busy.

    References
    ----------
    Zhai et al., "Sigmoid Loss for Language Image Pre-Training", 2023, equation 1.

    Examples
    --------
    >>> import numpy as np, orchvlm
    >>> image, text = np.eye(3, 4), np.eye(3, 4) + 0.1
    >>> loss, dimage, *_ = orchvlm.losses.siglip(image, text, scale=10.0, bias=-10.0)
    >>> parts = [orchvlm.losses.siglip(image[i:i + 1], text, 10.0, -10.0, offset=i)
    ...          for i in range(3)]
    >>> bool(np.isclose(sum(part[0] for part in parts), loss))
    True
    """
    image = _matrix(image, "image")
    text = _matrix(text, "text", image.dtype)
    if isinstance(offset, bool) or not isinstance(offset, (int, np.integer)) or \
            not 0 <= offset <= len(text) - len(image):
        raise ValueError(f"every image needs its text: offset must be in [0, {len(text)} texts - "
                         f"{len(image)} images]; got {offset!r}")
    scale = finite_number(scale, "scale", -1e30, 1e30)
    bias = finite_number(bias, "bias", -1e30, 1e30)
    return _core.siglip(image, text, int(offset), scale, bias, _total(total, len(text)),
                        _threads(threads), _core_of(model))


def inverse_frequency(documents, vocabulary):
    """How much each class says: log(n / (1 + captions that hold it)), at least 0.

    Parameters
    ----------
    documents : iterable of int arrays
        Tokens of n captions.
    vocabulary : int
        Number of classes, at most 2^24.

    Returns
    -------
    float64[V]

    Raises
    ------
    ValueError
        A token outside the vocabulary.

    References
    ----------
    Huang et al., "Classification Done Right for Vision-Language Pre-Training", 2024, equation 3.

    Examples
    --------
    >>> import orchvlm
    >>> orchvlm.losses.inverse_frequency([[0, 1], [0], [0, 2]], 4).round(2).tolist()
    [0.0, 0.41, 0.41, 1.1]
    """
    if isinstance(vocabulary, bool) or not isinstance(vocabulary, (int, np.integer)) or \
            not 1 <= vocabulary <= _CLASSES_MOST:
        raise ValueError(f"vocabulary must be in [1, {_CLASSES_MOST}]; got {vocabulary!r}")
    held, n = np.zeros(int(vocabulary)), 0
    for tokens in documents:
        held[np.unique(_classes(tokens, int(vocabulary)))] += 1
        n += 1
    return np.maximum(0.0, np.log(max(1, n) / (1 + held)))


def _classes(tokens, vocabulary):
    tokens = integers(tokens, "tokens")
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocabulary:
        raise ValueError(f"tokens must be in [0, {vocabulary}); got {tokens.min()} to "
                         f"{tokens.max()}")
    return tokens


def superclass(feature, weight, tokens, frequency=None, *, total=None, threads=None,
               model=None):
    """Classification of images over the tokens of their captions.

    -(1/total) sum_i sum_c target_ic log softmax(x_i w^T)_c, where a caption's targets are its
    distinct tokens, each with its weight, scaled to the sum 1.

    Parameters
    ----------
    feature : float32[n, C] or float64[n, C]
    weight : float32[V, C] or float64[V, C]
        Of the classifier; logits are never held for more than a block of images.
    tokens : list of n int arrays
        Of each caption; one without tokens has no loss.
    frequency : float64[V], optional
        Weights of classes, as :func:`inverse_frequency` gives them; by default all 1.
    total : float, optional
        Images of the global batch; by default those of this call.
    threads : int, optional
        By default OMP_NUM_THREADS, or one per core of this process.
    model : Model, optional
        Computes on this model's device, with its threads, instead of on the CPU; float64 only
        where that device has it (``"ref"``).

    Returns
    -------
    loss : float
    dfeature : array like feature
    dweight : array like weight

    Raises
    ------
    TypeError
        No numbers.
    ValueError
        Shapes that do not fit, a token outside the vocabulary, negative weights, values that are
        not finite, float64 on a model's device that does not compute in it.
    RuntimeError
        The model is busy.

    References
    ----------
    Huang et al., "Classification Done Right for Vision-Language Pre-Training", 2024, equation 2.

    Examples
    --------
    >>> import numpy as np, orchvlm
    >>> feature, weight = np.ones((2, 3)), np.zeros((4, 3))
    >>> loss, dfeature, dweight = orchvlm.losses.superclass(feature, weight, [[1, 2, 1], [3]])
    >>> round(loss, 4), dweight[:, 0].round(3).tolist()
    (1.3863, [0.25, 0.0, 0.0, -0.25])
    """
    feature = _matrix(feature, "feature")
    weight = _matrix(weight, "weight", feature.dtype)
    if weight.shape[1] != feature.shape[1]:
        raise ValueError(f"weight must have {feature.shape[1]} columns; got {weight.shape[1]}")
    if not isinstance(tokens, (list, tuple)) or len(tokens) != len(feature):
        raise ValueError(f"tokens must be a list with an entry for each of {len(feature)} features")
    if frequency is None:
        frequency = np.ones(len(weight))
    frequency = reals(frequency, "frequency")
    if frequency.shape != (len(weight),) or not np.isfinite(frequency).all() or \
            (frequency < 0).any():
        raise ValueError(f"frequency must have {len(weight)} finite numbers >= 0")
    found = [np.unique(_classes(one, len(weight))) for one in tokens]
    shares = [frequency[one] for one in found]
    # A caption of nothing but classes that say nothing has no targets.
    shares = [share / share.sum() if share.sum() > 0 else share for share in shares]
    start = np.cumsum([0, *(len(one) for one in found)], dtype=np.int64)
    return _core.superclass(
        feature, weight, start, np.concatenate([*found, []]).astype(np.int32),
        np.concatenate([*shares, []]), _total(total, len(feature)), _threads(threads),
        _core_of(model))
