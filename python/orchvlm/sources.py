"""Files and embedded tasks as training data and held-out samples, as the command line names them.
"""
from itertools import islice
from pathlib import Path

from .cli import CommandError

_IN_FOLDERS = (".jsonl", ".tar", ".zip")  # a folder's .json files may be about something else
_SUFFIXES = (".jsonl", ".json", ".tar", ".zip")
_NAMED = ("captions", "emoji")  # packs of pictures that have a name, wherever in them it is seen
_HELD_SEED = 1  # of the embedded tasks; their splits share no drawing anyway


def _tasks(said, split, seed, kinds):
    from .data import Tasks
    return Tasks(seed, kinds, split, said["difficulty"], said["max_side"])


def _files(paths, kinds=None):
    """The files that are meant: themselves, and those in folders; kinds need a .zip among them."""
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix in _IN_FOLDERS)
            if not inside:
                raise CommandError(f"{path}: no {', '.join(_IN_FOLDERS)} in this folder")
            found += inside
        elif not path.exists():
            raise CommandError(f"{path}: no such file or folder")
        elif path.suffix not in _SUFFIXES:
            raise CommandError(f"{path}: data are {', '.join(_SUFFIXES)} files or folders of them")
        else:
            found.append(path)
    if kinds and not any(path.suffix == ".zip" for path in found):
        raise CommandError(f"--kinds {','.join(kinds)}: picks among drawn tasks, and among the "
                           "packs of .zip files, of which there are none here")
    return found


def _packs(path, split, kinds=None):
    """[(kind, records)] of a zip and a split; of known packs as questions, else as samples, and
    the kind is None.  ``kinds`` picks among the packs of a zip that holds several; without it the
    first one is taken."""
    from .data import DataError, NoRecordsError, ZipPack, load_pack
    if kinds:
        try:
            return [(kind, load_pack(path, kind, split)) for kind in kinds]
        except NoRecordsError:
            raise
        except (DataError, ValueError) as error:
            raise CommandError(f"{path}: --kinds {','.join(kinds)}: {error}") from None
    plain = None
    try:
        plain = ZipPack(path)
        record = plain.record(0) if len(plain) else {}
        if "messages" in record or "conversations" in record:
            return [(None, ZipPack(path, split=split) if "split" in record else plain)]
        if "caption" in record:
            return [("captions", load_pack(path, "captions", split))]
    except DataError:
        if plain is not None:
            raise
    for kind in ("nlvr", "digits"):  # packs whose records lie in a folder of their own
        try:
            return [(kind, load_pack(path, kind, split))]
        except NoRecordsError:
            raise
        except DataError:
            continue
    raise CommandError(f"{path}: no records.jsonl with messages or captions in this zip file")


def training_source(said, seed):
    """What is trained on.

    Parameters
    ----------
    said : dict
        ``files`` (paths), their ``weights`` and ``kinds`` (packs of zip files that hold several),
        or, without files,
        ``kinds``, ``difficulty`` and ``max_side`` of the embedded tasks, ``max_pixels`` and
        ``frame``: the section ``data`` of a :class:`orchvlm.RunConfig`.
    seed : int

    Returns
    -------
    orchvlm.data.Mixture

    Raises
    ------
    CommandError
        A path that holds no data, kinds of files that have none.
    """
    from .data import Mixture
    if not said["files"]:
        return Mixture([_tasks(said, "train", seed, said["kinds"])], seed=seed)
    files = _files(said["files"], said["kinds"])
    if said.get("weights"):
        return Mixture(*_weighted(said, seed), seed=seed)
    return Mixture(_sets(files, said, seed), seed=seed)


def _weighted(said, seed):
    """(data sets, weights) of paths with a weight each, which the data sets of a path share by
    their lengths."""
    from .data.mixture import count_samples
    sets, weights = [], []
    for path, weight in zip(said["files"], said["weights"]):
        own = _sets(_files([path]), said, seed)
        counts = [1] if len(own) == 1 else [max(1, count_samples(data)) for data in own]
        sets += own
        weights += [weight * count / sum(counts) for count in counts]
    return sets, weights


def _sets(files, said, seed):
    """The data sets of files; all shards are one."""
    from .data import TarShards
    sets = [_chats(p) for p in files if p.suffix.startswith(".json")]
    sets += [_varied(kind, pack, seed, said) for p in files if p.suffix == ".zip"
             for kind, pack in _packs(p, "train", said["kinds"])]
    shards = [p for p in files if p.suffix == ".tar"]
    if shards:
        sets.append(TarShards(shards))
    return sets


