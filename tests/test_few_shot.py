"Few shots: draws, what moves and what does not, kept features, peers of the two closed-form methods, errors."
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import spklip.few_shot as few_shot_module
from spklip.data.datasets import SpikeDataset, derive, read_metadata
from spklip.data.scenes import SpikeActions, generate
from spklip.few_shot import (Adaptation, activity, adapt, class_means, clip_features, draw_shots, embed, few_shot, few_shot_all, last_layers,
                             linear_probe, refresh_norms, retrain, seen_by_trunk, stored_features)
from spklip.stcl import SPKLIP
from spklip.train import TrainConfig, evaluate, only, preset_of

SMOKE = preset_of("smoke")
SIZE = replace(SMOKE, model=replace(SMOKE.model, star_net=replace(SMOKE.model.star_net, temporal_layers=3)))
REAL = SpikeActions(domain="real", classes=3, train=18, validation=6, test=9, train_actors=3, validation_actors=1, test_actors=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return generate(REAL, tmp_path_factory.mktemp("data")/"real", progress=False)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    torch.manual_seed(0)
    return SPKLIP(SIZE.model).save_pretrained(tmp_path_factory.mktemp("model"))


def moved(before, model):
    return {name for name, p in model.state_dict().items() if not torch.equal(p, before[name])}


def copy_of(model):
    return {name: p.clone() for name, p in model.state_dict().items()}


def test_shots_are_so_many_of_each_class_and_of_people_who_are_not_tested(data):
    people, test = SpikeDataset(data, "train"), SpikeDataset(data, "test")
    chosen = draw_shots(people, 4, 1)
    assert np.bincount([people.labels[i] for i in chosen]).tolist() == [4, 4, 4] and len(set(chosen)) == 12
    assert chosen == draw_shots(people, 4, 1) and chosen != draw_shots(people, 4, 2)
    assert set(draw_shots(people, 2, 1)) < set(chosen)                        # fewer are among more
    assert not set(only(people, chosen).groups) & set(test.groups)
    assert draw_shots(people, 0) == [] and sorted(draw_shots(people, 6)) == list(range(18))


def test_more_shots_than_clips_is_an_error(data):
    people = SpikeDataset(data, "train")
    fewer = only(people, [i for i in range(len(people)) if people.classes[people.labels[i]] != "walk" or i < 9])
    have = fewer.labels.count(fewer.classes.index("walk"))
    with pytest.raises(ValueError, match=f"5 shots of 'walk': it has {have} clips"): draw_shots(fewer, 5)
    with pytest.raises(ValueError, match="-1 shots of 'jump'"): draw_shots(people, -1)


def test_no_shots_are_for_zero_shot_alone(data, start):
    for method in ("nearest class mean", "last layers", "everything"):
        with pytest.raises(ValueError, match=f"shots=0: {method} needs 1 or more"): few_shot(Adaptation(method), SIZE, data, 0, 0, start)


def test_classes_told_apart_by_a_side_are_not_mirrored(data, start, tmp_path, monkeypatch):
    rows, seen = read_metadata(data), []
    sides = {label: f"a person turns {side}" for label, side in zip(SpikeDataset(data).classes, ("left", "right", "round"))}
    turned = derive(data, tmp_path/"turned", [r | {"prompt": sides[r["label"]]} for r in rows])
    def features(start, data, *parts, config=None, norms=None):
        seen.append(config)
        return [torch.rand(18 if split == "train" else 9, 1 + views, 5, 32) for split, views, _ in parts]
    monkeypatch.setattr(few_shot_module, "stored_features", features)
    for clips in (data, turned): few_shot(Adaptation("nearest class mean", views=1), SIZE, clips, 2, 0, start)
    assert {c.flip for c in seen if c} == {Adaptation().train.flip, 0.} and seen[0].flip and not seen[2].flip


def test_a_part_gives_the_clips_it_names(data):
    people = SpikeDataset(data, "train")
    part = only(people, [7, 2])
    assert len(part) == 2 and part.labels == [people.labels[7], people.labels[2]]
    assert torch.equal(part[0]["packed"], people[7]["packed"]) and part[1]["caption"] == people[2]["caption"]
    assert len(people) == 18


def test_kept_features_are_those_of_the_model(data, start):
    model, test = SPKLIP.from_pretrained(start), SpikeDataset(data, "test")
    features, = stored_features(start, data, ("test", 2, None))
    assert features.shape == (9, 3, 5, SIZE.model.star_net.embed_dim)
    with torch.no_grad(): whole = model.encode_video(torch.stack([test[i]["packed"] for i in range(9)]))
    assert torch.allclose(embed(model, features[:, 0]), whole, atol=1e-5)
    assert torch.allclose(embed(model, features[:, 0]) @ model.encode_text(test.prompts).T, evaluate(model, test).similarity, atol=1e-5)
    assert not torch.allclose(features[:, 0], features[:, 1]) and not torch.allclose(features[:, 1], features[:, 2])
    still = clip_features(model, test, 1, TrainConfig(shift=0, flip=0))
    assert torch.allclose(still[:, 0], still[:, 1], atol=1e-5)                # a view that is neither shifted nor mirrored


def test_features_are_computed_once(data, start, monkeypatch):
    first, second = stored_features(start, data, ("validation", 0, None), ("train", 1, [2, 0]))
    assert second.shape[:2] == (2, 2)
    monkeypatch.setattr(few_shot_module, "clip_features", None)
    again = stored_features(start, data, ("validation", 0, None), ("train", 1, [2, 0]))
    assert torch.equal(again[0], first) and torch.equal(again[1], second)


def norms_of(model):
    return [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]


def test_fresh_norms_are_those_of_the_clips_and_nothing_else_moves(data, start):
    model, people = SPKLIP.from_pretrained(start), SpikeDataset(data, "train")
    before, seen = copy_of(model), []
    model.star_net.trunk.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    refresh_norms(model, people, batch_size=9)
    assert all(".running_" in name or name.endswith("num_batches_tracked") for name in moved(before, model)) and not model.training
    first = model.star_net.trunk.norm
    assert len(seen) == 2 and torch.allclose(first.running_mean, torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0), atol=1e-6)
    assert torch.allclose(first.running_var, torch.stack([x.var((0, 2, 3)) for x in seen]).mean(0), rtol=1e-4)
    assert all(m.momentum == 0.1 for m in norms_of(model))
    ragged = refresh_norms(SPKLIP.from_pretrained(start), only(people, range(10)), batch_size=9)  # 5 and 5, and not 9 and 1
    whole = refresh_norms(SPKLIP.from_pretrained(start), only(people, range(10)), batch_size=10)
    assert torch.allclose(ragged.star_net.trunk.norm.running_mean, whole.star_net.trunk.norm.running_mean, rtol=1e-3)
    with pytest.raises(ValueError, match="no clips"): refresh_norms(model, only(people, []))


