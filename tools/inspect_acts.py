"""`megalens inspect` as a script; --help says how."""

from megalens import commands

if __name__ == "__main__":
    commands.run("inspect", script="tools/inspect_acts.py")
