"""`megalens explain` as a script; --help says how."""

from megalens import commands

if __name__ == "__main__":
    commands.run("explain", script="tools/explain.py")
