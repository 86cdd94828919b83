"""Trains in forked children of one process that has imported everything; a new interpreter per run takes far longer.

The server reads lines of JSON from stdin: [number of processes, method, flag, flag, ...]. For each line it prints the
children's process ids, and later their exit codes. The children sleep in each fsync, so tests can interrupt saves.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time

from tests.helpers.training_runs import flags


class ForkServer:
    """Client of the server; it starts training runs within milliseconds."""

    def __init__(self):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([sys.executable, "-m", __name__], env=environment, text=True, **pipes)
        self.said: list[str] = []

    def start(self, folder, method="ect", processes=1, **settings):
        """Begin a run; returns the ids of its processes."""
        self.said = []
        self.process.stdin.write(json.dumps([processes, method, *flags(folder, method, **settings)]) + "\n")
        self.process.stdin.flush()
        return self._answer("children")

    def wait(self):
        """Wait for the run; returns the exit codes of its processes, negative for a signal."""
        return self._answer("ended")

    def run(self, folder, method="ect", processes=1, **settings):
        """Train to the end, with exit code 0; returns the printed text."""
        self.start(folder, method, processes, **settings)
        assert self.wait() == [0] * processes
        return "".join(self.said)

    def close(self):
        self.process.stdin.close()
        self.process.wait()

    def _answer(self, word):
        for line in self.process.stdout:
            if line.startswith(word + " "):
                return [int(number) for number in line.split()[1:]]
            self.said.append(line)
        raise RuntimeError("the server ended")


def slow_fsync(descriptor, fsync=os.fsync):
    fsync(descriptor)
    time.sleep(0.01)


def launcher_environment(processes, rank, port):
    """The environment variables that a launcher sets for process `rank`; none for a single process."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    return {name: str(value) for name, value in names.items()} if processes > 1 else {}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve():
    from cm_diffusers.engine.saved import export
    from cm_diffusers.engine.text import export as text_export
    from cm_diffusers.engine.training import product, text
    from cm_diffusers.engine.training.run import main

    export.verify_export = lambda pipeline, folder: None  # these take seconds
    product.draw_grids = lambda pipeline, folder: {}
    text_export._verify = lambda *args, **kwargs: None
    text.TextProduct.draw = lambda *args: ({}, {})
    for line in sys.stdin:
        processes, method, *words = json.loads(line)
        children, port = [], free_port()
        for rank in range(processes):
            child = os.fork()
            if child == 0:
                os.environ.update(launcher_environment(processes, rank, port))
                os.fsync = slow_fsync
                code = 1
                try:
                    main(words, [method], "")
                    code = 0
                except SystemExit as stop:
                    code = stop.code
                finally:
                    sys.stdout.flush()
                    os._exit(code)
            children.append(child)
        print("children", *children, flush=True)
        codes = {}
        while len(codes) < processes:
            child, status = os.wait()
            codes[child] = os.waitstatus_to_exitcode(status)
            if codes[child]:  # the others would wait for it
                for other in set(children) - codes.keys():
                    os.kill(other, signal.SIGKILL)
        print("ended", *(codes[child] for child in children), flush=True)


if __name__ == "__main__":
    serve()
