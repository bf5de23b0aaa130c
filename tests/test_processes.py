"Two processes train as one: the same loss, gradients and answers; one that dies ends the others, and the run goes on."
import json, os, runpy, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from joblib import Parallel, delayed
from safetensors.torch import load_file

from spklip.baselines import BaselineConfig
from spklip.data.scenes import SpikeActions, generate
from spklip.lab import processes
from spklip.lab.processes import accelerator_on, device_of, gather_objects, join_norms, all_gather, share_of
from spklip.stcl import SPKLIP, contrastive_loss, contrastive_targets, learn_wordpiece, spiking
from spklip.train import evaluate, fit, preset_of, spiking_presets
from spklip.data.frames import open_clips


def together(work, of, folder, *arguments):
    "Call work(...) in `of` processes of one group; what each returns."
    def one(rank):
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting-{work.__name__}", rank=rank, world_size=of)
        try: return work(*arguments)
        finally: dist.destroy_process_group()
    return Parallel(of, "loky")(delayed(one)(rank) for rank in range(of))


def model_of(kind):
    torch.manual_seed(0)
    preset = preset_of("smoke")
    model = SPKLIP(preset.model, learn_wordpiece(["a person waves", "someone walks"]))
    if kind == "ANN": return model
    if kind == "linear": return SPKLIP(replace(preset.model, baseline=BaselineConfig(kind)), model.text.tokenizer)
    fsve = next(iter(spiking_presets(preset, 64).values())).model.fsve
    return spiking(model, replace(fsve, part=kind, steps=2), bits(4))


def bits(n):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (n, 250, 160), np.uint8) & np.random.default_rng(1).integers(0, 256,
        (n, 250, 160), np.uint8))


def gradients(folder):
    "One step on this process's share of eight clips: loss, then name -> gradient as data-parallel training has it, and the running statistics."
    model, clips, labels = SPKLIP.from_pretrained(folder).double().train(), bits(8), torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    for layer in model.modules():
        if isinstance(layer, torch.nn.Dropout): layer.p = 0.
        if isinstance(layer, torch.nn.MultiheadAttention): layer.dropout = 0.
    join_norms(model)
    mine, words = share_of(8), [f"{a} person {b}" for a in ("a", "some") for b in ("waves", "walks", "sits", "runs")]
    video, text, scale = model(clips[mine], words[mine])
    loss = contrastive_loss(all_gather(video), all_gather(text), contrastive_targets(all_gather(labels[mine])), scale)
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if dist.is_initialized():
        for g in found.values(): dist.all_reduce(g); g /= dist.get_world_size()
    return loss.item(), found, {name: b for name, b in model.named_buffers() if "running" in name}

def of_each(folders): return [gradients(f) for f in folders]


def test_equal_to_one_process(tmp_path):
    """Loss, all gradients and running statistics, in the ANN, in both spiking encoders and in a baseline that normalises vectors;
    in 64 bits, so that rounding hides nothing."""
    folders = [model_of(kind).save_pretrained(tmp_path/kind) for kind in ("ANN", "cnn", "full", "linear")]
    alone, both = of_each(folders), together(of_each, 2, tmp_path, folders)
    for (loss, found, statistics), *others in zip(alone, *both):
        for other, theirs, their_statistics in others:
            assert other == pytest.approx(loss, rel=1e-9) and theirs.keys() == found.keys() and len(found) > 30
            for mine, their in ((found, theirs), (statistics, their_statistics)):
                for name, value in mine.items():
                    torch.testing.assert_close(their[name], value, rtol=1e-7, atol=1e-9*max(1., value.abs().max().item()), msg=lambda m: f"{name}: {m}")


def answers(data):
    return evaluate(SPKLIP.from_pretrained(data/"model"), open_clips(data, "test", 25), 3)


def test_evaluation_is_whole(tmp_path):
    "Seven clips by three processes, ragged at the end: each has the answers of one process, in order."
    generate(SpikeActions(classes=2, train=4, validation=2, test=7, train_actors=2, validation_actors=1, test_actors=1), tmp_path, progress=False)
    model_of("ANN").save_pretrained(tmp_path/"model")
    alone = answers(tmp_path)
    assert len(alone.labels) == 7
    for found in together(answers, 3, tmp_path, tmp_path):
        assert torch.equal(found.labels, alone.labels) and torch.allclose(found.similarity, alone.similarity, atol=1e-5)
        assert found.metrics() == pytest.approx(alone.metrics())


def uneven(n):
    try: return share_of(n)
    except ValueError as error: return str(error)


def test_shares(tmp_path):
    "Alone all is mine; a batch of five is for no two processes; what each found may be of any length."
    assert share_of(5) == slice(0, 5) and gather_objects([1]) == [[1]]
    assert together(uneven, 2, tmp_path, 5) == ["a batch of 5 clips cannot be shared by 2 processes: the batch size has to be a multiple of their number"]*2


