#!/usr/bin/env bash
# datasets 5.2.0 + torchdata 0.11.0: after a StatefulDataLoader over a stream is resumed in the middle of an epoch, ALL
# later epochs skip the rows before that point, without a message.
#
# IterableDataset.load_state_dict keeps the state and starts every iteration from it, until set_epoch sets another
# epoch. A StatefulDataLoader never calls set_epoch. So after a resume at row 25 of 60, each epoch has 35 rows, both
# with num_workers=0 and with persistent workers. Workers that restart in each epoch read all rows. A resumed long run
# therefore trains on a part of the data only. With datasets alone, calling dataset.set_epoch(epoch) before each epoch
# is a remedy.
#
# Our workaround: engine/data/streams.py counts rows itself and starts each epoch from the first row.
# Output seen (2026-11-28, Python 3.11, torch 2.13.0+cpu), rows of four epochs after the resume:
#   datasets alone: [35, 35, 35, 35]
#   datasets alone, with set_epoch: [35, 60, 60, 60]
#   StatefulDataLoader, 0 workers: [35, 35, 35, 35]
#   StatefulDataLoader, 1 worker: [35, 60, 60, 60]
#   StatefulDataLoader, 1 persistent worker: [35, 35, 35, 35]
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6 datasets==5.2.0 torchdata==0.11.0
cd "$work"
cat >resume.py <<'PY'
from datasets import IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader


def numbers(shards):
    for shard in shards:
        for row in range(10):
            yield {"x": 10 * shard + row}


def stream():
    return IterableDataset.from_generator(numbers, gen_kwargs={"shards": list(range(6))})


def resumed_dataset():
    first = stream()
    rows = iter(first)
    for _ in range(25):
        next(rows)
    second = stream()
    second.load_state_dict(first.state_dict())
    return second


def resumed_loader(**workers):
    first = StatefulDataLoader(stream(), batch_size=5, **workers)
    batches = iter(first)
    for _ in range(5):
        next(batches)
    second = StatefulDataLoader(stream(), batch_size=5, **workers)
    second.load_state_dict(first.state_dict())
    return [sum(len(batch["x"]) for batch in second) for _ in range(4)]


dataset = resumed_dataset()
alone = [len(list(dataset)) for _ in range(4)]
dataset, told = resumed_dataset(), []
for epoch in range(4):
    dataset.set_epoch(epoch)
    told.append(len(list(dataset)))
seen = {
    "datasets alone": alone,
    "datasets alone, with set_epoch": told,
    "StatefulDataLoader, 0 workers": resumed_loader(num_workers=0),
    "StatefulDataLoader, 1 worker": resumed_loader(num_workers=1),
    "StatefulDataLoader, 1 persistent worker": resumed_loader(num_workers=1, persistent_workers=True),
}
for name, rows in seen.items():
    print(f"{name}: {rows}")
lost, whole = [35] * 4, [35, 60, 60, 60]
assert list(seen.values()) == [lost, whole, lost, whole, lost], "other rows are read now"
PY
"$work/env/bin/python" resume.py
