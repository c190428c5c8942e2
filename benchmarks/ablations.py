# SPDX-License-Identifier: MIT
"""Ablations on a finished run's priors, resumable -> results/ablation-NAME.json, assets/NAME.png,
and a table, which results/ABLATIONS.md holds.

    python sud2.py --task inpaint --method all --seed 0 1 2
    python benchmarks/ablations.py --prior runs/inpaint [NAME ...]
    python benchmarks/ablations.py --prior runs/dehaze haze --task dehaze

Every setting is a run of sud2.py with the flags below; what is done is not done again, and what
the finished run has is taken from there.
"""
import argparse
import contextlib
import json
import os
import shutil
import statistics
import sys
import unittest.mock
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import sud2  # noqa: E402
from unet import UNet  # noqa: E402

UNPAIRED = 'sud2', 'sud2-kl', 'sud2-kl+g'
RUNGS = ('sud', 'sud+reg', 'sud+reg+noise', 'sud2', 'sud2-kl', 'sud2-kl+g')
# name -> (x axis, {line: [flags of each setting, the x value last]})
ABLATIONS = {
    'pairs': ('pairs', {m: [['--method', m, '--pairs', n] for n in ('1', '5', '20', '100')]
                        for m in ('supervised', 'sud2', 'sud2-kl', 'sud2-kl+g')}),
    'frontier': ('lam', {m: [['--method', m, '--lam3' if m == 'sud2-kl+g' else '--lam1', v]
                           for v in ('0.06', '0.2', '0.6')]
                       for m in RUNGS} | {'supervised': [['--method', 'supervised']]}),
    'reg': ('lam2', {form: [['--method', 'sud2', '--reg', form, '--lam2', v] for v in values]
                     for form, values in (('signed', ('0', '0.02', '0.2')), ('abs', ('0.02',)),
                                          ('square', ('0.02',)))}),
    'noise': ('t_start', {f'R of {k}, eta {eta}': [
        ['--method', 'sud2', '--eta', eta, '--r-steps', k, '--t-start', t]
        for t in ('50', '200')] for k, eta in (('1', '0'), ('3', '0'), ('3', '1'))}),
    'measurements': ('measurements', {m: [['--method', m, '--measurements', n] for n in (
        '100', '1000')] for m in ('sud2', 'sud2-kl', 'sud2-kl+g')}),
    'clean': ('clean', {m: [['--method', m, '--clean', n] for n in ('100', '1000', '12500')]
                        for m in UNPAIRED}),
    'stability': ('updates', {m: [['--method', m, '--updates', n] for n in ('400', '2000')]
                              for m in ('supervised', 'sud2', 'sud2-kl', 'sud2-kl+g')} | {
        f'{m}, {what}': [['--method', m, *flags, '--updates', '2000']]
        for m, what, *flags in (
            ('sud2', 'lam1 1', '--lam1', '1'),
            ('sud2', 'lam1 1, not drawn to its mean', '--lam1', '1', '--average-from', '2000'),
            ('supervised', 'not drawn to its mean', '--average-from', '2000'),
            ('sud2-kl', 'not drawn to its mean', '--average-from', '2000'))}),
    'choices': (None, {f'{m}, {what}': [['--method', m, *flags]] for m, what, *flags in (
        ('supervised', 'as it is'), ('sud+reg+noise', 'as it is'), ('sud2', 'as it is'),
        ('sud2-kl', 'as it is'), ('sud2-kl+g', 'as it is'), ('oracle', 'as it is'),
        ('sud', 'lam1 2', '--lam1', '2'),
        ('sud2', 'no warm-up', '--warmup', '0'), ('supervised', 'no shifts', '--shift', '0'),
        ('sud2', 'no shifts', '--shift', '0'), ('supervised', 'f(y) = network', 'plain'),
        ('sud2', 'f(y) = network', 'plain'),
        *((m, 'f(y) = y + network', 'added')
          for m in ('supervised', 'sud2', 'sud2-kl', 'sud2-kl+g', 'oracle')),
        ('sud2', 'lam1 constant', 'constant'), ('sud+reg+noise', 'sigma 0.5', '--sigma', '0.5'),
        ('sud2', 'fp32', '--precision', 'fp32'),
        ('sud2-kl', 't to 500', '--kl-range', '20 500'),
        ('sud2-kl', 'D^f learns at 3e-3', '--kl-lr', '3e-3'),
        ('sud2-kl', 'without clean pairs', '--lam3', '0'),
        ('sud2', 'with clean pairs', 'with-clean'), ('sud2', 'with g', 'with-g'),
        ('sud2-kl+g', 'without L_denoiser', '--lam1', '0'),
        ('sud2-kl+g', 'g(x) = x + network', 'sum'),
        *((m, 'f trained with AdamW', '--lr', '4e-4', '--kl-lr', '2e-4', 'adamw')
          for m in ('supervised', 'sud2', 'sud2-kl', 'oracle')))}),
    'priors': (None, {f'sud2, {what}': [['--method', 'sud2', *flags]] for what, *flags in (
        ('as it is',), ('DDPM of 6,000 steps', '--prior-steps', '6000'),
        ('DDPM of uniform times', 'uniform'),
        ('all trained with AdamW', '--prior-lr', '3e-3', '--lr', '4e-4', 'all-adamw'))}),
    'haze': (None, {f'sud2-kl+g, {what}': [['--method', 'sud2-kl+g', *flags]] for what, *flags in (
        ('as it is',), ('g is not told c', 'no-c'))}),
}
KEYS = ('psnr', 'psnr_hole', 'psnr_visible', 'ssim', 'fd_prior', 'corr_output')
# what the defaults are, so that a setting that several ablations share is run once
SAME = {'--pairs': '5', '--lam1': '0.2', '--lam2': '0.02', '--lam3': '0.2',
        '--reg': 'signed', '--eta': '0', '--r-steps': '3', '--t-start': '50',
        '--measurements': '1000', '--clean': '12500', '--updates': '400'}


