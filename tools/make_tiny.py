"""`megalens make-tiny` as a script; --help says how."""

from megalens import commands

if __name__ == "__main__":
    commands.run("make-tiny", script="tools/make_tiny.py")
