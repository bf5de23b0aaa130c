"SpikeActions: a clip is a function of its number, splits are clean, captions are true, folders survive interruption."
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from spklip.camera import unpack
from spklip.data.datasets import SpikeDataset, check, read_metadata
from spklip.data import scenes
from spklip.data.scenes import ACTIONS, CLASSES, SpikeActions, actor, actor_capsules, describe, draw, generate, render, take
from spklip.data.streams import StreamError, clip_index

CONFIG = SpikeActions()
TINY = SpikeActions(classes=3, train=6, validation=3, test=3, train_actors=2, validation_actors=1, test_actors=1)


def test_clips_do_not_depend_on_the_batch_the_order_or_the_threads():
    together = render(CONFIG, [40, 41, 42, 3999])
    assert together.shape == (4, 250, 160) and together.dtype == torch.uint8
    apart = {i: render(CONFIG, [i])[0] for i in (3999, 42, 41, 40)}
    assert all(torch.equal(together[n], apart[i]) for n, i in enumerate((40, 41, 42, 3999)))
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    again = render(CONFIG, [41])[0]
    torch.set_num_threads(threads)
    assert torch.equal(again, apart[41])
    assert not torch.equal(apart[40], apart[41])


def test_another_seed_is_another_data_set():
    other = replace(CONFIG, seed=1)
    assert not torch.equal(render(CONFIG, [5]), render(other, [5]))
    assert actor(CONFIG, 3) != actor(other, 3) and actor(CONFIG, 3) == actor(replace(CONFIG, train=16), 3)


def test_clips_do_not_depend_on_how_many_there_are():
    assert torch.equal(render(CONFIG, [17]), render(replace(CONFIG, train=1600, test=32), [17]))


def test_classes_are_balanced_and_actors_disjoint():
    rows = [describe(CONFIG, i) for i in range(len(CONFIG))]
    actors = {}
    for split, size, people in (("train", 3200, 60), ("validation", 320, 10), ("test", 640, 20)):
        part = [r for r in rows if r["split"] == split]
        counts = np.unique([r["label"] for r in part], return_counts=True)[1]
        assert len(part) == size and len(counts) == 16 and counts.min() == counts.max() == size//16
        actors[split] = {r["group"] for r in part}
        assert len(actors[split]) == people
    assert not (actors["train"] & actors["validation"] or actors["train"] & actors["test"] or actors["validation"] & actors["test"])


def test_an_actor_keeps_build_and_clothes():
    per_actor = {}
    for i in range(0, 3200, 7): per_actor.setdefault(describe(CONFIG, i)["group"], []).append(take(CONFIG, i).body)
    assert all(body == bodies[0] for bodies in per_actor.values() for body in bodies)


def test_firing_rate_is_that_of_the_paper():
    bits = render(replace(CONFIG, seed=3), range(96))
    rate = unpack(bits, 32, 40).double().mean().item()
    assert abs(rate/.0576 - 1) < .05


@pytest.mark.parametrize("most", [dict(firing_rate=.12), dict(theta=.2, firing_rate=.6), dict(firing_rate=.0054, domain="real"), dict(firing_rate=.00087)])
def test_any_firing_rate_that_is_taken_is_met(most):
    config = SpikeActions(**most)
    wanted = config.firing_rate*np.mean([take(config, i).light for i in range(32)])
    assert abs(unpack(render(config, range(32)), 32, 40).double().mean().item()/wanted - 1) < .06


def test_the_charge_goes_through_the_gaps():
    "Against the loop that the text describes: V <- V + I, fire at theta; between segments V <- (V + gap light) mod theta."
    image, frames = draw(CONFIG, 9).double().numpy(), clip_index(take(CONFIG, 9).frames)
    assert len(image) == len(frames) == 250 and 2000 <= take(CONFIG, 9).frames <= 4000
    charge = np.random.default_rng([CONFIG.seed, 4, 9]).random((32, 40), np.float32)*CONFIG.theta
    wanted = np.zeros(image.shape, bool)
    for t in range(250):
        if t and (gap := frames[t] - frames[t - 1] - 1): charge = (charge + gap*(image[t - 1] + image[t])/2) % CONFIG.theta
        charge = charge + image[t]
        wanted[t] = charge >= CONFIG.theta
        charge = charge - CONFIG.theta*wanted[t]
    assert (unpack(render(CONFIG, [9])[0], 32, 40).numpy() != wanted).mean() < 1e-4  # float32 against float64


@pytest.mark.parametrize("height,width", [(32, 40), (30, 37), (48, 64)])
def test_any_size_and_soft_edges(height, width):
    config = SpikeActions(height=height, width=width)
    image = draw(config, 0)
    assert image.shape == (250, height, width) and render(config, [0]).shape == (1, 250, -(-height*width//8))
    change = (image[1] - image[0]).abs()  # 1/1500 s: far less than a pixel
    assert 0 < change.max() < .3


def test_every_class_moves():
    for i in range(32):
        image = draw(CONFIG, i, clip_index(take(CONFIG, i).frames)[::25])
        assert torch.isfinite(image).all() and (image - image[0]).abs().amax() > .1, describe(CONFIG, i)["label"]


def test_captions_tell_the_direction_that_is_drawn():
    config = SpikeActions(train=16*24)
    for i in range(config.train):
        shot, text = take(config, i), describe(config, i)["caption"]
        said = text.split(" in front")[0].split(" before ")[0].split(" against ")[0].split(" while ")[0]
        assert text and said.startswith(("a ", "someone")) and any(verb in said for verb in shot.action.verbs)
        start, stop, _, _ = actor_capsules(shot, np.linspace(0, 1, 50))
        if shot.action.travel:
            way = (start[-10:, :13, 0] + stop[-10:, :13, 0]).mean() - (start[:10, :13, 0] + stop[:10, :13, 0]).mean()
            assert f"to the {'right' if way > 0 else 'left'}" in said, text
        elif shot.action.faces == "facing" and "camera" not in said:
            toes = (stop[:3, 4:6, 0] - start[:3, 4:6, 0]).mean()  # feet point where the person looks
            assert f"facing {'right' if toes > 0 else 'left'}" in said, text
        assert ("dark" in said) <= shot.body["dark"] and ("slow" in said) <= (shot.speed < .3)
    words = {describe(config, i)["caption"] for i in range(config.train)}
    assert len(words) > .95*config.train


def test_generate_writes_resumes_and_rests(tmp_path, capsys):
    folder = generate(TINY, tmp_path/"set")
    assert "12 of 12" in capsys.readouterr().out and check(folder) == []
    files = {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in folder.rglob("*") if f.is_file()}
    generate(TINY, folder)
    assert capsys.readouterr().out == "" and all(f.stat().st_mtime_ns == m for f, (_, m) in files.items())
    # interrupted: two clips and the metadata are missing, one half-written neighbour lies about
    gone = sorted(folder.rglob("*.dat"))[:2]
    for f in (*gone, folder/"metadata.jsonl"): f.unlink()
    gone[0].with_name(f".{gone[0].name}.1.part").write_bytes(b"half")
    generate(TINY, folder)
    assert "12 of 12" in capsys.readouterr().out and all(f.read_bytes() == data for f, (data, _) in files.items())
    kept = sorted(folder.rglob("*.dat"))[5]
    assert kept.stat().st_mtime_ns == files[kept][1]
    assert not list(folder.rglob("*.part*"))
    data = SpikeDataset(folder, "test")
    assert len(data) == 3 and torch.equal(data[1]["packed"], render(TINY, [10])[0])
    assert read_metadata(folder)[10] == describe(TINY, 10)


def test_several_processes_write_what_one_does(tmp_path, monkeypatch):
    one = generate(TINY, tmp_path/"one", progress=False)
    monkeypatch.setattr(scenes, "WORTH_PROCESSES", 1)
    several = generate(TINY, tmp_path/"several", progress=False)
    read = lambda folder: {f.relative_to(folder): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    assert read(one) == read(several) and len(read(one)) == 15


def test_other_settings_and_other_things_are_refused(tmp_path):
    folder = generate(TINY, tmp_path/"set", progress=False)
    with pytest.raises(StreamError, match="other settings .*seed 0 -> 1"): generate(replace(TINY, seed=1), folder)
    settings = json.loads((folder/"settings.json").read_text())
    (folder/"settings.json").write_text(json.dumps(settings | {"made_by": "spklip SpikeActions 0"}))
    with pytest.raises(StreamError, match="older drawing"): generate(TINY, folder)
    (tmp_path/"other").mkdir()
    (tmp_path/"other"/"thesis.txt").write_text("dear")
    with pytest.raises(StreamError, match="not SpikeActions"): generate(TINY, tmp_path/"other")
    assert (tmp_path/"other"/"thesis.txt").read_text() == "dear"
    (tmp_path/"begun").mkdir()
    (tmp_path/"begun"/".settings.json.1.part").touch() # of one who was killed there
    assert check(generate(TINY, tmp_path/"begun", progress=False)) == []
    with pytest.raises(StreamError, match="not SpikeActions"): generate(TINY, tmp_path/"other"/"thesis.txt")


@pytest.mark.parametrize("bad", [dict(classes=1), dict(classes=99), dict(domain="moon"), dict(test=-1), dict(height=0), dict(train_actors=0), dict(theta=0.),
                                 dict(segments=241), dict(firing_rate=.7), dict(firing_rate=.001, domain="real"), dict(theta=20.),
                                 dict(theta=.2, firing_rate=.7)])
def test_impossible_settings_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))): SpikeActions(**bad)


def test_clips_outside_the_set_are_refused():
    with pytest.raises(IndexError, match="4160"): describe(CONFIG, 4160)
    with pytest.raises(IndexError): render(CONFIG, [-1])


def test_a_frame_does_not_depend_on_the_others_drawn():
    shot = take(CONFIG, 23)
    every, few = clip_index(shot.frames)[:50], clip_index(shot.frames)[:50:7]
    assert (draw(CONFIG, 23, every)[::7] - draw(CONFIG, 23, few)).abs().max() < 1e-5
