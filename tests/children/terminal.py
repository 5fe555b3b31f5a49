"""Several commands of the command line in one process, on the terminal it has: a JSON list of their arguments."""

from __future__ import annotations

import json
import sys

from tracer.cli.app import main

for arguments in json.loads(sys.argv[1]):
    sys.argv = ["tracer", *arguments]
    try:
        main()
    except SystemExit as ended:
        print("ended", ended.code, flush=True)
