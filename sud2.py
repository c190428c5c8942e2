#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""SUD²: few-shot, semi-supervised image reconstruction with an unknown forward model.

Chan, Young, Metzler: SUD²: Supervision by Denoising Diffusion Models for Image Reconstruction
(2023). Read it in the paper's order: losses, the training loop, evaluation; then come pictures,
what a run rests on, and the command line. Images are float (B, C, H, W) in [-1, 1] inside;
equation numbers are the workshop paper's.
"""
import argparse
import contextlib
import functools
import hashlib
import json
import math
import os
import platform
import shlex
import signal
import sys
import time
from collections import namedtuple
from pathlib import Path


def load_libraries():
    """Imports what takes a second, so that --help and a mistyped flag answer at once."""
    global copy, np, torch, Image, ImageDraw, ImageFont, ImageOps, Muon, UNet
    global cyclegan, data, ddpm, metrics
    import copy

    import numpy as np
    import torch
    from PIL import Image, ImageDraw, ImageFont, ImageOps

    import cyclegan
    import data
    import ddpm
    import metrics
    from unet import Muon, UNet


# ---------------------------------------------------------------------------- losses
# Dev. 1: means over pixels and images where the paper sums over pixels; λ1 and λ2 are rescaled.

def paired_loss(x_hat, x):
    """L_paired: mean squared error of f(y_p) against x_p, both (B, C, H, W); a scalar."""
    return (x - x_hat).square().mean()                              # Eq. (1)


def denoiser_loss(x_hat, label):
    """L_denoiser: mean squared distance of f(y_u) to its pseudo-label, both (B, C, H, W); a scalar.

    The pseudo-label is fixed: its gradient in f(y_u) is (3), whatever made the label.
    """
    return (x_hat - label.detach()).square().mean()                 # Eq. (2)


def reg_loss(z, form='signed'):
    """L_reg: cov(A, B) / (σ_A σ_B), mean over all pairs of latents z (B, ...) of a mini-batch."""
    return metrics.correlation(z, form)                             # Dev. 2


def total_loss(paired, denoiser, reg, lam1, lam2):
    """The loss that f is trained with."""
    return paired + lam1 * denoiser + lam2 * reg                    # Eq. (8)


Method = namedtuple('Method', [
    'label',        # what makes the pseudo-label; None: there is no L_denoiser
    'source',       # whose reconstruction it starts from: that of f, an ensemble, a teacher
    'lam1',         # λ1 where it is not the flag's
    'times',        # or how many times the flag's
    'reg',          # whether L_reg is on
    'clean',        # what stands for y in the pairs that f learns from clean images
], defaults=('f', None, 1, False, None))
METHODS = {
    'supervised': Method(None),
    'cyclegan': Method(None),                                       # trained in a loop of its own
    'cyclegan-ssl': Method('CycleGAN', lam1=1.0),
    'sud': Method('denoise'),
    'sud-te': Method('denoise', source='ensemble'),
    'sud-mt': Method('denoise', source='teacher'),
    'sud+reg': Method('denoise', reg=True),
    'sud+reg+noise': Method('noise, denoise', reg=True),
    'sud2': Method('R∘F', reg=True),
    'sud2-kl': Method('entropy', clean='x_u'),                      # not in the paper
    'sud2-kl+g': Method('entropy', times=5, clean='g(x_u)'),        # not in the paper
    'oracle': Method('truth', lam1=1.0),
}
G_LEARNS = 100          # updates until what g leaves of a measurement tells of it, not of g
ENDLESS = 'denoise', 'noise, denoise', 'R∘F'    # labels whose pull goes on where f is right
Models = namedtuple('Models', 'prior denoiser gan', defaults=(None, None))   # frozen; None: unused


def pseudo_label(kind, x_hat, y_u, x_u, models, a, acp, g):
    """The image (B, C, H, W) that f(y_u) is pulled to, made from x_hat, no gradient.

    x_hat is f(y_u) itself, or its ensemble's or teacher's; x_u, the truth, is the oracle's alone.
    """
    if kind == 'truth':
        return x_u
    if kind == 'R∘F':                                               # Sec. 3.1, Dev. 4
        return ddpm.R_of_F(models.prior, x_hat, a.t_start, acp, steps=a.r_steps, eta=a.eta,
                           generator=g)
    nu = a.sigma * ddpm.noise_like(x_hat, g) if kind == 'noise, denoise' else 0
    with torch.no_grad():
        if kind == 'CycleGAN':
            return models.gan.to_x(y_u)
        return models.denoiser(x_hat + nu)                          # Eq. (9), Dev. 7


def entropy_label(x_hat, prior, fake, a, acp, g, bias=None):
    """Not in the paper: the pseudo-label of sud2-kl, and the loss that trains D^f along.

    What (4) lacks is the entropy of the outputs: KL(p_{f+ν} ‖ p_{x+ν}) = H(p_{f+ν}, p_{x+ν}) -
    H(p_{f+ν}). Tweedie's formula (6) on both distributions gives its gradient in f(y_u), up to
    1 / σ²: D^f(f + ν) - D^x(f + ν). D^x is the prior; D^f, `fake`, starts as the prior and learns
    the outputs themselves. Where the two agree nothing is pulled: no collapse to a mode, and no
    drift of what is right already. With `bias`, that of D^x from `tone_bias`, both are freed of
    theirs. Outputs (B, C, H, W), a scalar.
    """
    x_hat = x_hat.detach()
    t = draw_times(*a.kl_range, len(x_hat), g, x_hat.device)
    eps = ddpm.noise_like(x_hat, g)
    x_t = ddpm.add_noise(x_hat, t, eps, acp)
    eps_f = fake(x_t, t).float()
    with torch.no_grad():
        D_f = ddpm.predict_x0(x_t, t, eps_f, acp, clip=False)
        D_x = ddpm.predict_x0(x_t, t, prior(x_t, t).float(), acp, clip=False)
        if bias is not None:
            own = (D_f - x_hat).mean((0, 2, 3), keepdim=True)
            D_f, D_x = D_f - Group.mean({'bias': own})['bias'], D_x - bias
    return x_hat - (D_f - D_x), (eps_f - eps).square().mean()


def tone_bias(run, prior, images):
    """Not in the paper: the mean of D^x(x + ν) - x over clean images -> (1, C, 1, 1).

    An ideal denoiser keeps the mean: E[D^x(x + ν)] = E[x]. A trained one is off by thousandths, in
    every update the same way, in the overall tone, in which the prior hardly pulls back: f drifts
    far where nothing else holds the tone.
    """
    g, errors = generators(0, run.device)[0], []
    for _ in range(math.ceil(1024 / run.a.batch)):
        x = Group.own(clean_batch(run, images, g, run.a.batch))
        t = draw_times(*run.a.kl_range, len(x), g, run.device)
        nu = ddpm.noise_like(x, g)
        for eps in (nu, -nu):                           # whose own mean would blur the result
            x_t = ddpm.add_noise(x, t, eps, run.acp)
            with torch.no_grad(), run.amp():
                D_x = ddpm.predict_x0(x_t, t, prior(x_t, t).float(), run.acp, clip=False)
            errors.append((D_x - x).mean((0, 2, 3), keepdim=True))
    return Group.mean({'bias': torch.stack(errors).mean(0)})['bias']


def change(x, y):
    """Not in the paper: what the degradation does to most pixels: the median of y - x over an
    image's pixels, (B, C, H, W) -> (B, C, 1, 1); 0 where it leaves more than half of them alone."""
    return (y - x).flatten(2).median(2).values[..., None, None]


def measured(g, x, c):
    """Not in the paper: a measurement (B, C, H, W) of images x like it, by the learnt operator g.

    The forward operator 𝓕 is unknown but is a function, from images to measurements, and examples
    of it are at hand: the pairs, and f(y_u) with y_u. The U-Net g learns it from both, and turns
    clean images x_u into as many pairs (g(x_u), x_u) for f: back-translation, as Sennrich et al.
    2016 call it between languages. Where 𝓕 depends on more than the image, as haze does, c, the
    `change` seen in an example, tells g of it, and x_u gets that of some measurement. g's output
    is x, covered: the net gives what covers and, through a sigmoid, how much. Under a share of 1
    nothing of x is left, where a sum would leave a trace that f learns to read.
    """
    cover, share = g(torch.cat([x, c.expand_as(x)], 1)).float().chunk(2, 1)
    return torch.lerp(x, cover, torch.sigmoid(4 * share - 2))       # starts near the identity


# ---------------------------------------------------------------------------- training
def train(run, method, seed, split, models, score):
    """Trains f with one method -> (f, curve, seconds). The loop is the same for all of them."""
    a, m = run.a, METHODS[method]
    most, lam2, lam3 = weights = (m.times * a.lam1 if m.lam1 is None else m.lam1,
                                  a.lam2 if m.reg else 0, a.lam3 if m.clean else 0)
    f = run.net(seed, residual=True)                                # Dev. 6
    opt = Muon(f, a.lr)                                             # Dev. 9
    mean = copy.deepcopy(f)                                         # of its weights, in time
    paired, curve = generators(100 * seed, run.device)[0], []
    unpaired = Unpaired(run, m, seed, split, models, f)

    def schedule(step):                         # what differs from one update to the next
        falls = learning_rate(step, a.updates)
        endless = falls * min(1, 400 / a.updates)   # many pulls add up to no more than 400 do
        ramp = 1 if m.source == 'f' else ramp_up(step - a.warmup, .2 * a.updates)
        n = step + 2 - a.average_from                   # how many updates' weights are averaged
        return {'lr': a.lr * falls, 'decay': teacher_decay(step), 'keeps': 1 - 1 / max(1, n),
                'lam1': ramp * (endless if m.label in ENDLESS else 1) * most,   # Dev. 10
                'with_unpaired': bool(m.label and any(weights) and step >= a.warmup),
                'with_rest': m.clean == 'g(x_u)' and step >= a.warmup + G_LEARNS,
                # g holds f; else f wanders, for Muon's steps are always long
                'averages': n > 0 and m.clean != 'g(x_u)'}                      # Dev. 11

    def update(lr, decay, keeps, lam1, with_unpaired, with_rest, averages):
        x, y = pairs_batch(run, split, paired)
        with run.amp():
            x_hat = f(y)
        numbers = {'paired': paired_loss(x_hat, x)}
        loss = numbers['paired']
        if with_unpaired:                                           # Dev. 3
            numbers |= unpaired.losses(x, y, with_rest)
            loss = total_loss(loss, numbers['denoiser'], numbers['reg'], lam1, lam2)
            loss = loss + lam3 * numbers['clean'] if m.clean else loss
        descend(loss, f, opt, lr)
        if averages:
            ddpm.ema_update(mean, f, keeps)
            ddpm.ema_update(f, mean, .97)
        if m.source == 'teacher':
            ddpm.ema_update(unpaired.teacher, f, decay)
        return {k: v.detach() for k, v in numbers.items()}

    parts = {'f': f, 'mean': mean, 'opt': opt, 'paired': paired, 'curve': curve, **unpaired.parts}
    seconds = fit(run, f'{method}-s{seed}', parts, recorded(update, parts, run.device), schedule,
                  a.updates, ['f', 'curve'], {'kind': 'reconstructor', 'method': method},
                  lambda step: note_score(a, curve, step, a.updates, score, f))
    return f, curve, seconds


