"""What a training leaves on the disk, and how a lens is read back."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint can not be used. The message is one line and names the mend."""
