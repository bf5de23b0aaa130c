"Three ways of counting agree; joules by hand; counters that wrap."
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from spklip import energy
from spklip.baselines import KINDS, BaselineConfig
from spklip.energy import (AMOUNTS, COSTS, MEMORY, Cost, Count, break_even, by_formula, by_hooks, by_op_counter, carried_over, conv_count, densely,
                           joules, measured_joules, rapl, reached, skipping, spike_counts)
from spklip.fsve import FSVEConfig
from spklip.hsfe import hsfe_macs
from spklip.star_net import star_net_macs
from spklip.stcl import SPKLIP, SPKLIPConfig, macs
from spklip.train import preset_of

SMOKE = preset_of("smoke").model
PAIRS = [(None, ""), *((part, neuron) for part in ("cnn", "full") for neuron in ("lif", "integer"))]

def spiking(part, neuron, **sizes):
    how = part and FSVEConfig(part=part, neuron=neuron, steps=3 if neuron == "lif" else 2, levels=3)
    return replace(SMOKE, fsve=how, hsfe=replace(SMOKE.hsfe, **sizes))

def clips(B=2, height=32, width=40):
    return (torch.rand(B, 250, height, width, generator=torch.Generator().manual_seed(1)) < .06).to(torch.uint8)

def awake(config):
    "A model whose normalisation has seen clips: without, most of its layers are silent and the rest fires along the borders."
    model = SPKLIP(config)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d): m.momentum = None  # the mean of all batches, and there is one
    with torch.no_grad(): model.train().encode_video(clips(4))
    return model.eval()

@pytest.mark.parametrize("part, neuron", PAIRS)
@pytest.mark.parametrize("stars", [dict(), dict(layers=(2, 1), stem_stride=2), dict(stem_stride=1, layers=(1, 2, 1))])
def test_formula_and_hooks_agree(part, neuron, stars):
    "Every amount of every layer, in the same order; SOPs where each input fires as often as the next, up to the borders."
    torch.manual_seed(0)
    config = spiking(part, neuron)
    config = replace(config, star_net=replace(config.star_net, **stars))
    heard = by_hooks(awake(config), clips())
    said = by_formula(config, {c.layer: c.rate for c in heard if c.kind == "conv" or c.kind == "linear" and c.active or c.kind == "attention" and c.binary})
    assert [(c.layer, c.kind, c.binary) for c in heard] == [(c.layer, c.kind, c.binary) for c in said]
    for name in set(AMOUNTS) - {"acs", "active", "zeros"}: assert [getattr(c, name) for c in heard] == [getattr(c, name) for c in said], name
    assert [c.acs for c in heard] == pytest.approx([c.acs for c in said], rel=0.05)
    assert [c.acs for c in heard if c.kind in ("linear", "attention")] == pytest.approx([c.acs for c in said if c.kind in ("linear", "attention")])

def test_borders_are_exact():
    "Where all inputs fire at each step the formula knows what the borders cost."
    config = SMOKE
    heard, said = by_hooks(SPKLIP(config), torch.ones(1, 250, 32, 40, dtype=torch.uint8)), by_formula(config)
    assert [c.acs for c in heard] == [c.acs for c in said] and sum(c.acs for c in heard) > 0

