#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Ablations, resumable, on one shared prior -> results/NAME.json and assets/NAME.png.

    python benchmarks/ablations.py frontier --prior runs/inpaint

Every setting is a run of sud2.py with the flags below; what is done is not done again.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import sud2  # noqa: E402

# name -> {line in the plot: [flags of each setting]}; the x axis is the last flag's value
ABLATIONS = {
    'frontier': {
        m: [['--method', m, '--lam1', str(v)] for v in (0.03, 0.1, 0.3, 1)]
        for m in ('sud', 'sud+reg', 'sud+reg+noise', 'sud2', 'sud2-kl')
    },
    'lam2': {
        form: [['--method', 'sud2', '--reg', form, '--lam2', str(v)] for v in (0, 0.03, 0.1, 0.3)]
        for form in ('signed', 'abs', 'square')
    },
    'noise': {
        f'{k} steps': [
            ['--method', 'sud2', '--r-steps', str(k), '--t-start', str(t)]
            for t in (50, 100, 200, 300)
        ]
        for k in (1, 4, 10)
    },
    'pairs': {
        m: [['--method', m, '--pairs', str(n)] for n in (1, 5, 20, 100)]
        for m in ('supervised', 'sud2', 'sud2-kl')
    },
}


def main():
    p = argparse.ArgumentParser(description='Runs an ablation of sud2.', allow_abbrev=False)
    p.add_argument('name', choices=ABLATIONS)
    p.add_argument(
        '--prior', required=True, metavar='DIR', help='a finished run whose priors serve'
    )
    p.add_argument('--seed', nargs='+', default=['0'])
    p.add_argument('--out', default='runs/ablations')
    a, more = p.parse_known_args()
    result = {}
    for line, settings in ABLATIONS[a.name].items():
        for flags in settings:
            out = Path(a.out) / '_'.join(flags[1::2])
            sud2.main(
                sud2.parse(
                    [*flags, '--seed', *a.seed, '--prior', a.prior, '--out', str(out), *more]
                )
            )
            (method,) = json.loads((out / 'metrics.json').read_text())['methods'].items()
            result.setdefault(line, []).append({'flags': flags, 'seeds': method[1]})
    (ROOT / 'results' / f'{a.name}.json').write_text(json.dumps(result, indent=1) + '\n')

    def series(x, key):
        """Per line and seed, the points (x(run, its scores), scores[key]) of the last update."""
        return {
            line: [[(x(r, r['seeds'][s]), r['seeds'][s][key]) for r in runs] for s in a.seed]
            for line, runs in result.items()
        }

    if a.name == 'frontier':
        points = series(lambda r, scores: scores['fd_prior'], 'psnr')
        panels = [('PSNR against FD-prior, lam1 along a line', 'FD-prior', 'dB', points)]
    else:
        panels = [
            (title, a.name, unit, series(lambda r, scores: float(r['flags'][-1]), key))
            for title, unit, key in (('PSNR', 'dB', 'psnr'), ('FD-prior', '', 'fd_prior'))
        ]
    sud2.plot(panels, ROOT / 'assets' / f'{a.name}.png')


if __name__ == '__main__':
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f'ablations.py: error: {error}')
