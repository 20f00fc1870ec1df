"""`wandb sweep` and `wandb agent`, the installed client unmodified, against a stand-in of the server on loopback."""

import re
import subprocess


def wandb(*arguments):
    """Run the client; returns what it printed."""
    done = subprocess.run(["wandb", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def create(file):
    """`wandb sweep FILE`; returns ENTITY/PROJECT/SWEEP_ID."""
    return re.search(r"wandb agent (\S+)", wandb("sweep", str(file)))[1]


def test_the_client_asks_for_nothing_that_the_stand_in_does_not_know(wandb_server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trial.py").write_text("import sys; open('got', 'a').write(' '.join(sys.argv[1:]) + '\\n')")
    (tmp_path / "sweep.yaml").write_text("{program: trial.py, method: grid, parameters: {a: {values: [1]}, b.c: {value: 0.1}}}")
    wandb("agent", create("sweep.yaml"))
    assert (tmp_path / "got").read_text() == "--a=1 --b.c=0.1\n"
    assert wandb_server.unknown == []
