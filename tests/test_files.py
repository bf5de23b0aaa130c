"Files are whole or absent, and found wherever they lie."
import errno, os

import pytest

from spklip import files
from spklip.files import HALF_WRITTEN, atomic, expect_to_write, files_below, half_written


def test_what_fails_names_the_file_and_leaves_the_old_one(tmp_path):
    (tmp_path/"a.txt").write_text("old")
    with pytest.raises(OSError) as full, atomic(tmp_path/"a.txt") as part:
        part.write_text("half")
        assert half_written(tmp_path) == [part] and part.match(HALF_WRITTEN) and part.suffix == ".txt"
        raise OSError(errno.ENOSPC, "No space left on device")
    assert full.value.filename == str(tmp_path/"a.txt") and "part" not in str(full.value)
    with pytest.raises(OSError) as nowhere, atomic(tmp_path/("x"*255)) as part: pass
    assert nowhere.value.filename == str(tmp_path/("x"*255))
    assert os.listdir(tmp_path) == ["a.txt"] and (tmp_path/"a.txt").read_text() == "old"


def test_another_file_s_error_stays_its_own(tmp_path):
    with pytest.raises(FileNotFoundError) as missing, atomic(tmp_path/"copy") as part: part.write_bytes((tmp_path/"none").read_bytes())
    assert missing.value.filename == str(tmp_path/"none")


def test_everybody_may_read_it(tmp_path):
    "Also where the writer, as that of safetensors, keeps it to itself."
    (tmp_path/"plain").touch()
    with atomic(tmp_path/"a") as part: part.write_text("."); part.chmod(0o600)
    assert (tmp_path/"a").stat().st_mode == (tmp_path/"plain").stat().st_mode


def test_expect_to_write(tmp_path, monkeypatch):
    expect_to_write(tmp_path/"new"/"a.csv")
    assert os.listdir(tmp_path/"new") == []
    monkeypatch.setattr(files.os, "access", lambda *_: False)
    with pytest.raises(PermissionError, match="a.csv"): expect_to_write(tmp_path/"new"/"a.csv")


def test_files_below_follows_links_and_ends(tmp_path):
    (tmp_path/"there"/"deep").mkdir(parents=True); (tmp_path/"there"/"deep"/"x.dat").touch()
    (tmp_path/"asked").mkdir(); (tmp_path/"asked"/"run").symlink_to(tmp_path/"there"); (tmp_path/"asked"/"walk").symlink_to(tmp_path/"there")
    (tmp_path/"there"/"round").symlink_to(tmp_path/"there"); (tmp_path/"there"/"up").symlink_to(tmp_path/"asked")
    (tmp_path/"asked"/".Trash").mkdir(); (tmp_path/"asked"/".Trash"/"old.dat").touch(); (tmp_path/"there"/"deep"/"._x.dat").touch()
    found = [p.relative_to(tmp_path/"asked").as_posix() for p in files_below(tmp_path/"asked")]
    assert not any("Trash" in f or "._x" in f for f in found)
    assert {"run/deep/x.dat", "walk/deep/x.dat"} <= set(found) and len(found) < 10
