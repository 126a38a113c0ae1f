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
to a third faster than scaling the product after it, whose error is cuBLAS's own. For more than 128 rows of x, weights
with one scale for a row of theirs (int8, float8 of channels) are scaled after it; so are all by the kernel for few.

**M >= 512.** 4-bit integers (0.99 to 1.06 of cuBLAS) and those with zeros (0.97 to 1.07) are as fast as a dense
product. Two groups of four warps widen and multiply, each with a product under way while it widens (`wide/`). A group
that widens does not overlap its own product, and has the time of the other group's to hide its instructions in: 128
clocks for 32 columns of 128 rows of x. So weights that take more instructions have tiles of 256 rows, which double
that time; there each group brings its own inputs, since two groups then hold all registers. 8 bits reach 0.95 to 0.99
and float8 0.93 to 0.99 that way, NF4 0.80 to 0.87 (its lookups alone are 24 instructions of byte permutation for eight
weights). Where such tiles are too few for the processors, at 512 rows of weights with 4096 rows, tiles of 128 rows or
two parts of K give 0.81 to 0.89, NF4 0.65 to 0.77; at 28672 x 8192 and 512 rows, 448 tiles on 132 processors leave the
fourth round half empty (0.86 to 0.89, NF4 0.69 to 0.76). A dense product of weights dequantized before (0.81 to 0.85 at
2048 rows) is no faster than that for NF4. Not tried: sharing the last round's tiles out along K.

**M <= 16.** At 28672 x 8192 products read at 0.9 of the copy bandwidth, at 8192 x 8192 at 0.73, at 4096 x 4096 at
0.4. A kernel that does nothing but read as much takes 40.2, 12.8 and 4.7 us (below), so products are at 0.92, 0.83 and
0.68 of what can be had by a kernel that begins when the one before has ended, and the goals, 14.0 us at 8192 x 8192 and
5.0 at 4096 x 4096, leave 1.2 and 0.3 us for everything else: the sum of the parts of K, the first words' way to the
matrix units. Tried: asking for all weights ahead (prefetch into the second-level cache before the kernel before has
ended: as fast at 4096 x 4096, 6 to 14 % slower above), deeper stages (3 to 8 % slower), letting the next kernel begin
early (up to 11 % slower: its programs take the places and the bandwidth) or when the last block has been multiplied (up
to 5 % faster; it is so now).

**NF4 at M = 1.** 1.4 to 2.1 times bitsandbytes (1.0 to 1.2 before), from M = 2 on 2.0 to 5.9 times. Codes are looked up
in shared memory, where each lane of a warp has a table of all pairs in its own bank (`tiled/banks.py`), and no longer
in registers, which took 27 instructions for eight weights and as many again to bring the results into the order of a
matrix operand. What is left is what 4-bit integers have left (7.7 us at 4096 x 4096 where those take 6.8), and an
eighth of a bit more of scales for each weight.

**AQLM, E8P.** AQLM is 2.8 to 3.1 times as fast as cuBLAS. E8P's product alone is 2.2 to 3.4 times as fast; each
rotation before and after it takes 2 to 7 us more.

**fp8 dynamic.** Ahead of the best peer but in three cells, 2 to 5 % behind: rounding the input is a launch of its own,
and divides as IEEE 754 says.

**Decoding.** int4 with zeros takes 3.2 ms a step in the last run, where products and head add up to some 2.5: two calls
were timed, on a host that was often late. At every shape they are faster than in the run before, which gave 2.9 ms.

**Host cost.** 3 to 9 us over `nn.Linear` for weights in tiles, on a host whose `nn.Linear` takes 24 us (13 to 16 on
others). LLM.int8() without outliers takes two launches (18 us over), E8P three and five tensors (63 us over).

**Prefill and LoRA step.** Prefill is that of bf16 for plain integers. The LoRA step is held by the host: in a step
profiled by hand (torch.profiler, no command here does it) the GPU was busy for 205 ms with 4-bit integers and for 199
with bf16, in 8,264 kernels, most of them PEFT's and autocast's casts and sums. Single steps of one run differ by a
fifth, once by twice as much, and no memory is asked of the driver meanwhile (`lora_steps_ms` and
`lora_device_allocations` in the results). In the last run plain integers take 45 ms more than bf16, NF4 56,
bitsandbytes' NF4 28.

**Experts.** mxfp4 is still looked up in registers there, which is why it gains less than integers do.

**2 and 3 bits at 14336 x 4096.** Cells of a run in which the kernel was refused (mended since) were taken out.

**Not run.** An H200; E8P and layouts other than 4-bit at 4096 x 14336 and 28672 x 8192 below 512 rows; experts in
float8: the card was not at hand for longer.
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
