"Shots are drawn fairly, only what should learn learns, and each way of using shots does what it says."
import copy

import pytest
import torch
import torch.nn.functional as F

from spklip.data.datasets import SpikeDataset
from spklip.data.scenes import SpikeActions, generate
from spklip.few_shot import Adaptation, adapt, block_features, class_means, draw_shots, fine_tune, last_layers, linear_probe
from spklip.stcl import SPKLIP
from spklip.train import TrainConfig, only, preset_of

@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return generate(SpikeActions(domain="real", classes=3, train=18, validation=3, test=6), tmp_path_factory.mktemp("data")/"real", progress=False)

@pytest.fixture
def model():
    torch.manual_seed(0)
    return SPKLIP(preset_of("smoke").model).eval()

def toy(model, n=24, classes=3):
    "Features that differ by class, and sentences."
    generator = torch.Generator().manual_seed(1)
    centres, labels = torch.randn(classes, 5, 32, generator=generator), torch.arange(n) % classes
    sentences = F.normalize(torch.randn(classes, 32, generator=generator), dim=-1)
    return centres[labels] + 0.1*torch.randn(n, 5, 32, generator=generator), labels, sentences

@pytest.mark.parametrize("shots", [1, 3, 7])
def test_shots_are_so_many_of_each_class_and_nested(shots):
    labels = [0]*9 + [2]*8 + [1]*7
    chosen = draw_shots(labels, shots, draw=3)
    assert sorted(labels[i] for i in chosen) == sorted([0, 1, 2]*shots) and chosen == sorted(set(chosen))
    assert set(chosen) <= set(draw_shots(labels, 7, draw=3)) and chosen == draw_shots(labels, shots, draw=3)
    assert len({tuple(draw_shots(labels, shots, draw)) for draw in range(6)}) > 1

def test_too_few_clips_are_named():
    with pytest.raises(ValueError, match="4 shots of class 1 wanted, and it has 3 clips"): draw_shots([0]*5 + [1]*3, 4, 0)

def test_people_of_the_test_are_not_among_the_shots(clips):
    assert not set(SpikeDataset(clips, "train").groups) & set(SpikeDataset(clips, "test").groups)

def test_features_are_the_models_own(model, clips):
    dataset = SpikeDataset(clips, "test")
    features = block_features(model, dataset, batch_size=4)
    whole = model.encode_video(torch.stack([dataset[i]["packed"] for i in range(len(dataset))])).detach()
    assert features.shape == (6, 5, 32) and torch.allclose(F.normalize(model.star_net.temporal(features), dim=-1), whole, atol=1e-5)

def test_only_the_last_layers_learn(model):
    features, labels, sentences = toy(model)
    before, mode = copy.deepcopy(model.state_dict()), model.training
    adapted = adapt(model, features, labels, sentences, Adaptation(steps=5, layers=1))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and model.training == mode
    old, learnt = model.star_net.temporal.state_dict(), {id(p) for p in last_layers(adapted, 1)}
    for name, p in adapted.named_parameters(): assert torch.equal(p, old[name]) != (id(p) in learnt), name

def test_shots_are_learnt(model):
    features, labels, sentences = toy(model)
    right = lambda temporal: ((F.normalize(temporal(features), dim=-1) @ sentences.T).argmax(1) == labels).float().mean()
    assert right(adapt(model, features, labels, sentences, Adaptation(steps=150))) > 0.95
    one, two = (adapt(model, features, labels, sentences, Adaptation(steps=3), seed=1).state_dict() for _ in range(2))
    assert all(torch.equal(one[k], two[k]) for k in one)

def test_class_means_by_hand():
    points, labels = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3
    for k, mean in enumerate(class_means(points, labels)):
        total = torch.zeros(4)
        for point, label in zip(points, labels): total += point*(label == k)
        assert torch.allclose(mean, total/total.norm(), atol=1e-6)

def test_a_probe_is_at_its_minimum():
    points, labels = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 3
    probe = linear_probe(points, labels, decay=0.01)
    weight, bias = probe.weight.clone().requires_grad_(True), probe.bias.clone().requires_grad_(True)
    (F.cross_entropy(F.linear(points, weight, bias), labels) + 0.01*weight.square().sum()).backward()
    assert weight.grad.abs().max() < 1e-3 and bias.grad.abs().max() < 1e-3

def test_all_layers_learn_from_the_shots_alone(model, clips):
    shots = only(SpikeDataset(clips, "train"), [0, 1, 2, 3, 4, 5])
    before = copy.deepcopy(model.state_dict())
    after = fine_tune(model, shots, TrainConfig(epochs=1, batch_size=3, lr=1e-2, warmup=0.1)).state_dict()
    assert not after["star_net.trunk.stem.0.0.weight"].equal(before["star_net.trunk.stem.0.0.weight"]) and not model.training
    assert len(shots) == 6 and shots.folder == clips and len(set(shots.labels)) == 3
