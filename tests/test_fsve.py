"Neurons, layers and encoders of FSVE against definitions written out, and against spikingjelly."
import weakref
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from spklip import fsve
from spklip.fsve import (FSVEConfig, IntegerLIF, LIF, LIFConfig, Rectangle, SpikeNorm, SpikingAttention, SpikingBottleneck, TDBN, firing, lif_by_steps,
                         unroll)
from spklip.stcl import SPKLIP, spiking
from spklip.train import preset_of

@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_membrane_that_counts_is_as_exact_as_its_currents_and_no_less_than_float32(dtype):
    layer, x = IntegerLIF(LIFConfig(decay=0.5, threshold=0.5), levels=4), torch.randn(6, 5000, generator=torch.Generator().manual_seed(0)).to(dtype)
    u, expected = x[0].double(), []
    for t in range(6):
        if t: u = 0.5*(u - expected[-1]) + x[t].double()
        expected.append((u/0.5).round().clamp(0, 4)*0.5)
    assert layer(x).dtype == dtype and torch.equal(layer(x).double(), torch.stack(expected))

def test_trace_by_hand():
    "decay 0.25, threshold 0.5: 0.3; 0.075+0.3; 0.09375+0.5 fires; 0.4; 0.1+0.4 fires at the threshold itself."
    assert LIF()(torch.tensor([0.3, 0.3, 0.5, 0.4, 0.4])).tolist() == [0, 0, 1, 0, 1]

def test_a_spike_resets_to_zero_and_nothing_else_remains():
    assert LIF(LIFConfig(decay=1.))(torch.tensor([3., 0.4, 0.2, 0.])).tolist() == [1, 0, 1, 0]

@pytest.mark.parametrize("lens", [0.2, 0.5, 1.0])
def test_surrogate_is_its_formula(lens):
    u = torch.linspace(-2, 2, 401, requires_grad=True)
    Rectangle.apply(u - 0.5, lens).sum().backward()
    assert torch.equal(u.grad, ((u.detach() - 0.5).abs() <= lens)/(2*lens))

@pytest.mark.parametrize("shape", [(1, 7), (4, 3, 5, 6, 7), (16, 2, 32, 8, 10)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "every second"])
def test_fused_is_the_plain_way(shape, layout):
    torch.manual_seed(0)
    x = torch.randn(shape)
    if layout == "channels_last" and len(shape) == 5: x = x.flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, shape[:2])
    if layout == "every second": x = torch.randn(*shape[:-1], 2*shape[-1])[..., ::2]
    config, grad = LIFConfig(decay=0.4, threshold=0.7, lens=0.3), torch.randn(shape)
    ours, plain = x.detach().requires_grad_(), x.detach().clone().requires_grad_()
    a, b = fsve.FusedLIF.apply(ours, config, len(x)), lif_by_steps(plain, config)
    a.backward(grad); b.backward(grad)
    assert torch.equal(a, b) and torch.allclose(ours.grad, plain.grad, atol=1e-6)

def test_fused_keeps_no_currents():
    x = torch.randn(4, 3, 8, requires_grad=True)
    current = x*1; kept = weakref.ref(current.untyped_storage())
    spikes = fsve.FusedLIF.apply(current, LIFConfig(), 4); del current
    assert kept() is None and spikes.grad_fn
    spikes.sum().backward()

@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("stays", [True, False])
def test_sixteen_bits_are_read_and_written_as_copies_of_them_would_be(steps, stays):
    torch.manual_seed(0)
    x, grad = torch.randn(1 if stays else steps, 3, 5, 6, 70).bfloat16(), torch.randn(steps, 3, 5, 6, 70).bfloat16()
    half, wide = x.clone().requires_grad_(), x.float().requires_grad_()
    a, b = fsve.FusedLIF.apply(half, LIFConfig(), steps), fsve.FusedLIF.apply(wide, LIFConfig(), steps)
    a.backward(grad); b.backward(grad.float())
    assert a.dtype == half.grad.dtype == torch.bfloat16
    assert torch.equal(a.float(), b) and torch.equal(half.grad, wide.grad.bfloat16())

