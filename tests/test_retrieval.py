"Retrieval: ranks against loops, chance against draws, search against the full matrix, an index that survives a kill, the commands."
import itertools, json, math, os, shutil, signal, subprocess, sys, time
from pathlib import Path
from functools import partial
import numpy as np, pytest, torch
from filelock import FileLock
from hypothesis import given, settings, strategies as st
from PIL import Image
from spklip import retrieval
from spklip.data.datasets import SpikeDataset, read_metadata, write_metadata
from spklip.data.scenes import SpikeActions, generate
from spklip.data.streams import write_dat
from spklip.lab import cli
from spklip.retrieval import (Index, bootstrap, chance, embed_texts, identity, median_rank, ranks, recall_at, recall_in,
                              resampled, search, similarity, stale)
from spklip.stcl import SPKLIP
from conftest import ROOT

MODEL = ROOT/"outputs"/"laptop"/"model"

def draw(q, n, levels, seed=0):
    "Similarities with ties, and which are right, at least one a query."
    rng = np.random.default_rng(seed)
    right = rng.random((q, n)) < 0.3
    right[np.arange(q), rng.integers(0, n, q)] = True
    return torch.from_numpy(rng.integers(0, levels, (q, n))/levels).float(), torch.from_numpy(right)

def rank_in_order(values, right, order):
    "The place of the first right one when what ties stands in this order: a loop."
    ranked = sorted(order, key=lambda i: -values[i]) # sorted is stable
    return next(place for place, i in enumerate(ranked, 1) if right[i])

def test_ranks_are_the_mean_over_all_orders():
    sim, right = draw(12, 5, levels=2)
    found = ranks(sim, right)
    for i in range(len(sim)):
        places = [rank_in_order(sim[i].tolist(), right[i].tolist(), order) for order in itertools.permutations(range(5))]
        assert found.expected()[i].item() == pytest.approx(np.mean(places))
        for k in range(1, 6): assert found.within(k)[i].item() == pytest.approx(np.mean([p <= k for p in places]))

def test_ranks_by_a_double_loop():
    sim, _ = draw(40, 30, levels=8)
    target = torch.arange(40) % 30
    found = ranks(sim, target)
    for i in range(40):
        above = sum(sim[i, j] > sim[i, target[i]] for j in range(30))
        tied = sum(sim[i, j] == sim[i, target[i]] for j in range(30))
        assert (found.above[i], found.tied[i], found.right[i]) == (above, tied, 1)
        assert found.expected()[i] == above + (tied + 1)/2

def test_a_gallery_of_its_own_for_each_query():
    sim = torch.tensor([[.1, .5, .9, .7], [.9, .9, .9, .9]])
    sim[0, 2] = sim[1, 0] = sim[1, 1] = -torch.inf
    found = ranks(sim, torch.tensor([1, 3]))
    assert found.gallery.tolist() == [3, 2] and found.expected().tolist() == [2, 1.5]
    assert recall_at(chance(sim, torch.tensor([1, 3])), 1) == pytest.approx((1/3 + 1/2)/2)

def test_what_cannot_be_ranked():
    sim = torch.rand(2, 3)
    with pytest.raises(ValueError, match="query 1: its gallery has no right clip"): ranks(sim, torch.tensor([[True, False, False], [False]*3]))
    gone = sim.clone(); gone[0, 2] = -torch.inf
    with pytest.raises(ValueError, match="query 0"): ranks(gone, torch.tensor([2, 0]))
    with pytest.raises(ValueError, match="not a number"): ranks(sim/0*0, torch.tensor([0, 1]))

@pytest.mark.parametrize("q", [7, 8])
def test_median_without_ties_is_numpys(q):
    sim = torch.rand(q, 20, generator=torch.Generator().manual_seed(q))
    found = ranks(sim, torch.arange(q))
    assert median_rank(found) == np.median(found.expected().numpy())