def _chats(path):
    from .data import JsonArray, JsonLines
    return (JsonLines if path.suffix == ".jsonl" else JsonArray)(path)


def _varied(kind, pack, seed, said):
    """A few thousand recordings or pictures are soon known by heart, unless they are never met
    alike."""
    from .data import Varied, VariedSounds
    if "audio" in pack.record(0):
        return VariedSounds(pack, seed)
    if kind not in _NAMED:
        return pack
    return Varied(pack, seed, pixels=said["max_pixels"], frame=said["frame"])


def texts(said):
    """All words of training data, one after the other.

    Parameters
    ----------
    said : dict
        ``files`` and ``kinds``, as for :func:`training_source`; embedded tasks have none here.

    Yields
    ------
    str
        A text of a message.  A sample that cannot be read is left out.

    Raises
    ------
    CommandError, DataError
        A path that holds no data, kinds of files that have none, a .jsonl, .json or .zip that is
        broken.
    """
    from .data import TarShards
    for path in _files(said["files"], said["kinds"]):
        if path.suffix == ".tar":
            yield from _said(iter(TarShards([path])))
            continue
        for rows in ([_chats(path)] if path.suffix.startswith(".json") else
                     [pack for _, pack in _packs(path, "train", said["kinds"])]):
            yield from _said(map(rows.__getitem__, range(len(rows))))


def _said(samples):
    """Texts of what an iterator yields, which goes on behind a sample that it cannot read."""
    from .data import DataError, read_messages
    while True:
        try:
            messages = read_messages(next(samples))
        except StopIteration:
            return
        except DataError:
            continue
        yield from (part[1] for message in messages for part in message.parts if part[0] == "text")


def framed(sample, side):
    """A sample whose pictures are framed, as :func:`orchvlm.data.load_image` does it.

    Parameters
    ----------
    sample : dict
    side : int or None
        None: the sample as it is.

    Returns
    -------
    dict
        A copy.

    Raises
    ------
    orchvlm.data.DataError
        A picture that is broken.
    """
    from .data import load_image
    from .data.assets import Record
    if side is None or not isinstance(sample.get("messages"), list):
        return sample

    def one(part):
        if not isinstance(part, dict) or part.get("type") != "image":
            return part
        return {**part, "image": load_image(part["image"], frame=side)}
    return Record.like(sample, {**sample, "messages": [
        {**message, "content": [one(part) for part in message["content"]]}
        if isinstance(message, dict) and isinstance(message.get("content"), list) else message
        for message in sample["messages"]]})


def answered(samples):
    """Those of which a model's answers can be scored."""
    return [sample for sample in samples if "answer" in sample and "check" in sample]


def _named_held_out(said, split, samples):
    """The first samples of the files that are named for it, with answers or without."""
    from .data import NoRecordsError, TarShards
    for path in _files(said["held_out"]):
        if path.suffix == ".zip":
            try:
                packs = _packs(path, split, said["kinds"] if said["files"] else None)
            except NoRecordsError:
                continue
            for kind, pack in packs:
                yield from (framed(pack[i], said["frame"] if kind in _NAMED else None)
                            for i in range(min(samples, len(pack))))
        elif path.suffix == ".tar":
            yield from islice(TarShards([path]), samples)
        else:
            rows = _chats(path)
            yield from (rows[i] for i in range(min(samples, len(rows))))


def held_out(said, split, samples):
    """Samples that were not trained on.

    Parameters
    ----------
    said : dict
        As for :func:`training_source`; ``held_out`` names files like ``files``.
    split : str
        ``val`` or ``test``, of tasks and packs.
    samples : int
        Of each kind of task, of each pack, or of each file that is named, at most.

    Returns
    -------
    list of dict
        Of files that are named all, else those with answers; empty where there are none.

    Raises
    ------
    CommandError, DataError
        A path that holds no data, a file that is broken.
    """
    from .data import NoRecordsError
    if said.get("held_out"):
        return list(_named_held_out(said, split, samples))
    if not said["files"]:
        tasks = [_tasks(said, split, _HELD_SEED, [kind]) for kind in said["kinds"]]
        return [some[i] for some in tasks for i in range(samples)]
    found = []
    for path in _files(said["files"]):
        if path.suffix == ".zip":
            try:
                packs = _packs(path, split, said["kinds"])
            except NoRecordsError:
                continue
            rows = [framed(pack[i], said["frame"] if kind in _NAMED else None)
                    for kind, pack in packs for i in range(min(samples, len(pack)))]
            found += answered(rows)
    return found