@pytest.mark.parametrize("kernel", [lambda f: f, lambda f: getattr(f, "py_func", f)], ids=["compiled", "python"])
def test_a_bfloat16_is_half_of_a_float32(kernel):
    values = torch.cat([torch.randn(2000)*10.**torch.randint(-20, 20, (2000,)), torch.tensor([0., -0., 1., 257/256, 259/256, 1e-40, 3e38])])
    half = values.bfloat16()
    assert [int(kernel(fsve.narrowed)(np.float32(v))) for v in values.numpy()] == half.view(torch.uint16).tolist()
    assert [float(kernel(fsve.widened)(b)) for b in half.view(torch.uint16).numpy()] == half.float().tolist()

@pytest.fixture
def programs(monkeypatch):
    "Counts what a GPU would compile, and runs it here as it was captured."
    torch._dynamo.reset()
    counter, make = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: make(f, backend=counter, **how))
    monkeypatch.setattr(fsve, "lif_compiled", cache(fsve.lif_compiled.__wrapped__))
    return counter

def test_what_is_compiled_for_a_gpu_is_the_plain_way_and_one_for_all_layers(programs):
    torch.manual_seed(0)
    config, last = LIFConfig(decay=0.4, threshold=0.7, lens=0.3), lambda x: x.flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, x.shape[:2])
    def check(x, steps=5):
        grad, ours, plain = torch.randn(steps, *x.shape[1:]), x.clone().requires_grad_(), x.clone().requires_grad_()
        a, b = fsve.lif_on_gpu(1*ours, config, steps), lif_by_steps((1*plain).expand(steps, *x.shape[1:]), config)
        a.backward(grad); b.backward(grad)
        assert torch.equal(a, b) and torch.allclose(ours.grad, plain.grad, atol=1e-6) and a[0].stride() == x[0].stride()
        with torch.no_grad(): assert torch.equal(fsve.lif_on_gpu(x, config, steps), b)
    for x in (torch.randn(5, 3, 40), last(torch.randn(5, 2, 3, 4, 6)), last(torch.randn(5, 3, 6, 8, 2)), torch.randn(5, 7, 9).transpose(1, 2)): check(x)
    assert programs.frame_count == 2
    for x in (last(torch.randn(1, 2, 3, 4, 6)), torch.randn(1, 3, 8)): check(x)
    for kind in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", kind): check(torch.randn(5, 3, 50)); check(torch.randn(1, 3, 50))
    assert programs.frame_count == 4

def test_a_membrane_keeps_float32_under_autocast():
    "A current that 16 bits would lose beside the membrane still counts."
    x = torch.tensor([0.5 - 2**-9, *[0.000366]*7]).to(torch.bfloat16)
    assert LIF(LIFConfig(decay=1.))(x).tolist() == [0]*6 + [1, 0] and LIF()(x).dtype == torch.bfloat16
    assert lif_by_steps(x, LIFConfig(decay=1.)).sum() == 0

def test_a_current_repeated_without_memory():
    "A current that stays, as HSFE gives: its gradient is the sum over time."
    torch.manual_seed(0)
    for make in (lambda x: x, lambda x: x.transpose(-1, 1)):
        base, grad = make(torch.randn(1, 3, 8, 5)), make(torch.randn(4, 3, 8, 5))
        for layer in (LIF(LIFConfig(decay=0.4)), IntegerLIF(levels=2)):
            x, y = base.clone().requires_grad_(), base.clone().requires_grad_()
            once, repeated = layer(x, 4), layer(y.expand(4, *y.shape[1:]))
            once.backward(grad); repeated.backward(grad)
            assert torch.equal(once, repeated) and torch.allclose(x.grad, y.grad, atol=1e-6)
        plain = lif_by_steps(base.expand(4, *base.shape[1:]), LIFConfig(decay=0.4))
        assert torch.equal(LIF(LIFConfig(decay=0.4))(base, 4), plain)

