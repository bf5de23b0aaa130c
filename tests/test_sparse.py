"Convolution of spikes: against torch's, in value and gradient, whatever the shape, the numbers, the threads."
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from spklip import sparse
from spklip.hsfe import HSFEConfig, MTF
from spklip.sparse import AddTaps, conv_spikes
from spklip.stcl import SPKLIP, learn_wordpiece
from spklip.train import preset_of


def case(n, t, D, H, W, rate=0.06, seed=0):
    torch.manual_seed(seed)
    return (torch.rand(n, t, H, W) < rate).byte(), torch.randn(D, t, 3, 3).requires_grad_(), torch.randn(D).requires_grad_(), torch.randn(n, D, H, W)


def close(a, b, most): assert (a.double() - b.double()).abs().max() <= most*b.double().abs().max().clamp(min=1e-9)


@pytest.fixture
def added(monkeypatch): # how often spikes were added
    calls, apply = [], AddTaps.apply
    monkeypatch.setattr(AddTaps, "apply", lambda *args: calls.append(1) or apply(*args))
    return calls


@pytest.mark.parametrize("size", [(3, 61, 16, 32, 40), (1, 61, 32, 7, 5), (2, 5, 1, 1, 1), (5, 64, 3, 1, 9), (2, 1, 8, 6, 1), (20, 9, 4, 3, 4),
                                  (2, 7, 8, 65, 6), (3, 5, 4, 64, 5), (1, 61, 8, 100, 7)])
def test_it_is_the_convolution(size, added):
    spikes, weight, bias, slope = case(*size)
    out = conv_spikes(spikes, weight, bias)
    found = torch.autograd.grad(out, (weight, bias), slope)
    w, b = (x.detach().double().requires_grad_() for x in (weight, bias))
    truth = F.conv2d(spikes.double(), w, b, padding=1)
    close(out, truth, 1e-6)
    for a, b in zip(found, torch.autograd.grad(truth, (w, b), slope.double())): close(a, b, 1e-5)
    assert added and out.dtype == torch.float32 and out.shape == truth.shape


def test_the_first_frame_and_the_last_and_each_corner():
    weight, none = torch.randn(2, 64, 3, 3), torch.zeros(2)
    for t in (0, 31, 32, 63):
        for y, x in ((0, 0), (0, 4), (3, 0), (3, 4), (1, 2)):
            spikes = torch.zeros(1, 64, 4, 5, dtype=torch.uint8); spikes[0, t, y, x] = 1
            assert torch.equal(conv_spikes(spikes, weight, none), F.conv2d(spikes.float(), weight, none, padding=1))


def test_where_no_spike_falls_there_is_the_bias_and_nothing_else():
    spikes, weight, bias, _ = case(2, 61, 4, 6, 8)
    spikes[:, :, :, :4] = 0
    assert torch.equal(conv_spikes(spikes, weight, bias)[..., :3], bias.detach()[:, None, None].expand(2, 4, 6, 3))


def test_bfloat16_is_rounded_once():
    spikes, weight, bias, slope = case(4, 61, 16, 12, 10)
    with torch.autocast("cpu", torch.bfloat16): out = conv_spikes(spikes, weight, bias)
    assert out.dtype == torch.bfloat16 and torch.equal(out, conv_spikes(spikes, weight, bias).bfloat16())
    half = slope.bfloat16()
    for a, b in zip(torch.autograd.grad(out, (weight, bias), half), torch.autograd.grad(conv_spikes(spikes, weight, bias), (weight, bias), half.float())):
        assert torch.equal(a, b)


def test_threads_change_nothing():
    spikes, weight, bias, slope = case(21, 61, 8, 70, 11)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = conv_spikes(spikes, weight, bias)
            found.append((out, *torch.autograd.grad(out, (weight, bias), slope)))
            assert torch.get_num_threads() == threads
    finally: torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


@pytest.mark.parametrize("change", ["many", "double", "long", "no numba"])
def test_what_it_cannot_do_a_dense_convolution_does(change, added, monkeypatch):
    spikes, weight, bias, _ = case(2, 65 if change == "long" else 61, 4, 6, 8, rate=0.3 if change == "many" else 0.06)
    if change == "double": weight, bias = weight.detach().double(), bias.detach().double()
    if change == "no numba": monkeypatch.setattr(sparse, "on_cpu", lambda x: False)
    close(conv_spikes(spikes, weight, bias), F.conv2d(spikes.to(weight.dtype), weight, bias, padding=1), 1e-6)
    assert not added


def test_pictures_of_0_and_255_are_no_spikes():
    spikes = torch.zeros(1, 61, 4, 5, dtype=torch.uint8); spikes[0, 60, 2, 2] = 255
    with pytest.raises(ValueError, match="spikes of 255 in a place and frame: 0 and 1 expected"): conv_spikes(spikes, torch.zeros(2, 61, 3, 3), torch.zeros(2))


def test_no_windows_give_no_maps():
    spikes, weight, bias, slope = case(0, 61, 4, 6, 8)
    out = conv_spikes(spikes, weight, bias)
    assert out.shape == (0, 4, 6, 8) and not any(g.any() for g in torch.autograd.grad(out, (weight, bias), slope))


@pytest.mark.parametrize("fsve", [None, "full"])
def test_a_model_says_the_same_of_bytes_and_of_floats(fsve, added):
    from dataclasses import replace
    from spklip.fsve import FSVEConfig
    config = preset_of("smoke").model
    model = SPKLIP(replace(config, fsve=FSVEConfig(part=fsve)) if fsve else config, learn_wordpiece(["a person waves"])).eval()
    spikes = (torch.rand(3, 250, config.height, config.width) < 0.06).byte()
    with torch.no_grad(): bits, floats = model.encode_video(spikes), model.encode_video(spikes.float())
    assert added
    close(bits, floats, 1e-5 if not fsve else .2) # a neuron at its threshold may fire or not


def test_mtf_learns_from_bytes_as_from_floats():
    torch.manual_seed(0)
    mtf, blocks = MTF(HSFEConfig(filters=4, channel_step=9)), (torch.rand(3, 61, 8, 10) < 0.06).byte()
    found = []
    for x in (blocks, blocks.float()):
        mtf.zero_grad(); mtf(x).square().sum().backward()
        found.append([p.grad.clone() for p in mtf.parameters()])
    for a, b in zip(*found): close(a, b, 1e-5)
