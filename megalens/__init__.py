"""megalens: train consistency lenses, which say in words what a language model's activation holds and prove it by rebuilding it."""

from __future__ import annotations

__all__ = ["Comparison", "Lens", "Patched", "Score", "TokenExplanation", "__version__"]
__version__ = "0.1.0"  # setup.py reads it here, CHANGELOG.md says what is in it


def __getattr__(name: str):
    """``Lens`` and what it returns, loaded when first asked for: ``import megalens`` alone loads no library."""
    if name in ("Comparison", "Lens", "Patched", "Score", "TokenExplanation"):
        from megalens import api

        return getattr(api, name)
    raise AttributeError(f"module 'megalens' has no attribute '{name}'")
