"""Say in one line what this machine lacks before anything is installed. Runs on any Python 3, with nothing installed."""

import importlib.util
import os
import shutil
import sys
import sysconfig


def missing():
    """What is missing and what mends it, or None."""
    if sys.version_info < (3, 11):
        return "Python 3.11 or newer is needed, this is {}.{}; name one: make PYTHON=python3.12".format(*sys.version_info[:2])
    if importlib.util.find_spec("ensurepip") is None or importlib.util.find_spec("venv") is None:
        return "this Python cannot make virtual environments; install its venv package (python3-venv on Debian and Ubuntu)"
    compiler = os.environ.get("CXX") or "g++"
    if shutil.which(compiler.split()[0]) is None:
        return "no C++ compiler '{}' (torch.compile and DeepSpeed build with it); install g++ or name one: make CXX=clang++".format(
            compiler
        )
    header = os.path.join(sysconfig.get_paths()["include"], "Python.h")
    if not os.path.exists(header):
        return "no {} (torch.compile builds with it); install Python's headers (python3-dev on Debian and Ubuntu)".format(header)
    return None


if __name__ == "__main__":
    problem = missing()
    if problem:
        sys.exit("error: " + problem)
