#!/usr/bin/env bash
# transformers 5.23.0 + peft 0.21.2: once peft is installed, AutoModel.from_pretrained(name, local_files_only=True) asks
# the Hub for adapter_config.json. If the Hub can't be reached, the call retries for about 20 seconds before it loads
# the model from the cache.
#
# The automatic classes look for an adapter before they load a model. They pass the revision and the token to that
# search, and not local_files_only. Without peft there is no search. BertModel.from_pretrained, the class itself, is not
# affected. The remedy is another argument: adapter_kwargs={"local_files_only": True}.
#
# Our workaround: evaluation/hub_networks.py passes that argument.
# Output seen (2026-11-29, Python 3.11, torch 2.13.0+cpu, huggingface_hub 2.4.0), requests for the model that reached
# the Hub:
#   without peft: 0
#   with peft: 1 HEAD /someone/tiny/resolve/0000000000000000000000000000000000000000/adapter_config.json
#   with peft, the class itself: 0
#   with peft and adapter_kwargs: 0
#   no Hub: slow (the model is loaded after more than 15 seconds)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
pip() { "$work/env/bin/pip" "$@" -q --disable-pip-version-check; }
pip install torch==2.13.0 numpy==2.4.6 transformers==5.23.0 huggingface-hub==2.4.0 accelerate==1.15.0
cd "$work"
cat >load.py <<'PY'
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

home, kind = Path("home").absolute(), sys.argv[1]
asked = []


class Hub(BaseHTTPRequestHandler):
    def do_HEAD(self):
        if "/someone/tiny/" in self.path:
            asked.append(f"{self.command} {self.path}")
        self.send_error(404)

    do_GET = do_HEAD

    def log_message(self, *args):
        pass


server = HTTPServer(("127.0.0.1", 0), Hub)
address = f"http://127.0.0.1:{server.server_port}"
if kind == "no hub":
    server.server_close()
else:
    threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ |= {"HF_HOME": str(home), "HF_ENDPOINT": address}

from transformers import AutoModel, BertConfig, BertModel  # noqa: E402

snapshot = home / "hub/models--someone--tiny/snapshots" / ("0" * 40)
if not snapshot.is_dir():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    BertModel(BertConfig(vocab_size=8, max_position_embeddings=8, **sizes)).save_pretrained(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("0" * 40)
began = time.monotonic()
more = {"adapter_kwargs": {"local_files_only": True}} if kind == "adapter_kwargs" else {}
cls = BertModel if kind == "class" else AutoModel
model = cls.from_pretrained("someone/tiny", local_files_only=True, **more)
assert model.config.hidden_size == 8
print(len(asked) if kind != "no hub" else ("slow" if time.monotonic() - began > 15 else "fast"), *asked)
PY
run() { "$work/env/bin/python" load.py "$1" 2>/dev/null; }
without=$(run plain)
pip install peft==0.21.2
with=$(run plain) itself=$(run class) remedy=$(run adapter_kwargs) away=$(run "no hub")
printf 'without peft: %s\nwith peft: %s\nwith peft, the class itself: %s\nwith peft and adapter_kwargs: %s\nno Hub: %s\n' \
  "$without" "$with" "$itself" "$remedy" "$away"
[ "$without" = 0 ]
[[ "$with" =~ ^1\ HEAD\ /someone/tiny/resolve/0+/adapter_config.json$ ]]
[ "$itself" = 0 ]
[ "$remedy" = 0 ]
[ "$away" = slow ]
