"""`megalens convert` as a script; --help says how."""

from megalens import commands

if __name__ == "__main__":
    commands.run("convert", script="tools/convert_acts.py")