def plain(*sizes, residual=False, **kind):
    """The network without y added to its output."""
    return UNet(*sizes, **kind)


def added(*sizes, residual=False, **kind):
    """The network with all of its change added to y, none of it held back."""
    net = UNet(*sizes, residual=residual, **kind)
    if residual:
        net.head.register_forward_hook(lambda _, __, out: sud2.torch.cat(
            [out[:, :-1], sud2.torch.full_like(out[:, -1:], 9)], 1))
    return net


def uniform(T, n, g, device):
    """Times for the DDPM's training as DDPM has them."""
    return sud2.draw_times(0, T, n, g, device)


def adamw(net, lr):
    """The optimiser of most other code."""
    return sud2.torch.optim.AdamW(net.parameters(), lr, weight_decay=1e-4, fused=True,
                                  capturable=True)


def on_features_of(folder, scorer=sud2.scorer):
    """sud2's scorer with the Fréchet distance on the features of the DDPM in a folder."""
    def judged(run, split, prior, *more):
        saved = sud2.load(Path(folder) / 'prior.pt', {'kind': 'prior', **run.about})
        judge = run.net(0, time=True)
        judge.load_state_dict(saved['parts']['ema'])
        return scorer(run, split, judge, *more)
    return judged


# flags end in one of these where the code itself differs: what takes the place of what
CHANGES = {'plain': ('UNet', plain), 'added': ('UNet', added),
           'constant': ('ENDLESS', ()), 'uniform': ('prior_times', uniform),
           'adamw': ('Muon', adamw), 'all-adamw': ('Muon', adamw),
           **{f'with-{name}': ('METHODS', sud2.METHODS | {'sud2': sud2.METHODS['sud2']._replace(
               clean=pairs)}) for name, pairs in (('clean', 'x_u'), ('g', 'g(x_u)'))},
           'sum': ('measured', lambda g, x, c: x + g(sud2.torch.cat([x, c.expand_as(x)], 1))
                   .float().chunk(2, 1)[0]),
           'no-c': ('measured', lambda g, x, c, measured=sud2.measured: measured(g, x, 0 * c))}


def run(flags, a):
    """One setting -> its seeds' scores and its DDPM's loss; the run's own lines go nowhere."""
    pairs = list(zip(flags[::2], flags[1::2]))
    if ('--lam2', '0') in pairs:                        # without L_reg its form is nothing
        pairs = [p for p in pairs if p[0] != '--reg']
    line = [f for k, v in pairs if SAME.get(k) != v for f in (k, *v.split())]
    if '--clean' in line:                               # one run, for the sake of its DDPM
        line[1:2] = UNPAIRED
    name = '_'.join(f.strip('-') for f in line + flags[2 * len(flags[1::2]):]).replace('+', '-')
    out = Path(a.prior if len(line) == 2 and flags[-1] not in CHANGES else Path(a.out) / name)
    if (out / 'metrics.json').exists():
        return scores(out, flags)
    if '--sigma' in line:                               # D_σ of its own
        out.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(a.prior) / 'prior.pt', out)
    elif not {'--prior-steps', '--clean'} & {*line} and flags[-1] not in ('uniform', 'all-adamw'):
        line += ['--prior', a.prior]
    change = CHANGES.get(flags[-1], ('UNet', UNet))
    if '--clean' in line:                               # distances in one space for all of them
        change = 'scorer', on_features_of(a.prior)
    with (open(os.devnull, 'w') as quiet, contextlib.redirect_stdout(quiet),
          unittest.mock.patch.object(sud2, *change)):
        sud2.main(sud2.parse([*line, '--out', str(out), '--points', '1', '--seed', '0', '1', '2',
                              *a.more]))
    return scores(out, flags)


