"""`megalens write-texts` as a script; --help says how."""

from megalens import commands

if __name__ == "__main__":
    commands.run("write-texts", script="tools/write_texts.py")
