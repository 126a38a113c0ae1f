"""What docs/performance.md says besides its numbers."""

HEAD = """# Speed on a GPU

Written from `benchmarks/results/gpu_*.json` by `python -m benchmarks.gpu.report`; measured by

```bash
python -m benchmarks.gpu.grid --out grid.json --rows all --warm 12      # products: every layout against every peer
python -m benchmarks.gpu.end_to_end --out end_to_end.json               # an 8B shape: quantizing, prefill, LoRA step
python -m benchmarks.gpu.generate --out generate.json                   # and generate
python -m benchmarks.gpu.host --out host.json                           # what a call costs the host
python -m benchmarks.gpu.experts --out experts.json                     # the experts of a layer
python -m benchmarks.gpu.reading --out reading.json                     # reading alone
python -m benchmarks.gpu.report --merge grid.json                       # tables and pictures
```

Peers are used as they come: cuBLAS and tinygemm (torch), bitsandbytes, gemlite with its own configurations, and
Marlin, ExLlamaV2 and Machete built from gptqmodel's source (`benchmarks/gpu/build.py SOURCE OUT`, then
`QHUB_BENCH_NATIVE=OUT`). What is not installed is left out with the reason. Numbers are of one card and one day: run it
on yours, `make gpu-bench`."""

METHOD = """Median microseconds of one product y = x W^T with M rows of x. A CUDA graph holds at least a millisecond of
back-to-back calls that rotate over copies of the weight (300 MB in all, at most 40 copies, so that the 50 MB L2 cache
holds none of it); replays of all contestants follow each other in a random order that is drawn anew each of 7 rounds.
So neither Python nor a launch is in the figure, but all that a call launches is: rounding of inputs, sums over parts
of K. Every cell is checked first: the relative Frobenius error of the first and last eight rows against float64 x W^T
with the contestant's own dequantized weight; a cell above its limit is not timed. In brackets: how many times as fast
as the best peer of that cell with the same kind of weight; where nobody else has the kind, as cuBLAS. Ratios are taken
within one run. Fraction of the roofline: the larger of packed weight bytes over the bandwidth and 2MNK over the bf16
rate, both measured in the same run, over the time; the bandwidth is that of a copy or, where higher, that at which
cuBLAS read a weight at M=1."""

REST = """## What holds the rest

**Accuracy.** cuBLAS's own error is that on weights which bf16 holds. A dense product of *dequantized* weights rounds
them first; its error against float64 on the dequantized weights is 1.33 to 1.46 times that (2.2e-3 to 2.5e-3 for
4-bit integers, with zeros, HQQ, NF4, int8; an H100, when the kernels were tuned). The tests of the kernels hold
weights in tiles, and in bfloat16 codebooks, to 1.2 times that. tinygemm, Marlin and Machete round as much (1.31 to
1.32 in the same cells). Weights for many rows are scaled before the product, and so rounded once, because that is up
to a third faster than scaling the product after it, whose error is cuBLAS's own.

**M >= 512.** Plain 4-bit integers reach cuBLAS (0.96 to 1.03 on a busy card) since one warp brings weights and inputs
and two groups of four widen and multiply, each with a product under way while it widens (`wide/`). Other weights take
more instructions for 128 columns: with zeros 215, 8 bits 212, float8 352, NF4 448, against 156; they reach 0.83, 0.81,
0.69 and 0.57. What fits all of these: a group that widens does not overlap its own product, and has the time of the
other group's, 128 clocks for 32 columns, to hide 40 instructions in. Tiles of 256 rows of x would double that time, but
leave room for two stages only (0.9 of cuBLAS for 4-bit integers, so not built); the way there is y through the
stages' own memory. The dispatcher's guess knows these shares since, and dequantizes NF4 and float8 for cuBLAS from
about 2048 rows on (0.81 to 0.85 for 4-bit integers); the cells below are of the kernel.

**M <= 16.** At 28672 x 8192 products read at 0.9 of the copy bandwidth, at 8192 x 8192 at 0.73, at 4096 x 4096 at
0.4: about 4 us do not shrink with the weight (start, first words from memory, the sum of the parts of K). Tried: asking
for all weights ahead (prefetch into the second-level cache before the kernel before has ended: as fast at 4096 x 4096,
6 to 14 % slower above), deeper stages (3 to 8 % slower), letting the next kernel begin early (up to 11 % slower: its
programs take the places and the bandwidth) or when the last block has been multiplied (up to 5 % faster; it is so now).

**NF4 at M = 1.** Looking a code up in registers takes 27 instructions for eight weights, against 9 for integers'; at
few rows that, not memory, is what takes the time (28 to 30 us at 14336 x 4096, where reading takes 11). Smaller pieces
a warp, the plan since, took 25.7 us at 8192 x 8192 and 27.1 at 14336 x 4096 when plans were compared; the tables have
the times before.

**AQLM, E8P.** AQLM is 2.8 to 3.1 times as fast as cuBLAS. E8P's product alone is 2.2 to 3.4 times as fast; each
rotation before and after it takes 2 to 7 us more.

**fp8 dynamic.** Ahead of the best peer but in three cells, 2 to 5 % behind: rounding the input is a launch of its own.

**Host cost.** Measured at 14336 x 4096, where `F.linear` itself takes the 42 us of its kernel, in a run in which peers
took 1.5 to 1.8 times as long as in another (bitsandbytes' int8 340 us, 186 before): 33 to 43 us a call for weights in
tiles. Python's share of it, with launches left out, is 7 us for weights in tiles, 8 for AQLM and 22 for E8P on a
desktop processor. Why AQLM takes 233 us there is not known; generate replays graphs and does not pay it.

**Prefill and LoRA step.** Weights are put into tiles by `generate` and `qhub.optimize`; the rows below are of models as
they were quantized, whose weights are dequantized for cuBLAS: 69 ms against the 63 of bf16 are that. The benchmark
puts them into tiles since; not run again. The LoRA step takes 88 to 115 ms more than bf16's, of which dequantizing for
forward and backward is about 15; the rest was not profiled.

**2 and 3 bits at 14336 x 4096.** The kernel was refused there when the table was made (its plan asked for more shared
memory than there is; mended). The 3-bit model below ran with it; its cells were not measured again.

**Not run.** AQLM, E8P and LLM.int8() through `generate`, an H200, grouped experts' times, layouts other than 4-bit
integers at 4096 x 14336 and 28672 x 8192 below 512 rows: the card was not at hand for longer.
"""

READING = """A kernel that reads as many bytes as a 4-bit weight has (codes, and a scale of 16 bits for 128 of them) and
writes a number for each program, the fastest of 64 ways to cut it (`benchmarks/gpu/reading.py`); timed as products are.
No product that begins when the one before has ended can be faster."""

EXPERTS = """Whole forward of a layer's experts, routing, both products, activation and weighted sum, in a CUDA graph,
experts drawn anew for each of 16 calls (`benchmarks/gpu/experts.py`). mixtral: 8 experts of 14336 x 4096, 2 of them a
token; qwen3: 128 of 768 x 2048, 8; gpt-oss: 32 of 2880 x 2880, 4. In brackets: how many times as fast as the faster of
transformers' own implementations on bf16 weights."""

HOST = """Wall time of a call of the layer, weights 1024 x 1024, so that the GPU waits for the host
(`benchmarks/gpu/host.py`)."""
