"The spklip command: help, numbers, pictures, and errors of one line with exit code 2."
import argparse, json, os, shlex, subprocess, sys
from dataclasses import replace
from pathlib import Path
import numpy as np, pytest
from PIL import Image
from spklip.data import conversion, scenes, video
from spklip.data.datasets import SpikeDataset, read_metadata, write_metadata
from spklip.data.scenes import SpikeActions, generate
from spklip.data.streams import write_dat
from spklip import train
from spklip.lab import cli
from spklip.lab.notebooks import root
from spklip.stcl import SPKLIP, learn_wordpiece

COMMANDS = next(a for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction)).choices

@pytest.fixture
def dat(tmp_path, monkeypatch):
    "260 frames of 6 x 7: pixel 0 always fires, pixel 1 never, the others in every fifth frame."
    monkeypatch.chdir(tmp_path)
    spikes = np.zeros((260, 6, 7), np.uint8)
    spikes[::5] = 1; spikes[:, 0, 0] = 1; spikes[:, 0, 1] = 0
    write_dat("clip.dat", spikes)
    return "clip.dat"

def fails(capsys, *words, code=2):
    "Run, expect an exit code and one line on stderr; that line."
    try: got = cli.main(list(words))
    except SystemExit as end: got = end.code
    err = capsys.readouterr().err
    assert got == code and err.count("\n") == 1, err
    return err

@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_that_parses(name, capsys):
    with pytest.raises(SystemExit) as end: cli.main([name, "--help"])
    assert end.value.code == 0
    example = capsys.readouterr().out.split("example:\n")[1].strip()
    words = shlex.split(example)
    assert words[0] == "spklip" and cli.parser().parse_args(words[1:]).command == name

def test_choices_are_those_of_the_registries():
    "They are written out in `lab.cli`, since a help text should not wait for torch."
    from spklip.data.interpolation import METHODS
    from spklip.data.scenes import DOMAINS
    from spklip.train import presets
    choices = lambda command, option: tuple(next(a for a in command._actions if option in a.option_strings).choices)
    assert cli.PRESETS == tuple(presets())
    assert choices(COMMANDS["convert"], "--interpolate") == METHODS and choices(COMMANDS["data"], "--domain") == tuple(DOMAINS)

def test_all_commands_are_there():
    assert set(COMMANDS) == {"info", "view", "data", "convert", "slice", "train", "evaluate", "classify", "index", "search", "reproduce", "bench"}

def test_help_waits_for_nothing():
    code = "import sys; from spklip.lab.cli import parser; parser().format_help(); print({'torch', 'numpy', 'nbformat'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"

def test_info(dat, capsys):
    assert cli.main(["info", dat, "--height", "6", "--width", "7", "--rate", "1000"]) == 0
    out = capsys.readouterr().out
    rate = (52*40 + 260)/(260*42)
    for words in ("6 x 7 pixels, 260 frames", "260.0 ms", f"{rate:.4f}", "1 (2.4%) fire in every", "1 (2.4%) never fire"): assert words in out

def test_size_from_metadata_beside_the_file(dat, capsys):
    row = dict(file=dat, height=6, width=7, rate_hz=520, flip_rows=False, label="wave")
    open("metadata.jsonl", "w").write(json.dumps(row | {"file": "other.dat", "height": 1}) + "\n" + json.dumps(row) + "\n")
    assert cli.main(["info", dat]) == 0
    out = capsys.readouterr().out
    assert "500.0 ms" in out and "wave" in out

@pytest.mark.parametrize("what", ["spikes", "tfp", "tfi"])
def test_view_png(dat, what):
    assert cli.main(["view", dat, "--height", "6", "--width", "7", "--what", what, "--frame", "100", "--window", "25", "--out", "v.png"]) == 0
    image = np.asarray(Image.open("v.png"))
    assert image.shape == (6, 7) and image.dtype == np.uint8
    assert image[0, 0] == 255 and image[0, 1] == 0 # brightest and dark
    assert len(np.unique(image[1:])) == 1 # all others alike
    if what != "spikes": assert 40 <= image[3, 3] <= 70 # a fifth of the brightest