def test_features_with_fresh_norms_are_those_of_such_a_model(data, start):
    people, test = SpikeDataset(data, "train"), SpikeDataset(data, "test")
    chosen = draw_shots(people, 2)
    model = refresh_norms(SPKLIP.from_pretrained(start), only(people, chosen))
    (fresh,), (stale,) = (stored_features(start, data, ("test", 0, None), norms=norms) for norms in (chosen, None))
    assert torch.allclose(fresh, clip_features(model, test), atol=1e-5) and not torch.allclose(fresh, stale, atol=1e-3)
    known, asked, left = seen_by_trunk(Adaptation(norms=True, views=1), data, chosen, [0, 5], start, "test")
    assert known.shape[:2] == (6, 2) and torch.equal(asked, fresh) and torch.allclose(left, clip_features(model, only(people, [0, 5])), atol=1e-5)


@pytest.mark.parametrize("layers", (1, 2))
def test_only_the_last_layers_move(start, layers):
    model = SPKLIP.from_pretrained(start)
    before, features = copy_of(model), torch.randn(6, 2, 5, SIZE.model.star_net.embed_dim)
    losses = adapt(model, features, torch.arange(6) % 3, F.normalize(torch.randn(3, features.shape[-1]), dim=-1), Adaptation(layers=layers, steps=5))
    parts = [f"star_net.temporal.layers.{i}." for i in range(3 - layers, 3)] + ["star_net.temporal.norm."]
    assert len(losses) == 5 and not model.training
    changed = moved(before, model)
    assert changed and all(name.startswith(tuple(parts)) for name in changed)
    assert all(any(name.startswith(p) for name in changed) for p in parts)    # each of them does


