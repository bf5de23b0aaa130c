"Training and evaluation: resumed runs, protocols, augmentation, errors."
import json
import math
import os
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import spklip.train as train
from spklip.baselines import BaselineConfig
from spklip.data.datasets import SpikeDataset, read_metadata, write_metadata
from spklip.data.frames import generate_video
from spklip.data.scenes import SpikeActions, generate
from spklip.data.streams import StreamError
from spklip.fsve import FSVEConfig
from spklip.lab import runs
from spklip.lab.figures import confusion_counts
from spklip.lab.runs import side_by_side
from spklip.stcl import SPKLIP
from spklip.train import (Evaluation, TrainConfig, as_printed, augment, evaluate, fit, hold_out, learning_rate, mirrored, preset_of, spiking_presets,
                          study, train_all, train_and_test)

SMOKE = preset_of("smoke")
TINY = replace(SMOKE, name="tiny", scenes=SpikeActions(classes=2, train=32, validation=8, test=8, train_actors=4, validation_actors=2, test_actors=2))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return generate(TINY.scenes, tmp_path_factory.mktemp("data")/"actions", progress=False)


def copy_of(data, folder, changes): # of metadata, by row
    folder.mkdir()
    write_metadata(folder, [row | {name: change(row) for name, change in changes.items()} for row in read_metadata(data)])
    for path in data.glob("*.dat"): (folder/path.name).symlink_to(path)
    for path in (p for p in data.iterdir() if p.is_dir()): (folder/path.name).symlink_to(path)
    return folder


def weights(folder):
    return SPKLIP.from_pretrained(folder).state_dict()


def test_an_interrupted_run_ends_as_one_that_was_not(data, tmp_path, monkeypatch):
    preset = replace(TINY, train=replace(TINY.train, epochs=3, batch_size=8))
    whole = fit(preset, data, tmp_path/"whole", seed=1, progress=False, device="cpu")
    keep, calls = train.save_epoch, []
    def interrupt(*args):
        keep(*args); calls.append(1)
        if len(calls) == 2: raise KeyboardInterrupt
    monkeypatch.setattr(train, "save_epoch", interrupt)
    with pytest.raises(KeyboardInterrupt): fit(preset, data, tmp_path/"cut", seed=1, progress=False, device="cpu")
    assert [p.name for p in (tmp_path/"cut").glob("epoch*")] == ["epoch-002"]
    resumed = fit(preset, data, tmp_path/"cut", seed=1, progress=False, device="cpu")
    assert len(calls) == 3                                        # one epoch was left to do
    a, b = weights(whole), weights(resumed)
    assert all(torch.equal(a[k], b[k]) for k in a)
    other = weights(fit(replace(preset, train=replace(preset.train, epochs=1)), data, tmp_path/"other", seed=2, progress=False, device="cpu"))
    assert not torch.equal(a["star_net.trunk.pool.project.weight"], other["star_net.trunk.pool.project.weight"])


def test_what_an_optimizer_remembers_lies_as_its_weights_do_after_a_resume(data, tmp_path):
    model = train.new_model(TINY.model, SpikeDataset(data, "train"), None)
    before, after = (train.make_optimizer(model, TINY.train) for _ in range(2))
    for p in model.parameters(): p.grad = torch.rand_like(p)
    before.step()
    train.save_epoch(tmp_path, model, before, [{}]); train.load_epoch(tmp_path, model, after)
    found = [(p, after.state[p][name], value) for p, state in before.state.items() for name, value in state.items() if name != "step"]
    assert len(found) == 2*len(after.state) and any(not p.is_contiguous() for p, *_ in found)
    assert all(torch.equal(new, old) and new.stride() == p.stride() for p, new, old in found)


