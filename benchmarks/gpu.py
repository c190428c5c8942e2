# SPDX-License-Identifier: MIT
"""Milliseconds an update on a GPU -> results/bench-gpu.json and a table.

    python benchmarks/gpu.py

The DDPM's, the default methods' and CycleGAN's updates, their kernels launched one by one and
replayed as a CUDA graph: medians of interleaved turns.
"""
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import sud2  # noqa: E402


def milliseconds(update, schedule, calls, first=200):
    """Of one call, the mean of `calls`."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    for step in range(first, first + calls):
        update(**schedule(step))
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - began) / calls


def measure(size, precision, turns=3):
    """-> part of a run -> {'launched': ms, 'replayed': ms}."""
    a = sud2.parse(['--device', 'cuda', '--size', str(size), '--precision', precision, '--clean',
                    '1000', '--test', '10'])
    run, record, plain, out = sud2.Setup(a), sud2.recorded, [], {}
    split = sud2.load_split(a, 0).to(run.device)

    def recorded(update, parts, device):
        plain.append(update)
        return record(update, parts, device)

    def timed(run, name, parts, update, schedule, *more):
        kinds = {'launched': plain.pop(), 'replayed': update}
        for kind in kinds.values():
            milliseconds(kind, schedule, 4 if kind is not update else 8)    # warms up, records
        times = [{k: milliseconds(kind, schedule, 2 if k == 'launched' else 8)
                  for k, kind in kinds.items()} for _ in range(turns)]
        out[name] = {k: statistics.median(t[k] for t in times) for k in kinds}
        return 0

    sud2.recorded, fit, sud2.fit = recorded, sud2.fit, timed
    try:
        prior, _ = sud2.train_prior(run, split.images, 'prior')
        for m in a.method:
            sud2.train(run, m, 0, split, sud2.Models(prior), None)
        sud2.train_cyclegan(run, 0, split, None)
    finally:
        sud2.recorded, sud2.fit = record, fit
    return out


def main():
    rows = []
    print('| size, precision | part | launched, ms | replayed, ms | ratio |\n'
          '|---|---|---:|---:|---:|')
    for size, precision in ((32, 'bf16'), (32, 'fp32'), (64, 'bf16')):
        for part, ms in measure(size, precision).items():
            rows.append({'size': size, 'precision': precision, 'part': part, **ms})
            print(f'| {size}, {precision} | {part} | {ms["launched"]:.1f} | {ms["replayed"]:.1f} | '
                  f'{ms["replayed"] / ms["launched"]:.2f} |', flush=True)
    sud2.write_json(ROOT / 'results' / 'bench-gpu.json', {
        'command': 'python benchmarks/gpu.py', 'parts': rows,
        'environment': {'torch': torch.__version__, 'processor': torch.cuda.get_device_name()}})


if __name__ == '__main__':
    main()