@pytest.mark.parametrize("n", [9, 10])
def test_chance_exactly(n):
    lucky = chance(torch.rand(n, n), torch.arange(n))
    for k in range(1, n + 1): assert recall_at(lucky, k) == pytest.approx(k/n, abs=1e-15)
    assert median_rank(lucky) == (n + 1)/2
    several = torch.zeros(n, n).bool(); several[:, :3] = True
    assert recall_at(chance(torch.rand(n, n), several), 2) == pytest.approx(1 - math.comb(n - 3, 2)/math.comb(n, 2))

@pytest.mark.parametrize("right_ones", [1, 4])
def test_chance_by_drawing(right_ones):
    "Random similarities: recalls and median rank come out as chance says."
    n, rng = 24, torch.Generator().manual_seed(0)
    right = torch.zeros(6000, n).bool(); right[:, :right_ones] = True
    sim = torch.rand(6000, n, generator=rng)
    found, lucky = ranks(sim, right), chance(sim, right)
    for k in (1, 5, 10): assert recall_at(found, k) == pytest.approx(recall_at(lucky, k), abs=4*0.5/6000**0.5)
    assert abs(median_rank(found) - median_rank(lucky)) <= 1

def test_bootstrap_repeats_and_pairs():
    found = [ranks(torch.rand(300, 300, generator=torch.Generator().manual_seed(s)) + 0.8*torch.eye(300), torch.arange(300)) for s in range(2)]
    metric = partial(recall_at, k=1)
    low, high = bootstrap(metric, found)
    assert (low, high) == bootstrap(metric, found) != bootstrap(metric, found, seed=1)
    assert low <= np.mean([recall_at(f, 1) for f in found]) <= high

def test_bootstrap_knows_that_models_differ():
    good, bad = (ranks(sign*torch.eye(40), torch.arange(40)) for sign in (1., -1.))
    assert bootstrap(partial(recall_at, k=1), [good, good]) == (1, 1) and bootstrap(partial(recall_at, k=1), [good, bad]) == (0, 1)

def test_weights_count_queries():
    sim, _ = draw(9, 9, levels=4)
    found, counts = ranks(sim, torch.arange(9)), resampled(9, draws=5)
    assert (counts.sum(1) == 9).all()
    for w in counts:
        again = ranks(sim.repeat_interleave(w, 0), torch.arange(9).repeat_interleave(w))
        assert recall_at(found, 3, w[None]).item() == pytest.approx(recall_at(again, 3))
        assert median_rank(found, w[None]).item() == median_rank(again)

def test_groups_are_drawn_together():
    counts = resampled(6, ["a", "b", "a", "b", "b", "c"], draws=50)
    assert torch.equal(counts[:, 0], counts[:, 2]) and torch.equal(counts[:, 1], counts[:, 4])
    assert counts.sum(1).min() < 6 < counts.sum(1).max()
    with pytest.raises(ValueError, match="3 groups for 2 queries"): resampled(2, [1, 2, 3])

def test_bootstrap_covers():
    "Of 100 samples with a known share of hits, about 95 % of the intervals hold it."
    rng, held = np.random.default_rng(0), 0
    for s in range(100):
        hits = torch.from_numpy(rng.random(150) < 0.3)
        sim = torch.stack([hits.float(), torch.full((150,), .5)], 1) # the right one is above or below the other
        low, high = bootstrap(partial(recall_at, k=1), [ranks(sim, torch.zeros(150).long())], draws=200)
        held += low <= 0.3 <= high
    assert 88 <= held <= 99

def test_a_smaller_gallery_by_drawing():
    n, size = 60, 12
    sim, _ = draw(n, n, levels=30)
    sim += 0.3*torch.eye(n)
    found, rng = ranks(sim, torch.arange(n)), np.random.default_rng(0)
    drawn = []
    for _ in range(1500):
        some = torch.from_numpy(rng.choice(n, size, replace=False))
        part = ranks(sim[some][:, some], torch.arange(size))
        drawn.append([recall_at(part, k) for k in (1, 3)])
    for k, mean in zip((1, 3), np.mean(drawn, 0)): assert recall_in(found, size, k) == pytest.approx(mean, abs=0.01)
    assert recall_in(found, n, 3) == pytest.approx(recall_at(found, 3)) and recall_in(found, 3, 5) == pytest.approx(1)

