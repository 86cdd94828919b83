"""Full, limited or closed disks: one line and exit code 2, nothing is lost, and the same command resumes."""

import errno
import os
import shutil
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError

import cm_diffusers.engine.processes as processes
from cm_diffusers.engine.files import explain, remove, replace_file, written_aside
from cm_diffusers.engine.lock import lock_folder
from cm_diffusers.engine.processes import ends_with_a_line, together
from tests.helpers.breadth import narrowed
from tests.helpers.disks import MOMENTS, Disk, at, file_sizes_limited_later, train
from tests.helpers.scripts import load_script
from tests.helpers.training_runs import differences, flags, read_log, run


SETTINGS = {"validation_steps": 6}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("runs") / "whole", **SETTINGS)


@pytest.fixture(scope="module")
def half(whole, tmp_path_factory):
    """The run after its first checkpoint."""
    folder = tmp_path_factory.mktemp("runs") / "half"
    shutil.copytree(whole / "checkpoint-3", folder / "checkpoint-3")
    shutil.copyfile(whole / "log.jsonl", folder / "log.jsonl")
    return folder


def assert_one_line(said, *words):
    errors = [line for line in said.err.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in said.err, said.err
    assert all(word in errors[0] for word in words), errors[0]
    assert "the same command again, which continues" in errors[0] and "--output_dir" in errors[0]


def assert_whole(folder, whole):
    assert differences(folder, whole) == [] and read_log(folder) == read_log(whole)
    assert not list(folder.glob(".tmp-*")) and (folder / "exported.json").read_text()
    for path in ("pipeline/unet/diffusion_pytorch_model.safetensors", "data.json"):
        assert (folder / path).read_bytes() == (whole / path).read_bytes()


# --- runs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", narrowed(MOMENTS, "log.jsonl", "model.safetensors", "card.json"))
def test_a_run_whose_files_can_not_grow_ends_in_a_line_and_goes_on(moment, whole, half, tmp_path, capsys):
    folder = shutil.copytree(half, tmp_path / "run")
    with file_sizes_limited_later() as limit, at(moment, limit):
        assert train(flags(folder, **SETTINGS)) == 2
    assert_one_line(capsys.readouterr(), moment, "File too large", "ulimit -f")
    assert train(flags(folder, **SETTINGS)) == 0
    assert_whole(folder, whole)


@pytest.fixture
def disk(tmp_path):
    disk = Disk(tmp_path / "disk")
    if not disk.there:
        pytest.skip("file systems can't be mounted here")
    yield disk
    disk.close()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["fill", "take_all_files"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_on_a_full_disk_ends_in_a_line_and_goes_on_once_there_is_room(moment, way, whole, disk, capsys):
    folder, happen = disk.root / "run", getattr(disk, way)
    if (moment, way) == ("log.jsonl", "take_all_files"):
        pytest.skip("the log is there already")
    with at(moment, happen):
        assert train(flags(folder, **SETTINGS)) == 2
    assert_one_line(capsys.readouterr(), "No space left on device", "df -h")
    disk.free()
    assert train(flags(folder, **SETTINGS)) == 0
    assert_whole(folder, whole)


@pytest.mark.slow
@pytest.mark.parametrize("moment", list(MOMENTS)[1:])
def test_a_run_whose_folder_is_closed_under_it_ends_in_a_line(moment, whole, half, tmp_path, capsys):
    folder, no_inode_flags = shutil.copytree(half, tmp_path / "run"), os.system("command -v chattr > /dev/null")
    if no_inode_flags or os.system(f"chattr +i {folder}"):
        pytest.skip("folders can't be made immutable here")
    os.system(f"chattr -i {folder}")
    try:
        with at(moment, lambda: os.system(f"chattr +i {folder}")):
            code = train(flags(folder, **SETTINGS))
    finally:
        os.system(f"chattr -i {folder}")
    assert code == 2
    assert_one_line(capsys.readouterr(), "Operation not permitted", "Allow writing there")
    assert train(flags(folder, **SETTINGS)) == 0
    assert_whole(folder, whole)


def test_a_disk_that_is_full_from_the_start_leaves_what_is_there(whole, half, tmp_path, capsys):
    folder = shutil.copytree(half, tmp_path / "run")
    (folder / ".owner").write_text("process 1")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with file_sizes_limited_later() as limit:
        limit()
        assert train(flags(folder, **SETTINGS)) == 2
    assert_one_line(capsys.readouterr(), ".owner", "File too large")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"} == before


# --- messages ------------------------------------------------------------------------------------------------------


def caused_by(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error, words",
    [
        (OSError(errno.ENOSPC, "x", "a/b"), ["a/b: No space left on device.", "df -i"]),
        (OSError(errno.EDQUOT, "x", "a/b"), ["a/b: Disk quota exceeded.", "df -h"]),
        (OSError(errno.EROFS, "x", "a"), ["a: Read-only file system.", "Allow writing there"]),
        (PermissionError(errno.EACCES, "x", "a"), ["a: Permission denied.", "Allow writing there"]),
        (IsADirectoryError(errno.EISDIR, "x", "a"), ["a: Is a directory.", "Move away what is there"]),
        (NotADirectoryError(errno.ENOTDIR, "x", "a"), ["a: Not a directory.", "Move away what is there"]),
        (OSError(errno.EFBIG, "x", "a"), ["a: File too large.", "ulimit -f"]),
        (OSError(errno.EIO, "x", "a"), ["a: Input/output error.", "Repair that"]),
        (
            SafetensorError("I/O error: No space left on device (os error 28) at path"),
            ["No space left on device.", "df"],
        ),
        (
            RuntimeError("unable to write to file </torch_1>: No space left on device (28)"),
            ["No space left on device."],
        ),
        (
            RuntimeError("it failed\nOSError: [Errno 28] No space left on device: 'a/x'\n"),
            ["a/x: No space left"],
        ),
        (
            caused_by(RuntimeError("a library failed"), OSError(errno.ENOSPC, "x", "a")),
            ["a: No space left on device."],
        ),
    ],
)
def test_a_fault_of_the_system_is_named_with_its_file_and_what_to_do(error, words, capsys):
    with pytest.raises(SystemExit, match="2"), ends_with_a_line("--there"):
        raise error
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and said.startswith("error: ") and "another --there." in said
    assert all(word in said for word in words), said


@pytest.mark.parametrize("error", [KeyError("a"), RuntimeError("28"), TypeError("No space"), AssertionError()])
def test_faults_of_the_library_are_no_lines(error):
    assert explain(error) is None
    with pytest.raises(type(error)), ends_with_a_line():
        raise error


def test_the_traceback_of_a_fault_is_there_on_request(monkeypatch):
    monkeypatch.setenv("CM_DIFFUSERS_TRACEBACK", "1")
    with pytest.raises(OSError), ends_with_a_line():
        raise OSError(errno.ENOSPC, "x")


# --- several processes ---------------------------------------------------------------------------------------------


def ended_together(monkeypatch, main, heard, fault=None):
    """The messages that one of two processes broadcasts if it ends with `fault`; `heard` is the main one's message."""
    sent = []
    monkeypatch.setattr(processes, "broadcast_object_list", lambda values: sent.extend(values) or [heard or sent[0]])
    with together(SimpleNamespace(num_processes=2, is_main_process=main)):
        if fault is not None:
            raise fault
    return sent


def test_where_the_main_process_fails_the_others_end_by_the_same_message(monkeypatch):
    with pytest.raises(OSError):
        ended_together(monkeypatch, True, None, OSError(errno.ENOSPC, "x", "a"))
    assert ended_together(monkeypatch, True, None) == [None]
    with pytest.raises(ValueError, match="^a: No space left on device"):
        ended_together(monkeypatch, False, explain(OSError(errno.ENOSPC, "x", "a")))
    with pytest.raises(ValueError, match="^its message$"):
        ended_together(monkeypatch, False, "its message")


def test_a_process_whose_peer_has_gone_says_so(monkeypatch, capsys):
    monkeypatch.setattr(processes.time, "sleep", lambda seconds: None)
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:16570.")
    for rank, ending in (("1", pytest.raises(SystemExit, match="2")), ("0", pytest.raises(RuntimeError))):
        monkeypatch.setenv("RANK", rank)
        with ending, ends_with_a_line():
            raise lost
    said = capsys.readouterr().err
    assert said == "error: another process has ended, and its message tells the cause. (process 1)\n"


# --- single files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [None, "old"])
def test_a_file_is_the_old_one_or_the_new_one_and_never_a_half(tmp_path, before):
    file = tmp_path / "a.json"
    if before is not None:
        file.write_text(before)
    with file_sizes_limited_later() as limit, pytest.raises(OSError, match="File too large.*a.json"):
        limit()
        replace_file(file, "new" * 10_000)
    with pytest.raises(KeyboardInterrupt), written_aside(file) as aside:
        aside.write_text("half")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"] * (before is not None)
    assert before is None or file.read_text() == before
    (tmp_path / ".tmp-a.json").mkdir()  # an obstacle at that place
    replace_file(file, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"] and file.read_text() == "new"


def test_a_folder_that_can_not_be_deleted_is_named_by_its_whole_path(tmp_path, monkeypatch):
    def refused(path):
        raise PermissionError(errno.EACCES, "Permission denied", "data.json")

    monkeypatch.setattr(shutil, "rmtree", refused)
    with pytest.raises(OSError) as caught:
        remove(tmp_path)
    assert explain(caught.value).startswith(f"{tmp_path}: Permission denied. Allow writing there")


def empty(path):
    path.write_bytes(b"")


def binary(path):
    path.write_bytes(bytes(range(256)))


def a_folder(path):
    path.mkdir()


def a_pipe(path):
    os.mkfifo(path)


def a_dangling_link(path):
    path.symlink_to("nowhere")


@pytest.mark.parametrize("make", [empty, binary, a_folder, a_pipe, a_dangling_link])
@pytest.mark.parametrize("name", [".owner", ".lock"])
def test_whatever_lies_in_the_place_of_the_owner_and_the_lock_stops_no_run(tmp_path, capsys, make, name):
    make(tmp_path / name)
    lock = lock_folder(tmp_path)
    assert (tmp_path / ".owner").read_text() == f"process {os.getpid()} on {os.uname().nodename}"
    moved = make not in (empty, binary)
    assert os.path.lexists(tmp_path / f"damaged-{name}") == moved == (f"damaged-{name}" in capsys.readouterr().out)
    lock.release()


@pytest.mark.parametrize("make", [empty, binary, a_folder, a_pipe, a_dangling_link])
def test_a_folder_in_use_is_said_to_be_whatever_the_owner_has_left(tmp_path, make):
    lock = lock_folder(tmp_path)
    (tmp_path / ".owner").unlink()
    make(tmp_path / ".owner")
    with pytest.raises(ValueError, match="is in use by another process. Choose another"):
        lock_folder(tmp_path)
    lock.release()


# --- other scripts -------------------------------------------------------------------------------------------------


def assert_ends_in_a_line(main, words, capsys):
    with file_sizes_limited_later() as limit, pytest.raises(SystemExit) as ended:
        limit()
        main([str(word) for word in words])
    said = capsys.readouterr().err.replace("\r", "\n")
    assert ended.value.code == 2 and "Traceback" not in said
    assert said.splitlines()[-1].startswith("error: ") and "the same command" in said


def test_samples_and_pages_that_can_not_be_written_end_in_a_line_and_leave_the_old_ones(whole, tmp_path, capsys):
    page, out = tmp_path / "page.html", tmp_path / "out"
    page.write_text("an old page")
    model = ["--pretrained_model_name_or_path", whole / "pipeline", "--device", "cpu", "--num_samples", 2]
    assert_ends_in_a_line(load_script("report").main, [whole, "--output", page], capsys)
    assert_ends_in_a_line(load_script("sample").main, [*model, "--output_dir", out], capsys)
    assert page.read_text() == "an old page" and not list(out.rglob("*.png"))
    load_script("sample").main([str(word) for word in (*model, "--output_dir", out)])
    assert len(list(out.rglob("*.png"))) == 3


def test_a_conversion_on_a_full_disk_ends_in_a_line(tmp_path, capsys, monkeypatch):
    script = load_script("convert")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(script, "convert_checkpoint", full)
    with pytest.raises(SystemExit, match="2"):
        script.main([str(tmp_path), str(tmp_path / "out")])
    assert capsys.readouterr().err.startswith("error: No space left on device. Free some space")
