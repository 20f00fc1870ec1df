"""Measuring a lens: figures, floors and ceilings, per-token explanations, the report."""


class EvaluationError(ValueError):
    """Something cannot be measured or explained. The message is one line and names what mends it."""
