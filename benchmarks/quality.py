# SPDX-License-Identifier: MIT
"""Time to quality -> results/bench-quality.json, assets/quality.png.

    pip install -r benchmarks/requirements.txt
    python benchmarks/quality.py --prior runs/inpaint [--seconds 120]

A DDPM is trained from nothing on the drawn faces, 32x32, batch 32: ours as `sud2.py` does it, in
bf16 and in fp32; a plain U-Net of as many parameters in its place, bf16 too; and
denoising-diffusion-pytorch and diffusers in fp32, as they come, with the optimiser of their own
loops (Adam at 8e-5; AdamW at 1e-4, its warm-up cut to 50 steps). All
predict noise in DDPM's linear schedule, with the same averaging of weights. Quality is the loss on
256 held-out faces, at fixed times and with fixed noise, and the Fréchet distance of 256 samples
(10 steps of R from noise) to them, on the features of the finished prior in --prior; scoring is
not counted in the time. Ours and the plain U-Net train for about --seconds in bf16, ours as many
steps in fp32; the peers until they reach ours' last loss and distance, and at most three times as
long.
"""
import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'benchmarks')]
import speed  # noqa: E402

import data  # noqa: E402
import ddpm  # noqa: E402
import metrics  # noqa: E402
import sud2  # noqa: E402
import unet  # noqa: E402


class PlainUNet(nn.Module):
    """What UNet would be without its savings: full resolution, two blocks a level each way,
    concatenated skips, 3x3 convolutions throughout. (B, 3, H, W), t (B,) -> (B, 3, H, W)."""

    def __init__(self, channels=32, mults=(1, 2, 4)):
        super().__init__()
        widths, dim = [channels * m for m in mults], 4 * channels
        self.channels, finer = channels, list(zip(widths, widths[1:]))
        self.embed = nn.Sequential(nn.Linear(channels, dim), nn.SiLU(), nn.Linear(dim, dim),
                                   nn.SiLU())
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in finer)
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in finer)
        self.join = nn.ModuleList(nn.Conv2d(2 * a, a, 3, padding=1) for a, _ in finer)
        self.encoder, self.decoder = (nn.ModuleList(nn.ModuleList(
            [unet.Block(w, dim), unet.Block(w, dim)]) for w in widths) for _ in range(2))
        self.attention, self.norm = unet.Attention(widths[-1]), unet.group_norm(channels)
        self.head = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, x, t):
        emb, h, skips = self.embed(unet.time_embedding(t, self.channels)), self.stem(x), []
        for i, blocks in enumerate(self.encoder):
            h = self.down[i - 1](h) if i else h
            for block in blocks:
                h = block(h, emb)
            skips.append(h)
        h = self.attention(h)
        for i, blocks in reversed(list(enumerate(self.decoder))):
            if i < len(self.up):
                h = self.join[i](torch.cat([self.up[i](h), skips[i]], 1))
            for block in blocks:
                h = block(h, emb)
        return self.head(nn.functional.silu(self.norm(h))).float()


def contender(name, run, images, steps):
    """-> (averaged network, function that takes one training step)."""
    acp, g = run.acp, torch.Generator().manual_seed(0)
    ours = name not in speed.PEERS[1:]
    net = PlainUNet() if name == 'plain U-Net' else speed.network(name.split(',')[0], 32)
    net = net.to(memory_format=torch.channels_last) if ours else net
    ema = copy.deepcopy(net).requires_grad_(False)
    opt = (sud2.Muon(net, run.a.prior_lr) if ours else
           torch.optim.AdamW(net.parameters(), 1e-4) if name == 'diffusers' else
           torch.optim.Adam(net.parameters(), 8e-5))

    def step(k):
        index, flip = sud2.draw_batch(g, len(images), 32)
        x = sud2.batch_of(images, index, flip)
        t = (sud2.prior_times(1000, 32, g, run.device) if ours else
             torch.randint(1000, (32,), generator=g))
        with torch.autocast('cpu', torch.bfloat16, enabled=name in ('sud2', 'plain U-Net')):
            loss = ddpm.ddpm_loss(net, x, t, ddpm.noise_like(x, g), acp)
        lr = (run.a.prior_lr * sud2.learning_rate(k, steps) if ours else
              1e-4 * min(1, (k + 1) / 50) if name == 'diffusers' else 8e-5)
        sud2.descend(loss, net, opt, lr)
        ddpm.ema_update(ema, net, min(.995, (k + 1) / (k + 10)))
    return ema, step


