"""The loopback Hub serves real clients, and the retries of huggingface_hub 2.4.

The table shows how many failures in a row each call survives, as measured by `test_what_the_client_retries`. 500 and
504 behave like 503. By the client's source, 502 and 408 do as well, except that the GET of a file retries 408. The
waits are 1, 2, 4, 8 and 8 s, or one second longer than Retry-After, with any of these statuses. A failed HEAD is first
repeated at once.

    call                                     503   429   reset   closed   then it raises
    create_repo                                0     0       0        0
    validate-yaml (README in a push)           0     0       0        0   JSONDecodeError, if the 503 is a page of HTML
    preupload                                  5     5       5        5
    LFS batch, PUT, verify                     5     5       5        5   PUT and verify: RuntimeError, cause below it
    commit without hf_xet, or create_commit    0     0       0        0
    commit of upload_folder with hf_xet        5     5       5        5   a lost answer makes a second, equal commit
    create_tag, create_branch                  0     0       0        0
    whoami, auth_check, model_info, refs       0     0       0        0   also a push that finds nothing to commit
    list_repo_tree, list_repo_commits          5     5       5        5
    snapshot_download: revision                0     0       0        0   LocalEntryNotFoundError after a status
    snapshot_download: tree                    5     5       5        5   "
    download: HEAD of a file                   6     6       0        0   "
    download: GET of a file                    0     5       0        5   503: HfHubHTTPError

A status raises HfHubHTTPError, an OSError. A cut or refused connection raises an httpx error, which is not an OSError.
If a Hub is unreachable for more than 23 s, even retried calls fail. With `parent_commit` a commit can safely be
repeated: if the first one arrived, the second is refused with 412.
"""

import json
import math
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request

import pytest
from huggingface_hub import CommitOperationAdd, ModelCard, constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx

from tests.helpers.loopback import LFS_SUFFIXES, TOKEN, User


REPO = "tester/model"
FILES = {
    "README.md": b"---\nlicense: mit\n---\n# A model\n",
    "model_index.json": b"{}",
    "unet/weights.safetensors": bytes(range(256)) * 40,
    "unet/empty.safetensors": b"",
    "samples/å b.png": b"\x89PNG\r\n",
}


@pytest.fixture
def folder(tmp_path):
    for name, data in FILES.items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "folder"


def push(api, folder, **settings):
    api.create_repo(REPO, exist_ok=True)
    api.upload_folder(repo_id=REPO, folder_path=folder, commit_message="A push", **settings)
    api.create_tag(REPO, tag="v1", exist_ok=True)
    api.create_branch(REPO, branch="side", exist_ok=True)


def contents(folder):
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in files.items() if name != ".gitattributes"}


@pytest.mark.parametrize("suffixes", [LFS_SUFFIXES, ("",), ()], ids=["mixed", "lfs", "regular"])
def test_a_folder_comes_back_bit_for_bit(hub, api, folder, tmp_path, suffixes):
    hub.lfs_suffixes = suffixes
    push(api, folder)
    assert contents(folder) == FILES
    for revision in ("v1", "side", hub.repository(REPO).commits[-1].oid):
        loaded = api.snapshot_download(REPO, revision=revision, cache_dir=tmp_path / f"cache of {revision}")
        assert contents(folder.joinpath(loaded)) == FILES

    repo = hub.repository(REPO)
    assert {name: data for name, data in repo.files.items() if name != ".gitattributes"} == FILES
    expected = {name for name, data in FILES.items() if data and name.endswith(suffixes)}
    assert {name for name, file in repo.at("main").tree.items() if file.lfs} == expected
    assert len(hub.calls("^PUT /storage/")) == len(expected)
    assert all(("authorization" in call.headers) != call.path.startswith("/storage/") for call in hub.log)


def test_only_what_changed_is_committed(hub, api, folder):
    push(api, folder)
    before = len(hub.calls("/commit/"))
    push(api, folder)
    assert hub.repository(REPO).messages == ["A push"]
    assert len(hub.calls("/commit/")) == before  # the client compares hashes from preupload
    (folder / "model_index.json").write_bytes(b"[]")
    push(api, folder)
    commit = hub.calls("/commit/")[-1]
    assert [json.loads(line)["value"].get("path") for line in commit.body.splitlines()] == [None, "model_index.json"]


