"A long recording, window by window: the same as clip by clip, in memory that does not grow with it."
import csv, re
from pathlib import Path

import numpy as np
import pytest
import torch

from spklip.camera import pack
from spklip.data.streams import SpikeStream, StreamError, clip_index, write_dat
from spklip.lab.cli import main
from spklip.retrieval import classify_stream
from spklip.stcl import SPKLIP, learn_wordpiece
from spklip.train import preset_of

LABELS = ["a person waves", "someone walks", "a person sits"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return SPKLIP(preset_of("smoke").model, learn_wordpiece(LABELS)).eval()

@pytest.fixture
def recording(tmp_path):
    write_dat(tmp_path/"a.dat", (np.random.default_rng(0).random((1000, 32, 40)) < .06).astype(np.uint8))
    return tmp_path/"a.dat"


def test_windows(model, recording):
    "Each window is answered as the clip that is cut out of it; the last ends where the recording does, whatever the batch."
    stream = SpikeStream(recording, 32, 40)
    found = list(classify_stream(model, stream, LABELS, window=300, hop=150, batch=3))
    assert [start for start, _ in found] == [0, 150, 300, 450, 600, 700]
    for start, p in found:
        clip = torch.from_numpy(stream.packed(start + clip_index(300)))
        torch.testing.assert_close(p, model.classify(clip[None], LABELS)[0], rtol=1e-4, atol=1e-5)
    assert len(list(classify_stream(model, stream, LABELS, window=1000))) == 1


def test_bad_input(model, recording):
    "A recording too short, of another size, a window too small: a line that says what was expected."
    stream = SpikeStream(recording, 32, 40)
    with pytest.raises(ValueError, match="1,000 frames, a window has 2,000"): next(classify_stream(model, stream, LABELS, 2000))
    with pytest.raises(ValueError, match="at least 250"): next(classify_stream(model, stream, LABELS, 249))
    with pytest.raises(ValueError, match="16 x 80 pixels, the model reads 32 x 40"): next(classify_stream(model, SpikeStream(recording, 16, 80), LABELS, 500))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads what Linux says of memory")
def test_memory(model, tmp_path):
    "A recording of 1.6 GB: what the process owns grows by less than 50 MB."
    with open(tmp_path/"long.dat", "wb") as f: f.truncate(160*10_000_000)
    owns = lambda: int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])/1024
    found = classify_stream(model, SpikeStream(tmp_path/"long.dat", 32, 40), LABELS, hop=50_000)
    next(found); before = owns()
    assert sum(1 for _ in found) == -(-(10_000_000 - 3000)//50_000) and owns() - before < 50


def test_command(model, recording, tmp_path, capsys):
    "Changes of answer on the screen, every window in the table or the picture; options of a stream want --stream."
    home = str(model.save_pretrained(tmp_path/"model"))
    words = ["classify", str(recording), "--height", "32", "--width", "40", "--labels", ",".join(LABELS), "--model", home]
    assert main([*words, "--stream", "--window", "300", "--rate", "1000", "--out", str(tmp_path/"a.csv")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert re.match(r" +0\.000 s +\d+\.\d% +(a person|someone)", said[0]) and "1.000 s  the end: 6 windows of 300 frames" in said[-1]
    header, *rows = csv.reader(open(tmp_path/"a.csv"))
    assert header == ["frame", *LABELS] and [r[0] for r in rows] == ["0", "150", "300", "450", "600", "700"]
    assert all(abs(sum(map(float, r[1:])) - 1) < 1e-3 for r in rows)
    assert main([*words, "--stream", "--window", "300", "--out", str(tmp_path/"a.png")]) == 0 and (tmp_path/"a.png").stat().st_size > 1000
    assert main([*words, "--hop", "10"]) == 2 and "are for --stream" in capsys.readouterr().err
    assert main([*words, "--stream", "--window", "5000"]) == 2 and "1,000 frames, a window has 5,000" in capsys.readouterr().err
    write_dat(tmp_path/"short.dat", np.zeros((200, 32, 40), np.uint8))
    assert main(["classify", str(tmp_path/"short.dat"), *words[2:], "--stream"]) == 2 and "200 frames, a clip needs 250" in capsys.readouterr().err
    assert main([*words, "--stream", "--out", "a.txt"]) == 2 and "a.txt: a .csv of every window, or a .png" in capsys.readouterr().err