@pytest.mark.parametrize("size, kernel, stride", [(5, 3, 1), (5, 3, 2), (6, 3, 2), (7, 1, 1), (1, 3, 1)])
def test_reached_is_a_convolution_of_ones(size, kernel, stride):
    seen = torch.conv1d(torch.ones(1, 1, size), torch.ones(1, 1, kernel), stride=stride, padding=kernel//2)
    assert reached(size, kernel, stride) == seen.sum()

@pytest.mark.parametrize("name", ["smoke", "laptop", "gpu", "paper"])
def test_an_anns_products_are_those_of_its_definition(name):
    c = preset_of(name).model
    assert sum(x.dense for x in by_formula(c)) == macs(c) == \
        hsfe_macs(c.hsfe, c.height, c.width) + star_net_macs(c.hsfe.maps, c.star_net, c.height, c.width, c.hsfe.n_blocks)

def test_layers_are_modules():
    for part, neuron in PAIRS:
        model = SPKLIP(spiking(part, neuron))
        for c in by_formula(model.config): model.get_submodule(c.layer)

@pytest.mark.parametrize("part, neuron", PAIRS)
def test_the_tower_is_counted(part, neuron):
    config = spiking(part, neuron, tower_blocks=2, tower_width=8)
    heard, said = by_hooks(SPKLIP(config), clips(1)), by_formula(config)
    assert [(c.layer, c.kind, c.dense, c.neurons, c.weights) for c in heard] == [(c.layer, c.kind, c.dense, c.neurons, c.weights) for c in said]
    assert sum(c.part == "tower" and c.kind == "conv" for c in said) == 7

def test_one_spike_by_hand():
    "A spike inside reaches 9 taps, in the corner 4, of 5 outputs each; with stride 2 the corner's pixel reaches 1."
    for (y, x), stride, taps in (((2, 2), 1, 9), ((0, 0), 1, 4), ((0, 2), 1, 6), ((0, 0), 2, 1), ((1, 1), 2, 4)):
        picture = torch.zeros(1, 3, 6, 6); picture[0, 1, y, x] = 1
        conv = nn.Conv2d(3, 5, 3, stride, 1)
        assert conv_count("hsfe.mtf", conv, picture, 1., 1, False).acs == 5*taps
    two = conv_count("hsfe.mtf", nn.Conv2d(3, 5, 3, 1, 1), picture*2*0.7, 0.7, 4, False)  # two spikes of four steps
    assert (two.acs, two.macs, two.dense) == (2*5*9, 0, 4*36*5*27)

def test_what_is_no_spike_is_seen():
    "A layer of neurons that sends on anything but spikes turns its successor's accumulates into products."
    torch.manual_seed(0)
    model = SPKLIP(spiking("cnn", "lif"))
    before = {c.layer: c for c in by_hooks(model, clips(1))}
    model.hsfe.neurons[0].forward = lambda x, steps=None: x*0.3
    after = {c.layer: c for c in by_hooks(model, clips(1))}
    assert before["hsfe.mtf.second.0"].macs == 0 and after["hsfe.mtf.second.0"].macs == after["hsfe.mtf.second.0"].dense > 0
    assert spike_counts(torch.tensor([0., 0.5, 2.]), 0.5, 4).tolist() == [0, 1, 4]
    assert spike_counts(torch.tensor([0., 0.5, 2.5]), 0.5, 4) is None and spike_counts(torch.tensor([0.3]), 0.5, 4) is None

@pytest.mark.parametrize("part", [None, "cnn", "full"])
def test_listening_leaves_the_model_as_it_was(part):
    torch.manual_seed(0)
    model = SPKLIP(spiking(part, "lif")).eval()
    before = model.encode_video(clips())
    attributes = lambda: [(n, sorted(m.__dict__), len(m._forward_hooks)) for n, m in model.named_modules()]
    was = attributes()
    by_hooks(model, clips())
    assert attributes() == was and torch.equal(model.encode_video(clips()), before)

@pytest.mark.parametrize("part", [None, "cnn", "full"])
def test_spikingjelly_agrees(part):
    "MACs and synaptic operations, except where its conventions differ: see the notebook."
    pytest.importorskip("spikingjelly.activation_based.op_counter")
    torch.manual_seed(0)
    config = spiking(part, "lif")
    model, video = SPKLIP(config), clips()
    with torch.no_grad():
        for p in model.parameters():
            if not p.any(): nn.init.normal_(p, std=0.02)  # it takes weights of 0 for spikes
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d): m.momentum = 1.
        model.encode_video(video)                         # norms that know their currents: no layer is silent
    ours, theirs = by_hooks(model, video), by_op_counter(model, video)
    assert sum(c.acs for c in ours) > 0 and theirs["acs"] == 2*sum(c.acs for c in ours)
    assert theirs["macs"] == 2*sum(c.macs for c in ours if c.kind in ("conv", "linear", "attention"))