def test_branches_and_deletions(hub, api, folder):
    push(api, folder)
    (folder / "unet" / "empty.safetensors").unlink()
    api.upload_folder(repo_id=REPO, folder_path=folder, revision="side", delete_patterns="unet/*")
    api.delete_folder("samples", REPO, revision="side")
    left = {".gitattributes", "README.md", "model_index.json", "unet/weights.safetensors"}
    assert set(api.list_repo_files(REPO, revision="side")) == left
    assert set(api.list_repo_files(REPO)) == {*FILES, ".gitattributes"}
    refs = api.list_repo_refs(REPO)
    assert [branch.name for branch in refs.branches] == ["main", "side"]
    assert refs.tags[0].target_commit == refs.branches[0].target_commit == api.model_info(REPO).sha
    assert [commit.title for commit in api.list_repo_commits(REPO)] == ["A push", "initial commit"]
    assert [entry.path for entry in api.list_repo_tree(REPO, "unet")] == sorted(n for n in FILES if "unet" in n)
    assert [entry.path for entry in api.get_paths_info(REPO, ["unet", "none"])] == ["unet"]


def status_of(caught):
    return caught.value.response.status_code


def test_who_may_do_what(hub, api, folder):
    hub.users |= {"hf_reader": User("tester", write=False), "hf_stranger": User("stranger")}
    api.create_repo(REPO, private=True)
    api.create_repo("lab/shared")
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_repo(REPO)
    assert status_of(caught) == 409
    assert api.whoami()["name"] == "tester"
    assert api.repo_exists(REPO, token="hf_reader")
    api.auth_check(REPO, write=True)
    for call in (lambda: api.whoami(token="hf_wrong"), lambda: api.model_info("lab/shared", token="hf_wrong")):
        with pytest.raises(HfHubHTTPError, match="(?i)invalid") as caught:
            call()
        assert status_of(caught) == 401
    for name, token in ((REPO, "hf_reader"), ("lab/shared", "hf_stranger")):
        with pytest.raises(HfHubHTTPError) as caught:
            api.upload_folder(repo_id=name, folder_path=folder, token=token)
        assert status_of(caught) == 403
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_repo("tester/other", token="hf_stranger")
    assert status_of(caught) == 403
    with pytest.raises(HfHubHTTPError) as caught:
        api.upload_folder(repo_id="lab/shared", folder_path=folder, token=False)
    assert status_of(caught) == 401
    for token in ("hf_stranger", False):
        with pytest.raises(RepositoryNotFoundError):
            api.model_info(REPO, token=token)
    assert not any(repo.messages for repo in hub.repositories.values())


def test_what_is_not_there(hub, api, folder, tmp_path):
    push(api, folder)
    with pytest.raises(RepositoryNotFoundError):
        api.upload_folder(repo_id="tester/none", folder_path=folder)
    for names in ({"repo_id": "tester/none"}, {"repo_id": REPO, "repo_type": "dataset"}):
        with pytest.raises(RepositoryNotFoundError):
            api.hf_hub_download(filename="model_index.json", cache_dir=tmp_path, **names)
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download(REPO, "model_index.json", revision="v2", cache_dir=tmp_path)
    with pytest.raises(RevisionNotFoundError):
        api.upload_folder(repo_id=REPO, folder_path=folder, revision="none")
    with pytest.raises(RemoteEntryNotFoundError):
        api.hf_hub_download(REPO, "none.json", cache_dir=tmp_path)
    with pytest.raises(ValueError, match="Invalid metadata"):
        api.upload_file(repo_id=REPO, path_in_repo="README.md", path_or_fileobj=b"---\na: [\n---\n")


def test_ranges(hub, api, folder):
    push(api, folder)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for name in ("README.md", "unet/weights.safetensors"):  # the second one through the storage
        url = f"{hub.url}/{REPO}/resolve/main/{name}"
        for asked, part in (("2-4", slice(2, 5)), ("5-", slice(5, None))):
            with opener.open(urllib.request.Request(url, headers={"Range": f"bytes={asked}"})) as reply:
                assert (reply.status, reply.read()) == (206, FILES[name][part])
        with pytest.raises(urllib.error.HTTPError, match="416"):
            opener.open(urllib.request.Request(url, headers={"Range": "bytes=99999-"}))


def test_what_it_does_not_know_is_noted(hub, api):
    with pytest.raises(HfHubHTTPError, match="501"):
        next(iter(api.list_models()))
    with pytest.raises(HfHubHTTPError, match="501"):
        api.create_repo("tester/kernel", repo_type="kernel")
    assert [line.split()[1].rstrip(":") for line in hub.unhandled] == ["/api/models", "/api/repos/create"]
    hub.unhandled.clear()


def pull(api, folder):
    return api.snapshot_download(REPO, cache_dir=tempfile.mkdtemp(dir=folder.parent), allow_patterns="*.json")


