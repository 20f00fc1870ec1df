"""`megalens export-lens` as a script; --help says how."""

from megalens import commands

if __name__ == "__main__":
    commands.run("export-lens", script="tools/export_lens.py")