def test_a_smaller_gallery_needs_one_right_clip_and_one_gallery():
    sim, right = draw(5, 8, levels=1)
    right[:, :2] = True
    with pytest.raises(ValueError, match="several right"): recall_in(ranks(sim, right), 4, 1)
    with pytest.raises(ValueError, match="no part of one of 8"): recall_in(ranks(sim, torch.arange(5)), 9, 1)
    sim[0, 7] = -torch.inf
    with pytest.raises(ValueError, match="galleries differ"): recall_in(ranks(sim, torch.arange(5)), 4, 1)

@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 40), k=st.integers(1, 50), block=st.integers(1, 50), levels=st.integers(1, 4), seed=st.integers(0, 9))
def test_search_by_blocks_is_the_full_sort(n, k, block, levels, seed):
    rng = np.random.default_rng(seed)
    gallery, queries = rng.integers(0, levels, (n, 6)).astype(np.float32), torch.from_numpy(rng.standard_normal((3, 6))).float()
    full = similarity(queries, torch.from_numpy(gallery))
    order = full.sort(dim=1, descending=True, stable=True)[1][:, :k]
    scores, rows = search(queries, gallery, k, block)
    assert torch.equal(rows, order) and torch.equal(scores, full.gather(1, order))

@pytest.mark.parametrize("kind", ["few look alike", "each three times", "all tie", "better and better"])
@pytest.mark.parametrize("block", [700, 1 << 12])
def test_search_of_many_is_the_full_sort(kind, block):
    "Where few rows are candidates they are scored one by one, where many are, all at once; nobody can tell."
    gallery = torch.nn.functional.normalize(torch.randn(6000, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    queries = gallery[:3] + 0.1
    if kind == "each three times": gallery = gallery[:2000].repeat(3, 1)
    if kind == "all tie": gallery = gallery[:1].repeat(6000, 1)
    if kind == "better and better": gallery = gallery[(gallery @ queries[0]).argsort()]
    full = similarity(queries, gallery)
    order = full.sort(dim=1, descending=True, stable=True)[1][:, :7]
    scores, rows = search(queries, gallery.numpy(), 7, block)
    assert torch.equal(rows, order) and torch.equal(scores, full.gather(1, order))

def test_search_reads_one_block_at_a_time(tmp_path):
    "A gallery that is memory-mapped is touched in pieces of a block's size only."
    np.save(tmp_path/"g.npy", np.random.default_rng(0).standard_normal((1000, 8)).astype(np.float32))
    class Watched:
        def __init__(self, array): self.array, self.shape, self.read = array, array.shape, []
        def __len__(self): return len(self.array)
        def __getitem__(self, rows): self.read.append(len(range(*rows.indices(len(self.array))))); return self.array[rows]
    gallery = Watched(np.load(tmp_path/"g.npy", mmap_mode="r"))
    search(torch.rand(2, 8), gallery, 3, block=128)
    assert max(gallery.read) == 128 and sum(gallery.read) == 1000

def test_search_says_what_does_not_fit():
    with pytest.raises(ValueError, match="do not fit"): search(torch.rand(2, 8), torch.rand(5, 7))
    with pytest.raises(ValueError, match="k=0"): search(torch.rand(2, 8), torch.rand(5, 8), 0)
    gallery = torch.rand(50, 8); gallery[33, 2] = torch.nan
    with pytest.raises(ValueError, match="row 33 of the gallery"): search(torch.rand(2, 8), gallery, 3, block=20)
    with pytest.raises(ValueError, match="a query holds"): search(gallery[33:34], torch.rand(5, 8))
    assert [list(x.shape) for x in search(torch.rand(0, 8), torch.rand(5, 8), 3)] == [[0, 3], [0, 3]]

# on disk

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Twelve clips of four classes, of the size that the committed model reads."
    folder = tmp_path_factory.mktemp("clips")/"tiny"
    generate(SpikeActions(classes=4, train=4, validation=4, test=4), folder, progress=False)
    return folder

@pytest.fixture
def tiny(made, tmp_path):
    "A copy of its own for each test, without an index."
    return shutil.copytree(made, tmp_path/"tiny")

@pytest.fixture(scope="module")
def model(): return SPKLIP.from_pretrained(MODEL)

def test_equal_sentences_are_equal_vectors(model):
    sentences = ["a person waves", "a much longer sentence than all of the others, facing right", "a person waves"]
    out = embed_texts(model, sentences, batch=1)
    assert torch.equal(out[0], out[2]) and torch.allclose(out.norm(dim=1), torch.ones(3), atol=1e-6)
    assert torch.allclose(out, model.encode_text(sentences), atol=1e-5)

def test_index_round_trip(tiny, model, tmp_path):
    clips, of = SpikeDataset(tiny, "test"), identity(MODEL, tiny, "test")
    made = Index.build(model, of, clips, tmp_path/"a"/"index", batch=3)
    again = Index.open(tmp_path/"a"/"index")
    assert again.of == made.of == of and again.files == [r["file"] for r in clips.rows]
    with torch.no_grad(): direct = torch.cat([model.encode_video(torch.stack([clips[i]["packed"] for i in part])) for part in ([0, 1, 2], [3])])
    assert np.array_equal(again.embeddings, direct.numpy()) and isinstance(again.embeddings, np.memmap)
    assert again.search(direct, 1)[1][:, 0].tolist() == [0, 1, 2, 3]
    assert sorted(os.listdir(tmp_path/"a")) == ["index"] and set(os.listdir(tmp_path/"a"/"index")) == retrieval.FILES

class Stop(Exception): pass

def fails_after(model, monkeypatch, batches):
    "The model's `encode_video` works so often and then raises; a list of the sizes of its batches."
    seen, encode = [], model.encode_video
    def work(video):
        if len(seen) == batches: raise Stop
        seen.append(len(video))
        return encode(video)
    monkeypatch.setattr(model, "encode_video", work)
    return seen

def test_interrupted_it_goes_on(tiny, model, tmp_path, monkeypatch):
    clips, of, at = SpikeDataset(tiny), identity(MODEL, tiny), tmp_path/"index"
    whole = np.array(Index.build(model, of, clips, tmp_path/"whole", batch=4).embeddings)
    with monkeypatch.context() as m:
        fails_after(model, m, 2)
        with pytest.raises(Stop): Index.build(model, of, clips, at, batch=4)
    assert stale(at, of) == "not there" and json.loads((tmp_path/"index.part"/"index.json").read_text())["done"] == 8
    seen = fails_after(model, monkeypatch, 99)
    assert np.array_equal(Index.build(model, of, clips, at, batch=4).embeddings, whole) and seen == [4]
    assert not (tmp_path/"index.part").exists() and stale(at, of) == ""

def test_stopped_before_it_got_its_name(tiny, model, tmp_path, monkeypatch):
    "All clips are done: nothing is embedded again."
    clips, of = SpikeDataset(tiny, "test"), identity(MODEL, tiny, "test")
    def stop(part, folder): raise Stop
    with monkeypatch.context() as m:
        m.setattr(retrieval, "put", stop)
        with pytest.raises(Stop): Index.build(model, of, clips, tmp_path/"index")
    fails_after(model, monkeypatch, 0)
    assert len(Index.build(model, of, clips, tmp_path/"index").files) == 4

def test_what_another_model_began_is_begun_anew(tiny, model, tmp_path, monkeypatch):
    clips, of, at = SpikeDataset(tiny), identity(MODEL, tiny), tmp_path/"index"
    with monkeypatch.context() as m:
        fails_after(model, m, 1)
        with pytest.raises(Stop): Index.build(model, of | {"model": "other"}, clips, at, batch=4)
    seen = fails_after(model, monkeypatch, 99)
    Index.build(model, of, clips, at, batch=4)
    assert seen == [4, 4, 4]

def test_the_first_of_three_does_not_trust_the_rows_of_the_second(tiny, model, tmp_path, monkeypatch):
    "One model is stopped, another blanks its rows and is stopped before it notes any: the first begins anew."
    clips, of, at = SpikeDataset(tiny), identity(MODEL, tiny), tmp_path/"index"
    for who, batches in ((of, 2), (of | {"model": "other"}, 0)):
        with monkeypatch.context() as m:
            fails_after(model, m, batches)
            with pytest.raises(Stop): Index.build(model, who, clips, at, batch=4)
    assert np.abs(Index.build(model, of, clips, at, batch=4).embeddings).max(1).all()

def test_killed_while_it_got_its_name(tiny, model, tmp_path, monkeypatch):
    "Neither index has the name; the next call gives it, and leaves nothing of the old one."
    clips, of, at = SpikeDataset(tiny, "test"), identity(MODEL, tiny, "test"), tmp_path/"index"
    Index.build(model, of | {"model": "old"}, clips, at)
    rename = Path.rename
    def stop(self, to):
        if self.name == "index.part": raise Stop
        return rename(self, to)
    with monkeypatch.context() as m:
        m.setattr(Path, "rename", stop)
        with pytest.raises(Stop): Index.build(model, of, clips, at)
    assert stale(at, of) == "not there"
    assert Index.build(model, of, clips, at).of == of and sorted(os.listdir(tmp_path)) == ["index", "tiny"]

def test_the_old_index_answers_until_the_new_one_is_complete(tiny, model, tmp_path, monkeypatch):
    clips, of, at = SpikeDataset(tiny), identity(MODEL, tiny), tmp_path/"index"
    Index.build(model, of | {"model": "old"}, clips, at)
    with monkeypatch.context() as m:
        fails_after(model, m, 1)
        with pytest.raises(Stop): Index.build(model, of, clips, at, batch=4)
    assert Index.open(at).of["model"] == "old" and stale(at, of) == "made with another model"
    assert Index.build(model, of, clips, at, batch=4).of == of and sorted(os.listdir(tmp_path)) == ["index", "tiny"]

def test_killed_between_batches(tiny, tmp_path):
    "SIGKILL leaves no half index, and the next call goes on."
    code = f"""
import sys, time
from spklip.retrieval import *; from spklip.stcl import SPKLIP; from spklip.data.datasets import SpikeDataset
model, encode = SPKLIP.from_pretrained({str(MODEL)!r}), SPKLIP.encode_video
def slow(video): time.sleep(0.5); return encode(model, video)
model.encode_video = slow
Index.build(model, identity({str(MODEL)!r}, {str(tiny)!r}), SpikeDataset({str(tiny)!r}), {str(tmp_path/'index')!r}, batch=1)"""
    process, noted = subprocess.Popen([sys.executable, "-c", code]), tmp_path/"index.part"/"index.json"
    try:
        until = time.time() + 120
        while not noted.exists() and process.poll() is None and time.time() < until: time.sleep(0.05)
    finally: process.send_signal(signal.SIGKILL); process.wait()
    of = identity(MODEL, tiny)
    assert process.returncode == -signal.SIGKILL and stale(tmp_path/"index", of) == "not there"
    done = json.loads(noted.read_text())["done"]
    assert 1 <= done < 12 and retrieval.begun(noted.parent, of, 12) == done
    Index.build(SPKLIP.from_pretrained(MODEL), of, SpikeDataset(tiny), tmp_path/"index", batch=1)
    assert stale(tmp_path/"index", of) == ""

def test_stale_in_every_way(tiny, model, tmp_path):
    at, of = tmp_path/"index", identity(MODEL, tiny)
    assert stale(at, of) == "not there"
    Index.build(model, of, SpikeDataset(tiny), at)
    assert stale(at, identity(MODEL, tiny, "test")) == "made of another split"
    other = shutil.copytree(MODEL, tmp_path/"model")
    assert stale(at, identity(other, tiny)) == ""
    weights = bytearray((other/"model.safetensors").read_bytes()); weights[-1] ^= 1; (other/"model.safetensors").write_bytes(weights)
    assert stale(at, identity(other, tiny)) == "made with another model"
    rows = read_metadata(tiny); rows[0]["caption"] += " once more"; write_metadata(tiny, rows)
    assert stale(at, identity(MODEL, tiny)) == "made of clips that have changed since"
    (at/"embeddings.npy").write_bytes((at/"embeddings.npy").read_bytes()[:-9])
    assert stale(at, of) == "not readable"
    with pytest.raises(ValueError, match="no readable index"): Index.open(at)
    (at/"embeddings.npy").write_bytes(b"")
    assert stale(at, of) == "not readable" and retrieval.begun(at, of, 1) == 0

def test_nothing_else_is_replaced(tiny, model, tmp_path):
    of, clips = identity(MODEL, tiny), SpikeDataset(tiny)
    (tmp_path/"mine").mkdir(); (tmp_path/"mine"/"thesis.txt").write_text("years")
    (tmp_path/"file").write_text("x")
    for place in ("mine", "file", "tiny"):
        with pytest.raises(ValueError, match="exists and is no index"): Index.build(model, of, clips, tmp_path/place)
    assert (tmp_path/"mine"/"thesis.txt").read_text() == "years"

def test_what_a_kill_leaves_is_no_obstacle(tiny, model, tmp_path):
    part = tmp_path/"index.part"; part.mkdir()
    (part/".index.4242.part.json").write_text('{"of"') # of one that was killed while it noted what is done
    Index.build(model, identity(MODEL, tiny), SpikeDataset(tiny), tmp_path/"index")
    assert {p.name for p in (tmp_path/"index").iterdir()} == {"index.json", "embeddings.npy"}

def test_two_at_once(tiny, model, tmp_path):
    (tmp_path/"index.part").mkdir()
    with FileLock(tmp_path/"index.part"/".lock"), pytest.raises(ValueError, match="another process is making this index"):
        Index.build(model, identity(MODEL, tiny), SpikeDataset(tiny), tmp_path/"index")

# the commands

def run(capsys, *words, code=0):
    "A command's output, and what it said on stderr."
    try: got = cli.main([str(w) for w in words])
    except SystemExit as end: got = end.code
    out, err = capsys.readouterr()
    assert got == code, err
    return out, err

def test_index_then_search(tiny, tmp_path, capsys):
    out, _ = run(capsys, "index", tiny, "--split", "test")
    assert "4 clips, 128 numbers each" in out and len(list((tiny/"index").iterdir())) == 1
    assert "it was up to date" in run(capsys, "index", tiny, "--split", "test")[0]
    row = next(r for r in read_metadata(tiny) if r["split"] == "test")
    out, err = run(capsys, "search", row["caption"], tiny, "--split", "test", "--top", 3, "--sheet", tmp_path/"found.png")
    lines = out.splitlines()
    assert err == "" and lines[0].split() == ["rank", "cosine", "file", "label", "caption"] and lines[-1] == f"sheet: {tmp_path/'found.png'}"
    assert [l.split()[0] for l in lines[1:4]] == ["1", "2", "3"] and len(lines) == 5
    cosines = [float(l.split()[1]) for l in lines[1:4]]
    assert cosines == sorted(cosines, reverse=True)
    assert min(Image.open(tmp_path/"found.png").size) > 50

def test_search_finds_what_the_model_finds(tiny, model, capsys):
    query = "a person waves one hand"
    lines = run(capsys, "search", query, tiny)[0].splitlines()[1:]
    clips = SpikeDataset(tiny)
    with torch.no_grad():
        found = model.encode_text([query]) @ model.encode_video(torch.stack([clips[i]["packed"] for i in range(len(clips))])).T
    assert [l.split()[2] for l in lines] == [clips.rows[i]["file"] for i in found[0].argsort(descending=True).tolist()[:10]]
    assert float(lines[0].split()[1]) == pytest.approx(found.max().item(), abs=0.002)

def test_search_makes_a_missing_index_and_one_that_is_stale(tiny, capsys):
    assert "not there, is made" in run(capsys, "search", "a person walks", tiny)[1]
    assert run(capsys, "search", "a person walks", tiny)[1] == ""
    rows = read_metadata(tiny); rows[0]["caption"] += " again"; write_metadata(tiny, rows)
    assert "made of clips that have changed since, is made" in run(capsys, "search", "a person walks", tiny)[1]

def test_search_refuses_an_index_of_something_else(tiny, tmp_path, capsys):
    at = tmp_path/"index"
    run(capsys, "index", tiny, "--split", "test", "--index", at)
    _, err = run(capsys, "search", "a person walks", tiny, "--index", at, code=2)
    assert err == f"spklip search: {at}: made of another split; `spklip index` with the same folder and --index makes it anew\n"
    run(capsys, "index", tiny, "--index", at)
    assert run(capsys, "search", "a person walks", tiny, "--index", at)[1] == ""

def test_words_that_the_model_has_not_learnt(tiny, capsys):
    _, err = run(capsys, "search", "an elephant walks", tiny, "--split", "test")
    assert "not among the model's words: an, elephant" in err

@pytest.mark.parametrize("words, says", [
    (("search", " ", "tiny"), "an empty sentence finds nothing"),
    (("search", "a person walks", "absent"), "absent/metadata.jsonl: No such file"),
    (("search", "a person walks", "empty"), "empty/metadata.jsonl: No such file"),
    (("search", "a person walks", "tiny", "--model", "absent"), "absent: no model here"),
    (("search", "a person walks", "tiny", "--sheet", "x.jpg"), "x.jpg: a sheet is a .png"),
    (("search", "a person walks", "tiny", "--top", "0"), "'0' is no whole number of 1 or more"),
    (("search", "a person walks", "tiny", "--index", "thesis"), "thesis: is no index"),
    (("index", "tiny", "--index", "thesis"), "thesis: exists and is no index"),
    (("index", "absent"), "absent/metadata.jsonl: No such file"),
    (("index", "cut"), "bytes, expected"),
    (("index", "large"), "clips of 48 x 64, the model reads 32 x 40"),
    (("index", "short"), "a clip needs 250"),
], ids=lambda x: " ".join(x) if isinstance(x, tuple) else "")
def test_errors_are_one_line(tiny, tmp_path, monkeypatch, capsys, words, says):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "thesis"): (tmp_path/name).mkdir()
    (tmp_path/"thesis"/"text").write_text("years")
    rows = read_metadata(tiny)
    shutil.copytree(tiny, "cut"); file = tmp_path/"cut"/rows[3]["file"]; file.write_bytes(file.read_bytes()[:-7])
    for name, shape in (("large", (250, 48, 64)), ("short", (100, 32, 40))):
        (tmp_path/name).mkdir(); write_dat(tmp_path/name/"a.dat", np.ones(shape, np.uint8))
        write_metadata(name, [rows[0] | dict(file="a.dat", frames=shape[0], height=shape[1], width=shape[2])])
    _, err = run(capsys, *words, code=2)
    assert says in err and err.count("\n") == 1 and err.startswith("spklip"), err
    assert not list(tmp_path.rglob("*.part*"))

def test_ctrl_c_while_indexing(tiny, monkeypatch, capsys):
    encode, seen = SPKLIP.encode_video, []
    def stopped(self, video):
        if seen: raise KeyboardInterrupt
        seen.append(len(video))
        return encode(self, video)
    with monkeypatch.context() as m:
        m.setattr(SPKLIP, "encode_video", stopped)
        m.setattr(Index, "build", staticmethod(partial(retrieval.build_index, batch=8)))
        assert "the same command goes on" in run(capsys, "index", tiny, code=130)[1]
    part, = (tiny/"index").iterdir()
    assert part.suffix == ".part" and json.loads((part/"index.json").read_text())["done"] == 8
    assert "12 clips" in run(capsys, "index", tiny)[0] and not part.exists()


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs posix_fallocate")
def test_room_on_the_disk_is_taken_before_hours_are_spent(tmp_path, monkeypatch):
    file = retrieval.reserve(tmp_path/"a.npy", (1000, 256))
    assert file.shape == (1000, 256) and not file.any() and (tmp_path/"a.npy").stat().st_blocks*512 >= 1000*256*4
    def full(*_): raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left") as e: retrieval.reserve(tmp_path/"b.npy", (1000, 256))
    assert e.value.filename == str(tmp_path/"b.npy") and not (tmp_path/"b.npy").exists()
