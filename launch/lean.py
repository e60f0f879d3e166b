"""What transformers imports for training and torch.compile alone stays out of the processes of this program.

`transformers.modeling_utils` brings torch._dynamo, torch.distributed.tensor and scipy: a second of the processor
for marks on functions that only torch.compile reads, for fully sharded training, and for losses of object detection.
Here the marks mean nothing until somebody wants the compiler, and transformers is told that the others are missing, as
is accelerate. It also reads all of its files for names, twice: here once, and only where the names are. Not for the
process of somebody else's script, which may train: `LLM` does not use this.
"""

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import spec_from_loader
from types import ModuleType
from typing import Any

_DYNAMO = "torch._dynamo"
_INDEXING = f"{_DYNAMO}._trace_wrapped_higher_order_op"


def import_only_what_runs() -> None:
    """From here on, in this process, which must run nothing but this program. No cost where torch is not imported."""
    if _DYNAMO not in sys.modules:
        sys.modules[_DYNAMO] = _Deferred(_DYNAMO, dict.fromkeys(_MARKS, _unmarked) | {"__path__": []})
        sys.modules[_INDEXING] = _Deferred(_INDEXING, {"TransformGetItemToIndex": _TransformGetItemToIndex})
        sys.meta_path[:0] = [_Told(), _Parts()]


def _unmarked(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Any:
    """A mark with or without arguments of its own, as decorators are written."""
    return _unmarked if function is None else function


_MARKS = ("allow_in_graph", "assume_constant_result", "disable")


def _TransformGetItemToIndex() -> Any:
    return _real(_INDEXING).TransformGetItemToIndex()


class _Deferred(ModuleType):
    """A module that is imported when more of it is wanted than `known`."""

    def __init__(self, name: str, known: dict[str, Any]) -> None:
        super().__init__(name)
        self.__dict__.update(known)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # whoever walks over all modules wants nothing of this one
            raise AttributeError(name)
        return getattr(_real(self.__name__), name)


def _real(name: str) -> ModuleType:
    for deferred in (_DYNAMO, _INDEXING):
        if isinstance(sys.modules.get(deferred), _Deferred):
            del sys.modules[deferred]
    return import_module(name)


class _Parts(MetaPathFinder, Loader):
    """A part of the deferred package is found once the whole of it is imported."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if not fullname.startswith(f"{_DYNAMO}.") or not isinstance(sys.modules.get(_DYNAMO), _Deferred):
            return None
        _real(_DYNAMO)
        return spec_from_loader(fullname, self, origin=_real(fullname).__file__)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return sys.modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        """It has run."""


class _Told(MetaPathFinder):
    """Finds nothing of its own: the module by which transformers asks what is installed, and reads the names in all of
    its files, is told as soon as it is there, before others take these functions from it."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if fullname != "transformers.utils.import_utils":
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _tell(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _tell(asked: Any) -> None:
    for package in ("torch_distributed", "scipy", "accelerate"):
        setattr(asked, f"is_{package}_available", _is_missing)
    read, find = asked.create_import_structure_from_path, asked.fetch__all__

    def read_once(path: Any) -> Any:
        """Asked for the folder of all models, and again for a file in it."""
        return read(os.path.dirname(path) if os.path.isfile(path) else str(path))

    def find_last(text: str) -> Any:
        """Not line by line through files of a thousand lines, of which only what begins there is of use."""
        return find(text[max(0, text.rfind("\n__all__")) :].removeprefix("\n"))

    asked.create_import_structure_from_path, asked.fetch__all__ = read_once, find_last


def _is_missing(*_: Any) -> bool:
    return False