def test_joules_by_hand():
    cost = Cost(mac=4, ac=1, neuron=0.5, access=32, word=16, spike=1)   # 1 pJ a bit
    counts = [Count("hsfe.mtf", "conv", dense=10, acs=3, weights=2, inputs=5, outputs=7, binary=True),
              Count("hsfe.neurons.0", "neurons", neurons=6, outputs=6, membranes=12),
              Count("hsfe.sa.squeeze", "conv", dense=8, macs=8, weights=1, inputs=2, outputs=4)]
    for memory, bits in (("reads", [32 + 5, 16*12, 16*3]), ("words", [32 + 5 + 16*7, 16*12 + 6, 16*7]), ("operations", [32*3, 32*6, 32*8])):
        found = joules(counts, cost, memory)
        assert found.memory.tolist() == pytest.approx([1e-12*b for b in bits])
        assert found.compute.tolist() == pytest.approx([3e-12, 0, 32e-12]) and found.neurons.tolist() == pytest.approx([0, 3e-12, 0])
        assert found.total.sum() == pytest.approx(1e-12*(sum(bits) + 38))
    assert joules(densely(counts), cost).compute.tolist() == pytest.approx([40e-12, 0, 32e-12])
    with pytest.raises(ValueError, match="memory='twice'"): joules(counts, cost, "twice")

def test_skipping_zeros():
    "Half of the inputs are zero: half of the products; what spikes cause and what attention multiplies stays."
    torch.manual_seed(0)
    x = torch.zeros(1, 2, 4, 4); x[:, :, ::2] = 0.3
    count = conv_count("hsfe.tower.0", nn.Conv2d(2, 3, 1), x, 1., 0, True)
    assert skipping([count])[0].macs == count.macs/2 == 3*16
    conv = nn.Conv2d(1, 1, 3, padding=1)
    ann, snn = conv_count("hsfe.tower.0", conv, torch.full((1, 1, 4, 5), 0.3), 1., 0, True), conv_count("hsfe.tower.0", conv, torch.ones(1, 1, 4, 5),
        1., 1, True)
    assert skipping([ann])[0].macs == snn.acs == 10*13          # 3x3 taps on 4 x 5 pixels: those on the padding count for neither
    assert skipping([conv_count("hsfe.tower.0", conv, torch.zeros(1, 1, 4, 5), 1., 0, True)])[0].macs == 0
    others = [c for c in by_hooks(SPKLIP(SMOKE), clips(1)) if c.binary or c.kind not in ("conv", "linear")]
    assert skipping(others) == others

def test_groups_see_their_own_inputs_alone():
    conv = conv_count("hsfe.tower.0", nn.Conv2d(4, 8, 3, padding=1, groups=4), torch.rand(1, 4, 5, 6) + 1, 1., 0, True)
    assert conv.dense == 30*8*9 and skipping([conv])[0].macs == 13*16*8                       # 3x3 taps on 5 x 6 pixels, without the padding

@pytest.mark.parametrize("kind", [k for k in KINDS if k != "hybrid"])                          # HSFE's merging multiplies zeros, which `by_hooks` leaves out
def test_baselines_are_counted_whole(kind, monkeypatch):
    torch.manual_seed(0)
    model, video = SPKLIP(replace(SMOKE, baseline=BaselineConfig(kind, width=16, layers=2, heads=2, adapter=4))).eval(), clips()
    monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)
    with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.encode_video(video)
    assert 2*sum(c.dense for c in by_hooks(model, video) if c.kind in ("conv", "linear", "attention")) == counter.get_total_flops()/2

def test_what_has_no_formula_is_said():
    for other in (replace(SMOKE, star_net=replace(SMOKE.star_net, backbone="resnet")), replace(SMOKE, baseline=BaselineConfig("linear"))):
        with pytest.raises(ValueError, match="only SPKLIP's own layers are known"): by_formula(other)
    with pytest.raises(ValueError, match="an ANN does not fire"): break_even(SMOKE, COSTS["fp32"])

def test_rates_carried_to_another_size():
    counts = [Count("hsfe.mtf.second.0", "conv", active=10, inputs=100, binary=True), Count("hsfe.sa.0.conv", "conv", active=30, inputs=100, binary=True),
              Count("star_net.trunk.stem.0.conv", "conv", active=40, inputs=50, binary=True),
              Count("star_net.trunk.groups.0.reduce.conv", "conv", active=1, inputs=10, binary=True),
              Count("star_net.trunk.groups.0.expand.conv", "conv", active=5, inputs=20, binary=True)]
    config = SPKLIPConfig(fsve=FSVEConfig(part="cnn"))
    rates, like_sa = carried_over(counts, config), carried_over(counts, config, tower="SA")
    assert {Count(k, "").part: v for k, v in rates.items()} == pytest.approx({"MTF": 0.1, "SA": 0.3, "tower": 0.2, "stem": 0.8, "groups": 0.2})
    assert like_sa["hsfe.tower.0.conv"] == pytest.approx(0.3) and not any(k.startswith("hsfe.mtf.first") for k in rates)
    said = by_formula(config, rates, camera=0.05)
    assert said[0].rate == pytest.approx(0.05) and all(c.rate == pytest.approx(rates[c.layer]) for c in said if c.layer in rates)

