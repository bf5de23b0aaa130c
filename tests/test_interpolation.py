"Frames between frames: what comes in comes out, moments are where they should be, spikes do not depend on the way they were made"
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from spklip.camera import SpikeCamera
from spklip.data.interpolation import blend, blend_spikes, in_between, stretches

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
       theta=st.sampled_from([0.2, 0.6, 1.0, 1.7, 5.0, 130.0, 200.0, 0.123]), charge=st.sampled_from(["random", 0.0, 0.5, 7.3]), seed=st.integers(0, 3), data=st.data())
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
