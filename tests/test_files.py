"""Files and folders appear whole or not at all: whatever kills the process, whoever writes at the same time."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
from kills import killed_everywhere

from scalora.saving import files
from scalora.saving.files import atomic_folder, atomic_write, swap


def write(path, text):
    with atomic_write(path) as temporary:
        temporary.write_text(text)


def write_folder(path, text, **options):
    with atomic_folder(path, **options) as folder:
        (folder / "inside").mkdir()
        for name in ("one", "inside/two"):
            (folder / name).write_text(text)


def whole_folder(path):
    """The text of a folder of `write_folder`, which has all of its files."""
    texts = {name: (path / name).read_text() for name in ("one", "inside/two")}
    (text,) = set(texts.values())
    return text


@pytest.fixture(params=[True, False], ids=["exchange", "no exchange"])
def exchange(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(files, "_exchanged", lambda one, other: False)
    return request.param


@pytest.mark.parametrize("earlier", [True, False])
def test_a_process_killed_at_any_moment_leaves_the_earlier_file_or_the_new_one(earlier, tmp_path):
    def prepare(number):
        path = tmp_path / str(number) / "file.txt"
        path.parent.mkdir()
        if earlier:
            path.write_text("earlier")
        return path

    for path, finished in killed_everywhere(prepare, lambda path: write(path, "new")):
        found = path.read_text() if path.exists() else None
        assert found == "new" if finished else found in (("earlier", "new") if earlier else (None, "new"))


@pytest.mark.slow
def test_a_process_killed_at_any_moment_leaves_the_earlier_folder_or_the_new_one(tmp_path, exchange):
    def prepare(number):
        path = tmp_path / str(number) / "folder"
        write_folder(path, "earlier")
        return path

    def replace(path):
        write_folder(path, "new", replace=True)

    for path, finished in killed_everywhere(prepare, replace):
        if finished:
            assert whole_folder(path) == "new"
            assert [p.name for p in path.parent.iterdir()] == ["folder"]
        elif path.exists():
            assert whole_folder(path) in ("earlier", "new")
        else:  # only where names can't be exchanged at once; then both are there, under hidden names
            assert not exchange
            assert {whole_folder(p) for p in path.parent.iterdir()} == {"earlier", "new"}


def test_sigkill(tmp_path):
    script = (
        "import pathlib, itertools; from scalora.saving.files import atomic_folder, atomic_write\n"
        f"here = pathlib.Path({str(tmp_path)!r})\n"
        "for i in itertools.count():\n"
        "    with atomic_write(here / 'file') as t:\n"
        "        t.write_text(f'{i}\\n' * 5000)\n"
        "    with atomic_folder(here / 'folder', replace=True) as t:\n"
        "        for name in 'abc': (t / name).write_text(f'{i}\\n' * 2000)\n"
    )
    for delay in (0.02, 0.05, 0.11):
        process = subprocess.Popen([sys.executable, "-c", script])
        while not (tmp_path / "folder").exists():
            time.sleep(0.005)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        lines = (tmp_path / "file").read_text().splitlines()
        assert (len(lines), len(set(lines))) == (5000, 1)
        inside = [(tmp_path / "folder" / name).read_text().splitlines() for name in "abc"]
        assert [len(lines) for lines in inside] == [2000] * 3
        assert len({line for lines in inside for line in lines}) == 1


def _write_often(path, letter, barrier):
    for _ in range(20):
        barrier.wait()
        with atomic_write(path) as temporary, temporary.open("w") as file:
            for _ in range(50):
                file.write(letter * 4000)


def test_processes_that_write_one_file_at_once_don_t_mix(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    writers = [context.Process(target=_write_often, args=(tmp_path / "f", letter, barrier)) for letter in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    text = (tmp_path / "f").read_text()
    assert text in ("a" * 200_000, "b" * 200_000)
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_a_link_to_a_file_is_written_through(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "file")
    for text in ("first", "second"):
        write(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "there" / "file").read_text() == text


def test_a_device_or_pipe_is_never_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match=r"pipe.*|not a regular file"):
        write(tmp_path / "pipe", "text")
    assert (tmp_path / "pipe").is_fifo()
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_a_folder_with_something_in_it_is_replaced_only_if_that_is_asked_for(tmp_path, exchange):
    path = tmp_path / "folder"
    path.mkdir()
    write_folder(path, "into an empty one")
    with pytest.raises(OSError, match="not empty"):
        write_folder(path, "new")
    assert whole_folder(path) == "into an empty one"
    write_folder(path, "new", replace=True)
    assert whole_folder(path) == "new"


@pytest.mark.parametrize("replace", [True, False])
def test_what_a_link_leads_to_is_never_replaced_by_a_folder(replace, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("years")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match="is a link to"):
        write_folder(tmp_path / "link", "new", replace=replace)
    assert (tmp_path / "link" / "notes").read_text() == "years"


def test_something_that_came_while_a_folder_was_written_stays(tmp_path):
    def write_beside():
        with atomic_folder(tmp_path / "folder"):
            (tmp_path / "folder").mkdir()
            (tmp_path / "folder" / "mine").write_text("years")

    with pytest.raises(OSError, match="folder"):
        write_beside()
    assert (tmp_path / "folder" / "mine").read_text() == "years"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_swapped_folders_have_each_other_s_names(tmp_path, exchange):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    swap(tmp_path / "one", tmp_path / "other")
    assert (tmp_path / "one" / "other").exists()
    assert (tmp_path / "other" / "one").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"one", "other"}
