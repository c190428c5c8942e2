# SPDX-License-Identifier: MIT
"""How time and memory grow with the size of everything -> results/bench-growth.json and a table.

    python benchmarks/growth.py

Each setting is a process of its own that trains the DDPM and the default run's methods for a few
steps on random images; the minutes of a whole default run follow from these and are no measurement.
"""
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import sud2  # noqa: E402

SETTINGS = [[], ['--size', '64'], ['--size', '128'], ['--clean', '1000'], ['--clean', '100000'],
            ['--r-steps', '1'], ['--r-steps', '10'], ['--r-steps', '50'],
            ['--batch', '8', '--prior-batch', '8'], ['--batch', '32', '--prior-batch', '32'],
            ['--batch', '128', '--prior-batch', '128']]


def measure(flags, steps=10):
    """-> seconds a step of the DDPM and an update of the methods, peak MiB; in this process."""
    out, flags = {}, ['--t-start', '80', '--warmup', '0', '--points', '1', *flags]
    a = sud2.parse(flags)
    g = torch.Generator().manual_seed(0)

    def images(n):
        return torch.randint(256, (n, 3, a.size, a.size), generator=g, dtype=torch.uint8)
    clean, few, many = images(a.clean), images(a.pairs), images(a.measurements)
    split = data.Split(few, few, many, None, clean, None, few)
    for n in (2, steps):                                # the first time warms up
        with tempfile.TemporaryDirectory() as folder:
            run = sud2.Setup(sud2.parse([*flags, '--out', folder, '--prior-steps', str(n),
                                         '--updates', str(n)]))
            run.log = lambda part: lambda *line: None
            prior, out['prior'] = sud2.train_prior(run, clean, 'prior')
            models = sud2.Models(prior)
            for m in a.method:
                out[m] = sud2.train(run, m, 0, split, models, lambda f: {})[2]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {**{k: v / steps for k, v in out.items()}, 'peak_mib': peak}


def main():
    rows = []
    print('| changed flags | DDPM, ms a step | supervised, ms an update | sud2 | sud2-kl '
          '| sud2-kl+g | default run, minutes | peak MiB |\n|---|' + '---:|' * 7)
    for flags in SETTINGS:
        code = f'import sys, json; sys.path.insert(0, {str(ROOT / "benchmarks")!r})\n' \
               f'import growth; print(json.dumps(growth.measure({flags!r})))'
        s = json.loads(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                                      check=True).stdout.splitlines()[-1])
        s['minutes'] = (2000 * s['prior'] + 400 * s['supervised'] + sum(
            60 * s['supervised'] + 340 * s[m] for m in ('sud2', 'sud2-kl', 'sud2-kl+g'))) / 60
        rows.append({'flags': flags, **s})
        print(f'| {" ".join(flags) or "none"} | ' + ' | '.join(
            f'{1e3 * s[k]:.0f}' for k in ('prior', 'supervised', 'sud2', 'sud2-kl', 'sud2-kl+g'))
            + f' | {s["minutes"]:.1f} | {s["peak_mib"]:.0f} |', flush=True)
    sud2.write_json(ROOT / 'results' / 'bench-growth.json', {
        'command': 'python benchmarks/growth.py', 'settings': rows,
        'environment': {'torch': torch.__version__, 'processor': sud2.processor(),
                        'threads': torch.get_num_threads()}})


if __name__ == '__main__':
    main()