def scores(out, flags):
    """The scores of a finished run's method at its last update, and its DDPM's loss."""
    report = json.loads((out / 'metrics.json').read_text())
    seeds = {seed: {k: s[k] for k in KEYS if s[k] is not None}      # haze has no hole
             for seed, s in report['methods'].get(flags[1], {}).items()}
    if list(seeds) != ['0', '1', '2']:
        raise ValueError(f'{out}: a run of {flags[1]} with --seed 0 1 2 is needed')
    print(*flags, *(f'{k} {mean(seeds, k):.3f}' for k in seeds['0']), flush=True)
    return {'seeds': seeds, 'eps_loss': report['prior']['eps_loss']}


def mean(seeds, key):
    """Mean of one score over the seeds."""
    return statistics.mean(s[key] for s in seeds.values())


def table_of(x_axis, points):
    """Markdown table, a row a setting."""
    rows = {f'{line}, {x_axis} {s["flags"][-1]}' if s['flags'][2:] and x_axis else line: s['seeds']
            for line, runs in points.items() for s in runs}
    return sud2.table(rows).replace('| method |', '| setting |', 1)


def panels_of(name, x_axis, points):
    """What is plotted: PSNR and Fréchet distance against x, or one against the other."""
    if name == 'frontier':              # a collapsed one would leave the others no room
        limit = 3 * mean(points['supervised'][0]['seeds'], 'fd_prior')
        means = {line: [[(mean(s['seeds'], 'fd_prior'), mean(s['seeds'], 'psnr')) for s in runs
                         if mean(s['seeds'], 'fd_prior') < limit]]
                 for line, runs in points.items()}
        return [('PSNR against FD-prior; weight 0.06, 0.2, 0.6', 'FD-prior', 'dB', means)]

    def series(key):
        return {line: [[(float(s['flags'][-1]), s['seeds'][seed][key]) for s in runs]
                       for seed in runs[0]['seeds']] for line, runs in points.items()}
    label = {'clean': 'clean images', 'updates': 'updates of f'}.get(x_axis, x_axis)
    return [('PSNR on the test images', label, 'dB', series('psnr')),
            ('Frechet distance of prior features', label, '', series('fd_prior'))]


def draw(name, points, path):
    """The plot of an ablation; numbers of images from few to many go by ratios."""
    x_axis = ABLATIONS[name][0]
    sud2.plot(panels_of(name, x_axis, points), path, log=x_axis in ('pairs', 'clean'))


def main():
    p = argparse.ArgumentParser(description='Runs ablations of sud2.', allow_abbrev=False)
    p.add_argument('names', nargs='*', metavar='NAME',
                   help=f'of {", ".join(ABLATIONS)}; without a name all but haze')
    p.add_argument('--prior', required=True, metavar='DIR', help='a finished run')
    p.add_argument('--out', default='runs/ablations')
    a, a.more = p.parse_known_args()
    for name in a.names or [n for n in ABLATIONS if n != 'haze']:
        x_axis, lines = ABLATIONS[name]
        points = {line: [{'flags': flags, **run(flags, a)} for flags in settings]
                  for line, settings in lines.items()}
        sud2.write_json(ROOT / 'results' / f'ablation-{name}.json', {
            'command': 'python benchmarks/ablations.py ' + ' '.join(sys.argv[1:]),
            'environment': {'torch': sud2.torch.__version__, 'processor': sud2.processor(),
                            'threads': sud2.torch.get_num_threads()}, 'lines': points})
        print(f'\n{table_of(x_axis, points)}\n', flush=True)
        if x_axis:
            draw(name, points, ROOT / 'assets' / f'{name}.png')


if __name__ == '__main__':
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f'ablations.py: error: {error}')