def test_spikingjelly_agrees():
    base = pytest.importorskip("spikingjelly.activation_based.neuron")
    from spikingjelly.activation_based import surrogate
    torch.manual_seed(0)
    x = torch.randn(6, 4, 50)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    node = base.LIFNode(tau=4/3, decay_input=False, v_threshold=0.5, v_reset=0., detach_reset=True, surrogate_function=surrogate.Rect(alpha=1.), step_mode="m")
    a, b = LIF()(ours), node(theirs)
    grad = torch.randn_like(x)
    a.backward(grad); b.backward(grad)
    assert torch.equal(a, b) and torch.allclose(ours.grad, theirs.grad, atol=1e-5)

@pytest.mark.parametrize("bad", [dict(decay=1.5), dict(threshold=0), dict(lens=-1)])
def test_neurons_that_cannot_be(bad):
    with pytest.raises(ValueError, match=str(next(iter(bad)))): LIFConfig(**bad)

@pytest.mark.parametrize("bad", [dict(part="half"), dict(neuron="if"), dict(steps=0), dict(decay=-1)])
def test_encoders_that_cannot_be(bad):
    with pytest.raises(ValueError, match=str(next(iter(bad)))): FSVEConfig(**bad)

def test_counts_unroll_to_spikes():
    layer = IntegerLIF(LIFConfig(threshold=0.7), levels=4)
    counts, gate = layer(2*torch.randn(3, 2, 6, 5, 5)), layer(2*torch.randn(3, 2, 6, 5, 5))
    spikes = unroll(counts, layer)
    assert spikes.shape == (12, 2, 6, 5, 5) and set(spikes.unique().tolist()) == {0, 1}
    assert torch.allclose(0.7*spikes.unflatten(0, (3, 4)).sum(1), counts)
    assert torch.equal(unroll(torch.minimum(counts, gate), layer), spikes*unroll(gate, layer)) # a gate is AND

def test_integer_trace_by_hand():
    "theta 0.5, decay 0.5, up to 2 spikes: 0.6 gives 1 and leaves 0.1; 0.05+1.5 gives 2 and leaves 0.55; 0.275-0.1 gives none."
    layer = IntegerLIF(LIFConfig(decay=0.5, threshold=0.5), levels=2)
    x = torch.tensor([0.6, 1.5, -0.1], requires_grad=True)
    spikes = layer(x)
    assert spikes.tolist() == [0.5, 1.0, 0.0]
    spikes.sum().backward()
    assert torch.allclose(x.grad, torch.tensor([1., 0.5*0 + 0.5, 1.]))

def test_tdbn_is_its_definition():
    torch.manual_seed(0)
    x, norm = 3*torch.randn(4, 6, 3, 5, 7) + 2, TDBN(3, threshold=0.7)
    mean, var = x.mean((0, 1, 3, 4), keepdim=True), x.var((0, 1, 3, 4), keepdim=True, unbiased=False)
    assert torch.allclose(norm(x), 0.7*(x - mean)/(var + norm.eps).sqrt(), atol=1e-5)
    assert torch.allclose(norm.running_mean, 0.1*mean.flatten(), atol=1e-5)

def test_where_all_is_0_nothing_fires_whatever_was_learnt():
    for alpha in (0.5, 0., -0.01): assert not SpikeNorm(alpha=alpha)(torch.zeros(3, 8)).any()


def test_scale_is_a_threshold():
    "Eq. 10's product with scale is eq. 11's division of the threshold."
    norm, x = SpikeNorm(alpha=0.8, scale=True), torch.randn(50, 16)
    with torch.no_grad(): norm.log_scale.fill_(-0.6)
    assert torch.equal(norm(x), (norm.log_scale.exp()*x >= norm.alpha*x.abs().mean(-1, keepdim=True)).float())

