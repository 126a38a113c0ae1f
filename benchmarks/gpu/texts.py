"""What docs/performance.md says besides its numbers."""

HEAD = """# Speed on a GPU

Written from `benchmarks/results/gpu_*.json` by `python -m benchmarks.gpu.report`; measured by

```bash
python -m benchmarks.gpu.grid --out grid.json --rows all --warm 12      # products: every layout against every peer
python -m benchmarks.gpu.end_to_end --out end_to_end.json               # an 8B shape: quantizing, prefill, LoRA step
python -m benchmarks.gpu.generate --out generate.json                   # and generate
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

**M = 128 on wide weights, M >= 512.** Weights are cheap to read and inputs are not: a program of 128 x 128 reads 32
KB of x and 8 KB of weights for 1,024 clocks of the matrix units, near what the second-level cache gives all
processors, and its shared memory is busy for 85 % of the time. Programs of 256 rows of weights, which halve the
first, are the fastest at M = 128 and N = 28672; past that the waits between widening and multiplying add up (0.74 to
0.93 of cuBLAS). Tried and slower: one product under way at any time in Gluon (0.5 to 0.77 of cuBLAS), four slices a
product (up to 12 % slower: registers), splitting K (10 to 20 % slower where tiles fill the card). Dequantizing and
cuBLAS wins from 2048 rows on.

**M <= 16.** At 28672 x 8192 products read at 0.9 of the copy bandwidth, at 8192 x 8192 at 0.72, at 4096 x 4096 at
0.4: about 4 us do not shrink with the weight (start, first words from memory, the sum of the parts of K).

**NF4 at M = 1.** Looking a code up in registers takes 27 instructions for eight weights, against 9 for integers'; at
few rows that, not memory, is what takes the time (28 to 30 us at 14336 x 4096, where reading takes 11).

**E8P.** The product alone is 2.2 to 3.4 times as fast as cuBLAS; each rotation before and after it takes 2 to 7 us
more.

**fp8 at 2048 rows, NF4 at few, 2 and 3 bits.** The dispatcher's guess took the kernel that rounds inputs with torch
for large products, where the one that rounds in one launch is near the best peer; the guess is mended, the cells were
not measured again. So is the plan of NF4 for few rows, whose cells are those of the slower one, and that of 2 and 3
bits for more than 128 rows, which asked for more shared memory than there is: the whole kernel was refused at 14336 x
4096, and what ran instead is in the table.

**NF4 prefill and LoRA step.** The variant `qhub_nf4` multiplied in float32, which is the default of a bitsandbytes
config, where `bnb_nf4` was given bfloat16: 611 ms against 80 are that difference. The benchmark asks for bfloat16
since; not run again.

**Batch 32.** The fused parts were left out by a fixed bound that 32 layers of random weights exceed by rounding
alone. The bound is measured on each model since; the row was not run again.
"""
