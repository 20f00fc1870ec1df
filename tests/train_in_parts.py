"""megalens/train.py, but every checkpoint, however small, is divided into files of all ranks."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from megalens import cli  # noqa: E402
from megalens.engine import state  # noqa: E402
from megalens.train import main  # noqa: E402

if __name__ == "__main__":
    state.FILE_BYTES = 1000
    cli.run(main, __doc__)
