"Recordings of real cameras: any file opens as what it is, defects are found and nothing else, samples are cut once and whole"
import csv, json, os, pickle, subprocess, sys
from pathlib import Path
from dataclasses import replace
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image
from spklip.data import recordings
from spklip.camera import SensorNoise, pack, simulate, unpack
from spklip.data.datasets import SpikeDataset, check, read_metadata, write_metadata
from spklip.data.recordings import (KINDS, Cut, Source, bad_pixels, centre_crop, count_spikes, folder_sources, health, likely_sizes, load_mask, mend,
                                    metadata_of,
                                    open_recording, plan_samples, read_list, row_order, sample_starts, save_mask, slice_recordings, stand_ins)
from spklip.data.streams import StreamError, read_dat, write_dat
from spklip.files import HALF_WRITTEN
from spklip.lab import cli
from spklip.lab.notebooks import real_data

def noise(frames, height, width, seed=0, rate=0.3): return (np.random.default_rng(seed).random((frames, height, width)) < rate).astype(np.uint8)

def complaint(call, *args, **kwargs):
    with pytest.raises(StreamError) as e: call(*args, **kwargs)
    assert "\n" not in str(e.value)
    return str(e.value)

# opening

@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 6), h=st.integers(1, 9), w=st.integers(1, 17), flip=st.booleans(),
       kind=st.sampled_from(["dat", "npy", "packed", "npz", "stored", "float", "fortran"]))
def test_every_kind_of_file_gives_the_same_spikes(tmp_path_factory, n, h, w, flip, kind):
    folder, spikes = tmp_path_factory.mktemp("any"), noise(n, h, w)
    kept = spikes[:, ::-1] if flip else spikes
    path = folder/f"a.{'dat' if kind == 'dat' else 'npz' if kind in ('npz', 'stored') else 'npy'}"
    if kind == "dat": write_dat(path, kept)
    if kind == "npy": np.save(path, kept.astype(bool))
    if kind == "float": np.save(path, kept.astype(np.float32))
    if kind == "fortran": np.save(path, np.asfortranarray(kept))
    if kind == "packed": np.save(path, pack(np.ascontiguousarray(kept)))
    if kind == "npz": np.savez_compressed(path, kept)
    if kind == "stored": np.savez(path, packed=pack(np.ascontiguousarray(kept)), height=h, width=w, flip_rows=flip, rate_hz=12.5, other=np.zeros(3))
    recording = open_recording(path, h, w, None if kind == "stored" else flip)
    assert (recording.spikes() == spikes).all() and len(recording) == n and (recording.height, recording.width) == (h, w)
    assert recording.rate_hz == (12.5 if kind == "stored" else None)
    assert (np.concatenate(list(recording.chunks(megabytes=1e-4))) == pack(spikes)).all()
    index = np.array([n - 1, 0, 0])
    assert (recording.packed(index) == pack(spikes)[index]).all()
    for bad in (n, -1): complaint(recording.packed, np.array([bad]))

def test_given_goes_before_the_file_and_that_before_metadata(tmp_path):
    spikes = noise(3, 8, 8)
    np.savez(tmp_path/"a.npz", packed=pack(spikes), height=8, width=8, flip_rows=True)
    row = dict(file="a.npz", height=4, width=16, flip_rows=False, rate_hz=5.0, label="wave")
    (tmp_path/"metadata.jsonl").write_text(json.dumps(row) + "\n\n")
    assert metadata_of(tmp_path/"a.npz") == row and metadata_of(tmp_path/"b.npz") == {}
    assert (open_recording(tmp_path/"a.npz").spikes() == spikes[:, ::-1]).all()
    assert (open_recording(tmp_path/"a.npz", flip_rows=False).spikes() == spikes).all()
    assert open_recording(tmp_path/"a.npz").rate_hz == 5 and open_recording(tmp_path/"a.npz", 4, 16, False).spikes().shape == (3, 4, 16)
    (tmp_path/"other").mkdir()
    assert metadata_of(tmp_path/"other"/".."/"a.npz") == row
    (tmp_path/"metadata.jsonl").write_text(json.dumps([1, 2]) + "\n" + json.dumps(row | {"height": "8"}) + "\n")
    assert "metadata.jsonl: line 2: height is '8', expected a whole number above 0" in complaint(metadata_of, tmp_path/"a.npz")
    (tmp_path/"metadata.jsonl").write_text("{")
    assert "metadata.jsonl: not JSON lines" in complaint(open_recording, tmp_path/"a.npz")

@pytest.mark.parametrize("name, right, wrong", [("height", 8.0, ["8", 0, 8.5, True]), ("width", 8, ["8", -8, float("inf")]),
                                                ("rate_hz", 5, ["fast", 0, float("nan")]), ("flip_rows", 1, ["false", 2])])