def score(run, ema, held, features, prior):
    """-> held-out loss, Fréchet distance of samples."""
    x_T = torch.randn(256, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with run.amp():
        samples = torch.cat([ddpm.R(ema, x, 999, run.acp, steps=10) for x in x_T.split(64)])
    loss = sud2.held_out_loss(run, ema, held)
    return loss, metrics.frechet_distance(sud2.prior_features(run, prior, samples), features)


def pace(name, run, images):
    """Seconds a step, by which the cosine of the learning rate is planned."""
    _, step = contender(name, run, images, 1000)
    seconds = []
    for k in range(8):
        began = time.perf_counter()
        step(k)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def train(name, run, images, held, features, prior, limit, steps, goal):
    """Trains one contender -> [{seconds, steps, loss, fd}, ...] at 8 times."""
    ema, step = contender(name, run, images, steps)
    curve, seconds, k = [], 0.0, 0
    while seconds < limit and (steps is None or k < steps):
        began = time.perf_counter()
        step(k)
        seconds, k = seconds + time.perf_counter() - began, k + 1
        if seconds > limit / 8 * (len(curve) + 1) or k == steps:
            loss, fd = score(run, ema, held, features, prior)
            curve.append({'seconds': seconds, 'steps': k, 'loss': loss, 'fd': fd})
            print(f'{name:>28} {seconds:6.1f} s  {k:5d} steps  loss {loss:.4f}  fd {fd:.3f}',
                  flush=True)
            if goal and loss <= goal[0] and fd <= goal[1]:
                break
    return curve


def panels_of(curves):
    """What is plotted: both qualities against seconds of training."""
    return [(title, 'seconds of training', '', {
        n: [[(c['seconds'], c[key]) for c in curve if c['loss'] < .3]]
        for n, curve in curves.items()})
        for key, title in (('loss', 'Held-out loss'), ('fd', 'Frechet distance of samples'))]


def main():
    p = argparse.ArgumentParser(allow_abbrev=False)
    p.add_argument('--prior', required=True, metavar='DIR', help='a finished run')
    p.add_argument('--seconds', type=float, default=120)
    a = p.parse_args()
    run = sud2.Setup(sud2.parse(['--prior', a.prior]))
    prior = sud2.train_prior(run, None, 'prior')[0]
    images, held = (data.draw_faces(n, 32, seed)[0] for n, seed in ((12500, 0), (256, 2)))
    features = sud2.prior_features(run, prior, data.to_float(held))
    goal, curves, peers = None, {}, speed.PEERS[1:]
    steps = {n: round(a.seconds / pace(n, run, images)) for n in ('sud2', 'plain U-Net')}
    steps['sud2, fp32'] = steps['sud2']
    for name, times in (('sud2', 1.2), ('plain U-Net', 1.2), ('sud2, fp32', 2.4),
                        *((n, 3) for n in peers)):
        limit = times * (curves['sud2'][-1]['seconds'] if name in peers else a.seconds)
        curves[name] = train(name, run, images, held, features, prior, limit, steps.get(name),
                             goal if name in peers else None)
        goal = goal or (curves['sud2'][-1]['loss'], curves['sud2'][-1]['fd'])
    sud2.write_json(ROOT / 'results' / 'bench-quality.json', {
        'command': 'python benchmarks/quality.py ' + ' '.join(sys.argv[1:]), 'curves': curves,
        'environment': {'torch': torch.__version__, 'processor': sud2.processor(),
                        'threads': torch.get_num_threads()}})
    sud2.plot(panels_of(curves), ROOT / 'assets' / 'quality.png')


if __name__ == '__main__':
    main()
