"""Sweeps: many trainings from one file, under W&B's agents or with no server at all."""


class SweepError(ValueError):
    """A sweep cannot run. The message is one line and names the mend."""
