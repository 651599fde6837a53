"""A step plan as a table: :class:`StepReport`."""
import html
from dataclasses import dataclass

from .tables import html_table, text_table

_PHASE_HEAD = ("phase", "items", "micro-batches", "max/mean\nbefore", "max/mean\nafter",
               "time\nbefore", "time\nafter", "bound", "gap")
_ROUTE_HEAD = ("route", "on its rank\nafter", "in its node\nafter", "between nodes\nbefore",
               "between nodes\nafter", "worst rank\nbefore", "worst rank\nafter",
               "transfer\nafter", "exposed")
_ROUTE_NOTE = ("Routes before and after ranks were relabelled, which lessens the exposed ones: "
               "outputs on the\nway to the language model. The others move items to where they "
               "are encoded, ahead of the step\nand hidden by the one before, so their bytes "
               "between nodes may rise.")


def _bytes(value):
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            return f"{value:.4g} {unit}"
        value /= 1000
    return None


def _seconds(value):
    """Microseconds below 0.1 ms."""
    if value >= 1 or value == 0:
        return f"{value:.4g} s"
    return f"{1e3 * value:.4g} ms" if value >= 1e-4 else f"{1e6 * value:.4g} us"


def _percent(value):
    return f"{100 * value:.3g} %" if value > 1e-9 else "0 %"


def _phase_row(name, plan):
    from .step import PhasePlan
    if isinstance(plan, PhasePlan):
        return (name, str(len(plan.rank)), str(plan.micro_batches),
                f"{plan.sampled_imbalance:.4f}", f"{plan.imbalance:.4f}",
                _seconds(plan.sampled_time), _seconds(plan.time), _seconds(plan.bound),
                _percent(plan.gap))
    return (name, str(len(plan.lengths)), str(len(plan.micro_batches)), "-", "-", "-",
            _seconds(plan.time), _seconds(plan.bound), _percent(plan.gap))


def phases_html(named):
    """An HTML table of (name, plan) pairs."""
    return html_table(_PHASE_HEAD, [_phase_row(name, plan) for name, plan in named])


@dataclass(frozen=True)
class StepReport:
    """Tables of a step: its phases, its routes, and the sums.

    Attributes
    ----------
    phases : tuple of tuple of str
        Each phase's imbalance and time as sampled (every item at its source) and as planned. Groups
        have no "before": a sample need not fit its source rank.
    routes : tuple of tuple of str
        Each route's bytes by distance, and its transfer time; "before" is without relabelling.
    summary : str
    """

    phases: tuple
    routes: tuple
    summary: str

    @classmethod
    def of(cls, step):
        """The report of a :class:`StepPlan`.

        Parameters
        ----------
        step : StepPlan

        Returns
        -------
        StepReport
        """
        phases = [_phase_row(name, plan) for name, plan in step.phases.items()]
        phases.append(_phase_row("llm", step.llm))
        routes = []
        for name, (before, after) in step.traffic.items():
            routes.append((name, _bytes(after.stay_bytes), _bytes(after.node_bytes),
                           _bytes(before.cross_bytes), _bytes(after.cross_bytes),
                           _bytes(before.worst_bytes), _bytes(after.worst_bytes),
                           _seconds(after.seconds), "yes" if "->" in name else "no"))
        summary = (f"step {_seconds(step.time)}, of which {_seconds(step.exposed)} exposed "
                   f"transfers (forward and backward); bound {_seconds(step.bound)}, gap "
                   f"{_percent(step.gap)}")
        return cls(tuple(phases), tuple(routes), summary)

    def _tables(self):
        return (_PHASE_HEAD, self.phases), (_ROUTE_HEAD, self.routes)

    def __str__(self):
        return "\n\n".join([*(text_table(*table) for table in self._tables()), _ROUTE_NOTE,
                            self.summary])

    __repr__ = __str__

    def _repr_html_(self):
        return "".join([*(html_table(*table) for table in self._tables()),
                        *(f"<p>{html.escape(text)}</p>" for text in (_ROUTE_NOTE, self.summary))])
