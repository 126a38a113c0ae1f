"""What docs/performance.md says besides its numbers."""

HEAD = """# Speed on a GPU

Written from `benchmarks/results/gpu_*.json` by `python -m benchmarks.gpu.report`; measured by

```bash
python -m benchmarks.gpu.grid --out grid.json --rows all --warm 12      # products: every layout against every peer
python -m benchmarks.gpu.end_to_end --out end_to_end.json               # an 8B shape: quantizing, prefill, LoRA step
python benchmarks/gpu_generate.py --out generate.json                   # and generate
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
