# SPDX-License-Identifier: MIT
"""Other degradations of faces, each in folders as a user has them, with the defaults, which were
chosen without them -> results/operators.json, assets/operators.png and a table.

    python benchmarks/operators.py
    python benchmarks/operators.py --prints
    python benchmarks/operators.py --faces CelebAMask-HQ/CelebA-HQ-img --images celeba

Resumable. --prints: four of them together -> results/prints.json. The faces are drawn, or real ones
with others for U_x (results/operators-real.json; their picture stays in runs/). How strong each is
varies from image to image. All share the first's prior. On real faces sud2-kl+g also runs with a
fifth of λ1, on prints it and supervised also for 1,000 updates.
"""
import argparse
import contextlib
import json
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import metrics  # noqa: E402
import sud2  # noqa: E402

METHODS = 'supervised', 'sud2', 'sud2-kl', 'sud2-kl+g'
WEAKER = ['sud2-kl+g --lam1 0.04']                          # on real faces
LONGER = ['supervised --updates 1000', 'sud2-kl+g --updates 1000']          # on prints
# part -> stream and number of drawn faces, which of the shuffled real ones; a seed takes five pairs
PARTS = {'images': (0, 12500, slice(12500)), 'test': (1, 768, slice(368)),
         'paired': (1000, 50, slice(368, 418)), 'measurements': (1001, 1000, slice(418, None))}


def blur(x, rng, low=.7, high=2):
    """Out of focus."""
    return x.filter(ImageFilter.GaussianBlur(rng.uniform(low, high)))


def noise(x, rng, low=15, high=60):
    """Of the sensor; no function of the image."""
    u = np.asarray(x) + rng.normal(0, rng.uniform(low, high), (*x.size[::-1], 3))
    return Image.fromarray(u.clip(0, 255).astype('uint8'))


def fading(x, rng):
    """An old print: contrast lost, unlike in the three colours, towards a cast."""
    keep, cast = rng.uniform(.2, .7) * rng.uniform(.7, 1, 3), rng.uniform(120, 230, 3)
    return Image.fromarray((cast + keep * (np.asarray(x) - cast)).clip(0, 255).astype('uint8'))


def grey(x, rng):
    """All colour lost, and some of the light."""
    light = rng.uniform(.6, 1)
    return x.convert('L').point(lambda v: v * light).convert('RGB')


def scratches(x, rng, low=4, high=13):
    """Straight ones, bright, dark or of a colour."""
    x, n = x.copy(), x.width
    for _ in range(rng.integers(low, high)):
        ImageDraw.Draw(x).line([tuple(rng.uniform(-.2 * n, 1.2 * n, 2)) for _ in range(2)],
                               tuple(map(int, rng.integers(0, 256, 3))), int(rng.integers(1, 3)))
    return x


def text(x, rng):
    """Three lines of letters across the image, in one colour."""
    x, font, fill = x.copy(), ImageFont.load_default(11), tuple(map(int, rng.integers(0, 256, 3)))
    for row in range(3):
        letters = ''.join(map(chr, rng.integers(ord('A'), ord('Z') + 1, 8)))
        ImageDraw.Draw(x).text((rng.uniform(-8, 2), 11 * row + rng.uniform(-4, 0)), letters, fill,
                               font)
    return x


def prints(x, rng):
    """Old prints: all of blur, fading, noise and scratches, but for fading less of each."""
    x = fading(blur(x, rng, .3, 1.2), rng)
    return scratches(noise(x, rng, 5, 25), rng, 2, 7)


OPERATORS = {'blur': blur, 'noise': noise, 'fading': fading, 'grey': grey, 'scratches': scratches,
             'text': text}


def faces(part, a):
    """The faces of one part, 32 x 32."""
    stream, n, some = PARTS[part]
    if not a.faces:
        return [Image.fromarray(u.permute(1, 2, 0).numpy())
                for u in data.draw_faces(n, 32, stream)[0]]
    files = data.image_files(a.images if part == 'images' else a.faces)
    files = np.random.default_rng(0).permutation(files)[some]
    return [Image.fromarray(data.read_square(f, 32)) for f in files]


def write_folders(name, a):
    """One degradation's folders, unless they are there; the clean images are the same for all."""
    def keep(x, rng):
        return x
    root, clean, spoil = a.runs / 'data' / name, a.runs / 'data/images', a.operators[name]
    for folder, part, degrade in (
            (clean, 'images', keep), (root / 'measurements', 'measurements', spoil),
            *((root / part / side, part, degrade) for part in ('paired', 'test')
              for side, degrade in (('x', keep), ('y', spoil)))):
        if not folder.exists():
            folder.mkdir(parents=True)
            rng = np.random.default_rng(PARTS[part][0])
            for i, face in enumerate(faces(part, a)):
                degrade(face, rng).save(folder / f'{i:05d}.png')
    if not (root / 'images').exists():
        (root / 'images').symlink_to(clean.resolve())
    return root


