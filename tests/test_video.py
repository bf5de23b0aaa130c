"Video as light: every frame, at the size asked for, of the right clip"
from fractions import Fraction
from functools import partial
import av
import numpy as np
import pytest
from spklip.data.frames import rgb_frames
from spklip.data.streams import StreamError
from spklip.data.video import (ARID, WEIZMANN, VideoClip, arid, crop_box, decode, frame_rate, length,
                               resample, video_view, weizmann, window)

def images(n=30, h=48, w=64):
    y, x = np.mgrid[:h, :w]
    return np.stack([np.where((y - 24)**2 + (x - 8 - 1.5*t)**2 < 60, 220, 40 + x).astype(np.uint8) for t in range(n)])

def film(path, frames, fps=25, codec="mpeg4", aspect=1, turn=0):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options={"qscale": "2"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:], "yuv420p"
        stream.sample_aspect_ratio = aspect
        stream.set_display_rotation(turn)
        for f in frames: container.mux(stream.encode(av.VideoFrame.from_ndarray(np.repeat(f[..., None], 3, -1), format="rgb24")))
        container.mux(stream.encode())
    return path

def clip(video, name, **more):
    return VideoClip(**dict(video=video, name=name, label="roll", prompt="a disc rolls", caption="a disc rolls", group=name, split="train", source=name) | more)
def light(height, width, n=30): return np.round(resample(images(n), height, width)).astype(np.uint8)

@pytest.mark.parametrize("name", ["a.mp4", "a.avi"])
def test_decode_gives_every_frame_in_full_range(tmp_path, name):
    key = decode(film(tmp_path/name, images(), fps=30))
    assert key.shape == (30, 48, 64) and key.dtype == np.uint8 and frame_rate(tmp_path/name) == 30
    assert np.abs(key.astype(float) - images()).mean() < 4
    assert decode(tmp_path/name, 24, 30).shape == (30, 24, 30) and length(tmp_path/name) == 30
    assert decode(tmp_path/name, gamma=0.45).mean() > key.mean()

