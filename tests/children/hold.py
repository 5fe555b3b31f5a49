"""Hold the lock of a folder."""

from __future__ import annotations

import sys
import time

from tracer.store.storage import Storage

with Storage(sys.argv[1]).locked():
    print("held", flush=True)
    time.sleep(600)
