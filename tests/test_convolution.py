"Convolutions by tiles against torch's: results, gradients, and where they are used."

import pytest
import torch
import torch.nn.functional as F

from spklip import convolution
from spklip.convolution import ByTiles, Conv3x3, as_defined, by_tiles, conv3x3, gradients_by_tiles
from spklip.hsfe import MTF, HSFEConfig
from spklip.stcl import SPKLIP
from test_model import build, small


def tensors(*shapes, dtype=torch.float64):
    return [torch.randn(s, dtype=dtype, generator=torch.Generator().manual_seed(i)).requires_grad_() for i, s in enumerate(shapes)]

def plainly(x, weight, bias, onto=None, relu=False, exact=False):
    out = F.conv2d(x, weight, bias, padding=1)
    out = out if onto is None else out + onto
    return F.relu(out) if relu else out


@pytest.mark.parametrize("block", [1, 7, 64]) # of patches: each alone, some left over, more than there are
@pytest.mark.parametrize("n, c, d, h, w", [(1, 3, 2, 5, 7), (3, 4, 5, 6, 1), (2, 2, 2, 1, 4), (1, 9, 17, 12, 16)])
@pytest.mark.parametrize("adds, relu", [(False, False), (False, True), (True, True), (True, False)])
def test_results_and_gradients(n, c, d, h, w, block, adds, relu, monkeypatch):
    monkeypatch.setattr(convolution, "BLOCK", block)
    x, weight, bias, onto, slope = tensors((n, c, h, w), (d, c, 3, 3), (d,), (n, d, h, w), (n, d, h, w))
    asked = [x, weight, bias] + [onto]*adds
    for exact in (False, True):
        found = [(out := way(x, weight, bias, onto if adds else None, relu, exact), *torch.autograd.grad(out, asked, slope))
                 for way in (ByTiles.apply, plainly)]
        for ours, theirs in zip(*found, strict=True): torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("frozen", range(3))
def test_only_what_learns_is_asked_for(frozen):
    asked = tensors((1, 2, 8, 8), (3, 2, 3, 3), (3,))
    asked[frozen].requires_grad_(False)
    ByTiles.apply(*asked, None, False, False).sum().backward()
    assert [t.grad is None for t in asked] == [i == frozen for i in range(3)]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope, = torch.autograd.grad(ByTiles.apply(*asked, None, False, False).square().sum(), asked[frozen - 1], create_graph=True)
        slope.sum().backward()


def test_five_digits_in_32_bits():
    "At the width of the paper's tower, where all three of its convolutions sum over most."
    x, weight, slope = tensors((1, 64, 60, 80), (64, 64, 3, 3), (1, 64, 60, 80), dtype=torch.float32)
    exact = [t.detach().double() for t in (x, weight, slope)]
    ours = by_tiles(x, weight), *gradients_by_tiles(x, weight, slope)
    right = [way(*shapes, exact[2], padding=1) for way, shapes in ((torch.nn.grad.conv2d_input, (x.shape, exact[1])),
        (torch.nn.grad.conv2d_weight, (exact[0], weight.shape)))]
    for found, wanted in zip(ours, (F.conv2d(*exact[:2], padding=1), *right)): assert (found.double() - wanted).abs().max() < 1e-5*wanted.abs().max()


def test_threads_change_nothing_and_are_given_back():
    x, weight, slope = tensors((2, 5, 37, 41), (6, 5, 3, 3), (2, 6, 37, 41), dtype=torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append((by_tiles(x, weight), *gradients_by_tiles(x, weight, slope)))
            with pytest.raises(RuntimeError): by_tiles(x, weight.new_zeros(6, 5, 2, 3))
            assert torch.get_num_threads() == threads
    finally: torch.set_num_threads(before)
    assert all(map(torch.equal, *found))


def test_shapes_that_do_not_fit():
    x, weight = torch.zeros(1, 5, 8, 8), torch.zeros(6, 4, 3, 3)
    with pytest.raises(ValueError, match=r"weights \[6, 4, 3, 3\] and \[1, 5, 8, 8\] do not fit$"): by_tiles(x, weight)
    with pytest.raises(ValueError, match=r"do not fit, onto \[1, 6, 8, 9\]"): by_tiles(x[:, :4], weight, onto=torch.zeros(1, 6, 8, 9))


def test_pixels_without_spikes_pass_no_gradient_on(monkeypatch):
    "The exposure of a window in which nothing fires is zero to the last bit, and so is its ReLU's slope."
    monkeypatch.setattr(convolution, "QUICK", True)
    mtf, blocks = MTF(HSFEConfig(channel_step=9)), (torch.rand(1, 61, 128, 128, generator=torch.Generator().manual_seed(0)) < .02).float()
    used, found = ByTiles.apply, []
    monkeypatch.setattr(ByTiles, "apply", lambda *a: found.append(a) or used(*a))
    F.relu_(mtf.expose(blocks)).sum().backward()
    seen = [(blocks[0, 30 - k//2 : 31 + k//2].sum(0) > 0).sum() for k in mtf.windows]
    assert len(found) == 1 and [conv.bias.grad[0] for conv in mtf.first] == seen and seen[-1] < blocks[0, 0].numel()


def test_what_is_no_number_stays_none():
    x = torch.zeros(1, 2, 9, 9); x[0, 0, 4, 4] = float("nan")
    assert by_tiles(x, torch.ones(1, 2, 3, 3), relu=True)[0, 0, 3:6, 3:6].isnan().all()


def test_where_it_is_used(monkeypatch):
    used = []
    monkeypatch.setattr(ByTiles, "apply", lambda *a: used.append(tuple(a[0].shape)) or plainly(*a))
    large, layer = torch.zeros(1, 16, 128, 128), Conv3x3(16, 16)
    monkeypatch.setattr(convolution, "QUICK", False); layer(large)
    monkeypatch.setattr(convolution, "QUICK", True)
    for other in (torch.zeros(1, 16, 32, 32), large.double(), large.to("meta")): Conv3x3(16, 16).to(other)(other)
    Conv3x3(16, 15)(large); Conv3x3(15, 16)(large[:, :15])
    with torch.autocast("cpu", torch.bfloat16): layer(large)
    with as_defined(): layer(large)
    with pytest.raises(KeyError), as_defined(): {}[0]
    assert used == []
    layer(large)
    with torch.inference_mode(): layer(large)
    assert used == [(1, 16, 128, 128)]*2


@pytest.mark.parametrize("frugal", [False, True])
def test_a_model_learns_the_same(frugal, monkeypatch):
    monkeypatch.setattr(convolution, "QUICK", True)
    config, found = small(128, 128, tower_blocks=1, tower_width=16), []
    clips = (torch.rand(1, 250, 128, 128, generator=torch.Generator().manual_seed(1)) < .06).to(torch.uint8)
    def learn():
        model: SPKLIP = build(config).train(); model.frugal = frugal
        for layer in model.star_net.temporal.layers: layer.eval() # no dropout
        video = model.encode_video(clips)
        (video @ torch.arange(video.shape[1], dtype=torch.float32)).sum().backward()
        return {"video": video} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    ours = learn()
    with as_defined(): theirs = learn()
    assert ours.keys() == theirs.keys() and torch.allclose(ours["video"], theirs["video"], atol=1e-5) and any("tower" in n for n in ours)
    for name, right in theirs.items(): assert (ours[name] - right).norm() < .05*right.norm(), name # sums in which all but cancels
    ours, theirs = (torch.cat([t.flatten() for t in found.values()]) for found in (ours, theirs))
    assert (ours - theirs).norm() < 2e-3*theirs.norm()
