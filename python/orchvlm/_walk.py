"""What a walk over a model's layers takes of its arenas: sizes in the place of tensors."""
from contextlib import contextmanager
from dataclasses import dataclass, field, replace


class Stack:
    """Taken bytes, in multiples of 64, and the most of them at a time."""

    def __init__(self):
        self.used = self.most = 0

    def take(self, *sizes):
        self.used += sum(-(-int(size) // 64) * 64 for size in sizes)
        self.most = max(self.most, self.used)

    @contextmanager
    def rewound(self, *sizes):
        mark = self.used
        self.take(*sizes)
        yield
        self.used = mark

    def touch(self, *sizes):
        """For one operation."""
        with self.rewound(*sizes):
            pass

    def add(self, other):
        """All that another one took, on top of this one."""
        self.most = max(self.most, self.used + other.most)
        self.used += other.used


@dataclass
class Run:
    """What a walk adds up; ``checkpoint`` is None where no backward follows."""

    size: int         # of an activation
    exact: int        # of a gradient
    checkpoint: str
    chunk: int = 0    # bound of the experts' rows at a time, 0: none
    spread: int = 1   # ranks that share the experts, each with as many tokens
    keep: Stack = field(default_factory=Stack)
    work: Stack = field(default_factory=Stack)
    seen: dict = field(default_factory=dict)  # what blocks took: most of a tower's are alike

    def tower(self, trained, apart):
        """Activations of an encoder, and the same workspace, or one ``apart``."""
        return replace(self, checkpoint=self.checkpoint if trained else None, keep=Stack(),
                       work=Stack() if apart else self.work)

    def alone(self):
        """Of the same kind, with nothing taken yet."""
        return replace(self, keep=Stack(), work=Stack())

    def at(self, reached):
        """The same memory; where no backward comes, nothing is kept."""
        return self if reached else replace(self, checkpoint=None)

    @property
    def stack(self):
        return self.work if self.checkpoint is None else self.keep

    def chunked(self, block, rows):
        """Rows of a chunk of the block's experts; 0: they run at once."""
        return self.chunk if 0 < self.chunk < rows * block.k else 0

    def arriving(self, block, rows):
        """(rows of the block's experts that come at a time from the ranks that share them, rows
        that go); 0, 0: nobody does."""
        own = rows * block.k
        if self.spread == 1:
            return 0, 0
        most = min(own * self.spread, self.chunk or own + own // 4)
        return most, min(own, most * self.spread)

    def sums(self, values):
        """Bytes of what chunks add up in, where activations are narrower."""
        return values * self.exact if self.exact > self.size else 0


class Stream:
    """Of a tower, after each block: kept where a backward reads it, else in two places that take
    turns."""

    def __init__(self, row):
        self.row, self.free = row, 2

    def next(self, run, keep):
        if keep:
            run.keep.take(self.row)
        elif self.free:
            self.free -= 1
            run.work.take(self.row)
