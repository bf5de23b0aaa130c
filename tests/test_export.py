"A spiking encoder as a NIR graph: its neurons by hand, its spikes against the model's, and files that are none."
from dataclasses import replace

import pytest
import torch

nir = pytest.importorskip("nir")
import numpy as np
from spklip import export
from spklip.export import differences, folded, read_nir, run_nir, to_nir, without_primitive, write_nir, Wiring
from spklip.fsve import FSVEConfig, IntegerLIF, LIF, LIFConfig, TDBN, unroll
from spklip.stcl import SPKLIP
from spklip.train import preset_of

def spiking(fsve, height=13, width=19, stem_stride=2, **hsfe):
    "A small model in float64 whose running statistics are those of noise, and sub-blocks of it."
    torch.manual_seed(0)
    c = preset_of("smoke").model
    hsfe = replace(c.hsfe, n_blocks=1, radius=3, branches=2, channel_step=1, filters=2, **hsfe)
    model = SPKLIP(replace(c, fsve=fsve, height=height, width=width, hsfe=hsfe, star_net=replace(c.star_net, layers=(2, 1), stem_stride=stem_stride)))
    blocks = (torch.rand(3, 7, height, width) < 0.3).float()
    with torch.no_grad():
        for _ in range(20): model.star_net.trunk(model.hsfe(blocks))
    return model.double().eval(), blocks

def one_layer(layer, size=(2, 3, 1), dt=1e-4):
    "A graph of nothing but a layer of neurons."
    g = Wiring(dt, np.float32)
    out = g.fire("layer", layer, g.add("input", nir.Input(np.array(size)), size))
    g.add("output", nir.Output(np.array(size)), size, out)
    return nir.NIRGraph(g.nodes, g.edges, dict(dt=dt))

def test_a_neuron_by_hand():
    current = torch.tensor([0.3, 0.4, 0.5, 0.1, 0.49]).view(5, 1, 1, 1, 1)
    spikes = run_nir(one_layer(LIF(), (1, 1, 1)), current)["output"].flatten()
    assert spikes.tolist() == [0, 0, 1, 0, 1]  # u = 0.3, 0.475, 0.61875, 0.1 after the reset, 0.515
    assert run_nir(one_layer(LIF(), (1, 1, 1)), torch.full((1, 1, 1, 1, 1), 0.5))["output"].item() == 1  # at the threshold, not only above it

@pytest.mark.parametrize("layer", [LIF(), LIF(LIFConfig(decay=0.5, threshold=1.)), LIF(LIFConfig(decay=0)), IntegerLIF(), IntegerLIF(LIFConfig(decay=0.5), 3)])
@pytest.mark.parametrize("dt", [1e-4, 1.])
def test_a_layer(layer, dt):
    torch.manual_seed(0)
    current = torch.randn(20, 50, 2, 3, 1).double()
    spikes = layer(current)
    assert torch.equal(run_nir(one_layer(layer, dt=dt), current)["output"], spikes) and 0.05 < (spikes > 0).double().mean() < 0.9

def test_halves_round_as_the_model_rounds():
    layer = IntegerLIF()
    halves = torch.arange(-2, 12).view(1, -1, 1, 1, 1)*0.25  # u = -1, -0.5, ... 5.5
    assert torch.equal(run_nir(one_layer(layer, (1, 1, 1)), halves)["output"], layer(halves))

def test_wires_are_the_binary_steps():
    torch.manual_seed(0)
    layer, current = IntegerLIF(), 2*torch.randn(6, 4, 2, 3, 1).double()
    wires = run_nir(one_layer(layer), current, [f"layer.wire{k}" for k in range(4)])
    assert torch.equal(torch.stack(list(wires.values()), 1).flatten(0, 1), unroll(layer(current), layer))

def test_norm_goes_into_the_convolution():
    torch.manual_seed(0)
    conv, norm = torch.nn.Conv2d(3, 5, 3, bias=True).double(), TDBN(5).double()
    x = torch.randn(2, 4, 3, 8, 8).double()
    with torch.no_grad():
        y = lambda: norm(conv(x.flatten(0, 1)).unflatten(0, (2, 4)))
        y(); norm.eval()
        weight, bias = map(torch.as_tensor, folded(conv.weight, norm, conv.bias))
        assert torch.allclose(torch.nn.functional.conv2d(x.flatten(0, 1), weight, bias), y().flatten(0, 1), atol=1e-12)

@pytest.mark.parametrize("fsve", [FSVEConfig(steps=3), FSVEConfig(part="cnn", steps=3), FSVEConfig(neuron="integer", steps=3),
                                  FSVEConfig(neuron="integer", steps=2, levels=1)],
                         ids=["eq. 7", "cnn", "integer", "one level"])
@pytest.mark.parametrize("sizes", [dict(), dict(height=49, width=40, stem_stride=4), dict(stem_stride=1, attention=False), dict(tower_blocks=1, tower_width=4)],
                         ids=["odd", "stride 4", "no SA", "tower"])