def test_a_half_written_epoch_is_not_resumed_from(data, tmp_path):
    preset = replace(TINY, train=replace(TINY.train, epochs=1, batch_size=8))
    (tmp_path/"run"/"epoch.part").mkdir(parents=True); (tmp_path/"run"/"epoch.part"/"history.json").write_text("[{")
    assert (fit(preset, data, tmp_path/"run", progress=False, device="cpu")/"model.safetensors").exists()


def test_it_learns_what_it_is_shown(data, tmp_path):
    "Two actions, 30 clips: a model that trains at all knows them by heart."
    config = replace(SMOKE.train, epochs=30, batch_size=10, lr=3e-3, flip=0., shift=0., prompts=1., hold_out=0.)
    model = SPKLIP.from_pretrained(fit(replace(TINY, train=config), data, tmp_path/"run", progress=False, device="cpu"))
    assert evaluate(model, SpikeDataset(data, "train")).top(1) > 0.9


def test_starting_from_a_model_keeps_its_words(data, tmp_path):
    once = replace(TINY, train=replace(TINY.train, epochs=1, batch_size=8))
    first = fit(once, data, tmp_path/"a", progress=False, device="cpu")
    second = SPKLIP.from_pretrained(fit(once, data, tmp_path/"b", start=first, progress=False, device="cpu"))
    assert second.text.tokenizer.get_vocab() == SPKLIP.from_pretrained(first).text.tokenizer.get_vocab()
    with pytest.raises(ValueError, match="other sizes than the preset: its hsfe.filters is 2, not 8; ") as raised:
        fit(preset_of("laptop"), data, tmp_path/"c", start=first, progress=False)
    assert "branches" not in str(raised.value)                      # which is the same
    with pytest.raises(ValueError, match="the preset: its text.layers is 2, not 3$"):
        train.new_model(replace(TINY.model, text=replace(TINY.model.text, layers=3)), None, first)
    hsfe = replace(TINY.model.hsfe, exposures=False) # how weights start is no size
    fit(replace(once, model=replace(TINY.model, hsfe=hsfe)), data, tmp_path/"d", start=first, progress=False, device="cpu")


def test_starting_from_a_model_with_another_dropout(data, tmp_path):
    first = train.new_model(TINY.model, SpikeDataset(data, "train"), None).save_pretrained(tmp_path)
    config = replace(TINY.model, star_net=replace(TINY.model.star_net, dropout=.3), text=replace(TINY.model.text, dropout=.2))
    started = train.new_model(config, None, first)
    assert started.star_net.temporal.layers[0].dropout.p == .3 and started.text.bert.embeddings.dropout.p == .2
    assert started.config == config and all(torch.equal(a, b) for a, b in zip(started.state_dict().values(), weights(first).values()))


def test_a_spiking_encoder_starts_from_an_ann_and_resumes(data, tmp_path, monkeypatch):
    ann = fit(TINY, data, tmp_path/"ann", progress=False, device="cpu")
    preset = spiking_presets(TINY, 1000)["full, integer"]
    whole = fit(preset, data, tmp_path/"whole", start=ann, progress=False, device="cpu")
    assert SPKLIP.from_pretrained(whole).config.fsve == preset.model.fsve
    keep = train.save_epoch
    def interrupt(*args): keep(*args); raise KeyboardInterrupt
    monkeypatch.setattr(train, "save_epoch", interrupt)
    with pytest.raises(KeyboardInterrupt): fit(preset, data, tmp_path/"cut", start=ann, progress=False, device="cpu")
    monkeypatch.setattr(train, "save_epoch", keep)
    resumed = fit(preset, data, tmp_path/"cut", start=ann, progress=False, device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(weights(whole).values(), weights(resumed).values()))
    other = spiking_presets(TINY, 1000)["cnn, eq. 7"]
    with pytest.raises(ValueError, match="another spiking encoder"): fit(other, data, tmp_path/"other", start=whole, progress=False, device="cpu")


