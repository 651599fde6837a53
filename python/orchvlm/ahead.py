"""Batches that are made while steps run."""
import queue
import threading


class Ahead:
    """Makes batches in a thread of its own, before they are asked for; with each goes the loader's
    state behind it.

    ``make`` turns the loader's packs into what a step takes.  At most ``most`` are made ahead; a
    batch is begun when one is taken, never by the thread's own will, so that ranks that take
    equally many have begun equally many.  What was made and not used is given back by
    :meth:`close`, for whoever goes on.
    """

    def __init__(self, loader, make, most, left=()):
        self._loader, self._make = loader, make
        self._left = list(left)
        self._orders, self._made = queue.Queue(), queue.Queue()
        self._under_way = 0
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()
        self._order(most - len(self._left))

    def _order(self, n):
        for _ in range(n):
            self._under_way += 1
            self._orders.put(True)

    def _work(self):
        failed = None
        while self._orders.get():
            if failed is None:
                try:
                    batch = self._make(self._loader)
                    self._made.put((batch, self._loader.state_dict()))
                    continue
                except BaseException as error:  # handed on to whoever asks for the next batch
                    failed = error
            self._made.put((failed, None))

    def next(self):
        """(batch, loader state behind it); the loader's own exception, every time, once it failed.
        """
        item, state = self._left.pop(0) if self._left else self._taken()
        if isinstance(item, BaseException):
            self._left.insert(0, (item, None))
            raise item
        self._order(1)
        return item, state

    def _taken(self):
        item = self._made.get()
        self._under_way -= 1
        return item

    def close(self):
        """Ends the thread behind what was begun; all batches that nobody took."""
        self._orders.put(False)
        self._thread.join()
        while self._under_way:
            self._left.append(self._taken())
        return self._left
