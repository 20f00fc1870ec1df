"""`megalens verify` as a script; --help says how."""

from megalens import commands

if __name__ == "__main__":
    commands.run("verify", script="tools/verify_shards.py")