def test_a_run_is_trained_once(data, tmp_path, monkeypatch):
    monkeypatch.setenv("SPKLIP_RUNS", str(tmp_path/"runs"))
    metrics, folder = train_and_test(TINY, data, seed=3)
    monkeypatch.setattr(train, "fit", None)                       # whoever trains now fails
    again, same = train_and_test(TINY, data, seed=3)
    assert again == metrics and same == folder and (folder/"model.safetensors").exists() and 0 <= metrics["top1"] <= 1
    with pytest.raises(TypeError): train_and_test(TINY, data, seed=4)

def test_trainings_side_by_side(data, tmp_path, monkeypatch, capsys):
    "Each is trained once, also where two keys share it; one thread each, so that the number of cores changes nothing."
    monkeypatch.setenv("SPKLIP_RUNS", str(tmp_path/"runs"))
    jobs, mark = {"a": (TINY, data, 1), "the same": (TINY, data, 1), "b": (TINY, data, 2)}, tmp_path/"mark"
    found = train_all(jobs, beside={"other work": (Path.touch, mark)})
    assert found["a"] == found["the same"] != found["b"] and capsys.readouterr().out.count("to go") == 3 and mark.exists()
    assert train_all(jobs, beside={"no core idles now": (Path.unlink, mark)}) == found and mark.exists()
    monkeypatch.setenv("SPKLIP_RUNS", str(tmp_path/"one by one"))
    side_by_side(train_and_test, {"a": (TINY, data, 1)}, at_once=1)
    again, wanted = weights(train_and_test(TINY, data, 1)[1]), weights(found["a"][1])
    differ = {k: (again[k] - wanted[k]).abs().max().item() for k in wanted if not torch.equal(again[k], wanted[k])}
    assert not differ, (torch.get_num_threads(), differ)

def test_side_by_side_names_what_failed(data, tmp_path, monkeypatch):
    monkeypatch.setenv("SPKLIP_RUNS", str(tmp_path/"runs"))
    (tmp_path/"model.safetensors").touch()
    with pytest.raises(FileNotFoundError, match="config.json is missing"): train_all({"bad": (TINY, data, 1, tmp_path)})


def test_top_k_and_confusion_by_hand():
    said = Evaluation(torch.tensor([[.9, .1, .0], [.2, .5, .3], [.6, .3, .1], [.1, .2, .7]]), torch.tensor([0, 2, 1, 2]), torch.eye(4), list("abc"))
    assert said.top(1) == 0.5 and said.top(2) == 1.0
    assert confusion_counts(said.labels, said.similarity.argmax(1), 3).tolist() == [[1, 0, 0], [1, 0, 0], [0, 1, 1]]


def test_in_batch_is_kinder_than_all_classes():
    torch.manual_seed(0)
    labels = torch.arange(50).repeat(8)
    said = Evaluation(torch.randn(400, 50), labels, torch.zeros(400, 1), list(map(str, range(50))))
    hits, lucky = said.in_batches(8)
    assert said.top(1) < 0.06 and 0.12 < lucky < 0.16 and abs(hits - lucky) < 0.06   # all by chance


def test_in_batch_by_hand():
    said = Evaluation(torch.tensor([[.9, .1], [.8, .2]]), torch.tensor([0, 1]), torch.zeros(2, 1), list("ab"))
    assert said.in_batches(2) == (0.5, 0.5) and said.in_batches(1) == (1., 1.)


def test_the_learning_rate_rises_and_falls():
    config = TrainConfig(lr=2., warmup=0.25)
    rates = [learning_rate(s, config) for s in (0, .125, .25, .625, 1)]
    assert np.allclose(rates, [0, 1, 2, 1, 0])


def test_a_mirrored_clip_has_a_mirrored_caption():
    assert mirrored("waves the left hand to the right, leftwards") == "waves the right hand to the left, rightwards"
    assert mirrored("Left of the leftover, turn RIGHT") == "Right of the leftover, turn LEFT"
    assert mirrored("a bright light") == "a bright light"
    clip = (torch.rand(2, 5, 6, 8) < .5).to(torch.uint8)
    flipped, which = augment(clip, TrainConfig(flip=1., shift=0.), random.Random(0))
    assert all(which) and torch.equal(flipped, clip.flip(-1))


