"""`megalens dump` as a script; --help says how."""

from megalens import commands

if __name__ == "__main__":
    commands.run("dump", script="tools/dump_acts.py")
