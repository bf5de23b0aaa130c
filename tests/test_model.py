"SPKLIP's parts against their definitions: HSFE, STAR-Net, the loss, the folder a model lives in."
import copy, json, os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from spklip.baselines import BaselineConfig
from spklip.camera import pack
from spklip.fsve import FSVEConfig, SpikingSTARNet
from spklip.hsfe import HSFE, MTF, HSFEConfig, sub_blocks
from spklip.star_net import AttentionPool, BasicBlock, Bottleneck, MAPResNet, STARNet, STARNetConfig, TemporalTransformer
from spklip.stcl import (SPKLIP, SPKLIPConfig, TextConfig, TextEncoder, contrastive_loss, contrastive_targets,
                         encode_by_loop, learn_wordpiece, load_bert, macs, micro_batch)
from spklip.train import TrainConfig

CAPTIONS = ["a person waves both hands", "a tall person walks to the left", "somebody in dark clothes jumps"]


def small(height=24, width=32, **changes):
    return SPKLIPConfig(HSFEConfig(**dict(dict(channel_step=9, filters=4, tower_blocks=0), **changes)),
                        STARNetConfig(8, (1, 1), 2, 4, (2, 3), 16, 1, 4), TextConfig(256, 32, 2, 2, 64), height, width)


def build(config, seed=0):
    torch.manual_seed(seed)
    model = SPKLIP(config, learn_wordpiece(CAPTIONS)).eval()
    with torch.no_grad(): # nothing may hide behind a zero start
        for p in model.parameters():
            if p.ndim and not p.any(): p.normal_(0, 0.1)
    return model


def spikes(*shape, rate=0.06):
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(1)) < rate).to(torch.uint8)


@pytest.mark.parametrize("blocks, frames", [(1, 61), (3, 151), (5, 250), (7, 331)])
def test_sub_blocks_are_equation_2(blocks, frames):
    clip, config = spikes(2, frames, 3, 4), HSFEConfig(n_blocks=blocks)
    cut = sub_blocks(clip, config)
    assert cut.shape == (2, blocks, 61, 3, 4) and cut.data_ptr() == clip.data_ptr()
    for i in range(blocks):
        centre = 30 + 45*i
        assert torch.equal(cut[:, i], clip[:, centre - 30 : centre + 31])


def test_a_short_clip_is_named():
    with pytest.raises(ValueError, match="241 spike frames; the clip has 240"): sub_blocks(spikes(1, 240, 2, 2), HSFEConfig())


def test_a_window_that_vanishes_is_refused():
    with pytest.raises(ValueError, match="channel_step=11"): HSFEConfig(channel_step=11)


@pytest.mark.parametrize("make, said", [
    (lambda: HSFEConfig(n_blocks=0), "n_blocks=0"), (lambda: HSFEConfig(step=0), "step=0"),
    (lambda: TextConfig(max_tokens=513), "max_tokens=513: positions for 512"),
    (lambda: SPKLIPConfig(baseline=BaselineConfig("cnn"), fsve=FSVEConfig()), "baseline='cnn' has no spiking form"),
    (lambda: TrainConfig(targets="pairs"), "targets='pairs'")])
def test_what_cannot_be_is_refused_before_anything_is_made(make, said):
    with pytest.raises(ValueError, match=said): make()


