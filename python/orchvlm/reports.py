"""A step plan as a table: :class:`StepReport`."""
import html
from dataclasses import dataclass

_PHASE_HEAD = ("phase", "items", "micro-batches", "max/mean before", "after", "time before",
               "after", "bound", "gap")
_ROUTE_HEAD = ("route", "on its rank", "in its node", "between nodes before", "after",
               "worst rank before", "after", "transfer", "exposed")


def _bytes(value):
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            return f"{value:.4g} {unit}"
        value /= 1000
    return None


def _seconds(value):
    return f"{value:.4g} s" if value >= 1 or value == 0 else f"{1e3 * value:.4g} ms"


def _percent(value):
    return f"{100 * value:.3g} %"


def _phase_row(name, plan):
    from .step import PhasePlan
    if isinstance(plan, PhasePlan):
        return (name, str(len(plan.rank)), str(plan.micro_batches),
                f"{plan.sampled_imbalance:.4f}", f"{plan.imbalance:.4f}",
                _seconds(plan.sampled_time), _seconds(plan.time), _seconds(plan.bound),
                _percent(plan.gap))
    return (name, str(len(plan.lengths)), str(len(plan.micro_batches)), "-", "-", "-",
            _seconds(plan.time), _seconds(plan.bound), _percent(plan.gap))


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

    def __str__(self):
        parts = []
        for head, rows in ((_PHASE_HEAD, self.phases), (_ROUTE_HEAD, self.routes)):
            widths = [max(len(row[c]) for row in (head, *rows)) for c in range(len(head))]
            parts += ["  ".join(cell.ljust(width) if c == 0 else cell.rjust(width)
                                for c, (cell, width) in enumerate(zip(row, widths)))
                      for row in (head, *rows)]
            parts.append("")
        return "\n".join([*parts, self.summary])

    __repr__ = __str__

    def _repr_html_(self):
        parts = []
        for head, rows in ((_PHASE_HEAD, self.phases), (_ROUTE_HEAD, self.routes)):
            cells = ["<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>"]
            cells += ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
                      for row in rows]
            parts.append("<table>" + "".join(cells) + "</table>")
        return "".join(parts) + f"<p>{html.escape(self.summary)}</p>"