def test_adapting_learns_and_repeats(start):
    torch.manual_seed(0)
    features, labels = torch.randn(9, 1, 5, SIZE.model.star_net.embed_dim), torch.arange(9) % 3
    sentences = F.normalize(torch.randn(3, features.shape[-1]), dim=-1)
    run = lambda seed: (model := SPKLIP.from_pretrained(start), adapt(model, features, labels, sentences,
        Adaptation(steps=60, train=TrainConfig(lr=1e-2)), seed))
    (one, losses), (again, same), (_, other) = run(1), run(1), run(2)
    assert losses[-1] < 0.2 < losses[0] and losses == same and losses != other
    assert moved(copy_of(one), again) == set()
    with torch.no_grad(): assert (embed(one, features[:, 0]) @ sentences.T).argmax(1).tolist() == labels.tolist()


def test_a_model_without_so_many_layers_is_an_error():
    with pytest.raises(ValueError, match="the last 2 layers of a temporal Transformer that has 1"): last_layers(SPKLIP(SMOKE.model))
    flat = replace(SMOKE.model, star_net=replace(SMOKE.model.star_net, temporal_layers=0))
    with pytest.raises(ValueError, match="that has 0"): last_layers(SPKLIP(flat))


@pytest.mark.parametrize("wrong", (dict(method="last two"), dict(steps=1), dict(layers=0)))
def test_wrong_settings_are_errors(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))): Adaptation(**wrong)


def test_class_means_are_those_of_a_loop():
    torch.manual_seed(0)
    points, labels = F.normalize(torch.randn(20, 7), dim=-1), torch.arange(20) % 3
    means = class_means(points, labels, 3)
    for k in range(3):
        mean = sum(p for p, label in zip(points, labels) if label == k)
        assert torch.allclose(means[k], mean/mean.norm(), atol=1e-6)


def test_a_probe_separates_what_can_be_separated():
    torch.manual_seed(0)
    centres = 3*torch.eye(4)
    train, test = (centres.repeat(30, 1) + 0.3*torch.randn(120, 4) for _ in range(2))
    labels = torch.arange(4).repeat(30)
    assert (linear_probe(train, labels, 4)(test).argmax(1) == labels).all()


def test_a_probe_is_at_the_minimum_and_squares_shrink_it():
    torch.manual_seed(0)
    x, labels, sizes = torch.randn(50, 5), torch.randint(3, (50,)), []
    for l2 in (1e-3, 1e-1):
        probe = linear_probe(x, labels, 3, l2)
        probe.zero_grad()
        (F.cross_entropy(probe(x), labels) + l2*probe.weight.square().sum()).backward()
        assert all(p.grad.abs().max() < 1e-3 for p in probe.parameters())     # convex: no gradient, no better place
        sizes.append(probe.weight.norm().item())
    assert sizes[0] > sizes[1] > 0


