"""A model's memory for whoever speaks DLPack."""


class Tensor:
    """A weight or a gradient where it lies; made by :meth:`orchvlm.Model.tensor`."""

    def __init__(self, core, place, which, name, shape, dtype):
        self._core, self._place, self._which = core, place, which
        self.name, self.shape, self.dtype = name, shape, dtype

    def __dlpack_device__(self):
        return self._core.dlpack_device()

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        device = self.__dlpack_device__()
        if dl_device is not None and tuple(dl_device) != device:
            raise BufferError(f"{self} can be exported to {device} only; got dl_device="
                              f"{dl_device!r}")
        if copy:
            raise BufferError(f"{self} is exported without a copy; take one of what you get")
        if device[0] == 1 and stream not in (None, -1):
            raise BufferError(f"memory of the CPU has no stream; got stream={stream!r}")
        versioned = max_version is not None and tuple(max_version) >= (1, 0)
        capsule = self._core.dlpack(self._place, self._which, versioned) if self._there() else None
        if capsule is None:
            raise BufferError(f"{self} is gone: the model has no such parameter, or does not train "
                              "it any more; ask model.tensor again")
        return capsule

    def _there(self):
        """Adapters come and go: whether the place still holds what it was asked for."""
        rows = self._core.parameters()
        return self._place < len(rows) and (rows[self._place][0] == self.name and
                                            tuple(rows[self._place][2]) == tuple(self.shape))

    def __repr__(self):
        return f"<{self.name}: {self.dtype}{list(self.shape)}>"
