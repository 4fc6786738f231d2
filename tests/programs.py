"""The programs that examples and documents call, as commands that run in the fixture `interpreter`; two nodes of Slurm."""

import os
import shlex
import sys
from pathlib import Path

MODULES = {
    "mpo": "mpo",
    "torchrun": "torch.distributed.run",
    "accelerate": "accelerate.commands.accelerate_cli",
    "transformers": "transformers.cli.transformers",
}
SRUN = """#!/bin/sh
# Slurm's variables for two nodes of one task, which are processes here.
while [ "${1#-}" != "$1" ]; do shift; done
export SLURM_STEP_NUM_NODES=2 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NODELIST=node[0-1]
SLURM_NODEID=1 SLURM_PROCID=1 SLURM_LOCALID=0 "$@" & other=$!
SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0 "$@" && wait $other
"""


def programs(folder: Path, interpreter: str) -> dict[str, str]:
    """Write the programs into a new folder; returns the environment in which they are found, also by the ranks."""
    texts = {name: f'#!/bin/sh\nexec {shlex.quote(interpreter)} -m {module} "$@"\n' for name, module in MODULES.items()}
    texts["python"] = f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n'
    texts |= {"srun": SRUN, "scontrol": "#!/bin/sh\nprintf 'localhost\\nlocalhost\\n'\n"}
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return {"PYTHON_EXEC": interpreter, "PATH": f"{folder}:{os.environ['PATH']}"}
