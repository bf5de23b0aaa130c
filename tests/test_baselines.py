"The models beside SPKLIP in Table 1: each against its definition, and all through the same door."
import json
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, XCLIPConfig, XCLIPModel

from spklip.baselines import (KINDS, BaselineConfig, HybridSpikeEncoder, Patches, TEDAdapter, VitaCLIP, baseline_encoder, load_xclip,
                              xclip_zero_shot)
from spklip.camera import tfi, tfp
from spklip.data.datasets import SpikeDataset, check, summary
from spklip.data.frames import FRAME_HZ, GreyVideo, exposures, film, generate_video, open_clips, rgb_frames
from spklip.data.scenes import SpikeActions, describe, draw, generate, take
from spklip.data.streams import StreamError
from spklip.hsfe import HSFE, HSFEConfig, sub_blocks
from spklip.lab.notebooks import real_data
from spklip.lab.runs import digest
from spklip.star_net import STARNet, STARNetConfig
from spklip.stcl import SPKLIP, SPKLIPConfig, TextConfig
from spklip.train import evaluate, fit, preset_of

SCENES = SpikeActions(classes=2, train=24, validation=4, test=4, train_actors=4, validation_actors=2, test_actors=2)
HSFE_SMALL, STAR = HSFEConfig(channel_step=9, filters=4, tower_blocks=0), STARNetConfig(8, (1, 1), 2, 4, (2, 3), 16, 1, 4)
FRAMES = HSFEConfig(n_blocks=8, radius=0, step=1, channel_step=0, filters=4, tower_blocks=0) # a window is one frame of video


def config(kind, height=24, width=32, **changes):
    grey = kind == "grey"
    return SPKLIPConfig(FRAMES if grey else HSFE_SMALL, STAR, TextConfig(256, 32, 2, 2, 64), height, width,
                        baseline=BaselineConfig(kind, width=16, layers=2, heads=2, adapter=4, levels=255 if grey else 1, **changes))


def build(kind, **changes):
    torch.manual_seed(0)
    model = SPKLIP(config(kind, **changes)).eval()
    with torch.no_grad(): # nothing may hide behind a zero start
        for p in model.parameters():
            if p.ndim and not p.any(): p.normal_(0, 0.1)
    return model