def run(name, a):
    """One degradation -> PSNR of the measurements, {method: {seed: scores}}, test pictures."""
    root, first = write_folders(name, a), a.runs / next(iter(a.operators))
    x, y = (torch.stack([data.read_whole(f, 32) for f in data.image_files(root / 'test' / k)])
            for k in 'xy')
    i, j = (a.each * (list(a.operators).index(name) + k) for k in (0, 1))
    shown, pictures = data.image_files(root / 'test/y')[i:j], {'measurement': y[i:j]}
    scores = {}
    for called in [*METHODS, *WEAKER * bool(a.faces), *LONGER * a.prints]:
        method, *flags = called.split()
        out = a.runs / name / (called.replace(' ', '-') if flags else '')
        if not (out / 'metrics.json').exists():
            prior = ['--prior', str(first)] if out != first else []
            sud2.main(sud2.parse(['--task', 'custom', '--data', str(root), '--out', str(out),
                                  *flags, *prior, '--method', *([method] if flags else METHODS),
                                  '--seed', '0', '1', '2']))
        scores[called] = json.loads((out / 'metrics.json').read_text())['methods'][method]
        for s in scores[called].values():
            del s['curve']
        restored = out / 'restored' / method
        with contextlib.redirect_stdout(None):
            sud2.main(sud2.parse(['--restore', *map(str, shown), '--out', str(restored),
                                  '--checkpoint', str(out / f'{method}-s0.pt')]))
        pictures[called] = [data.read_whole(restored / f.name, 32) for f in shown]
    psnr = metrics.psnr(data.to_float(y), data.to_float(x), data_range=2).mean().item()
    return psnr, scores, {**pictures, 'truth': x[i:j]}


def table_of(done):
    """Markdown table, a row a degradation: means over seeds of PSNR and, in brackets, FD-prior."""
    methods = next(iter(done.values()))['methods']
    rows = ['| | measurement | supervised, best | ' + ' | '.join(methods) + ' |',
            '|---|' + '---:|' * (2 + len(methods))]
    for name, d in done.items():
        def mean(m, key, scores=d['methods']):
            return statistics.mean(s[key] for s in scores[m].values())
        cells = [f'{mean(m, "psnr"):.2f} ({mean(m, "fd_prior"):.2f})' for m in methods]
        plain = f'{d["measurement_psnr"]:.2f}', f'{mean("supervised", "best_psnr"):.2f}'
        rows.append(f'| {" | ".join([name, *plain, *cells])} |')
    return '\n'.join(rows)


def picture(rows, path, names, each):
    """sud2's grid with a heading over every `each` columns: the degradations' names."""
    sud2.grid(rows, path, columns=each * len(names))
    sheet = Image.open(path)
    headed = Image.new('RGB', (sheet.width, sheet.height + 20), 'white')
    headed.paste(sheet, (0, 20))
    for k, name in enumerate(names):
        middle = sheet.width - (len(names) - k - .5) * each * 100           # 96 pixels and a gap
        ImageDraw.Draw(headed).text((middle, 12), name, 'black', ImageFont.load_default(16),
                                    anchor='mm')
    headed.save(path)


def main():
    p = argparse.ArgumentParser(description='Other degradations, as custom tasks of sud2.')
    p.add_argument('--faces', metavar='DIR', help='real faces in place of drawn ones')
    p.add_argument('--images', metavar='DIR', help='other real faces, for U_x')
    p.add_argument('--prints', action='store_true', help='four degradations together')
    a = p.parse_args()
    name = ('prints' if a.prints else 'operators') + '-real' * bool(a.faces)
    a.operators = {'prints': prints} if a.prints else OPERATORS
    a.runs, a.each, done, rows = Path('runs') / name, 10 if a.prints else 2, {}, {}
    for operator in a.operators:
        psnr, methods, pictures = run(operator, a)
        done[operator] = {'measurement_psnr': psnr, 'methods': methods}
        for row, images in pictures.items():
            rows.setdefault(row, []).extend(images)
    print(table_of(done))
    picture(rows, (a.runs if a.faces else ROOT / 'assets') / f'{name}.png', a.operators, a.each)
    sud2.write_json(ROOT / 'results' / f'{name}.json', {
        'command': ' '.join(['python benchmarks/operators.py', *sys.argv[1:]]), 'operators': done,
        'environment': {'torch': torch.__version__, 'processor': sud2.processor(),
                        'threads': torch.get_num_threads()}})


if __name__ == '__main__':
    main()
