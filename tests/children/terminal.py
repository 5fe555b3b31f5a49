"""Several commands of the command line in one process, on the terminal it has: a file with a JSON list of arguments."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tracer.cli.app import main

for arguments in json.loads(Path(sys.argv[1]).read_text()):
    sys.argv = ["tracer", *arguments]
    try:
        main()
    except SystemExit as ended:
        print("ended", ended.code, flush=True)
