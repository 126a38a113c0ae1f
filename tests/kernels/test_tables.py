"""Tables of measured times: what is written is read, what is damaged is reported and ignored, the user's come first."""

from __future__ import annotations

import json

import pytest

from qhub.errors import KernelError
from qhub.kernels import dispatch
from qhub.kernels.hardware import Card
from qhub.kernels.signature import signature
from qhub.kernels.tables import Entry, Shape, Table, shipped_file, user_file
from qhub.layouts import Activation, Affine, Float8, Grid, Lookup, Nested
from qhub.layouts.tiled import Tiled
from qhub.layouts.transforms import Transform

CARD = Card("Some GPU 80GB", 3e12, {"half": 7e14, "byte": 1.4e15, "vector": 5e13}, measured=True)


def table() -> Table:
    made = Table(CARD)
    made.put("affine bits=4", Shape(64, 128, "bfloat16"), "fast:2", {1: Entry(6.5e-6), 16: Entry(7.25e-6, "wide")})
    made.put("affine bits=4", Shape(64, 128, "bfloat16"), "slow:1", {1: Entry(9e-6)})
    made.put("lookup", Shape(32, 32, "float16"), "fast:2", {4: Entry(1e-3)})
    made.configs["fast:2"] = {"wide": {"columns": 128, "warps": 8}}
    made.packages["fast:2"] = {"triton": "3.6.0"}
    return made


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "a" / "b.json"
    table().write(path)
    again = Table.read(path)
    assert again.times == table().times and again.card == CARD and again.card.rates == CARD.rates
    assert again.configs["fast:2"] == table().configs["fast:2"] and again.packages["fast:2"] == {"triton": "3.6.0"}
    assert [file.name for file in path.parent.iterdir()] == ["b.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "b.json"
    table().write(path)
    before = path.read_bytes()
    monkeypatch.setattr("os.fdopen", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        Table(CARD).write(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def damage(change):
    data = json.loads(table().to_json())
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        table().to_json()[:-30],
        damage(lambda data: data.update(format=99)),
        damage(lambda data: data.update(rows=[0, 1, 2])),
        damage(lambda data: data["card"].update(bandwidth=-1)),
        damage(lambda data: data["card"].update(rates={})),
        damage(
            lambda data: data["times"]["lookup"].update({"32 by 32": {}}) or data["times"]["lookup"].update({"x": 1})
        ),
        damage(lambda data: data["times"]["lookup"]["32x32 float16"].update({"fast:2": [1.0]})),
        damage(lambda data: data["times"]["lookup"]["32x32 float16"].update({"fast:2": [1.0, "x", None]})),
        damage(lambda data: data["times"]["lookup"]["32x32 float16"].update({"fast:2": [None, [1.0, "none"], None]})),
        damage(lambda data: data["times"]["lookup"]["32x32 float16"].update({"other:1": [None, None, None]})),
        "[" * 100_000,
    ],
)
def test_a_damaged_file_is_reported_and_ignored(cache, text):
    path = user_file("Some GPU 80GB")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(KernelError, match="measure again|this qhub reads"):
        Table.read(path)
    with pytest.warns(RuntimeWarning, match="left out"):
        assert dispatch.tables("Some GPU 80GB") == (None, None)


def test_files_lie_where_the_user_says(cache):
    table().write(user_file("Some GPU 80GB"))
    assert user_file("Some GPU 80GB") == cache / "kernels" / "some-gpu-80gb.json"
    own, shipped = dispatch.tables("Some GPU 80GB")
    assert own is not None and shipped is None


def test_shipped_tables_can_be_read():
    for path in shipped_file("any").parent.glob("*.json"):
        read = Table.read(path)
        assert read.times and shipped_file(read.card.name) == path


def test_one_signature_for_tiles_whose_scales_are_short_and_long():
    layout = Lookup(out_features=64, in_features=64, grid=Grid.along_k(64))
    short, long = (Tiled(out_features=64, in_features=64, of=layout, narrow=narrow) for narrow in (True, False))
    assert short != long and signature(short) == signature(long)


def test_signatures_tell_layouts_apart_and_sizes_not():
    size = dict(out_features=64, in_features=128)
    layouts = [
        Affine(**size, bits=4, grid=Grid.along_k(32)),
        Affine(**size, bits=4, grid=Grid.along_k(64)),
        Affine(**size, bits=3, grid=Grid.along_k(32)),
        Affine(**size, bits=4, grid=Grid.along_k(32), zero="value"),
        Affine(**size, bits=4, grid=Grid.along_k(32), zero_point=8.0),
        Affine(**size, bits=4, grid=Grid.along_k(32), scales_nested=Nested()),
        Affine(**size, bits=4, grid=Grid.along_k(32), scales_nested=Nested(group=64)),
        Affine(**size, bits=4, grid=Grid.along_k(32), transforms=(Transform("permute", "in"),)),
        Affine(**size, bits=4, grid=Grid.along_k(32), activation=Activation("int8")),
        Affine(**size, bits=4, grid=Grid("flat", 1, 32)),
        Lookup(**size, bits=4, grid=Grid.along_k(32)),
        Float8(**size, grid=Grid.along_k(32)),
    ]
    said = [signature(layout) for layout in layouts]
    assert len(set(said)) == len(said)
    assert all("64x" not in text and "128" not in text for text in said)
    assert signature(Affine(out_features=8, in_features=96, bits=4, grid=Grid.along_k(32))) == said[0]
    # One scale a row, whatever its length.
    rows = [Affine(out_features=n, in_features=k, bits=8, grid=Grid("block", 1, k)) for n, k in ((4, 32), (8, 64))]
    assert signature(rows[0]) == signature(rows[1]) == "affine bits=8 grid=block(1,K)"