def test_a_shift_moves_every_frame_alike_and_repeats_the_edge():
    clip = torch.zeros(1, 3, 10, 10, dtype=torch.uint8); clip[..., 5, 5] = 1
    moved = {tuple(augment(clip, TrainConfig(flip=0., shift=0.3), random.Random(i))[0][0].nonzero()[:, 1:].unique(dim=0).flatten().tolist()) for i in range(40)}
    assert all(len(m) == 2 and max(abs(m[0] - 5), abs(m[1] - 5)) <= 3 for m in moved) and len(moved) > 10
    edge = torch.zeros(1, 1, 4, 4, dtype=torch.uint8); edge[..., 0] = 1
    right = next(out for i in range(99) if (out := augment(edge, TrainConfig(flip=0., shift=0.3), random.Random(i))[0])[0, 0, 0].sum() == 2)
    assert right[0, 0].tolist() == [[1, 1, 0, 0]]*4


def test_a_batch_is_moved_clip_by_clip():
    clips, config, rng, size = (torch.rand(6, 4, 8, 10) < .5).to(torch.uint8), TrainConfig(shift=.3), random.Random(1), (8, 10)
    moved, flipped = augment(clips, config, random.Random(1))
    flips = [rng.random() < .5 for _ in clips]
    shifts = [[round(rng.uniform(-.3, .3)*n) for n in size] for _ in clips]
    for clip, out, flip, shift in zip(clips, moved, flips, shifts):
        rows, columns = ((torch.arange(n) + s).clamp(0, n - 1) for n, s in zip(size, shift))
        assert torch.equal(out, clip[:, rows][:, :, columns.flip(0) if flip else columns])
    assert flipped == flips and 0 < sum(flips) < 6


def test_higher_thresholds_are_those_of_the_clip_the_same_for_a_seed():
    clip, config = torch.ones(6, 12, 4, 5, dtype=torch.uint8), TrainConfig(flip=0., shift=0., thresholds=3)
    higher, again, other = (augment(clip, config, random.Random(seed))[0] for seed in (0, 0, 1))
    assert torch.equal(higher, again) and not torch.equal(higher, other)
    assert {round(1/r) for r in higher.float().mean((1, 2, 3)).tolist()} == {1, 2, 3} and higher.float().mean(1).std((1, 2)).max() == 0
    dim = next(c for c in higher if c.float().mean() < .5)
    assert dim[0].float().mean() not in (0, 1) # pixels were not at zero when it began
    with pytest.raises(ValueError, match="thresholds=0"): TrainConfig(thresholds=0)


def test_a_temperature_that_went_too_far_comes_back(data, monkeypatch):
    "A loss that wants it ever smaller for an epoch, and larger in the next."
    monkeypatch.setattr(train, "contrastive_loss", lambda video, text, targets, scale: wanted*scale)
    model, config = train.new_model(TINY.model, SpikeDataset(data, "train"), None), replace(TINY.train, lr=5., warmup=0.)
    loader = train.train_loader(SpikeDataset(data, "train"), config)
    for epoch, wanted in enumerate((-1., 1.)):
        train.train_epoch(model, train.make_optimizer(model, config), loader, config, train.accelerator_on("cpu"), 0, epoch)
        assert model.scale.item() == pytest.approx(100) if wanted < 0 else model.scale.item() < 60


def test_what_is_held_back_is_not_trained_on(data):
    clips = SpikeDataset(data, "train")
    kept, held = hold_out(clips, 0.25)
    assert len(held) == 8 and {r["file"] for r in held.rows} | {r["file"] for r in kept.rows} == {r["file"] for r in clips.rows}
    assert not {r["file"] for r in held.rows} & {r["file"] for r in kept.rows} and set(held.groups) <= set(kept.groups)
    assert held[3]["label"] == clips.classes.index(held.rows[3]["label"])


