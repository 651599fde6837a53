"""Output that nobody reads any more: no reason to end what goes on for hours."""
import contextlib
import os
import sys


class _Patient:
    """A stream; what is written behind the end of its reader is gone."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text):
        with self._patience():
            self._stream.write(text)
        return len(text)

    def flush(self):
        with self._patience():
            self._stream.flush()

    @contextlib.contextmanager
    def _patience(self):
        try:
            yield
        except BrokenPipeError:  # what is buffered goes nowhere, too, at the process's end
            null = os.open(os.devnull, os.O_WRONLY)
            try:
                os.dup2(null, self._stream.fileno())
            finally:
                os.close(null)


@contextlib.contextmanager
def unread():
    """Inside, a pipe of stdout or stderr that was closed at its other end (``| head -1``) is none
    that an exception tells of: the work goes on in silence."""
    out, err = (stream and _Patient(stream) for stream in (sys.stdout, sys.stderr))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield
