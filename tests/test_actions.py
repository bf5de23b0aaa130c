"The 51 actions: they move, they are told truly, two persons and things go where they belong; the real domain has its statistics."
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from spklip.camera import unpack
from spklip.data import scenes
from spklip.data.actions import ACTIONS, CLASSES, FLYING, STEADY, THINGS
from spklip.data.scenes import (BONES, SpikeActions, actor, actor_capsules, describe, draw, fingerprint, framing, place, render, skeleton, take,
                                traits)
from spklip.data.streams import clip_index

ALL = SpikeActions(classes=51)
REAL = SpikeActions(domain="real")
MOMENTS = np.linspace(0, 1, 61)
HMDB51 = """brush_hair cartwheel catch chew clap climb climb_stairs dive draw_sword dribble drink eat fall_floor fencing flic_flac golf handstand hit hug
jump kick kick_ball kiss laugh pick pour pullup punch push pushup ride_bike ride_horse run shake_hands shoot_ball shoot_bow shoot_gun sit situp smile smoke
somersault stand swing_baseball sword sword_exercise talk throw turn walk wave""".split()


def test_the_names_are_hmdb51s():
    assert sorted(label for label, _ in CLASSES) == HMDB51 and len({prompt for _, prompt in CLASSES}) == 51
    assert {a.props for a in ACTIONS} == set(THINGS) and set(FLYING) <= set(THINGS)


def test_the_first_sixteen_are_what_models_have_learnt():
    "Fingerprint, a row and a clip of the set that the committed model was trained on."
    config = SpikeActions()
    assert fingerprint(config) == "d9889c9430ef1735" and not config.rich
    assert describe(config, 1) == {
        "file": "train/run/000001.dat", "height": 32, "width": 40, "frames": 250, "rate_hz": 1500.0, "flip_rows": False, "label": "run",
        "prompt": "a person runs", "caption": "a sturdy person jogs slowly to the right", "group": "actor000", "split": "train",
        "source": "SpikeActions", "made_by": "spklip SpikeActions d9889c9430ef1735", "recording": 3243}
    assert unpack(render(config, [5]), 32, 40).sum() == 22913


def test_every_action_moves():
    for i in range(51):
        start, stop, radius, shade = actor_capsules(take(ALL, i), MOMENTS)
        assert np.isfinite(start).all() and np.isfinite(stop).all() and (radius > 0).all() and ((shade >= 0) & (shade <= 1)).all()
        image = draw(ALL, i, clip_index(take(ALL, i).frames)[::25])
        assert torch.isfinite(image).all() and (image - image[0]).abs().amax() > .03, CLASSES[i][0]


def test_whole_bodies_stay_in_the_frame_and_heads_in_close_ups():
    for i in range(2*51):
        shot = take(ALL, i)
        start, stop, _, _ = actor_capsules(shot, MOMENTS)
        scale, x, ground = framing(ALL, shot)
        n = len(BONES)*(2 if shot.other else 1)
        bodies = [8, 22][:n//14] if shot.action.frame != "body" else range(n)
        across, up = x + start[:, bodies, 0]*scale, ground - start[:, bodies, 1]*scale
        assert across.min() > -.02 and across.max() < 1.27, shot.action.label
        assert up.min() > -.02 and up.max() < 1.02 or shot.action.label == "dive", shot.action.label


@pytest.mark.parametrize("label,near", [("hug", .3), ("kiss", .45), ("shake_hands", .75), ("fencing", 1.3), ("sword", 1.)])
def test_two_persons_face_each_other(label, near):
    for i in (n for n in range(4*51) if CLASSES[n % 51][0] == label):
        shot = take(ALL, i)
        start, stop, _, _ = actor_capsules(shot, MOMENTS)
        side = 1 if np.cos(np.radians(shot.yaw)) > 0 else -1
        gap = side*(start[:, 20, 0] - start[:, 6, 0])  # trunks
        assert (gap > 0).all() and gap.min() < near
        toes = [side*(stop[:, k, 0] - start[:, k, 0])[0] for k in (4, 18)]
        assert toes[0] > 0 > toes[1]
        assert shot.other in [actor(ALL, n) for n in ALL.cast(shot.split)] and shot.other != shot.body  # somebody else of the same split


def test_amplitude_is_told_where_it_is_seen():
    "By how far a joint is from where it would be, had the movement been small."
    for action in ACTIONS:
        t, yaw = np.linspace(0, 1, 40), 20 if action.view in ("side", "near") else 90
        small, wide = (place(skeleton(pose, actor(ALL, 3), 40), pose, yaw, action) for pose in (action.motion(t, k) for k in (.85, 1.15)))
        assert (np.linalg.norm(small - wide, axis=-1).max() < .06) == (action.label in STEADY), action.label


WORDS = dict(  # word of a caption -> the trait it tells; a caption may leave a trait out, but never tell one that is not so
    slim=("build", "slim"), sturdy=("build", "sturdy"), slow=("pace", "slow"), haste=("pace", "slow"), fast=("pace", "fast"), quick=("pace", "fast"),
    small_movements=("moves", "small"), effort=("moves", "small"), big=("moves", "wide"), wide_movements=("moves", "wide"),
    left_half=("spot", "left"), right_half=("spot", "right"), left_of_the_picture=("spot", "left"), right_of_the_picture=("spot", "right"),
    distance=("distance", "far"), way_off=("distance", "far"), close_to=("distance", "near"), near_the=("distance", "near"),
    stripes=("wall", "striped"), bands=("wall", "banded"), squares=("wall", "chequered"), fades=("wall", "shaded"), shaded=("wall", "shaded"),
    plain=("wall", "plain"), bare=("wall", "plain"), empty=("wall", "plain"), faint=("contrast", "faint"), bold=("contrast", "bold"),
    post_on=("behind", "post"), lamp=("behind", "lamp"), bench=("behind", "bench"), shelf=("behind", "shelf"), dim=("light", "dim"), bright=("light", "bright"),
    pans_left=("camera", "left"), pans_right=("camera", "right"), steady=("camera", "still"), stands_still=("camera", "still"),
    unsteady=("camera", "shaky"), shaky=("camera", "shaky"), fair_hair=("hair", "fair"), dark_hair=("hair", "dark"),
    dark_trousers=("legs", "dark"), light_trousers=("legs", "light"), facing_left=("way", "facing left"), facing_right=("way", "facing right"))


@pytest.mark.parametrize("config", [ALL, REAL], ids=["sim", "real"])
def test_captions_name_only_what_is_there(config):
    told, texts = set(), []
    for i in range(3*config.classes):
        shot, text = take(config, i), describe(config, i)["caption"]
        seen = traits(config, shot)
        texts.append(text)
        assert any(verb in text for verb in shot.action.verbs) and not re.search(r"  |,,| ,|,$|\{|actor|None", text), text
        rest = text.replace(next(v for v in shot.action.verbs if v in text), "")
        for word, (name, value) in WORDS.items():
            if re.search(rf"\b{word.replace('_', ' ')}", rest):
                told.add(word)
                assert seen.get(name) == value, f"{word!r} in {text!r}"
        assert (" on the left" in rest or " to the left" in rest) <= ("left" in (seen.get("side"), seen.get("spot"), seen.get("camera"))
            or "left" in seen.get("way", ""))
    assert len(set(texts)) > .97*len(texts) and len(told) > (.85 if config is ALL else .55)*len(WORDS)


def test_traits_are_what_is_drawn():
    for i in range(200, 200 + 51):
        shot, image = take(ALL, i), draw(ALL, i, clip_index(take(ALL, i).frames)[::25])
        seen = traits(ALL, shot)
        start, stop, _, _ = actor_capsules(shot, MOMENTS)
        if shot.action.travel:
            way = start[-1, 6, 0] - start[0, 6, 0]
            assert seen["way"] == f"to the {'right' if way > 0 else 'left'}"
        if seen.get("camera") in ("left", "right"): assert (shot.pan > 0) == (seen["camera"] == "right")
        assert (seen["top"] == "dark") == (shot.body["upper"] < .3)
        level = float(image.mean())/(ALL.theta*ALL.firing_rate)
        assert level < .93 if seen.get("light") == "dim" else level > 1.07 if seen.get("light") == "bright" else .87 < level < 1.13


def test_what_stands_behind_is_seen():
    "A picture without it differs in ten pixels at least, at some moment."
    for i in range(51, 102):
        shot = take(ALL, i)
        frames = [clip_index(shot.frames)[[0, 60, 125, 190, 249]]]
        if not shot.decor: continue
        there, away = (scenes.scene(ALL, [s], frames, "cpu") for s in (shot, replace(shot, decor="")))
        assert ((there - away).abs() > .04).sum((2, 3)).max() >= 10, (shot.decor, shot.action.label)


def test_real_is_thirty_classes_of_96_clips_of_other_people():
    assert REAL.classes == 30 and len(REAL) == 96*30 and (REAL.height, REAL.width) == (32, 40)
    assert all(REAL.slot(i)[1] == i % 30 for i in range(len(REAL)))
    assert actor(REAL, 3) != actor(ALL, 3) and {REAL.slot(i)[2] for i in range(len(REAL))} == set(range(24))
    assert describe(REAL, 31)["group"] == "person001"
    assert not any(take(REAL, i).other for i in range(30))
    shots = [take(REAL, i) for i in range(60)]
    assert all(s.pan == s.shake == s.noise == s.faults == 0 for s in shots)


def test_nothing_but_the_person_moves_in_real():
    "The corners of the ideal picture stay as they are."
    still = [i for i in range(30) if not take(REAL, i).decor][:4]
    for i in still:
        image = draw(REAL, i, clip_index(take(REAL, i).frames)[::50])
        assert (image[:, 0] - image[0, 0]).abs().max() < 1e-6 or take(REAL, i).action.props == "bar"


@pytest.mark.parametrize("config,rate,count,peak", [(ALL, .0576, 14.77, None), (REAL, .0179, 4.65, 60)], ids=["sim", "real"])
def test_statistics_are_those_of_the_paper(config, rate, count, peak):
    "A.2: mean activity and mean count within 5 %, 99 % of pixels in 0 to 30, one leaking line of about 60."
    counts = unpack(render(config, range(7, 7 + 3*config.classes, 2)), 32, 40).sum(1, dtype=torch.int64).double()
    assert abs(counts.mean()/250/rate - 1) < .05 and abs(counts.mean()/count - 1) < .05
    assert (counts <= 30).double().mean() > .985
    if peak:
        line = counts.mean(0)
        assert abs(line.max()/peak - 1) < .1 and line.max(1)[0].argmax() == 12 and line[[r for r in range(32) if r != 12]].max() < 20


def test_the_worst_block_counts_thirty():
    "Block noise of the codec (A.2): the brightest block of the background."
    peaks = []
    for i in range(24):
        shot = take(ALL, i)
        faults = scenes.block_faults(ALL, shot)
        y, x = np.unravel_index(faults.argmax(), faults.shape)
        image = draw(ALL, i)
        peaks.append(image[:, y:y + 4, x:x + 4].sum(0).mean()/ALL.theta/shot.light)
        assert 0 < (faults > 0).mean() < .04
    assert abs(np.median(peaks)/30 - 1) < .12


def test_painting_several_clips_at_once_is_painting_each(monkeypatch):
    "What a GPU does, done on the CPU: piles of different height side by side, one order of painting, no boxes cut to 50 frames."
    for config, indices in ((ALL, [0, 43]), (REAL, [8, 29])):
        shots = [take(config, i) for i in indices]
        frames = [clip_index(s.frames) for s in shots]
        monkeypatch.setattr(scenes, "FEW", ())
        many = scenes.lights(config, shots, frames, torch.device("cpu"))
        bits = scenes.expose(config, indices, many)
        monkeypatch.undo()
        for n, i in enumerate(indices):
            assert torch.equal(many[n], draw(config, i)) and torch.equal(bits[n], render(config, [i])[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_draws_the_same_batch_by_batch():
    indices = [0, 43, 45, 33, 20]
    together = render(ALL, indices, "cuda")
    assert all(torch.equal(together[n], render(ALL, [i], "cuda")[0]) for n, i in enumerate(indices))
    assert (unpack(together.cpu(), 32, 40) != unpack(render(ALL, indices), 32, 40)).double().mean() < .01


def test_fingerprints_tell_domains_and_sizes_apart():
    prints = {fingerprint(c) for c in (ALL, REAL, SpikeActions(), replace(ALL, classes=50), replace(REAL, seed=1))}
    assert len(prints) == 5 and ALL.rich and REAL.rich and (REAL.firing_rate, ALL.firing_rate) == (.01825, .0576)