def test_spikes_are_the_models(fsve, sizes, tmp_path):
    model, blocks = spiking(fsve, **sizes)
    graph = read_nir(write_nir(to_nir(model), tmp_path/"model.nir"))
    found = differences(model, graph, blocks)
    assert {name for name, layer in model.named_modules() if isinstance(layer, (LIF, IntegerLIF))} == found.keys()
    assert {name: wrong for name, (wrong, _) in found.items() if wrong} == {}
    out = run_nir(graph, blocks.double().expand(fsve.steps, *blocks.shape))["output"]
    with torch.no_grad(): assert torch.equal(out, model.star_net.trunk.groups(model.star_net.trunk.stem(model.hsfe(blocks.double())))) and out.any()
    assert [p.name for p in tmp_path.iterdir()] == ["model.nir"]

def test_snntorch_fires_the_same():
    imported = pytest.importorskip("snntorch.import_nir")
    model, blocks = spiking(FSVEConfig(steps=3), attention=False)  # it knows no Threshold, which SA's gate is made of
    graph, blocks = to_nir(model.float()), blocks.expand(3, *blocks.shape)
    net, state, theirs = imported.import_from_nir(graph), None, []
    for frames in blocks:
        spikes, state = net(frames, state)
        theirs.append(spikes)
    ours = run_nir(graph, blocks)["output"]
    assert torch.equal(torch.stack(theirs), ours) and ours.any() and not torch.equal(ours[0], ours[1])

def test_a_difference_is_seen():
    model, blocks = spiking(FSVEConfig())
    graph = to_nir(model)
    graph.nodes["star_net.trunk.stem.0.conv"].bias = graph.nodes["star_net.trunk.stem.0.conv"].bias + 0.1
    found = differences(model, graph, blocks)
    assert found["hsfe.neurons.1"][0] == 0 and found["star_net.trunk.stem.0.neurons"][0] > 0
    with pytest.raises(ValueError, match="training"): differences(model.train(), graph, blocks)

def test_what_stays_behind_is_named():
    model, _ = spiking(FSVEConfig(part="full"))
    assert {"star_net.temporal.layers.0.attention", "star_net.temporal.norm"} <= without_primitive(model).keys()
    assert "star_net.temporal.layers.0.attention" in to_nir(model).metadata["left_out"]
    assert "star_net.trunk.pool" in without_primitive(spiking(FSVEConfig(part="cnn"))[0])

def test_what_cannot_go():
    with pytest.raises(ValueError, match="does not spike"): to_nir(SPKLIP(preset_of("smoke").model))
    with pytest.raises(ValueError, match="layer: decay=1"): one_layer(LIF(LIFConfig(decay=1)))

def test_files_that_are_none(tmp_path):
    path = write_nir(one_layer(LIF()), tmp_path/"layer.nir")
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match="layer.nir holds no readable NIR graph"): read_nir(path)
    path.write_text("no graph")
    with pytest.raises(ValueError, match="layer.nir holds no readable NIR graph"): read_nir(path)
    nir.write(path, nir.Scale(np.ones(3)))
    with pytest.raises(ValueError, match="holds no readable NIR graph"): read_nir(path)
    with pytest.raises(FileNotFoundError, match="absent.nir"): read_nir(tmp_path/"absent.nir")

def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_nir(one_layer(LIF()), tmp_path/"layer.nir")
    before = path.read_bytes()
    def half(part, graph): part.write_bytes(b"half"); raise OSError("disk full")
    monkeypatch.setattr(nir, "write", half)
    with pytest.raises(OSError, match="disk full"): write_nir(one_layer(LIF()), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]

def test_graphs_of_others():
    x, one = torch.ones(2, 1, 3), np.ones(3)
    scaled = nir.NIRGraph.from_list(nir.Scale(2*one), nir.LIF(2*one, one, one, 9*one))
    with pytest.raises(ValueError, match="time step"): run_nir(scaled, x)
    watched = run_nir(nir.NIRGraph.from_list(nir.Scale(2*one), nir.LI(2*one, one, one)), x, dt=1)["output"]
    assert watched[:, 0, 0].tolist() == [1.5, 2.25]  # half of 1 + 2 a step, half of what was there
    with pytest.raises(ValueError, match="watch: no node 'none'; there are input"): run_nir(scaled, x, dt=1, watch=("none",))
    same = nir.NIRGraph.from_list(nir.Conv2d((4, 4), np.ones((1, 1, 3, 3)), 1, "same", 1, 1, np.zeros(1)))
    assert run_nir(same, torch.ones(1, 1, 1, 4, 4), dt=1)["output"].shape == (1, 1, 1, 4, 4)
    with pytest.raises(ValueError, match="node cubalif is a CubaLIF"): run_nir(nir.NIRGraph.from_list(nir.CubaLIF(one, one, one, one, one)), x, dt=1)

def test_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "nir", None)
    with pytest.raises(ImportError, match=r"spklip\[nir\]"): export.needed()