def test_attention_is_a_loop():
    torch.manual_seed(0)
    layer, x = SpikingAttention(16, 4), (torch.rand(2, 5, 16) < .4).float()
    q, k, v, _ = (y.detach() for y in layer.spikes(x))
    out = torch.zeros(2, 5, 16)
    for b in range(2):
        for h in range(4):
            for i in range(5):
                scores = torch.tensor([sum(q[b, h, i]*k[b, h, j])/4**.5 for j in range(5)])
                fires = (scores >= layer.gate.alpha.item()*scores.abs().mean().clamp(min=1e-6)).float()
                out[b, i, 4*h:4*h + 4] = sum(fires[j]*v[b, h, j] for j in range(5))
    assert torch.allclose(layer(x), layer.out(out), atol=1e-6)

def test_fires_after_the_sum():
    "A.5: a block's output is neurons on TDBN(F(S)) + S."
    block = SpikingBottleneck(16, 4, FSVEConfig())
    x = (torch.rand(4, 2, 16, 6, 6) < .3).float()
    inner = block.expand(block.spatial(block.reduce(x)))
    assert torch.equal(block(x), LIF()(inner + x)) and not torch.equal(inner, inner.round())

@pytest.mark.parametrize("part", ["cnn", "full"])
@pytest.mark.parametrize("neuron", ["lif", "integer"])
def test_plugs_into_spklip(part, neuron, tmp_path):
    "Embeds, learns, is saved and read, and every layer of neurons sends spikes."
    torch.manual_seed(0)
    model = SPKLIP(replace(preset_of("smoke").model, fsve=FSVEConfig(part=part, neuron=neuron, steps=2)))
    clips = (torch.rand(3, 250, 32, 40) < .06).to(torch.uint8)
    for _ in range(2): model.encode_video(clips)
    v = model.encode_video(clips)
    (v*torch.randn_like(v)).sum().backward()
    behind_zero = ("trunk.pool.norm", "trunk.pool.query", "trunk.pool.key_value") # what attention finds is added from zero
    silent = [n for part in (model.hsfe, model.star_net) for n, p in part.named_parameters() if p.grad is None or not p.grad.any()]
    assert [n for n in silent if not n.startswith(behind_zero)] == []
    model.eval()
    rates = firing(model, lambda: model.encode_video(clips))
    assert len(rates) > 10 and any(rates.values())
    model.save_pretrained(tmp_path)
    again = SPKLIP.from_pretrained(tmp_path)
    assert again.config.fsve == model.config.fsve and torch.equal(again.encode_video(clips), model.encode_video(clips))

def test_one_surrogate_for_all_neurons():
    "`lens` is that of the firing norms in the spiking Transformer too."
    model = SPKLIP(replace(preset_of("smoke").model, fsve=FSVEConfig(part="full", lens=.1)))
    assert {m.lens if isinstance(m, SpikeNorm) else m.config.lens for m in model.modules() if isinstance(m, (SpikeNorm, LIF))} == {.1}

def test_firing_names_a_layer_that_sends_no_spikes():
    layer = nn.Sequential(LIF())
    layer[0].forward = lambda x: x
    with pytest.raises(ValueError, match="^0: sends on"): firing(layer, lambda: layer(torch.tensor([0.5])))

def test_a_current_has_as_many_steps_as_the_spikes_or_one():
    with pytest.raises(ValueError, match="a current of 2 steps for 4"): LIF()(torch.ones(2, 3), 4)
    with pytest.raises(ValueError, match="a current of 2 steps for 4"): IntegerLIF()(torch.ones(2, 3), 4)
    assert LIF()(torch.ones(1, 3), 4).shape == IntegerLIF()(torch.ones(1, 3), 4).shape == (4, 3)