@pytest.mark.parametrize("step", [0, 1, 9])
def test_fused_branches_equal_the_paper_s_and_so_do_their_gradients(step):
    torch.manual_seed(0)
    mtf, x = MTF(HSFEConfig(channel_step=step, filters=3)), spikes(2, 61, 7, 9).float()
    for mask in mtf.masks: mask.data.normal_(1, 0.5)
    one_by_one = torch.cat([mtf.branch(i, x) for i in range(4)], 1)
    assert torch.allclose(mtf(x), one_by_one, atol=1e-5)
    target = torch.randn_like(one_by_one)
    fused = torch.autograd.grad((mtf(x)*target).sum(), list(mtf.parameters()))
    plain = torch.autograd.grad((one_by_one*target).sum(), list(mtf.parameters()))
    for a, b in zip(fused, plain): assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_branch_that_starts_as_an_exposure_is_the_mean_over_its_window():
    mtf, x = MTF(HSFEConfig(channel_step=9, filters=3, exposures=True)), spikes(2, 61, 7, 9).float()
    for conv in mtf.second: conv.weight.data[:, 1:] = 0; conv.bias.data[:] = 0 # the other filters, which start at random
    tfp = torch.stack([x[:, 30 - k//2 : 31 + k//2].mean(1) for k in (61, 43, 25, 7)], 1)
    assert torch.allclose(mtf(x), 10*tfp, atol=1e-5)


def test_masks_and_attention_can_be_switched_off():
    hsfe = HSFE(HSFEConfig(masks=False, attention=False, tower_blocks=0, filters=2))
    assert not any(m.requires_grad for m in hsfe.mtf.masks)
    x = spikes(1, 61, 5, 5).float()
    assert torch.equal(hsfe(x), hsfe.mtf(x))


def test_the_tower_starts_as_the_identity():
    hsfe = HSFE(HSFEConfig(tower_blocks=2, tower_width=8, filters=2))
    x = spikes(1, 61, 6, 6).float()
    assert torch.equal(hsfe(x), hsfe.tower[1](hsfe.tower[0](hsfe.sa(hsfe.mtf(x)))))


def test_multiply_adds_at_the_paper_s_sizes():
    config = SPKLIPConfig()
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        hsfe, star_net = HSFE(config.hsfe).eval(), STARNet(64, config.star_net)
        star_net(hsfe(torch.empty(5, 61, 240, 320))[None])
    assert macs(config)/301.2e9 == pytest.approx(1, abs=0.01)
    assert counter.get_total_flops()/2/301.2e9 == pytest.approx(1, abs=0.01)


def test_a_bottleneck_is_shortcut_plus_residual_and_halves_with_a_pool():
    block, x = Bottleneck(8, 4, stride=2).eval(), torch.rand(2, 8, 7, 9)
    residual = block.expand(F.avg_pool2d(F.relu(block.spatial(F.relu(block.reduce(x)))), 2))
    assert torch.allclose(block(x), F.relu(residual + block.shortcut[1](F.avg_pool2d(x, 2))), atol=1e-6) and block(x).shape == (2, 16, 3, 4)


def test_attention_pool_is_mean_plus_attention():
    torch.manual_seed(0)
    pool, maps = AttentionPool(8, 2, (2, 3), 5), torch.randn(3, 8, 2, 3)
    pool.add.weight.data.normal_()
    tokens = (maps + pool.positions).flatten(2).transpose(1, 2)
    tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1)
    normed, found = pool.norm(tokens), []
    q, (k, v) = pool.query(normed[:, 0]), pool.key_value(normed).chunk(2, -1)
    for h in (slice(0, 4), slice(4, 8)):
        weights = torch.einsum("nc,nlc->nl", q[:, h], k[..., h]).div(2).softmax(1)
        found.append(torch.einsum("nl,nlc->nc", weights, v[..., h]))
    assert torch.allclose(pool(maps), pool.project(tokens[:, 0] + pool.add(torch.cat(found, 1))), atol=1e-5)


@pytest.mark.parametrize("size", [(32, 40), (33, 41), (60, 80)])
def test_star_net_reads_any_size(size):
    trunk = MAPResNet(4, STARNetConfig(8, (1, 1, 1), 2, 4, (2, 3), 16, 0, 4)).eval()
    assert trunk(torch.rand(2, 4, *size)).shape == (2, 16)


def test_order_counts_and_without_a_transformer_it_does_not():
    torch.manual_seed(0)
    config = STARNetConfig(8, (1, 1), 2, 4, (2, 3), 16, 1, 4)
    temporal, five = TemporalTransformer(config).eval(), torch.randn(2, 5, 16)
    assert not torch.allclose(temporal(five), temporal(five.flip(1)), atol=1e-4)
    mean = STARNet(4, replace(config, temporal_layers=0))
    assert torch.allclose(mean.fuse(five), five.mean(1))
    with pytest.raises(ValueError, match="positions for 16"): temporal(torch.randn(1, 17, 16))


@pytest.mark.parametrize("kind", ["diagonal", "multi_positive"])
def test_the_loss_is_equation_6(kind):
    torch.manual_seed(0)
    v, t, labels = F.normalize(torch.randn(5, 8), dim=1), F.normalize(torch.randn(5, 8), dim=1), torch.tensor([0, 1, 0, 2, 1])
    total = 0.
    for i in range(5):
        friends = [j for j in range(5) if labels[j] == labels[i]] if kind == "multi_positive" else [i]
        for a, b in ((v, t), (t, v)):
            p = torch.tensor([torch.exp(10*a[i] @ b[j]) for j in range(5)])
            total -= sum((p[j]/p.sum()).log() for j in friends)/len(friends)/5
    assert torch.isclose(contrastive_loss(v, t, contrastive_targets(labels, kind), torch.tensor(10.)), total)


def test_unknown_targets_are_refused():
    with pytest.raises(ValueError, match="'pairs'"): contrastive_targets(torch.tensor([0]), "pairs")


def test_text_does_not_see_its_padding():
    torch.manual_seed(0)
    text = TextEncoder(TextConfig(256, 32, 2, 2, 64), 16, learn_wordpiece(CAPTIONS)).eval()
    assert torch.allclose(text(CAPTIONS)[0], text(CAPTIONS[:1])[0], atol=1e-5)
    assert not torch.allclose(text(CAPTIONS)[0], text(CAPTIONS)[1], atol=1e-3)


@pytest.mark.parametrize("released", [None, True])
def test_nobody_waits_for_what_the_text_encoder_computes(released):
    "On a device without memory there is nothing that could be asked; what a token sees is what BERT makes of the mask."
    text = TextEncoder(TextConfig(256, 32, 2, 2, 64, released=released), 16, learn_wordpiece(CAPTIONS)).eval()
    assert text.to("meta")(CAPTIONS).shape == (3, 16)
    text = TextEncoder(text.config, 16, text.tokenizer).eval()
    for some in (CAPTIONS, CAPTIONS[:1]):
        ids, mask = text.tokens(some)
        theirs, ours = (text.bert(input_ids=ids, attention_mask=m).last_hidden_state for m in (mask, text.attention_mask(mask)))
        assert torch.equal(theirs, ours)


def test_the_vocabulary_does_not_depend_on_the_order_of_captions():
    assert learn_wordpiece(CAPTIONS).get_vocab() == learn_wordpiece(CAPTIONS[::-1]*2).get_vocab()


@pytest.mark.parametrize("config", [small(), small(tower_blocks=1, tower_width=8), small(25, 31, n_blocks=3)], ids=["thin", "tower", "odd"])
def test_encode_video_equals_the_loop(config):
    model = build(config)
    clips = spikes(3, 250, config.height, config.width)
    with torch.no_grad():
        assert torch.allclose(model.encode_video(clips), encode_by_loop(model, clips), atol=1e-5)
        assert torch.equal(model.encode_video(pack(clips)), model.encode_video(clips))


def test_micro_batches_change_nothing(monkeypatch):
    model, clips = build(small()), spikes(3, 250, 24, 32)
    with torch.no_grad():
        whole = model.encode_video(clips)
        monkeypatch.setattr("spklip.stcl.CACHE_BYTES", 1)
        assert micro_batch(model.config, 24, 32, torch.device("cpu")) == 1
        assert torch.allclose(model.encode_video(clips), whole, atol=1e-5)


def test_to_read_with_a_model_does_not_change_its_folder(tmp_path):
    model, kept = build(small()), lambda folder: {p.name: p.read_bytes() for p in model.save_pretrained(tmp_path/folder).iterdir()}
    before = kept("before")
    model.encode_text(CAPTIONS)
    assert kept("after") == before


def test_an_answer_takes_no_more_of_a_gpu_than_training():
    "64 clips of the paper's in several calls, small ones in one; whoever learns needs all of the batch."
    gpu, paper = torch.device("cuda"), SPKLIPConfig()
    calls = lambda config: -(-64*5//micro_batch(config, config.height, config.width, gpu))
    assert calls(paper) == 1
    with torch.no_grad():
        assert (calls(paper), calls(replace(paper, fsve=FSVEConfig(steps=4))), calls(small(32, 40))) == (3, 12, 1)


def test_a_folder_gives_the_model_back(tmp_path):
    model, clips = build(small()), spikes(2, 250, 24, 32)
    again = SPKLIP.from_pretrained(model.save_pretrained(tmp_path))
    assert again.config == model.config and torch.equal(again.encode_video(clips), model.encode_video(clips))
    assert torch.equal(again.classify(clips, CAPTIONS), model.classify(clips, CAPTIONS))
    half = SPKLIP.from_pretrained(model.save_pretrained(tmp_path/"half", half=True))
    assert (tmp_path/"half"/"model.safetensors").stat().st_size < 0.55*(tmp_path/"model.safetensors").stat().st_size
    assert torch.allclose(half.encode_video(clips), model.encode_video(clips), atol=1e-2)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_a_pretrained_bert_brings_its_words_and_weights(tmp_path):
    from transformers import BertModel
    tokenizer, config = learn_wordpiece(CAPTIONS), TextConfig(200, 32, 2, 2, 64)
    bert = BertModel(config.bert(), add_pooling_layer=False); bert.save_pretrained(tmp_path); tokenizer.save(str(tmp_path/"tokenizer.json"))
    text = load_bert(tmp_path, 16).eval()
    ids, mask = text.tokens(CAPTIONS)
    hidden = bert.eval()(input_ids=ids, attention_mask=mask).last_hidden_state
    mean = (hidden*mask[..., None]).sum(1)/mask.sum(1, keepdim=True)
    assert torch.allclose(text(CAPTIONS), text.projection(mean), atol=1e-5)
    model = SPKLIP(small(), text=load_bert(tmp_path, 16)).eval()
    again = SPKLIP.from_pretrained(model.save_pretrained(tmp_path/"model"))
    assert torch.equal(again.encode_text(CAPTIONS), model.encode_text(CAPTIONS))
    kept = json.loads((tmp_path/"config.json").read_text())
    (tmp_path/"config.json").write_text(json.dumps(kept | {"hidden_act": "relu"}))
    with pytest.raises(ValueError, match="hidden_act relu, gelu is expected"): load_bert(tmp_path, 16)
    (tmp_path/"config.json").write_text(json.dumps(dict(model_type="gpt2")))
    with pytest.raises(ValueError, match="bert"): load_bert(tmp_path, 16)


def test_a_bert_that_cannot_be_read_silences_nobody(tmp_path):
    from transformers.utils import logging
    TextConfig(200, 32, 2, 2, 64).bert().save_pretrained(tmp_path); learn_wordpiece(CAPTIONS).save(str(tmp_path/"tokenizer.json"))
    told = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with pytest.raises(OSError): load_bert(tmp_path, 16)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == told


def test_classify_gives_probabilities():
    model, clips = build(small()).eval(), spikes(2, 250, 24, 32)
    p = model.classify(clips, CAPTIONS)
    v, t, scale = model(clips, CAPTIONS)
    assert p.shape == (2, 3) and torch.allclose(p, (scale*v @ t.T).softmax(-1)) and torch.allclose(p.sum(1), torch.ones(2))


@pytest.mark.parametrize("spoil, error, words", [
    (lambda d: (d/"model.safetensors").unlink(), FileNotFoundError, "model.safetensors is missing"),
    (lambda d: (d/"model.safetensors").write_bytes((d/"model.safetensors").read_bytes()[:500]), ValueError, "model.safetensors is of no readable SPKLIP model"),
    (lambda d: (d/"tokenizer.json").write_text(""), ValueError, "tokenizer.json is of no readable SPKLIP model"),
    (lambda d: (d/"config.json").write_text((d/"config.json").read_text().replace('"filters": ', '"filters": 1')), ValueError,
     "model.safetensors is of no .*size mismatch"),
    (lambda d: (d/"config.json").write_text("{"), ValueError, "config.json is of no readable SPKLIP model"),
    (lambda d: (d/"config.json").write_text(json.dumps(dict(speed=1))), ValueError, "config.json is of no readable SPKLIP model")])
def test_a_broken_folder_is_named(tmp_path, spoil, error, words):
    build(small()).save_pretrained(tmp_path); spoil(tmp_path)
    with pytest.raises(error, match=words) as raised: SPKLIP.from_pretrained(tmp_path)
    assert str(tmp_path) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("video", [torch.zeros(1, 250, 95, dtype=torch.uint8), torch.zeros(1, 250, 96), torch.zeros(250, 96, dtype=torch.uint8)])
def test_what_is_no_clip_is_refused(video):
    with pytest.raises(ValueError, match=r"packed clips of 24x32 are uint8 \[B,T,96\]"): build(small()).encode_video(video)

@pytest.mark.parametrize("stride", [1, 2, 4])
def test_the_trunk_that_stands_for_star_net(stride):
    "Table 4 without STAR-Net: same interface, order of the sub-blocks of no matter, no spiking form."
    config = STARNetConfig(8, (1, 1), stride, 4, (2, 3), 32, 0, 4, backbone="resnet")
    net = STARNet(4, config).eval()
    maps = torch.rand(2, 5, 4, 32, 40)
    assert net(maps).shape == (2, 32) and torch.allclose(net(maps), net(maps.flip(1)), atol=1e-6)
    with pytest.raises(ValueError, match="no spiking form"): SpikingSTARNet(4, config, FSVEConfig())
    with pytest.raises(ValueError, match="'resnet' expected"): STARNetConfig(backbone="vit")

def test_basic_block_of_few_channels_learns_as_in_64_bits():
    "4 channels and a stride, where oneDNN's own strided 1x1 convolution corrupts memory (its issue 6035)."
    torch.manual_seed(0)
    block = BasicBlock(4, 8, stride=2).to(memory_format=torch.channels_last)
    exact, x = copy.deepcopy(block).double(), torch.randn(80, 4, 8, 10).to(memory_format=torch.channels_last)
    block(x).square().sum().backward(); exact(x.double()).square().sum().backward()
    for p, q in zip(block.parameters(), exact.parameters()): assert torch.allclose(p.grad.double(), q.grad, rtol=1e-3, atol=1e-2)
    assert block(x).shape == (80, 8, 4, 5)


def test_frugal():
    "HSFE computed again backwards: the same loss and gradients to the last bit of what float32 adds up."
    found = {}
    for frugal in (False, True):
        torch.manual_seed(0)
        model = build(small()).train()
        model.frugal = frugal
        for layer in model.star_net.temporal.layers: layer.eval() # no dropout
        video = model.encode_video((torch.rand(3, 250, 24, 32, generator=torch.Generator().manual_seed(1)) < .06).to(torch.uint8))
        (video @ torch.arange(video.shape[1], dtype=torch.float32)).sum().backward()
        found[frugal] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None} | {n: b for n, b in model.named_buffers() if "running" in n}
    assert found[True].keys() == found[False].keys() and any("hsfe" in n for n in found[True])
    for name, value in found[False].items(): torch.testing.assert_close(found[True][name], value, rtol=1e-5, atol=1e-6)


def test_a_full_disk_leaves_no_half_model(tmp_path, monkeypatch):
    def full(_): raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"): build(small()).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_encoder_cuts_its_own_sentences():
    "Two of one tokenizer: the shorter one's limit is not the other's."
    words = learn_wordpiece(["a person waves with both hands"])
    long, short = (TextEncoder(replace(small().text, max_tokens=n), 8, words) for n in (20, 4))
    assert [e.tokens(["a person waves with both hands"])[0].shape[1] > 4 for e in (long, short)] == [True, False]
