"""Reading pickles of strangers: nothing in them calls anything but what a reader admits by name."""

from __future__ import annotations

import io
import pickle
from typing import Any, BinaryIO, ClassVar

_PythonUnpickler: Any = pickle._Unpickler  # of which type checkers do not know that it is in Python


class AdmittingUnpickler(_PythonUnpickler):
    """Takes from modules what `admitted` has under (module, name), and nothing else.

    In Python, since the unpickler in C makes room for as many objects as a file says it has.
    """

    admitted: ClassVar[dict[tuple[str, str], object]] = {}
    contents = "plain values"  # what such a pickle holds, for errors

    def __init__(self, file: BinaryIO, **options) -> None:
        # A file makes room for as many bytes as it is asked for; a copy of it in memory for as many as there are.
        super().__init__(io.BytesIO(file.read()), **options)

    def find_class(self, module: str, name: str):
        if (module, name) in self.admitted:
            return self.admitted[module, name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, and only {self.contents} are read")

    def load_build(self) -> None:
        """Gives an object its state; never a class or a function, which would keep it."""
        if len(self.stack) < 2 or callable(self.stack[-2]):
            raise pickle.UnpicklingError(f"it changes something else than {self.contents}")
        super().load_build()

    def load_bytearray8(self) -> None:
        """Refuses what makes room before it reads."""
        raise pickle.UnpicklingError(f"it holds a bytearray, and only {self.contents} are read")

    dispatch = _PythonUnpickler.dispatch | {pickle.BUILD[0]: load_build, pickle.BYTEARRAY8[0]: load_bytearray8}
