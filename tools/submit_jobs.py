"""`megalens submit` as a script; --help says how."""

from megalens import commands

if __name__ == "__main__":
    commands.run("submit", script="tools/submit_jobs.py")
