"""`megalens import-lens` as a script; --help says how."""

from megalens import commands

if __name__ == "__main__":
    commands.run("import-lens", script="tools/import_lens.py")
