"A benchmark is believed only where both sides give the same, and a slower one is called slower."
import json

import numpy as np
import pandas as pd
import pytest
import torch

from spklip.camera import tfi
from spklip.bench import CASES, ON_CPU, Case, apart, bench, by_frames, by_running_extremes, by_spikezoo, changes, machine_rates, measured, write_bench
from spklip.lab.cli import main

RATES = dict(copy=1e9, float32=1e9, bfloat16=1e9)


def case(ours, reference, **more):
    return Case("nothing", ours, reference, "plainly", 10, "times", runs=3, **more)


def test_measured(monkeypatch):
    "Times, ratio, shares of the machine; both in turns and as often."
    calls, takes = [], {"slow": .02, "slower": .05, "other": .03}
    def slow(): calls.append("slow"); return torch.ones(3)
    def slower(): calls.append("slower"); return np.ones(3)
    def other(): calls.append("other")
    def seconds(call, device): call(); return takes[calls[-1]] + .001*(len(calls) % 2) # a clock that nothing else on the machine slows
    monkeypatch.setattr("spklip.bench.seconds", seconds)
    ours, reference, peer = measured("x", case(slow, slower, bytes=1e6, operations=2e6, peers={"other": other}), RATES, most=5)
    assert calls[4:19] == ["slow", "slower", "other"]*5 # after one of each, and one more of ours
    assert (ours["who"], reference["who"], peer["who"]) == ("spklip", "reference", "other") and ours["ratio"] == 1 and ours["runs"] == 5
    assert 20 <= ours["lower"] <= ours["ms"] <= ours["upper"] <= 21 and reference["ratio"] == pytest.approx(2.5,
        rel=.05) and peer["ratio"] == pytest.approx(1.5, rel=.05)
    assert ours["of_copy"] == pytest.approx(1e6/(ours["ms"]/1e3)/1e9) and ours["of_matrix"] == pytest.approx(2*ours["of_copy"])
    assert ours["per_second"] == pytest.approx(1e4/ours["ms"]) and reference["apart"] == 0


def test_different_results_are_no_case():
    "Another value, another shape, a tuple's second part: refused with the distance."
    assert apart((torch.ones(2), np.zeros(2)), (torch.ones(2), np.full(2, .5))) == .5 and apart(torch.ones(2), torch.ones(3)) == float("inf")
    with pytest.raises(ValueError, match="x: ours and the reference are 1 apart, 0.5 at most"):
        measured("x", case(lambda: torch.ones(2), lambda: torch.zeros(2), close=.5), RATES)
    a, nothing = torch.ones(2), torch.full((2,), float("nan"))
    assert np.isnan(apart((a, a), (a, nothing))) and np.isnan(apart((a, a), (nothing, a)))
    with pytest.raises(ValueError, match="nan"): measured("x", case(lambda: torch.tensor(float("nan")), lambda: torch.ones(())), RATES)


def rows(ms, spread=1.02):
    return [dict(case="decode", what="it", who="spklip", ms=ms, lower=ms/spread, upper=ms*spread, ratio=1.),
            dict(case="decode", what="it", who="reference", ms=100., lower=100/spread, upper=100*spread, ratio=100/ms)]


def test_changes():
    "Beyond the spread of half of the runs is slower; within it, on another size, or a case that is new, nothing is said to be."
    then = pd.DataFrame(rows(10))
    assert changes(rows(20), then)[0].endswith("5.00 now: slower") and changes(rows(5), then)[0].endswith("faster")
    assert changes(rows(10.2), then)[0].endswith("as before") and changes(rows(20, spread=2), then)[0].endswith("as before")
    assert not changes([r | dict(what="another size") for r in rows(20)], then) and not changes([r | dict(case="new") for r in rows(20)], then)


def test_references():
    "A pixel under constant light fires every fifth frame; between two spikes five apart TFI is a fifth, as ours."
    spikes = by_frames(np.ones((12, 1, 1), np.float32))
    assert spikes[:, 0, 0].nonzero()[0].tolist() == [4, 9] and by_running_extremes(spikes)[4:9].ravel().tolist() == [np.float32(.2)]*5
    some = (np.random.default_rng(0).random((90, 4, 5)) < .1).astype(np.uint8)
    for most in (3, 64): assert (by_running_extremes(some, most) == tfi(some, max_window=most)).all()


def test_a_machine_that_only_stores_bfloat16_is_not_timed_in_it(monkeypatch):
    "There a product in it takes minutes."
    for there in (True, False):
        monkeypatch.setattr("spklip.bench.has_bf16", lambda device: there)
        rates = machine_rates(size=64, runs=1)
        assert list(rates) == ["copy", "float32"] + ["bfloat16"]*there and min(rates.values()) > 0


def test_command(tmp_path, capsys):
    "Table, picture, machine; compared with itself; a wrong name and a missing table are one line."
    assert all(any(name.startswith(o) for name in CASES) for o in ON_CPU)
    assert main(["bench", "--small", "--only", "decode", "sim", "--out", str(tmp_path)]) == 0
    table, said = pd.read_csv(tmp_path/"bench.csv"), json.loads((tmp_path/"bench.json").read_text())
    assert set(table.case) == {"decode", "simulate"} and {"spklip", "reference"} <= set(table.who) and said["rates"]["copy"] > 1e8 and said["packages"]["torch"]
    assert (tmp_path/"bench.png").stat().st_size > 1000 and (tmp_path/"bench.md").read_text().count("\n") == 4
    capsys.readouterr()
    assert main(["bench", "--small", "--only", "decode", "--against", str(tmp_path/"bench.csv"), "--out", str(tmp_path/"again")]) == 0
    assert "decode: " in capsys.readouterr().out
    assert main(["bench", "--only", "nothing"]) == 2 and "no case begins with 'nothing'; there are: decode; windows" in capsys.readouterr().err
    assert main(["bench", "--against", str(tmp_path/"none.csv")]) == 2 and "no such file" in capsys.readouterr().err


def test_what_fails_takes_no_other_with_it(tmp_path, capsys, monkeypatch):
    "A peer that ends in an error is left out and named; a case that does is named, and the others' table is written."
    def broken(*_): raise RuntimeError("no kernel image")
    assert [r["who"] for r in measured("x", case(lambda: torch.ones(2), lambda: torch.ones(2), peers={"other": broken}), RATES)] == ["spklip", "reference"]
    assert "x: without other, which ends in RuntimeError: no kernel image" in capsys.readouterr().out
    monkeypatch.setitem(CASES, "simulate", broken)
    assert main(["bench", "--small", "--only", "decode", "sim", "--out", str(tmp_path)]) == 2
    assert "what failed has no rows: simulate" in capsys.readouterr().err and set(pd.read_csv(tmp_path/"bench.csv").case) == {"decode"}


def test_a_peer_is_timed_where_it_is_installed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path/"spikezoo"/"utils").mkdir(parents=True)
    (tmp_path/"spikezoo"/"__init__.py").write_text("raise ImportError('a dozen others')")
    (tmp_path/"spikezoo"/"utils"/"spike_utils.py").write_text("def load_vidar_dat(*args): return args")
    assert by_spikezoo(tmp_path/"a.dat", 3, 4)["spikezoo"]() == (str(tmp_path/"a.dat"), 3, 4)
    (tmp_path/"spikezoo"/"utils"/"spike_utils.py").write_text("import none_such")
    assert by_spikezoo(tmp_path/"a.dat", 3, 4) == {}