def test_view_flips_rows(dat):
    assert cli.main(["view", dat, "--height", "6", "--width", "7", "--flip-rows", "--frame", "100", "--scale", "2", "--out", "v.png"]) == 0
    image = np.asarray(Image.open("v.png"))
    assert image.shape == (12, 14) and image[-1, 0] == 255 and image[0, 2] < 255

def test_view_gif(dat):
    assert cli.main(["view", dat, "--height", "6", "--width", "7", "--what", "spikes", "--every", "3", "--fps", "10", "--out", "v.gif"]) == 0
    gif = Image.open("v.gif")
    assert gif.info["duration"] == 100 and gif.n_frames > 1

def test_a_gif_counts_in_hundredths_of_a_second(dat, capsys):
    assert cli.main(["view", dat, *SIZE, "--fps", "30", "--out", "v.gif"]) == 0
    assert Image.open("v.gif").info["duration"] == 30 and "33.3 a second" in capsys.readouterr().out
    assert "at most 50 pictures a second" in fails(capsys, "view", dat, *SIZE, "--fps", "60", "--out", "v.gif")

def test_a_gif_of_too_many_pictures(dat, monkeypatch, capsys):
    monkeypatch.setattr(cli, "MOST", 20*6*7)
    assert "26 pictures, at most 20 of this size fit; --every 13 or more" in fails(capsys, "view", dat, *SIZE, "--out", "v.gif")
    assert cli.main(["view", dat, *SIZE, "--every", "13", "--out", "v.gif"]) == 0 and Image.open("v.gif").info["duration"] == 50

def test_what_view_drew_is_no_evidence_of_the_rows(dat, capsys):
    assert cli.main(["view", dat, *SIZE, "--out", "clip.png"]) == 0 and cli.beside(Path("clip.dat")) is None
    Image.open("clip.png").save("clip.png")
    assert cli.beside(Path("clip.dat")).shape == (6, 7)
    whole = Path("clip.png").read_bytes()
    Path("clip.png").write_bytes(whole.replace(b"IDAT", b"\1\2\3\4"))
    assert cli.beside(Path("clip.dat")) is None # no picture, no evidence

def test_a_name_that_is_no_utf8_is_printed(dat, capsys):
    os.rename(dat, name := os.fsdecode(b"caf\xe9.dat"))
    assert cli.main(["info", name, *SIZE]) == 0 and "caf\\udce9.dat" in capsys.readouterr().out

SIZE = "--height", "6", "--width", "7"

