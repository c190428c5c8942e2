# SPDX-License-Identifier: MIT
"""Kills a tiny run of every method at random moments (SIGKILL), repeats the command each time,
and compares the end with an undisturbed run's, bit for bit.

    python benchmarks/kill.py [OUT]
"""
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent.parent
FLAGS = ['--method', 'all', '--size', '16', '--clean', '32', '--measurements', '16', '--test', '12',
         '--width', '16', '--prior-steps', '150', '--denoiser-steps', '100', '--updates', '60',
         '--warmup', '10', '--gan-steps', '30', '--gan-batch', '2', '--precision', 'fp32',
         '--save-every', '0.05']
TIMES = 20


def start(out):
    return subprocess.Popen([sys.executable, HERE / 'sud2.py', *FLAGS, '--out', out],
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(out):
    """Runs to the end -> seconds."""
    began = time.monotonic()
    p = start(out)
    error = p.communicate()[1]
    assert p.returncode == 0, error
    return time.monotonic() - began


def scores(out):
    """metrics.json without what a clock or the memory says."""
    m = json.loads((out / 'metrics.json').read_text())
    for seeds in m['methods'].values():
        seeds['0'].pop('seconds')
    return m['methods'], m['prior']['eps_loss']


def last_part(out):
    """What the run was at when it was killed, by the youngest checkpoint."""
    files = sorted(out.glob('*.pt*'), key=lambda f: f.stat().st_mtime)
    return files[-1].name if files else 'start'


def main(root):
    rng, whole, cut = random.Random(0), root / 'whole', root / 'cut'
    shutil.rmtree(root, ignore_errors=True)
    seconds = finish(whole)
    print(f'undisturbed: {seconds:.0f} s')
    kills = 0
    while kills < TIMES:
        p = start(cut)
        time.sleep(rng.uniform(3, 5 + seconds / 6))
        if p.poll() is None:
            p.kill()
            kills += 1
            print(f'kill {kills:2d}: {last_part(cut)}', flush=True)
        else:                                           # done: once more from the start
            shutil.rmtree(cut)
        p.communicate()
    finish(cut)
    for f in sorted(whole.glob('*.pt')):
        ours, theirs = (torch.load(d / f.name, weights_only=True)['parts'] for d in (cut, whole))
        name = next(k for k in ('f', 'gan', 'ema') if k in ours)
        equal = all(torch.equal(ours[name][k], v) for k, v in theirs[name].items())
        print(f'{f.name}: {"equal bit for bit" if equal else "DIFFERS"}')
        assert equal
    assert scores(whole) == scores(cut)
    print('metrics.json: equal')


if __name__ == '__main__':
    main(Path(sys.argv[1] if len(sys.argv) > 1 else 'runs/kill'))