@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("cost", COSTS.values(), ids=COSTS)
def test_at_break_even_both_cost_the_same(cost, memory):
    config = replace(SMOKE, fsve=FSVEConfig(steps=2))
    rate = break_even(config, cost, memory)
    total = lambda counts: joules(counts, cost, memory).total.sum()
    assert total(by_formula(config, rate, 0.0576)) == pytest.approx(total(by_formula(replace(config, fsve=None), camera=0.0576)))

def test_the_papers_ann():
    "1.372 J is what convolutions and linear modules cost, without attention pooling."
    counts = densely(by_formula(SPKLIPConfig()))
    named = [c for c in counts if c.part != "pool" and c.kind in ("conv", "linear") and not c.layer.endswith("self_attn")]
    assert round(joules(named, COSTS["paper"]).compute.sum(), 3) == 1.372
    assert round(joules(named, COSTS["paper"]).memory.sum(), 4) == 0.0036

# measured

def powercap(folder, **microjoules): # -> reads and sets the counters of a made-up machine
    for name, value in microjoules.items():
        package = folder/name.replace("_", ":"); package.mkdir()
        (package/"max_energy_range_uj").write_text("999\n"); (package/"energy_uj").write_text(f"{value}\n")

def test_rapl_wraps_around(tmp_path):
    powercap(tmp_path, **{"intel-rapl_0": 900, "intel-rapl_1": 10, "intel-rapl_0_0": 500})
    counter = rapl(tmp_path)
    assert counter() == 0
    (tmp_path/"intel-rapl:0"/"energy_uj").write_text("50\n"); (tmp_path/"intel-rapl:1"/"energy_uj").write_text("30\n")
    (tmp_path/"intel-rapl:0:0"/"energy_uj").write_text("600\n")
    assert counter() == pytest.approx((150 + 20)/1e6) # sub-domains are inside their package
    (tmp_path/"intel-rapl:0"/"energy_uj").write_text("40\n")
    assert counter() == pytest.approx((150 + 20 + 990)/1e6)
    (tmp_path/"intel-rapl:1"/"name").write_text("psys\n") # counts the packages again
    counter = rapl(tmp_path)
    (tmp_path/"intel-rapl:0"/"energy_uj").write_text("45\n"); (tmp_path/"intel-rapl:1"/"energy_uj").write_text("70\n")
    assert counter() == pytest.approx(5/1e6)

def test_no_counter_is_said(tmp_path, capsys, monkeypatch):
    assert rapl(tmp_path) is None and rapl(tmp_path/"missing") is None
    powercap(tmp_path, **{"intel-rapl_0": 5}); (tmp_path/"intel-rapl:0"/"energy_uj").write_text("")
    assert rapl(tmp_path) is None
    monkeypatch.setattr(energy, "rapl", lambda: None)
    assert measured_joules(lambda: 1/0) is None and "no energy counter for cpu" in capsys.readouterr().out

def test_nvml(monkeypatch):
    "Millijoules of the driver become joules, of the GPU that torch means; one without the counter is none."
    millijoules = {"GPU-b": 5000}
    monkeypatch.setattr(energy.torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="ba"[index]))
    class Driver:
        nvmlInit = staticmethod(lambda: None)
        nvmlDeviceGetHandleByUUID = staticmethod(lambda uuid: uuid)
        nvmlDeviceGetTotalEnergyConsumption = staticmethod(lambda gpu: millijoules[gpu])
    monkeypatch.setitem(sys.modules, "pynvml", Driver)
    assert energy.nvml(0)() == 5.0 and energy.nvml(1) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert energy.nvml(0) is None

def test_joules_of_a_call():
    spent = [0.]
    def call(): spent[0] += 2.5
    assert measured_joules(call, seconds=0, counter=lambda: spent[0]) == 2.5
    assert measured_joules(call, seconds=0.01, counter=lambda: spent[0]) == pytest.approx(2.5)
