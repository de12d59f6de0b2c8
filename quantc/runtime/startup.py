"""What Python runs at its start where quantc is installed: setup.py puts it into site-packages as quantc-startup.pth.

Every process runs it, so it imports nothing but sys, and waits. When transformers' table of quantizers is imported it
imports quantc, which adds itself there; where quantc is gone or broken, transformers is left as it is.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType


class _ImportQuantc:
    """A finder for the one module; plugin.py, which `import quantc` runs, has another that registers."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "transformers.quantizers.auto":
            return None
        sys.meta_path.remove(self)
        try:
            import quantc  # noqa: F401
        except Exception as error:
            if getattr(error, "name", None) != "quantc":
                import warnings

                warnings.warn(f"transformers cannot load quantc checkpoints: {error}", stacklevel=2)
        from importlib.util import find_spec

        return find_spec(name)  # asks all finders again, since those in sys.meta_path have moved


sys.meta_path.insert(0, _ImportQuantc())