def test_size_rate_and_order_beside_the_spikes_are_checked(tmp_path, name, right, wrong):
    "A text such as \"false\" is true in Python: it turned pictures upside down. In an .npz and in metadata alike."
    spikes, known = noise(3, 8, 8), dict(height=8, width=8, rate_hz=5., flip_rows=True)
    for value, says in [(right, None)] + [(w, f"{name} is {w!r}, expected ") for w in wrong]:
        np.savez(tmp_path/"a.npz", packed=pack(spikes), **known | {name: value})
        write_dat(tmp_path/"a.dat", spikes, flip_rows=True)
        (tmp_path/"metadata.jsonl").write_text(json.dumps(known | {"file": "a.dat", name: value}) + "\n")
        for file, where in (("a.npz", f"{tmp_path/'a.npz'}: "), ("a.dat", f"{tmp_path/'metadata.jsonl'}: line 1: ")):
            if says: assert complaint(open_recording, tmp_path/file).startswith(where + says)
            else: assert open_recording(tmp_path/file).spikes().shape == (3, 8, 8) and open_recording(tmp_path/file).flip_rows is True

@pytest.fixture
def files(tmp_path):
    spikes = noise(6, 240, 320)
    write_dat(tmp_path/"a.dat", spikes)
    np.save(tmp_path/"a.npy", spikes); np.save(tmp_path/"packed.npy", pack(spikes)); np.save(tmp_path/"two.npy", 2*spikes)
    np.save(tmp_path/"none.npy", spikes[:0])
    np.save(tmp_path/"flat.npy", spikes.ravel()); np.save(tmp_path/"wide.npy", pack(spikes).astype(np.int16))
    np.save(tmp_path/"objects.npy", np.array([{}], object))
    np.savez(tmp_path/"pair.npz", left=spikes, right=spikes); np.savez(tmp_path/"objects.npz", spikes=np.array([{}], object))
    for name in ("a.npy", "pair.npz"): (tmp_path/f"cut_{name}").write_bytes((tmp_path/name).read_bytes()[:-9000])
    for name in ("empty.dat", "empty.npy", "empty.npz"): (tmp_path/name).touch()
    (tmp_path/"text.npy").write_text("no array"); (tmp_path/"folder.npy").mkdir()
    return tmp_path

@pytest.mark.parametrize("name, size, says", [
    ("absent.dat", (), "no such file"), ("folder.npy", (), "a folder, a recording is a file"), ("empty.dat", (), "0 bytes"),
    ("empty.dat", (240, 320), "at least 9,600"),
    ("a.dat", (), "57,600 bytes; give --height and --width; its size fits 240 x 320 (6 frames"), ("a.dat", (240, None), "give --height and --width"),
    ("a.dat", (241, 320), "57,600 bytes, expected 48,200 or 57,840"), ("a.npy", (250, 400), "uint8 [6, 240, 320], expected [T, 250, 400]"),
    ("packed.npy", (), "they fit 240 x 320"), ("packed.npy", (250, 400), "expected 12,500 bytes a frame (250 x 400)"), ("none.npy", (), "one frame or more"),
    ("flat.npy", (), "uint8 [460800], expected spikes [T,H,W]"), ("wide.npy", (240, 320), "int16 [6, 9600]"), ("objects.npy", (), "pickled objects"),
    ("objects.npz", (), "pickled objects"), ("pair.npz", (), "holds 2 arrays (left, right); give the key"), ("cut_a.npy", (), "not a whole array"),
    ("cut_pair.npz", (), "not a whole .npz"), ("empty.npy", (), "0 bytes, not a whole array"), ("empty.npz", (), "0 bytes, not a whole .npz"),
    ("text.npy", (), "8 bytes, not a whole array")])
def test_what_is_no_recording_is_said_in_a_line(files, name, size, says):
    said = complaint(open_recording, files/name, *size)
    assert said.startswith(str(files/name)) and says in said

def test_keys_and_values(files):
    assert len(open_recording(files/"pair.npz", key="right")) == 6
    assert "'middle' is none" in complaint(open_recording, files/"pair.npz", key="middle")
    assert "besides 0 and 1" in complaint(open_recording(files/"two.npy").spikes)

def test_nothing_is_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self): return (open, (str(tmp_path/"went off"), "w"))
    np.save(tmp_path/"bomb.npy", np.array([Bomb()], object))
    np.savez(tmp_path/"bomb.npz", spikes=noise(2, 8, 8), height=np.array(Bomb(), object))
    with open(tmp_path/"raw.npy", "wb") as f: pickle.dump(Bomb(), f)
    (tmp_path/"went off").unlink(missing_ok=True)
    for name in ("bomb.npy", "bomb.npz", "raw.npy"): complaint(open_recording, tmp_path/name)
    assert not (tmp_path/"went off").exists()

def test_the_right_size_looks_like_a_picture(tmp_path):
    y, x = np.mgrid[:250, :400]
    light = np.repeat((0.5 + 0.4*np.sin(x/30)*np.cos(y/20))[None], 40, 0).astype(np.float32)
    write_dat(tmp_path/"a.dat", simulate(light, charge="random"))
    (best, *rest) = likely_sizes(tmp_path/"a.dat")
    assert best[:3] == (250, 400, 40) and best[3] > 0.9 and all(r < 0.5 for *_, r in rest)
    assert "250 x 400 (40 frames, looks like a picture)" in complaint(open_recording, tmp_path/"a.dat")
    image = light[0]
    assert row_order(open_recording(tmp_path/"a.dat", 250, 400), image).startswith("top-down")
    assert row_order(open_recording(tmp_path/"a.dat", 250, 400), image[::-1]).startswith("bottom-up")
    assert "not in the bits" in row_order(open_recording(tmp_path/"a.dat", 250, 400), image[:9])
    assert "not in the bits" in row_order(open_recording(tmp_path/"a.dat", 250, 400), np.zeros_like(image))