def test_each_training_is_where_it_is_wanted(monkeypatch):
    "Also after one elsewhere, whose device accelerate keeps; several processes cannot move."
    accelerator_on("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [accelerator_on(wanted).device.type for wanted in (None, "cpu", "cuda", "cpu")] == ["cuda", "cpu", "cuda", "cpu"]
    monkeypatch.setattr(processes, "processes", lambda: 2)
    with pytest.raises(ValueError, match="device='cuda': these 2 processes train on 'cpu' already"): accelerator_on()
    assert accelerator_on("cpu").device.type == "cpu"


@pytest.mark.parametrize("wanted", ["cuda:0", "gpu", "mps", ""])
def test_devices_that_are_none(wanted):
    with pytest.raises(ValueError, match=f"device='{wanted}': 'cpu' or 'cuda' expected"): device_of(wanted)


def in_folders_of_their_own(data, out):
    try: return str(fit(preset_of("smoke"), data, out/str(dist.get_rank()), device="cpu", progress=False))
    except ValueError as error: return str(error)


def test_one_folder_for_all(tmp_path):
    "An epoch that one process finds and another does not: refused, and the epoch is left as it is."
    (tmp_path/"0"/"epoch-001").mkdir(parents=True)
    said = together(in_folders_of_their_own, 2, tmp_path, tmp_path, tmp_path)
    assert all("all processes have to see one folder" in s and "epoch-001" in s for s in said) and (tmp_path/"0"/"epoch-001").exists()


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

def train(out, data, *before, wait=True):
    "spklip.train by a launcher."
    command = [sys.executable, "-m", *before, "-m", "spklip.train", "--preset", "smoke", "--data", str(data), "--out", str(out), "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True)
    return (*process.communicate(timeout=120), process.returncode) if wait else process


TORCHRUN = "torch.distributed.run", "--standalone", "--nproc_per_node", "2"
LAUNCH = "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"

@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return generate(preset_of("smoke").scenes, folder, progress=False)


@pytest.fixture(scope="module")
def unbroken(clips, tmp_path_factory):
    "A run of two processes by torchrun: where it is, what it said."
    out = tmp_path_factory.mktemp("run")/"two"
    said, errors, code = train(out, clips, *TORCHRUN)
    assert code == 0, errors
    return out, said

def losses(out): return [h["loss"] for h in json.loads((out/"model"/"history.json").read_text())]


PLAINLY = """
import sys
from dataclasses import replace
from spklip.train import fit, preset_of
smoke = preset_of("smoke")
model = replace(smoke.model, star_net=replace(smoke.model.star_net, dropout=0.), text=replace(smoke.model.text, dropout=0.))
fit(replace(smoke, train=replace(smoke.train, bf16=False), model=model), *sys.argv[1:], device="cpu", progress=False)
"""

def test_a_whole_run_is_that_of_one_process(clips, tmp_path, monkeypatch):
    "By accelerate's launcher, where no process draws dropout of its own, and without bf16's rounding."
    (tmp_path/"plainly.py").write_text(PLAINLY)
    monkeypatch.setattr(sys, "argv", ["plainly.py", str(clips), str(tmp_path/"one")])
    runpy.run_path(str(tmp_path/"plainly.py"))
    done = subprocess.run([sys.executable, "-m", *LAUNCH, tmp_path/"plainly.py", clips, tmp_path/"two"], env=ENVIRONMENT, capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path/"two") == pytest.approx(losses(tmp_path/"one"), rel=1e-4)


def test_torchrun(clips, unbroken, tmp_path):
    "One line an epoch, one model, as one process trains it but for dropout; done is done."
    two, said = unbroken
    assert said.count("epoch   1") == said.count("epoch   2") == said.count("model: ") == 1
    fit(preset_of("smoke"), clips, tmp_path/"alone", device="cpu", progress=False)
    assert losses(two) == pytest.approx(losses(tmp_path/"alone"), rel=.05)
    before = (two/"model"/"model.safetensors").stat().st_mtime_ns
    assert train(two, clips, *TORCHRUN)[2] == 0 and (two/"model"/"model.safetensors").stat().st_mtime_ns == before


def test_a_process_dies(clips, unbroken, tmp_path):
    "The others end within seconds and say why; the same command goes on from the epoch that is kept, and ends where an unbroken run does."
    process = train(tmp_path/"run", clips, *TORCHRUN, wait=False)
    while not (tmp_path/"run"/"epoch-001").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(.01)
    children = [int(p) for p in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    os.kill(children[-1], signal.SIGKILL)
    began = time.time()
    said, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and time.time() - began < 30
    assert "1 complete epochs are kept, and the same command goes on from there" in errors
    assert train(tmp_path/"run", clips, *TORCHRUN)[2] == 0
    run, whole = (load_file(f/"model"/"model.safetensors") for f in (tmp_path/"run", unbroken[0]))
    for name in whole: torch.testing.assert_close(run[name], whole[name], rtol=1e-5, atol=1e-6)
