"""Several commands of the command line in one process, on the terminal it has: a file with a JSON list of arguments."""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path

from tracer.cli.app import main

for arguments in json.loads(Path(sys.argv[1]).read_text()):
    sys.argv = ["tracer", *arguments]
    try:
        main()
    except SystemExit as ended:
        print("ended", ended.code, flush=True)
    except BaseException:  # noqa: BLE001  what Python would print and end with
        traceback.print_exc()
        print("ended 1", flush=True)