# pixels

@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 600), h=st.integers(1, 5), w=st.integers(1, 9), parts=st.integers(1, 5), seed=st.integers(0, 9))
def test_counts(tmp_path_factory, n, h, w, parts, seed):
    path, spikes = tmp_path_factory.mktemp("count")/"a.npy", noise(n, h, w, seed, 0.9)
    np.save(path, spikes)
    counts, frames, activity = count_spikes(open_recording(path), parts)
    assert frames.sum() == n and len(frames) == min(parts, n) and (activity == spikes.sum((1, 2))).all()
    edges = np.cumsum(frames)
    assert all((c == spikes[e-f:e].sum(0)).all() for c, e, f in zip(counts, edges, frames))

def test_bits_that_fill_up_a_byte_are_no_pixels(tmp_path):
    (tmp_path/"full.dat").write_bytes(b"\xff"*2*5)
    found = health(open_recording(tmp_path/"full.dat", 3, 3))
    assert found.rate == 1 and (found.counts == 5).all() and (found.activity == 9).all()

def planted(light, **defects):
    "Counts in four parts of a sensor with defects in front of a light, and where they are."
    how = SensorNoise(seed=5, **defects)
    spikes = simulate(light, charge="random", noise=how, seed=2)
    _, dark, level = how.pattern(*light.shape[1:], 5.0)
    base = SensorNoise(seed=5, **defects | {"lines": 0}).pattern(*light.shape[1:], 5.0)[1]
    truth = np.where(np.isinf(level), 1, np.where(level == 0, 3, np.where(dark - base > 0.25, 4, 0)))
    return np.stack([p.sum(0, dtype=np.int32) for p in np.array_split(spikes, 4)]), np.full(4, len(light)//4), truth

y, x = np.mgrid[:120, :160]
t = np.arange(240)[:, None, None]
DISC = np.where((y - 60)**2 + (x - 20 - t/2)**2 < 400, 0.9, 0.2 + 0.3*x/160 + 0.05*np.sin(y/3)).astype(np.float32)
FIXED = dict(dark_current=0.02, gain_std=0.05, threshold_std=0.02, temporal_std=0.1)

@pytest.mark.parametrize("pattern", [{}, FIXED], ids=["clean", "noisy"])
def test_planted_defects_are_found_and_nothing_else(pattern):
    parts, frames, truth = planted(DISC, dead=0.003, hot=0.003, lines=0.03, **pattern)
    kinds = bad_pixels(parts, frames)
    assert all((truth == i).sum() > 30 for i in (1, 3, 4))
    for i in (1, 3, 4): assert np.isin(kinds[truth == i], (i, 4)).mean() > 0.95, KINDS[i]
    assert (truth[kinds > 0] > 0).mean() > 0.98

@pytest.mark.parametrize("level", [0, 0.1, 1, 4.5, 6])
@pytest.mark.parametrize("pattern", [{}, FIXED], ids=["clean", "noisy"])
def test_an_even_scene_has_no_defects(level, pattern):
    parts, frames, _ = planted(np.full((240, 120, 160), level, np.float32), **pattern)
    assert (bad_pixels(parts, frames) > 0).sum() <= 2

def test_scenes_are_no_defects():
    "Edges, corners, one-pixel stripes, a horizon, a thin bar that passes."
    stripes = np.where(x % 8 == 0, 0.8, 0.2)
    stripes[60:] = 0.5
    board = np.where((y//16 + x//16) % 2, 0.8, 0.1)
    passing = np.where(np.abs(y - 100) + (np.abs(x - 3*t) > 60)*99 < 1, 0.9, 0.2)
    for scene in (np.broadcast_to(board, (240, 120, 160)), passing):
        parts, frames, _ = planted(np.ascontiguousarray(scene, np.float32))
        assert not bad_pixels(parts, frames).any()
    parts, frames, _ = planted(np.ascontiguousarray(np.broadcast_to(stripes, (240, 120, 160)), np.float32))
    assert not bad_pixels(parts, frames)[64:].any()

def test_what_goes_away_is_no_defect():
    "A spark and a fly of one pixel each that stay for three quarters of the recording; where they stay for all of it, they cannot be told from defects."
    scene = np.full((240, 120, 160), 1, np.float32)
    scene[:180, 30, 40], scene[60:, 80, 90] = 5, 0
    assert not bad_pixels(*planted(scene)[:2]).any()
    scene[:, 30, 40], scene[:, 80, 90] = 5, 0
    kinds = bad_pixels(*planted(scene)[:2])
    assert KINDS[kinds[30, 40]] == "hot" and KINDS[kinds[80, 90]] == "dead" and (kinds > 0).sum() == 2

def test_a_flipped_recording_has_a_flipped_mask():
    parts, frames, _ = planted(DISC[:, :90, :150], dead=0.003, hot=0.003, lines=0.03, **FIXED)
    kinds = bad_pixels(parts, frames)
    assert (kinds > 0).any() and (bad_pixels(parts[:, ::-1], frames) == kinds[::-1]).all() and (bad_pixels(parts[:, :, ::-1], frames) == kinds[:, ::-1]).all()

def test_neighbours_of_lines_are_not_lines():
    counts = np.full((4, 60, 50), 20) + noise(4, 60, 50)
    rows = [10, 14, 15, 16, 40, 42]
    counts[:, rows] += 30
    kinds = bad_pixels(counts, np.full(4, 100))
    assert np.flatnonzero((kinds == 4).all(1)).tolist() == rows and (kinds > 0).sum() == 6*50
    assert (bad_pixels(counts.swapaxes(1, 2), np.full(4, 100)) == kinds.T).all()
    counts[:, 25] = 0
    assert (bad_pixels(counts, np.full(4, 100))[25] == 4).all()

@settings(max_examples=30, deadline=None)
@given(h=st.integers(1, 12), w=st.integers(1, 12), share=st.floats(0, 0.95), seed=st.integers(0, 99))
def test_the_nearest_good_pixel_stands_in(h, w, share, seed):
    bad = np.random.default_rng(seed).random((h, w)) < share
    if bad.all():
        complaint(stand_ins, bad)
        return
    to, source = stand_ins(bad)
    good = np.argwhere(~bad)
    assert (to == np.flatnonzero(bad)).all() and not bad.ravel()[source].any()
    for p, q in zip(to, source): assert (p//w - q//w)**2 + (p%w - q%w)**2 == ((good - (p//w, p%w))**2).sum(1).min()
    spikes = noise(5, h, w)
    out = unpack(mend(pack(spikes), bad), h, w)
    assert (out.reshape(5, -1)[:, to] == spikes.reshape(5, -1)[:, source]).all() and (out[:, ~bad] == spikes[:, ~bad]).all()

def test_masks_belong_to_the_sensor(tmp_path):
    kinds = np.zeros((6, 8), np.uint8); kinds[0, 2] = 3
    spikes = noise(4, 6, 8)
    write_dat(tmp_path/"a.dat", spikes, flip_rows=True)
    up, down = open_recording(tmp_path/"a.dat", 6, 8, True), open_recording(tmp_path/"a.dat", 6, 8)
    save_mask(tmp_path/"m.npy", kinds, up.flip_rows)
    assert (load_mask(tmp_path/"m.npy", up) == kinds).all() and (load_mask(tmp_path/"m.npy", down) == kinds[::-1]).all()
    np.save(tmp_path/"n.npy", kinds[:3])
    assert "a mask of [3, 8]" in complaint(load_mask, tmp_path/"n.npy", up) and "no such mask" in complaint(load_mask, tmp_path/"o.npy", up)

@settings(max_examples=40, deadline=None)
@given(h=st.integers(1, 20), w=st.integers(1, 60), data=st.data())
def test_crop_is_the_middle(h, w, data):
    height, width = data.draw(st.integers(1, h)), data.draw(st.sampled_from(sorted({1, w, max(1, w//16*8), (w + 1)//2})))
    spikes, top, left = noise(3, h, w), (h - height)//2, (w - width)//2
    assert (unpack(centre_crop(pack(spikes), (h, w), (height, width)), height, width) == spikes[:, top:top+height, left:left+width]).all()
    complaint(centre_crop, pack(spikes), (h, w), (h + 1, w))

# samples

@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 3000), frames=st.integers(1, 400), stride=st.none() | st.integers(1, 400), samples=st.none() | st.integers(1, 40))
def test_samples_lie_inside_and_differ(n, frames, stride, samples):
    cut = Cut(frames, stride)
    if n < frames or samples and samples > n - frames + 1:
        complaint(sample_starts, n, cut, samples)
        return
    starts = sample_starts(n, cut, samples)
    assert min(starts) >= 0 and max(starts) + frames <= n and len(set(starts)) == len(starts) == (samples or (n - frames)//(stride or frames) + 1)
    if samples and samples > 1: assert starts[0] == 0 and starts[-1] == n - frames

def films(folder, height=24, width=32, frames=60, classes=("left", "right"), people=("anna", "ben", "cleo")):
    for i, name in enumerate(f"{c}/{p}/1.dat" for c in classes for p in people):
        (folder/name).parent.mkdir(parents=True)
        write_dat(folder/name, noise(frames, height, width, i), flip_rows=True)
    return folder_sources(folder, height=height, width=width, flip_rows=True)

CUT = Cut(frames=20, height=16, width=24)

def test_a_row_that_no_data_set_takes_is_told_before_anything_is_cut(tmp_path):
    sources = [replace(s, split="val") for s in films(tmp_path/"films")]
    with pytest.raises(StreamError, match="1.dat: 'split' is 'val'"): slice_recordings(sources, tmp_path/"set", CUT, progress=False)
    assert not (tmp_path/"set").exists()

def test_samples_are_the_frames_they_say(tmp_path):
    sources = films(tmp_path/"films")
    assert slice_recordings(sources, tmp_path/"set", CUT, progress=False) == [] and check(tmp_path/"set") == []
    rows = read_metadata(tmp_path/"set")
    assert len(rows) == 18 and {r["group"] for r in rows} == {"anna", "ben", "cleo"} and {r["label"] for r in rows} == {"left", "right"}
    for r in rows:
        label, person = r["file"].split("/")[0], r["file"].split("/")[1].split("_")[0]
        seen = read_dat(tmp_path/"films"/label/person/"1.dat", 24, 32, r["start"], 20, flip_rows=True)
        assert (read_dat(tmp_path/"set"/r["file"], 16, 24) == seen[:, 4:20, 4:28]).all() and (r["label"], r["group"], r["rate_hz"]) == (label, person, 20000)
    assert len(SpikeDataset(tmp_path/"set", segments=2)) == 18

def test_samples_among_the_recordings_are_no_recordings(tmp_path):
    first = films(tmp_path/"films")
    slice_recordings(first, tmp_path/"films"/"set", CUT, progress=False)
    assert folder_sources(tmp_path/"films", height=24, width=32, flip_rows=True) == first

def test_classes_behind_links(tmp_path):
    own = films(tmp_path/"films")
    (tmp_path/"links").mkdir()
    for name in ("left", "right"): (tmp_path/"links"/name).symlink_to(tmp_path/"films"/name)
    linked = folder_sources(tmp_path/"links", height=24, width=32, flip_rows=True)
    assert [(s.label, s.group, s.name) for s in linked] == [(s.label, s.group, s.name) for s in own] and len(own) == 6

def test_a_class_of_96_from_any_number_of_recordings(tmp_path):
    for label, people in (("left", 5), ("right", 7)):
        for i in range(people):
            (tmp_path/label).mkdir(exist_ok=True)
            with open(tmp_path/label/f"{i}.dat", "wb") as f: f.truncate(2000*13000)
    plan, failed = plan_samples(folder_sources(tmp_path, height=250, width=416), Cut(per_class=96))
    assert not failed and [len(p) for p in plan] == [20, 19, 19, 19, 19] + [14]*5 + [13]*2
    rows = [r for p in plan for r in p]
    assert len({r["file"] for r in rows}) == 192 and {(r["height"], r["width"], r["frames"]) for r in rows} == {(240, 320, 250)}
    groups = {}
    for r in rows: groups.setdefault(r["group"], set()).add(r["split"])
    assert all(len(s) == 1 for s in groups.values()) and len(groups) == 12

def test_again_makes_only_what_is_missing_or_otherwise(tmp_path):
    sources, out = films(tmp_path/"films"), tmp_path/"set"
    def run(cut=CUT):
        before = {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in out.rglob("*.dat")}
        assert slice_recordings(sources, out, cut, progress=False) == []
        return [f for f in sorted(out.rglob("*.dat")) if before.get(f, (0,))[0] != f.stat().st_mtime_ns], before
    first, _ = run()
    assert len(first) == 18 and run()[0] == []
    kept = {f: f.read_bytes() for f in first}
    first[3].unlink(); first[5].write_bytes(b"short")
    again, _ = run()
    assert again == [first[3], first[5]] and {f: f.read_bytes() for f in first} == kept
    write_dat(sources[1].file, noise(60, 24, 32, 77), flip_rows=True)
    assert len(run()[0]) == 3
    assert len(run(Cut(frames=20, height=16, width=24, mask="estimate"))[0]) == 18
    assert "holds 18 samples that this would not make" in complaint(run, Cut(frames=30, samples=1, height=16, width=24))
    assert "give all recordings" in complaint(slice_recordings, sources[:2], out, CUT)

def test_a_bad_recording_does_not_stop_the_rest(tmp_path):
    sources = films(tmp_path/"films")
    (tmp_path/"films/left/ben/1.dat").write_bytes(b"x"*100)
    np.save(tmp_path/"films/right/two.npy", 2*noise(60, 24, 32))
    failed = slice_recordings(folder_sources(tmp_path/"films", height=24, width=32), tmp_path/"set", CUT, progress=False)
    assert {os.path.basename(f["file"]) for f in failed} == {"1.dat", "two.npy"} and "100 bytes" in failed[0]["reason"]
    assert len(read_metadata(tmp_path/"set")) == 15 and len((tmp_path/"set/failed.jsonl").read_text().splitlines()) == 2
    assert check(tmp_path/"set") == []

def test_killed_in_the_middle_it_goes_on(tmp_path):
    sources = films(tmp_path/"films", frames=400)
    code = f"""
import os, signal
from spklip.data import recordings as r
n, write = 0, r._write_sample
def dies(*a):
    global n
    n += 1
    if n == 40: os.kill(os.getpid(), signal.SIGKILL)
    write(*a)
r._write_sample = dies
sources = r.folder_sources({str(tmp_path/'films')!r}, height=24, width=32, flip_rows=True)
r.slice_recordings(sources, {str(tmp_path/'set')!r}, r.Cut(frames=20, height=16, width=24), progress=False)"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert len(list((tmp_path/"set").rglob("*.dat"))) == 39
    left = next((tmp_path/"set").rglob("*.dat")).parent/".x.7.part.dat"
    left.touch() # as a kill in the middle of a sample leaves it
    assert left.match(HALF_WRITTEN)
    cut = Cut(frames=20, height=16, width=24)
    for out in ("set", "alone"): slice_recordings(sources, tmp_path/out, cut, progress=False)
    one, two = ({f.relative_to(tmp_path/out): f.read_bytes() for f in (tmp_path/out).rglob("*") if f.is_file() and f.name != ".lock"}
                for out in ("set", "alone"))
    assert one == two and len(one) == 121

def test_what_is_overwritten_is_no_longer_listed(tmp_path, monkeypatch):
    "Stopped with other settings before anything was noted, then run with the old ones: no sample keeps the others' bits."
    sources = films(tmp_path/"films")
    slice_recordings(sources, tmp_path/"set", CUT, progress=False)
    before, write, n = {f: f.read_bytes() for f in (tmp_path/"set").rglob("*.dat")}, recordings._write_sample, iter(range(99))
    def dies(*how):
        if next(n) == 4: monkeypatch.setattr(recordings, "_keep", lambda *how: None); raise KeyboardInterrupt # as a kill does
        write(*how)
    with monkeypatch.context() as m:
        m.setattr(recordings, "_write_sample", dies)
        with pytest.raises(KeyboardInterrupt): slice_recordings(sources, tmp_path/"set", replace(CUT, height=8), progress=False)
    monkeypatch.undo()
    assert sum(f.read_bytes() != bits for f, bits in before.items()) == 4
    slice_recordings(sources, tmp_path/"set", CUT, progress=False)
    assert all(f.read_bytes() == bits for f, bits in before.items())

def test_splits_do_not_hang_on_what_can_be_read(tmp_path):
    "And a recording that cannot be is told, also where it could be before."
    for person in range(8):
        for label in ("walk", "wave"):
            (tmp_path/"films"/label).mkdir(parents=True, exist_ok=True)
            write_dat(tmp_path/"films"/label/f"{person}.dat", noise(60, 24, 32))
    sources = folder_sources(tmp_path/"films", height=24, width=32)
    slice_recordings(sources, tmp_path/"set", CUT, progress=False)
    splits = {r["group"]: r["split"] for r in read_metadata(tmp_path/"set")}
    cut = {f: f.stat().st_mtime_ns for f in (tmp_path/"set").rglob("*.dat")}
    for source in sources:
        whole = source.file.read_bytes(); source.file.write_bytes(b"x")
        failed = slice_recordings(sources, tmp_path/"set", CUT, progress=False)
        there = {r["group"]: r["split"] for r in read_metadata(tmp_path/"set")}
        assert [f["file"] for f in failed] == [str(source.file)] and there == {g: s for g, s in splits.items() if g in there} and len(there) == 15
        assert check(tmp_path/"set") == []
        source.file.write_bytes(whole)
    slice_recordings(sources, tmp_path/"set", CUT, progress=False)
    assert len(read_metadata(tmp_path/"set")) == len(cut) == 48 and not (tmp_path/"set"/"unused.jsonl").exists()
    assert cut == {f: f.stat().st_mtime_ns for f in (tmp_path/"set").rglob("*.dat")} # what came back was not cut again

def test_values_of_a_json_list_are_checked(tmp_path):
    "A class may be a number, and so may a name; a place in a recording is a whole one."
    write = lambda **row: (tmp_path/"a.jsonl").write_text(json.dumps(dict(file="a.dat", label="a") | row) + "\n")
    write(label=5, name=7, group=3, rate_hz=1000)
    source = read_list(tmp_path/"a.jsonl")[0]
    assert (source.label, source.name, source.group, source.rate_hz) == ("5", "7", "3", 1000.) and type(source.rate_hz) is float
    for name, value in dict(start=10.5, stop=True, label=[1], flip_rows=1, caption=0.5).items():
        write(**{name: value})
        assert f"recording 1 is not one (ValueError: {name} is {value!r}, expected " in complaint(read_list, tmp_path/"a.jsonl")

def test_a_list_has_any_text_in_its_fields(tmp_path):
    said = "first\u2028second"
    (tmp_path/"a.jsonl").write_text(json.dumps(dict(file="a.dat", label="a", caption=said), ensure_ascii=False) + "\n", encoding="utf8")
    (tmp_path/"a.csv").write_text('file,label,caption\na.dat,a,"one\ntwo"\n')
    assert read_list(tmp_path/"a.jsonl")[0].caption == said and read_list(tmp_path/"a.csv")[0].caption == "one\ntwo"

def test_lists(tmp_path):
    films(tmp_path/"films")
    with open(tmp_path/"list.csv", "w") as f:
        out = csv.DictWriter(f, ["file", "label", "group", "flip_rows", "height", "width", "start", "stop", "rate_hz", "split"])
        out.writeheader()
        out.writerow(dict(file="films/left/anna/1.dat", label="wave", group="anna", flip_rows="True", height=24, width=32, start=10, stop=40,
                          rate_hz=1000, split="test"))
        out.writerow(dict(file="films/left/ben/1.dat", label="clap", flip_rows="0", height=24, width=32, split="train"))
    (tmp_path/"list.jsonl").write_text("\n".join(json.dumps(r) for r in (
        dict(file="films/left/anna/1.dat", label="wave", group="anna", flip_rows=True, height=24, width=32, start=10, stop=40, rate_hz=1000.0, split="test"),
        dict(file="films/left/ben/1.dat", label="clap", flip_rows=False, height=24, width=32, split="train"))) + "\n")
    a, b = read_list(tmp_path/"list.csv"), read_list(tmp_path/"list.jsonl")
    assert a == b and a[0].start == 10 and a[1].flip_rows is False
    slice_recordings(a, tmp_path/"set", CUT, progress=False)
    rows = read_metadata(tmp_path/"set")
    assert [(r["label"], r["group"], r["split"], r["start"], r["rate_hz"])
            for r in rows] == [("wave", "anna", "test", 10, 1000)] + [("clap", "films/left/ben/1", "train", s, 20000) for s in (0, 20, 40)]
    for name, text, says in (("bad.csv", "file,label\n,\n", "recording 1"),
                             ("bad.jsonl", '{"file": "a", "label": "b"}\n{"file": 3', "recording 2 is not one"),
                             ("odd.csv", "file,label,colour\na,b,red\n", "colour"),
                             ("none.csv", "file,label\n", "lists no recordings"), ("word.csv", "file,label,height\na,b,tall\n", "tall")):
        (tmp_path/name).write_text(text)
        assert says in complaint(read_list, tmp_path/name)
    assert "no such file" in complaint(read_list, tmp_path/"absent.csv").lower()
    assert "has no split" in complaint(plan_samples, [Source(a[0].file, "x", split="test", height=24, width=32),
                                                      Source(a[1].file, "y", height=24, width=32)], CUT)


def test_stretches_of_a_recording_stay_together(tmp_path):
    "Whatever they are called; where the list says who is seen, that counts."
    write_dat(tmp_path/"long.dat", noise(400, 8, 8)); write_dat(tmp_path/"other.dat", noise(400, 8, 8))
    (tmp_path/"list.csv").write_text("file,label,name,start,stop\n" + "".join(f"long.dat,a,part-{i},{100*i},{100*i + 100}\n" for i in range(4))
                                     + "other.dat,a,,,\n")
    sources = read_list(tmp_path/"list.csv", height=8, width=8)
    rows = [row for part in plan_samples(sources, Cut(frames=50, height=0, width=0))[0] for row in part]
    assert {r["group"] for r in rows} == {"long", "other"} and all(len({r["split"] for r in rows if r["group"] == g}) == 1 for g in ("long", "other"))
    plain = [replace(s, group="") for s in sources] # not from a list
    assert {row["group"] for part in plan_samples(plain, Cut(frames=50, height=0, width=0))[0] for row in part} == {"long", "other"}


def test_what_was_drawn_is_not_cut_into(tmp_path):
    write_dat(tmp_path/"a.dat", noise(60, 8, 8))
    (tmp_path/"set").mkdir(); (tmp_path/"set"/"settings.json").write_text("{}")
    assert "holds SpikeActions" in complaint(slice_recordings, [Source(tmp_path/"a.dat", "a", height=8, width=8)], tmp_path/"set",
                                             Cut(frames=50, height=0, width=0))


def test_metadata_is_read_once_and_seen_when_it_changes(tmp_path):
    row = lambda name, width: json.dumps(dict(file=name, height=8, width=width)) + "\n"
    (tmp_path/"metadata.jsonl").write_text(row("a.dat", 8) + row("b.dat", 16))
    assert [metadata_of(tmp_path/f"{n}.dat").get("width") for n in "abc"] == [8, 16, None]
    (tmp_path/"metadata.jsonl").write_text(row("a.dat", 24))
    assert metadata_of(tmp_path/"a.dat")["width"] == 24

def test_samples_of_two_recordings_may_not_share_names(tmp_path):
    sources = films(tmp_path/"films")
    assert "give one of them a name" in complaint(plan_samples, [Source(s.file, "all", height=24, width=32) for s in sources], CUT)

@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
def test_a_long_recording_takes_no_memory(tmp_path):
    "400 MB of spikes, counted, mended and cut by a process that may take 200 MB more than it had before."
    code = f"""
import resource
from pathlib import Path
import numpy as np
from spklip.data.recordings import *
folder = Path({str(tmp_path)!r})
def cut(name, n):
    np.lib.format.open_memmap(folder/name, "w+", np.uint8, (n, 250, 400))
    slice_recordings([Source(folder/name, "a")], folder/f"{{name}} set", Cut(mask="estimate", samples=4), progress=False)
cut("short.npy", 300)
data = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (1024*data + 200*2**20,)*2)
cut("long.npy", 4000)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(read_metadata(tmp_path/"long.npy set")) == 4

# the command

@pytest.fixture
def recorded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spikes = simulate(np.full((300, 24, 32), 0.5, np.float32), charge="random", noise=SensorNoise(dead=0.01, hot=0.01, seed=1))
    write_dat("a.dat", spikes, flip_rows=True); np.save("a.npy", spikes[:, ::-1]); np.savez_compressed("a.npz", one=spikes[:, ::-1], two=spikes)
    Image.fromarray((255*spikes.mean(0)).astype(np.uint8)).save("a.png")
    return spikes

HOW = dict(dat=("a.dat", "--height", "24", "--width", "32"), npy=("a.npy",), npz=("a.npz", "--key", "one"))

def test_a_picture_that_is_none_is_no_evidence(recorded, capsys):
    open("a.png", "w").write("no picture")
    assert cli.main(["info", *HOW["dat"]]) == 0 and "not in the bits" in capsys.readouterr().out

@pytest.mark.parametrize("kind", HOW)
def test_look_at_any_kind(recorded, kind, capsys):
    assert cli.main(["info", *HOW[kind], "--rate", "1000", "--mask", "mask.npy"]) == 0
    out = capsys.readouterr().out
    dead, hot = (recorded.sum(0) == 0).sum(), (recorded.sum(0) == 300).sum()
    assert dead > 2 and hot > 2
    for words in ("24 x 32 pixels, 300 frames", "300.0 ms", f"{recorded.mean():.4f}", f"{hot} (", f"{dead} (",
                  f"{dead} dead, 0 dark, {hot} hot, 0 line", "bottom-up, give --flip-rows"):
        assert words in out
    assert (np.load("mask.npy")[::-1] > 0).sum() == dead + hot
    for mask in ("--mask", "--mask=mask.npy"):
        assert cli.main(["view", *HOW[kind], "--flip-rows", mask, "--out", "v.png"]) == 0
        seen = np.asarray(Image.open("v.png")).astype(int)
        assert seen.std() < 40 and seen.min() > 0
    cli.main(["view", *HOW[kind], "--flip-rows", "--out", "v.png"])
    assert np.asarray(Image.open("v.png")).min() == 0

def test_slice_command(recorded, capsys):
    words = "slice a.dat a.npy --label wave --height 24 --width 32 --flip-rows --frames 100 --stride 50 --crop 16x24 --mask mask.npy --out set"
    assert cli.main(words.split()) == 2
    assert "no such" in capsys.readouterr().err
    size, cut = "--height 24 --width 32 --flip-rows", "--frames 100 --stride 50 --crop 16x24 --mask"
    words = f"slice a.dat --label wave --group anna {size} {cut} --rate 1000 --out set".split()
    assert cli.main(words) == 0 and check("set") == []
    rows = read_metadata("set")
    assert [(r["start"], r["label"], r["group"], r["split"], r["rate_hz"]) for r in rows] == [(s, "wave", "anna", "train", 1000) for s in range(0, 201, 50)]
    made = read_dat("set/" + rows[0]["file"], 16, 24)
    bad = np.isin(recorded.sum(0), (0, 300))[4:20, 4:28]
    assert (made[:, ~bad] == recorded[:100, 4:20, 4:28][:, ~bad]).all() and (made.sum(0) > 0).all() and (made.sum(0) < 100).all()

@pytest.mark.parametrize("words, says", [
    ("slice a.dat --out set --height 24 --width 32", "give --label"), ("slice a.dat --label a --out set", "give --height and --width"),
    ("slice none.dat --label a --out set", "none.dat: no such file"),
    ("slice a.npy --label a --out set", "a crop of 240 x 320 does not fit"),
    ("slice a.npy --label a --out set --crop all --frames 400", "300 frames, a sample takes 400"),
    ("slice a.npy --label a --out set --crop all --samples 99", "no 99 different samples"),
    ("slice a.npz --label a --out set --crop all", "give the key"), ("slice . --out set", "no recordings in folders"),
    ("slice none.csv --out set", "none.csv"), ("slice a.npy --label a --out set --crop 12", "no size such as 240x320"),
    ("slice a.npy --label a --out set --samples 2 --stride 3", "not allowed with"),
    ("info a.npz", "holds 2 arrays"), ("view a.npy --mask none.npy", "no such mask"), ("view a.npy --mask text.npy", "text.npy: holds <U1, a mask is uint8"),
    ("info a.npy --mask a.npy", "--mask a.npy: here it is what is written"),
    ("info a.dat --height 24 --width 32 --mask a.dat", "give it a name of its own that ends in .npy"),
    ("slice a.npy --label a --crop all --frames 20 --out .", "--out .: samples would lie among the recordings")])
def test_errors_are_one_line(recorded, capsys, words, says):
    before = Path("a.dat").read_bytes(), Path("a.npy").read_bytes(); np.save("text.npy", np.full((24, 32), "x"))
    try: code = cli.main(words.split())
    except SystemExit as end: code = end.code
    err = capsys.readouterr().err
    assert code == 2 and err.count("\n") == 1 and says in err and "Traceback" not in err
    assert (Path("a.dat").read_bytes(), Path("a.npy").read_bytes()) == before

@pytest.mark.parametrize("out", ["films", "films/left", "."])
def test_samples_do_not_lie_among_recordings(tmp_path, monkeypatch, capsys, out):
    monkeypatch.chdir(tmp_path); films(Path("films"))
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(f"slice films --out {out} --height 24 --width 32 --crop all --frames 20".split()) == 2
    assert f"--out {out}: samples would lie among the recordings" in capsys.readouterr().err and sorted(tmp_path.rglob("*")) == before

# real ones

def test_car():
    if not (path := real_data("spikes/real/car.dat")): pytest.skip("car.dat is not here")
    found = health(open_recording(path, 250, 400, flip_rows=True))
    assert found.saturated == 1717 and found.silent == 0 and found.bad["dead"] == found.bad["line"] == 0 and found.kinds[100:110, 60:68].any()
    assert not (found.kinds[found.counts == 200] > 0).any() and sum(found.bad.values()) < 100
    assert likely_sizes(path)[0][:3] == (250, 400, 200)

def test_reds():
    if not (folder := real_data("spikes/reds")): pytest.skip("the REDS streams are not here")
    for path in folder.glob("*.dat"):
        recording = open_recording(path, 250, 400)
        assert not health(recording).kinds.any() and row_order(recording, np.asarray(Image.open(path.with_suffix(".png")))).startswith("bottom-up")