FAULTS = [{"status": 503}, {"status": 429, "headers": {"Retry-After": "3"}}, {"reset": True}, {"close": True}]
NONE, ALL = (0, 0, 0, 0), (5, 5, 5, 5)
CALLS = {  # the failing request, the number of survived failures for each of FAULTS, the error after more 503s
    "create_repo": ("POST /api/repos/create", NONE, HfHubHTTPError),
    "validate-yaml": ("POST /api/validate-yaml", NONE, json.JSONDecodeError),
    "preupload": ("POST .*/preupload/", ALL, HfHubHTTPError),
    "LFS batch": ("POST .*/objects/batch", ALL, HfHubHTTPError),
    "LFS PUT": ("PUT /storage/", ALL, RuntimeError),
    "LFS verify": ("POST .*/objects/verify", ALL, RuntimeError),
    "commit": ("POST .*/commit/", NONE, HfHubHTTPError),
    "commit with hf_xet": ("POST .*/commit/", ALL, HfHubHTTPError),
    "create_tag": ("POST .*/tag/", NONE, HfHubHTTPError),
    "create_branch": ("POST .*/branch/", NONE, HfHubHTTPError),
    "nothing to commit": ("GET .*/revision/main", NONE, HfHubHTTPError),
    "whoami": ("GET .*/whoami", NONE, HfHubHTTPError),
    "auth_check": ("GET .*/auth-check/write", NONE, HfHubHTTPError),
    "model_info": (f"GET .*/{REPO}$", NONE, HfHubHTTPError),
    "list_repo_refs": ("GET .*/refs", NONE, HfHubHTTPError),
    "list_repo_tree": ("GET .*/tree/", ALL, HfHubHTTPError),
    "list_repo_commits": ("GET .*/commits/", ALL, HfHubHTTPError),
    "download: revision": ("GET .*/revision/", NONE, LocalEntryNotFoundError),
    "download: tree": ("GET .*/tree/", ALL, LocalEntryNotFoundError),
    "download: HEAD": ("HEAD .*/resolve/", (6, 6, 0, 0), LocalEntryNotFoundError),
    "download: GET": ("GET .*/resolve/", (0, 5, 0, 5), HfHubHTTPError),
}
ASKED = {  # calls to a Hub that already has the folder; a first push makes the other calls
    "nothing to commit": push,
    "whoami": lambda api, folder: api.whoami(),
    "auth_check": lambda api, folder: api.auth_check(REPO, write=True),
    "model_info": lambda api, folder: api.model_info(REPO),
    "list_repo_refs": lambda api, folder: api.list_repo_refs(REPO),
    "list_repo_tree": lambda api, folder: list(api.list_repo_tree(REPO)),
    "list_repo_commits": lambda api, folder: api.list_repo_commits(REPO),
    **{name: pull for name in CALLS if name.startswith("download")},
}


@pytest.mark.parametrize("name", CALLS)
def test_what_the_client_retries(hub, api, folder, monkeypatch, sleeps, name):
    pattern, survived, error = CALLS[name]
    errors = (error, httpx.TransportError, RuntimeError, LocalEntryNotFoundError, HfHubHTTPError)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", name != "commit with hf_xet")
    for fault, survives in zip(FAULTS, survived, strict=True):

        def prepare(times, fault=fault):
            hub.clear()
            hub.lfs_suffixes = () if name == "commit with hf_xet" else LFS_SUFFIXES
            if name in ASKED:
                push(api, folder)
            sleeps.clear()
            return hub.fail(pattern, times, **fault)

        failure = prepare(times=math.inf)
        with pytest.raises(error if "status" in fault and fault["status"] == 503 else errors):
            ASKED.get(name, push)(api, folder)
        assert failure.hits == survives + 1
        if survives and name != "download: GET":
            assert sleeps == ([4] * 5 if fault.get("status") == 429 else [1, 2, 4, 8, 8])

        failure = prepare(times=survives)
        ASKED.get(name, push)(api, folder)
        assert failure.hits == survives
        assert hub.repository(REPO).messages == ["A push"]


@pytest.mark.parametrize("xet", [False, True])
def test_a_commit_whose_answer_is_lost(hub, api, folder, monkeypatch, sleeps, xet):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not xet)
    hub.lfs_suffixes = ()
    api.create_repo(REPO)
    first = hub.repository(REPO).commits[0].oid
    hub.fail("POST .*/commit/", reset=True, processed=True)
    if xet:
        push(api, folder)
        assert hub.repository(REPO).messages == ["A push", "A push"]
    else:
        with pytest.raises(httpx.ReadError):
            push(api, folder)
        push(api, folder)  # nothing has changed
        assert hub.repository(REPO).messages == ["A push"]
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_commit(REPO, [CommitOperationAdd("a", b"a")], commit_message="late", parent_commit=first)
    assert status_of(caught) == 412


