"""``qhub list``: what metadata says, what plugins say, what is broken."""

from __future__ import annotations

import json

MARKED = "import pathlib; pathlib.Path(__file__).with_name('imported').touch()\n"


def by_name(rows):
    return {row["name"]: row for row in rows}


def test_listing_imports_no_plugin(process, install):
    entries = "[qhub.plugins]\nshiny = marked\n[qhub.kernels]\nfast = marked\n"
    site = install("marked-plugin", {"marked.py": MARKED}, entries)
    done = process("list", "--json", site=site)
    assert done.returncode == 0 and done.stderr == ""
    data = json.loads(done.stdout)
    expected = {"package": "marked-plugin", "version": "1.2", "summary": "About marked-plugin", "clash": []}
    assert by_name(data["methods"])["shiny"] == {"name": "shiny", **expected}
    assert by_name(data["kernels"])["fast"] == {"name": "fast", "failure": None, **expected}
    assert not (site / "imported").exists()
    shown = process("list", site=site).stdout
    assert "shiny" in shown and "About marked-plugin" in shown


def test_abilities_of_a_method(as_json, run):
    row = by_name(as_json("list", "--abilities")["methods"])["pow2"]
    assert (row["quantizes"], row["loads"], row["served"], row["failure"]) == (True, True, "the plugin", None)
    shown = run("list", "-a").stdout
    assert "quantize, load" in shown


def test_abilities_say_what_is_taken_over_and_what_is_handed_back(as_json, install, monkeypatch):
    plugin = (
        "from qhub import ConfigSpec, hookimpl\n"
        "@hookimpl\n"
        "def qhub_config():\n"
        "    return ConfigSpec(cls='transformers:QuarkConfig', presets={'usual': {}, 'other': {}})\n"
        "@hookimpl\n"
        "def qhub_format(config): ...\n"
    )
    # A method of transformers' own that no plugin of this repository serves.
    install("qhub-quark", {"quark_plugin.py": plugin}, "[qhub.plugins]\nquark = quark_plugin\n")
    monkeypatch.setenv("QHUB_NATIVE", "quark")
    assert by_name(as_json("list", "-a")["methods"])["quark"]["served"] == "transformers"
    monkeypatch.delenv("QHUB_NATIVE")
    row = by_name(as_json("list", "-a")["methods"])["quark"]
    assert (row["quantizes"], row["loads"]) == (False, True)
    assert row["presets"] == ["usual", "other"]
    assert row["served"] == "the plugin, in transformers' place"


def test_broken_clashing_and_disabled_plugins_are_named(as_json, run, install, monkeypatch):
    install("first", {"good.py": ""}, "[qhub.plugins]\nboth = good\n")
    install("second", {}, "[qhub.plugins]\nboth = good\n")
    install("third", {"bad.py": "1/0"}, "[qhub.plugins]\nbad = bad\n[qhub.kernels]\nbadk = bad\n")
    monkeypatch.setenv("QHUB_DISABLE", "pow2")
    data = as_json("list", "-a", code=1)
    methods = by_name(data["methods"])
    assert "ZeroDivisionError" in methods["bad"]["failure"] and "third" in methods["bad"]["failure"]
    assert sorted([methods["both"]["package"], *methods["both"]["clash"]]) == ["first", "second"]
    assert "ZeroDivisionError" in by_name(data["kernels"])["badk"]["failure"]
    assert data["disabled"] == ["pow2"] and "pow2" not in methods
    shown = run("list")
    assert shown.exit_code == 1 and "both cannot be used: it is announced by" in shown.stdout
    assert "turned off by QHUB_DISABLE: pow2" in shown.stdout