def test_errors_come_first(data, tmp_path):
    with pytest.raises(ValueError, match="no preset 'desktop': smoke, laptop, gpu, paper"): preset_of("desktop")
    with pytest.raises(ValueError, match="batch_size=1"): TrainConfig(batch_size=1)
    with pytest.raises(FileNotFoundError, match="config.json is missing: .* is no SPKLIP model"): fit(TINY, data, tmp_path/"x", start=tmp_path, progress=False)


def test_what_was_refused_has_no_claim_on_a_folder(data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "new_model", lambda *how: (_ for _ in ()).throw(ValueError("another size")))
    with pytest.raises(ValueError, match="another size"): fit(TINY, data, tmp_path/"run", progress=False)
    monkeypatch.undo()
    assert fit(TINY, data, tmp_path/"run", seed=1, progress=False).is_dir()


def test_a_folder_belongs_to_one_run(data, tmp_path):
    once = replace(TINY, train=replace(TINY.train, epochs=1, batch_size=8))
    model = fit(once, data, tmp_path/"run", progress=False, device="cpu")
    otherwise = replace(once, train=replace(once.train, workers=2, frugal=True)) # how, not what
    assert fit(once, data, tmp_path/"run", progress=False, device="cpu") == fit(otherwise, data, tmp_path/"run", progress=False, device="cpu") == model
    twice = replace(once, train=replace(once.train, epochs=2))
    with pytest.raises(ValueError, match="of another run: its preset.train.epochs is 1, not 2; seed is 0, not 7"):
        fit(twice, data, tmp_path/"run", seed=7, progress=False)
    other = generate(replace(TINY.scenes, seed=1), tmp_path/"other", progress=False)
    with pytest.raises(ValueError, match="its data is"): fit(once, other, tmp_path/"run", progress=False, device="cpu")


def test_a_folder_that_does_not_say_of_which_run_it_is(data, tmp_path):
    once = replace(TINY, train=replace(TINY.train, epochs=1, batch_size=8))
    fit(once, data, tmp_path/"run", progress=False, device="cpu")
    (tmp_path/"run"/"config.json").unlink()
    with pytest.raises(ValueError, match="has epochs or a model, but no config.json"): fit(once, data, tmp_path/"run", progress=False, device="cpu")


def test_a_split_that_is_missing_is_said_before_training(data, tmp_path, monkeypatch):
    monkeypatch.setenv("SPKLIP_RUNS", str(tmp_path/"runs"))
    monkeypatch.setattr(train, "fit", None)
    untested = copy_of(data, tmp_path/"untested", {"split": lambda r: r["split"].replace("test", "validation")})
    with pytest.raises(StreamError, match="no clips of split 'test'"): train_and_test(TINY, untested)


def test_damaged_files_of_a_run_are_named(data, tmp_path):
    model = train.new_model(TINY.model, SpikeDataset(data, "train"), None)
    optimizer = train.make_optimizer(model, TINY.train)
    train.save_epoch(tmp_path, model, optimizer, [{}])
    for name, said in (("history.json", "epoch-001/history.json is no JSON"), ("optimizer.safetensors", "epoch-001/optimizer.safetensors cannot be read")):
        (tmp_path/"epoch-001"/name).write_bytes(b"{")
        with pytest.raises(ValueError, match=said): train.load_epoch(tmp_path, model, optimizer)