def test_everything_moves_everything(data, start):
    people = SpikeDataset(data, "train")
    shots, before = only(people, draw_shots(people, 2)), SPKLIP.from_pretrained(start).state_dict()
    model = retrain(Adaptation("everything", steps=3, train=TrainConfig(batch_size=4, lr=1e-3, prompts=1.)), SIZE, shots, 0, start)
    still = {name for name, p in model.state_dict().items() if torch.equal(p, before[name])}
    assert not any(name.startswith(("hsfe", "star_net.trunk.stem", "text.projection")) for name in still) and not model.training


@pytest.mark.parametrize("method", ("nearest class mean", "linear probe", "last layers", "last layers, fresh norms", "everything", "from scratch"))
def test_a_draw_names_all_clips_of_others_and_what_is_left(data, start, method):
    config = Adaptation(method.split(",")[0], norms="fresh" in method, steps=2, views=1, train=TrainConfig(batch_size=4, lr=1e-3, prompts=1.))
    start = None if method == "from scratch" else start
    result = few_shot(config, SIZE, data, 2, 0, start)
    truth = SpikeDataset(data, "test").labels
    assert len(result["guess"]) == 9 and set(result["guess"]) <= {0, 1, 2}
    assert result["top1"] == pytest.approx(np.mean(np.equal(result["guess"], truth))) and 0 <= result["rest"] <= 1
    assert result["rest"]*3 == pytest.approx(round(result["rest"]*3)) # 12 clips are left of the shots' people; of others 9 are asked, of these a quarter
    assert few_shot(config, SIZE, data, 2, 0, start) == result


def test_zero_and_all_shots(data, start):
    zero = few_shot(Adaptation("zero-shot", views=1), SIZE, data, 0, 0, start)
    seen = evaluate(SPKLIP.from_pretrained(start), SpikeDataset(data, "test"))
    assert zero["guess"] == seen.similarity.argmax(1).tolist() and zero["top1"] == pytest.approx(seen.top(1))
    for norms in (False, True):
        assert few_shot(Adaptation("nearest class mean", norms=norms, views=1), SIZE, data, 6, 0, start)["rest"] is None


def test_what_has_run_is_not_run_again(data, start, monkeypatch):
    jobs = {k: (Adaptation("nearest class mean", views=1), SIZE, data, k, 3, start, "validation") for k in (1, 2)}
    first = {k: few_shot(*job) for k, job in jobs.items()}
    monkeypatch.setattr(few_shot_module, "learn", None)
    assert few_shot_all(jobs) == first


def test_a_trunk_s_features_are_computed_by_one_job(data, start, monkeypatch):
    "Who only asks without shots computes no views, so it does not count."
    waves = []
    monkeypatch.setattr(few_shot_module, "side_by_side", lambda work, jobs, n: waves.append([job[0].method for job in jobs.values()]))
    monkeypatch.setattr(few_shot_module, "few_shot", lambda *job: None)
    monkeypatch.setattr(few_shot_module, "device_of", lambda: "cpu")
    few_shot_all({i: (Adaptation(method, views=1), SIZE, data, bool(i), i, start, "test") for i, method in enumerate(("zero-shot", *["nearest class mean"]*3))})
    assert waves == [["zero-shot", "nearest class mean"], ["nearest class mean"]*2]


def test_clips_of_another_size_are_refused(data, start, tmp_path):
    turned = derive(data, tmp_path/"turned", [r | dict(height=r["width"], width=r["height"]) for r in read_metadata(data)])
    for see in (clip_features, refresh_norms):
        with pytest.raises(ValueError, match="turned: clips of 40 x 32, the model reads 32 x 40"):
            see(SPKLIP.from_pretrained(start), SpikeDataset(turned, "train"))


def test_one_clip_is_too_few_for_all_of_it(data, start):
    with pytest.raises(ValueError, match="1 clip to train all of SPKLIP on: 2 or more"):
        retrain(Adaptation("everything"), SIZE, only(SpikeDataset(data, "train"), [0]), 0, start)


def test_activity_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="no clips"): activity([], 2, 2)