@pytest.mark.parametrize("words, says", [
    (("info", "absent.dat"), "absent.dat"),
    (("info", "clip.dat"), "give --height and --width"),
    (("info", "clip.dat", "--height", "6", "--width", "9"), "bytes, expected"),
    (("info", "cut.dat", *SIZE), "1,559 bytes, expected 1,554 or 1,560"),
    (("info", "empty.dat", *SIZE), "0 bytes"),
    (("info", "clip.dat", "--height", "0", "--width", "7"), "'0' is no whole number of 1 or more"),
    (("view", "clip.dat", *SIZE, "--frame", "260"), "no frame 260, it has 0 to 259"),
    (("view", "clip.dat", *SIZE, "--scale", "100000"), "--scale 100000 makes 420,000,000,000 pixels of a picture, at most 100,000,000 fit"),
    (("view", "clip.dat", *SIZE, "--out", "v.jpg"), "a view is a .png or a .gif"),
    (("data", "check", "."), "metadata.jsonl"),
    (("data", "weizmann", "out", "--source", "absent.npz"), "--source absent.npz: no such file"),
    (("data", "weizmann", "out", "--source", "clip.dat"), "clip.dat: no .npz of silhouettes, or a broken one"),
    (("data", "spike-actions", "out", "--seed", "-1"), "'-1' is no whole number from 0 to 4,294,967,295"),
    (("train", "--seed", "99999999999999999999999"), "is no whole number from 0 to"),
    (("reproduce", "--only", "04_train", "--set", "name=a/b"), "--name a/b: part of files' names"),
    (("reproduce", "--name", "../a"), "--name ../a: part of files' names"),
    (("data", "arid", "out", "--source", "absent"), "--source absent: no such folder"),
    (("data", "spike-actions", "out", "--preset", "huge"), "invalid choice: 'huge'"),
    (("convert", "absent.avi", "--out", "made"), "absent.avi"),
    (("train", "--preset", "smoke", "--data", "nowhere"), "nowhere"),
    (("train", "--preset", "huge", "--data", "."), "invalid choice: 'huge'"),
    (("evaluate", "--data", ".", "--model", "nowhere"), "metadata.jsonl"),
    (("classify", "clip.dat", *SIZE, "--labels", "one"), "two sentences or more"),
    (("classify", "clip.dat", *SIZE, "--labels", "a,b", "--model", "nowhere"), "nowhere: no model here"),
    (("reproduce", "--data", "nowhere"), "nowhere"),
    (("reproduce", "--data", "data/{x}"), "{seed} is the only thing in braces that is known"),
    (("reproduce", "--data", "data/{seed:03d}"), "{seed} is the only thing in braces that is known"),
    (("data", "check", ".", "--height", "6", "--seed", "3"), "--height and --seed: for what is made, not for check"),
    (("view", "clip.dat", *SIZE, "--out", "folder.png"), "folder.png: is a folder, expected a file"),
    (("info", "clip.dat", *SIZE, "--rate", "-100"), "'-100' is no number of frames a second"),
    (("info", ".", *SIZE), ".: a folder, a recording is a file"),
    (("view", "clip.dat", *SIZE, "--frame", "5", "--out", "v.gif"), "--frame is for a .png"),
    (("view", "clip.dat", *SIZE, "--every", "5"), "--every and --fps are for a .gif"),
    (("data", "weizmann", "out", "--preset", "gpu", "--classes", "3"), "--preset and --classes: for spike-actions, not weizmann"),
    (("data", "spike-actions", "out", "--source", "s.npz"), "--source s.npz: for weizmann and arid, not spike-actions"),
    (("reproduce", "--preset", "huge"), "invalid choice: 'huge'"),
    (("reproduce", "--seeds", "0"), "'0' is no whole number of 1 or more"),
    (("frobnicate",), "invalid choice: 'frobnicate'"),
    ((), "required: COMMAND"),
], ids=lambda x: " ".join(x) if isinstance(x, tuple) else "")
def test_errors_are_one_line(dat, capsys, words, says):
    open("cut.dat", "wb").write(open(dat, "rb").read()[:-1]); open("empty.dat", "wb"); os.mkdir("folder.png")
    line = fails(capsys, *words)
    assert says in line and "Traceback" not in line and line.startswith("spklip")

def test_debug_shows_where(dat, monkeypatch):
    with pytest.raises(ValueError): cli.main(["info", dat, "--debug"])
    monkeypatch.setenv("SPKLIP_DEBUG", "1")
    with pytest.raises(ValueError): cli.main(["info", dat])

@pytest.mark.parametrize("error, code, says", [(KeyboardInterrupt, 130, "stopped"), (BrokenPipeError, 141, "stopped, since nobody reads what it prints")])
def test_stopped(dat, capsys, monkeypatch, error, code, says):
    "Only who keeps what was made says that it goes on."
    def stopped(*args): raise error
    for name in ("recording", "check", "asked"): monkeypatch.setattr(cli, name, stopped)
    assert cli.main(["index", "."]) == code and capsys.readouterr().err.strip() == f"spklip index: {says}; the same command goes on from here"
    for words in (["info", dat], ["data", "check", "."]): assert cli.main(words) == code and "goes on" not in capsys.readouterr().err

@pytest.mark.parametrize("asked, where, code, says", [("info", "/dev/full", 2, "no space left on device"), ("info", "pipe", 141, ""),
                                                      ("--help", "pipe", 0, "")])
def test_what_cannot_be_printed_is_no_success(dat, asked, where, code, says):
    "A full disk, a pipe whose reader left; both seen only when what was buffered is written. Help that nobody wants fails nobody."
    read, write = os.pipe() if where == "pipe" else (None, os.open(where, os.O_WRONLY))
    if read: os.close(read)
    done = subprocess.run([sys.executable, "-c", "import sys; from spklip.lab.cli import main; sys.exit(main())", asked,
                           *([dat, *SIZE] if asked == "info" else [])], stdout=write, stderr=subprocess.PIPE, text=True,
                          env=os.environ | {"PYTHONPATH": str(root())})
    os.close(write)
    assert done.returncode == code and says in done.stderr.lower() and "Exception ignored" not in done.stderr

