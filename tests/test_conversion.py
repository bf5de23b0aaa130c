"Video to spikes at scale: what goes in comes out, whatever is in the way"
import json
from functools import partial
import numpy as np
import pytest
from spklip.camera import simulate, tfp, unpack
from spklip.data.conversion import Encoding, convert, encode, parse_name, readable, video_folder
from spklip.data.datasets import SpikeDataset, check, read_metadata
from spklip.data.streams import StreamError, clip_index, read_dat
from spklip.data.video import decode, frames_of, interpolate, weizmann
from spklip.lab.notebooks import real_data
from test_video import clip, film, images, light, silhouettes

HOW = Encoding(24, 30, 10)

def contents(folder): return {f.name: f.read_bytes() for f in folder.glob("*.dat")}

def test_a_clip_is_what_a_model_would_read_of_all():
    key = light(24, 30, 40)
    every, part = (np.concatenate(list(encode(key, Encoding(24, 30, 10, frames=f), 5))) for f in ("all", "clip"))
    assert (every == simulate(np.concatenate(list(interpolate(key, 10))), 5.0, charge="random", seed=5, packed=True)).all()
    assert (part == every[clip_index(400)]).all()
    rate = unpack(every, 24, 30).mean(0)*5
    assert np.abs(rate - key.mean(0)/255).max() < 0.05
    with pytest.raises(ValueError): list(encode(key, Encoding(24, 30, 10, frames="some")))

def test_convert_goes_on_past_bad_videos_and_does_only_what_is_missing(tmp_path):
    good, bad = film(tmp_path/"good.mp4", images()), tmp_path/"bad.avi"
    bad.write_bytes(b"RIFF")
    short = film(tmp_path/"short.mp4", images(5))
    clips = [clip(good, "good"), clip(bad, "bad"), clip(short, "short"), clip(partial(light, n=30), "view", fps=25.0)]
    failed = convert(clips, tmp_path/"set", HOW, progress=False)
    assert [f["name"] for f in failed] == ["bad", "short"] == [json.loads(x)["name"] for x in (tmp_path/"set"/"failed.jsonl").read_text().splitlines()]
    assert "50 frames are fewer than the 250" in failed[1]["reason"]
    assert check(tmp_path/"set") == [] and [r["rate_hz"] for r in read_metadata(tmp_path/"set")] == [250.0, 250.0]
    first, times = contents(tmp_path/"set"), {f: f.stat().st_mtime_ns for f in (tmp_path/"set").glob("*.dat")}
    film(bad, images(26))
    assert [f["name"] for f in convert(clips, tmp_path/"set", HOW, progress=False)] == ["short"]
    assert times.items() <= {f: f.stat().st_mtime_ns for f in (tmp_path/"set").glob("*.dat")}.items() and first.items() < contents(tmp_path/"set").items()
    assert convert(clips[:2], tmp_path/"set", HOW, progress=False) == [] and not (tmp_path/"set"/"failed.jsonl").exists()

def test_other_settings_are_made_again_other_words_are_not(tmp_path):
    clips = [clip(partial(light, n=30), f"c{i}", fps=25.0) for i in range(3)]
    convert(clips, tmp_path, HOW, progress=False)
    before, times = contents(tmp_path), {f: f.stat().st_mtime_ns for f in tmp_path.glob("*.dat")}
    convert([clip(c.video, c.name, fps=25.0, caption="new words", split="test") for c in clips], tmp_path, HOW, progress=False)
    assert {r["caption"] for r in read_metadata(tmp_path)} == {"new words"} and times == {f: f.stat().st_mtime_ns for f in tmp_path.glob("*.dat")}
    convert(clips, tmp_path, Encoding(24, 30, 10, theta=2.0), progress=False)
    assert all(before[name] != new for name, new in contents(tmp_path).items())
    with open(tmp_path/"c1.dat", "r+b") as f: f.truncate(100)
    convert(clips, tmp_path, Encoding(24, 30, 10, theta=2.0), progress=False)
    assert check(tmp_path) == []

def test_an_interrupted_conversion_ends_like_one_left_alone(tmp_path):
    def stop(height, width): raise KeyboardInterrupt
    clips = [clip(partial(light, n=30), f"c{i}", fps=25.0) for i in range(4)]
    convert(clips, tmp_path/"alone", HOW, progress=False)
    with pytest.raises(KeyboardInterrupt): convert([*clips[:2], clip(stop, "c2", fps=25.0), clips[3]], tmp_path/"again", HOW, progress=False)
    assert len(read_metadata(tmp_path/"again")) == 2 and check(tmp_path/"again") == []
    convert(clips, tmp_path/"again", HOW, progress=False)
    assert contents(tmp_path/"again") == contents(tmp_path/"alone")
    assert (tmp_path/"again"/"metadata.jsonl").read_text() == (tmp_path/"alone"/"metadata.jsonl").read_text()

def test_two_clips_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="share a name"): convert([clip(light, "a"), clip(light, "a")], tmp_path, HOW)

def test_names_of_hmdb51_and_ucf101(tmp_path):
    assert parse_name("x/April_09_brush_hair_u_nm_np1_ba_goo_0.avi") == ("brush_hair", "brush_hair/April_09")
    assert parse_name("x/TheBigRun_run_f_cm_np1_fr_med_3.avi") == ("run", "run/TheBigRun")
    assert parse_name("x/v_YoYo_g25_c05.avi") == ("YoYo", "YoYo/g25")
    assert parse_name("dance/one.mp4") == ("dance", "dance/one")
    assert readable("PlayingGuitar") == "a video of playing guitar"
    (tmp_path/"dance").mkdir()
    for name in ("v_YoYo_g01_c01.mp4", "v_YoYo_g01_c02.mp4", "v_YoYo_g02_c01.mp4", "dance/one.mp4"): film(tmp_path/name, images(26))
    clips = video_folder(tmp_path)
    assert len({(c.group, c.split) for c in clips}) == 3 == len({c.group for c in clips})
    assert convert(clips, tmp_path/"set", HOW, progress=False) == [] and len(SpikeDataset(tmp_path/"set")) == 4
    with pytest.raises(StreamError): video_folder(tmp_path/"set")

def test_real_videos_convert(tmp_path):
    source = real_data("hmdb51_ucf101")
    if source is None: pytest.skip("the real clips are not here")
    clips = video_folder(source)
    assert convert(clips, tmp_path, HOW, progress=False) == [] and check(tmp_path) == []
    whole = Encoding(24, 30, 10, frames="all")
    one = next(c for c in clips if "TrumanShow" in c.name)
    convert([one], tmp_path/"all", whole, progress=False)
    frames = read_metadata(tmp_path/"all")[0]["frames"]
    back = tfp(read_dat(tmp_path/"all"/f"{one.name}.dat", 24, 30), frames//2, window=101)*5
    assert np.corrcoef(back.ravel(), decode(one.video, 24, 30)[frames//20].ravel())[0, 1] > 0.95
    assert next(frames_of(one.video)).ndim == 2

def test_nothing_of_the_machine_is_in_the_metadata(tmp_path):
    clips = weizmann(silhouettes(tmp_path/"s.npz"), copies=1)
    assert convert(clips[:12], tmp_path/"set", Encoding(32, 40, 10), progress=False) == []
    assert str(tmp_path) not in (tmp_path/"set"/"metadata.jsonl").read_text()