class Unpaired:
    """The losses on unpaired images, and what a method trains or keeps for them beside f: D^f and
    g with their optimisers, an ensemble of outputs or a mean teacher. `parts` is all of it."""

    def __init__(self, run, method, seed, split, models, f):
        self.run, self.method, self.split, self.models, self.f = run, method, split, models, f
        _, self.draws, self.noise = generators(100 * seed, run.device)
        self.parts = {'unpaired': self.draws, 'noise': self.noise}
        if method.label == 'entropy':
            self.fake = copy.deepcopy(models.prior).requires_grad_()
            self.fake_opt = Muon(self.fake, run.a.kl_lr)
            x, y = (data.to_float(u[:64]) for u in (split.pairs_x, split.pairs_y))
            free = change(x, y).any()       # else most pixels stay as they are and hold the tone
            self.bias = tone_bias(run, models.prior, split.images) if free else None
            self.parts |= {'fake': self.fake, 'fake_opt': self.fake_opt}
        if method.clean == 'g(x_u)':
            self.g = run.net(seed, images=2, shrink=2)
            self.g_opt = Muon(self.g, run.a.kl_lr)
            self.parts |= {'g': self.g, 'g_opt': self.g_opt}
        if method.source == 'ensemble':
            n, *shape = split.measurements.shape
            self.ensemble = self.parts['ensemble'] = Ensemble(n, shape, run.device)
        if method.source == 'teacher':
            self.teacher = self.parts['teacher'] = copy.deepcopy(f).requires_grad_(False)

    def start(self, x_hat, y_u, flip, index):
        """What the pseudo-label is made from: f(y_u), its ensemble's or the teacher's output."""
        if self.method.source == 'teacher':
            return self.teacher(y_u)
        if self.method.source == 'ensemble':
            everyone = self.ensemble.update(index, Group.gather(mirrored(x_hat, flip)))
            return mirrored(Group.own(everyone), flip)
        return x_hat

    def losses(self, x, y, with_rest):
        """One mini-batch of measurements -> L_denoiser, L_reg and, where the method has them,
        L_paired on pairs of clean images. D^f and g take a step; x, y are this update's pairs."""
        run, a, (label, *_), split = self.run, self.run.a, self.method, self.split
        drawn, flips = draw_batch(self.draws, len(split.measurements), a.batch)
        index, flip = Group.own(drawn), Group.own(flips)
        y_u = batch_of(split.measurements, index, flip)
        x_u = batch_of(split.measurements_x, index, flip) if label == 'truth' else None
        with run.amp():
            x_hat, z = self.f(y_u, latent=True)
            start = self.start(x_hat.detach(), y_u, flip, drawn)
            if label == 'entropy':
                target, fake_loss = entropy_label(start, self.models.prior, self.fake, a, run.acp,
                                                  self.noise, self.bias)
            else:
                target = pseudo_label(label, start, y_u, x_u, self.models, a, run.acp, self.noise)
        if label == 'entropy':
            descend(fake_loss, self.fake, self.fake_opt, a.kl_lr)
        losses = {'denoiser': denoiser_loss(x_hat, target), 'reg': reg_loss(Group.gather(z), a.reg),
                  'corr': metrics.correlation(x_hat)}
        if self.method.clean:
            losses['clean'] = self.clean_loss(x, y, x_hat.detach(), y_u, with_rest)
        return losses

    def clean_loss(self, x, y, x_hat, y_u, with_rest):
        """Not in the paper: L_paired on pairs made of clean images: (x_u, x_u), since f has nothing
        to undo in a clean image, or (g(x_u), x_u), where g learns from the pairs and from f. What
        differs at random, as noise or scratches do, g cannot know: where it leaves more than a
        tenth of the change that f undoes, a made measurement gets that rest, y_u - g(f(y_u))."""
        run, images = self.run, self.split.images
        if self.method.clean == 'x_u':      # a few do as well as many; they go to every process
            x_u = clean_batch(run, images, self.draws, max(1, run.a.batch // 4))
            with run.amp():
                return paired_loss(self.f(x_u), x_u)
        x_u = Group.own(clean_batch(run, images, self.draws, run.a.batch))
        known, shown = torch.cat([x, x_hat]), torch.cat([y, y_u])
        c = change(known, shown)
        with run.amp():
            y_hat = measured(self.g, known, c).tensor_split([len(x)])
            with torch.no_grad():
                made = measured(self.g, x_u, c[len(x):])
                if with_rest:
                    rest, undone = y_u - y_hat[1], y_u - x_hat
                    energy = Group.mean({'rest': rest.square().mean(),
                                         'undone': undone.square().mean()})
                    made += (energy['rest'] > .1 * energy['undone']) * rest
            loss = paired_loss(self.f(made), x_u)
        descend(paired_loss(y_hat[0], y) + paired_loss(y_hat[1], y_u), self.g, self.g_opt,
                run.a.kl_lr)
        return loss


class Ensemble:
    """Temporal ensembling (Laine & Aila 2017) of f's outputs on each of n measurements."""

    def __init__(self, n, shape, device, alpha=.6):
        self.alpha, self.Z = alpha, torch.zeros(n, *shape, device=device)
        self.visits = torch.zeros(n, device=device)

    def update(self, index, x_hat):
        """Z <- αZ + (1 - α) x_hat (B, C, H, W) at index (B,) -> Z / (1 - α^visits)."""
        for i, z in zip(index.split(1), torch.lerp(x_hat.float(), self.Z[index], self.alpha)):
            self.Z.index_copy_(0, i, z[None])   # in turn: an image may be drawn twice
        self.visits[index] += 1
        return self.Z[index] / (1 - self.alpha ** self.visits[index]).view(-1, 1, 1, 1)

    def state_dict(self):
        return {'Z': self.Z, 'visits': self.visits}

    def load_state_dict(self, state):
        self.Z.copy_(state['Z'])
        self.visits.copy_(state['visits'])


def ramp_up(step, length):
    """Weight of an ensemble's or a teacher's label: exp(-5 (1 - t)²), reaches 1 at `length`."""
    return math.exp(-5 * (1 - min(1, step / max(1, length))) ** 2)


def teacher_decay(step):
    """Decay of the mean teacher's weights (Tarvainen & Valpola 2017): their mean at first."""
    return min(1 - 1 / (step + 1), .999)


def pairs_batch(run, split, g):
    """Pairs x, y (B, C, H, W) of one update, mirrored and shifted alike; of few pairs, all."""
    n, a = len(split.pairs_x), run.a
    index, flip = draw_batch(g, n, a.batch)
    if n <= a.batch:
        index, flip = torch.arange(n, device=index.device), flip[:n]
    both = torch.cat([batch_of(u, index, flip) for u in (split.pairs_x, split.pairs_y)], 1)
    x, y = shifted(both, a.shift, g).chunk(2, 1)
    return (x, y) if n <= a.batch else (Group.own(x), Group.own(y))  # few go to every process


def clean_batch(run, images, g, size):
    """A mini-batch of clean images (size, C, H, W), mirrored and, where the DDPM would see each of
    them more than 100 times, shifted: a few are then learnt less by heart."""
    x = batch_of(images, *draw_batch(g, len(images), size))
    few = run.a.prior_steps * run.a.prior_batch > 100 * len(images)
    return shifted(x, run.a.shift if few else 0, g)


def batch_of(images, index, flip):
    """uint8 images at index (B,), mirrored where flip (B,) -> float (B, ...) in [-1, 1]."""
    return mirrored(data.to_float(images[index]), flip)


def mirrored(x, flip):
    """Images x (B, C, H, W), left and right swapped where flip (B,) is true."""
    return torch.where(flip.view(-1, 1, 1, 1), x.flip(-1), x)


def shifted(x, most, g):
    """Images x (B, C, H, W), each shifted at random by up to `most` pixels, reflected at the
    border: a few then show more places."""
    if not most:
        return x
    padded = torch.nn.functional.pad(x, (most,) * 4, mode='reflect')    # Dev. 5
    i, j = torch.randint(2 * most + 1, (len(x), 2), generator=g, device=g.device).T[:, :, None]
    rows, cols = (torch.arange(n, device=g.device) for n in x.shape[2:])
    moved = padded.permute(2, 3, 0, 1)[(i + rows)[:, :, None], (j + cols)[:, None],
                                       torch.arange(len(x), device=g.device)[:, None, None]]
    return moved.permute(0, 3, 1, 2).contiguous()


def draw_batch(g, n, size):
    """Random indices below n and coin flips for mirroring, (size,) each."""
    return (torch.randint(n, (size,), generator=g, device=g.device),
            torch.rand(size, generator=g, device=g.device) < .5)


def draw_times(low, high, n, g, device):
    """n random times t, low <= t < high, of this process."""
    return Group.own(torch.randint(low, high, (n * Group.world,), generator=g, device=device))


def prior_times(T, n, g, device):
    """n random times t < T that the DDPM learns, of this process: ln t ~ N(ln 120, 1.1²)."""
    ln_t = math.log(120) + 1.1 * torch.randn(n * Group.world, generator=g, device=device)
    return Group.own(ln_t.exp().clamp(max=T - 1).long())            # Dev. 8


def learning_rate(step, steps):
    """Factor of the learning rate: linear warm-up over 50 steps, or an eighth of fewer than 400,
    and a cosine down to 0."""
    warmup = min(50, steps / 8)
    return min(1, (step + 1) / warmup) * .5 * (1 + math.cos(math.pi * step / steps))


def descend(loss, net, opt, lr):
    """One clipped gradient step at learning rate lr."""
    for group in opt.param_groups:
        group['lr'] = lr
    opt.zero_grad()
    loss.backward()
    Group.average(opt)
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    opt.step()


def note_score(a, curve, step, steps, score, f):
    """Appends f's score to the curve at --points evenly spaced steps, the last one among them."""
    if (step + 1) * a.points // steps > step * a.points // steps:
        curve.append({'update': step + 1, **score(f)})


def steps_on(wanted, batch, n):
    """Training steps on n images; fewer than wanted where each of them would be seen more than 250
    times and be learnt by heart."""
    return max(1, min(wanted, 250 * n // batch))


def train_prior(run, images, which):
    """Trains the DDPM ('prior') or the Gaussian denoiser D_σ ('denoiser') on U_x -> (net, seconds).

    The weights returned are averaged over the steps (EMA). With --prior they are another run's.
    """
    a, diffusion = run.a, which == 'prior'
    net = run.net(0, time=diffusion, residual=not diffusion)
    ema = copy.deepcopy(net).requires_grad_(False)
    if a.prior:
        saved = load(Path(a.prior) / f'{which}.pt', {'kind': which, **run.about})
        if 'opt' in saved['parts']:
            raise ValueError(f'--prior {a.prior}: {which}.pt is not fully trained; repeat '
                             'the command that trains it')
        ema.load_state_dict(saved['parts']['ema'])
        return ema, saved['seconds']
    opt = Muon(net, a.prior_lr)
    draws, _, noise = generators(0, run.device)
    steps = steps_on(a.prior_steps if diffusion else a.denoiser_steps, a.prior_batch, len(images))

    def schedule(step):
        return {'lr': a.prior_lr * learning_rate(step, steps),
                'decay': min(.995, (step + 1) / (step + 10))}

    def update(lr, decay):
        x = Group.own(clean_batch(run, images, draws, a.prior_batch))
        with run.amp():
            if diffusion:
                t = prior_times(len(run.acp), len(x), noise, run.device)
                loss = ddpm.ddpm_loss(net, x, t, ddpm.noise_like(x, noise), run.acp)
            else:
                loss = ddpm.denoiser_loss(net, x, a.sigma, noise)
        descend(loss, net, opt, lr)
        ddpm.ema_update(ema, net, decay)
        return {'loss': loss.detach()}

    parts = {'net': net, 'ema': ema, 'opt': opt, 'draws': draws, 'noise': noise}
    return ema, fit(run, which, parts, recorded(update, parts, run.device), schedule, steps,
                    ['ema'], {'kind': which})


def train_cyclegan(run, seed, split, score):
    """Trains CycleGAN between U_y and U_x -> (gan, curve, seconds); gan.to_x reconstructs."""
    a, curve = run.a, []
    torch.manual_seed(seed)
    gan = cyclegan.CycleGAN(a.channels, *cyclegan.sizes(a.size))
    if a.gan_batch > Group.world:   # torch's InstanceNorm is wrong backwards on one such image
        gan = gan.to(memory_format=torch.channels_last)
    gan = gan.to(run.device)
    opt_G, opt_D = cyclegan.optimisers(gan)
    for opt in (opt_G, opt_D):
        opt.register_step_pre_hook(Group.average)
    draws, _, _ = generators(100 * seed, run.device)

    def schedule(step):
        return {'lr': opt_G.defaults['lr'] * cyclegan.linear_decay(step, a.gan_steps)}

    def update(lr):
        y, x = (batch_of(u, *map(Group.own, draw_batch(draws, len(u), a.gan_batch)))
                for u in (split.measurements, split.images))
        for opt in (opt_G, opt_D):
            opt.param_groups[0]['lr'] = lr
        with run.amp():
            return cyclegan.train_step(gan, opt_G, opt_D, y, x, draws)

    parts = {'gan': gan, 'opt_G': opt_G, 'opt_D': opt_D, 'draws': draws, 'pool_x': gan.pool_x,
             'pool_y': gan.pool_y, 'curve': curve}
    seconds = fit(run, f'cyclegan-s{seed}', parts, recorded(update, parts, run.device), schedule,
                  a.gan_steps, ['gan', 'curve'], {'kind': 'CycleGAN'},
                  lambda step: note_score(a, curve, step, a.gan_steps, score, gan.to_x))
    return gan, curve, seconds


# ---------------------------------------------------------------------------- evaluation
def held_out_loss(run, prior, images):
    """DDPM loss on images that it was not trained on, over a fixed grid of t with fixed noise."""
    g, losses = torch.Generator().manual_seed(0), []
    for chunk in data.to_float(images).split(64):
        t = torch.linspace(0, len(run.acp) - 1, len(chunk)).long().to(run.device)
        eps = ddpm.noise_like(chunk, g).to(run.device)
        with torch.no_grad(), run.amp():
            losses.append(ddpm.ddpm_loss(prior, chunk.to(run.device), t, eps, run.acp).item())
    return sum(losses) / len(losses)


def same_size(images, size):
    """Images of varying sizes, a list of (C, H, W), averaged down to one tensor (N, C, size, size);
    a tensor is left as it is."""
    if not isinstance(images, list):
        return images
    shrink = torch.nn.functional.adaptive_avg_pool2d
    small = torch.stack([shrink(u.float(), size) for u in images])
    return small if images[0].is_floating_point() else small.round().byte()


def reconstruct(run, f, y, batch=64):
    """f on uint8 measurements -> x_hat like y but float in [-1, 1], latents z (N, C, h, w), on the
    CPU. y is a tensor (N, C, H, W) or a list of (C, H, W) of varying sizes, which are taken whole
    and one at a time, when asked for: many large ones would fill the memory."""
    if isinstance(y, list):
        z = reconstruct(run, f, same_size(y, run.a.size))[1]
        return (whole(run, f, data.to_float(u[None]))[0] for u in y), z
    n, out = len(y), []
    y = Group.own(torch.cat([y, y[:-n % Group.world]]))             # equal parts
    for chunk in y.split(batch):
        with torch.no_grad(), run.amp():
            out.append(f(data.to_float(chunk.to(run.device)), latent=True))
    x_hat, z = (Group.gather(torch.cat(part).float())[:n].cpu() for part in zip(*out))
    return x_hat.clamp(-1, 1), z


def whole(run, f, y):
    """f on one image y (1, C, H, W) of any size, in [-1, 1]: padded to what f takes and cropped
    back; a large one in tiles, whose borders are faded into each other. Tiles are at most 4 times
    as large as what f was trained on, whose means and deviations its GroupNorms have learnt."""
    tile = max(run.a.size, min(4 * run.a.size, 512))
    total, weight = torch.zeros_like(y), torch.zeros(1, 1, *y.shape[2:])

    def starts(n):                      # a quarter or more is shared, and none is a narrow rest
        k = math.ceil(max(0, n - tile) / (tile - tile // 4))
        return [i * (n - tile) // k for i in range(k + 1)] if k else [0]
    corners = [(i, j) for i in starts(y.shape[2]) for j in starts(y.shape[3])]
    with torch.no_grad(), run.amp():                    # which casts the weights once for all tiles
        for i, j in corners:
            part = y[:, :, i:i + tile, j:j + tile]
            h, w = part.shape[2:]
            pad = (-w % f.factor, -h % f.factor)
            padded = torch.nn.functional.pad(part, (0, pad[0], 0, pad[1]), mode='replicate')
            x_hat = f(padded.to(run.device))[:, :, :h, :w].cpu()
            rows, cols = (torch.minimum(torch.arange(n) + 1, n - torch.arange(n)) for n in (h, w))
            fade = (rows[:, None] * cols).float()
            total[:, :, i:i + tile, j:j + tile] += fade * x_hat
            weight[:, :, i:i + tile, j:j + tile] += fade
    return total.div_(weight).clamp_(-1, 1)


def prior_features(run, prior, x, t=50, batch=64):
    """The DDPM's bottleneck, mean over space, for x float (N, C, H, W) seen as x_t -> (N, D)."""
    out = []
    for chunk in x.split(batch):
        with torch.no_grad(), run.amp():
            times = torch.full((len(chunk),), t, device=run.device)
            z, _, _ = prior.encode(chunk.to(run.device), times)
        out.append(z.float().mean((2, 3)).cpu())
    return torch.cat(out)


def optional_metrics(a):
    """-> (lpips, inception): functions of images, or None where no weights are given.

    lpips: float (B, 3, H, W) x 2 -> (B,). inception: uint8 (B, 3, H, W) -> features (B, D).
    """
    lpips, inception = None, None
    if a.lpips_weights:
        files = download_lpips() if a.lpips_weights == ['download'] else a.lpips_weights
        weights = metrics.lpips_weights(*files)

        def lpips(x_hat, x):
            return torch.cat([metrics.lpips(colour(p), colour(q), weights)
                              for p, q in zip(x_hat.split(64), x.split(64))])
    if a.fid_weights:
        try:
            net = torch.jit.load(a.fid_weights, map_location='cpu').eval()
        except Exception as e:
            raise ValueError(f'--fid-weights {a.fid_weights}: not a TorchScript file') from e
        more = ({'return_features': True} if 'return_features' in
                [arg.name for arg in net.forward.schema.arguments] else {})

        def inception(u):
            with torch.no_grad():
                return torch.cat([net(chunk, **more).flatten(1).float() for chunk in u.split(64)])
    return lpips, inception


def download_lpips():
    """The two official weight files of LPIPS, fetched once and checked -> their paths."""
    paths = []
    for url, sha256 in (
            ('https://download.pytorch.org/models/alexnet-owt-7be5be79.pth',
             '7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02'),
            ('https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/'
             'weights/v0.1/alex.pth',
             'df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0')):
        path = Path(torch.hub.get_dir()) / 'checkpoints' / f'lpips-{url.split("/")[-1]}'
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            try:
                torch.hub.download_url_to_file(url, path, hash_prefix=sha256, progress=False)
            except (OSError, RuntimeError) as e:
                raise ValueError(f'--lpips-weights download: {url}: {e}') from e
        paths.append(path)
    return paths


def scorer(run, split, prior, lpips=None, inception=None):
    """-> a function of f that gives all metrics on the test images; None where one has no meaning.

    fd_prior is the Fréchet distance of the DDPM's features, not the Inception network's.
    """
    size, x, several = run.a.size, split.test_x, isinstance(split.test_y, list)
    if x is not None:
        small_x = same_size(x, size)
        features = prior_features(run, prior, data.to_float(small_x))
        real = inception(colour(small_x)) if inception else None

    def compare(x_hat, x, hole):
        """What compares two images, for each of (B, C, H, W)."""
        s = {'psnr': metrics.psnr(x_hat, x, data_range=2),
             'ssim': metrics.ssim(x_hat, x, data_range=2)}
        for k, m in {} if hole is None else {'hole': hole, 'visible': ~hole}.items():
            s[f'psnr_{k}'] = metrics.psnr(x_hat, x, data_range=2, mask=m)
        return s | {'lpips': lpips(x_hat, x)} if lpips else s

    def score(f):
        x_hat, z = reconstruct(run, f, split.test_y)
        small, compared = [], []
        for k, u in enumerate((v[None] for v in x_hat) if several else [x_hat]):
            small.append(same_size(list(u), size) if several else u)
            if x is not None:
                truth = data.to_float(x[k][None] if several else x)
                compared.append(compare(u, truth, split.test_hole))
        small = torch.cat(small)
        if not small.isfinite().all():
            raise ValueError('the reconstructions are not finite; try a lower learning rate')
        s = dict.fromkeys(('psnr', 'psnr_hole', 'psnr_visible', 'ssim', 'lpips', 'fd_prior', 'fid'))
        s |= {'corr_latent': metrics.correlation(z).item(),
              'corr_output': metrics.correlation(small).item()}
        if x is None:
            return s
        for k in compared[0]:
            s[k] = torch.cat([each[k] for each in compared]).nanmean().item()
        if len(x) > 1:                                              # one image has no distribution
            s['fd_prior'] = metrics.frechet_distance(prior_features(run, prior, small), features)
        if inception and len(x) > 1:
            fid = metrics.frechet_distance(inception(colour(data.to_bytes(small))), real)
            s |= {'fid': fid, 'fid_features': real.shape[1]}
        return s
    return score


def colour(x):
    """Grey images (B, 1, H, W) as (B, 3, H, W); colour ones as they are."""
    return x.expand(-1, 3, -1, -1)


# ---------------------------------------------------------------------------- table and pictures
COLUMNS = {                     # key in metrics.json -> heading, format
    'psnr': ('PSNR ↑', '.2f'), 'psnr_hole': ('in the hole ↑', '.2f'),
    'psnr_visible': ('visible ↑', '.2f'), 'ssim': ('SSIM ↑', '.3f'), 'lpips': ('LPIPS ↓', '.3f'),
    'fd_prior': ('FD-prior ↓', '.2f'), 'fid': ('FID-{} ↓', '.2f'),
    'corr_latent': ('corr. latents', '.3f'), 'corr_output': ('corr. outputs', '.3f'),
    'best_psnr': ('best PSNR', '.2f'), 'gap': ('gap closed', '.0%'),
}
COLOURS = {'supervised': '#555555', 'cyclegan-ssl': '#8C564B', 'sud-te': '#F08080',
           'sud-mt': '#C49C94', 'sud': '#D55E00', 'sud+reg': '#E69F00',
           'sud+reg+noise': '#B8A000', 'sud2': '#0072B2', 'sud2-kl': '#CC79A7',
           'sud2-kl+g': '#7030A0', 'oracle': '#009E73', 'truth': '#000000'}
OTHERS = ['#56B4E9', '#D55E00', '#009E73', '#E69F00']       # of lines that are no method


def gap_closed(methods):
    """Adds to the scores the share of the way from supervised's *best* PSNR to the oracle's."""
    for name, seeds in methods.items():
        for seed, s in seeds.items():
            low = methods.get('supervised', {}).get(seed, {}).get('best_psnr')
            high = methods.get('oracle', {}).get(seed, {}).get('psnr')
            if None not in (low, high) and low != high and name != 'supervised':
                s['gap'] = (s['psnr'] - low) / (high - low)


def table(methods):
    """Markdown table, a row a method: mean over seeds, ± standard deviation of several."""
    scores = [s for seeds in methods.values() for s in seeds.values()]
    dims = scores[0].get('fid_features')
    shown = [c for c in COLUMNS if any(s.get(c) is not None for s in scores)]
    rows = ['| method | ' + ' | '.join(COLUMNS[c][0].format(dims) for c in shown) + ' |',
            '|---|' + '---:|' * len(shown)]
    for name, seeds in methods.items():
        cells = []
        for c in shown:
            v, form = [s[c] for s in seeds.values() if s.get(c) is not None], COLUMNS[c][1]
            v = torch.tensor(v, dtype=torch.float64)    # an infinite PSNR has no deviation: nan
            cells.append((f'{v.mean():{form}}' if len(v) else '–')
                         + (f' ± {v.std():{form}}' if len(v) > 1 else ''))
        rows.append(f'| {name} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(rows)


def shown(u, most=256):
    """A uint8 image (C, H, W) as `grid` needs it: of a larger one the centre square, reduced."""
    side = min(u.shape[1:])
    i, j = ((n - side) // 2 for n in u.shape[1:])
    return same_size([u[:, i:i + side, j:j + side]], most)[0] if side > most else u


def grid(rows, path, columns=10):
    """Labelled rows of images: name -> uint8 (C, H, W) each; small ones are enlarged."""
    first = next(iter(rows.values()))
    size = min(256, first[0].shape[1])
    side = math.ceil(96 / size) * size
    font, columns = ImageFont.load_default(16), min(columns, len(first))
    left = 16 + max(int(font.getlength(name)) for name in rows)
    sheet = Image.new('RGB', (left + columns * (side + 4), len(rows) * (side + 4) + 4), 'white')
    draw = ImageDraw.Draw(sheet)
    for r, (name, images) in enumerate(rows.items()):
        draw.text((8, 4 + r * (side + 4) + side / 2), name, 'black', font, anchor='lm')
        for c, image in enumerate(images[:columns]):
            tile = Image.fromarray(colour(image[None])[0].permute(1, 2, 0).numpy())
            tile = ImageOps.fit(tile, (side, side), Image.Resampling.BOX)
            sheet.paste(tile, (left + c * (side + 4), 4 + r * (side + 4)))
    with written(path) as part:
        sheet.save(part, 'PNG')


def ticks(low, high, n=5):
    """About n round numbers that span low .. high."""
    high = high if high > low else low + 1
    raw = (high - low) / n
    unit = 10 ** math.floor(math.log10(raw))
    step = next(k * unit for k in (1, 2, 5, 10) if k * unit >= raw)
    return [step * i for i in range(math.floor(low / step), math.ceil(high / step) + 1)]


def plot(panels, path, log=False):
    """Panels side by side: (title, x label, y label, {name: [[(x, y), ...] a seed]}) each.

    A line is the mean over seeds; a band spans them. One legend, at the right. log: x goes by
    ratios, with ticks at its values.
    """
    k, width, height = 2, 560, 400                      # drawn twice as large, then reduced
    place = math.log if log else float
    names = list(dict.fromkeys(n for p in panels for n in p[3]))
    hue = dict(zip([n for n in names if n not in COLOURS], OTHERS * len(names))) | COLOURS
    font, small = ImageFont.load_default(15 * k), ImageFont.load_default(13 * k)
    legend = 50 + max(int(small.getlength(n)) // k for n in names)
    sheet = Image.new('RGB', ((len(panels) * width + legend) * k, height * k), 'white')
    draw = ImageDraw.Draw(sheet, 'RGBA')
    for i, (title, x_label, y_label, series) in enumerate(panels):
        points = [pt for seeds in series.values() for line in seeds for pt in line]
        all_x, all_y = zip(*points)
        xs = sorted(set(all_x)) if log else ticks(min(all_x), max(all_x))
        ys = ticks(min(all_y), max(all_y))
        box = (i * width + 70, 40, (i + 1) * width - 16, height - 56)

        def at(x, y):
            share = (place(x) - place(xs[0])) / (place(xs[-1]) - place(xs[0]))
            return (k * (box[0] + share * (box[2] - box[0])),
                    k * (box[3] - (y - ys[0]) / (ys[-1] - ys[0]) * (box[3] - box[1])))
        for x in xs:
            draw.line([at(x, ys[0]), at(x, ys[-1])], '#dddddd', k)
            draw.text((at(x, 0)[0], k * (box[3] + 6)), f'{x:g}', 'black', small, anchor='mt')
        for y in ys:
            draw.line([at(xs[0], y), at(xs[-1], y)], '#dddddd', k)
            draw.text((k * (box[0] - 6), at(xs[0], y)[1]), f'{y:.6g}', 'black', small, anchor='rm')
        draw.rectangle([at(xs[0], ys[-1]), at(xs[-1], ys[0])], None, 'black', k)
        centre = k * (box[0] + box[2]) / 2
        draw.text((centre, k * 14), title, 'black', font, anchor='mt')
        draw.text((centre, k * (height - 22)), x_label, 'black', font, anchor='mt')
        draw.text((k * (i * width + 8), k * 14), y_label, 'black', font, anchor='lt')
        for name, seeds in series.items():
            colour = hue[name]
            columns = [[pt[0] for pt in col] + [[pt[1] for pt in col]] for col in zip(*seeds)]
            if len(seeds) > 1:
                band = [at(c[0], min(c[-1])) for c in columns]
                draw.polygon(band + [at(c[0], max(c[-1])) for c in columns[::-1]], colour + '18')
            means = [at(c[0], sum(c[-1]) / len(c[-1])) for c in columns]
            draw.line(means, colour, 2 * k, 'curve')
            for x, y in means if len(means) < 20 else ():
                draw.ellipse([x - 3 * k, y - 3 * k, x + 3 * k, y + 3 * k], colour)
    for r, name in enumerate(names):
        x, y = k * (len(panels) * width + 4), k * (60 + 24 * r)
        draw.line([(x, y), (x + 26 * k, y)], hue[name], 3 * k)
        draw.text((x + 32 * k, y), name, 'black', small, anchor='lm')
    with written(path) as part:
        sheet.resize((sheet.width // k, sheet.height // k), Image.Resampling.BOX).save(part, 'PNG')


def curves(methods, path, truth):
    """PSNR and the correlation of reconstructions against updates, each method; not CycleGAN,
    whose are others."""
    def series(key):
        return {m: [[(c['update'], min(c[key], 100)) for c in s['curve']]   # of equal images: inf
                    for s in seeds.values()]
                for m, seeds in methods.items() if seeds and m != 'cyclegan'}
    corr = series('corr_output')
    panels = [('Correlation of the reconstructions', 'updates of f', '', corr)]
    if truth is not None and corr:
        last = max(x for seeds in corr.values() for line in seeds for x, _ in line)
        corr['truth'] = [[(0, truth), (last, truth)]]
        panels.insert(0, ('PSNR on the test images', 'updates of f', 'dB', series('psnr')))
    if corr:
        plot(panels, path)


# ---------------------------------------------------------------------------- what a run rests on
VERSION = 4             # of checkpoints: goes up when older ones can no longer be read


def multipliers(size):
    """Channel multipliers of the levels, down to a bottleneck of 4 x 4 or nearly: of f's, which
    begin at half of the size, times --width; and of the DDPM's, at the size, times a quarter."""
    halvings = round(math.log2(size / 8))
    return (1,) + (2,) * halvings, (2, 3, 4) + (8,) * (halvings - 1)


class Setup:
    """What all parts of a run share: flags, device, precision, output folder, schedule."""

    def __init__(self, args):
        self.a, self.out = args, Path(args.out)
        auto = 'cuda' if torch.cuda.is_available() else 'cpu'
        try:
            self.device = torch.device(auto if args.device == 'auto' else args.device)
            torch.zeros(1, device=self.device)
            if self.device.type == 'cuda' and self.device.index:
                torch.cuda.set_device(self.device)
        except (RuntimeError, AssertionError) as e:
            raise ValueError(f'--device {args.device}: not available here') from e
        if int(os.environ.get('WORLD_SIZE', 1)) > 1 and Group.world == 1:
            self.device = Group.join(self.device)
        for flag in ('batch', 'prior_batch', 'gan_batch'):
            if getattr(args, flag) % Group.world:
                raise ValueError(f'--{flag.replace("_", "-")} {getattr(args, flag)}: must divide '
                                 f'by the number of processes, {Group.world}')
        if args.precision == 'auto':        # as the run began; a new one's first process chooses
            there = None if args.restore else (config_in(self.out) or {}).get('precision')
            bf16 = not Group.rank and (there == 'bf16' or not there and fast_bf16(self.device))
            args.precision = 'bf16' if Group.any(bf16) else 'fp32'
        self.bf16 = args.precision == 'bf16'
        self.acp = ddpm.alphas_cumprod().to(self.device)
        self.about = {'version': VERSION, 'task': args.task, 'channels': args.channels,
                      'width': args.width, 'size': args.size}

    def amp(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def net(self, seed, images=1, shrink=1, time=False, residual=False):
        """A U-Net with initial weights of its own seed, the same for every method; it takes and
        gives `images` images and has 1 / shrink of --width. The DDPM's (time=True) has a level of
        full resolution; f has none: of few pairs it would learn to change visible pixels there."""
        torch.manual_seed(seed)
        c, width, (mults, prior_mults) = self.a.channels, self.a.width, multipliers(self.a.size)
        net = (UNet(c, c, width // 4, prior_mults, time=True) if time else
               UNet(images * c, images * c, width // shrink, mults, patch=2, residual=residual))
        return net.to(self.device, memory_format=torch.channels_last)

    def log(self, part):
        """-> a function that prints a progress line and appends it to log.jsonl."""
        def line(step, steps, rate, numbers):
            if Group.rank:
                return
            numbers = {k: float(v) for k, v in numbers.items()}
            text = '  '.join(f'{k} {v:.4f}' for k, v in numbers.items())
            left = (steps - step) / rate
            print(f'{part:>16}  {step:5d}/{steps}  {text}  {rate:.1f}/s  {left:4.0f} s left',
                  flush=True)
            with open(self.out / 'log.jsonl', 'a+b') as f:
                f.seek(max(0, f.tell() - 1))
                torn = f.read() not in (b'', b'\n')     # a run was killed in the middle of a line
                text = json.dumps({'part': part, 'step': step, **numbers})
                f.write(b'\n' * torn + text.encode() + b'\n')
        return line


def generators(seed, device):
    """Separate sources of randomness, so that what one method draws does not move another's."""
    return [torch.Generator(device).manual_seed(seed + k) for k in range(3)]


def replays(device):
    """Whether updates are replayed as CUDA graphs; each process of several launches its kernels one
    by one, for the messages between them."""
    return device.type == 'cuda' and Group.world == 1


def recorded(update, parts, device):
    """update(**values) as this device does it best. On a GPU, where starting the thousands of small
    kernels of an update takes several times longer than running them, it becomes a CUDA graph: one
    for each set of choices among the values (those of type bool). parts: what the update changes,
    generators among it."""
    if not replays(device):
        return update
    graphs, generators = {}, [p for p in parts.values() if isinstance(p, torch.Generator)]

    def replay(**values):
        choices = {k: v for k, v in values.items() if isinstance(v, bool)}
        numbers = {k: v for k, v in values.items() if k not in choices}
        key = str(choices)
        if key not in graphs:
            graphs[key] = Replayed(functools.partial(update, **choices), generators, device)
        return graphs[key](numbers)
    return replay


class Replayed:
    """update(**numbers) as a CUDA graph, recorded in the fourth call and replayed from then on:
    the first ones make what stays, the state of an optimiser say. The numbers are tensors to it."""

    def __init__(self, update, generators, device):
        self.update, self.generators, self.device = update, generators, device
        self.calls, self.graph, self.numbers, self.result = 0, torch.cuda.CUDAGraph(), None, None

    def __call__(self, numbers):
        now, self.calls = torch.tensor(list(numbers.values())), self.calls + 1
        self.numbers = now.to(self.device) if self.calls == 1 else self.numbers.copy_(now)
        values = dict(zip(numbers, self.numbers))
        if self.calls <= 3:
            stream, main = torch.cuda.Stream(), torch.cuda.current_stream()     # recording needs it
            stream.wait_stream(main)
            with torch.cuda.stream(stream):
                result = self.update(**values)
            main.wait_stream(stream)
            return result
        if self.calls == 4:
            for g in self.generators:
                self.graph.register_generator_state(g)
            with torch.cuda.graph(self.graph):
                self.result = self.update(**values)
        self.graph.replay()
        return self.result


def fit(run, name, parts, update, schedule, steps, keep, about, after=None):
    """Runs update(**schedule(step)), then after(step), for step = 0 .. steps - 1 -> seconds;
    resumes from `name`.pt.

    parts: name -> module, optimiser, generator or list that the update changes. All of them are
    saved every --save-every seconds and when the user stops; when done, those named in `keep`
    remain, with `about`, plain values that say what the checkpoint is. update returns a dict of
    scalars for the progress line. Errors: a scalar that is not finite; what was saved stays.
    """
    path, log, about = run.out / f'{name}.pt', run.log(name), {**about, **run.about}
    start, seconds = 0, 0.0
    run.out.mkdir(parents=True, exist_ok=True)
    if path.exists():
        saved = load(path, about)
        start, seconds = saved['step'], saved['seconds']
        try:
            for k in keep if start == steps else parts:
                restore(parts[k], saved['parts'][k])
        except Exception as e:          # whatever damage does to a state
            raise ValueError(f'{path}: damaged, of another --device, or not of this run') from e
    began = last_save = last_line = time.monotonic()
    told = start
    with Stop.postponed():                              # to the end of an update
        for step in range(start, steps):
            numbers = Group.mean(update(**schedule(step)))
            if after:
                after(step)
            now, done, stop = time.monotonic(), step == steps - 1, Group.any(Stop.asked)
            speak = now - last_line > 5 or done
            write = now - last_save > run.a.save_every or done or stop
            if (speak or write) and not all(math.isfinite(v) for v in numbers.values()):
                raise ValueError(f'{path.stem}: the loss is not finite after {step + 1} updates; '
                                 f'{path} keeps the last good state; try a lower learning rate')
            if speak:
                log(step + 1, steps, (step + 1 - told) / (now - last_line), numbers)
                told, last_line = step + 1, now         # updates get slower after the warm-up
            if write:
                save(path, {**about, 'step': step + 1, 'seconds': seconds + now - began, 'parts':
                            {k: snapshot(parts[k]) for k in (keep if done else parts)}})
                last_save = time.monotonic()
            if stop:
                raise KeyboardInterrupt
    return seconds + time.monotonic() - began


class Stop:
    """Ctrl-C, or SIGTERM: in training it waits for the end of an update, elsewhere acts at once."""
    asked, waiting = False, False

    @classmethod
    def handler(cls, number, frame):
        if cls.asked or not cls.waiting:
            raise KeyboardInterrupt
        cls.asked = True

    @classmethod
    @contextlib.contextmanager
    def postponed(cls):
        cls.waiting = True
        try:
            yield
        finally:
            cls.waiting = False


def snapshot(part):
    """The state of a module, optimiser, generator or list, as tensors and plain values."""
    if isinstance(part, torch.Generator):
        return part.get_state()
    return list(part) if isinstance(part, list) else part.state_dict()


def restore(part, state):
    """Puts a snapshot back."""
    if isinstance(part, torch.Generator):
        part.set_state(state)
    elif isinstance(part, list):
        part[:] = state
    else:
        part.load_state_dict(state)


def load(path, about):
    """A checkpoint of this program. Errors: none there, a damaged one, or another kind of net."""
    try:
        saved = torch.load(path, map_location='cpu', weights_only=True)
        there = {k: saved[k] for k in (*about, 'step', 'seconds', 'parts')}
    except Exception as e:              # whatever a damaged file does to the reader
        raise ValueError(f'{path}: not there, damaged, or not a checkpoint of sud2') from e
    for k, v in about.items():
        if there[k] != v:
            raise ValueError(f'{path}: made with {k} {there[k]}, this run has {v}')
    return saved


@contextlib.contextmanager
def written(path):
    """-> a temporary name to write to, renamed to path in the end: never half a file there."""
    part = Path(f'{path}.tmp')
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def save(path, value):
    """Writes a checkpoint."""
    if Group.rank:                                      # one process writes
        return
    try:
        with written(path) as part:
            torch.save(value, part)
    except RuntimeError as e:                           # torch's word for a full disk
        raise OSError(f'{path}: cannot be written, is the disk full?') from e


def write_json(path, value):
    """Writes JSON."""
    with written(path) as part:
        part.write_text(json.dumps(value, indent=1) + '\n')


# what may differ when a run goes on
FREE = {'method', 'seed', 'out', 'device', 'dry_run', 'quick', 'restore', 'checkpoint',
        'save_every'}


def fingerprint(folders):
    """A hash of the names, sizes and times of all image files in folders; '' for none."""
    digest = hashlib.sha256()
    for folder in filter(None, folders):
        for f in data.image_files(folder):
            if f.is_file():                                         # no link to nothing
                s = f.stat()
                digest.update(f'{f.relative_to(folder)} {s.st_size} {s.st_mtime_ns}'.encode(
                    errors='surrogateescape'))
    return digest.hexdigest() if any(folders) else ''


def config_in(out):
    """What config.json of an output folder holds; None without one. Errors: it is damaged."""
    path = out / 'config.json'
    try:
        return dict(json.loads(path.read_bytes())) if path.exists() else None
    except (ValueError, TypeError) as e:
        raise ValueError(f'{path}: damaged; use another --out') from e


def check_config(run):
    """Writes config.json, or compares with the one that is there. Errors: a flag or data that
    differ."""
    path, config = run.out / 'config.json', {k: v for k, v in vars(run.a).items() if k not in FREE}
    config['files'] = fingerprint([run.a.data, run.a.images])
    if Group.rank:
        return
    there = config_in(run.out)
    if there is not None:
        if there.keys() != config.keys():
            raise ValueError(f'{path}: damaged, or of another version; use another --out')
        if there['files'] != config['files']:
            raise ValueError('--data or --images: not the files that this run began with; '
                             'use another --out')
        for k, v in config.items():
            if there[k] != v:
                raise ValueError(f'--{k.replace("_", "-")} {v}: {path} has {there[k]}; '
                                 'use that value, or another --out')
    write_json(path, config)


@contextlib.contextmanager
def locked(out):
    """Holds the output folder for this process; the system lets go when it ends, however it ends.
    Errors: another process holds it, or nothing can be written there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / 'lock').touch()
    except OSError as e:
        raise ValueError(f'--out {out}: cannot be written to ({e.strerror}); '
                         'use another --out') from e
    if Group.rank:                                      # the first process holds it for all
        yield
        return
    with open(out / 'lock', 'w') as f:
        try:
            if sys.platform == 'win32':
                import msvcrt
                msvcrt.locking(f.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise ValueError(f'--out {out}: another process is at work there; wait for it, '
                             'or use another --out') from e
        for half in out.glob('cache/*.tmp') if Group.world == 1 else ():
            half.unlink()                               # left by a run that was killed
        yield


class Group:
    """The processes that torchrun started. All draw the same random numbers, those of the whole
    batch, and keep their part: N processes compute what one does."""
    rank, world = 0, 1

    @classmethod
    def join(cls, device):
        """-> this process's device."""
        cls.rank, cls.world = int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])
        if device.type == 'cuda':
            device = torch.device('cuda', int(os.environ['LOCAL_RANK']))
            torch.cuda.set_device(device)               # also for what nccl sends as objects
        torch.distributed.init_process_group('nccl' if device.type == 'cuda' else 'gloo')
        noise_like, pooled = ddpm.noise_like, cyclegan.pooled
        ddpm.noise_like = lambda x, generator=None: cls.own(
            noise_like(x.new_empty(len(x) * cls.world, *x.shape[1:]), generator))
        cyclegan.pooled = lambda pool, images, generator: cls.own(
            pooled(pool, cls.gather(images), generator))
        return device

    @classmethod
    def own(cls, x):
        """This process's part of a whole batch's x (B, ...) -> (B / world, ...)."""
        return x[cls.rank::cls.world]

    @classmethod
    def average(cls, opt, *_):
        """Averages the gradients that opt is to use over the processes, in one message."""
        if cls.world == 1:
            return
        grads = [p.grad for group in opt.param_groups for p in group['params']]
        message = torch.cat([g.flatten() for g in grads])
        torch.distributed.all_reduce(message)
        for g, part in zip(grads, message.split([g.numel() for g in grads])):
            g.copy_(part.view_as(g) / cls.world)

    @classmethod
    def gather(cls, x):
        """The whole batch's x (B, ...) from the processes' parts; gradients flow back."""
        if cls.world == 1:
            return x
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format)
                 for _ in range(cls.world)]
        torch.distributed.all_gather(parts, x.detach().contiguous())
        parts[cls.rank] = parts[cls.rank] + cls.world * (x - x.detach())    # `average` divides
        return torch.stack(parts, 1).flatten(0, 1)

    @classmethod
    def mean(cls, numbers):
        """A dict of scalar tensors, averaged over the processes."""
        if cls.world == 1:
            return numbers
        total = torch.stack([v.float() for v in numbers.values()])
        torch.distributed.all_reduce(total)
        return dict(zip(numbers, total / cls.world))

    @classmethod
    def any(cls, flag):
        """Whether the flag is set in any process."""
        if cls.world == 1:
            return flag
        flags = [None] * cls.world
        torch.distributed.all_gather_object(flags, flag)
        return any(flags)


def fast_bf16(device):
    """Whether this device computes faster in bf16: times a convolution both ways, in turn; on a
    GPU, too fast for that, whether it has bf16."""
    if device.type == 'cuda':
        return torch.cuda.is_bf16_supported(including_emulation=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)        # on a busy machine several take longest to wait for each other
    seconds = [[conv_seconds(device, d) for d in (torch.bfloat16, torch.float32)]
               for _ in range(10)]
    torch.set_num_threads(threads)
    bf16, fp32 = map(min, zip(*seconds))
    return bf16 < fp32


def conv_seconds(device, dtype):
    """Seconds that a 3x3 convolution of the network's shape takes."""
    x = torch.ones(16, 64, 16, 16, dtype=dtype, device=device).to(memory_format=torch.channels_last)
    w = torch.ones(64, 64, 3, 3, dtype=dtype, device=device).to(memory_format=torch.channels_last)
    began = time.perf_counter()
    torch.nn.functional.conv2d(x, w, padding=1)[0, 0, 0, 0].item()
    return time.perf_counter() - began


def processor():
    """The processor's name, as far as the system tells."""
    info = Path('/proc/cpuinfo')
    names = [line.split(':')[1].strip() for line in info.read_text().splitlines()
             if line.startswith('model name')] if info.exists() else []
    return names[0] if names else platform.machine()


def peak_mib():
    """The most memory that this process has held, MiB; None where the system does not tell."""
    if sys.platform == 'win32':
        return None
    import resource
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 1024 ** (2 if sys.platform == 'darwin' else 1)    # macOS counts bytes, Linux KiB


# ---------------------------------------------------------------------------- command line
QUICK = {'clean': 1000, 'measurements': 200, 'test': 64, 'width': 32, 'batch': 8, 'updates': 60,
         'warmup': 20, 'prior_batch': 16, 'prior_steps': 80, 'denoiser_steps': 80, 'gan_steps': 40}


class Positive:
    """argparse type: a number of the given kind above or, with zero true, not below zero."""

    def __init__(self, kind, zero):
        self.kind, self.zero = kind, zero

    def __call__(self, text):
        try:
            value = self.kind(text)
        except ValueError:
            value = math.nan
        if not (value > 0 or self.zero and value == 0) or math.isinf(value):
            raise argparse.ArgumentTypeError(
                f"must be a {'whole ' if self.kind is int else ''}number "
                f"{'of at least 0' if self.zero else 'above 0'}, got {text!r}")
        return value


# flags that are whole above 0, whole from 0, real above 0, real from 0
count, zero, real, weight = (Positive(kind, zero=z) for kind in (int, float) for z in (0, 1))


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Wide help with defaults, with N for a whole number and X for another."""

    def __init__(self, prog):
        super().__init__(prog, width=100, max_help_position=26)

    def _get_default_metavar_for_optional(self, action):
        return 'N' if getattr(action.type, 'kind', None) is int else 'X'

    def _format_args(self, action, default_metavar):
        args = super()._format_args(action, default_metavar)
        return f'{args.split()[0]} ...' if action.nargs == '+' else args

    def _get_help_string(self, action):
        default = action.default if isinstance(action.default, list) else [action.default]
        shown = ' '.join(map(str, default))
        hidden = shown in ('None', 'False', argparse.SUPPRESS)
        return action.help if hidden else f'{action.help} ({shown})'


class Parser(argparse.ArgumentParser):
    """Tells a mistake in one line."""

    def error(self, message):
        self.exit(2, f'sud2.py: error: {" ".join(message.split())}\n')


def command_line():
    """The flags: what to run, the method with the paper's symbols, optimisation, the run."""
    p = Parser(
        allow_abbrev=False, add_help=False, formatter_class=Formatter,
        usage='python sud2.py [flags]',
        description='SUD²: trains a reconstruction network from a few pairs, a folder of degraded '
                    'images\nand one of clean images, supervised by a diffusion model. Defaults in '
                    'brackets.',
        epilog='examples:\n'
               '  python sud2.py --task inpaint --quick\n'
               '  python sud2.py --task dehaze --method all --seed 0 1 2\n'
               '  python sud2.py --restore photos --out new '
               '--checkpoint runs/custom/sud2-kl+g-s0.pt')
    flags_of_the_data(p)
    flags_of_the_method(p)
    flags_of_the_run(p)
    return p


def flags_of_the_data(p):
    """What is undone, with which images, methods and seeds, of which size."""
    g = p.add_argument_group('what to run')
    g.add_argument('--task', choices=['inpaint', 'dehaze', 'custom'], default='inpaint',
                   metavar='NAME', help='inpaint, dehaze, or custom: what your own pairs show')
    g.add_argument('--data', metavar='DIR', help='CelebAMask-HQ; O-HAZE, I-HAZE or SOTS; '
                   'your own. Without it, drawn images')
    g.add_argument('--images', metavar='DIR', help='more clean images for U_x')
    g.add_argument('--method', nargs='+', default=['supervised', 'sud2', 'sud2-kl', 'sud2-kl+g'],
                   choices=[*METHODS, 'all'],
                   metavar='NAME', help=f"of {', '.join(METHODS)}; or all")
    g.add_argument('--seed', nargs='+', type=zero, default=[0], metavar='N',
                   help='pairs, initial weights and noise; several give mean ± std')
    g.add_argument('--size', type=count, default=32,
                   help='height and width that is trained on, pixels')
    g.add_argument('--channels', type=int, choices=[1, 3], default=3, metavar='N',
                   help='1: grey, 3: colour')
    g.add_argument('--short-side', type=zero, default=0, metavar='N',
                   help='reduce larger pictures to this first, also restored ones; 0: keep')
    g.add_argument('--pairs', type=count, default=5, help='|P|, before/after pairs')
    g.add_argument('--measurements', type=count, default=1000, help='|U_y|, degraded images')
    g.add_argument('--clean', type=count, default=12500, help='|U_x|, clean images')
    g.add_argument('--test', type=count, default=768, help='test images')
    g.add_argument('--validation', type=zero, default=0, metavar='N',
                   help='score on N other images than the test ones, to choose flags')
    g.add_argument('--quick', action='store_true', help='a first picture in a minute: tiny sizes')


def flags_of_the_method(p):
    """The paper's symbols, and how the networks are trained."""
    g = p.add_argument_group('method')
    g.add_argument('--t-start', type=zero, default=50, help='F noises to this step, 0 .. 999')
    g.add_argument('--r-steps', type=count, default=3, help='network calls of R')
    g.add_argument('--eta', type=weight, default=0.0, help='R: 0 DDIM .. 1 ancestral')
    g.add_argument('--lam1', type=weight, default=0.2, help='λ1, weight of L_denoiser')
    g.add_argument('--lam2', type=weight, default=0.02, help='λ2, weight of L_reg')
    g.add_argument('--lam3', type=weight, default=0.2,
                   help='sud2-kl, sud2-kl+g: λ3, weight of L_paired on pairs of clean images')
    g.add_argument('--sigma', type=real, default=0.2, help="σ = σ2 of D_σ, images in [-1, 1]")
    g.add_argument('--reg', choices=['signed', 'abs', 'square'], default='signed',
                   metavar='NAME', help='L_reg of signed, abs or square correlations')
    g.add_argument('--kl-range', nargs=2, type=zero, default=[20, 300], metavar='T',
                   help='sud2-kl: noise steps t are drawn from here')
    g.add_argument('--kl-lr', type=real, default=1e-3, help='sud2-kl: learning rate of D^f, of g')
    g = p.add_argument_group('optimisation')
    g.add_argument('--updates', type=count, default=400, help='updates of f')
    g.add_argument('--warmup', type=zero, default=60, help='first updates on the pairs alone')
    g.add_argument('--batch', type=count, default=16,
                   help='measurements, and at most pairs, an update')
    g.add_argument('--average-from', type=count, default=400,
                   help="from this update on f is drawn to its weights' mean; not sud2-kl+g")
    g.add_argument('--lr', type=real, default=2e-3, help='learning rate of f')
    g.add_argument('--shift', type=zero, default=2,
                   help='random shift of the pairs and of few clean images, pixels')
    g.add_argument('--prior-steps', type=count, default=2000,
                   help='training steps of the DDPM, fewer on few images')
    g.add_argument('--denoiser-steps', type=count, default=1500, help='training steps of D_σ')
    g.add_argument('--prior-batch', type=count, default=32, help='their batch')
    g.add_argument('--prior-lr', type=real, default=6e-3, help='their learning rate')
    g.add_argument('--gan-steps', type=count, default=5000, help='training steps of CycleGAN')
    g.add_argument('--gan-batch', type=count, default=8, help='its batch')
    g.add_argument('--width', type=count, default=64,
                   help='channels of the networks, a multiple of 16')
    g.add_argument('--save-every', type=weight, default=30.0, metavar='SECONDS',
                   help='time between checkpoints')
    g.add_argument('--points', type=count, default=8, help='scores taken along the way')


def flags_of_the_run(p):
    """Where things lie, on what the run computes, and restoring."""
    g = p.add_argument_group('run')
    g.add_argument('--out', metavar='DIR', help='output folder; without it runs/TASK')
    g.add_argument('--prior', metavar='DIR', help="use another run's prior.pt and denoiser.pt")
    g.add_argument('--lpips-weights', nargs='+', metavar='FILE',
                   help="AlexNet's and LPIPS' weight files, or the word download")
    g.add_argument('--fid-weights', metavar='FILE',
                   help='an Inception network as TorchScript, for FID on its features')
    g.add_argument('--device', default='auto', metavar='NAME', help='auto, cpu, cuda, ...')
    g.add_argument('--precision', choices=['auto', 'bf16', 'fp32'], default='auto',
                   metavar='NAME',
                   help='bf16 or fp32 convolutions; auto: the faster, on a GPU bf16')
    g.add_argument('--restore', nargs='+', metavar='PATH',
                   help='apply a trained network to pictures and folders of them')
    g.add_argument('--checkpoint', metavar='FILE', help='the network for --restore')
    g.add_argument('--dry-run', action='store_true', help='print the plan and stop')
    g.add_argument('-h', '--help', action='help', help='print this and stop')


def parse(argv=None):
    """Flags -> namespace, checked as far as it goes without the data; exits with 2 on a mistake."""
    p = command_line()
    a = p.parse_args(argv)
    if a.quick:
        p.set_defaults(**QUICK)
        a = p.parse_args(argv)
    every = [m for m in METHODS if m != 'oracle' or a.task != 'custom']
    a.method = every if 'all' in a.method else list(dict.fromkeys(a.method))
    a.seed = sorted(set(a.seed))
    factor = 2 ** len(multipliers(a.size)[0])
    checks = [
        (a.size < 16 or a.size > 1024, f'--size {a.size}: must be from 16 to 1024'),
        (a.size % factor, f'--size {a.size}: must divide by {factor}'),
        (a.width % 16, f'--width {a.width}: must divide by 16'),
        (a.t_start > 999, f'--t-start {a.t_start}: must be from 0 to 999'),
        (a.r_steps > a.t_start + 1,
         f'--r-steps {a.r_steps}: at most --t-start + 1 = {a.t_start + 1}'),
        (a.eta > 1, f'--eta {a.eta}: must be from 0 to 1'),
        (not a.kl_range[0] < a.kl_range[1] <= 1000,
         f'--kl-range {a.kl_range[0]} {a.kl_range[1]}: needs 0 <= first < second <= 1000'),
        (a.seed[-1] > 10 ** 9, f'--seed {a.seed[-1]}: must be from 0 to 10^9'),
        (a.shift >= a.size, f'--shift {a.shift}: must be below --size'),
        (a.points > a.updates, f'--points {a.points}: at most --updates {a.updates}'),
        (a.images and not a.data, '--images: needs --data'),
        (a.task == 'custom' and not a.data and not a.restore,
         '--task custom: needs --data DIR with paired/x, paired/y, measurements and images'),
        (a.task == 'custom' and 'oracle' in a.method,
         '--method oracle: needs the true images of the measurements, which --task custom lacks'),
        (a.task == 'custom' and a.validation,
         '--validation: for --task custom put the pairs to choose flags by into the folder test'),
        (bool(a.restore) != bool(a.checkpoint), '--restore: needs --checkpoint, and the reverse'),
        (a.restore and not a.out, '--restore: needs --out DIR'),
        (a.restore and a.dry_run, '--restore: does without --dry-run'),
        (a.lpips_weights and a.lpips_weights != ['download'] and len(a.lpips_weights) != 2,
         '--lpips-weights: needs two files, ALEXNET LINEAR, or the word download'),
        (a.lpips_weights and a.size < 32, f'--size {a.size}: LPIPS needs at least 32'),
    ]
    for wrong, message in checks:
        if wrong:
            p.error(message)
    a.out = a.out or f'runs/{a.task}'
    return a


def load_split(a, seed):
    """The task's data for one seed."""
    sizes = dict(size=a.size, pairs=a.pairs, measurements=a.measurements, clean=a.clean,
                 test=a.test, seed=seed)
    cache = Path(a.out) / 'cache'
    if a.task == 'custom':
        split = data.custom_folders(a.data, **sizes, images=a.images, short_side=a.short_side,
                                    grey=a.channels == 1, cache=cache)
    elif not a.data:
        split = data.embedded(a.task, **sizes, validation=a.validation)
    elif a.task == 'dehaze':
        split = data.haze_folders(a.data, **sizes, images=a.images, validation=a.validation,
                                  short_side=a.short_side, cache=cache)
    else:
        split = data.celeba_mask_hq(a.data, **sizes, images=a.images, validation=a.validation,
                                    cache=cache)
    return split.grey() if a.channels == 1 else split


def millions(net):
    """The number of a network's parameters, in millions, as text."""
    return f'{sum(p.numel() for p in net.parameters()) / 1e6:.2f}'


def forward_minutes(run, net, *more):
    """Minutes of a run for each forward pass of an image; few large ones are timed, twice."""
    n, seconds = max(1, min(16, 2 ** 16 // run.a.size ** 2)), []
    x = torch.zeros(n, run.a.channels, run.a.size, run.a.size, device=run.device)
    while len(seconds) < 2 or sum(seconds) < .05 and len(seconds) < 5:
        began = time.perf_counter()
        with torch.no_grad(), run.amp():
            net(x, *(u[:n] for u in more)).sum().item()
        seconds.append(time.perf_counter() - began)
    # optimisers and the rest take another two fifths; replayed it all takes a seventh
    return (.2 if replays(run.device) else 1.4) * min(seconds) / n / 60


def plan(run, split=None):
    """Prints what will be done, with sizes, parameters, device and expected minutes; of the data
    what the flags say, or, once it is read, what is there."""
    a, f, prior = run.a, run.net(0), run.net(0, time=True)
    sizes = ([len(u) for u in (split.pairs_x, split.measurements, split.images, split.test_y)]
             if split else [a.pairs, a.measurements, a.clean, a.validation or a.test])
    scored, whole, kind = sizes[3], '', 'validation' if a.validation else 'test'
    if split and split.test_x is None:
        kind = 'unscored'
    if split and isinstance(split.test_y, list):                    # in images of --size
        pixels = sum(u[0].numel() for u in split.test_y)
        scored = 16 / 9 * pixels / a.size ** 2          # tiles share a quarter or more
        whole = f' of {round(pixels / 1e6, 3):,} megapixels together'
    t_f = forward_minutes(run, f)
    t_prior = forward_minutes(run, prior, torch.zeros(16, dtype=torch.long, device=run.device))
    priors = 3 * a.prior_batch * (                                  # 3: forward and backward
        steps_on(a.prior_steps, a.prior_batch, sizes[2]) * t_prior
        + needs_denoiser(a) * steps_on(a.denoiser_steps, a.prior_batch, sizes[2]) * t_f)
    labels = {'R∘F': a.r_steps * t_prior, 'entropy': 4 * t_prior, 'truth': 0}
    pairs = {None: 0, 'x_u': t_f, 'g(x_u)': 6 * t_f}                # of clean images
    updates = sum(3 * min(sizes[0], a.batch) * a.updates * t_f
                  + bool(m.label) * (a.updates - a.warmup) * a.batch
                  * (3 * t_f + labels.get(m.label, t_f) + pairs[m.clean])
                  for m in map(METHODS.get, a.method))
    scores = a.points * (scored * t_f + sizes[3] * t_prior) * len(a.method)
    if any('cyclegan' in m for m in a.method):
        gan = cyclegan.CycleGAN(a.channels, *cyclegan.sizes(a.size)).to(run.device)
        updates += 24 * a.gan_steps * a.gan_batch * forward_minutes(run, gan.to_x)
    cut = ' crops' * bool(split and a.data and a.task != 'inpaint')
    print(f'{a.task}: {a.data or "drawn images"}, {a.size} x {a.size}{cut}; {sizes[0]} pairs, '
          f'{sizes[1]} measurements, {sizes[2]} clean, {sizes[3]} {kind} images{whole}\n'
          f'methods: {", ".join(a.method)}; seeds {", ".join(map(str, a.seed))}; '
          f'{a.updates} updates each\n'
          f'DDPM of {millions(prior)} M, f of {millions(f)} M parameters on {run.device.type}, '
          f'{"bf16" if run.bf16 else "fp32"}, {torch.get_num_threads()} threads\n'
          f'about {priors * (not a.prior) + (updates + scores) * len(a.seed) + .1:.1f} minutes, '
          f'{scores * len(a.seed):.1f} of them for scores (--points)'
          f'{", less what is done already" * any(run.out.glob("*.pt"))}; output in {run.out}',
          flush=True)


def restore_pictures(a):
    """Applies a trained f to files and folders of pictures, each result under its own name in
    --out, of the same size or reduced to --short-side, with its alpha channel and its colour
    profile. Errors, told after the rest is done: a file that is no readable picture, a result that
    would lie where an input does."""
    saved = load(Path(a.checkpoint), {'kind': 'reconstructor', 'version': VERSION})
    try:
        a.task, a.channels, a.width, a.size = (
            saved[k] for k in ('task', 'channels', 'width', 'size'))
        run = Setup(a)
        f = run.net(0, residual=True)
        f.load_state_dict(saved['parts']['f'])
        f = f.bfloat16() if run.bf16 else f     # cast once: a small picture takes half the time
    except (KeyError, RuntimeError) as e:
        raise ValueError(f'{a.checkpoint}: damaged, or not a checkpoint of sud2') from e
    files = []
    for p in map(Path, a.restore):
        files += [(g, g.relative_to(p)) for g in data.image_files(p)] if p.is_dir() else [
            (p, Path(p.name))]
    taken, failed = {g.resolve() for g, _ in files}, []
    for g, name in files:
        try:
            path = run.out / name
            if path.resolve() in taken:
                raise ValueError(f'{g}: {path} is an input or another result; use another --out')
            picture = data.open_image(g)
            small = data.reduced(*picture.size, a.short_side)
            image = picture.convert('L' if a.channels == 1 else 'RGB')
            u = torch.from_numpy(np.array(image.resize(small, Image.Resampling.BOX)))
            y = data.to_float(u.view(1, *u.shape[:2], a.channels).permute(0, 3, 1, 2))
            x_hat = data.to_bytes(whole(run, f, y))[0].permute(1, 2, 0).squeeze(2).numpy()
            result = Image.fromarray(x_hat)
            if picture.has_transparency_data:           # a channel, or a colour of the palette
                result.putalpha(picture.convert('RGBA').getchannel('A').resize(small))
            same_colours = picture.mode.rstrip('A') == result.mode.rstrip('A')      # not of CMYK
            profile = picture.info.get('icc_profile') if same_colours else None
            path.parent.mkdir(parents=True, exist_ok=True)
            with written(path) as part:
                result.save(part, Image.registered_extensions()[g.suffix.lower()], quality=95,
                            icc_profile=profile)
            taken.add(path.resolve())
            print(path)
        except (ValueError, OSError, KeyError) as e:
            failed.append(str(e) if isinstance(e, ValueError) else f'{g}: {e}')
    if failed:
        raise ValueError(f'{len(failed)} of {len(files)} not restored: ' + '; '.join(failed))


def needs_denoiser(a):
    """Whether a method of this run calls D_σ."""
    return any('denoise' in (METHODS[m].label or '') for m in a.method)


def report(run, methods, prior_scores, began, truth_corr):
    """Writes metrics.json and table.md; prints the table and where the pictures are."""
    gap_closed(methods)
    write_json(run.out / 'metrics.json', {
        'command': 'python sud2.py ' + shlex.join(sys.argv[1:]),
        'config': json.loads((run.out / 'config.json').read_bytes()),
        'environment': {'torch': torch.__version__, 'processor': processor() if
                        run.device.type != 'cuda' else torch.cuda.get_device_name(run.device),
                        'threads': torch.get_num_threads(), 'device': run.device.type,
                        'precision': 'bf16' if run.bf16 else 'fp32'},
        'methods': methods, 'truth': {'corr_output': truth_corr}, 'prior': prior_scores,
        'seconds': time.monotonic() - began, 'peak_mib': peak_mib()})
    text = table(methods)
    (run.out / 'table.md').write_text(text + '\n', encoding='utf-8')
    pictures = (run.out / name for name in ('grid.png', 'curves.png'))
    print(f'\n{text}\n', *filter(Path.exists, pictures), sep='\n')


def work(run, began):
    """Trains the priors, then each method with each seed, and reports. The pictures show, after
    each method, all so far."""
    a, more = run.a, optional_metrics(run.a)
    split = load_split(a, a.seed[0]).to(run.device)
    if not Group.rank:
        plan(run, split)
    check_config(run)
    prior, seconds = train_prior(run, split.images, 'prior')
    denoiser = train_prior(run, split.images, 'denoiser')[0] if needs_denoiser(a) else None
    tests, truth_corr = same_size(split.test_x, a.size), None
    prior_scores = {'eps_loss': None, 'seconds': seconds}
    if tests is not None:
        prior_scores['eps_loss'] = held_out_loss(run, prior, tests)
        truth_corr = metrics.correlation(data.to_float(tests)).item()
    methods = {m: {} for m in a.method}
    rows = {'measurement': [shown(u) for u in split.test_y[:10]]}
    truth = {} if tests is None else {'truth': [shown(u) for u in split.test_x[:10]]}
    for seed in a.seed:
        if seed != a.seed[0]:
            check_config(run)                                       # the data is read again
            split = load_split(a, seed).to(run.device)
        score, models = scorer(run, split, prior, *more), Models(prior, denoiser)
        if any('cyclegan' in m for m in a.method):
            gan, *gan_record = train_cyclegan(run, seed, split, score)
            models = Models(prior, denoiser, gan)
        for m in a.method:
            if m == 'cyclegan':
                f, curve, seconds = gan.to_x, *gan_record
            else:
                f, curve, seconds = train(run, m, seed, split, models, score)
            last = {k: v for k, v in curve[-1].items() if k != 'update'}
            best = None if tests is None else max(c['psnr'] for c in curve)
            methods[m][str(seed)] = {**last, 'best_psnr': best, 'updates': curve[-1]['update'],
                                     'seconds': seconds, 'curve': curve}
            if seed == a.seed[0]:
                x_hat, _ = reconstruct(run, f, split.test_y[:10])
                rows[m] = [shown(data.to_bytes(u)) for u in x_hat]
            if not Group.rank:
                grid(rows | truth, run.out / 'grid.png')
                curves(methods, run.out / 'curves.png', truth_corr)
    if not Group.rank:
        report(run, methods, prior_scores, began, truth_corr)


def main(a):
    """What the command line asks for. Errors: ValueError and OSError, to be told in one line."""
    began = time.monotonic()
    try:
        if a.restore:
            return restore_pictures(a)
        run = Setup(a)
        if a.dry_run:
            return plan(run)
        with locked(run.out):
            work(run, began)
    except (RuntimeError, MemoryError) as e:
        if isinstance(e, RuntimeError) and not ('out of memory' in str(e) or 'allocate' in str(e)):
            raise
        raise ValueError('no memory; use a smaller --batch, --width, --size or --clean: '
                         f'{e}') from e


if __name__ == '__main__':
    sys.stdout.reconfigure(errors='replace')            # a terminal may lack λ, a file's name codes
    args = parse()
    load_libraries()
    signal.signal(signal.SIGINT, Stop.handler)
    signal.signal(signal.SIGTERM, Stop.handler)
    try:
        main(args)
    except (ValueError, OSError) as error:
        print(f'sud2.py: error: {" ".join(str(error).split())}', file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        how = f'torchrun --nproc-per-node {Group.world}' if Group.world > 1 else 'python'
        sys.exit(1 if Group.rank else f'\nstopped; this goes on: {how} {shlex.join(sys.argv)}')
    if Group.world > 1:         # gloo's threads now and then abort a process that ends in order
        sys.stdout.flush()
        os._exit(0)
else:
    load_libraries()