def test_nobody_listens():
    "Standard output is closed before the command starts."
    code = "import sys; sys.stdout = None; from spklip.lab.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, "info", "none.dat", *SIZE], stderr=subprocess.PIPE, text=True,
                          env=os.environ | {"PYTHONPATH": str(root())})
    assert done.returncode == 2 and done.stderr == "spklip info: none.dat: no such file\n"

def test_a_picture_that_was_there_stays_where_a_view_is_stopped(dat, monkeypatch):
    Path("v.gif").write_bytes(b"of before")
    def stopped(self, file, **how): Path(file).write_bytes(b"half"); raise KeyboardInterrupt
    monkeypatch.setattr(Image.Image, "save", stopped)
    assert cli.main(["view", dat, *SIZE, "--out", "v.gif"]) == 130 and Path("v.gif").read_bytes() == b"of before"

def test_a_model_the_whole_way(tmp_path, monkeypatch, capsys):
    "data, train, evaluate, classify on a preset smaller than smoke; training again finds the model there."
    monkeypatch.chdir(tmp_path)
    smoke = train.preset_of("smoke")
    tiny = replace(smoke, scenes=replace(smoke.scenes, train=8, validation=4, test=4), train=replace(smoke.train, epochs=1, batch_size=4))
    monkeypatch.setattr(train, "preset_of", {"smoke": tiny}.get)
    assert cli.main("data spike-actions clips --preset smoke".split()) == 0
    assert cli.main("train --preset smoke --data clips --out run".split()) == 0
    capsys.readouterr()
    assert cli.main("train --preset smoke --data clips --out run".split()) == 0
    assert capsys.readouterr().out.strip() == "model: run/model"
    assert cli.main("evaluate --model run/model --data clips --device cpu".split()) == 0
    out = capsys.readouterr().out
    assert "top1" in out and "in_batch" in out
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for asked in ("evaluate --data clips", "index clips"): assert "torch finds no GPU" in fails(capsys, *f"{asked} --model run/model --device cuda".split())
    clip = next((tmp_path/"clips").rglob("*.dat")) # its size is in the metadata above it
    assert cli.main(["classify", str(clip), "--model", "run/model", "--labels", "a person walks, a person xyzzy"]) == 0
    assert capsys.readouterr().err.strip().endswith("not among the model's words: xyzzy")
    assert cli.main(["classify", str(clip), "--model", "run/model", "--labels", "a person walks, a person waves one hand"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and abs(sum(float(l.split("%")[0]) for l in lines) - 100) < 0.2

def test_a_model_of_other_clips_reads_clips_of_its_length(tmp_path, monkeypatch, capsys):
    "Three sub-blocks need 160 frames: a set and a recording of so many will do, and a longer recording is not cut to 250."
    monkeypatch.chdir(tmp_path)
    smoke = train.preset_of("smoke").model
    model = SPKLIP(replace(smoke, hsfe=replace(smoke.hsfe, n_blocks=3)), learn_wordpiece(["a person walks", "a person waves"], 256))
    model.save_pretrained("three")
    clips = generate(SpikeActions(classes=2, train=4, validation=4, test=4, segments=16), "clips", progress=False)
    assert cli.main("evaluate --model three --data clips".split()) == 0
    top1 = float(next(l for l in capsys.readouterr().out.splitlines() if l.startswith("top1")).split()[1])
    assert top1 == pytest.approx(train.evaluate(model, SpikeDataset(clips, "test", 16)).top(1), abs=1e-3)
    recording = next(clips.rglob("*.dat"))
    assert cli.main(["classify", str(recording), "--model", "three", "--labels", "a person walks, a person waves"]) == 0
    monkeypatch.setattr(cli, "recording", lambda args: Short(recording))
    capsys.readouterr()
    assert "150 frames, a clip needs 160" in fails(capsys, "classify", str(recording), "--model", "three", "--labels", "a, b")

class Short: # a recording of 150 frames
    def __init__(self, path): self.path, self.height, self.width, self.rate_hz = path, 32, 40, None
    def __len__(self): return 150

def test_a_preset_s_data_take_the_seed_and_no_sizes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(scenes, "generate", lambda config, *more, **how: seen.append(config)); monkeypatch.setattr(cli, "check", lambda folder: None)
    for words in ("--preset smoke --seed 1", "--seed 2", "--classes 3 --seed 3"): assert not cli.main(f"data spike-actions out {words}".split())
    assert seen == [replace(train.preset_of("smoke").scenes, seed=1), replace(train.preset_of("laptop").scenes, seed=2), SpikeActions(classes=3, seed=3)]
    assert "--preset gpu has sizes of its own: leave it out, or --height" in fails(capsys, *"data spike-actions out --preset gpu --height 120".split())

def test_clips_that_failed_are_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(conversion, "convert", lambda *how: [dict(file="a.avi", reason="a.avi: cannot be read")])
    monkeypatch.setattr(cli, "check", lambda folder: None)
    (tmp_path/"s.npz").touch()
    for clips, says, code in ((["a", "b"], "1 of 2 clips failed: a.avi: cannot be read", 1), (["a"], "spklip data: a.avi: cannot be read", 2)):
        monkeypatch.setattr(video, "weizmann", lambda source, seed: clips)
        assert says in fails(capsys, "data", "weizmann", str(tmp_path/"out"), "--source", str(tmp_path/"s.npz"), code=code)

def test_real_video_is_not_mixed_with_other_recordings(tmp_path, monkeypatch, capsys):
    row = dict(file="walk.dat", height=6, width=7, frames=250, rate_hz=20000, flip_rows=True, label="walk", prompt="a", caption="a", group="anna",
               split="train", source="", made_by="")
    write_metadata(tmp_path/"out", [row])
    (tmp_path/"s.npz").touch(); monkeypatch.setattr(video, "weizmann", lambda source, seed: [])
    assert "holds 1 other recordings" in fails(capsys, "data", "weizmann", str(tmp_path/"out"), "--source", str(tmp_path/"s.npz"))
    assert len(read_metadata(tmp_path/"out")) == 1

def test_a_start_is_looked_for_at_once_and_from_here(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "mine: no model here" in fails(capsys, "reproduce", "--start", "mine")
    for place in ("mine", "run/model"): (tmp_path/place).mkdir(parents=True); (tmp_path/place/"model.safetensors").touch()
    assert "run: no model here; there is one in run/model" in fails(capsys, "reproduce", "--start", "run")
    assert "run: no model here; there is one in run/model" in fails(capsys, "train", "--data", "run", "--start", "run", "--out", "new")
    assert not Path("new").exists()
    assert "give them a --name" in fails(capsys, "reproduce", "--start", "mine") # or the main results would be lost
    values, _ = cli.on_own_data(cli.parser().parse_args(["reproduce", "--start", "mine", "--name", "trial"]))
    assert values == {"start": str(tmp_path/"mine"), "name": "trial"}
    values, _ = cli.on_own_data(cli.parser().parse_args(["reproduce", "--start", str(root()/"outputs"/"laptop"/"model"), "--name", "trial"]))
    assert values == {"start": "outputs/laptop/model", "name": "trial"} # as tables name it, on any machine
    assert cli.on_own_data(cli.parser().parse_args(["reproduce", "--name", "trial"])) == ({"name": "trial"}, "trial")

def test_data_here_have_the_name_of_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("spklip.data.datasets.read_metadata", lambda folder: [])
    (tmp_path/"mine").mkdir(); monkeypatch.chdir(tmp_path/"mine")
    assert cli.on_own_data(cli.parser().parse_args(["reproduce", "--data", "."]))[1] == "mine"

def test_what_is_no_benchmark_is_not_waited_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("spklip.bench.bench", lambda *how: pytest.fail("timed first"))
    for text in (b"x,y\n1,2\n", b"one line\n| a, table, of another, kind |\n", b"", b"\xff\x00\x81"):
        (tmp_path/"a.csv").write_bytes(text)
        assert "a.csv: no table of `spklip bench`" in fails(capsys, "bench", "--against", str(tmp_path/"a.csv"))