def test_a_run_that_nobody_watches_looks_once_and_learns_the_same(data, tmp_path, capsys):
    ran = {}
    for watch in (True, False):
        folder = fit(replace(TINY, train=replace(TINY.train, epochs=2, watch=watch)), data, tmp_path/str(watch), device="cpu")
        ran[watch] = json.loads((folder/"history.json").read_text()), load_file(folder/"model.safetensors"), capsys.readouterr().out
    (seen, weights, said), (unseen, same, little) = ran.values()
    assert unseen[0]["top1"] is None and unseen[1]["top1"] == seen[1]["top1"] and [h["loss"] for h in unseen] == [h["loss"] for h in seen]
    assert weights.keys() == same.keys() and all(torch.equal(weights[name], same[name]) for name in weights)
    assert said.count("validation top-1") == 2 and little.count("validation top-1") == 1 and little.count("loss") == 2


def test_two_do_not_train_in_one_folder(data, tmp_path):
    with runs.locked(tmp_path/".training", ""), pytest.raises(ValueError, match="another process trains here"):
        fit(TINY, data, tmp_path, progress=False, device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said(data, tmp_path):
    with pytest.raises(ValueError, match="no GPU"): fit(TINY, data, tmp_path, device="cuda")


def test_clips_of_another_size_are_not_read_as_those(data, tmp_path):
    turned = copy_of(data, tmp_path/"turned", {"height": lambda r: r["width"], "width": lambda r: r["height"]})
    folder = fit(replace(TINY, train=replace(TINY.train, epochs=1)), data, tmp_path/"run", progress=False, device="cpu")
    with pytest.raises(ValueError, match="turned: clips of 40 x 32, the model reads 32 x 40"):
        evaluate(SPKLIP.from_pretrained(folder), SpikeDataset(turned, "test"))
    started = train.new_model(replace(TINY.model, height=40, width=32), SpikeDataset(turned, "train"), folder)
    assert (started.config.height, started.config.width) == (40, 32) and started.encode_video(SpikeDataset(turned)[0]["packed"][None]).isfinite().all()


def test_a_loss_that_is_no_number_stops_the_run(data, tmp_path, monkeypatch):
    losses = iter([1., float("nan")])
    monkeypatch.setattr(train, "train_epoch", lambda *_: next(losses))
    with pytest.raises(ValueError, match="loss of epoch 2 is nan; a rate below lr=0.001"):
        fit(replace(TINY, train=replace(TINY.train, epochs=3)), data, tmp_path/"run", progress=False, device="cpu")
    assert len(list((tmp_path/"run").glob("epoch-*"))) == 1 and not (tmp_path/"run"/"model").exists()


def test_weights_that_are_no_numbers_stop_the_run(data, tmp_path, monkeypatch):
    "Though the loss, of the weights before the last step, is one: the epoch before it is kept, and not theirs."
    def spoilt(model, *rest, epoch=[0]):
        epoch[0] += 1
        if epoch[0] == 2: next(model.parameters()).data.fill_(math.inf)
        return 1.
    monkeypatch.setattr(train, "train_epoch", spoilt)
    with pytest.raises(ValueError, match="epoch 2 leaves weights that are no numbers"):
        fit(replace(TINY, train=replace(TINY.train, epochs=2)), data, tmp_path/"run", progress=False, device="cpu")
    assert [e.name for e in (tmp_path/"run").glob("epoch-*")] == ["epoch-001"]


def test_an_epoch_of_other_words_is_not_gone_on_from(data, tmp_path):
    model = train.new_model(TINY.model, SpikeDataset(data, "train"), None)
    for n in (999, 1000): train.save_epoch(tmp_path, model, train.make_optimizer(model, TINY.train), [{}]*n)
    (tmp_path/"epoch-999").mkdir() # cut off before it was dropped
    assert len(train.load_epoch(tmp_path, model, train.make_optimizer(model, TINY.train))) == 1000
    other = train.new_model(TINY.model, SpikeDataset(copy_of(data, tmp_path/"other", {"caption": lambda r: "quite another thing"}), "train"), None)
    with pytest.raises(ValueError, match="epoch-1000: trained with other words"): train.load_epoch(tmp_path, other, train.make_optimizer(other, TINY.train))


def test_a_pretrained_bert_is_known_by_its_content(data, tmp_path):
    bert = tmp_path/"bert"; bert.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"): (bert/name).write_text("{}")
    preset = replace(TINY, model=replace(TINY.model, text=replace(TINY.model.text, pretrained=str(bert))))
    before = train.run_of(preset, data)
    (bert/"tokenizer.json").write_text("{ }")
    assert train.run_of(preset, data) != before and "bert" not in train.run_of(TINY, data)


def test_a_baseline_starts_from_one_of_its_sensor(data, tmp_path):
    turned = SpikeDataset(copy_of(data, tmp_path/"turned", {"height": lambda r: r["width"], "width": lambda r: r["height"]}), "train")
    of = lambda h, w: replace(TINY.model, baseline=BaselineConfig("linear"), height=h, width=w)
    start = train.new_model(of(32, 40), SpikeDataset(data, "train"), None).save_pretrained(tmp_path/"start")
    with pytest.raises(ValueError, match="height is 32, not 40; width is 40, not 32"): train.new_model(of(40, 32), turned, start)


def test_thresholds_are_for_spikes(tmp_path):
    video = generate_video(TINY.scenes, tmp_path/"video")
    with pytest.raises(ValueError, match="thresholds=2 is for spikes"):
        fit(replace(TINY, train=replace(TINY.train, thresholds=2)), video, tmp_path/"run", progress=False, device="cpu")


def test_a_start_is_known_by_all_of_its_files(data, tmp_path):
    folder = fit(replace(TINY, train=replace(TINY.train, epochs=1)), data, tmp_path/"run", progress=False, device="cpu")
    seen = {train.model_digest(folder)}
    for name in ("config.json", "tokenizer.json"):
        (folder/name).write_text((folder/name).read_text() + " "); seen.add(train.model_digest(folder))
    assert len(seen) == 3
    (folder/"tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="tokenizer.json is missing"): train.run_of(TINY, data, 0, folder)


def test_schedules_that_never_fall():
    with pytest.raises(ValueError, match="warmup=1.0"): TrainConfig(warmup=1.)
    with pytest.raises(ValueError, match="flip=2, hold_out=-0.05: shares"): TrainConfig(hold_out=-.05, flip=2)


def test_classes_told_apart_by_a_side_are_not_mirrored(data, tmp_path, monkeypatch, capsys):
    sided = lambda r: f"a person turns {['left', 'right'][r['label'] == SpikeDataset(data).classes[0]]}"
    turned, seen = copy_of(data, tmp_path/"turned", {"prompt": sided}), []
    monkeypatch.setattr(train, "train_epoch", lambda model, optimizer, loader, config, *more: seen.append(config.flip) or 0.)
    once = replace(TINY, train=replace(TINY.train, epochs=1, batch_size=8))
    for clips, name in ((data, "a"), (turned, "b")): fit(once, clips, tmp_path/name, device="cpu")
    assert seen == [TINY.train.flip, 0.] and TINY.train.flip > 0 and "told apart by left and right" in capsys.readouterr().out


def test_nothing_need_be_held_out(data, tmp_path, monkeypatch):
    monkeypatch.setenv("SPKLIP_RUNS", str(tmp_path))
    metrics, _ = train_and_test(replace(TINY, train=replace(TINY.train, epochs=1, batch_size=8, hold_out=0.)), data, progress=False)
    assert metrics["seen_top1"] is None and 0 <= metrics["top1"] <= 1


def test_without_a_validation_split_the_clips_kept_back_are_watched(data, tmp_path, capsys):
    no_validation = copy_of(data, tmp_path/"two splits", dict(split=lambda r: "train" if r["split"] == "validation" else r["split"]))
    model = fit(preset := replace(TINY, train=replace(TINY.train, epochs=1, hold_out=.2)), no_validation, tmp_path/"run")
    assert "no validation split" in capsys.readouterr().out
    watched = train.to_watch(no_validation, preset)
    _, kept_back = hold_out(SpikeDataset(no_validation, "train"), .2)
    assert watched.rows == kept_back.rows and len(watched) == 8
    assert json.loads((model/"history.json").read_text())[0]["top1"] == evaluate(SPKLIP.from_pretrained(model), kept_back).top(1)
    assert {r["split"] for r in train.to_watch(data, preset).rows} == {"validation"}
    with pytest.raises(ValueError, match="no clips of split 'validation', and hold_out=0"):
        fit(replace(preset, train=replace(preset.train, hold_out=0.)), no_validation, tmp_path/"other")
    with pytest.raises(ValueError, match="hold_out=1.0 keeps back every clip"):
        fit(replace(preset, train=replace(preset.train, hold_out=1.)), no_validation, tmp_path/"other")


def test_presets_keep_every_part_on():
    for name in ("laptop", "gpu", "paper"):
        model = preset_of(name).model
        assert model.hsfe.masks and model.hsfe.attention and model.hsfe.n_blocks == 5 and model.star_net.temporal_layers >= 1 and model.text.layers >= 2
    paper = preset_of("paper").train
    assert paper.lr == 2e-5 and paper.batch_size == 8 and paper.epochs == 30 and paper.targets == "diagonal"


def test_a_study_halves_everything_and_eq_6_can_be_as_printed():
    whole, half = preset_of("laptop"), study(preset_of("laptop"))
    for size in (lambda p: p.model.hsfe.filters, lambda p: p.model.star_net.width, lambda p: p.scenes.train, lambda p: p.train.epochs,
                 lambda p: p.train.batch_size):
        assert size(whole) == 2*size(half)
    assert half.train.prompts == 1 and not half.train.watch and half.scenes.test == whole.scenes.test
    assert study(preset_of("paper")) == preset_of("paper")
    printed = as_printed(whole).train
    assert (printed.targets, printed.prompts) == ("diagonal", 0) and printed.epochs == whole.train.epochs


def test_frugal_and_compiled(tmp_path, monkeypatch):
    "Options of a training: both reach the model."
    seen = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: seen.append(type(module).__name__))
    preset = preset_of("smoke")
    data = generate(replace(preset.scenes, train=16, validation=4, test=4), tmp_path/"data", progress=False)
    monkeypatch.setattr("spklip.train.train_epoch", lambda model, *more: seen.append(model.frugal) or 0.)
    fit(replace(preset, train=replace(preset.train, epochs=1, batch_size=8, frugal=True, compiled=True)), data, tmp_path/"run", progress=False)
    assert seen == ["HSFE", "MAPResNet", True]
    spiking = replace(preset, model=replace(preset.model, fsve=FSVEConfig()), train=replace(preset.train, epochs=1, batch_size=8, frugal=True))
    with pytest.raises(ValueError, match="frugal: HSFE in spikes"): fit(spiking, data, tmp_path/"spiking", progress=False)


@pytest.mark.parametrize("has, uses, right", [(True, "AVX512", True), (True, "AVX2", False), (False, "AVX512", False)])
def test_bf16_where_torch_uses_what_the_cpu_has(has, uses, right, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict(avx512_bf16=has), raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: uses)
    assert train.has_bf16(torch.device("cpu")) is right


def test_one_batch_of_the_gpu_preset(tmp_path, monkeypatch):
    monkeypatch.setenv("SPKLIP_RUNS", str(tmp_path/"runs"))
    gpu = preset_of("gpu")
    one = replace(gpu, scenes=replace(gpu.scenes, train=8, validation=2, test=4), train=replace(gpu.train, epochs=1, batch_size=6, workers=0))
    metrics, folder = train_and_test(one, generate(one.scenes, tmp_path/"clips", progress=False), progress=False)
    assert math.isfinite(metrics["history"][0]["loss"]) and metrics["clips"] == 4
    assert SPKLIP.from_pretrained(folder).config == replace(gpu.model, height=60, width=80)
