"""What a command of the shell has imported when it ends."""

from __future__ import annotations

import subprocess
import sys

COMPUTES = {"torch", "transformers", "nnsight", "scipy", "ray", "matplotlib", "tokenizers", "accelerate", "datasets"}


def loaded_by(*words: str) -> set[str]:
    """The top-level modules that a command has imported when it ends."""
    code = (
        "import sys, tracer.cli\n"
        f"sys.argv = ['tracer', *{words!r}]\n"
        "try:\n    tracer.cli.main()\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "print('\\n' + ' '.join(sorted({name.partition('.')[0] for name in sys.modules})))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())
