"""``python -m megalens`` is the command ``megalens``."""

from megalens.commands import main

main()
