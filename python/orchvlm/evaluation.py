"""How often a model answers right: greedy answers, each task's own verifier, a table per kind."""
from collections import Counter
from dataclasses import dataclass

from .tables import html_table, text_table


@dataclass(frozen=True, repr=False)
class Evaluation:
    """Answers to a set of samples.

    Parameters
    ----------
    rows : list of (dict, str, float)
        Sample, what the model said, score in [0, 1].

    Raises
    ------
    TypeError
        No rows are given.

    Examples
    --------
    >>> import orchvlm
    >>> rows = [({"kind": "count"}, "3", 1.0), ({"kind": "count"}, "4", 0.0)]
    >>> orchvlm.Evaluation(rows).by_kind()["count"]
    (0.5, 1, 2)
    """

    rows: list

    def by_kind(self):
        """A line of the table for each kind of task.

        Returns
        -------
        dict of str to (float, int, int)
            Mean score, exact answers (score 1) and samples of each kind; those of all as "all",
            last.
        """
        kinds = {}
        for sample, _, value in self.rows:
            for kind in (sample.get("kind", "sample"), "all"):
                kinds.setdefault(kind, []).append(value)
        return {kind: (sum(v) / len(v), sum(x >= 1 for x in v), len(v))
                for kind, v in sorted(kinds.items(), key=lambda item: (item[0] == "all", item[0]))}

    def blind(self):
        """What answers without a look at the picture would reach.

        Returns
        -------
        dict of str to float
            Of each kind, the share that is exact when every answer is the commonest one, or, where
            a place is asked for, the middle; NaN for samples without an answer.
        """
        from .data import score
        kinds = {}
        for sample, _, _ in self.rows:
            kinds.setdefault(sample.get("kind", "sample"), []).append(sample)
        found, whole = {}, 0.0
        for kind, samples in kinds.items():
            answers = Counter(s["answer"] for s in samples if "answer" in s and "check" in s)
            guesses = [guess for guess, _ in answers.most_common(1)] + ["500 500"] * bool(answers)
            right = max((sum(score(s, guess) >= 1 for s in samples) for guess in guesses),
                        default=float("nan"))
            found[kind], whole = right / len(samples), whole + right
        return {**found, "all": whole / max(1, len(self.rows))}

    def table(self):
        """Header and rows for people.

        Returns
        -------
        (list of str, list of tuple)
            Samples, exact answers, what is exact without a look, mean score; by kind.
        """
        blind = self.blind()
        return (["task", "samples", "exact %", "blind %", "mean score"],
                [(kind, n, f"{100 * exact / n:.1f}", f"{100 * blind[kind]:.1f}", f"{mean:.3f}")
                 for kind, (mean, exact, n) in self.by_kind().items()])

    def __str__(self):
        return text_table(*self.table())

    __repr__ = __str__

    def _repr_html_(self):
        return html_table(*self.table())


def evaluate(model, samples, processor, *, max_new_tokens=32, batch=32, progress=None):
    """Greedy answers to samples, scored.

    Parameters
    ----------
    model : Model
        Is asked.
    samples : sequence of dict
        With ``answer`` and ``check``, as :class:`orchvlm.data.Tasks` gives them.
    processor : Processor
        Of the model's configuration.
    max_new_tokens : int
        An answer is cut there.
    batch : int
        Samples that are continued together; it changes nothing but speed.
    progress : callable, optional
        ``progress(done, all)`` after every batch.

    Returns
    -------
    Evaluation

    Raises
    ------
    DataError
        A sample without an answer.

    Examples
    --------
    >>> import orchvlm
    >>> model = orchvlm.Model.from_config(orchvlm.preset("tiny"), seed=0)
    >>> tasks = orchvlm.data.Tasks(seed=1, split="val")
    >>> processor = orchvlm.data.Processor.from_config(model.config.values)
    >>> seen = orchvlm.evaluate(model, [tasks[i] for i in range(2)], processor, max_new_tokens=2)
    >>> len(seen.rows)
    2
    """
    from .data import Processor, score
    from .model import Model
    if not isinstance(model, Model) or not isinstance(processor, Processor):
        raise TypeError("evaluate takes a Model, samples and a Processor; got "
                        f"{type(model).__name__} and {type(processor).__name__}")
    for name, value in (("max_new_tokens", max_new_tokens), ("batch", batch)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1; got {value!r:.40}")
    tokenizer = processor.tokenizer
    samples, rows = list(samples), []
    for first in range(0, len(samples), batch):
        part = samples[first:first + batch]
        said = model.generate(processor(part, prompt=True), max_new_tokens, stop=tokenizer.stop)
        for sample, tokens in zip(part, said):
            answer = tokenizer.decode(tokens)
            rows.append((sample, answer, score(sample, answer)))
        if progress is not None:
            progress(len(rows), len(samples))
    return Evaluation(rows)
