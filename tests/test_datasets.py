"Folders of recordings: read whole, split without leaks, refused early"
import json
from collections import Counter
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils.data import DataLoader
from spklip.data.datasets import METADATA, SPLITS, SpikeDataset, assign_splits, check, read_metadata, summary, write_metadata
from spklip.data.streams import StreamError, clip_index, write_dat

def row(i, **more):
    label = "walk" if i % 2 else "run"
    return dict(file=f"{i}.dat", height=8, width=12, frames=250, rate_hz=1000.0, flip_rows=False, label=label, prompt=f"a person {label}s",
                caption=f"clip {i}", group=f"g{i//2 % 4}", split="train", source="drawn", made_by="test") | more

@pytest.fixture
def folder(tmp_path):
    rows = [row(i, frames=400 if i == 3 else 250, flip_rows=i == 2) for i in range(16)]
    for i, r in enumerate(rows): write_dat(tmp_path/r["file"], spikes(i, r["frames"]), flip_rows=r["flip_rows"])
    write_metadata(tmp_path, rows)
    return tmp_path

def spikes(i, frames): return (np.random.default_rng(i).random((frames, 8, 12)) < 0.2).astype(np.uint8)
def bits(x): return np.packbits(x.reshape(len(x), -1), axis=-1, bitorder="little")

def refused(call, *args, **kwargs):
    with pytest.raises(StreamError) as e: call(*args, **kwargs)
    assert "\n" not in str(e.value)
    return str(e.value)

def test_items_are_the_recordings(folder):
    data = SpikeDataset(folder)
    assert (data.classes, data.prompts) == (["run", "walk"], ["a person runs", "a person walks"])
    assert (data.height, data.width, len(data), len(data.groups)) == (8, 12, 16, 16)
    for i, item in enumerate(data):
        if i == 16: break
        expected = bits(spikes(i, data.rows[i]["frames"]))[clip_index(data.rows[i]["frames"])]
        assert (item["packed"].numpy() == expected).all() and item["packed"].dtype == torch.uint8
        assert (item["label"], item["caption"], item["index"]) == (i % 2, f"clip {i}", i)
    batch = next(iter(DataLoader(data, 8)))
    assert batch["packed"].shape == (8, 250, 12) and batch["label"].tolist() == [0, 1]*4

def test_jitter_repeats_by_epoch_and_keeps_short_clips(folder):
    data, same = SpikeDataset(folder, jitter=True, seed=1), SpikeDataset(folder, jitter=True, seed=1)
    draws = []
    for epoch in range(6):
        for d in (data, same): d.set_epoch(epoch)
        assert (data[3]["packed"] == same[3]["packed"]).all() and (data[0]["packed"] == SpikeDataset(folder)[0]["packed"]).all()
        draws.append(data[3]["packed"].numpy().tobytes())
    assert len(set(draws)) > 3

@pytest.mark.parametrize("change,said", [
    ({"height": "8"}, "'height'"), ({"height": True}, "'height'"), ({"frames": 0}, "more than 0"), ({"rate_hz": None}, "'rate_hz'"),
    ({"split": "dev"}, "'split'"),
    ({"file": "/etc/a.dat"}, "inside the folder"), ({"file": "../a.dat"}, "inside the folder"), ({"label": ""}, "empty"),
    ({"file": "0.dat"}, "repeats 0.dat of line 1")])
def test_a_bad_line_is_named_with_its_number(tmp_path, change, said):
    (tmp_path/METADATA).write_text("".join(json.dumps(r)+"\n" for r in (row(0), row(1, **change))))
    message = refused(read_metadata, tmp_path)
    assert "line 2" in message and said in message

def test_lines_that_are_no_rows(tmp_path):
    assert "no such file" in refused(read_metadata, tmp_path).lower()
    for text, said in (("", "empty"), ("{}\n", "line 1 has no 'file'"), ("[1]\n", "line 1 not an object"), (json.dumps(row(0))+"\n{\n", "line 2 is not JSON")):
        (tmp_path/METADATA).write_text(text)
        assert said in refused(read_metadata, tmp_path)

def test_a_line_ends_where_it_ends(tmp_path):
    (tmp_path/METADATA).write_text(json.dumps(row(0, caption="one\u2028two"), ensure_ascii=False) + "\n", encoding="utf8")
    assert read_metadata(tmp_path)[0]["caption"] == "one\u2028two"

def test_a_wrong_row_writes_nothing(tmp_path):
    write_metadata(tmp_path, [row(0)])
    refused(write_metadata, tmp_path, [row(0), row(1, width=0)])
    assert len(read_metadata(tmp_path)) == 1