def clip(kind, B=3, height=24, width=32):
    g = torch.Generator().manual_seed(1)
    if kind == "grey": return torch.randint(0, 256, (B, 8, height, width), generator=g, dtype=torch.uint8)
    return (torch.rand(B, 250, height, width, generator=g) < 0.06).to(torch.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_embeds_saves_and_learns(kind, tmp_path):
    model, video = build(kind), clip(kind)
    with torch.no_grad(): embeddings = model.encode_video(video)
    assert embeddings.shape == (3, 16) and torch.allclose(embeddings.norm(dim=1), torch.ones(3), atol=1e-5)
    assert torch.allclose(embeddings, torch.cat([model.encode_video(v[None]) for v in video]), atol=1e-5)  # clips do not see each other
    again = SPKLIP.from_pretrained(model.save_pretrained(tmp_path/"model"))
    with torch.no_grad(): assert again.config == model.config and torch.equal(again.encode_video(video), embeddings)
    model.train()
    video_, text, scale = model(video, ["a", "b", "c"])
    (video_*torch.randn(3, 16, generator=torch.Generator().manual_seed(2))).sum().backward()
    dead = [n for n, p in model.named_parameters() if p.requires_grad and n.startswith(("hsfe", "star_net")) and (p.grad is None or not p.grad.any())]
    assert [n for n in dead if not n.endswith("k_proj.bias")] == []  # softmax does not see what is added to all keys


@pytest.mark.parametrize("kind", ["m2clip", "hybrid", "tfi", "cnn"])
def test_pieces_give_what_the_whole_gives(kind, monkeypatch):
    "HSFE's place is taken a few sub-blocks at a time; batch normalisation still sees the whole batch."
    model, video = build(kind).train(), clip(kind)
    whole = model.features(video)
    monkeypatch.setattr("spklip.stcl.micro_batch", lambda *sizes: 2)
    assert torch.allclose(model.features(video), whole, atol=1e-5)


def test_the_configuration_survives_json_and_leaves_older_runs_alone():
    for kind in KINDS: assert SPKLIPConfig.from_dict(json.loads(json.dumps(asdict(config(kind))))) == config(kind)
    older = asdict(SPKLIPConfig())
    del older["baseline"]
    assert SPKLIPConfig.from_dict(older) == SPKLIPConfig()
    assert digest(preset_of("laptop").model) == digest({"is": "SPKLIPConfig"}
                                                       | {k: v for k, v in vars(preset_of("laptop").model).items() if k not in ("fsve", "baseline")})


def test_a_kind_that_is_none_is_named():
    with pytest.raises(ValueError, match="kind='clip': one of m2clip, vitaclip, xclip"): BaselineConfig("clip")
    with pytest.raises(ValueError, match="heads=3 does not divide 64"): BaselineConfig("m2clip", heads=3)
    with pytest.raises(ValueError, match="patch=32: larger than a frame of 24x32"): build("xclip", patch=32)


def test_patches_are_a_matrix_on_all_pixels_of_all_frames():
    torch.manual_seed(0)
    layer, x = Patches(5, BaselineConfig("xclip", patch=4, width=8, exposures=False)), torch.rand(2, 5, 8, 12)
    out = layer(x)
    assert out.shape == (2, 8, 2, 3)
    assert torch.allclose(out[1, :, 1, 2], layer.weight.flatten(1) @ x[1, :, 4:8, 8:12].flatten() + layer.bias, atol=1e-5)


def test_patches_start_as_those_of_the_mean_frame():
    torch.manual_seed(0)
    layer, x = Patches(5, BaselineConfig("xclip", patch=4, width=8)), torch.rand(2, 5, 8, 12)
    assert torch.allclose(layer(x), layer(x.mean(1, keepdim=True).expand_as(x)), atol=1e-5)
    scattered = Patches(5, BaselineConfig("xclip", patch=4, width=8, exposures=False))
    assert not torch.allclose(scattered(x), scattered(x.mean(1, keepdim=True).expand_as(x)), atol=1e-2)
    assert layer.weight.is_contiguous() and layer.weight.requires_grad


def test_temporal_enhancement_and_difference_against_loops():
    torch.manual_seed(0)
    adapter, y = TEDAdapter(8, 3, (2, 4)), torch.randn(2, 5, 9, 3)
    enhanced, changed = adapter.enhancement(y), adapter.difference(y)
    for b in range(2):
        for n in range(5):
            for token in range(9):
                for c in range(3):
                    near = sum(adapter.enhance.weight[c, 0, k]*y[b, n + k - 1, token, c] for k in range(3) if 0 <= n + k - 1 < 5)
                    assert torch.allclose(enhanced[b, n, token, c], near + adapter.enhance.bias[c], atol=1e-5)
            step = (y[b, n, 1:] - y[b, max(n - 1, 0), 1:]).T.reshape(1, 3, 2, 4)
            want = F.conv2d(step, adapter.differ.weight, adapter.differ.bias, padding=1, groups=3)[0]
            assert torch.allclose(changed[b, n, 1:].T.reshape(3, 2, 4), want, atol=1e-5) and not changed[b, n, 0].any()
    x = torch.randn(2, 5, 9, 8)
    assert torch.equal(adapter(x), x)                             # it starts as the identity


def test_m2clip_sees_the_order_of_sub_blocks_and_a_mean_of_frames_does_not():
    m2, maps = build("m2clip").star_net, torch.randn(1, 5, 16, 3, 4)
    assert not torch.allclose(m2.fuse(maps), m2.fuse(maps.flip(1)), atol=1e-4)
    for adapter in m2.adapters: adapter.up.weight.data.zero_(); adapter.up.bias.data.zero_()
    assert torch.allclose(m2.fuse(maps), m2.fuse(maps.flip(1)), atol=1e-5)


def test_vita_clip_s_prompts():
    torch.manual_seed(0)
    vita = VitaCLIP(BaselineConfig("vitaclip", width=16, layers=2, heads=2, prompts=3), 5, 16, 24, 32)
    first = torch.randn(2, 5, 16)
    prompts = vita.prompts(1, first)
    assert {k: tuple(p.shape) for k, p in prompts.items()} == {"summary": (2, 5, 1, 16), "global": (2, 5, 3, 16), "local": (2, 5, 5, 16)}
    assert torch.equal(prompts["global"][0, 0], prompts["global"][1, 4]) and torch.equal(prompts["local"][:, 0], prompts["local"][:, 4])
    assert torch.allclose(prompts["local"][1, 2, 3], vita.local_embedding[1, 3] + vita.local[1](first[1, 3]), atol=1e-6)
    other = first.clone(); other[:, 0] += 1
    assert not torch.allclose(vita.prompts(1, other)["summary"][:, 4], prompts["summary"][:, 4], atol=1e-4)  # a summary is of all frames
    assert vita.step(0, torch.randn(2, 5, 13, 16)).shape == (2, 5, 13, 16)                                     # prompts leave after the layer
    vita.fuse(torch.randn(2, 5, 16, 3, 4)).square().sum().backward()
    for grad in (vita.global_embedding.grad, vita.local_embedding.grad): assert (grad.abs().sum((1, 2)) > 0).all()


def test_the_hybrid_is_hsfe_a_bridge_and_one_sequence():
    model = build("hybrid")
    assert isinstance(model.hsfe, HSFE) and isinstance(model.star_net, HybridSpikeEncoder)
    assert model.star_net.tokens(torch.randn(2, 5, 16, 3, 4)).shape == (2, 1, 1 + 5*3*4, 16)
    maps = torch.randn(1, 5, 16, 3, 4)
    assert not torch.allclose(model.star_net.fuse(maps), model.star_net.fuse(maps.flip(1)), atol=1e-4)


@pytest.mark.parametrize("kind, rule", [("tfp", lambda block: tfp(block, 30, 61)), ("tfi", lambda block: tfi(block, 30))])
def test_pictures_are_the_camera_s(kind, rule):
    front, back = baseline_encoder(BaselineConfig(kind), HSFE_SMALL, STAR, 24, 32)
    blocks = sub_blocks(clip(kind), HSFE_SMALL).flatten(0, 1)
    pictures = front(blocks.float())
    assert isinstance(back, STARNet) and pictures.shape == (15, 1, 24, 32) and pictures.any()
    for block, picture in zip(blocks, pictures): assert torch.allclose(picture[0], torch.as_tensor(rule(block.numpy())))


def test_a_lone_frame_stays_what_it_is():
    front, _ = baseline_encoder(config("grey").baseline, FRAMES, STAR, 24, 32)
    video = clip("grey")
    assert torch.allclose(front(sub_blocks(video, FRAMES).flatten(0, 1).float()).view_as(video), video/255)


def test_the_linear_probe_is_linear_in_counts():
    model = build("linear", patch=8)
    model.star_net.layer[1].running_mean.normal_(); model.star_net.layer[1].running_var.uniform_(0.5, 2)
    a, b = (torch.rand(1, 5, 1, 3, 4) for _ in range(2))
    mixed = model.star_net.fuse(0.3*a + 0.7*b)
    assert torch.allclose(mixed, 0.3*model.star_net.fuse(a) + 0.7*model.star_net.fuse(b), atol=1e-5)
    video = clip("linear")
    want = torch.stack([video[:, 45*n:45*n + 61].float().mean(1).unflatten(1, (3, 8)).unflatten(3, (4, 8)).mean((2, 4)) for n in range(5)], 1)
    assert torch.allclose(model.features(video)[:, :, 0], want, atol=1e-6)


def test_grey_video_is_the_mean_light_of_the_same_scene():
    frames = film(SCENES, 3, 4)
    for frame, moments in zip(frames, exposures(SCENES, 3, 4)):
        assert moments[0] % 50 == 0 and len(moments) == 50 and moments[-1] < take(SCENES, 3).frames and FRAME_HZ == 30
        light = sum(draw(SCENES, 3, moments))/50                   # drawn together: what is in front of what is decided once in 50
        assert (frame - 255*light).abs().max() <= 0.5001
    with pytest.raises(ValueError, match="rate_hz=10.*at least 30"): film(replace(SCENES, rate_hz=10.), 3, 4)


@pytest.fixture(scope="module")
def video(tmp_path_factory): return generate_video(SCENES, tmp_path_factory.mktemp("data")/"video", 8)


def test_video_on_disk(video, tmp_path):
    clips = open_clips(video, "test", 1)
    assert isinstance(clips, GreyVideo) and len(clips) == 4 and clips[0]["packed"].shape == (8, 32, 40)
    assert torch.equal(clips[1]["packed"], film(SCENES, SCENES.train + SCENES.validation + 1))
    rows = [describe(SCENES, i) for i in range(len(SCENES))]
    for name in ("caption", "group", "split", "label", "prompt"): assert [r[name] for r in rows if r["split"] == "test"] == [r[name] for r in clips.rows]
    assert type(open_clips(generate(SCENES, tmp_path/"spikes", progress=False), "test")) is SpikeDataset
    before = (video/"metadata.jsonl").stat().st_mtime_ns
    assert generate_video(SCENES, video, 8) == video and (video/"metadata.jsonl").stat().st_mtime_ns == before
    with pytest.raises(StreamError, match="not of spklip SpikeActions .*, 5 frames at 30 Hz"): generate_video(SCENES, video, 5)


def test_video_on_disk_resumes_and_refuses(video, tmp_path):
    copy = shutil.copytree(video, tmp_path/"copy")
    first, kept = sorted(copy.rglob("*.npy"))[:2]
    for f in (first, copy/"metadata.jsonl"): f.unlink()
    before = kept.stat().st_mtime_ns
    with pytest.raises(StreamError, match="other settings .video_frames 8 -> 5"): generate_video(SCENES, copy, 5)
    with pytest.raises(StreamError, match="other settings .video_frames 8 -> None"): generate(SCENES, copy)
    generate_video(SCENES, copy, 8)
    assert kept.stat().st_mtime_ns == before and check(copy) == []
    for f in video.rglob("*.*"): assert f.name == ".lock" or f.read_bytes() == (copy/f.relative_to(video)).read_bytes()
    (copy/"settings.json").unlink(); generate_video(SCENES, copy, 8)     # a finished folder of before has none
    (tmp_path/"other").mkdir(); (tmp_path/"other"/"thesis.txt").write_text("dear")
    with pytest.raises(StreamError, match="not SpikeActions"): generate_video(SCENES, tmp_path/"other", 8)


def test_a_folder_of_video_is_checked_and_summed_up(video, tmp_path):
    assert check(video) == []
    table, test = summary(video), np.stack([np.load(f) for f in sorted((video/"test").rglob("*.npy"))])
    assert table.light["test"] == round(test.mean()/255, 4) and table.clips["test"] == len(test) and table.megabytes["test"] == round(test.size/1e6, 1)
    copy = shutil.copytree(video, tmp_path/"copy")
    black, short, gone = sorted(copy.rglob("*.npy"))[:3]
    np.save(black, np.zeros((8, 32, 40), np.uint8)); np.save(short, np.ones((7, 32, 40), np.uint8)); gone.rename(gone.with_name("more.npy"))
    problems = check(copy)
    assert len(problems) == 4
    for said in (f"{black}: black", f"{short}: uint8 [7, 32, 40], expected", f"{gone}: no array", "more.npy: not in metadata.jsonl"):
        assert any(said in p for p in problems), said


def test_a_wrong_file_is_named(video, tmp_path):
    copy = shutil.copytree(video, tmp_path/"copy")
    row = open_clips(copy, "test").rows[0]
    np.save(copy/row["file"], np.zeros((2, 3, 4), np.uint8))
    with pytest.raises(StreamError, match=r"uint8 \[2, 3, 4\], expected uint8 \[8, 32, 40\]"): open_clips(copy, "test")


def test_training_takes_video_and_another_encoder_s_model_is_refused(video, tmp_path):
    smoke = preset_of("smoke")
    preset = replace(smoke, model=replace(config("grey"), height=32, width=40), train=replace(smoke.train, epochs=1, batch_size=8))
    model = SPKLIP.from_pretrained(fit(preset, video, tmp_path/"run", progress=False, device="cpu"))
    assert model.config.baseline == preset.model.baseline and evaluate(model, open_clips(video, "test", 1)).embeddings.shape == (4, 16)
    other = replace(preset, model=replace(preset.model, baseline=BaselineConfig("xclip", levels=255)))
    with pytest.raises(ValueError, match="other sizes"): fit(other, video, tmp_path/"other", start=tmp_path/"run"/"model", progress=False, device="cpu")


@pytest.fixture(scope="module")
def tiny_xclip(tmp_path_factory):
    "A randomly initialised X-CLIP and a tokenizer of letters, as transformers stores them."
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    folder = tmp_path_factory.mktemp("xclip")
    vision = dict(sizes, image_size=32, patch_size=16, num_frames=4, mit_hidden_size=16, mit_intermediate_size=32, mit_num_hidden_layers=1,
                  mit_num_attention_heads=2)
    text = dict(sizes, vocab_size=40, max_position_embeddings=32, eos_token_id=2, bos_token_id=1, pad_token_id=0)
    XCLIPModel(XCLIPConfig(text_config=text, vision_config=vision, projection_dim=16, prompt_layers=1, prompt_num_attention_heads=2)).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "<s>", "</s>", "<unk>", "a", "person", "runs", "waves"])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="</s>", bos_token="<s>").save_pretrained(folder)
    return folder


