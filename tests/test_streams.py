"Recordings on disk: what is read is what was written, or one clear line"
import os
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from spklip.data.streams import SpikeStream, StreamError, clip_index, count_frames, frame_bytes, read_dat, write_dat

def noise(frames, height, width, seed=0): return (np.random.default_rng(seed).random((frames, height, width)) < 0.3).astype(np.uint8)

def complaint(call, *args, **kwargs):
    with pytest.raises(StreamError) as e: call(*args, **kwargs)
    assert "\n" not in str(e.value)
    return str(e.value)

@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 5), h=st.integers(1, 9), w=st.integers(1, 17), flip=st.booleans(), seed=st.integers(0, 99))
def test_round_trip_of_any_size(tmp_path_factory, n, h, w, flip, seed):
    path, spikes = tmp_path_factory.mktemp("dat")/"a.dat", noise(n, h, w, seed)
    assert write_dat(path, spikes, flip_rows=flip) == n == count_frames(path, h, w)
    assert path.stat().st_size == n*-(-h*w//8)
    assert (read_dat(path, h, w, flip_rows=flip) == spikes).all()
    assert (read_dat(path, h, w) == (spikes[:, ::-1] if flip else spikes)).all()
    packed = read_dat(path, h, w, flip_rows=flip, packed=True)
    write_dat(path, packed, h, w, flip_rows=flip)
    assert (SpikeStream(path, h, w, flip).spikes() == spikes).all()

def test_layout_is_the_one_cameras_write(tmp_path):
    spikes = noise(3, 4, 10)
    write_dat(tmp_path/"a.dat", spikes)
    raw = (tmp_path/"a.dat").read_bytes()
    assert all(raw[t*5 + p//8] >> p % 8 & 1 == spikes[t].ravel()[p] for t in range(3) for p in range(40))

def test_tensors_bools_and_chunks_are_written_alike(tmp_path):
    spikes = noise(7, 5, 7)
    for name, form in dict(array=spikes, tensor=torch.from_numpy(spikes), bools=spikes.astype(bool), chunks=(spikes[i:i+2] for i in range(0, 7, 2))).items():
        write_dat(tmp_path/name, form)
    assert len({(tmp_path/name).read_bytes() for name in ("array", "tensor", "bools", "chunks")}) == 1

@pytest.mark.parametrize("size,expected", [(0, "at least 12,500"), (12499, "at least 12,500"), (12501, "12,500 or 25,000"), (24999, "12,500 or 25,000")])
def test_a_size_that_does_not_fit_is_named(tmp_path, size, expected):
    (tmp_path/"a.dat").write_bytes(bytes(size))
    for call in (count_frames, read_dat, SpikeStream):
        said = complaint(call, tmp_path/"a.dat", 250, 400)
        assert str(tmp_path/"a.dat") in said and f"{size:,} bytes" in said and expected in said

@pytest.mark.parametrize("height,width", [(250, 400), (250, 416), (240, 320), (1000, 1000)])
def test_sensors_that_fit_are_suggested(tmp_path, height, width):
    (tmp_path/"a.dat").write_bytes(bytes(3*frame_bytes(height, width)))
    assert f"{height} x {width} (3 frames)" in complaint(read_dat, tmp_path/"a.dat", 333, 333)

@pytest.mark.parametrize("height,width", [(0, 400), (-1, 400), (250, 0), (2.5, 400)])
def test_a_size_that_is_no_size(tmp_path, height, width):
    write_dat(tmp_path/"a.dat", noise(1, 8, 8))
    said = complaint(read_dat, tmp_path/"a.dat", height, width)
    assert "a.dat" in said and f"{height} x {width}" in said

def test_missing_folder_unreadable(tmp_path, monkeypatch):
    assert "no such file" in complaint(read_dat, tmp_path/"none.dat", 8, 8)
    assert "a folder" in complaint(read_dat, tmp_path, 8, 8)
    write_dat(tmp_path/"a.dat", noise(2, 8, 8))
    def refuse(*args, **kwargs): raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(np, "fromfile", refuse)
    monkeypatch.setattr(np, "memmap", refuse)
    for call in (read_dat, SpikeStream): assert "a.dat: permission denied" in complaint(call, tmp_path/"a.dat", 8, 8)

@pytest.mark.parametrize("start,frames", [(-1, 2), (0, 11), (9, 2), (10, None), (0, 0), (0, -1)])
def test_never_a_shorter_run(tmp_path, start, frames):
    write_dat(tmp_path/"a.dat", noise(10, 8, 8))
    assert "frames 0 to 9" in complaint(read_dat, tmp_path/"a.dat", 8, 8, start, frames)

def test_stream_picks_frames_and_refuses_others(tmp_path):
    spikes = noise(30, 6, 9)
    write_dat(tmp_path/"a.dat", spikes)
    stream = SpikeStream(tmp_path/"a.dat", 6, 9)
    index = np.array([29, 0, 0, 7])
    assert len(stream) == 30
    assert (np.unpackbits(stream.packed(index), axis=-1, bitorder="little", count=54).reshape(4, 6, 9) == spikes[index]).all()
    for bad in ([30], [-1]): complaint(stream.packed, bad)

def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    old = noise(2, 8, 8)
    write_dat(tmp_path/"a.dat", old)
    def full():
        yield old
        raise OSError(28, "No space left on device")
    with pytest.raises(OSError): write_dat(tmp_path/"a.dat", full())
    complaint(write_dat, tmp_path/"b.dat", iter(()))
    complaint(write_dat, tmp_path/"b.dat", [old, noise(1, 8, 9)])
    complaint(write_dat, tmp_path/"b.dat", 2*old)
    complaint(write_dat, tmp_path/"b.dat", np.zeros((3, 8), np.uint8))
    complaint(write_dat, tmp_path/"b.dat", np.zeros((3, 9), np.uint8), 8, 8)
    assert os.listdir(tmp_path) == ["a.dat"] and (read_dat(tmp_path/"a.dat", 8, 8) == old).all()

def test_a_full_device_leaves_nothing(tmp_path, monkeypatch):
    def full(fd): raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError): write_dat(tmp_path/"a.dat", noise(2, 8, 8))
    assert os.listdir(tmp_path) == []

@settings(max_examples=80, deadline=None)
@given(n=st.integers(250, 5000), phase=st.floats(0, 1))
def test_clip_index_spreads_without_overlap(n, phase):
    index = clip_index(n, phase=phase).reshape(25, 10)
    share = n/25
    assert index.min() >= 0 and index.max() < n and (np.diff(index.ravel()) > 0).all() and (np.diff(index, axis=1) == 1).all()
    assert (index[:, 0] > np.arange(25)*share - 1).all() and (index[:, -1] < (np.arange(25) + 1)*share).all()

def test_what_is_between_nought_and_one_is_no_spike(tmp_path):
    for wrong in (np.full((2, 8, 8), 0.7), np.full((2, 8, 8), np.nan), np.full((2, 8, 8), 2, np.uint8), np.full((2, 8, 8), -1, np.int8)):
        with pytest.raises(StreamError, match="spikes are 0 or 1"): write_dat(tmp_path/"a.dat", wrong)
    assert write_dat(tmp_path/"a.dat", np.eye(8)[None]) == 1 and os.listdir(tmp_path) == ["a.dat"]

def test_clip_index_ends():
    assert (clip_index(250, phase=1) == np.arange(250)).all()
    assert clip_index(2000, phase=0)[0] == 0 and clip_index(2000, phase=1)[-1] == 1999
    assert "249 frames" in complaint(clip_index, 249)