def test_refused_before_the_first_clip_is_read(folder):
    rows = read_metadata(folder)
    assert "3.dat" not in refused(SpikeDataset, folder, segments=30) and "0.dat: 250 frames, a clip needs 300" in refused(SpikeDataset, folder, segments=30)
    assert "'holdout'" in refused(SpikeDataset, folder, "holdout")
    write_metadata(folder, rows[:5] + [rows[5] | {"height": 12, "width": 8}])
    assert "8 x 12 (0.dat), 12 x 8 (5.dat)" in refused(SpikeDataset, folder)
    write_metadata(folder, rows[:5] + [rows[5] | {"prompt": "another"}])
    assert "two prompts" in refused(SpikeDataset, folder)
    write_metadata(folder, rows)
    with open(folder/"7.dat", "r+b") as f: f.truncate(2000)
    assert "7.dat: 2,000 bytes" in refused(SpikeDataset, folder) and "250 frames" in refused(SpikeDataset, folder)
    (folder/"7.dat").write_bytes(bytes(251*12))
    assert "7.dat: 251 frames, expected the 250" in refused(SpikeDataset, folder)

def test_check_names_every_bad_file(folder):
    assert check(folder) == []
    (folder/"1.dat").unlink()
    with open(folder/"2.dat", "r+b") as f: f.truncate(2000)
    (folder/"4.dat").write_bytes(bytes(250*12))
    (folder/"more.dat").write_bytes(b"x")
    write_metadata(folder, [r | {"split": "test"} if r["file"] == "15.dat" else r for r in read_metadata(folder)])
    problems = check(folder)
    assert len(problems) == 5
    for said in ("1.dat: no such file", "2.dat: 2,000 bytes", "4.dat: not one spike", "more.dat: not in", "group 'g3' is in test and train"):
        assert any(said in p for p in problems), said

def test_a_folder_with_a_colon_in_its_name(tmp_path):
    at = tmp_path/"odd: name"; at.mkdir()
    write_metadata(at, [row(0), row(1)]); write_dat(at/"0.dat", np.zeros((250, 8, 12), np.uint8))
    assert [p.removeprefix(f"{at}/") for p in check(at)] == ["1.dat: no such file or directory, expected a .dat file of 8 x 12 frames (12 bytes "
                                                             "each); its metadata says 250 frames", "0.dat: not one spike"]

def test_summary_counts(folder):
    write_metadata(folder, assign_splits(read_metadata(folder)))
    table = summary(folder)
    assert table.clips.sum() == 16 and (table.classes == 2).all() and table.groups.sum() == 4
    assert table.frames.sum() == 15*250 + 400 and table.firing_rate.between(0.19, 0.21).all()

def test_summary_measures_all_classes(tmp_path):
    "They take turns: every second recording is of one class, which never fires."
    for i in range(16): write_dat(tmp_path/f"{i}.dat", np.full((250, 2, 4), i % 2, np.uint8))
    write_metadata(tmp_path, [row(i, height=2, width=4, split="train") for i in range(16)])
    assert 0 < summary(tmp_path, 4).firing_rate["train"] < 1

@settings(max_examples=60, deadline=None)
@given(labels=st.integers(1, 6), groups=st.integers(1, 9), nested=st.booleans(), seed=st.integers(0, 5), uneven=st.integers(1, 7))
def test_groups_never_straddle_and_no_class_is_lost(labels, groups, nested, seed, uneven):
    rows = [row(0, file=f"{c}-{g}-{k}", label=str(c), group=f"{c}.{g}" if nested else str(g))
            for c in range(labels) for g in range(groups) for k in range(1 + (c*3 + g*5) % uneven)]
    split = assign_splits(rows, seed=seed)
    homes = {(r["group"], r["split"]) for r in split}
    assert len(homes) == len({r["group"] for r in rows})
    assert {r["label"] for r in split if r["split"] == "train"} == {r["label"] for r in rows}
    if groups >= 3 and nested:
        for s in SPLITS: assert {r["label"] for r in split if r["split"] == s} == {r["label"] for r in rows}
    assert {r["file"]: r["split"] for r in assign_splits(rows[::-1], seed=seed)} == {r["file"]: r["split"] for r in split}

def test_splits_meet_their_shares():
    rows = [row(0, file=f"{c}-{g}", label=str(c), group=str(g)) for c in range(10) for g in range(9)]
    for seed in range(4):
        homes = Counter(s for _, s in {(r["group"], r["split"]) for r in assign_splits(rows, validation=1/9, test=1/3, seed=seed)})
        assert homes == dict(train=5, validation=1, test=3)
    assert assign_splits(rows, seed=0) != assign_splits(rows, seed=1)
    assert Counter(r["split"] for r in assign_splits([row(i, label="a") for i in range(100)], by="random")) == dict(train=60, validation=15, test=25)
    assert {r["split"] for r in assign_splits(rows, 0, 0)} == {"train"}
    for wrong in (dict(by="actor"), dict(validation=0.5, test=0.5), dict(test=-0.1)):
        with pytest.raises(ValueError): assign_splits(rows, **wrong)
