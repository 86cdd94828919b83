"""Trains in children of one process that has imported everything: a new interpreter per kill would take far longer.

Reads command lines (JSON lists) from stdin; for each, prints the child's id and then how it ended. The children sleep
in each fsync, which makes saves long enough to be hit.
"""

import json
import os
import sys
import time

from cm_diffusers.engine.run import main


def slow_fsync(descriptor, fsync=os.fsync):
    fsync(descriptor)
    time.sleep(0.01)


for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os.fsync = slow_fsync
        code = 1
        try:
            main(json.loads(line), ["ect"], "")
            code = 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    print(f"child {child}", flush=True)
    print(f"ended {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}", flush=True)