@pytest.mark.parametrize("seconds, survives", [(20, True), (30, False)])
def test_a_blackout(hub, api, folder, monkeypatch, seconds, survives):
    passed = []

    def sleep(asked):
        passed.append(asked)
        if sum(passed) >= seconds:
            hub.up()

    monkeypatch.setattr("time.sleep", sleep)
    hub.on_request(lambda request: hub.down() if "preupload" in request.path and not passed else None)
    if survives:
        push(api, folder)
        assert hub.repository(REPO).messages == ["A push"]
    else:
        with pytest.raises(httpx.ConnectError):
            push(api, folder)
        assert not hub.repository(REPO).messages


def test_a_callback_may_wait(hub, api):
    arrived, go = threading.Event(), threading.Event()
    hub.on_request(lambda request: (arrived.set(), go.wait(10)))
    thread = threading.Thread(target=api.create_repo, args=(REPO,))
    thread.start()
    assert arrived.wait(10) and not hub.repositories
    go.set()
    thread.join()
    assert hub.repository(REPO)


def test_from_the_cache_without_the_hub(hub, api, folder, tmp_path):
    push(api, folder)
    home = tmp_path / "home"
    api.snapshot_download(REPO, cache_dir=home / "hub")
    hub.down()
    assert contents(folder.joinpath(api.snapshot_download(REPO, cache_dir=home / "hub"))) == FILES
    with pytest.raises(LocalEntryNotFoundError):
        api.snapshot_download(REPO, cache_dir=tmp_path / "other")
    hub.up()
    before = len(hub.log)
    code = f"from huggingface_hub import snapshot_download; print(snapshot_download('{REPO}'))"
    environment = hub.environment(home, HF_HUB_OFFLINE="1")
    loaded = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert contents(folder.joinpath(loaded.stdout.strip())) == FILES
    assert len(hub.log) == before


CLIENT = """
import hashlib, json
import torch
from datasets import Dataset, load_dataset
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from huggingface_hub import ModelCard

def digest(pipe):
    pipe.set_progress_bar_config(disable=True)
    images = pipe(generator=torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np").images
    return hashlib.sha256(images.tobytes()).hexdigest()

channels = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
pipe = DDPMPipeline(UNet2DModel(8, 1, 1, **channels, **blocks), DDPMScheduler())
pipe.save_pretrained("pipe", push_to_hub=True, repo_id="tester/pipe", private=True)
ModelCard("---\\nlicense: mit\\n---\\n# Mine").push_to_hub("tester/pipe")
rows = Dataset.from_dict({"number": list(range(100)), "name": [str(n) for n in range(100)]})
rows.push_to_hub("tester/rows")
loaded = load_dataset("tester/rows", split="train")
images = [digest(DiffusionPipeline.from_pretrained(name)) for name in ("./pipe", "tester/pipe")]
print(json.dumps({"images": images, "same rows": rows.to_dict() == loaded.to_dict()}), flush=True)
input()
print(json.dumps({"offline": digest(DiffusionPipeline.from_pretrained("tester/pipe"))}))
"""


def test_diffusers_and_datasets(hub, tmp_path):
    environment = hub.environment(tmp_path / "home", OMP_NUM_THREADS="1")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": open(tmp_path / "errors", "w")}
    process = subprocess.Popen([sys.executable, "-c", CLIENT], env=environment, cwd=tmp_path, text=True, **pipes)
    first = process.stdout.readline()
    hub.down()
    second, _ = process.communicate("\n")
    assert process.returncode == 0, (tmp_path / "errors").read_text()
    said = json.loads(first) | json.loads(second)
    assert said["same rows"]
    assert said["images"] == [said["offline"]] * 2

    pipe, rows = hub.repository("tester/pipe"), hub.repository("tester/rows", "dataset")
    assert pipe.private and not rows.private
    assert ModelCard(pipe.files["README.md"].decode()).data.license == "mit"
    assert pipe.at("main").tree["unet/diffusion_pytorch_model.safetensors"].lfs
    assert [name for name, file in rows.at("main").tree.items() if file.lfs] == ["data/train-00000-of-00001.parquet"]
    assert TOKEN not in "".join(call.body.decode(errors="replace") for call in hub.log)
