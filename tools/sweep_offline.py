"""`megalens sweep` as a script; --help says how."""

from megalens import commands

if __name__ == "__main__":
    commands.run("sweep", script="tools/sweep_offline.py")