@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_firing_counts_spikes_of_any_threshold(kind):
    "Also where three thresholds, rounded, are not three times one."
    for threshold in (.7, .9, 1.1):
        layer = nn.Sequential(IntegerLIF(LIFConfig(threshold=threshold)))
        assert firing(layer, lambda: layer(torch.tensor([[0., 1, 2, 3, 4]]).mul(threshold).to(kind))) == {"0": 2.}

def test_firing_weighs_calls_by_their_size():
    layer = nn.Sequential(LIF())
    calls = [torch.zeros(1, 52), torch.ones(1, 8)]
    assert firing(layer, lambda: [layer(x) for x in calls]) == pytest.approx({"0": 8/60})
    layer[0].forward = lambda x: -x
    with pytest.raises(ValueError, match=r"^0: sends on \[-1.0\]"): firing(layer, lambda: layer(torch.ones(1, 1)))

@pytest.mark.parametrize("part", ["cnn", "full"])
def test_a_tower_spikes_too(part):
    small = preset_of("smoke").model
    model = SPKLIP(replace(small, fsve=FSVEConfig(part=part), hsfe=replace(small.hsfe, tower_blocks=2, tower_width=6))).eval()
    rates = firing(model, lambda: model.encode_video((torch.rand(1, 250, 32, 40) < .06).to(torch.uint8)))
    assert sum("tower" in name for name in rates) == 1 + 2*3

def bounded(model):
    "The same ANN with random statistics and weights where it starts at zero, so that every part of it counts."
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            for p, low in ((m.running_mean, -.2), (m.running_var, .5), (m.weight.data, .5), (m.bias.data, -.2)): p.uniform_(low, low + 1)
    return model

@pytest.mark.parametrize("layers", [(1, 1), (2, 3)])
def test_an_ann_is_inherited(layers):
    "With neurons so fine that they hardly round, a spiking encoder says what the ANN says whose weights it has."
    torch.manual_seed(0)
    small = preset_of("smoke").model
    config = replace(small, hsfe=replace(small.hsfe, attention=False), star_net=replace(small.star_net, layers=layers, stem_stride=2))
    ann, clips = bounded(SPKLIP(config)), (torch.rand(6, 250, 32, 40) < torch.rand(6, 1, 32, 40)*.2).to(torch.uint8)
    nn.init.normal_(ann.star_net.trunk.pool.add.weight, std=.1)
    for m in ann.modules():
        if isinstance(m, nn.BatchNorm2d): m.momentum = 1.
    ann.train(); ann.encode_video(clips); ann.eval() # both now normalise by these clips
    fine = FSVEConfig(part="cnn", neuron="integer", steps=1, levels=4000)
    new = spiking(ann, fine, clips).eval()
    alike = torch.nn.functional.cosine_similarity(new.encode_video(clips), ann.encode_video(clips))
    assert alike.min() > 0.98
    coarse = spiking(ann, replace(fine, levels=2), clips).eval()
    assert torch.nn.functional.cosine_similarity(coarse.encode_video(clips), ann.encode_video(clips)).mean() < alike.mean()

def test_a_transformer_is_inherited_whole_or_not_at_all():
    ann, clips = SPKLIP(preset_of("smoke").model), (torch.rand(2, 250, 32, 40) < .06).to(torch.uint8)
    new = spiking(ann, FSVEConfig(part="cnn", steps=1), clips).star_net.temporal.state_dict()
    assert all(torch.equal(new[k], v) for k, v in ann.star_net.temporal.state_dict().items())
    ann.star_net.temporal.more = nn.Linear(1, 1)
    with pytest.raises(RuntimeError, match="Unexpected key"): spiking(ann, FSVEConfig(part="cnn", steps=1), clips)

def test_a_tower_is_not_inherited():
    small = preset_of("smoke").model
    ann = SPKLIP(replace(small, hsfe=replace(small.hsfe, tower_blocks=1, tower_width=6)))
    with pytest.raises(ValueError, match="tower"): spiking(ann, FSVEConfig(), (torch.rand(2, 250, 32, 40) < .06).to(torch.uint8))
