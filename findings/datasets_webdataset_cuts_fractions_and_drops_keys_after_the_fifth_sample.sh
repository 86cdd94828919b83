#!/usr/bin/env bash
# datasets 5.2.0, load_dataset("webdataset"): the first five samples determine the types of all samples. A number that
# is whole in these five loses its fraction in all later samples (4.75 is read as 4). JSON keys and members such as
# .txt that these five lack are dropped from later samples. No message appears, whether streamed or not.
#
# So a shard whose first five scores happen to be whole (5, 6, 5, 7, 6) gives whole scores for a million samples, and
# filters by score select other images. The webdataset package itself reads every value unchanged.
#
# Our workaround: we read only images and labels from shards. A later sample without a label or an image is an error
# that names the row, and labels must be whole numbers or names.
# Output seen (2026-11-29, Python 3.11):
#   datasets, streaming=False: scores 5, 6, 5, 7, 6, 4, 8; captions of the last two None, None
#   datasets, streaming=True: scores 5, 6, 5, 7, 6, 4, 8; captions of the last two None, None
#   webdataset: scores 5, 6, 5, 7, 6, 4.75, 8.25; captions of the last two a cat, a dog
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q --disable-pip-version-check datasets==5.2.0 webdataset==1.0.2 pillow==12.3.0 numpy==2.4.6
cd "$work"
HF_HOME="$work/home" HF_HUB_OFFLINE=1 "$work/env/bin/python" - <<'PY'
import io
import json
import tarfile

import datasets
import webdataset
from PIL import Image

SCORES = [5, 6, 5, 7, 6, 4.75, 8.25]
CAPTIONS = {5: "a cat", 6: "a dog"}

buffer = io.BytesIO()
Image.new("L", (4, 4)).save(buffer, "PNG")
with tarfile.open("shard.tar", "w") as shard:
    for i, score in enumerate(SCORES):
        parts = {"png": buffer.getvalue(), "json": json.dumps({"score": score}).encode()}
        parts |= {"txt": CAPTIONS[i].encode()} if i in CAPTIONS else {}
        for kind, content in parts.items():
            member = tarfile.TarInfo(f"{i:05d}.{kind}")
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))


def show(name, rows):
    """Rows are (score, caption) pairs."""
    scores, captions = zip(*rows)
    print(f"{name}: scores {', '.join(map(str, scores))}; captions of the last two {', '.join(map(str, captions[-2:]))}")
    return list(scores), list(captions[-2:])


for streaming in (False, True):
    rows = datasets.load_dataset("webdataset", data_files="shard.tar", split="train", streaming=streaming)
    found = show(f"datasets, streaming={streaming}", [(row["json"]["score"], row.get("txt")) for row in rows])
    assert found == ([5, 6, 5, 7, 6, 4, 8], [None, None]), "datasets reads other values now"
rows = webdataset.WebDataset("shard.tar", shardshuffle=False).decode()
found = show("webdataset", [(row["json"]["score"], row.get("txt")) for row in rows])
assert found == (SCORES, list(CAPTIONS.values()))
PY
