"""`megalens trust` as a script; --help says how."""

from megalens import commands

if __name__ == "__main__":
    commands.run("trust", script="tools/trust.py")
