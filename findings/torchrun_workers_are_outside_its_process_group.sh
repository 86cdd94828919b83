#!/usr/bin/env bash
# torch 2.13.0: torchrun starts each worker in its own session. A SIGKILL to torchrun's whole process group, as from a
# batch system or `kill -9 -- -GROUP`, ends torchrun but no worker: each worker trains on, and nothing stops it.
#
# SIGTERM, SIGINT and SIGHUP reach the workers, because torchrun passes them on. `accelerate launch` with several
# processes uses the same code (accelerate 1.15.0; not run here).
#
# Our workaround: engine/stopping.py checks once a second that the launcher still runs; otherwise it saves and stops. A
# process that leads a session is not assumed to be detached on purpose.
# Output seen (2026-11-28, Python 3.11, torch 2.13.0+cpu):
#   workers that lead a session of their own: 2 of 2
#   after SIGKILL to the process group of torchrun: torchrun ended, 2 of 2 workers run
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$work"
cat >worker.py <<'PY'
import os
import time

with open(f"worker-{os.environ['RANK']}", "w") as file:
    file.write(f"{os.getpid()} {os.getsid(0)}")
time.sleep(60)
PY
cat >launch.py <<'PY'
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "worker.py"]
launcher = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
files = [Path("worker-0"), Path("worker-1")]
while not all(file.exists() and file.read_text() for file in files):
    time.sleep(0.1)
workers = [tuple(map(int, file.read_text().split())) for file in files]
leaders = sum(process == session for process, session in workers)
print(f"workers that lead a session of their own: {leaders} of 2")
os.killpg(launcher.pid, signal.SIGKILL)
launcher.wait()
time.sleep(3)
running = 0
for process, _ in workers:
    try:
        os.kill(process, signal.SIGKILL)
        running += 1
    except ProcessLookupError:
        pass
print(f"after SIGKILL to the process group of torchrun: torchrun ended, {running} of 2 workers run")
assert (leaders, running) == (2, 2), "workers are in the process group of torchrun now"
PY
"$work/env/bin/python" launch.py
