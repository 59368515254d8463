"""Makes transformers know our checkpoints: `AutoModelForCausalLM.from_pretrained(directory)` after `import
moe_rco`.

transformers takes seconds to import and most uses of this package do not need its models. So registration
waits until somebody imports the module it happens in; only the standard library is imported here.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_TARGET = "transformers.quantizers.auto"


def register() -> None:
    """Register quant_method `moe_rco` with transformers, now if it is imported, otherwise when it will be.

    Calling it again does nothing.
    """
    if _TARGET in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    from transformers.quantizers import auto

    from moe_rco.plan import METHOD
    from moe_rco.serve.quantizer import MoeRcoConfig, MoeRcoQuantizer

    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer(METHOD)(MoeRcoQuantizer)
    if METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(METHOD)(MoeRcoConfig)


class _Finder(MetaPathFinder):
    """Finds the target module as everybody else does, and has `_register` called once it is loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _register()