def test_x_clip_names_videos_from_a_local_folder(tiny_xclip):
    model, tokenizer = load_xclip(tiny_xclip)
    video = torch.randint(0, 256, (2, 4, 3, 40, 60), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    said = xclip_zero_shot(model, tokenizer, video, ["a person runs", "a person waves"])
    assert said.shape == (2, 2) and torch.allclose(said.sum(1), torch.ones(2))
    edges = video.clone(); edges[..., :10] = 0; edges[..., 50:] = 0
    assert torch.equal(xclip_zero_shot(model, tokenizer, edges, ["a person runs", "a person waves"]), said)   # only the middle square is seen
    whole = video[..., 10:50].float()/255
    pixels = F.interpolate(whole.flatten(0, 1), (32, 32), mode="bilinear", antialias=True)
    # as its training configuration has them
    pixels = (255*pixels - torch.tensor([123.675, 116.28, 103.53])[:, None, None])/torch.tensor([58.395, 57.12, 57.375])[:, None, None]
    words = tokenizer(["a person runs", "a person waves"], return_tensors="pt")
    with torch.no_grad(): want = model(pixel_values=pixels.unflatten(0, (2, 4)), input_ids=words.input_ids, attention_mask=words.attention_mask)
    assert torch.allclose(want.logits_per_video.softmax(1), said, atol=1e-6)
    with pytest.raises(ValueError, match="F=4 frames"): xclip_zero_shot(model, tokenizer, video[:, :3], ["a"])


@pytest.mark.parametrize("name", ["v_SoccerJuggling_g23_c01.avi", "hmdb51_Turnk_r_Pippi_Michel_cartwheel_f_cm_np2_le_med_6.avi"])
def test_x_clip_on_a_real_video(tiny_xclip, name):
    if not (path := real_data(f"hmdb51_ucf101/{name}")): pytest.skip("the real clips are not here")
    frames = rgb_frames(path, 4)
    assert frames.shape[:2] == (4, 3) and frames.dtype == np.uint8 and frames.std() > 10
    said = xclip_zero_shot(*load_xclip(tiny_xclip), torch.from_numpy(frames)[None], ["a person runs", "a person waves"])
    assert said.shape == (1, 2) and torch.allclose(said.sum(1), torch.ones(1))
