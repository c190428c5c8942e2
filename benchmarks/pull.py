# SPDX-License-Identifier: MIT
"""What a pull knows of the error -> results/pull.json, and a table for results/ABLATIONS.md.

    python benchmarks/pull.py --prior runs/inpaint [--steps 400]

L_denoiser moves f(y) against a pull: f - D_x(f + ν) for SUD and its R(F(f)), D^f - D^x for sud2-kl.
It helps as far as it points along the error f(y) - x, which the drawn faces know. Measured on the
1,000 measurements, for the finished run's supervised network of seed 0, whose outputs D^f learns
in as many steps as a run has updates: the cosine between pull and error over all pixels, and the
correlation, over images and colours, of their means in the hole: the tone, half of the error.
"""
import argparse
import copy
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import ddpm  # noqa: E402
import sud2  # noqa: E402

TIMES = (20, 80, 200, 300, 450)


def trained_along(run, prior, x_hat, steps):
    """D^f: the prior, trained for so many steps on reconstructions x_hat that stay as they are."""
    fake, g = copy.deepcopy(prior).requires_grad_(), torch.Generator().manual_seed(0)
    opt = sud2.Muon(fake, run.a.kl_lr)
    for _ in range(steps):
        batch = x_hat[sud2.draw_batch(g, len(x_hat), run.a.batch)[0]]
        with run.amp():
            loss = sud2.entropy_label(batch, prior, fake, run.a, run.acp, g)[1]
        sud2.descend(loss, fake, opt, run.a.kl_lr)
    return fake


def agreement(pull, error, hole):
    """-> cosine over all pixels, correlation of the means in the hole."""
    def tone(u):
        return (u * hole).sum((2, 3)) / hole.sum((2, 3))
    corr = torch.corrcoef(torch.stack([tone(pull).flatten(), tone(error).flatten()]))[0, 1]
    return torch.cosine_similarity(pull.flatten(), error.flatten(), 0).item(), corr.item()


def table_of(rows):
    """Markdown table, a row a time."""
    lines = [f'| {t} | ' + ' | '.join(f'{v:+.2f}' for pair in row.values() for v in pair) + ' |'
             for t, row in rows.items()]
    return '\n'.join(['| t | SUD: cosine | tone | sud2-kl: cosine | tone |',
                      '|---:|---:|---:|---:|---:|', *lines])


def main():
    p = argparse.ArgumentParser(allow_abbrev=False)
    p.add_argument('--prior', required=True, metavar='DIR', help='a finished run')
    p.add_argument('--steps', type=int, default=400)
    a = p.parse_args()
    run = sud2.Setup(sud2.parse(['--prior', a.prior]))
    split, prior = sud2.load_split(run.a, 0).to(run.device), sud2.train_prior(run, None, 'prior')[0]
    f = run.net(0, residual=True)
    f.load_state_dict(sud2.load(Path(a.prior) / 'supervised-s0.pt', {})['parts']['f'])
    x_hat = sud2.reconstruct(run, f, split.measurements)[0]
    error = x_hat - data.to_float(split.measurements_x)
    hole = (split.measurements == 128).all(1, keepdim=True).float()
    fake, rows = trained_along(run, prior, x_hat, a.steps), {}

    def denoised(net, t):
        """E[x_0 | x_t] by net, with the same noise for every net."""
        out, g = [], torch.Generator().manual_seed(t)
        for chunk in x_hat.split(50):
            times = torch.full((len(chunk),), t)
            x_t = ddpm.add_noise(chunk, times, ddpm.noise_like(chunk, g), run.acp)
            with torch.no_grad(), run.amp():
                out.append(ddpm.predict_x0(x_t, times, net(x_t, times).float(), run.acp, False))
        return torch.cat(out)
    for t in TIMES:
        D_x, D_f = denoised(prior, t), denoised(fake, t)
        rows[t] = {'sud': agreement(x_hat - D_x, error, hole),
                   'sud2-kl': agreement(D_f - D_x, error, hole)}
        print(t, rows[t], flush=True)
    share = ((error * hole).sum((2, 3)) / hole.sum((2, 3))).square().mean() / (
        (error.square() * hole).sum() / hole.sum() / 3)
    sud2.write_json(ROOT / 'results' / 'pull.json', {
        'command': 'python benchmarks/pull.py ' + ' '.join(sys.argv[1:]),
        'tone_share_of_the_error': share.item(), 'cosine_and_tone_correlation': rows,
        'environment': {'torch': torch.__version__, 'processor': sud2.processor(),
                        'threads': torch.get_num_threads()}})
    print(table_of(rows))


if __name__ == '__main__':
    main()
