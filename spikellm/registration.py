"""Teach transformers the format of saved spiking models, at `import spikellm` and without importing transformers for it.

`AutoModelForCausalLM.from_pretrained` opens them once `model/checkpoint.py` was imported, which takes torch and transformers: seconds that
`--help` and the composition of a sweep do not have. Every way to a model by its name (auto classes, `pipeline`, lm-eval) goes through
`transformers.models.auto.modeling_auto`. Where that was imported already, the format is registered at once. Else a finder on
`sys.meta_path` lets transformers be found where it is, and registers the format when the import that brought the auto classes has ended;
not in the middle of it, because `modeling_llama` imports them before it defines what the format is made of. Then the finder goes.

`AutoConfig` alone does without these classes, and knows the format once another auto class was imported.
"""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

LIBRARY = "transformers"
AUTO_CLASSES = "transformers.models.auto.modeling_auto"
FORMAT = "spikellm.model.checkpoint"


def teach_transformers() -> None:
    """Register the format now or, where transformers' auto classes have not been imported, as soon as they are."""
    if AUTO_CLASSES in sys.modules:
        import_module(FORMAT)
    else:
        sys.meta_path.insert(0, Watch())


class Watch(MetaPathFinder):
    """Finds the modules of transformers where the finders behind it do, and notices when an import of them has ended."""

    def __init__(self) -> None:
        self.depth = 0  # modules of transformers that are being imported, one inside the other

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        """The spec that the finders behind this one give, with a loader that tells the watch."""
        if fullname.partition(".")[0] != LIBRARY or self not in sys.meta_path:
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = WatchedLoader(spec.loader, self)
                return spec
        return None

    def ended(self) -> None:
        """An import of one module has ended; of the outermost one, perhaps."""
        self.depth -= 1
        if not self.depth and AUTO_CLASSES in sys.modules and self in sys.meta_path:
            sys.meta_path.remove(self)
            import_module(FORMAT)


class WatchedLoader(Loader):
    """A module's own loader, which the module keeps; this one tells the watch."""

    def __init__(self, loader: Loader, watch: Watch) -> None:
        self.loader, self.watch = loader, watch

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the module's own loader."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """As the module's own loader; the watch hears when the outermost import has ended."""
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.watch.depth += 1
        try:
            self.loader.exec_module(module)
        except BaseException:
            self.watch.depth -= 1
            raise
        self.watch.ended()
