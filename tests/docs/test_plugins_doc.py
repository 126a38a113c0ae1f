"""docs/plugins.md: its code runs, its example is the example, and its hook reference is the hook spec."""

from __future__ import annotations

import contextlib
import inspect
import io
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import qhub.layouts
from qhub.hookspecs import QuantizerPlugin
from qhub.kernels import dispatch
from qhub.registry import KERNEL_GROUP, registry

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "plugins.md"
EXAMPLE = ROOT / "examples" / "third_party_plugin"

BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>[^>]+?) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    """Is a fenced block and the mark in the comment above it."""

    mark: str
    language: str
    text: str


@pytest.fixture(scope="module")
def text() -> str:
    return DOCUMENT.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def blocks(text: str) -> list[Block]:
    return [Block(m["mark"] or "", m["language"], m["text"]) for m in BLOCK.finditer(text)]


def lines(source: str) -> list[str]:
    return [line.rstrip() for line in source.splitlines() if line.strip()]


def test_every_block_is_checked_by_something(blocks):
    """Code that no test looks at goes stale; only shell commands go unmarked."""
    assert len(blocks) > 15
    for block in blocks:
        kinds = {"run", "tests", "prints"} if not block.mark.startswith("example: ") else {block.mark}
        assert block.mark in kinds or block.language == "bash", f"an unmarked {block.language} block: {block.text[:80]}"


@pytest.mark.parametrize("name", ["pyproject.toml", "pow2_quant/__init__.py"])
def test_example_is_the_example(name, blocks):
    """The pieces of the tutorial, one after the other, are the file in examples/, blank lines aside."""
    pieces = [block.text for block in blocks if block.mark == f"example: {name}"]
    assert lines("\n".join(pieces)) == lines((EXAMPLE / name).read_text())


def test_code_runs_and_prints_what_it_says(blocks, pow2, tmp_path, monkeypatch):
    """The blocks run one after the other in one namespace, as a reader's session."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("QHUB_KERNEL", raising=False)
    namespace: dict[str, object] = {"__name__": "doc"}
    printed, ran, compared = "", 0, 0
    try:
        for block in blocks:
            if block.mark == "run":
                out = io.StringIO()
                with contextlib.redirect_stdout(out):
                    exec(compile(block.text, str(DOCUMENT), "exec"), namespace)
                printed, ran = out.getvalue(), ran + 1
            elif block.mark == "prints":
                assert lines(printed) == lines(block.text)
                compared += 1
    finally:
        registry.unregister("pow2-kernels", KERNEL_GROUP)
        sys.modules.pop("pow2_kernels", None)
        dispatch.forget()
    assert ran >= 6
    assert compared >= 4


def test_kernel_of_the_page_is_right(blocks, pow2, tmp_path, monkeypatch):
    """The dispatcher would refuse a wrong one; this says how near it is."""
    import torch

    from qhub.kernels import reference
    from qhub.layouts import Grid, Lookup

    (source,) = [block.text for block in blocks if "def by_group" in block.text]
    namespace: dict[str, object] = {}
    exec(source, namespace)
    layout = Lookup(out_features=24, in_features=64, grid=Grid.along_k(16))
    generator = torch.Generator().manual_seed(0)
    parts = {
        "qweight": torch.randint(0, 256, (24, 32), dtype=torch.uint8, generator=generator),
        "table": torch.randn(16, generator=generator),
        "scales": torch.rand(24, 4, generator=generator),
    }
    x, bias = torch.randn(5, 64, generator=generator), torch.randn(24, generator=generator)
    found = namespace["by_group"](x, layout, parts, bias)
    torch.testing.assert_close(found, reference.linear(x, layout, parts, bias), rtol=1e-5, atol=1e-5)


def test_conformance_class_of_the_page_is_collected(blocks, tmp_path):
    """pytest finds the tests of the kit in the block, one set per config."""
    (source,) = [block.text for block in blocks if block.mark == "tests"]
    (tmp_path / "test_conformance.py").write_text(source)
    collect = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(collect, capture_output=True, text=True, cwd=tmp_path, check=True)
    found = [line for line in done.stdout.splitlines() if "::TestPow2::" in line]
    assert len({line.partition("[")[0] for line in found}) >= 40
    for group_size in (32, 64):
        assert any(f"[group_size={group_size}/qwen3_moe]" in line for line in found)


def signature(name: str) -> str:
    """Return the hook's signature as the page writes it: without self, and without the quotes of annotations."""
    declared = inspect.signature(getattr(QuantizerPlugin, name))
    own = [parameter for parameter in declared.parameters.values() if parameter.name != "self"]
    return f"{name}{declared.replace(parameters=own)}".replace("'", "")


def test_hook_reference_is_the_spec(text):
    """Each hook has a heading with its exact signature, in the order of the spec, and there are no others."""
    hooks = [name for name in vars(QuantizerPlugin) if name.startswith("qhub_")]
    assert len(hooks) >= 8
    reference = text.partition("\n## Hook reference\n")[2]
    assert re.findall(r"^### `(.+)`$", reference, re.MULTILINE) == [signature(name) for name in hooks]


def test_kinds_of_calls_agree_with_the_spec(text):
    """What the page calls addressed gives one answer (firstresult), what it calls broadcast is asked of all."""
    reference = text.partition("\n## Hook reference\n")[2]
    for name, body in re.findall(r"^### `(\w+)\(.*\n\n(.+)$", reference, re.MULTILINE):
        opts = getattr(QuantizerPlugin, name).qhub_spec
        assert body.startswith("Addressed" if opts["firstresult"] else "Broadcast"), name


def test_every_layout_is_in_the_table(text):
    classes = [
        one for one in vars(qhub.layouts).values() if inspect.isclass(one) and issubclass(one, qhub.layouts.Layout)
    ]
    concrete = [one.__name__ for one in classes if not inspect.isabstract(one)]
    table = text.partition("\n## Layouts\n")[2].partition("\n## ")[0]
    assert sorted(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == sorted(concrete)


def test_contents_and_links(text):
    """The numbered contents name every section, and links inside the page arrive."""
    sections = re.findall(r"^## (.+)$", text, re.MULTILINE)
    contents = re.findall(r"^\d+\. \[(.+)\]\(#(.+)\)$", text, re.MULTILINE)
    assert [title for title, _ in contents] == sections
    anchors = {title.lower().replace(" ", "-") for title in sections}
    assert set(re.findall(r"\]\(#([\w-]+)\)", text)) <= anchors
