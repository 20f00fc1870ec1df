"""`megalens prepare-demo` as a script; --help says how."""

from megalens import commands

if __name__ == "__main__":
    commands.run("prepare-demo", script="tools/prepare_demo.py")