@pytest.mark.parametrize("turn", [0, 90, 180, -90])
def test_a_turned_video_is_seen_upright(tmp_path, turn):
    path = film(tmp_path/"a.mp4", np.rot90(images(), -turn//90, (1, 2)), turn=turn)
    with av.open(str(path)) as container: assert abs(next(container.decode(video=0)).rotation) == abs(turn)
    assert decode(path).shape == (30, 48, 64) and np.abs(decode(path).astype(float) - images()).mean() < 4
    assert np.abs(rgb_frames(path, 30).mean(1) - images()).mean() < 4

@pytest.mark.parametrize("aspect", [Fraction(2), Fraction(1, 2)])
def test_pixels_that_are_not_square_are_made_so(tmp_path, aspect):
    shown = resample(images(), 48, int(64*aspect))
    path = film(tmp_path/"a.mp4", images(), aspect=aspect)
    assert np.abs(decode(path) - shown).mean() < 4 and np.abs(rgb_frames(path, 30).mean(1) - shown).mean() < 4
    for fit in ("crop", "pad"):
        box = crop_box(48, 64*aspect, 24, 24, fit)
        assert np.abs(decode(path, 24, 24, fit) - resample(shown, 24, 24, box, hold=fit == "crop")).mean() < 4

def test_what_is_no_video_is_named(tmp_path):
    film(tmp_path/"whole.avi", images(60))
    whole = (tmp_path/"whole.avi").read_bytes()
    (tmp_path/"empty.avi").touch()
    (tmp_path/"text.avi").write_text("not a video, not at all")
    (tmp_path/"cut.avi").write_bytes(whole[:len(whole)//3])
    for name in ("empty.avi", "text.avi", "cut.avi", "none.avi"):
        with pytest.raises(StreamError): length(tmp_path/name)
        with pytest.raises(StreamError) as e: decode(tmp_path/name)
        assert name in str(e.value) and "\n" not in str(e.value)

@pytest.mark.parametrize("frames", [2, 5, 60])
def test_what_declares_seconds_and_no_frames_is_whole_or_named(tmp_path, frames):
    path = film(tmp_path/"a.mkv", images(frames))
    assert length(path) == frames
    if frames < 60: return
    path.write_bytes(path.read_bytes()[:path.stat().st_size*6//10])
    with pytest.raises(StreamError, match=r"a.mkv: cut short, \d\.\d of the 2.4 seconds it declares"): length(path)

def test_a_cut_avi_is_named_though_its_container_guesses_a_shorter_one(tmp_path):
    path = film(tmp_path/"a.avi", images(60))
    assert length(path) == 60
    path.write_bytes(path.read_bytes()[:path.stat().st_size*8//10])
    with pytest.raises(StreamError, match=r"a.avi: cut short, 1\.\d of the 2.4 seconds it declares"): length(path)

def remuxed(path, out, seconds=0., skip=0.):
    "The same pictures, with sound of some seconds beside them, or with those before some second hidden by an edit list."
    with av.open(str(path)) as source, av.open(str(out), "w", options={"avoid_negative_ts": "disabled"}) as container:
        stream, sound = container.add_stream_from_template(source.streams.video[0]), container.add_stream("pcm_s16le", rate=8000,
            layout="mono") if seconds else None
        for packet in source.demux(video=0):
            if packet.dts is None: continue
            shift = round(skip/packet.time_base)
            packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
            container.mux(packet)
        for k in range(round(10*seconds)):
            tone = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
            tone.sample_rate, tone.pts, tone.time_base = 8000, 800*k, Fraction(1, 8000)
            container.mux(sound.encode(tone))
        if sound: container.mux(sound.encode())
    return out

def test_sound_that_goes_on_and_hidden_frames_are_no_cut(tmp_path):
    whole = film(tmp_path/"a.mp4", images(60))
    for name in ("sound.mkv", "sound.mov"): assert length(remuxed(whole, tmp_path/name, seconds=9.)) == 60
    shown = length(remuxed(whole, tmp_path/"hidden.mp4", skip=1.2))
    assert shown < 40
    path = remuxed(whole, tmp_path/"cut.mkv", seconds=9.)
    path.write_bytes(path.read_bytes()[:whole.stat().st_size//2]) # pictures come first
    with pytest.raises(StreamError, match=r"cut.mkv: cut short, \d\.\d of the 2.4 seconds it declares"): length(path)

def test_resample_keeps_means_edges_and_identity():
    x = np.random.default_rng(0).uniform(0, 255, (3, 40, 60))
    assert np.allclose(resample(x, 40, 60), x, atol=1e-3)
    assert np.allclose(resample(np.full((2, 9, 9), 7.0), 5, 4, (-20, -20, 60, 60)), 7)
    assert resample(np.ones((9, 9)), 4, 4, (20, 20, 8, 8), hold=False).max() == 0
    assert np.allclose(resample(x, 8, 12).mean((1, 2)), x.mean((1, 2)), rtol=0.02)
    moving = resample(x[:1], 40, 30, (0, np.array([0, 10, 30]), 40, 30))
    assert np.allclose(moving, np.stack([x[0, :, k:k+30] for k in (0, 10, 30)]), atol=1e-3)

@pytest.mark.parametrize("h,w", [(240, 320), (240, 560), (144, 180), (500, 100)])
def test_boxes_keep_the_aspect(h, w):
    for fit in ("crop", "pad"):
        top, left, tall, broad = crop_box(h, w, 240, 320, fit)
        assert broad/tall == pytest.approx(320/240) and top == pytest.approx((h - tall)/2) and left == pytest.approx((w - broad)/2)
        assert (tall <= h + 1e-9 and broad <= w + 1e-9) if fit == "crop" else (tall >= h - 1e-9 and broad >= w - 1e-9)

def silhouettes(path, actors="abcdefghi"):
    "Walkers drawn as blocks that move, in Weizmann's format."
    masks = {}
    for k, actor in enumerate(actors):
        for action in WEIZMANN:
            m = np.zeros((50, 144, 180), np.uint8)
            for t in range(50): m[t, 40+k:110, 30+2*t:50+2*t+k] = 1
            masks[f"{actor}_{action}{'1' if (actor, action) == ('a', 'walk') else ''}"] = np.packbits(m.reshape(50, -1), axis=-1, bitorder="little")
    np.savez(path, **masks)
    return path

def test_weizmann_copies_differ_and_repeat_and_keep_to_their_split(tmp_path):
    npz = silhouettes(tmp_path/"s.npz")
    clips = weizmann(npz, copies=3, seed=1)
    assert sorted({c.label for c in clips}) == sorted(WEIZMANN) and len({c.name for c in clips}) == len(clips) == 5*10*3 + 4*10
    homes = {c.group: c.split for c in clips}
    assert all(homes[c.group] == c.split for c in clips) and sorted(homes.values()) == ["test"]*3 + ["train"]*5 + ["validation"]
    one, two = [c for c in clips if c.label == "walk" and c.split == "train"][:2]
    views = [c.video(32, 40) for c in (one, two, one)]
    assert views[0].shape == (28, 32, 40) and (views[0] == views[2]).all() and (views[0] != views[1]).any()

def test_silhouettes_and_lists_of_another_form_are_named(tmp_path):
    for key in ("foo", "ann_swim", "ann_walk_2"):
        np.savez(tmp_path/"s.npz", **{key: np.zeros((2, 3240), np.uint8)})
        with pytest.raises(StreamError, match=f"s.npz: holds '{key}', expected actor_action"): weizmann(tmp_path/"s.npz")
    (tmp_path/"mapping_table_23.txt").write_text("0 Jump\n1 Pour\n"); (tmp_path/"validate.txt").write_text("0 0 a.mp4\n")
    for line, says in (("0 1", "line 2 is '0 1', expected index class path"), ("0 1 b.mp4", "class 1 of b.mp4 is Pour in"),
                       ("0 7 b.mp4", "class 7 of b.mp4 is none in")):
        (tmp_path/"train.txt").write_text(f"0 0 a.mp4\n{line}\n")
        with pytest.raises(StreamError, match=f"train.txt: {says}"): arid(tmp_path)

def test_window_has_a_fixed_duration():
    assert window(100, 25, 2, 0) == slice(0, 50) and window(100, 25, 2, 1) == slice(50, 100) and window(30, 25, 2, 0.7) == slice(0, 30)

def test_arid_uses_its_lists(tmp_path):
    (tmp_path/"mapping_table_23.txt").write_text("".join(f"{i}\t{c}\n" for i, c in enumerate(ARID)))
    train = [(f"{c}/{c}_{g}_{k}.mp4", i) for i, c in enumerate(ARID) for g in (1, 2, 3) for k in (1, 2)]
    (tmp_path/"train.txt").write_text("".join(f"{n}\t{i}\t{f}\n" for n, (f, i) in enumerate(train)))
    (tmp_path/"validate.txt").write_text("".join(f"{n}\t{n}\t{n}.mp4\n" for n in range(6)))
    clips = arid(tmp_path, copies=2)
    assert sorted(c.label for c in clips if c.split == "test") == sorted(ARID)
    assert {c.split for c in clips if c.label == "Run"} == {"train", "validation", "test"}
    homes = {}
    for c in clips: assert homes.setdefault(c.group, c.split) == c.split
    film(tmp_path/"dark.mp4", images()//8, fps=30)
    view = partial(video_view, 32, 40, path=str(tmp_path/"dark.mp4"), fps=30.0, seconds=0.5, gamma=0.45, level=0.3, seed=0)
    assert view(copy=0).shape == (15, 32, 40) and view(copy=0).mean() == pytest.approx(0.3*255, rel=0.1)
    assert (view(copy=1) == view(copy=1)).all() and (view(copy=1) != view(copy=2)).any()

