"""Writes src/qhub_gguf/records/grids.bin from llama.cpp's tables: python make_grids.py PATH/ggml/src/ggml-common.h"""

from __future__ import annotations

import re
import sys
from pathlib import Path

# Table, entries, weights in an entry, and the values that an entry is made of.
TABLES = (
    ("iq2xxs_grid", 256, 8, (8, 25, 43)),
    ("iq2xs_grid", 512, 8, (8, 25, 43)),
    ("iq2s_grid", 1024, 8, (8, 25, 43)),
    ("iq3xxs_grid", 256, 4, (4, 12, 20, 28, 36, 44, 52, 62)),
    ("iq3s_grid", 512, 4, (1, 3, 5, 7, 9, 11, 13, 15)),
    ("iq1s_grid", 2048, 8, (-1, 0, 1)),
)


def entries(source: str, name: str, width: int) -> list[list[int]]:
    """Return the vectors of the first table ``name`` of ``width`` bytes an entry, lowest byte first, as signed."""
    kind = f"uint{8 * width}_t"
    found = re.search(rf"GGML_TABLE_BEGIN\({kind}, {name}, [^)]*\)(.*?)GGML_TABLE_END", source, re.DOTALL)
    assert found, name
    words = [int(word, 16) for word in re.findall(r"0x[0-9a-fA-F]+", found.group(1))]
    return [[(word >> 8 * i & 255 ^ 128) - 128 for i in range(width)] for word in words]


def main() -> None:
    source = Path(sys.argv[1]).read_text()
    packed = bytearray()
    for name, count, width, values in TABLES:
        table = entries(source, name, width)
        assert len(table) == count, (name, len(table))
        bits = 2 if len(values) == 3 else 4
        codes = [values.index(value) for entry in table for value in entry]
        per_byte = 8 // bits
        for start in range(0, len(codes), per_byte):
            packed.append(sum(code << bits * i for i, code in enumerate(codes[start : start + per_byte])))
    target = Path(__file__).parents[2] / "src/qhub_gguf/records/grids.bin"
    target.write_bytes(bytes(packed))
    print(target, len(packed), "bytes")


if __name__ == "__main__":
    main()
