"""Products with vectors picked by codes on a GPU, in every way that they are computed: against float64."""

from __future__ import annotations

import pytest
import torch

from qhub.layouts import Codebook, Grid

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

linear = pytest.importorskip("qhub_triton.codebook.linear")

# Of what cuBLAS loses by rounding the weight and its output, both to the input's dtype: the aim.
_AIM = 1.2


def additive(n: int, k: int, nbits: tuple[int, ...]) -> Codebook:
    return Codebook(out_features=n, in_features=k, nbits=nbits, out_group=1, in_group=8, grid=Grid("block", 1, k))


def lattice(n: int, k: int, name: str) -> Codebook:
    quip = pytest.importorskip("qhub_quip.lattices")
    factor_of = pytest.importorskip("qhub_quip.hadamard").factor_of
    return quip.lattice_layout(name, n, k, None, (factor_of(n, "output"), factor_of(k, "input")), True)


def parts_of(layout: Codebook, book: str | None = None) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    parts = {}
    for name, spec in layout.part_specs().items():
        if name == "codes":
            codes = [torch.randint(0, 2**bits, spec.shape[:2], device="cuda") for bits in layout.nbits]
            parts[name] = layout.stored_codes(torch.stack(codes, dim=-1))
        elif name == "codebooks" and book is not None:
            parts[name] = pytest.importorskip("qhub_quip.lattices").code_tables(book).cuda()
        elif name.endswith("hadamard"):
            parts[name] = pytest.importorskip("qhub_quip.hadamard").hadamard_matrix(spec.shape[0]).cuda()
        elif name == "codebooks":
            parts[name] = torch.randn(spec.shape, device="cuda").half()
        else:
            parts[name] = (0.5 + torch.rand(spec.shape, device="cuda")).to(spec.dtypes[0])
    layout.validate(parts)
    return parts


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


CASES = {
    "2x8": (additive(1024, 2048, (8, 8)), None),
    "2x8 odd": (additive(1001, 2056, (8, 8)), None),
    "2x8 short": (additive(520, 8, (8, 8)), None),
    "2x8 long": (additive(512, 14336, (8, 8)), None),
    "1x8": (additive(500, 1032, (8,)), None),
    "4x8": (additive(512, 1024, (8,) * 4), None),
    "3x8": (additive(260, 520, (8,) * 3), None),
    "1x16": (additive(512, 1024, (16,)), None),
    "2x12": (additive(512, 1032, (12, 12)), None),
    "E8P": ((1024, 2048), "E8P12"),
    "E8P 28": ((1024, 3584), "E8P12"),
    "E8P long": ((1024, 28672), "E8P12"),
    "E8P 4 bits": ((512, 1024), "E8P12RVQ4B"),
    "E8P 3 bits": ((512, 1024), "E8P12RVQ3B"),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_error_is_that_of_a_dense_product(case: str, dtype: torch.dtype) -> None:
    layout, book = CASES[case]
    if book is not None:
        layout = lattice(*layout, book)
    parts = parts_of(layout, book)
    weight = layout.dequantize(parts).double()
    rounded = weight.to(dtype)
    product = linear.bind(layout, parts, dtype)
    for m in (1, 2, 5, 8, 9, 16, 17, 130):
        x = torch.randn(m, layout.in_features, device="cuda").to(dtype)
        bias = torch.randn(layout.out_features, device="cuda").to(dtype)
        wanted = x.double() @ weight.T + bias.double()
        usual = relative(torch.nn.functional.linear(x, rounded, bias), wanted)
        # Many rows under rotations: inputs, the sum of two vectors and outputs are rounded to float16, one more than
        # a dense product rounds.
        aim = 1.4 if m > 16 and book is not None and dtype == torch.float16 else _AIM
        assert relative(product(x, bias), wanted) < aim * usual, m


@pytest.mark.parametrize("case", ["2x8 odd", "3x8", "E8P 28", "E8P 3 bits"])
def test_portable_kernels(case: str) -> None:
    layout, book = CASES[case]
    if book is not None:
        layout = lattice(*layout, book)
    parts = parts_of(layout, book)
    weight = layout.dequantize(parts).double()
    for dtype in (torch.bfloat16, torch.float16):
        product = linear.bind(layout, parts, dtype, {"native": False})
        for m in (1, 7, 16):
            x = torch.randn(m, layout.in_features, device="cuda").to(dtype)
            wanted = x.double() @ weight.T
            usual = relative(x @ weight.to(dtype).T, wanted)
            assert relative(product(x, None), wanted) < _AIM * usual, m


def test_one_row_on_two_streams() -> None:
    layout, _ = CASES["2x8 long"]
    parts = parts_of(layout)
    product = linear.bind(layout, parts, torch.float16)
    xs = [torch.randn(1, layout.in_features, device="cuda").half() for _ in range(2)]
    wanted = [product(x, None) for x in xs]
    streams = [torch.cuda.Stream() for _ in xs]
    torch.cuda.synchronize()
    found: list[list[torch.Tensor]] = [[], []]
    for _ in range(20):
        for x, stream, results in zip(xs, streams, found, strict=True):
            with torch.cuda.stream(stream):
                results.append(product(x, None))
    torch.cuda.synchronize()
    assert all(torch.equal(y, one) for one, results in zip(wanted, found, strict=True) for y in results)


@pytest.mark.parametrize("case", ["2x8", "2x8 odd", "2x8 long", "E8P"])
def test_graphs_and_repeats_give_the_same_bits(case: str) -> None:
    layout, book = CASES[case]
    if book is not None:
        layout = lattice(*layout, book)
    parts = parts_of(layout, book)
    product = linear.bind(layout, parts, torch.bfloat16)
    for m in (1, 6):
        x = torch.randn(m, layout.in_features, device="cuda", dtype=torch.bfloat16)
        first = product(x, None)
        assert all(torch.equal(product(x, None), first) for _ in range(5))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            # Several in a row, so that each begins while the one before ends.
            results = [product(x, None) for _ in range(8)]
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(result, first) for result in results)


def test_the_host_never_waits() -> None:
    layout, _ = CASES["2x8"]
    parts = parts_of(layout)
    product = linear.bind(layout, parts, torch.bfloat16)
    x = torch.randn(17, layout.in_features, device="cuda", dtype=torch.bfloat16)
    for m in (1, 4, 17):
        product(x[:m], None)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for m in (1, 4, 17):
            product(x[:m], None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
