# SPDX-License-Identifier: MIT
"""Ablations on a finished run's priors, resumable -> results/ablation-NAME.json, assets/NAME.png.

    python benchmarks/ablations.py --prior runs/inpaint [NAME ...]

Every setting is a run of sud2.py with the flags below; what is done is not done again.
"""
import argparse
import contextlib
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import sud2  # noqa: E402

# name -> (x axis, {line: [flags of each setting, the x value last]})
ABLATIONS = {
    'pairs': ('pairs', {m: [['--method', m, '--pairs', n] for n in ('1', '5', '20', '100')]
                        for m in ('supervised', 'sud2', 'sud2-kl')}),
    'frontier': ('FD-prior', {m: [['--method', m, '--lam1', v] for v in ('0.2', '0.7', '2')]
                              for m in ('sud2', 'sud2-kl')}),
    'reg': ('lam2', {form: [['--method', 'sud2', '--reg', form, '--lam2', v]
                            for v in ('0', '0.02', '0.1') if v != '0' or form == 'signed']
                     for form in ('signed', 'abs', 'square')}),
    'noise': ('t_start', {f'{k} steps, eta {eta}': [
        ['--method', 'sud2', '--eta', eta, '--r-steps', k, '--t-start', t] for t in ('80', '200')]
        for k, eta in (('1', '0'), ('3', '0'), ('3', '1'))}),
    'measurements': ('measurements', {m: [['--method', m, '--measurements', n]
                                          for n in ('100', '1000')] for m in ('sud2', 'sud2-kl')}),
    'stability': ('updates', {m: [['--method', m, '--updates', n] for n in ('400', '2000')]
                              for m in ('sud2-kl', 'sud2')}),
}


def run(flags, a):
    """Scores of one setting; the run's own lines go nowhere."""
    out = Path(a.out) / '_'.join(f.strip('-') for f in flags).replace('+', '-')
    line = [*flags, '--prior', a.prior, '--out', str(out), '--points', '4', *a.more]
    with open(os.devnull, 'w') as quiet, contextlib.redirect_stdout(quiet):
        sud2.main(sud2.parse(line))
    (seeds,) = json.loads((out / 'metrics.json').read_text())['methods'].values()
    print(' '.join(flags), *(f'{k} {seeds["0"][k]:.3f}' for k in ('psnr', 'psnr_hole', 'fd_prior')),
          flush=True)
    return seeds['0']


def main():
    p = argparse.ArgumentParser(description='Runs ablations of sud2.', allow_abbrev=False)
    p.add_argument('names', nargs='*', metavar='NAME', help=f'of {", ".join(ABLATIONS)}; or all')
    p.add_argument('--prior', required=True, metavar='DIR', help='a finished run')
    p.add_argument('--out', default='runs/ablations')
    a, a.more = p.parse_known_args()
    for name in a.names or ABLATIONS:
        x_axis, lines = ABLATIONS[name]
        points = {line: [{'flags': flags, **run(flags, a)} for flags in settings]
                  for line, settings in lines.items()}
        sud2.write_json(ROOT / 'results' / f'ablation-{name}.json', {
            'command': 'python benchmarks/ablations.py ' + ' '.join(sys.argv[1:]), 'lines': points})

        def series(key, x=lambda s: float(s['flags'][-1]), points=points):
            return {line: [[(x(s), s[key]) for s in runs]] for line, runs in points.items()}
        panels = [('PSNR on the test images', x_axis, 'dB', series('psnr')),
                  ('Frechet distance of prior features', x_axis, '', series('fd_prior'))]
        if name == 'frontier':
            panels = [('PSNR against FD-prior; along a line lam1 is 0.2, 0.7, 2', x_axis, 'dB',
                       series('psnr', lambda s: s['fd_prior']))]
        sud2.plot(panels, ROOT / 'assets' / f'{name}.png')


if __name__ == '__main__':
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f'ablations.py: error: {error}')
