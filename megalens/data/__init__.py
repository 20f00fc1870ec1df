"""Text to activation shards to batches: corpus, pretokenize, dump, shards, loader."""


class DataError(ValueError):
    """Text, tokens or shards cannot be used. The message is one line and names what mends it."""
