"""What memory and time it takes to list and to plan a data set whose images are inside its tables.

    .venv/bin/python scripts/bench_features_embedded.py [--records 500000] [--bytes 1500]

Some minutes on two cores. Pictures of so many bytes, no two alike, in Hugging Face's struct {bytes, path} beside three
columns of the user's, in shards of 50,000 records. Wanted: less than 1 GB of memory of the driver's own, whatever the
size of the pictures. Every process is a new one; the peak is its resident memory, with the files of the libraries that
it has mapped (torch's and transformers' are most of `plan`'s, whatever is planned), and beside it what is its own.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SHARD, ROW_GROUP = 50_000, 1000
SAMPLING_S = 0.1
STUDY = """
name: embedded
features: {{source: {{manifest: {folder}}}, encoder: {{checkpoint: tiny-random, image_size: 112}}}}
search: {{method: grid, space: {{rank: 4, families: {{sketch: }}}}}}
"""
STEPS = {
    "import alone": "",
    "read_records": "records = read_records(source, Path(sys.argv[1]), 0)",
    "and hash_files": "records = read_records(source, Path(sys.argv[1]), 0); hash_files(records)",
}
PROGRAM = """
import sys
from pathlib import Path
from lowrank_tune.config.source import ManifestSource
from lowrank_tune.features.images import hash_files
from lowrank_tune.features.sources import read_records
source = ManifestSource(manifest=sys.argv[1])
"""


def main() -> None:
    """Print a line a step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=500_000)
    parser.add_argument("--bytes", type=int, default=1500, help="of each picture")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-embedded-") as name:
        folder, study = Path(name) / "data", Path(name) / "study.yaml"
        # In a process of its own: a child's peak begins with its parent's size.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as writer:
            writer.submit(write_tables, folder, chosen.records, chosen.bytes).result()
        study.write_text(STUDY.format(folder=folder))
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(f"\n{chosen.records} records with pictures of {chosen.bytes} bytes in {size / 1e6:.0f} MB of parquet\n")
        print(f"{'step':<16}{'peak, MB':>10}{'own, MB':>9}{'seconds':>9}{'peak / tables':>15}")
        commands = {step: ["-c", PROGRAM + code, str(folder)] for step, code in STEPS.items()}
        commands["plan's imports"] = ["-c", "import lowrank_tune.cost"]
        commands["plan"] = ["-m", "lowrank_tune", "plan", str(study), "--results", str(Path(name) / "results")]
        for step, arguments in commands.items():
            peak, own, seconds = measure([sys.executable, *arguments])
            print(f"{step:<16}{peak / 1e6:>10.0f}{own / 1e6:>9.0f}{seconds:>9.1f}{peak / size:>15.2f}", flush=True)


def write_tables(folder: Path, records: int, picture_bytes: int) -> None:
    """A data set as it is published; what follows a picture's end makes it unlike the others, and is not decoded."""
    folder.mkdir()
    random, buffer = np.random.default_rng(0), io.BytesIO()
    Image.fromarray(random.integers(0, 256, (16, 16, 3), np.uint8)).save(buffer, "JPEG")
    picture = buffer.getvalue()
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for first in range(0, records, SHARD):
        numbers = range(first, min(first + SHARD, records))
        data = pa.array([picture + random.bytes(picture_bytes - len(picture)) for _ in numbers])
        names = pa.array([f"COCO_train2014_{number:012d}.jpg" for number in numbers])
        table = pa.table(
            {
                "image": pa.StructArray.from_arrays([data, names], fields=list(kind)),
                "question": [f"How many things are there in picture {number}?" for number in numbers],
                "answers": [[str(number % 7), "many"] for number in numbers],
                "bbox": [[1.0, 2.0, 3.0, float(number % 16)] for number in numbers],
            }
        )
        pq.write_table(table, folder / f"train-{first // SHARD:05d}.parquet", row_group_size=ROW_GROUP)


def measure(command: list[str]) -> tuple[int, int, float]:
    """Peak resident memory of a process, in bytes, how much was its own at most, and its seconds."""
    started, own = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        with contextlib.suppress(OSError, IndexError, StopIteration):
            rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
            own = max(own, next(int(line.split()[1]) * 1024 for line in rollup if line.startswith("Pss_Anon")))
        time.sleep(SAMPLING_S)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command[:4])} failed")
    return usage.ru_maxrss * 1024, own, time.perf_counter() - started


if __name__ == "__main__":
    main()
