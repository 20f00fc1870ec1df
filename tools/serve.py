"""`megalens serve` as a script; --help says how."""

from megalens import commands

if __name__ == "__main__":
    commands.run("serve", script="tools/serve.py")
