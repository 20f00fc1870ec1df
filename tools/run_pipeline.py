"""`megalens pipeline` as a script; --help says how."""

from megalens import commands

if __name__ == "__main__":
    commands.run("pipeline", script="tools/run_pipeline.py")
