# SPDX-License-Identifier: MIT
"""Tests: closed forms and independent paths, never the same formula typed twice."""

import contextlib
import doctest
import importlib
import io
import json
import math
import os
import random
import re
import runpy
import shutil
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import cyclegan
import data
import ddpm
import metrics
import sud2
import unet
from sud2 import forward_minutes
from unet import Attention, Muon, UNet, orthogonalised

torch.set_num_threads(1)                # the networks are tiny; and in processes of their own
os.environ['OMP_NUM_THREADS'] = '1'
HERE = Path(__file__).parent
ACP = ddpm.alphas_cumprod()
TINY = ['--size', '16', '--pairs', '2', '--measurements', '8', '--clean', '16', '--test', '12',
        '--width', '16', '--batch', '4', '--prior-batch', '4', '--prior-steps', '3',
        '--denoiser-steps', '3', '--updates', '4', '--average-from', '1', '--warmup', '1',
        '--points', '2', '--gan-steps', '4', '--gan-batch', '2', '--device', 'cpu']


def tiny(out, *flags):
    return sud2.parse([*TINY, '--precision', 'fp32', '--out', str(out), *flags])


def text_of(file):
    """A text file's content, of this project where its path is relative."""
    return (HERE / file).read_text(encoding='utf-8')


JOBS = []


def job(work):
    """Decorator of what a test, of the same name, wants of processes of their own: work(folder)."""
    JOBS.append(work)
    return work


@pytest.fixture(scope='module', autouse=True)
def meanwhile(request, tmp_path_factory):
    """-> a function of a job that gives its result. Processes are slow to start, and so the jobs
    are done from the beginning on, in turn, beside the tests."""
    chosen = ' '.join(item.name for item in request.session.items)
    with ThreadPoolExecutor(1) as pool:
        done = {job: pool.submit(job, tmp_path_factory.mktemp('job')) for job in JOBS
                if job.__name__ in chosen}
        yield lambda job: done[job].result()
        pool.shutdown(cancel_futures=True)


@pytest.fixture(autouse=True)
def untimed(monkeypatch):
    """The plan of a tiny run would time the networks for longer than it trains them."""
    monkeypatch.setattr(sud2, 'forward_minutes', lambda *_: 0)


# --------------------------------------------------------- priors with a closed form
class GaussianPrior:
    """x ~ N(mu, s²): the noise predictor and the flow to x_0 that an ideal network would have."""

    def __init__(self, mu=0.7, s=0.3):
        self.mu, self.s = mu, s

    def eps(self, x_t, t):
        a = ACP.double()[t].view(-1, *[1] * (x_t.dim() - 1))
        return (1 - a).sqrt() * (x_t - a.sqrt() * self.mu) / (a * self.s**2 + 1 - a)


class Mixture:
    """x ~ sum_k w_k N(m_k, s² I) in d dimensions, as vectors (B, d)."""

    def __init__(self, means, weights, s):
        self.means, self.w, self.s = (torch.tensor(v, dtype=torch.float64)
                                      for v in (means, weights, s))

    def log_p(self, r, sigma):
        """ln p_{x+ν}(r), ν ~ N(0, sigma² I), up to a constant."""
        var = self.s**2 + sigma**2
        d2 = (r[:, None] - self.means).square().sum(-1)
        return torch.logsumexp(self.w.log() - d2 / (2 * var), 1)

    def mmse(self, r, sigma):
        """E[x | x + ν = r] from the posterior's responsibilities; no gradient of log_p is used."""
        var = self.s**2 + sigma**2
        d2 = (r[:, None] - self.means).square().sum(-1)
        share = torch.softmax(self.w.log() - d2 / (2 * var), 1)
        return share @ self.means + self.s**2 / var * (r - share @ self.means)

    def eps(self, x_t, t):
        a = ACP.double()[t][:, None]
        sigma = ((1 - a) / a).sqrt()
        r = x_t / a.sqrt()
        return (r - self.mmse(r, sigma[0])) / sigma


def test_gaussian_chain_has_the_exact_mean_and_variance(monkeypatch):
    """The whole ancestral chain is affine: an impulse in each noise draw gives its coefficient."""
    prior, T = GaussianPrior(), 1000
    calls = iter(range(T))

    def impulse(x, generator=None):
        z = torch.zeros_like(x)
        z[next(calls)] = 1
        return z

    monkeypatch.setattr(ddpm, 'noise_like', impulse)
    x_T = torch.zeros(T + 2, 1, dtype=torch.float64)
    x_T[T] = 1  # row T + 1 stays the chain of zeros
    out = ddpm.R(prior.eps, x_T, T - 1, ACP.double(), steps=T, eta=1.0, clip=False)
    coefficients = out[:-1] - out[-1]
    assert_close(out[-1].item(), 0.699997, atol=2e-5, rtol=0)
    assert_close(coefficients.square().sum().sqrt().item(), 0.29625, atol=2e-5, rtol=0)
    assert next(calls) == T - 1, 'no noise may be drawn in the last step'


def test_ddim_error_halves_with_the_steps():
    prior, t = GaussianPrior(), 300
    a = ACP.double()[t]
    x_t = torch.linspace(-2, 3, 50, dtype=torch.float64)[:, None]
    flow = prior.mu + prior.s * (x_t - a.sqrt() * prior.mu) / (a * prior.s**2 + 1 - a).sqrt()
    errors = [(ddpm.R(prior.eps, x_t, t, ACP.double(), steps=k, clip=False) - flow).abs().max()
              for k in (75, 150, 301)]
    assert 1.9 < errors[0] / errors[1] < 2.1 and 1.9 < errors[1] / errors[2] < 2.1
    assert errors[2] < 0.02


def test_ancestral_sampling_has_the_one_step_denoiser_as_its_mean():
    """E[R(x_t)] with eta = 1 and every step is E[x_0 | x_t]; DDIM's R(x_t) is another point."""
    mixture, t = Mixture([[-1.0], [1.0]], [0.5, 0.5], 0.2), 300
    a = ACP.double()[t]
    x_t = torch.full((20000, 1), 0.3, dtype=torch.float64) * a.sqrt()
    mmse = mixture.mmse(x_t[:1] / a.sqrt(), ((1 - a) / a).sqrt())
    one = ddpm.R(mixture.eps, x_t[:1], t, ACP.double(), steps=1, clip=False)
    assert_close(one, mmse, atol=1e-6, rtol=0)
    g = torch.Generator().manual_seed(0)
    many = ddpm.R(mixture.eps, x_t, t, ACP.double(), steps=t + 1, eta=1.0, clip=False, generator=g)
    assert_close(many.mean().item(), mmse.item(), atol=0.03, rtol=0)  # 4 standard errors
    assert many.std() > 0.7, 'samples, not their mean'
    ddim = ddpm.R(mixture.eps, x_t[:1], t, ACP.double(), steps=t + 1, clip=False)
    assert abs(ddim.item() - mmse.item()) > 0.2


def test_forward_operator_moments_and_seed():
    x = torch.full((1, 1, 400, 400), 0.5)
    out = [ddpm.F(x, 200, ACP, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(out[0], out[1]) and not torch.equal(out[0], out[2])
    betas = np.linspace(1e-4, 0.02, 1000)
    a = np.prod(1 - betas[:201])
    assert_close(out[0].mean().item(), 0.5 * math.sqrt(a), atol=0.006, rtol=0)
    assert_close(out[0].std().item(), math.sqrt(1 - a), atol=0.006, rtol=0)
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    assert_close(out[0], math.sqrt(a) * x + math.sqrt(1 - a) * eps, atol=1e-5, rtol=0)


def test_schedule_values():
    """ᾱ at some t, to three digits, as tabulated for the linear schedule of DDPM."""
    for t, value in {25: 0.991, 50: 0.970, 100: 0.895, 200: 0.656, 300: 0.394, 500: 0.078}.items():
        assert_close(ACP[t].item(), value, atol=6e-4, rtol=0)
    assert ACP.dtype == torch.float32 and len(ACP) == 1000


def test_strided_times():
    assert ddpm.strided_times(300, 301) == list(range(300, -1, -1))
    assert ddpm.strided_times(200, 1) == [200]
    assert ddpm.strided_times(999, 10) == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    with pytest.raises(ValueError, match='steps'):
        ddpm.strided_times(3, 5)


@pytest.mark.parametrize('eta, expected', [
    (1.0, [-8e-06, 0.166013, -0.088045, 0.132595, -0.011563]),
    (0.5, [-1.0, 0.085793, -0.04566, 0.115796, 1.0])])
def test_r_agrees_with_the_standard_scheduler(monkeypatch, eta, expected):
    """diffusers 0.42's DDIMScheduler, 10 steps, 'trailing', clipped, the same network and noise."""
    draws = iter(torch.sin(torch.arange(5.0) * k)[:, None] for k in range(1, 11))
    monkeypatch.setattr(ddpm, 'noise_like', lambda x, generator=None: next(draws))

    def eps_model(x_t, t):
        return torch.sin(3 * x_t) * (0.2 + t[:, None] / 1500)

    out = ddpm.R(eps_model, torch.linspace(-1.5, 1.5, 5)[:, None], 999, ACP, steps=10, eta=eta)
    assert_close(out.flatten(), torch.tensor(expected), atol=1e-5, rtol=0)


def test_a_foreign_scheduler_drives_the_unet():
    """diffusers' DDIM, clipped, 'trailing', calls our network as R does: the same image."""
    diffusers = pytest.importorskip('diffusers')
    net = UNet(3, 3, 16, (1, 2), time=True).requires_grad_(False)
    torch.nn.init.normal_(net.head.weight, std=0.05)
    scheduler = diffusers.DDIMScheduler(1000, beta_start=1e-4, beta_end=0.02, clip_sample=True,
                                        timestep_spacing='trailing', set_alpha_to_one=True)
    scheduler.set_timesteps(10)
    x_t = start = torch.randn(2, 3, 16, 16)
    for t in scheduler.timesteps:
        x_t = scheduler.step(net(x_t, t.expand(2)), t, x_t, use_clipped_model_output=True)[0]
    assert_close(x_t, ddpm.R(net, start, 999, ACP, steps=10), atol=1e-5, rtol=0)


def test_attention_is_the_same_with_and_without_gradients():
    net, h = Attention(64), torch.randn(2, 64, 8, 8)
    torch.nn.init.normal_(net.out.weight)
    with torch.no_grad():
        expected = net(h)
    assert_close(net(h), expected, atol=1e-5, rtol=0)


def test_r_clips_and_leaves_a_clean_image_alone():
    """An eps_model that always answers x0 = c gives c, clipped, whatever eta and steps."""
    for c, expected in ((0.4, 0.4), (1.7, 1.0)):

        def eps(x_t, t, c=c):
            a = ACP[t].view(-1, 1, 1, 1)
            return (x_t - a.sqrt() * c) / (1 - a).sqrt()

        for steps, eta in ((1, 0), (4, 0), (7, 1), (201, 0.5)):
            out = ddpm.R_of_F(eps, torch.zeros(2, 1, 4, 4), 200, ACP, steps=steps, eta=eta)
            assert_close(out, torch.full_like(out, expected), atol=1e-5, rtol=0)
    x = torch.zeros(2, 1, 4, 4, requires_grad=True)
    assert not ddpm.R_of_F(eps, x, 200, ACP, steps=2).requires_grad


def test_ddpm_loss_is_zero_for_the_right_noise_and_its_square_for_none():
    x, eps, t = torch.rand(4, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.tensor([0, 5, 500, 999])
    assert ddpm.ddpm_loss(lambda x_t, t: eps, x, t, eps, ACP) == 0
    assert_close(ddpm.ddpm_loss(lambda x_t, t: 0 * x_t, x, t, eps, ACP), eps.square().mean())
    x_t = ddpm.add_noise(x, t, eps, ACP)
    assert_close(ddpm.predict_x0(x_t, t, eps, ACP, clip=False), x, atol=3e-4, rtol=0)
    assert_close(ddpm.predict_x0(3 * x_t, t, eps, ACP), ddpm.predict_x0(
        3 * x_t, t, eps, ACP, clip=False).clamp(-1, 1))


def test_denoiser_loss_of_the_wiener_filter():
    """For x ~ N(0, s²) the MMSE denoiser scales by k = s² / (s² + σ²); its error is k σ²."""
    s, sigma, g = 0.5, 0.2, torch.Generator().manual_seed(0)
    x = s * torch.randn(1, 1, 1000, 1000, generator=g)
    best = s**2 / (s**2 + sigma**2)
    loss = [ddpm.denoiser_loss(lambda r, k=k: k * r, x, sigma, g).item()
            for k in (best, best - 0.1, best + 0.1)]
    assert_close(loss[0], best * sigma**2, rtol=0.01, atol=0)
    assert loss[0] < min(loss[1:])


def test_ema_update():
    a, b = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    for p, v in ((a, 1.0), (b, 2.0)):
        torch.nn.init.constant_(p.weight, v)
    ddpm.ema_update(a, b, 0.9)
    assert_close(a.weight.item(), 1.1)


# --------------------------------------------------------- the paper's statements
def test_theorem_3_1_gradient_3_is_that_of_the_cross_entropy():
    """(3) = 2 σ² x (7), where (5) is taken by autograd from the mixture's exact density."""
    mixture = Mixture([[-1.0, 0.0], [1.0, 0.5], [0.0, 2.0]], [0.2, 0.5, 0.3], 0.3)
    sigma, g = 0.4, torch.Generator().manual_seed(0)
    f = torch.randn(64, 2, dtype=torch.float64, generator=g).requires_grad_()
    loss = sud2.denoiser_loss(f, mixture.mmse(f, sigma)) * f[0].numel()     # a sum, as (2)
    (gradient_3,) = torch.autograd.grad(loss, f)
    cross_entropy = -mixture.log_p(f, sigma).mean()                         # (4)
    (gradient_5,) = torch.autograd.grad(cross_entropy, f)
    assert_close(gradient_3, 2 * sigma**2 * gradient_5)


def test_tweedie_6():
    mixture, sigma = Mixture([[-1.0], [1.0]], [0.3, 0.7], 0.25), 0.5
    r = torch.linspace(-2, 2, 41, dtype=torch.float64)[:, None].requires_grad_()
    (score,) = torch.autograd.grad(mixture.log_p(r, sigma).sum(), r)
    assert_close(mixture.mmse(r, sigma), r + sigma**2 * score)


def descend_on_mixture(lam2, steps=200):
    """32 outputs in 8 dimensions, free to move, under (2) and L_reg on themselves as latents."""
    means = torch.randn(4, 8, generator=torch.Generator().manual_seed(1)).tolist()
    mixture = Mixture(means, [0.25] * 4, 0.3)
    f = torch.randn(32, 8, dtype=torch.float64,
                    generator=torch.Generator().manual_seed(2)).requires_grad_()
    opt = torch.optim.Adam([f], lr=0.03)
    for _ in range(steps):
        loss = sud2.total_loss(0, sud2.denoiser_loss(f, mixture.mmse(f, 2.0)), sud2.reg_loss(f),
                               1.0, lam2)
        opt.zero_grad()
        loss.backward()
        opt.step()
    return f.detach()


def test_corollary_3_2_collapse_and_what_l_reg_does():
    collapsed, held = descend_on_mixture(0.0), descend_on_mixture(1.0)
    assert metrics.correlation(collapsed) > 0.99 and collapsed.std(0).mean() < 0.02
    assert metrics.correlation(held) < 0.1 and held.std(0).mean() > 0.15


def test_corollary_3_3_smoothing_moves_the_maximum_between_the_modes():
    mixture = Mixture([[-1.0], [1.0]], [0.5, 0.5], 0.2)
    r = torch.linspace(-1.5, 1.5, 301, dtype=torch.float64)[:, None]
    assert abs(r[mixture.log_p(r, 0.3).argmax()].abs().item() - 1) < 0.02
    assert abs(r[mixture.log_p(r, 1.5).argmax()].item()) < 0.02


def test_pseudo_label_is_fixed_and_9_is_the_gradient():
    x_hat = torch.randn(4, 3, 8, 8, requires_grad=True)
    denoiser = torch.nn.Conv2d(3, 3, 1)
    a = sud2.parse(['--sigma', '0.5'])
    for kind in ('denoise', 'noise, denoise'):
        label = sud2.pseudo_label(kind, x_hat, None, None, sud2.Models(None, denoiser), a, ACP,
                                  torch.Generator().manual_seed(0))
        nu = 0.5 * torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        expected = denoiser(x_hat + nu if kind.startswith('noise') else x_hat).detach()
        assert_close(label, expected)
        (gradient,) = torch.autograd.grad(sud2.denoiser_loss(x_hat, label), x_hat)
        assert_close(gradient, 2 * (x_hat.detach() - expected) / x_hat.numel())
    tracked = denoiser(x_hat)  # a label that carries a graph is cut off all the same
    (gradient,) = torch.autograd.grad(sud2.denoiser_loss(x_hat, tracked), x_hat)
    assert_close(gradient, 2 * (x_hat - tracked).detach() / x_hat.numel())
    loss = sud2.denoiser_loss(x_hat, tracked)
    assert torch.autograd.grad(loss, denoiser.weight, allow_unused=True) == (None,)


@pytest.mark.parametrize('method, falls', [
    ('sud', True), ('sud-te', True), ('sud2', True), ('sud2-kl', False), ('sud2-kl+g', False),
    ('oracle', False)])
def test_lam1_falls_where_a_pull_does_not_end_by_itself(tmp_path, monkeypatch, method, falls):
    """With the learning rate, for the paper's labels; D^f - D^x and the truth end by themselves.
    An ensemble's label is let in little by little."""
    run, used = sud2.Setup(tiny(tmp_path, '--warmup', '1', '--updates', '6', '--points', '1')), []
    total_loss = sud2.total_loss
    monkeypatch.setattr(sud2, 'total_loss', lambda paired, denoiser, reg, lam1, lam2: (
        used.append(lam1), total_loss(paired, denoiser, reg, lam1, lam2))[1])
    split = sud2.load_split(run.a, 0)
    models = sud2.Models(run.net(0, time=True), run.net(0, residual=True))
    sud2.train(run, method, 0, split, models, lambda f: {})
    lam1 = {'oracle': 1, 'sud2-kl+g': 5 * run.a.lam1}.get(method, run.a.lam1)
    ramp = [math.exp(-5), math.exp(-5 / 36)] if method == 'sud-te' else [1, 1]
    assert used == pytest.approx([lam1 * (sud2.learning_rate(k, 6) if falls else 1) * r
                                  for k, r in zip(range(1, 6), ramp + 3 * [1])])


@pytest.mark.parametrize('method, ends', [('sud', False), ('sud2', False), ('sud2-kl', True)])
def test_a_long_run_is_pulled_no_more_in_all_than_one_of_400_updates(tmp_path, monkeypatch, method,
                                                                     ends):
    monkeypatch.setattr(sud2, 'fit', lambda run, name, parts, update, schedule, steps, *more: [
        schedule(k)['lam1'] for k in range(steps)])
    for updates, share in ((300, 1), (400, 1), (2000, 1 / 5)):
        run = sud2.Setup(tiny(tmp_path, '--updates', str(updates)))
        models, split = sud2.Models(run.net(0, time=True)), sud2.load_split(run.a, 0)
        _, _, used = sud2.train(run, method, 0, split, models, None)    # nothing is drawn
        assert used == pytest.approx([run.a.lam1 * (1 if ends else share * sud2.learning_rate(
            k, updates)) for k in range(updates)])


def test_what_is_fixed_is_in_no_graph(tmp_path, monkeypatch):
    """Labels, what they are made from, and what an update tells: a graph that is kept costs memory,
    or bends f. All weights here want gradients, as those of a prior from elsewhere may."""
    run = sud2.Setup(tiny(tmp_path, '--updates', '3', '--warmup', '1', '--points', '1'))
    split, fixed, compare = sud2.load_split(run.a, 0), [], sud2.denoiser_loss
    begin, mean = sud2.Unpaired.start, sud2.Group.mean
    monkeypatch.setattr(sud2, 'denoiser_loss', lambda x_hat, label: (
        fixed.append(label), compare(x_hat, label))[1])
    monkeypatch.setattr(sud2.Unpaired, 'start', lambda *what: (
        fixed.append(begin(*what)), fixed[-1])[1])
    monkeypatch.setattr(sud2.Group, 'mean', lambda numbers: (
        fixed.extend(numbers.values()), mean(numbers))[1])
    ema, _ = sud2.train_prior(run, split.images, 'prior')
    fixed += ema.parameters()
    prior, other = run.net(0, time=True), run.net(0, residual=True)
    models = sud2.Models(prior, other, SimpleNamespace(to_x=other))
    for method in 'cyclegan-ssl', 'sud-te', 'sud-mt', 'sud2', 'sud2-kl':
        sud2.train(run, method, 0, split, models, lambda f: {})
    x_hat = torch.randn(2, 3, 16, 16, requires_grad=True)
    label, loss = sud2.entropy_label(x_hat, prior, prior, run.a, ACP, None)
    assert torch.autograd.grad(loss, x_hat, allow_unused=True) == (None,), 'D^f learns, f does not'
    assert len(fixed) > 50 and not any(v.requires_grad for v in (label, *fixed))


def test_scores_take_no_gradients(tmp_path):
    class Network:
        factor = 1

        def __call__(self, x, *t, latent=False):
            assert not torch.is_grad_enabled()
            return (x, x) if latent else x

        def encode(self, x, t):
            return *self(x, latent=True), None

    run, u = sud2.Setup(tiny(tmp_path)), torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    sud2.held_out_loss(run, Network(), u)
    sud2.reconstruct(run, Network(), u)
    sud2.whole(run, Network(), data.to_float(u[:1]))
    sud2.prior_features(run, Network(), data.to_float(u))
    forward_minutes(run, Network())


def test_sud2_kl_gradient_is_that_of_the_kl_divergence():
    """KL(p_{f+ν} ‖ p_{x+ν}) of three outputs on a line, integrated on a grid, by autograd."""
    t, s = 250, 0.2
    sigma = ((1 - ACP.double()[t]) / ACP.double()[t]).sqrt()
    data_x = Mixture([[-1.0], [0.6]], [0.4, 0.6], s)
    f = torch.tensor([-0.5, 0.1, 0.9], dtype=torch.float64, requires_grad=True)
    r = torch.linspace(-9, 9, 4001, dtype=torch.float64)
    p_f = (-(r[:, None] - f).square() / (2 * sigma**2)).exp().mean(1) / (
        2 * math.pi * sigma**2).sqrt()
    log_p_x = data_x.log_p(r[:, None], sigma)
    (exact,) = torch.autograd.grad((p_f * (p_f.log() - log_p_x)).sum() * (r[1] - r[0]), f)
    outputs = Mixture(f.detach()[:, None].tolist(), [1 / 3] * 3, 0.0)  # D^f, when ideal
    a, g = sud2.parse(['--kl-range', str(t), str(t + 1)]), torch.Generator().manual_seed(0)
    for i in range(3):
        x_hat = f.detach()[i].expand(200000, 1)
        label, _ = sud2.entropy_label(x_hat, data_x.eps, outputs.eps, a, ACP, g)
        assert_close((x_hat - label).mean().item(), (3 * sigma**2 * exact[i]).item(), atol=0.01,
                     rtol=0)


def test_sud2_kl_reaches_mean_and_variance_where_2_reaches_the_mode():
    """f(y) = a y + b, y ~ N(0, 1), data N(.3, .5²): (2) ends in a point, sud2-kl in the data."""
    prior, ends = GaussianPrior(0.3, 0.5), {}
    flags, g = sud2.parse(['--kl-range', '20', '500']), torch.Generator().manual_seed(0)
    for kind in ('denoise', 'entropy'):
        a, b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (1.0, -0.5))
        opt = torch.optim.Adam([a, b], lr=0.02)
        for step in range(600):
            opt.param_groups[0]['lr'] = 0.02 * (1 - step / 600)
            x_hat = a * torch.randn(256, 1, dtype=torch.float64, generator=g) + b
            if kind == 'entropy':
                outputs = GaussianPrior(b.item(), a.item())
                label, _ = sud2.entropy_label(x_hat, prior.eps, outputs.eps, flags, ACP, g)
            else:
                ideal = 0.3 + 0.25 / (0.25 + 0.04) * (x_hat - 0.3)  # D_σ for σ = 0.2
                label = sud2.pseudo_label(kind, x_hat, None, None,
                                          sud2.Models(None, lambda r, d=ideal: d), flags, ACP, g)
            opt.zero_grad()
            sud2.denoiser_loss(x_hat, label).backward()
            opt.step()
        ends[kind] = abs(a.item()), b.item()
    assert_close(ends['entropy'], (0.5, 0.3), atol=0.04, rtol=0)
    assert_close(ends['denoise'], (0.0, 0.3), atol=0.04, rtol=0)


def test_sud2_kl_trains_d_f_to_predict_the_noise(monkeypatch):
    monkeypatch.setattr(ddpm, 'noise_like', lambda x, generator=None: torch.full_like(x, 0.7))
    for answer, loss in ((0.7, 0.0), (0.2, 0.25)):
        def fake(x_t, t, answer=answer):
            return torch.full_like(x_t, answer)
        got = sud2.entropy_label(torch.zeros(2, 3, 4, 4), fake, fake, sud2.parse([]), ACP, None)
        assert_close(got[1].item(), loss, atol=1e-6, rtol=0)


def test_no_denoiser_moves_the_tone(tmp_path):
    """Of D^x and D^f that know their images but for a tone, the label is free of both tones; it is
    measured where the pairs show another tone, and not where most pixels stay."""
    run, u = sud2.Setup(tiny(tmp_path)), torch.full((2, 3, 16, 16), 204, dtype=torch.uint8)
    tone = torch.tensor([0.1, 0.0, -0.1]).view(1, 3, 1, 1)

    def knows(x, off, grain=0):
        def eps_model(x_t, t):
            a = ACP[t].view(-1, 1, 1, 1)
            nu = (x_t - a.sqrt() * x) / (1 - a).sqrt()
            return (x_t - a.sqrt() * (x + off + grain * nu)) / (1 - a).sqrt()
        return eps_model
    prior = knows(0.6, tone)                                        # 204 / 127.5 - 1
    bias = sud2.tone_bias(run, knows(0.6, tone, grain=5), u)
    assert bias.shape == (1, 3, 1, 1)
    assert_close(bias, tone, atol=1e-4, rtol=0)
    x_hat = torch.rand(4, 3, 16, 16)
    label, _ = sud2.entropy_label(x_hat, prior, knows(x_hat, 3 * tone), run.a, ACP, None, bias)
    assert_close(label, torch.full_like(x_hat, 0.6), atol=1e-4, rtol=0)
    hole, method = u.clone(), sud2.METHODS['sud2-kl']
    hole[:, :, :8, :15] = 0
    for y, measured in ((hole, False), (u - 1, True)):
        split = data.Split(u, y, y, None, u, None, y)
        models = sud2.Models(run.net(0, time=True))
        parts = sud2.Unpaired(run, method, 0, split, models, None)
        assert (parts.bias is not None) == measured


def test_what_g_covers_leaves_no_trace():
    """measured() is x where g covers nothing and the cover alone where it covers all."""
    x, cover = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    for share, expected in ((-99, x), (99, cover), (0.5, (x + cover) / 2)):
        got = sud2.measured(lambda _, s=share: torch.cat([cover, 0 * x + s], 1), x, x[..., :1, :1])
        assert_close(got, expected)


def test_g_learns_a_hole_that_moves_with_the_image():
    """Black left half, hole in it; or the same at the right: seen on images that were not shown."""
    torch.manual_seed(0)
    g = UNet(2, 2, 16, (1, 2), patch=2)
    opt = Muon(g, 5e-3)

    def examples(n):
        x = torch.rand(n, 1, 16, 16)
        x[:, :, :, :8] = -0.5
        y = x.clone()
        y[:, :, 4:12, 2:6] = 0.25
        flip = torch.rand(n) < 0.5
        return sud2.mirrored(x, flip), sud2.mirrored(y, flip)
    for _ in range(80):
        x, y = examples(16)
        sud2.descend(sud2.paired_loss(sud2.measured(g, x, sud2.change(x, y)), y), g, opt, 5e-3)
    x, y = examples(64)
    with torch.no_grad():
        assert (sud2.measured(g, x, sud2.change(x, y)) - y).square().mean().sqrt() < 0.05


def test_g_is_told_what_most_pixels_undergo():
    """Fog that differs from image to image: g gives a clean one the fog that c says."""
    x, y = torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4)
    y[0] = 0.25
    y[:, :, :2, 1:] = 9                                 # 6 of 16 pixels: a hole leaves c alone
    assert sud2.change(x, y).flatten().tolist() == [0.25, 0]
    torch.manual_seed(0)
    g = UNet(2, 2, 16, (1, 2), patch=2)
    opt = Muon(g, 5e-3)
    for _ in range(80):
        x, share = torch.rand(8, 1, 16, 16), 0.8 * torch.rand(8, 1, 1, 1)
        y = torch.lerp(x, torch.ones(()), share)
        sud2.descend(sud2.paired_loss(sud2.measured(g, x, sud2.change(x, y)), y), g, opt, 5e-3)
    x, other = torch.rand(2, 16, 1, 16, 16)
    for share in (0.1, 0.7):
        y, foggy = (torch.lerp(u, torch.ones(()), share) for u in (x, other))
        with torch.no_grad():
            y_hat = sud2.measured(g, x, sud2.change(other, foggy))
        assert (y_hat - y).abs().mean() < .05


@pytest.mark.parametrize('method, first, y_u, others, rest', [
    ('sud2-kl', 0, 150, 0, 0), ('sud2-kl+g', 1, 150, 0, 0), ('sud2-kl+g', 0, 150, 0, 1),
    ('sud2-kl+g', 0, 0, 0, 0),          # of black g leaves .08 of the change, of grey .97
    ('sud2-kl+g', 0, 150, 9, 0)])       # and less in the mean over processes
def test_pairs_of_clean_images_and_what_g_learns(tmp_path, monkeypatch, method, first, y_u, others,
                                                 rest):
    """The first update, of flat images: f(y) = y - .2, say, and g(x) = (1 - sigmoid(-2)) x."""
    run = sud2.Setup(tiny(tmp_path, '--warmup', '0', '--updates', '1', '--points', '1'))
    monkeypatch.setattr(sud2, 'G_LEARNS', first)
    monkeypatch.setattr(sud2, 'tone_bias', lambda *_: None)
    monkeypatch.setattr(sud2.Group, 'mean', lambda numbers: {
        k: v + others * (k == 'undone') for k, v in numbers.items()})
    losses, told, measured, values = [], [], sud2.measured, (30, 90, y_u, 250)
    x_p, y_p, y_u, x_u = (torch.full((1, 3, 16, 16), v, dtype=torch.uint8) for v in values)
    split = data.Split(x_p, y_p, y_u, None, x_u, None, y_u)
    descend, net = sud2.descend, run.net

    def biased(seed, residual=False, **kind):
        unet = net(seed, residual=residual, **kind)
        if residual:                    # with a share of half
            unet.head.bias.data[:3] = -0.4
        return unet
    monkeypatch.setattr(run, 'net', biased)
    monkeypatch.setattr(sud2, 'descend', lambda loss, *more: (
        losses.append(loss.item()), descend(loss, *more)))
    monkeypatch.setattr(sud2, 'measured', lambda g, x, c: (
        told.extend(c[:, 0, 0, 0].tolist()), measured(g, x, c))[1])
    prior = run.net(0, time=True)
    sud2.train(run, method, 0, split, sud2.Models(prior), lambda f: {})
    x_p, y_p, y_u, x_u = (2 * v / 255 - 1 for v in values)
    k = 1 / (1 + math.exp(-2))
    made = k * x_u + rest * (y_u - k * (y_u - 0.2))
    clean = (made - 0.2 - x_u) ** 2 if '+g' in method else 0.2 ** 2
    _, *of_g, of_f = losses                 # D^f is the prior still: nothing is pulled
    assert of_g == [pytest.approx((k * x_p - y_p) ** 2 + (k * (y_u - 0.2) - y_u) ** 2, abs=1e-4)
                    ] * ('+g' in method)
    c = [y_p - x_p] + 8 * [0.2] if '+g' in method else []               # x_u gets that of y_u
    assert told == pytest.approx(c, abs=1e-4)
    assert of_f == pytest.approx((y_p - 0.2 - x_p) ** 2 + run.a.lam3 * clean, abs=1e-4)
    log = [json.loads(line) for line in (tmp_path / 'log.jsonl').read_text().splitlines()]
    assert log[-1]['clean'] == pytest.approx(clean, abs=1e-4)


def test_paired_loss_and_total():
    x = torch.zeros(2, 3, 4, 4)
    assert_close(sud2.paired_loss(x + 0.5, x).item(), 0.25)
    assert_close(sud2.total_loss(1.0, 10.0, 100.0, 0.1, 0.01), 3.0)


def lpips_files(folder):
    """Writes random weights as LPIPS' two files -> AlexNet's features by torch's own layers, the
    linear layers, the files."""
    torch.manual_seed(0)
    conv, relu, pool = torch.nn.Conv2d, torch.nn.ReLU, torch.nn.MaxPool2d
    net = torch.nn.Sequential(
        conv(3, 64, 11, 4, 2), relu(), pool(3, 2), conv(64, 192, 5, 1, 2), relu(), pool(3, 2),
        conv(192, 384, 3, 1, 1), relu(), conv(384, 256, 3, 1, 1), relu(), conv(256, 256, 3, 1, 1),
        relu())
    lin = {f'lin{k}.model.1.weight': torch.rand(1, c, 1, 1)
           for k, c in enumerate((64, 192, 384, 256, 256))}
    files = folder / 'alexnet.pth', folder / 'alex.pth'
    torch.save({f'features.{k}': v for k, v in net.state_dict().items()}, files[0])
    torch.save(lin, files[1])
    return net, lin, files


def test_lpips_equals_a_walk_through_the_layers(tmp_path):
    net, lin, files = lpips_files(tmp_path)
    a, b = 2 * torch.rand(2, 3, 3, 40, 48) - 1
    expected, k = torch.zeros(3), 0
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
    u, v = (a - shift) / scale, (b - shift) / scale
    with torch.no_grad():
        for layer in net:
            u, v = layer(u), layer(v)
            if isinstance(layer, torch.nn.ReLU):
                unit = [w / (w.norm(dim=1, keepdim=True) + 1e-10) for w in (u, v)]
                weighted = (unit[0] - unit[1]) ** 2 * lin[f'lin{k}.model.1.weight']
                expected, k = expected + weighted.sum(1).mean((1, 2)), k + 1
    got = metrics.lpips(a, b, metrics.lpips_weights(*files))
    assert_close(got, expected, atol=1e-5, rtol=0)
    assert (metrics.lpips(a, a, metrics.lpips_weights(*files)) == 0).all()
    with pytest.raises(ValueError, match='alex.pth'):
        metrics.lpips_weights(*files[::-1])


@pytest.mark.filterwarnings('ignore:.*torch.jit.*')
def test_lpips_and_fid_columns(tmp_path):
    """Weights that a user names fill the columns; FID says how many features it stands on."""
    _, _, files = lpips_files(tmp_path)

    class Features(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, u, return_features: bool = False):
            asked = return_features and not self.training           # 3 features, else many
            return self.scale * u.float().mean((2, 3)) if asked else u.float()

    torch.jit.script(Features()).save(tmp_path / 'inception.pt')
    flags = tiny(tmp_path / 'run', '--method', 'supervised', '--size', '32', '--lpips-weights',
                 *map(str, files), '--fid-weights', str(tmp_path / 'inception.pt'))
    assert not sud2.optional_metrics(flags)[1](torch.ones(2, 3, 4, 4).byte()).requires_grad
    sud2.main(flags)
    s = json.loads((tmp_path / 'run/metrics.json').read_text())['methods']['supervised']['0']
    assert s['lpips'] > 0 and s['fid'] > 0 and s['fid_features'] == 3
    assert '| FID-3 ↓ |' in text_of(tmp_path / 'run/table.md')


def test_lpips_weights_are_downloaded_once(tmp_path, monkeypatch):
    asked = []

    def download(url, path, hash_prefix, progress):
        asked.append(url.rsplit('/', 1)[1])
        assert not path.write_bytes(b'') and len(hash_prefix) == 64
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    monkeypatch.setattr(torch.hub, 'download_url_to_file', download)
    paths = sud2.download_lpips()
    assert paths == sud2.download_lpips() and all(path.exists() for path in paths)
    assert asked == ['alexnet-owt-7be5be79.pth', 'alex.pth']
    paths[1].unlink()
    monkeypatch.setattr(torch.hub, 'download_url_to_file', lambda *_, **__: tmp_path.read_bytes())
    with pytest.raises(ValueError, match='--lpips-weights download: https://.*alex.pth: '):
        sud2.download_lpips()


# --------------------------------------------------------- the paper's other methods
def test_temporal_ensemble_is_the_bias_corrected_average():
    ensemble, index = sud2.Ensemble(3, (1, 2, 2), 'cpu'), torch.tensor([2, 0])
    first, second = torch.ones(2, 1, 2, 2), 3 * torch.ones(2, 1, 2, 2)
    assert_close(ensemble.update(index, first), first)
    expected = (0.6 * 0.4 * 1 + 0.4 * 3) / (1 - 0.6**2)
    assert_close(ensemble.update(index, second), torch.full((2, 1, 2, 2), expected))
    assert ensemble.visits.tolist() == [2, 0, 2] and (ensemble.Z[1] == 0).all()
    many = torch.randn(64, 3, 32, 32)
    for _ in range(20):                 # of an image drawn often the last stays, with any threads
        ensemble = sud2.Ensemble(1, many.shape[1:], 'cpu')
        ensemble.update(torch.zeros(64, dtype=torch.long), many)
        assert_close(ensemble.Z[0], 0.4 * many[-1])
    assert sud2.ramp_up(0, 10) == pytest.approx(math.exp(-5)) and sud2.ramp_up(10, 10) == 1
    assert [sud2.teacher_decay(k) for k in (0, 1, 3, 10**6)] == [0, 0.5, 0.75, 0.999]


@pytest.mark.parametrize('method, share', [('supervised', .03), ('sud2-kl+g', 0)])
def test_f_is_drawn_to_the_mean_of_its_weights_from_an_update_on(
        tmp_path, monkeypatch, method, share):
    """In 6 updates, from the third on, by three hundredths each time: scored and returned is that
    f, and the next update begins from it. With g it is left alone."""
    run = sud2.Setup(tiny(tmp_path, '--updates', '6', '--points', '6', '--average-from', '3'))
    began, ended, scored, descend = [], [], [], sud2.descend

    def weights(f):
        return torch.cat([p.detach().flatten() for p in f.parameters()])

    def recorded(loss, net, opt, lr):
        of_f = net.residual
        began.extend([weights(net)] * of_f)
        descend(loss, net, opt, lr)
        ended.extend([weights(net)] * of_f)
    monkeypatch.setattr(sud2, 'descend', recorded)
    split, models = sud2.load_split(run.a, 0), sud2.Models(run.net(0, time=True))
    f, _, _ = sud2.train(run, method, 0, split, models,
                         lambda f: scored.append(weights(f)) or {})
    means = [torch.stack(ended[2:k]).mean(0) for k in range(3, 7)]
    drawn = [*ended[:3], *((1 - share) * w + share * mean
                           for w, mean in zip(ended[3:], means[1:]))]
    assert_close(torch.stack(scored), torch.stack(drawn), rtol=0, atol=1e-6)
    assert_close(torch.stack(began[1:]), torch.stack(scored[:-1]), rtol=0, atol=0)
    assert_close(torch.stack(scored[:3]), torch.stack(ended[:3]), rtol=0, atol=0)
    assert_close(weights(f), scored[-1], rtol=0, atol=0)


def test_cyclegan_has_the_original_sizes_and_fits_small_images():
    def count(net):
        return sum(p.numel() for p in net.parameters())

    assert count(cyclegan.Generator()) == 11_378_179 and cyclegan.Generator.factor == 4
    assert count(cyclegan.discriminator()) == 2_764_737
    assert count(cyclegan.CycleGAN()) == 2 * (11_378_179 + 2_764_737)
    assert [cyclegan.sizes(n) for n in (64, 128, 256)] == [(32, 4, 2), (64, 6, 3), (64, 9, 3)]
    for size in (32, 64):
        width, blocks, layers = cyclegan.sizes(size)
        x = torch.zeros(1, 3, size, size)
        x_hat, z = cyclegan.Generator(3, width, blocks)(x, latent=True)
        assert x_hat.shape == x.shape and z.shape[-1] == size // 4 and x_hat.abs().max() <= 1
        assert cyclegan.discriminator(3, 64, layers)(x).shape[-1] == size // 4 - 2


def test_cyclegan_blocks_by_hand():
    """A residual block of convolutions that copy; the patch that one verdict of D depends on."""
    block, h = cyclegan.Residual(4), torch.randn(2, 4, 6, 6)
    for conv in (block.body[0], block.body[3]):
        torch.nn.init.dirac_(conv.weight)
        torch.nn.init.zeros_(conv.bias)

    def standard(v):
        return (v - v.mean((2, 3), True)) / v.std((2, 3), keepdim=True, correction=0)
    assert_close(block(h), h + standard(standard(h).clamp(min=0)), atol=1e-3, rtol=1e-3)
    for layers, patch, padded in ((3, 70, 23), (2, 34, 11)):
        net, x = cyclegan.discriminator(1, 4, layers), torch.rand(1, 1, 128, 128).requires_grad_()
        for k, layer in enumerate(net):
            net[k] = torch.nn.Identity() if isinstance(layer, torch.nn.InstanceNorm2d) else layer
        assert {m.negative_slope for m in net if isinstance(m, torch.nn.LeakyReLU)} == {0.2}
        verdict = net(x)
        k = verdict.shape[2] // 2
        verdict[0, 0, k, k].backward()
        for d in (0, 1):
            begin, *_, last = (x.grad[0, 0] != 0).any(d).nonzero().flatten().tolist()
            assert (begin, last - begin + 1) == (k * 2 ** layers - padded, patch)
    opt_G, opt_D = cyclegan.optimisers(SimpleNamespace(
        generators=block.parameters, discriminators=net.parameters, parameters=net.parameters))
    for opt, ours in ((opt_G, block), (opt_D, net)):
        group, = opt.param_groups
        assert group['lr'] == 2e-4 and group['betas'] == (0.5, 0.999)
        assert group['params'] == list(ours.parameters())
    convolutions = [m for m in cyclegan.CycleGAN(3, 32, 2, 2).modules()
                    if isinstance(m, (torch.nn.Conv2d, torch.nn.ConvTranspose2d))]
    weights = torch.cat([m.weight.flatten() for m in convolutions])
    assert_close((weights.mean().item(), weights.std().item()), (0., 0.02), atol=1e-4, rtol=0)
    assert not any(m.bias.any() for m in convolutions)


def test_cyclegan_losses_by_hand():
    """Generators that add a constant and verdicts that are one: every term is known."""
    gan = SimpleNamespace(to_x=lambda y: y + 0.5, to_y=lambda x: x - 0.25,
                          real_x=lambda x: torch.full((2, 1), 0.8),
                          real_y=lambda y: torch.full((2, 1), -1.0))
    y, x = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 3.0)
    terms, fake_y, fake_x = cyclegan.generator_loss(gan, y, x)
    assert_close(terms['adversarial'].item(), 0.2**2 + 2.0**2)
    assert_close(terms['cycle'].item(), 10 * (0.25 + 0.25))
    assert_close(terms['identity'].item(), 5 * (0.5 + 0.25))
    assert_close(fake_x, y + 0.5)
    assert_close(fake_y, x - 0.25)
    loss = cyclegan.discriminator_loss(lambda v: v, torch.tensor([0.7]), torch.tensor([0.4]))
    assert_close(loss.item(), 0.5 * (0.3**2 + 0.4**2))
    assert cyclegan.gan_loss(torch.ones(2, dtype=torch.bfloat16), True).dtype == torch.float32
    assert [cyclegan.linear_decay(k, 8) for k in (0, 4, 6, 8)] == [1, 1, 0.5, 0]


def test_cyclegan_pool_gives_back_old_images_half_of_the_time():
    g, pool, given = torch.Generator().manual_seed(0), [], 0
    for k in range(0, 50, 5):
        images = torch.arange(k, k + 5.).view(5, 1)
        assert_close(cyclegan.pooled(pool, images, g), images)
    assert_close(pool[0], torch.arange(50.).view(50, 1))
    for k in range(50, 1050, 5):
        images, before = torch.arange(k, k + 5.).view(5, 1), pool[0].clone()
        out = cyclegan.pooled(pool, images, g)
        given += (out != images).sum().item()
        there, now = (torch.cat(v).flatten().sort().values
                      for v in ([before, images], [pool[0], out]))
        assert_close(there, now, msg='what comes out goes from the pool, and nothing else')
    assert 440 < given < 560
    assert cyclegan.pooled([], torch.ones(1, 1).bfloat16(), g).dtype == torch.float32


def test_cyclegan_step_moves_generators_and_discriminators_by_their_own_losses(monkeypatch):
    torch.manual_seed(0)
    gan, learns = cyclegan.CycleGAN(3, 16, 1, 2), []
    monkeypatch.setattr(cyclegan, 'generator_loss', lambda gan, y, x, of=cyclegan.generator_loss: (
        learns.extend(p.requires_grad for p in gan.discriminators()), of(gan, y, x))[1])
    opt_G, opt_D = cyclegan.optimisers(gan, 0.0)
    y, x = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    told = cyclegan.train_step(gan, opt_G, opt_D, y, x)
    assert not any(learns) and not any(v.requires_grad for v in told.values())
    terms, fake_y, fake_x = cyclegan.generator_loss(gan, y, x)
    expected = torch.autograd.grad(sum(terms.values()), gan.generators())
    for p, e in zip(gan.generators(), expected):
        assert_close(p.grad, e)
    loss = (cyclegan.discriminator_loss(gan.real_x, x, fake_x.detach())
            + cyclegan.discriminator_loss(gan.real_y, y, fake_y.detach()))
    for p, e in zip(gan.discriminators(), torch.autograd.grad(loss, gan.discriminators())):
        assert_close(p.grad, e)
    before = [p.detach().clone() for p in gan.parameters()]
    for opt in (opt_G, opt_D):
        opt.param_groups[0]['lr'] = 1e-3
    cyclegan.train_step(gan, opt_G, opt_D, y, x)        # Adam's step along the same gradient again
    for p, q in zip(gan.parameters(), before):
        sure = p.grad.abs() > 1e-4
        assert_close((q - p)[sure], 1e-3 * p.grad[sure].sign(), atol=1e-5, rtol=0)


# --------------------------------------------------------- dehazing, own folders, restoring
def picture(path, size=(24, 20), seed=0, mode='RGB', **how):
    """Writes a random picture of width x height and returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    channels = {'L': (), 'RGB': (3,), 'RGBA': (4,)}[mode]
    pixels = rng.integers(0, 256, (size[1], size[0], *channels), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **how)
    return path


def flat(path, colour, size=(24, 20)):
    """Writes a picture of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size, colour).save(path)


@pytest.fixture
def folders(tmp_path):
    """A user's own data: two pairs, measurements, clean images, two whole test images."""
    root = tmp_path / 'own'
    for k in range(2):
        for part in ('paired/x', 'paired/y', 'test/x', 'test/y'):
            picture(root / part / f'{k}.png', (21 + 9 * k, 33), seed=k)
    for k in range(4):
        picture(root / 'measurements' / f'm{k}.png', seed=10 + k)
        picture(root / 'images' / f'c{k}.jpg', seed=20 + k)
    return root


def test_scenes_are_reproducible_and_haze_follows_its_formula():
    x, y = data.draw_scenes(12, 32, seed=3)
    more, _ = data.draw_scenes(260, 32, seed=3)
    assert torch.equal(x, more[:12]) and not torch.equal(x, data.draw_scenes(12, 32, seed=4)[0])
    assert len({u.numpy().tobytes() for u in x}) == 12
    contrast = [u.float().flatten(1).std(1).mean() for u in (x, y)]
    assert contrast[1] < 0.85 * contrast[0]
    J, d, A = torch.rand(2, 3, 4, 4), torch.rand(2, 1, 4, 4), torch.rand(2, 3, 1, 1)
    beta = torch.tensor([0.0, 2.0]).view(2, 1, 1, 1)
    hazy = data.haze(J, d, beta, A)
    assert_close(hazy[0], J[0])
    t = math.exp(-2 * d[1, 0, 3, 1])
    assert_close(hazy[1, 2, 3, 1], J[1, 2, 3, 1] * t + A[1, 2, 0, 0] * (1 - t))
    p = data.scene_parameters(torch.Generator().manual_seed(0))
    depth = data.paint_scenes(p, 32)[1]
    assert (depth[:, :, 0].mean() > 2 * depth[:, :, -1].mean()) and depth.min() > 0


def test_dehaze_runs_in_grey_and_has_no_hole(tmp_path):
    sud2.main(tiny(tmp_path, '--task', 'dehaze', '--channels', '1', '--method', 'sud2'))
    s = json.loads((tmp_path / 'metrics.json').read_text())['methods']['sud2']['0']
    assert s['psnr'] > 0 and s['psnr_hole'] is None and s['psnr_visible'] is None
    assert weights(tmp_path / 'sud2-s0.pt')['head.weight'].shape[0] == 2   # and a share
    assert 'in the hole' not in text_of(tmp_path / 'table.md')
    colour, grey = (sud2.load_split(tiny(tmp_path, '--task', 'dehaze', '--channels', c), 0)
                    for c in '31')
    for x, y in (('test_x', 'test_y'), ('pairs_x', 'pairs_y'), ('measurements_x', 'measurements')):
        x, y = (getattr(colour, side).float().std((2, 3)).mean() for side in (x, y))
        assert y < x, 'haze takes contrast'
    for u, v in zip(colour.images, grey.images):
        pillow = np.array(Image.fromarray(u.permute(1, 2, 0).numpy()).convert('L'))
        assert_close(v[0].int(), torch.from_numpy(pillow).int(), atol=1, rtol=0)


@pytest.mark.parametrize('layout, tested', [
    ('O-HAZE', [3, 5]), ('SOTS indoor', [3, 3]), ('SOTS outdoor', [3, 3])])
def test_haze_folders_are_split_by_scene(tmp_path, layout, tested):
    names = {'O-HAZE': ('hazy/{:02d}_outdoor_hazy.JPG', 'GT/{:02d}_outdoor_GT.jpg', 1),
             'SOTS indoor': ('indoor/hazy/{}_{}.png', 'indoor/gt/{}.png', 3),
             'SOTS outdoor': ('outdoor/hazy/{:04d}_0.8_0.{}.jpg', 'outdoor/clear/{:04d}.png', 2)}
    hazy, clear, views = names[layout]
    for k in range(1, 9):                               # red tells the scene, green haze
        flat(tmp_path / clear.format(k), (20 * k, 0, 0), (44 + k, 36))
        for v in range(views):                      # the ground truth may have a border more
            flat(tmp_path / hazy.format(k, v + 1), (20 * k, 200, 0), (42 + k, 34))
    flat(tmp_path / 'more' / '1.png', (240, 0, 0))
    sizes = dict(size=16, pairs=2, measurements=2, clean=2, test=2)
    split = data.haze_folders(tmp_path, **sizes, seed=0, images=tmp_path / 'more')
    assert [x.shape for x in split.test_x] == [y.shape for y in split.test_y]
    assert len(split.test_x) == 2 and len(split.pairs_x) == 8
    assert split.images.shape[1:] == (3, 16, 16)
    for clean, hazy in ((split.pairs_x, split.pairs_y), (split.images, split.measurements),
                        (split.measurements_x, split.measurements), (split.test_x, split.test_y)):
        assert max(u[1].max() for u in clean) < 50 and min(u[1].min() for u in hazy) > 150
    scenes = [[round(u[0].float().mean().item() / 20) for u in part] for part in (
        split.pairs_y, split.pairs_x, split.measurements, split.measurements_x, split.images,
        split.test_y, split.test_x)]
    assert scenes[0] == scenes[1] and scenes[2] == scenes[3] and scenes[5] == scenes[6]
    sides = [set(scenes[i]) for i in (0, 2, 4, 5)]
    assert sum(map(len, sides)) == len(set.union(*sides)) and len(sides[0]) == 2
    assert 12 in sides[2] and len(sides[2]) == 2
    clean = data.haze_folders(tmp_path, 16, 1, 1, 2, 1, seed=0).images
    assert len({u[0, 0, 0].item() // 18 for u in clean}) == 2, 'each of another scene'
    assert scenes[6] == tested, 'always these'
    tests = data.haze_folders(tmp_path, **sizes, seed=1).test_y
    assert all(map(torch.equal, tests, split.test_y)), 'the same for every seed'
    with pytest.raises(ValueError, match='8 scenes are too few'):
        data.haze_folders(tmp_path, 16, 5, 9, 9, 9, seed=0)
    with pytest.raises(ValueError, match='no folder hazy'):
        data.haze_folders(tmp_path / 'nothing', 16, 1, 1, 1, 1, seed=0)


def test_own_folders_go_where_their_names_say(tmp_path):
    parts = 'paired/x', 'paired/y', 'measurements', 'images', 'test/x', 'test/y'
    for k, part in enumerate(parts):
        flat(tmp_path / part / 'a.png', (30 * k, 30 * k, 30 * k))
    flat(tmp_path / 'more' / 'a.png', (240, 240, 240))
    for side, grey in ('x', 10), ('y', 40):             # of the same name as another pair's
        flat(tmp_path / 'paired' / side / 'b/a.png', (grey, grey, grey))
    (tmp_path / 'images/._a.png').write_bytes(b'hidden, no picture')
    split = data.custom_folders(tmp_path, 16, 2, 1, 2, 1, seed=0, images=tmp_path / 'more')
    assert [sorted({u.max().item() for u in part}) for part in (
        split.pairs_x, split.pairs_y, split.measurements, split.images, split.test_x, split.test_y)
            ] == [[0, 10], [30, 40], [60], [90, 240], [120], [150]]


def test_crops_and_pairs_stay_aligned(tmp_path):
    x = np.arange(40 * 50, dtype=np.int32).reshape(40, 50) % 251
    files = [tmp_path / f'{name}.png' for name in ('a', 'b', 'tall')]
    for file, u in zip(files, (x, 255 - x, x[:17, :16])):
        Image.fromarray(u.astype(np.uint8)).save(file)
    a, b = data.crops_of_files([tuple(files[:2])] * 3, 16, 0, 0, tmp_path / 'cache')
    assert a.shape == (18, 3, 16, 16) and torch.equal(a, 255 - b)
    (tall,) = data.crops_of_files([(files[2],)] * 50, 16, 0, 0, None)
    assert set(tall[:, 0, 0, 0].tolist()) == {0, 50}, 'at the top, and a row of 50 lower'
    picture(tmp_path / 'x.png', (40, 30))
    with Image.open(tmp_path / 'x.png') as image:
        image.crop((2, 1, 38, 29)).save(tmp_path / 'y.png')
    u, v = data.read_pair(tmp_path / 'x.png', tmp_path / 'y.png', 16)
    assert torch.equal(u, v) and u.shape == (3, 28, 36)
    reduced = data.read_pair(tmp_path / 'x.png', tmp_path / 'y.png', 16, short_side=20)
    assert torch.equal(*reduced) and reduced[0].shape == (3, 20, 26), 'after the border is cut off'
    picture(tmp_path / 'narrow.png', (30, 30))
    with pytest.raises(ValueError, match='narrow.png: 30 x 30, but .*x.png is 40 x 30'):
        data.read_pair(tmp_path / 'x.png', tmp_path / 'narrow.png', 16)
    assert data.read_whole(tmp_path / 'x.png', 16, short_side=20).shape == (3, 20, 27)
    assert data.read_whole(tmp_path / 'x.png', 30).shape == (3, 30, 40), 'no less than the crops'
    small = [(a[k], b[k]) for k in range(3)]
    assert torch.equal(data.scored(small, 16)[1], b[:3])
    assert [v.shape for v in data.scored([*small, (u, v)], 16)[0]] == [(3, 16, 16)] * 3 + [u.shape]


def test_pictures_of_any_size_are_cut_once(tmp_path, monkeypatch):
    """As many crops as tile each, in the files' order; fewer of many; later nothing is decoded."""
    files = [picture(tmp_path / f'{k}.png', (40 + k, 33), seed=k) for k in range(2)]
    Image.new('RGB', (33, 44), (7, 7, 7)).save(tmp_path / '2.png')
    files = [(f,) for f in (*files, tmp_path / '2.png')]
    (cut,) = data.crops_of_files(files, 16, 0, 0, tmp_path / 'cache')
    assert [(u == 7).all().item() for u in cut] == [False] * 8 + [True] * 4
    assert torch.equal(cut, *data.crops_of_files(files, 16, 0, 0, None))
    assert not torch.equal(cut, *data.crops_of_files(files, 16, 1, 0, tmp_path / 'cache'))
    assert len(*data.crops_of_files(files, 16, 0, 20, None)) == 3
    assert len(*data.crops_of_files(files, 8, 0, 0, None)) == 3 * 4 * 5
    for most, crops in (7, 6), (2, 3):                  # at least one of each
        monkeypatch.setattr(data, 'MOST_CROPPED', most * 16 ** 2)
        assert len(*data.crops_of_files(files, 16, 0, 0, tmp_path / 'cache')) == crops
    monkeypatch.undo()
    monkeypatch.setattr(data, 'read_whole', None)
    assert torch.equal(cut, *data.crops_of_files(files, 16, 0, 0, tmp_path / 'cache'))


def test_custom_folders_train_score_and_restore(folders, tmp_path):
    """Any sizes go in; what comes out has the input's name, size and alpha, and nothing is lost."""
    run, out = tmp_path / 'run', tmp_path / 'new/out'
    sud2.main(tiny(run, '--task', 'custom', '--data', str(folders), '--method', 'sud2'))
    s = json.loads((run / 'metrics.json').read_text())['methods']['sud2']['0']
    assert s['psnr'] > 0 and s['ssim'] > 0 and s['fd_prior'] > 0 and (run / 'grid.png').exists()
    inputs = tmp_path / 'in'
    picture(inputs / 'deep' / 'a b é.png', (31, 17), mode='RGBA')
    picture(inputs / 'grey.webp', (16, 40), mode='L')
    picture(inputs / 'one.png', (1, 1))
    exif = Image.Exif()
    exif[0x0112] = 6                                    # lies on its side
    picture(inputs / 'turned.jpg', (30, 18), exif=exif, icc_profile=b'colours')
    Image.new('CMYK', (9, 9)).save(inputs / 'cmyk.jpg', icc_profile=b'of ink')
    Image.fromarray(np.full((20, 20), 40000, np.uint16)).save(inputs / 'sixteen.png')
    for name, mode in ('palette', 'RGBA'), ('opaque', 'RGB'):
        image = Image.open(inputs / 'deep' / 'a b é.png').convert(mode)
        image.quantize(64).save(inputs / f'{name}.png')
    (inputs / 'broken.png').write_bytes(b'no picture')
    ask = ['--restore', str(inputs), '--checkpoint', str(run / 'sud2-s0.pt'), '--out']
    with pytest.raises(ValueError, match=r'1 of 9 not restored: .*broken.png'):
        sud2.main(sud2.parse([*ask, str(out)]))
    sizes = {'deep/a b é.png': (31, 17), 'grey.webp': (16, 40), 'one.png': (1, 1),
             'turned.jpg': (18, 30), 'sixteen.png': (20, 20), 'palette.png': (31, 17)}
    for name, size in sizes.items():
        with Image.open(out / name) as image:
            assert image.size == size
            before = np.asarray(data.open_image(inputs / name, 'RGB'), float)
            assert abs(np.asarray(image.convert('RGB')) - before).mean() < 15, 'f is nearly y yet'
    for name in ('deep/a b é.png', 'palette.png'):
        alphas = [Image.open(d / name).convert('RGBA').getchannel('A') for d in (inputs, out)]
        assert alphas[0].tobytes() == alphas[1].tobytes() and alphas[0].getextrema() != (255, 255)
    assert data.open_image(out / 'opaque.png').mode == 'RGB'
    profiles = [data.open_image(out / name).info.get('icc_profile') for name in (
        'turned.jpg', 'cmyk.jpg', 'one.png')]
    assert profiles == [b'colours', None, None]
    (tmp_path / 'less').mkdir()
    (tmp_path / 'less/config.json').write_text('["of something else"]')
    sud2.main(sud2.parse([*ask, str(tmp_path / 'less'), '--short-side', '9', ask[0],
                          str(inputs / 'deep')]))
    with Image.open(tmp_path / 'less' / 'a b é.png') as image:
        assert image.size == (16, 9) and image.mode == 'RGBA'
    before = (inputs / 'one.png').read_bytes()
    with pytest.raises(ValueError, match='9 of 9 not restored: .*another --out'):
        sud2.main(sud2.parse([*ask, str(inputs)]))
    assert (inputs / 'one.png').read_bytes() == before
    with pytest.raises(ValueError, match='prior.pt: made with kind prior'):
        sud2.main(sud2.parse([*ask[:3], str(run / 'prior.pt'), '--out', str(out)]))


def test_grey_folders_train_and_restore_to_grey(folders, tmp_path, monkeypatch):
    """Of two pictures of one name the second is refused."""
    for f in folders.rglob('*.*'):
        Image.open(f).convert('L').save(f)
    run, inputs = tmp_path / 'run', tmp_path / 'in'
    sud2.main(tiny(run, '--task', 'custom', '--data', str(folders), '--channels', '1',
                   '--method', 'supervised'))
    picture(inputs / 'colour.png')
    picture(tmp_path / 'other/colour.png')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match='1 of 2 not restored: other.* is an input or another re'):
        sud2.main(sud2.parse(['--restore', 'in/colour.png', 'other/colour.png', '--checkpoint',
                              'run/supervised-s0.pt', '--out', 'out']))
    with Image.open(tmp_path / 'out/colour.png') as image:
        before = np.asarray(data.open_image(inputs / 'colour.png', 'L'), float)
        assert image.mode == 'L' and abs(np.asarray(image) - before).mean() < 15


def test_custom_without_test_images_leaves_pictures_and_no_scores(folders, tmp_path):
    """And with one pair of them no Fréchet distance."""
    (folders / 'test/x/1.png').unlink()
    (folders / 'test/y/1.png').unlink()
    sud2.main(tiny(tmp_path / 'one', '--task', 'custom', '--data', str(folders), '--method',
                   'supervised'))
    s = json.loads((tmp_path / 'one/metrics.json').read_text())['methods']['supervised']['0']
    assert s['psnr'] > 0 and s['fd_prior'] is None and (tmp_path / 'one/curves.png').exists()
    shutil.rmtree(folders / 'test')
    sud2.main(tiny(tmp_path / 'run', '--task', 'custom', '--data', str(folders), '--pairs', '1',
                   '--method', 'sud2'))
    s = json.loads((tmp_path / 'run/metrics.json').read_text())['methods']['sud2']['0']
    assert s['psnr'] is None and s['best_psnr'] is None and s['corr_output'] is not None
    assert (tmp_path / 'run/grid.png').exists() and (tmp_path / 'run/curves.png').exists()


def test_own_pairs_go_by_the_seed_and_own_tests_do_not(folders):
    splits = [data.custom_folders(folders, 16, pairs=1, measurements=4, clean=4, test=1, seed=s)
              for s in range(4)]
    tests, pairs = ([getattr(s, side)[0].float().mean().item() for s in splits]
                    for side in ('test_x', 'pairs_x'))
    assert len(set(tests)) == 1 and len(set(pairs)) > 1


def test_the_plan_tells_what_is_there(folders, tmp_path, capsys, monkeypatch):
    """By the flags before anything is read, then by what the folders hold; of large test images f
    sees all, the DDPM what is left after reducing."""
    flags = '--task', 'custom', '--data', str(folders), '--method', 'supervised'
    sud2.main(tiny(tmp_path / 'run', *flags, '--dry-run'))
    assert '2 pairs, 8 measurements, 16 clean, 12 test images\n' in capsys.readouterr().out
    assert not (tmp_path / 'run').exists()
    sud2.main(tiny(tmp_path / 'run', *flags))
    said = ('16 x 16 crops; 4 pairs, 4 measurements, 4 clean, '
            '2 test images of 0.002 megapixels together\n')
    out = capsys.readouterr().out
    assert said in out and '(--points); output in ' in out
    monkeypatch.setattr(sud2, 'forward_minutes', lambda run, net, *t: 10 if t else 1)
    split = sud2.load_split(tiny(tmp_path, *flags), 0)
    sud2.plan(sud2.Setup(tiny(tmp_path, *flags)), split)
    f_sees = (64 / 48) ** 2 * sum(y[0].numel() for y in split.test_y) / 16 ** 2     # tiles overlap
    assert f', {2 * (f_sees + 10 * 2):.1f} of them for scores' in capsys.readouterr().out
    shutil.rmtree(folders / 'test')
    sud2.plan(sud2.Setup(tiny(tmp_path, *flags)), sud2.load_split(tiny(tmp_path, *flags), 0))
    assert '4 clean, 4 unscored images\n' in capsys.readouterr().out


@pytest.mark.parametrize('method, of_f, of_prior, of_gan', [
    ('supervised', 0, 0, 0), ('sud', 3 + 1, 0, 0), ('sud2', 3, 5, 0), ('oracle', 3, 0, 0),
    ('sud2-kl', 3 + 1, 4, 0), ('sud2-kl+g', 3 + 6, 4, 0), ('cyclegan', 0, 0, 24 * 4 * 2),
    ('supervised oracle', 3, 0, 0)])
def test_the_planned_minutes_count_the_passes(tmp_path, capsys, monkeypatch, method, of_f, of_prior,
                                              of_gan):
    """With a minute for a forward pass of an image by f or D_σ, ten by the DDPM, a hundred by
    CycleGAN: 3 steps of 4 images for each prior, 4 updates of 2 pairs, 3 of them with 4
    measurements, 2 scores on 12 images by f and the DDPM; a training step is three passes."""
    monkeypatch.setattr(sud2, 'forward_minutes', lambda run, net, *t: (
        10 if t else 100 if isinstance(net, cyclegan.Generator) else 1))
    methods = method.split()
    ask = tiny(tmp_path, '--method', *methods, '--r-steps', '5', '--dry-run')
    updates = len(methods) * 3 * 4 * 2 + 3 * 4 * (of_f + 10 * of_prior) + 100 * of_gan
    for ask.seed, ask.prior, ask.prior_batch in (
            ([0], None, 4), ([0, 1], None, 4), ([0], 'elsewhere', 4), ([0], None, 2000)):
        sud2.main(ask)                  # 16 images, 250 times each: 2 steps of 2,000
        seen = 2 * 2000 if ask.prior_batch == 2000 else 3 * 4
        priors = 0 if ask.prior else 3 * seen * (10 + (method == 'sud'))
        scores = 2. * 12 * (1 + 10) * len(methods) * len(ask.seed)
        wanted = priors + updates * len(ask.seed) + scores + .1
        assert f'about {wanted} minutes, {scores} of them for' in capsys.readouterr().out


@pytest.mark.parametrize('size, images, replays, factor', [
    (16, 16, False, 1.4), (64, 16, True, .2), (128, 4, False, 1.4), (512, 1, False, 1.4)])
def test_the_planned_minutes_come_from_few_images_of_large_sizes(
        tmp_path, monkeypatch, size, images, replays, factor):
    """The quicker of two passes that take 50 and 30 seconds; time for optimisers is added, and a
    seventh of all is left where CUDA graphs are replayed."""
    seen, clock = [], iter((0., 50., 60., 90.))
    monkeypatch.setattr(sud2, 'replays', lambda device: replays)
    monkeypatch.setattr(time, 'perf_counter', lambda: next(clock))
    run = sud2.Setup(tiny(tmp_path, '--size', str(size)))
    minutes = forward_minutes(run, lambda x, t: (seen.append((x.shape, len(t))), x)[1],
                              torch.zeros(16))
    assert minutes == pytest.approx(factor * 30 / images / 60)
    assert seen == [((images, 3, size, size), images)] * 2


def broken_folders(folders, case):
    """Spoils the user's folders in one way."""
    if case == 'sizes':
        picture(folders / 'paired/y/0.png', (64, 64))
    elif case == 'no y':
        (folders / 'paired/y/1.png').unlink()
    elif case == 'twice':
        picture(folders / 'paired/y/1.jpg')
    elif case == 'broken':
        (folders / 'measurements/m2.png').write_bytes(b'x')
    elif case == 'mixed':
        picture(folders / 'images/c1.jpg', mode='L')
    elif case == 'small':
        picture(folders / 'measurements/m0.png', (1, 1))
    elif case == 'huge':
        Image.new('1', (20000, 20000)).save(folders / 'images/c9.png')
    elif case == 'none':
        shutil.rmtree(folders / 'paired')


@pytest.mark.parametrize('case, message', [
    ('sizes', 'paired/y/0.png: 64 x 64'), ('no y', 'paired/x/1.png: has no partner in .*y;'),
    ('twice', 'y/1.png: has the name of .*y/1.jpg'),
    ('broken', 'm2.png: not a readable image'), ('small', 'm0.png: 1 x 1 is less'),
    ('mixed', 'c1.jpg: grey, but --channels 3 needs colour images'),
    ('huge', 'c9.png: .*400000000 pixels'), ('none', 'paired/x: no such folder')])
def test_custom_folders_name_what_is_wrong(folders, tmp_path, case, message):
    broken_folders(folders, case)
    with pytest.raises(ValueError, match=message):
        sud2.main(tiny(tmp_path / 'run', '--task', 'custom', '--data', str(folders)))


def test_tiles_of_a_large_image_leave_no_seams():
    """With the identity for f, tiles fade into one another to give the image back; where they
    differ by 1 no two pixels beside each other do by more than a tenth."""
    widths = set()

    class Identity(torch.nn.Module):
        factor = 4

        def forward(self, y):
            assert y.shape[2] % 4 == 0 and y.shape[3] % 4 == 0
            widths.add(y.shape[3])
            return y

    class Alternating(Identity):
        tiles = 0

        def forward(self, y):
            self.tiles += 1
            return torch.full_like(y, self.tiles % 2)
    for size, tile in (1024, 1024), (256, 512), (64, 256), (16, 64):
        run, f = sud2.Setup(sud2.parse(['--precision', 'fp32', '--size', str(size)])), Identity()
        y = 2 * torch.rand(1, 3, 99, 2 * tile + 22) - 1
        widths.clear()
        assert_close(sud2.whole(run, f, y), y)
        assert widths == {tile}                         # none is larger, or a narrow rest
    for shape in (64, 112), (112, 64), (64, 128):       # two tiles would fill the last, unshared
        x_hat = sud2.whole(run, Alternating(), torch.zeros(1, 3, *shape))
        assert x_hat.amin() < .5 and x_hat.amax() == 1
        assert max(x_hat.diff(dim=d).abs().max() for d in (2, 3)) < .1


def test_a_foreign_diffusion_model_supervises_f(tmp_path):
    """The README's five lines, with a small diffusers network of random weights."""
    diffusers = pytest.importorskip('diffusers')
    unet = diffusers.UNet2DModel(16, 3, 3, block_out_channels=(32, 32), layers_per_block=1,
                                 down_block_types=('DownBlock2D',) * 2,
                                 up_block_types=('UpBlock2D',) * 2).requires_grad_(False)
    calls = []

    def prior(x_t, t):
        calls.append(t)
        return unet(x_t, t).sample

    run = sud2.Setup(tiny(tmp_path))
    split = sud2.load_split(run.a, seed=0)
    f, _, _ = sud2.train(run, 'sud2', 0, split, sud2.Models(prior), lambda f: {})
    assert calls and sud2.reconstruct(run, f, split.test_y)[0].shape == split.test_y.shape


# --------------------------------------------------------- training
def weights(path, part='f'):
    return torch.load(path, weights_only=True)['parts'][part]


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """A tiny run of every method, seen by several tests."""
    out = tmp_path_factory.mktemp('run')
    sud2.main(tiny(out, '--method', 'all'))
    return out


def test_run_writes_everything(finished):
    for name in ('config.json', 'log.jsonl', 'prior.pt', 'denoiser.pt', 'metrics.json', 'table.md'):
        assert (finished / name).stat().st_size > 0
    for name in ('grid.png', 'curves.png'):
        with Image.open(finished / name) as picture:
            picture.load()
            assert picture.width > 600
    m = json.loads((finished / 'metrics.json').read_text())
    assert set(m['methods']) == set(sud2.METHODS)
    for scores in m['methods'].values():
        s = scores['0']
        assert s['updates'] == 4 and len(s['curve']) == 2 and s['curve'][-1]['update'] == 4
        assert s['best_psnr'] == max(c['psnr'] for c in s['curve'])
        assert s['psnr'] == s['curve'][-1]['psnr']
        assert all(math.isfinite(s[k]) for k in ('psnr', 'psnr_hole', 'psnr_visible', 'ssim',
                                                 'fd_prior', 'corr_latent', 'corr_output'))
    assert m['prior']['eps_loss'] > 0
    assert m['peak_mib'] is None if sys.platform == 'win32' else 100 < m['peak_mib'] < 10000
    rows = text_of(finished / 'table.md').splitlines()
    assert len(rows) == 2 + len(sud2.METHODS) and '100%' in rows[-1]


def test_several_seeds_have_other_pairs_one_prior_and_the_first_ones_pictures(
        finished, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(sud2, 'grid', lambda rows, path: shown.append(rows))
    for seeds in ['1'], ['0'], ['0', '1']:
        out = tmp_path / '-'.join(seeds)
        sud2.main(tiny(out, '--method', 'supervised', '--seed', *seeds))
    for alone, name, part in ((finished, 'prior.pt', 'ema'), (finished, 'supervised-s0.pt', 'f'),
                              (tmp_path / '1', 'supervised-s1.pt', 'f')):
        one, other = (weights(there / name, part) for there in (alone, out))
        assert all(torch.equal(one[k], other[k]) for k in one), 'as without the other seed'
    one, other = weights(out / 'supervised-s0.pt'), weights(out / 'supervised-s1.pt')
    assert not any(torch.equal(one[k], other[k]) for k in one if one[k].dim() == 4)
    assert all(torch.equal(u, v) for u, v in zip(*(shown[k]['supervised'] for k in (1, -1))))
    assert [len(images) for images in shown[-1].values()] == [10, 10, 10]
    scores = json.loads((out / 'metrics.json').read_text())['methods']['supervised']
    assert scores['0']['psnr'] != scores['1']['psnr']
    assert '±' in text_of(out / 'table.md')


def test_pictures_show_each_method_as_soon_as_it_is_trained(tmp_path, monkeypatch):
    shown, train = [], sud2.train
    monkeypatch.setattr(sud2, 'grid', lambda rows, path: shown.append(list(rows)))
    monkeypatch.setattr(sud2, 'plot', lambda panels, path: shown.append(list(panels[0][3])))
    monkeypatch.setattr(sud2, 'train', lambda run, m, *rest: (
        train(run, m, *rest) if m == 'supervised' else 1 / 0))
    with pytest.raises(ZeroDivisionError):
        sud2.main(tiny(tmp_path, '--method', 'cyclegan', 'supervised', 'sud2'))
    assert shown == [['measurement', 'cyclegan', 'truth'],
                     ['measurement', 'cyclegan', 'supervised', 'truth'], ['supervised']]


def test_every_method_ends_elsewhere(finished):
    networks = [m for m in sud2.METHODS if m != 'cyclegan']
    heads = {tuple(weights(finished / f'{m}-s0.pt')['head.bias'].tolist()) for m in networks}
    assert len(heads) == len(networks)


@pytest.mark.parametrize('flags', [('--lam1', '0', '--lam2', '0'), ('--warmup', '4')])
def test_without_lambdas_or_still_warming_up_it_is_supervised_bit_for_bit(
    finished, tmp_path, flags):
    """Same initial weights, same pairs, same order: all that differs is the unpaired losses."""
    sud2.main(tiny(tmp_path, '--method', 'sud2', *flags))
    ours, theirs = weights(tmp_path / 'sud2-s0.pt'), weights(finished / 'supervised-s0.pt')
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


@pytest.mark.parametrize('weight, names', [
    ('--lam2', ['sud+reg', 'sud+reg+noise', 'sud2']), ('--lam3', ['sud2-kl', 'sud2-kl+g'])])
def test_losses_are_on_where_the_table_says_so(tmp_path, weight, names):
    """With one weight alone above 0 only its loss can part a method from supervised."""
    methods = [m for m, method in sud2.METHODS.items() if m != 'cyclegan' and method.lam1 is None]
    run = sud2.Setup(tiny(tmp_path, '--lam1', '0', '--lam2', '0', '--lam3', '0', weight, '0.5',
                          '--points', '1', '--warmup', '1', '--updates', '2',
                          '--average-from', '3'))   # never: sud2-kl+g is not drawn to it
    split, ends = sud2.load_split(run.a, 0), {}
    models = sud2.Models(run.net(0, time=True), run.net(0, residual=True))
    for m in methods:
        f, _, _ = sud2.train(run, m, 0, split, models, lambda f: {})
        ends[m] = torch.cat([p.detach().flatten() for p in f.parameters()])
    assert names == [m for m in methods if not torch.equal(ends[m], ends['supervised'])]


def of_weights(net):
    """A loss that takes no time, where what matters is what the network would see."""
    return sum(p.square().sum() for p in net.parameters())


def test_shift_moves_both_of_a_pair_alike(tmp_path, monkeypatch):
    """In all 25 ways, each image by itself: to some window of the reflected image."""
    run, u = sud2.Setup(tiny(tmp_path, '--batch', '200')), torch.arange(36, dtype=torch.uint8)
    x = u.view(1, 1, 6, 6).repeat(150, 1, 1, 1)
    monkeypatch.setattr(sud2, 'mirrored', lambda x, flip: x)
    a, b = sud2.pairs_batch(run, SimpleNamespace(pairs_x=x, pairs_y=255 - x),
                            torch.Generator().manual_seed(0))
    assert_close(a, -b)
    padded = np.pad(x[0, 0].numpy(), 2, mode='reflect') / 127.5 - 1
    windows = [padded[i:i + 6, j:j + 6] for i in range(5) for j in range(5)]
    where = [[abs(image - w).max() < 1e-6 for w in windows] for image in a[:, 0].numpy()]
    assert {sum(row) for row in where} == {1} and len({row.index(True) for row in where}) == 25
    assert torch.equal(sud2.shifted(a, 0, None), a)


@pytest.mark.parametrize('images, steps, places', [(2, 5, 25), (4, 7, 25), (8, 7, 1)])
def test_few_clean_images_are_shifted_and_not_seen_too_often(
        tmp_path, monkeypatch, images, steps, places):
    """Those seen more than a hundred times, and none more than 250 times, by both priors; in pairs
    of clean images, too."""
    seen, run = [], sud2.Setup(tiny(tmp_path, '--prior-steps', '7', '--denoiser-steps', '7',
                                    '--prior-batch', '100'))
    monkeypatch.setattr(sud2, 'mirrored', lambda x, flip: x)
    for loss in 'ddpm_loss', 'denoiser_loss':
        monkeypatch.setattr(ddpm, loss, lambda net, x, *_: (seen.append(x), of_weights(net))[1])
    u = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(images, 3, 16, 16)
    for which in 'prior', 'denoiser':
        seen.clear()
        sud2.train_prior(run, u, which)
        assert len({x.numpy().tobytes() for x in torch.cat(seen)}) == places
        assert len(seen) == steps
    run.a.batch, run.a.updates, run.a.warmup = 64, 1, 0
    split, compare = sud2.load_split(run.a, 0), sud2.paired_loss
    split.images, models = u, sud2.Models(run.net(0, time=True))
    monkeypatch.setattr(sud2, 'paired_loss', lambda x_hat, x: (seen.append(x),
                                                               compare(x_hat, x))[1])
    for method, n in ('sud2-kl', 16), ('sud2-kl+g', 64):
        seen.clear()
        sud2.train(run, method, 0, split, models, lambda f: {})
        x_u = next(x for x in seen if len(x) == n)
        assert min(places, 9) <= len({x.numpy().tobytes() for x in x_u}) <= places


def test_the_readmes_summary_is_that_of_the_results():
    """A row: supervised, last and best, then PSNR (gain over that best, ratio of distances)."""
    rows = re.findall(r'^\| [^|]* \| [^|]*, best .*$', text_of('README.md'), re.M)
    names = ('inpaint-faces', 'inpaint-faces-other-seeds', 'inpaint-faces-64', 'inpaint-celeba',
             'inpaint-celeba-other-seeds', 'inpaint-celeba-64', 'dehaze-scenes',
             'dehaze-scenes-other-seeds')
    for name, row in zip(names, rows, strict=True):
        methods = json.loads((HERE / 'results' / f'{name}.json').read_text())['methods']
        last, best, distance = ({m: statistics.mean(s[key] for s in seeds.values()) for m, seeds in
                                 methods.items()} for key in ('psnr', 'best_psnr', 'fd_prior'))
        low, far = best['supervised'], distance['supervised']
        cells = [f'{last["supervised"]:.2f}, best {low:.2f}'] + [
            f'{last[m]:.2f} ({last[m] - low:+.1f}, {distance[m] / far:.2f}×)'
            for m in ('sud2', 'sud2-kl', 'sud2-kl+g', 'oracle')]
        assert row.split(' | ', 1)[1] == ' | '.join(cells) + ' |', name


def test_tables_are_those_of_the_results():
    """README's and those under results/ stand on what was measured."""
    readme, tables, ablated = (text_of(name) for name in (
        'README.md', 'results/TABLES.md', 'results/ABLATIONS.md'))
    for name in ('inpaint-faces', 'inpaint-celeba', 'dehaze-scenes', 'celeba-ladder',
                 'inpaint-celeba-2000', 'inpaint-celeba-constant', 'inpaint-celeba-64',
                 'inpaint-celeba-64-cpu', 'inpaint-celeba-64-2000', 'inpaint-faces-gpu',
                 'inpaint-faces-other-seeds', 'inpaint-celeba-other-seeds',
                 'dehaze-scenes-other-seeds', 'inpaint-faces-64', 'inpaint-faces-64-2000',
                 'inpaint-faces-128', 'inpaint-faces-128-gpu', 'dehaze-scenes-2000'):
        methods = json.loads((HERE / 'results' / f'{name}.json').read_text())['methods']
        assert sud2.table(methods) in (readme if name == 'inpaint-faces' else tables)
    sys.path.insert(0, str(HERE / 'benchmarks'))
    ablations = importlib.import_module('ablations')
    for path in (HERE / 'results').glob('ablation-*.json'):
        lines = json.loads(path.read_text())['lines']
        x_axis = ablations.ABLATIONS[path.stem.removeprefix('ablation-')][0]
        assert ablations.table_of(x_axis, lines) in ablated, path
    for name in ('operators', 'operators-real', 'prints', 'prints-real'):
        done = json.loads((HERE / 'results' / f'{name}.json').read_text())['operators']
        assert importlib.import_module('operators').table_of(done) in tables
    rows = json.loads((HERE / 'results/pull.json').read_text())['cosine_and_tone_correlation']
    assert importlib.import_module('pull').table_of(rows) in ablated


def test_mutations_are_those_of_the_code():
    """Each line of results/mutations.txt is a change of today's code that a test of today finds."""
    sys.path.insert(0, str(HERE / 'benchmarks'))
    mutate = importlib.import_module('mutate')
    *lines, end = text_of('results/mutations.txt').splitlines()
    every = mutate.MUTATIONS + mutate.OF_SEVERAL_PROCESSES
    assert end == f'{len(every)} of {len(lines)} killed'
    for k, (line, (name, old, new)) in enumerate(zip(lines, every)):
        assert old in text_of(name), f'{old!r} is not in {name}'
        change, test = line.rsplit(': ', 1)
        assert change == f'{k:2d} {name}: {old!r} -> {new!r}' and test.split('[')[0] in globals()


def test_plots_are_those_of_the_results(tmp_path):
    """Those in assets/, pixel by pixel, but for what another pillow may draw otherwise: some
    edges, and letters."""
    def result(name):
        return json.loads((HERE / 'results' / f'{name}.json').read_text())

    sys.path.insert(0, str(HERE / 'benchmarks'))
    ablations, quality = map(importlib.import_module, ('ablations', 'quality'))
    faces = result('inpaint-faces')
    sud2.curves(faces['methods'], tmp_path / 'curves.png', faces['truth']['corr_output'])
    names = [name for name, (x_axis, _) in ablations.ABLATIONS.items() if x_axis]
    for name in names:
        ablations.draw(name, result(f'ablation-{name}')['lines'], tmp_path / f'{name}.png')
    sud2.plot(quality.panels_of(result('bench-quality')['curves']), tmp_path / 'quality.png')
    for name in ('curves', *names, 'quality'):
        seen, drawn = (picture_of(folder / f'{name}.png') for folder in (HERE / 'assets', tmp_path))
        wide = 560 if name == 'frontier' else 1120                  # beside it stands the legend
        other = abs(seen[:, :wide] - drawn[:, :wide]).max(2) > 64
        assert other.mean() < 3e-4, name


def test_readme_help_and_examples():
    """README's copy of --help is what is printed, its examples print what they say."""
    assert sud2.command_line().format_help() in text_of('README.md')
    failed, attempted = doctest.testfile(str(HERE / 'README.md'), module_relative=False)
    assert failed == 0 and attempted >= 7


def picture_of(path):
    with Image.open(path) as picture:
        return np.asarray(picture).astype(int)


@pytest.mark.parametrize('size, side', [(16, 96), (40, 120), (300, 256)])
def test_the_grid_shows_each_image_in_its_row_and_column(tmp_path, size, side):
    """Small ones enlarged by a whole number, grey ones as such; a red corner stays where it is."""
    rows = {'measurement': torch.arange(0, 120, 10).view(12, 1, 1, 1).expand(12, 1, size, size),
            'truth': torch.arange(100, 220, 10).view(12, 1, 1, 1).expand(12, 3, size, size)}
    rows = {name: list(u.byte().clone()) for name, u in rows.items()}
    rows['truth'][3][:, :size // 4, :size // 4] = torch.tensor([255, 0, 0]).view(3, 1, 1)
    sud2.grid(rows, tmp_path / 'grid.png')
    seen = picture_of(tmp_path / 'grid.png')
    assert seen.shape[0] == 2 * (side + 4) + 4
    left = seen.shape[1] - 10 * (side + 4)
    for c in range(10):
        x = left + c * (side + 4) + side // 2
        assert (seen[4 + side // 2, x] == 10 * c).all(), 'the first row'
        assert (seen[8 + side + side // 2, x] == 100 + 10 * c).all(), 'the second row'
    red = np.argwhere((seen == [255, 0, 0]).all(2)) - [8 + side, left + 3 * (side + 4)]
    assert red.min(0).tolist() == [0, 0] and abs(red.max(0) - (side // 4 - 1)).max() <= 1
    for r in range(2):                                  # a label at half of its row's height
        ink = np.argwhere(seen[4 + r * (side + 4):][:side, :left] < 128)
        assert abs((ink[:, 0].min() + ink[:, 0].max()) / 2 - side / 2) < 4
        assert ink[:, 1].max() < left - 4, 'and whole'


def test_the_grid_gets_the_middle_of_a_large_image():
    u = torch.zeros(3, 300, 900).byte()
    u[:, :, 300:600] = torch.arange(300) % 250
    assert sud2.shown(u).shape == (3, 256, 256) and sud2.shown(u)[0, 0, :3].tolist() == [0, 2, 2]
    assert sud2.shown(u[:, :256]).shape == (3, 256, 900)


def test_ticks_are_round_and_span_the_values():
    assert sud2.ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert_close(sud2.ticks(.18, .386), [.15, .2, .25, .3, .35, .4])
    assert_close(sud2.ticks(-3, 870), [-200, 0, 200, 400, 600, 800, 1000])
    assert sud2.ticks(7, 7)[0] <= 7 <= sud2.ticks(7, 7)[-1], 'a single value'


def test_a_plot_spans_its_frame_and_bands_span_the_seeds(tmp_path):
    """A line from corner to corner, the mean of two seeds, beside a panel of one seed."""
    two = [[(100, 4), (105, 8), (110, 14)], [(100, 4), (105, 10), (110, 14)]]
    sud2.plot([('left', 'x', 'y', {'sud2': two}), ('right', 'x', 'y', {'mine': two[:1]})],
              tmp_path / 'plot.png')
    seen = picture_of(tmp_path / 'plot.png')
    blue = np.argwhere((seen == [0, 0x72, 0xB2]).all(2))
    line = blue[blue[:, 1] < 560]
    low, high = line[line[:, 1].argmin()], line[line[:, 1].argmax()]
    assert abs(low - [344, 68]).max() <= 2 and abs(high - [40, 546]).max() <= 2
    middle = line[abs(line[:, 1] - 307) <= 1][:, 0]
    assert abs(middle.mean() - 192) < 2, 'the mean of 8 and 10'
    assert blue[:, 1].max() > 1120, 'the legend'
    tinted = (seen[:, 307] - seen[:, 307, :1])[:, 2] > 0
    assert abs(np.flatnonzero(tinted)[[0, -1]] - [344 - 182, 344 - 122]).max() <= 2, 'the band'
    for frame in seen[40, 70:545], seen[343, 70:545], seen[40:345, 70], seen[40:345, 543]:
        assert (frame.sum(1) < 700).all()
    for written in ((350, 362, 532, 556), (35, 45, 45, 64), (12, 28, 290, 324),
                    (375, 392, 300, 312), (12, 28, 6, 18), (350, 362, 1092, 1116),
                    (12, 28, 566, 578)):
        top, bottom, left, right = written          # ticks, title, labels
        assert (seen[top:bottom, left:right] < 100).any(), written
    other = np.argwhere((seen == [0x56, 0xB4, 0xE9]).all(2))
    assert other[0].tolist()[1] > 1090 and other[:, 1].min() > 560, 'in the right panel alone'
    sud2.plot([('', '', '', {'sud2': [[(1, 0), (10, 9), (100, 0)]]})], tmp_path / 'log.png', True)
    blue = np.argwhere((picture_of(tmp_path / 'log.png')[:, :560] == [0, 0x72, 0xB2]).all(2))
    peak, low, high = (blue[k, 1] for k in (blue[:, 0].argmin(), blue[:, 1].argmin(),
                                            blue[:, 1].argmax()))
    assert abs(peak - 307) < 5 and low < 73 and high > 540, 'the middle of 1 and 100 is 10'


def test_equal_images_are_plotted_at_100_db(monkeypatch):
    shown, score = [], {'update': 1, 'psnr': math.inf, 'corr_output': .1}
    monkeypatch.setattr(sud2, 'plot', lambda panels, path: shown.append(panels[0][3]))
    sud2.curves({'sud2': {'0': {'curve': [score]}}}, None, .2)
    assert shown == [{'sud2': [[(1, 100)]]}]


def test_repeating_a_command_does_nothing_again(finished, capsys):
    before = {p.name: p.stat().st_mtime_ns for p in finished.glob('*.pt')}
    sud2.main(tiny(finished, '--method', 'all'))
    assert before == {p.name: p.stat().st_mtime_ns for p in finished.glob('*.pt')}
    assert '(--points), less what is done already; output in ' in capsys.readouterr().out


def test_a_flag_that_differs_is_named(finished):
    with pytest.raises(ValueError, match='--lam1 0.3.*config.json has 0.2'):
        sud2.main(tiny(finished, '--lam1', '0.3'))


def test_auto_precision_is_the_faster_and_stays_with_the_run(tmp_path, monkeypatch):
    """Also where all but one of ten timings are held up; the process keeps its threads."""
    turns, seconds = iter(range(1000)), {torch.bfloat16: 1.0, torch.float32: 1.5}

    def conv_seconds(device, dtype):
        assert torch.get_num_threads() == 1
        return seconds[dtype] if next(turns) % 20 in (6, 7) else 10 - seconds[dtype]

    def begun(name):
        """A run in the folder of this name."""
        run = sud2.Setup(sud2.parse([*TINY, '--out', str(tmp_path / name)]))
        run.out.mkdir(exist_ok=True)
        sud2.check_config(run)
        return run
    monkeypatch.setattr(sud2, 'conv_seconds', conv_seconds)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert begun('fast').bf16 and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    seconds[torch.bfloat16] = 2.0
    assert begun('fast').bf16 and not begun('slow').bf16
    seconds[torch.bfloat16] = 1.0
    assert not begun('slow').bf16
    with pytest.raises(ValueError, match='--precision fp32: .*config.json has bf16'):
        sud2.check_config(sud2.Setup(tiny(tmp_path / 'fast')))
    monkeypatch.setattr(sud2.Group, 'rank', 1)              # the first process chooses
    monkeypatch.setattr(sud2.Group, 'any', lambda flag: not flag)
    assert begun('new').bf16


def same_weights(a, b, name):
    """Whether what two finished runs keep under a name is equal bit for bit."""
    ours, theirs = (torch.load(f / name, weights_only=True)['parts'] for f in (a, b))
    part = next(k for k in ('f', 'gan', 'ema') if k in ours)
    return all(torch.equal(ours[part][k], v) for k, v in theirs[part].items())


@pytest.mark.parametrize('part', [
    'prior', 'denoiser', 'sud-te-s0', 'sud-mt-s0', 'sud2-s0', 'sud2-kl+g-s0', 'cyclegan-s0'])
def test_resume_is_exact(finished, tmp_path, monkeypatch, part):
    """Cut off after two steps of one part, repeated: the same weights, bit for bit."""

    class Cut(Exception):
        pass

    original, method = sud2.fit, part.removesuffix('-s0') if '-s0' in part else 'sud'

    def cut(run, name, parts, update, schedule, *more):
        def cut_schedule(step):
            if step == 2 and name == part:
                raise Cut
            return schedule(step)
        return original(run, name, parts, update, cut_schedule, *more)

    monkeypatch.setattr(sud2, 'fit', cut)
    prior = ['--prior', str(finished)] if '-s0' in part else []
    flags = tiny(tmp_path, '--method', method, '--save-every', '0', '--points', '1', *prior)
    with pytest.raises(Cut):
        sud2.main(flags)
    monkeypatch.setattr(sud2, 'fit', original)
    sud2.main(flags)
    assert same_weights(tmp_path, finished, f'{method}-s0.pt')


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('method', ['sud-te', 'sud2-kl+g', 'cyclegan'])
def test_replayed_updates_are_those_that_are_launched(tmp_path, monkeypatch, method):
    """On a GPU: f, or CycleGAN's y -> x, goes the same way, up to rounding. A GAN's gradients make
    much of rounding, of bf16 most, and Adam even of the smallest ones, but for a large eps."""
    optimisers = cyclegan.optimisers
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)

    def smooth(gan):
        both = optimisers(gan, 1e-5)
        for opt in both:
            opt.param_groups[0]['eps'] = 1
        return both
    monkeypatch.setattr(cyclegan, 'optimisers', smooth)
    monkeypatch.setattr(sud2, 'G_LEARNS', 4)
    flags = ['--device', 'cuda', '--method', method, '--updates', '14', '--warmup', '5',
             '--gan-steps', '14', '--precision', 'fp32' if method == 'cyclegan' else 'bf16']
    ends = []
    for recorded in (sud2.recorded, lambda update, parts, device: update):
        monkeypatch.setattr(sud2, 'recorded', recorded)
        run = sud2.Setup(tiny(tmp_path / str(len(ends)), *flags))
        run.out.mkdir()
        split = sud2.load_split(run.a, 0).to(run.device)
        models = sud2.Models(run.net(0, time=True), run.net(1, residual=True))
        if method == 'cyclegan':
            torch.manual_seed(0)
            start = cyclegan.CycleGAN(3, *cyclegan.sizes(run.a.size)).to_x.to(run.device)
            f = sud2.train_cyclegan(run, 0, split, lambda f: {})[0].to_x
        else:
            start = run.net(0, residual=True)
            f = sud2.train(run, method, 0, split, models, lambda f: {})[0]
        ends.append(torch.cat([(p - q).flatten() for p, q in zip(
            f.parameters(), start.parameters())]))
    assert (ends[0] - ends[1]).norm() < .1 * ends[1].norm()


def test_an_update_is_recorded_once_for_each_choice(monkeypatch):
    """With a stand-in for CUDA: three calls, a recording, replays; numbers change in place."""
    done, generator = [], torch.Generator()
    graph = SimpleNamespace(register_generator_state=lambda g: done.append(g is generator),
                            replay=lambda: done.append('replay'))
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in (('CUDAGraph', lambda: graph), ('graph', contextlib.nullcontext),
                        ('Stream', lambda: stream), ('current_stream', lambda: stream),
                        ('stream', contextlib.nullcontext)):
        monkeypatch.setattr(torch.cuda, name, value)

    def update(lr, late):
        done.append((lr.item(), late))
        return {'lr': lr}
    Replayed, cpu = sud2.Replayed, torch.device('cpu')
    assert sud2.recorded(update, {}, cpu) is update
    monkeypatch.setattr(sud2, 'Replayed', lambda update, generators, device: Replayed(
        update, generators, cpu))
    replay = sud2.recorded(update, {'noise': generator}, SimpleNamespace(type='cuda'))
    seen = [replay(lr=float(k), late=False)['lr'].item() for k in range(6)]
    assert seen == [0, 1, 2, 3, 4, 5]
    assert done == [(0, False), (1, False), (2, False), True, (3, False), *['replay'] * 3]
    replay(lr=6., late=True)
    assert done[-1] == (6, True), 'another choice begins anew'


def test_progress_lines_and_saves_go_by_the_clock(tmp_path, monkeypatch, capsys):
    """Of 12 updates of two seconds, as a save takes: a line after more than 5, a save after 8. The
    rate is that since the line before."""
    run, saved = sud2.Setup(tiny(tmp_path / 'new/run', '--save-every', '8')), []
    monkeypatch.setattr(sud2, 'save', lambda path, value: saved.append(
        (value['step'], value['seconds'])))
    monkeypatch.setattr(time, 'monotonic', iter(range(50, 150, 2)).__next__)
    sud2.fit(run, 'part', {}, lambda: {'loss': torch.ones(())}, lambda step: {}, 12, [], {})
    assert saved == [(5, 10), (10, 22), (12, 28)]
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [(line[1], *line[-4:-2]) for line in said] == [
        ('3/12', '0.5/s', '18'), ('6/12', '0.4/s', '16'), ('9/12', '0.5/s', '6'),
        ('11/12', '0.3/s', '3'), ('12/12', '0.5/s', '0')]
    torch.save({**run.about, 'step': 9, 'seconds': 100, 'parts': {}}, run.out / 'part.pt')
    monkeypatch.setattr(time, 'monotonic', iter(range(50, 150, 2)).__next__)
    sud2.fit(run, 'part', {}, lambda: {'loss': torch.ones(())}, lambda step: {}, 12, [], {})
    assert saved[-1] == (12, 106) and '  0.5/s' in capsys.readouterr().out, 'it goes on at the 10th'


def test_another_runs_prior_serves(finished, tmp_path):
    """--prior takes prior.pt and denoiser.pt of a run; the outcome is that run's, bit for bit."""
    sud2.main(tiny(tmp_path / 'a', '--method', 'sud', 'sud2', '--prior', str(finished)))
    assert all(same_weights(tmp_path / 'a', finished, f'{m}-s0.pt') for m in ('sud', 'sud2'))
    assert not (tmp_path / 'a' / 'prior.pt').exists()
    with pytest.raises(ValueError, match='prior.pt: not there'):
        sud2.main(tiny(tmp_path / 'b', '--prior', str(tmp_path)))
    with pytest.raises(ValueError, match='made with width 16, this run has 32'):
        sud2.main(tiny(tmp_path / 'c', '--prior', str(finished), '--width', '32'))
    saved = torch.load(finished / 'prior.pt', weights_only=True)
    torch.save(saved | {'parts': saved['parts'] | {'opt': {}}}, tmp_path / 'prior.pt')
    with pytest.raises(ValueError, match='prior.pt is not fully trained'):
        sud2.main(tiny(tmp_path / 'd', '--prior', str(tmp_path)))


def test_checkpoints_of_another_task_or_version_are_refused(finished, tmp_path):
    with pytest.raises(ValueError, match='prior.pt: made with task inpaint, this run has dehaze'):
        sud2.main(tiny(tmp_path / 'a', '--task', 'dehaze', '--prior', str(finished)))
    saved = torch.load(finished / 'sud2-s0.pt', weights_only=True) | {'version': 0}
    torch.save(saved, tmp_path / 'old.pt')
    ask = ['--restore', str(tmp_path), '--out', str(tmp_path / 'out'), '--checkpoint']
    for file, said in (('old.pt', 'old.pt: made with version 0, this run has 4'),
                       ('none.pt', 'none.pt: not there, damaged, or not a checkpoint')):
        with pytest.raises(ValueError, match=said):
            sud2.main(sud2.parse([*ask, str(tmp_path / file)]))


@pytest.mark.parametrize('keep', [0, 100, 5000])
def test_a_damaged_checkpoint_is_named(finished, tmp_path, keep):
    sud2.main(tiny(tmp_path, '--method', 'supervised', '--prior', str(finished)))
    path = tmp_path / 'supervised-s0.pt'
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match='supervised-s0.pt: not there, damaged'):
        sud2.main(tiny(tmp_path, '--method', 'supervised', '--prior', str(finished)))


def test_an_unfinished_checkpoint_that_lacks_a_part_is_named(finished, tmp_path):
    """A finished one has f and its curve alone; to go on, training needs all that it changes."""
    flags = tiny(tmp_path, '--method', 'supervised', '--prior', str(finished))
    sud2.main(flags)
    path = tmp_path / 'supervised-s0.pt'
    torch.save(torch.load(path, weights_only=True) | {'step': 3}, path)
    with pytest.raises(ValueError, match='supervised-s0.pt: damaged'):
        sud2.main(flags)


def test_learning_rate_and_batches():
    assert sud2.learning_rate(0, 1000) == pytest.approx(1 / 50)
    assert sud2.learning_rate(1, 64) == pytest.approx(2 / 8, rel=.01)
    assert sud2.learning_rate(500, 1000) == pytest.approx(0.5)
    assert sud2.learning_rate(1000, 1000) == pytest.approx(0)
    u = torch.arange(4, dtype=torch.uint8).view(1, 1, 1, 4) * 85
    both = sud2.batch_of(u, torch.tensor([0, 0]), torch.tensor([False, True]))
    assert_close(both[0, 0, 0], torch.tensor([-1, -1 / 3, 1 / 3, 1]))
    assert_close(both[1], both[0].flip(-1))
    index, flip = sud2.draw_batch(torch.Generator().manual_seed(0), 7, 10000)
    assert_close(index.bincount() / 10000, torch.full((7,), 1 / 7), atol=.02, rtol=0)
    assert flip.float().mean().item() == pytest.approx(.5, abs=.02)


def test_what_the_priors_are_trained_with(tmp_path, monkeypatch):
    """Their own learning rate, and an average of weights that forgets the first ones soon."""
    run = sud2.Setup(tiny(tmp_path, '--prior-lr', '.5', '--prior-steps', '3000',
                          '--denoiser-steps', '1200'))
    monkeypatch.setattr(sud2, 'fit', lambda run, name, parts, update, schedule, *_: schedule)
    for which, middle in ('prior', 1500), ('denoiser', 600):
        schedule = sud2.train_prior(run, torch.zeros(99, 3, 16, 16), which)[1]
        assert schedule(middle)['lr'] == pytest.approx(.25)
        assert [schedule(k)['decay'] for k in (0, 8, 10 ** 5)] == [.1, .5, .995]


def test_times_are_uniform_for_d_f_and_log_normal_for_the_prior(tmp_path, monkeypatch):
    t = sud2.draw_times(20, 500, 10000, torch.Generator().manual_seed(0), 'cpu')
    assert (t.min(), t.max()) == (20, 499) and t.double().mean() == pytest.approx(260, abs=5)
    seen = []
    monkeypatch.setattr(ddpm, 'ddpm_loss', lambda net, x, t, eps, acp: (
        seen.append(t), of_weights(net))[1])
    run = sud2.Setup(tiny(tmp_path, '--prior-steps', '20', '--prior-batch', '50'))
    sud2.train_prior(run, torch.zeros(4, 3, 16, 16, dtype=torch.uint8), 'prior')
    t = torch.cat(seen).double()
    assert t.max() == 999 and t.median() == pytest.approx(120, rel=.1)
    assert t.clamp(min=1).log().std() == pytest.approx(1.1, abs=.1)


def test_held_out_loss_is_0_for_who_knows_the_image_and_1_for_who_says_nothing(tmp_path):
    run, u, times = sud2.Setup(tiny(tmp_path)), torch.full((80, 3, 16, 16), 204).byte(), []

    def knows(x_t, t):
        times.extend(t.tolist())
        a = ACP[t].view(-1, 1, 1, 1)
        return (x_t - a.sqrt() * 0.6) / (1 - a).sqrt()
    assert sud2.held_out_loss(run, knows, u) == pytest.approx(0, abs=1e-5)
    assert (min(times), max(times), len(times)) == (0, 999, 80)
    assert sud2.held_out_loss(run, lambda x_t, t: 0 * x_t, u) == pytest.approx(1, abs=.02)


def test_scores_by_hand(tmp_path):
    """Of measurements left as they are, on images of one size and of several."""
    run = sud2.Setup(tiny(tmp_path))
    split, prior = sud2.load_split(run.a, 0), run.net(0, time=True)
    for p in prior.parameters():                        # blocks start as the identity at any t
        torch.nn.init.normal_(p, std=0.1)

    def f(y, latent=False):
        return (y, y) if latent else y

    def loud(y, latent=False):
        return (9 * y, y) if latent else 9 * y
    f.factor = loud.factor = 1
    s = sud2.scorer(run, split, prior)(f)
    x, y = (u.numpy().astype(float) / 127.5 - 1 for u in (split.test_x, split.test_y))
    hole = np.broadcast_to(split.test_hole.numpy(), x.shape)
    for key, where in (('psnr', hole | ~hole), ('psnr_hole', hole), ('psnr_visible', ~hole)):
        errors = [((u - v)[w] ** 2).mean() for u, v, w in zip(x, y, where)]
        values = [10 * math.log10(4 / e) if e else math.inf for e in errors]
        assert s[key] == pytest.approx(sum(values) / len(values), rel=1e-5), key
    t = torch.full((len(y),), 50)
    features = [prior.encode(data.to_float(u), t)[0].mean((2, 3)).detach() for u in
                (split.test_y, split.test_x)]
    assert s['fd_prior'] == pytest.approx(metrics.frechet_distance(*features), rel=1e-5)
    assert s['corr_latent'] == s['corr_output'] == pytest.approx(
        np.corrcoef(y.reshape(len(y), -1))[~np.eye(len(y), dtype=bool)].mean(), abs=1e-5)
    for images in (split.test_y, list(split.test_y)):
        assert max(u.abs().max() for u in sud2.reconstruct(run, loud, images)[0]) == 1
    with pytest.raises(ValueError, match='reconstructions are not finite; try a lower'):
        sud2.scorer(run, split, prior)(lambda y, latent: (math.nan * y, y))
    split.test_x, split.test_y, split.test_hole = list(split.test_x), list(split.test_y), None
    several = sud2.scorer(run, split, prior)(f)
    assert several['psnr'] == pytest.approx(s['psnr']) and several['psnr_hole'] is None
    assert several['ssim'] == pytest.approx(s['ssim'])
    u = torch.tensor([[[1, 1], [1, 0]]])
    small = [sud2.same_size([v], 1) for v in (u.byte(), u.float())]
    assert [(v.item(), v.dtype) for v in small] == [(1, torch.uint8), (.75, torch.float32)]


def test_gap_closed_is_measured_from_the_best_supervised_value():
    methods = {'supervised': {'0': {'psnr': 18.0, 'best_psnr': 20.0}},
               'sud2': {'0': {'psnr': 21.0}}, 'oracle': {'0': {'psnr': 24.0}}}
    sud2.gap_closed(methods)
    assert methods['sud2']['0']['gap'] == 0.25 and methods['oracle']['0']['gap'] == 1
    methods['sud2']['1'] = {'psnr': 23.0}
    assert '| sud2 | 22.00 ± 1.41 | – | 25% |' in sud2.table(methods)
    methods['sud2']['1'] = {'psnr': math.inf}
    assert '| sud2 | inf ± nan | – | 25% |' in sud2.table(methods)


# --------------------------------------------------------- metrics
def test_psnr_closed_form_mask_and_equal_images():
    x = torch.randint(8, (2, 3, 12, 12)) / 8
    y = x.clone()
    y[1, :, :6] += 0.5
    assert metrics.psnr(y, x, data_range=2)[0] == math.inf
    assert_close(metrics.psnr(y, x, data_range=2)[1].item(), 10 * math.log10(4 / 0.125), rtol=1e-6,
                 atol=0)
    mask = torch.zeros(2, 1, 12, 12, dtype=torch.bool)
    mask[:, :, :6] = True
    assert_close(metrics.psnr(y, x, data_range=1, mask=mask)[1].item(), 10 * math.log10(4),
                 rtol=1e-6, atol=0)
    assert metrics.psnr(y, x, data_range=1, mask=~mask)[1] == math.inf


def test_ssim_of_constants_and_scale():
    a, b = 0.3, 0.8
    x, y = torch.full((1, 3, 16, 20), a), torch.full((1, 3, 16, 20), b)
    expected = (2 * a * b + 1e-4) / (a * a + b * b + 1e-4)
    assert_close(metrics.ssim(x, y, data_range=1).item(), expected, atol=1e-5, rtol=0)
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 150, 3, 16, 20, generator=g)           # more than a chunk
    assert_close(metrics.ssim(x, y, data_range=1), metrics.ssim(255 * x, 255 * y, data_range=255),
                 atol=1e-5, rtol=0)
    assert_close(metrics.ssim(x, x, data_range=1), torch.ones(150))
    last = metrics.ssim(x[140:], y[140:], data_range=1)
    assert_close(metrics.ssim(x, y, data_range=1)[140:], last)
    assert_close(metrics.ssim(x[..., :11, :11], x[..., :11, :11], data_range=1), torch.ones(150))
    for metric in (metrics.psnr, metrics.ssim):
        with pytest.raises(ValueError, match=r'of one shape, got \(150, 3, 16, 20\) and \(1, 3'):
            metric(x, y[:1], data_range=1)
    with pytest.raises(ValueError, match='11 x 11'):
        metrics.ssim(x[..., :10], y[..., :10], data_range=1)


@pytest.mark.parametrize(('tile', 'block'), [(256, 32), (256, 12), (256, 11), (12, 32), (11, 32)])
def test_ssim_by_brute_force(monkeypatch, tile, block):
    """One 13 x 13 image, whole, in blocks and in tiles, by loops over windows and pixels."""
    monkeypatch.setattr(metrics, 'TILE', tile)
    monkeypatch.setattr(metrics, 'BLOCK', block)
    rng = np.random.default_rng(0)
    x, y = rng.random((2, 13, 13))
    k = [[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / (2 * 1.5**2)) for j in range(11)]
         for i in range(11)]
    total, values = sum(map(sum, k)), []
    for top in range(3):
        for left in range(3):
            m = {'x': 0.0, 'y': 0.0, 'xx': 0.0, 'yy': 0.0, 'xy': 0.0}
            for i in range(11):
                for j in range(11):
                    w, p, q = k[i][j] / total, x[top + i, left + j], y[top + i, left + j]
                    for key, v in zip(m, (p, q, p * p, q * q, p * q)):
                        m[key] += w * v
            vx, vy, cxy = m['xx'] - m['x'] ** 2, m['yy'] - m['y'] ** 2, m['xy'] - m['x'] * m['y']
            values.append((2 * m['x'] * m['y'] + 0.01**2) * (2 * cxy + 0.03**2)
                          / ((m['x'] ** 2 + m['y'] ** 2 + 0.01**2) * (vx + vy + 0.03**2)))
    ours = metrics.ssim(*(torch.tensor(i)[None, None] for i in (x, y)), data_range=1)
    assert_close(ours.item(), sum(values) / 9, atol=1e-5, rtol=0)


def test_frechet_distance_closed_forms():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(500, 8, generator=g)
    shift = torch.arange(8.0)
    assert_close(metrics.frechet_distance(a, a + shift), shift.square().sum().item(), rtol=1e-5,
                 atol=0)
    # covariances C and 4 C, one mean: Tr(C + 4 C - 2 * 2 C) = Tr C
    c = a - a.mean(0)
    assert_close(metrics.frechet_distance(c, 2 * c), c.double().var(0).sum().item(), rtol=1e-5,
                 atol=0)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_with_few_samples():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 64, generator=g), torch.randn(5, 64, generator=g)
    value = metrics.frechet_distance(a, b)
    assert math.isfinite(value) and value >= 0
    assert value == pytest.approx(metrics.frechet_distance(b, a))
    # two samples each: rank-one covariances u uᵀ and v vᵀ, whose root has the trace |u·v|
    u, v = a[0] - a[1], b[0] - b[1]
    expected = (a[:2].mean(0) - b[:2].mean(0)).square().sum() + (u @ u + v @ v) / 2 - (u @ v).abs()
    assert metrics.frechet_distance(a[:2], b[:2]) == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(ValueError, match='two samples'):
        metrics.frechet_distance(a[:1], b)


def test_correlation():
    g = torch.Generator().manual_seed(0)
    one = torch.randn(1, 50, generator=g)
    assert metrics.correlation(one.repeat(5, 1)).item() == pytest.approx(1)
    assert metrics.correlation(torch.cat([one, -2 * one + 3])).item() == pytest.approx(-1)
    assert metrics.correlation(torch.cat([one, -one]), 'abs').item() == pytest.approx(1)
    simplex = torch.eye(6)  # the most unlike that six can be
    assert metrics.correlation(simplex).item() == pytest.approx(-1 / 5)
    assert metrics.correlation(simplex, 'square').item() == pytest.approx(1 / 25)
    v = torch.randn(7, 30, generator=g)
    r = np.corrcoef(v.numpy())
    assert metrics.correlation(v).item() == pytest.approx((r.sum() - 7) / 42, abs=1e-6)
    assert metrics.correlation(torch.ones(4, 3)) == metrics.correlation(one) == 0


# --------------------------------------------------------- network
def test_unet_shapes_and_errors():
    for channels, mults, patch, size in ((16, (1, 2), 2, (32, 48)), (16, (1, 2, 2), 2, (64, 8)),
                                         (8, (2, 3, 7, 12), 1, (64, 8))):
        net = UNet(3, 5, channels, mults, patch=patch, time=True)
        x, t = torch.randn(2, 3, *size), torch.tensor([0, 999])
        out, z = net(x, t, latent=True)
        assert out.shape == (2, 5, *size)
        assert z.shape == (2, channels * mults[-1], size[0] // net.factor, size[1] // net.factor)
        assert torch.equal(net.encode(x, t)[0], z)
    with pytest.raises(ValueError, match='divide by 8, got 20 x 64'):
        net(torch.zeros(1, 3, 20, 64), t)
    with pytest.raises(ValueError, match='t '):
        net(x)
    with pytest.raises(ValueError, match='t '):
        UNet(3, 3, 16)(torch.zeros(1, 3, 16, 16), t)


@pytest.mark.parametrize('size, expected', [
    (32, [2_053_744, 1_823_060, 527_530]), (64, [2_858_352, 2_759_252, 729_130])])
def test_the_networks_have_the_sizes_that_are_told(size, expected):
    """f, the DDPM's and g: every level, width and embedding counts. The coarsest maps are 4 x 4."""
    run = sud2.Setup(sud2.parse(['--device', 'cpu', '--size', str(size)]))
    nets = [run.net(0, **kind) for kind in ({'residual': True}, {'time': True},
                                            {'images': 2, 'shrink': 2})]
    assert [sum(p.numel() for p in net.parameters()) for net in nets] == expected
    assert [size // net.factor for net in nets] == [4, 4, 4]
    assert sum(p.numel() for p in UNet(3, 3, time=True).parameters()) == 1_823_060


def test_time_embedding_and_groups_by_hand():
    """Frequencies 1 and 0.01 for four numbers; groups of at least 16, as equal as can be."""
    expected = [f(v) for f in (math.sin, math.cos) for v in (100, 1)]
    assert_close(unet.time_embedding(torch.tensor([100]), 4)[0], torch.tensor(expected))
    assert [unet.groups(n, 16) for n in (8, 24, 32, 40, 48, 64)] == [1, 1, 2, 2, 3, 4]


def test_unet_block_by_hand():
    """Both convolutions and the scale of time known: what enters the last SiLU is, too."""
    block, h = unet.Block(32, time_dim=4), torch.randn(2, 32, 4, 4)
    assert block.norm1.num_groups == 2 and torch.equal(block(h, torch.zeros(2, 4)), h)
    for p in (block.conv1.weight, block.conv1.bias, block.film.weight, block.film.bias):
        torch.nn.init.zeros_(p)                             # norm2 of a constant is its bias
    torch.nn.init.constant_(block.norm2.bias, 0.7)
    torch.nn.init.dirac_(block.conv2.weight)
    block.film.weight.data[:32, 0], block.film.weight.data[32:, 1] = 0.2, -0.3
    r = 0.7 * torch.tensor([1.2, 0.6]) - torch.tensor([0.3, 0.9])
    expected = h + (r / (1 + torch.exp(-r))).view(2, 1, 1, 1)
    assert_close(block(h, torch.tensor([[1., 1, 0, 0], [-2, 3, 0, 0]])), expected)


def test_unet_attention_by_hand():
    """Without queries every position looks at all alike: the mean of the values."""
    attention, h = unet.Attention(128), 3 * torch.randn(2, 128, 3, 2) + 1
    assert attention.heads == 4 and torch.equal(attention(h), h)
    torch.nn.init.zeros_(attention.qkv.weight)
    torch.nn.init.zeros_(attention.qkv.bias)
    attention.qkv.weight.data[256:] = 2 * torch.eye(128)[:, :, None, None]
    attention.out.weight.data = torch.eye(128)[:, :, None, None]
    like = h.view(2, 8, 16 * 6)                             # groups of 16 channels
    like = (like - like.mean(2, keepdim=True)) / like.std(2, keepdim=True, correction=0)
    mean = like.view(2, 128, 6).mean(2)[:, :, None, None]
    assert_close(attention(h), h + 2 * mean, atol=1e-4, rtol=1e-4)


def test_unet_starts_without_a_grid():
    net = UNet(3, 3, 16, (1, 2, 2), patch=2)
    h = torch.randn(2, 32, 4, 4)
    larger = torch.nn.functional.pixel_shuffle(net.widen(h[:, :16]), 2)
    for u in (larger, *(up(h) for up in net.up)):
        assert_close(u, u[:, :, ::2, ::2].repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_unet_adds_its_skips():
    """Where nothing comes up from the coarser levels it is the network without them."""
    net, small = UNet(3, 3, 16, (1, 2, 2)), UNet(3, 3, 16, (1,))
    for p in (net.head.weight, net.encoder[0].conv2.weight, net.decoder[0].conv2.weight):
        torch.nn.init.normal_(p, std=0.1)
    torch.nn.init.zeros_(net.up[0].weight)
    torch.nn.init.zeros_(net.up[0].bias)
    small.load_state_dict({k: v for k, v in net.state_dict().items() if k in small.state_dict()
                           and not k.startswith(('middle', 'attention'))}, strict=False)
    x = torch.randn(2, 3, 16, 16)
    assert_close(net(x), small(x))


def test_unet_residual_starts_as_the_identity_and_takes_bf16():
    net, x = UNet(3, 3, 16, residual=True), torch.randn(2, 3, 16, 16)
    assert torch.equal(net(x), x) and torch.equal(UNet(3, 3, 16)(x), 0 * x)
    torch.nn.init.normal_(net.head.weight, std=0.05)
    out = net(x)
    low = net.bfloat16()(x)
    assert low.dtype == torch.float32
    assert_close(low, out, atol=0.05, rtol=0)


def test_unet_residual_takes_a_share_of_the_change():
    """The head's four channels: a change of 0.5 and the logit, a quarter of it, of its share."""
    net, x = UNet(3, 3, 16, residual=True), torch.randn(2, 3, 16, 16)
    for share in (0.001, 0.2, 0.9):
        net.head.bias.data = torch.tensor([.5, .5, .5, math.log(share / (1 - share)) / 4])
        assert_close(net(x), x + share * .5, atol=1e-6, rtol=1e-5)


def test_unet_uses_time_and_every_weight():
    nets, x = [UNet(3, 3, 16, time=time) for time in (True, False)], torch.randn(2, 3, 16, 16)
    for p in (p for net in nets for p in net.parameters()):
        torch.nn.init.normal_(p, std=0.1)
    out, other = (nets[0](x, torch.tensor([0, t])) for t in (0, 900))
    assert not torch.allclose(out, other)
    (out.square().sum() + nets[1](x).square().sum()).backward()
    assert all(p.grad.abs().sum() > 0 for net in nets for p in net.parameters())


def test_muon_steps_along_all_singular_vectors_alike():
    """Singular values from 0.02 to 1 come near 1, vectors stay; AdamW takes the other weights."""
    torch.manual_seed(1)            # an unlucky square matrix has a singular value near 0
    for r, c in ((12, 40), (40, 12)):
        u, _, vh = torch.linalg.svd(torch.randn(3, r, c), full_matrices=False)
        s = torch.logspace(-1.7, 0, min(r, c)).expand(3, -1)
        x = u.mT @ orthogonalised(u * s[:, None] @ vh) @ vh.mT
        values = x.diagonal(dim1=1, dim2=2)
        assert_close(x, torch.diag_embed(values), atol=1e-4, rtol=0)
        assert values.min() > .65 and values.max() < 1.25
        s = s / s.norm(dim=1, keepdim=True)
        for _ in range(5):                              # of each value by itself
            s = 3.4445 * s - 4.7750 * s ** 3 + 2.0315 * s ** 5
        assert_close(values, s, atol=1e-3, rtol=0)
    net = UNet(3, 3, 16, (1, 2, 2))
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    twin = [torch.nn.Parameter(p.clone()) for p in before.values()]
    opt = Muon(net, 1e-3)
    adam = torch.optim.AdamW(twin, 1e-3, (.9, .95), weight_decay=1e-4)
    for p, q in zip(net.parameters(), twin):
        p.grad, q.grad = (torch.randn_like(p),) * 2
    opt.step()
    adam.step()
    for (n, p), q in zip(net.named_parameters(), twin):
        if p.dim() == 4 and n not in ('stem.weight', 'head.weight'):
            steps = torch.linalg.svdvals((before[n] - p.detach()).flatten(1))
            assert steps.min() > 3e-3 * .3 and steps.max() < 3e-3 * 1.25, n
        else:
            assert_close(p, q, atol=1e-7, rtol=0)


def test_muon_averages_gradients_and_looks_ahead():
    """Nesterov: after gradients a and b along 0.1 b + 0.9 m, where m = 0.9 (0.1 a) + 0.1 b."""
    torch.manual_seed(0)
    net = UNet(3, 3, 16, (1, 2))
    p, (a, b) = net.encoder[0].conv1.weight, torch.randn(2, 16, 16, 3, 3)
    opt = Muon(net, 1e-3)
    for gradient in (a, b):
        before = p.detach().clone()
        for q in net.parameters():
            q.grad = gradient.clone() if q is p else torch.zeros_like(q)
        opt.step()
    ahead = 0.1 * b + 0.9 * (0.9 * 0.1 * a + 0.1 * b)
    step = 3e-3 * orthogonalised(ahead.flatten(1)[None]).view_as(p)
    assert_close(before - p.detach(), step, atol=2e-6, rtol=0)


def test_a_step_is_clipped_and_of_the_learning_rate_given():
    net = torch.nn.Linear(1, 1, bias=False)
    opt = torch.optim.SGD(net.parameters(), 5.0)
    for slope, change in ((1000.0, 0.25), (-0.5, -0.125)):
        before = net.weight.item()
        sud2.descend((slope * net.weight).sum(), net, opt, 0.25)
        assert before - net.weight.item() == pytest.approx(change, abs=1e-5)


# --------------------------------------------------------- data
def test_faces_are_reproducible_and_differ():
    x, hole = data.draw_faces(20, 32, seed=3)
    more, _ = data.draw_faces(300, 32, seed=3)
    assert torch.equal(x, more[:20]) and not torch.equal(x, data.draw_faces(20, 32, seed=4)[0])
    distance = (x[:, None].float() - x[None].float()).abs().mean((2, 3, 4))
    assert distance[~torch.eye(20, dtype=torch.bool)].min() > 8
    area = hole.float().mean((1, 2, 3))
    assert area.min() > 0.08 and area.max() < 0.45 and area.std() > 0.01


def test_the_drawn_images_are_those_behind_the_results():
    """Mean colour, deviation and slopes of 512 pictures: any other brush stroke moves them."""
    (faces, hole), (scenes, hazy) = (pictures(512, 32, seed=0) for pictures in (
        data.draw_faces, data.draw_scenes))
    seen = [[*u.mean((0, 2, 3)), u.std(), *(u.diff(dim=d).abs().mean() for d in (2, 3))]
            for u in (faces.double(), scenes.double(), hazy.double())]
    expected = [[124.2173, 112.4559, 105.3519, 58.2315, 11.1835, 11.8282],
                [111.2666, 117.3940, 99.0095, 54.0865, 11.4257, 9.9381],
                [160.5046, 159.7817, 143.9252, 46.4708, 6.6342, 6.5561]]
    assert_close(torch.tensor(seen).float(), torch.tensor(expected), atol=2e-3, rtol=0)
    assert_close(hole.float().mean().item(), 0.23377, atol=2e-5, rtol=0)


@pytest.mark.parametrize('size', [64, 256])
def test_a_face_looks_the_same_at_any_size(size):
    small, _ = data.draw_faces(4, 32, seed=0)
    large, hole = data.draw_faces(4, size, seed=0)
    reduced = torch.nn.functional.avg_pool2d(large.float(), size // 32)
    assert (reduced - small.float()).abs().mean() < 6
    assert hole.shape == (4, 1, size, size)


def test_the_hole_hides_the_face_and_nothing_else():
    x, hole = data.draw_faces(8, 32, seed=0)
    y = data.punch_hole(x, hole)
    inside = hole.expand_as(x)
    assert (y[inside] == 128).all() and torch.equal(y[~inside], x[~inside])


def test_embedded_split_is_disjoint_and_keeps_images_and_test_over_seeds():
    sizes = dict(size=16, pairs=3, measurements=5, clean=6, test=4)
    a, b = (data.embedded('inpaint', **sizes, seed=s) for s in (0, 1))
    assert torch.equal(a.images, b.images) and torch.equal(a.test_y, b.test_y)
    assert not torch.equal(a.pairs_x, b.pairs_x)
    c = data.embedded('inpaint', **sizes, seed=0, validation=4)
    assert torch.equal(a.pairs_y, c.pairs_y) and not torch.equal(a.test_x, c.test_x)
    everything = torch.cat([a.pairs_x, a.measurements_x, a.images, a.test_x, c.test_x]).flatten(1)
    assert len(everything) == len(everything.unique(dim=0)) == 3 + 5 + 6 + 4 + 4
    assert torch.equal(a.measurements[a.measurements != 128],
                       a.measurements_x[a.measurements != 128])
    d = data.embedded('dehaze', **sizes, seed=0)
    for split, pictures in (a, data.draw_faces), (d, data.draw_scenes):
        assert torch.equal(split.images, pictures(6, 16, seed=0)[0]), 'the clean side'
        assert torch.equal(split.test_x, pictures(4, 16, seed=1)[0])
    assert torch.equal(d.test_y, data.draw_scenes(4, 16, seed=1)[1])


def test_bytes_and_floats():
    u = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(data.to_bytes(data.to_float(u)), u)
    assert data.to_float(u).min() == -1 and data.to_float(u).max() == 1
    assert data.to_bytes(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_pictures_are_read_upright_in_8_bits_and_centred(tmp_path):
    Image.fromarray(np.array([[0, 257, 65535]], np.uint16)).save(tmp_path / '16.png')
    assert np.array(data.open_image(tmp_path / '16.png')).tolist() == [[0, 1, 255]]
    ranges = (np.uint16, 0, 4095), (np.int32, -1, 9000), (np.int32, 0, 65536), (np.float32, 0, 1)
    for k, (kind, *ends) in enumerate(ranges):          # as 8 bits these would be nearly black
        Image.fromarray(np.array([ends], kind)).save(tmp_path / f'{k}.tif')
        with pytest.raises(ValueError, match=f'{k}.tif: .*{ends[0]} to {ends[1]} are not 16-bit'):
            data.open_image(tmp_path / f'{k}.tif', 'RGB')
    page = Image.new('L', (4, 4))
    page.save(tmp_path / 'stack.tif', save_all=True, append_images=[page])
    with pytest.raises(ValueError, match='stack.tif: .*2 pages; save each as a picture'):
        data.open_image(tmp_path / 'stack.tif')
    for shape in ((4, 10), (10, 4)):
        wide = np.zeros((*shape, 3), np.uint8)
        i, j = ((n - 4) // 2 for n in shape)
        wide[i:i + 4, j:j + 4] = np.arange(48).reshape(4, 4, 3)
        Image.fromarray(wide).save(tmp_path / 'wide.png')
        square = np.arange(48).reshape(2, 2, 2, 2, 3).mean((1, 3))
        assert abs(data.read_square(tmp_path / 'wide.png', 2) - square).max() <= .5


@pytest.fixture
def celeba(tmp_path):
    """Ten flat images in CelebAMask-HQ's layout, the k-th of grey 20 k; left half skin, a nose."""
    root = tmp_path / 'CelebA'
    (root / 'CelebA-HQ-img').mkdir(parents=True)
    for k, i in enumerate([*range(9), 2000]):           # two thousand masks a folder
        masks = root / 'CelebAMask-HQ-mask-anno' / str(i // 2000)
        masks.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (64, 64), (20 * k,) * 3).save(root / 'CelebA-HQ-img' / f'{i}.jpg')
        skin = np.zeros((32, 32), np.uint8)
        skin[:, :16] = 255
        nose = np.zeros((32, 32), np.uint8)
        nose[:, 24:] = 255
        Image.fromarray(skin).save(masks / f'{i:05d}_skin.png')
        if i != 3:
            Image.fromarray(nose).save(masks / f'{i:05d}_nose.png')
        Image.fromarray(skin.T.copy()).save(masks / f'{i:05d}_hair.png')
    return root


def test_celeba_layout(celeba, tmp_path):
    sizes = dict(size=16, pairs=2, measurements=3, test=3, seed=0)
    s = data.celeba_mask_hq(celeba, clean=1, validation=1, **sizes)
    greys = torch.cat([s.pairs_x, s.measurements_x, s.images, s.test_x])[:, 0, 0, 0]
    assert len(greys.unique()) == 2 + 3 + 1 + 1, 'no image may stand on two sides'
    more = picture(tmp_path / 'more' / '1.png', seed=1)
    tested = data.celeba_mask_hq(celeba, clean=2, images=tmp_path / 'more', **sizes)
    assert not set(tested.test_x[:, 0, 0, 0].tolist()) & set(greys.tolist())
    assert [round(v / 20) for v in tested.test_x[:, 0, 0, 0].tolist()] == [4, 6, 2], 'always these'
    assert len(tested.images) == 2
    assert (tested.images[1].permute(1, 2, 0).numpy() == data.read_square(more, 16)).all()
    assert s.measurements.shape == (3, 3, 16, 16)
    for x, y in zip(torch.cat([s.pairs_x, s.measurements_x, s.test_x, tested.test_x]),
                    torch.cat([s.pairs_y, s.measurements, s.test_y, tested.test_y])):
        assert (y[:, :, :8] == 128).all(), 'the skin is hidden'
        assert torch.equal(y[:, :, 8:12], x[:, :, 8:12]), 'hair and the rest are not'
        assert (y[:, :, 12:] == (x[:, :, 12:] if abs(int(x[0, 0, 0]) - 60) < 3 else 128)).all()


def test_images_are_decoded_once_into_a_file_and_changes_are_noticed(tmp_path, monkeypatch,
                                                                     capsys):
    files = [picture(tmp_path / f'{k}.png', seed=k) for k in range(5)]
    plain, cache = data.read_squares(files, 16), tmp_path / 'cache'
    assert torch.equal(data.read_squares(files, 16, cache), plain)
    (kept,) = cache.iterdir()
    written = kept.stat().st_mtime_ns
    assert torch.equal(data.read_squares(files, 16, cache), plain)
    assert [f.stat().st_mtime_ns for f in cache.iterdir()] == [written]
    with monkeypatch.context() as m:                    # the first process of a machine decodes
        away = kept.rename(tmp_path / 'away')
        m.setenv('LOCAL_RANK', '1')
        m.setattr(data, 'decode', None)
        m.setattr(time, 'sleep', lambda seconds: away.rename(kept))
        assert torch.equal(data.read_squares(files, 16, cache), plain)
    picture(files[2], seed=9)
    again = data.read_squares(files, 16, cache)
    assert len(list(cache.iterdir())) == 2 and not torch.equal(again[2], plain[2])
    assert torch.equal(again[[0, 1, 3, 4]], plain[[0, 1, 3, 4]])
    with monkeypatch.context() as m, pytest.raises(ValueError, match='cache: no room for 0 MiB'):
        m.setattr(shutil, 'disk_usage', lambda folder: SimpleNamespace(free=5 * 3 * 16 * 16 - 1))
        data.read_squares(files, 16, tmp_path / 'cache' / 'cache')
    with monkeypatch.context() as m:
        m.setattr(time, 'monotonic', iter(range(0, 1000, 6)).__next__)
        data.read_squares(files, 16)
    said = capsys.readouterr().out.splitlines()
    assert said == [f'{n} of 5 images decoded, {12 * (5 - n)} s left' for n in range(1, 5)]
    files[1].write_bytes(b'broken')
    with pytest.raises(ValueError, match='1.png: not a readable image'):
        data.read_squares(files, 16, cache)
    assert [len(list(cache.glob(end))) for end in ('*.npy', '*.tmp')] == [2, 0], 'no half stays'


def test_each_task_reads_its_own_layout(tmp_path):
    (tmp_path / 'other').mkdir()
    for task, message in (('inpaint', 'not CelebAMask-HQ'), ('dehaze', 'no folder hazy'),
                          ('custom', 'paired/x: no such folder')):
        a = tiny(tmp_path / 'run', '--task', task, '--data', str(tmp_path / 'other'))
        with pytest.raises(ValueError, match=message):
            sud2.load_split(a, 0)


def test_celeba_errors(celeba, tmp_path):
    sizes = dict(size=16, pairs=2, measurements=3, clean=1, test=3, seed=0)
    for half in 'CelebA-HQ-img', 'CelebAMask-HQ-mask-anno':
        (tmp_path / half / half).mkdir(parents=True)
        with pytest.raises(ValueError, match='not CelebAMask-HQ'):
            data.celeba_mask_hq(tmp_path / half, **sizes)
    with pytest.raises(ValueError, match='holds 10 images.*need 57'):
        data.celeba_mask_hq(celeba, **{**sizes, 'clean': 49})
    with pytest.raises(ValueError, match='no such folder'):
        data.celeba_mask_hq(celeba, **sizes, images=tmp_path / 'nowhere')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(ValueError, match='no image in it'):
        data.celeba_mask_hq(celeba, **sizes, images=tmp_path / 'empty')
    (celeba / 'CelebAMask-HQ-mask-anno/0/00099_skin.png').write_bytes(b'')
    with pytest.raises(ValueError, match='00099_skin.png: a mask without an image'):
        data.celeba_mask_hq(celeba, **sizes)
    (celeba / 'CelebAMask-HQ-mask-anno/0/00099_skin.png').unlink()
    for i in range(10):
        (celeba / 'CelebA-HQ-img' / f'{i}.jpg').write_bytes(b'not an image')
    with pytest.raises(ValueError, match=r'\.jpg: not a readable image'):
        data.celeba_mask_hq(celeba, **sizes)


# --------------------------------------------------------- command line
@pytest.mark.parametrize(
    'flags, said',
    [(['--task', 'paint'], "invalid choice: 'paint'"),
     (['--method', 'sud9'], "invalid choice: 'sud9'"),
     (['--pairs', '0'], '--pairs: must be a whole number above 0'),
     (['--measurements', '-3'], '--measurements: must be'),
     (['--lr', 'nan'], '--lr: must be a number above 0'),
     (['--size', '34'], '--size 34: must divide by 8'),
     (['--size', '4'], '--size 4: must be from 16'), (['--t-start', '1000'], '--t-start 1000'),
     (['--r-steps', '52'], '--r-steps 52: at most --t-start + 1 = 51'),
     (['--size', '1040'], '--size 1040: must be from'), (['--width', '20'], '--width 20'),
     (['--seed', '1', '1000000001'], '--seed 1000000001: must be from 0 to 10^9'),
     (['--eta', '1.01'], '--eta 1.01: must be from'), (['--shift', '32'], '--shift 32: must'),
     (['--kl-range', '300', '300'], '--kl-range 300'), (['--points', '401'], '--points 401'),
     (['--kl-range', '20', '1001'], '--kl-range 20 1001: needs 0 <= first < second <= 1000'),
     (['--meth', 'sud'], 'unrecognized arguments'), (['--images', 'x'], '--images: needs --data'),
     (['--task', 'custom'], '--task custom: needs --data DIR with paired/x'),
     (['--task', 'custom', '--data', 'x', '--method', 'oracle'], '--method oracle: needs the true'),
     (['--task', 'custom', '--data', 'x', '--validation', '9'], '--validation: for --task custom'),
     (['--restore', 'x', '--checkpoint', 'x', '--out', 'x', '--dry-run'], '--restore: does'),
     (['--restore', 'x'], '--restore: needs --ch'), (['--checkpoint', 'x'], '--restore: needs'),
     (['--restore', 'x', '--checkpoint', 'x'], '--restore: needs --out DIR'),
     (['--lpips-weights', 'x'], '--lpips-weights: needs two files'),
     (['--lpips-weights', 'download', '--size', '24'], '--size 24: LPIPS needs at least 32')],
)
def test_bad_flags(capsys, flags, said):
    with pytest.raises(SystemExit) as stop:
        sud2.parse(flags)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_flags_at_their_limits_and_what_is_made_of_them():
    def parse(text):
        return sud2.parse(text.split())

    a = parse('--size 1024 --t-start 999 --r-steps 1000 --eta 1 --shift 1023 --points 400 '
              '--kl-range 0 1000 --method sud2 supervised sud2 --seed 1000000000 0 0')
    assert a.method == ['sud2', 'supervised'] and a.seed == [0, 10**9] and a.out == 'runs/inpaint'
    assert parse('--size 32 --method all --lpips-weights x y').method == [*sud2.METHODS]
    assert parse('--size 16').size == 16
    own = parse('--task custom --data x --method all')
    assert own.out == 'runs/custom' and own.method == [m for m in sud2.METHODS if m != 'oracle']
    quick = parse('--quick --updates 90')
    assert (quick.updates, quick.prior_steps) == (90, sud2.QUICK['prior_steps']), 'flags win'


def command(*flags, by=()):
    return subprocess.run([sys.executable, *by, HERE / 'sud2.py', *map(str, flags)],
                          capture_output=True, text=True)


def test_help_answers_before_torch_is_imported(tmp_path):
    """And on a terminal that lacks λ."""
    (tmp_path / 'torch.py').write_text('raise SystemExit("imported torch")')
    r = subprocess.run([sys.executable, HERE / 'sud2.py', '--help'], capture_output=True,
                       encoding='latin-1', env={**os.environ, 'PYTHONPATH': str(tmp_path),
                                                'PYTHONIOENCODING': 'latin-1'})
    assert r.returncode == 0 and '--method' in r.stdout and '?1, weight' in r.stdout


# --------------------------------------------------------- the files themselves
LEAVES = 'unet', 'ddpm', 'data', 'metrics', 'cyclegan'


@job
def leaves(folder):
    """Each copied alone, under another name, prints in its example what it says."""
    code = ("import sys, doctest, importlib\n"
            "sys.path.insert(0, '')\n"
            "for leaf in sys.argv[1:]:\n"
            "    sys.path[0] = leaf\n"
            "    copied = importlib.import_module('copied_' + leaf)\n"
            "    r = doctest.testmod(copied)\n"
            "    print(leaf, r.attempted > 1, r.failed)\n")
    for name in LEAVES:
        (folder / name).mkdir()
        shutil.copy(HERE / f'{name}.py', folder / name / f'copied_{name}.py')
    return subprocess.run([sys.executable, '-I', '-c', code, *LEAVES], capture_output=True,
                          text=True, cwd=folder)


def test_leaves_work_alone(meanwhile):
    for name in LEAVES:
        text = text_of(f'{name}.py')
        assert text.startswith('# SPDX-License-Identifier: MIT\n')
        assert 'Copy freely; imports nothing else' in text.replace('\n', ' ')
    r = meanwhile(leaves)
    assert r.stdout.splitlines() == [f'{name} True 0' for name in LEAVES], r.stdout + r.stderr


def test_equation_index():
    """Each equation tagged in the code stands there once, and README's index names its function."""
    tags = {}
    for name in (*LEAVES, 'sud2'):
        function = None
        for line in text_of(f'{name}.py').splitlines():
            function = (re.match(r'\s*(?:def|class) (\w+)', line) or [None, function])[1]
            for tag in re.findall(r'# (Eq\. \(\d\)|Sec\. 3\.1)', line):
                assert tag not in tags, f'{tag} stands twice'
                tags[tag] = f'`{name}.py`, `{function}`'
    readme = text_of('README.md')
    rows = dict(re.findall(r'^\| (\(\d\)|§3\.1) \|.*?\| (.*?) \|', readme, re.M))
    assert set(rows) == {f'({i})' for i in range(1, 10)} | {'§3.1'}
    for tag, where in tags.items():
        key = '§3.1' if 'Sec' in tag else tag[4:]
        assert rows[key] == where, f'README says {rows[key]} of {key}, the code {where}'
    for key, where in rows.items():
        assert where == 'test only' or any(where == w for w in tags.values())
    deviations = re.findall(r'Dev\. (\d+)', text_of('sud2.py'))
    assert sorted(deviations, key=int) == re.findall(r'^\| (\d+) \|', readme, re.M)
    for test in re.findall(r'`(test_\w+)`', readme):
        assert test in globals(), f'README names {test}, which is not there'


# --------------------------------------------------------- what can go wrong
def start(*flags, **how):
    """Starts the program in a process of its own."""
    return subprocess.Popen([sys.executable, HERE / 'sud2.py', *map(str, flags)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how)


def wait_for(condition, seconds=60):
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds
        time.sleep(0.02)


@job
def stopping(folder):
    """-> how each run ended that was stopped."""
    ended = []
    for number in signal.SIGINT, signal.SIGTERM:
        checkpoint = folder / str(number) / 'prior.pt'
        p = start(*TINY, '--prior-steps', '100000', '--save-every', '0', '--out', checkpoint.parent)
        wait_for(checkpoint.exists)
        p.send_signal(number)
        ended.append((p.communicate(timeout=30)[1], p.returncode, checkpoint))
    return ended


def test_stopping_saves_and_says_how_to_go_on(meanwhile):
    for err, code, checkpoint in meanwhile(stopping):
        assert code == 1 and err.strip().startswith('stopped; this goes on: python')
        saved = torch.load(checkpoint, weights_only=True)
        assert saved['step'] > 0 and 'opt' in saved['parts']


def test_a_run_has_its_folder_alone(tmp_path):
    with sud2.locked(tmp_path), pytest.raises(ValueError, match='another process is at work there'):
        sud2.main(tiny(tmp_path))


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path, monkeypatch):
    """A file is there, or on the way; or it is someone else's."""
    (tmp_path / 'file').touch()
    for name in 'file', 'file/below', 'folder':
        with pytest.raises(ValueError, match=f'--out .*{name}: cannot be .*; use another --out'):
            sud2.main(tiny(tmp_path / name))
        monkeypatch.setattr(Path, 'touch', lambda self: tmp_path.read_bytes())


def test_a_stop_waits_for_the_end_of_an_update_but_not_twice():
    stop = runpy.run_path(str(HERE / 'sud2.py'))['Stop']           # as it is when a run starts

    def acts_at_once():
        with pytest.raises(KeyboardInterrupt):
            stop.handler(signal.SIGINT, None)
    acts_at_once()
    with stop.postponed():
        stop.handler(signal.SIGINT, None)
        assert stop.asked
        acts_at_once()
        stop.asked = False
    acts_at_once()


def test_a_stop_in_one_process_is_one_for_all(monkeypatch):
    monkeypatch.setattr(sud2.Group, 'world', 2)
    for theirs in False, True:
        monkeypatch.setattr(torch.distributed, 'all_gather_object',
                            lambda flags, own, theirs=theirs: flags.__setitem__(
                                slice(None), [own, theirs]))
        assert [sud2.Group.any(ours) for ours in (False, True)] == [theirs, True]


def test_windows_has_another_lock_and_tells_no_peak(tmp_path, monkeypatch):
    locks = []
    monkeypatch.setattr(sys, 'platform', 'win32')
    monkeypatch.setitem(sys.modules, 'msvcrt', SimpleNamespace(
        LK_NBLCK=2, locking=lambda file, how, size: locks.append((how, size))))
    with sud2.locked(tmp_path / 'out'):
        assert locks == [(2, 1)] and sud2.peak_mib() is None


@job
def a_full_disk(folder):
    """Files may not grow past some 30 KB, as if the disk were full."""
    limited = ['sh', '-c', 'ulimit -f 60; exec "$@"', 'sh'] if shutil.which('sh') else []
    return limited and subprocess.run([*limited, sys.executable, HERE / 'sud2.py', *TINY, '--out',
                                       folder], capture_output=True, text=True)


def test_a_full_disk_is_told_in_one_line(meanwhile):
    r = meanwhile(a_full_disk) or pytest.skip('needs a shell')
    assert r.returncode == 2 and len(r.stderr.splitlines()) == 1 and 'prior.pt' in r.stderr
    assert not list(Path(r.args[-1]).glob('*.tmp')), 'no half of a file stays'


@pytest.mark.parametrize('error', [MemoryError(), RuntimeError("can't allocate memory"),
                                   torch.OutOfMemoryError('CUDA out of memory.'),
                                   RuntimeError('an illegal memory access')])
def test_too_little_memory_is_told(tmp_path, monkeypatch, error):
    """And no other error is taken for it."""
    def train(*_):
        raise error
    monkeypatch.setattr(sud2, 'train', train)
    illegal = 'illegal' in str(error)
    with pytest.raises(RuntimeError if illegal else ValueError,
                       match='illegal' if illegal else 'no memory; use a smaller --batch'):
        sud2.main(tiny(tmp_path))


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(tmp_path, monkeypatch):
    original, calls = sud2.paired_loss, []

    def breaks(x_hat, x):
        calls.append(1)
        return original(x_hat, x) * (math.nan if len(calls) > 2 else 1)

    monkeypatch.setattr(sud2, 'paired_loss', breaks)
    with pytest.raises(ValueError, match='supervised-s0: the loss is not finite after 3 updates'):
        sud2.main(tiny(tmp_path, '--method', 'supervised', '--save-every', '0'))
    saved = torch.load(tmp_path / 'supervised-s0.pt', weights_only=True)
    assert saved['step'] == 2
    assert all(v.isfinite().all() for v in saved['parts']['f'].values())


def test_a_torn_log_line_is_left_behind(tmp_path):
    (tmp_path / 'log.jsonl').write_text('{"part": "prior", "st')
    sud2.main(tiny(tmp_path, '--method', 'supervised'))
    lines = (tmp_path / 'log.jsonl').read_text().splitlines()
    assert lines[0] == '{"part": "prior", "st' and all(json.loads(line) for line in lines[1:])


def test_changed_data_is_noticed(folders, tmp_path, monkeypatch):
    """Also behind a link; not what is no picture. What comes while a run has its data in memory
    does not stop it."""
    flags = tiny(tmp_path / 'run', '--task', 'custom', '--data', str(folders), '--method', 'sud2')
    (folders / 'images').rename(tmp_path / 'elsewhere')
    (folders / 'images').symlink_to(tmp_path / 'elsewhere')
    train = sud2.train
    monkeypatch.setattr(sud2, 'train', lambda *what: (
        picture(tmp_path / 'elsewhere' / 'new.png') and train(*what)))
    sud2.main(flags)
    assert (tmp_path / 'run' / 'metrics.json').exists()
    with pytest.raises(ValueError, match='not the files that this run began with'):
        sud2.main(flags)
    (tmp_path / 'elsewhere' / 'new.png').unlink()
    (folders / '.DS_Store').write_text('what a file browser leaves')
    sud2.main(flags)


def test_fuzzed_command_lines(capsys):
    """Exit code 2 and one line of error, or a namespace: never anything else."""
    rng = random.Random(0)
    flags = re.findall(r'--[a-z0-9-]+', sud2.command_line().format_help())
    flags = sorted(set(flags) - {'--help'})
    words = ['-1', '0', '1', '3', '16', '1e9', 'nan', 'inf', '', 'x', 'all', 'sud2', 'cyclegan',
             'dehaze', 'é', '--', '0.5', '1e-3', '../..', '\n', '999', '1000']
    for _ in range(500):
        line = [w for _ in range(rng.randint(1, 5))
                for w in [rng.choice(flags), *rng.choices(words, k=rng.randint(0, 2))]]
        try:
            a = sud2.parse(line)
            assert a.size >= 16 and a.method
        except SystemExit as e:
            assert e.code == 2, line
            error = capsys.readouterr().err.strip().splitlines()
            assert len(error) == 1 and error[0].startswith('sud2.py: error: '), (line, error)


def test_fuzzed_images(tmp_path):
    """Truncated, flipped and odd images are read or refused by name, quickly."""
    rng, good = random.Random(0), []
    for mode, ending in [('RGB', 'png'), ('RGB', 'jpg'), ('RGB', 'webp'), ('L', 'png'),
                         ('P', 'png'), ('1', 'png'), ('CMYK', 'jpg'), ('RGBA', 'png'),
                         ('I;16', 'png'), ('RGB', 'tiff'), ('F', 'tiff'), ('LA', 'png'),
                         ('RGB', 'bmp')]:
        picture_of = Image.new(mode, (19, 23), 1)
        buffer = io.BytesIO()
        picture_of.save(buffer, {'jpg': 'jpeg'}.get(ending, ending))
        good.append((ending, buffer.getvalue()))
    buffer = io.BytesIO()
    frames = [Image.new('RGB', (8, 8), (k, 0, 0)) for k in range(3)]
    frames[0].save(buffer, 'png', save_all=True, append_images=frames[1:])
    good.append(('png', buffer.getvalue()))
    for k in range(500):
        ending, content = rng.choice(good)
        content = bytearray(content)
        for _ in range(rng.randint(0, 3)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        content = content[:rng.choice([0, rng.randrange(len(content)), len(content)])]
        path = tmp_path / f'{k}.{rng.choice([ending, "png", "jpg"])}'
        path.write_bytes(content)
        began = time.monotonic()
        try:
            assert data.open_image(path, 'RGB').mode == 'RGB'
        except ValueError as e:
            assert str(path) in str(e)
        assert time.monotonic() - began < 10


def test_a_file_of_weights_runs_no_code(tmp_path):
    class Code:
        def __reduce__(self):
            return Path.touch, (tmp_path / 'ran',)
    torch.save({'step': 0, 'seconds': 0, 'parts': Code()}, tmp_path / 'evil.pt')
    for read in lambda f: sud2.load(f, {}), lambda f: metrics.lpips_weights(f, f):
        with pytest.raises(ValueError, match='evil.pt: not '):
            read(tmp_path / 'evil.pt')
    assert not (tmp_path / 'ran').exists()


def test_fuzzed_checkpoints_and_configs(finished, tmp_path):
    """A flipped or cut checkpoint or config is refused by name, or works: no other exception."""
    rng = random.Random(0)
    names = ['supervised-s0.pt', 'prior.pt', 'config.json']
    about = {'supervised-s0.pt': {'kind': 'reconstructor'}, 'prior.pt': {'kind': 'prior'}}
    for k in range(200):
        name = names[k % 3]
        content = bytearray((finished / name).read_bytes())
        for _ in range(rng.randint(1, 4)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        end = rng.choice([len(content), rng.randrange(len(content))])
        (tmp_path / name).write_bytes(content[:end])
        try:
            if name == 'config.json':
                sud2.check_config(sud2.Setup(tiny(tmp_path)))
            else:
                sud2.load(tmp_path / name, about[name])
        except ValueError as e:
            assert name in str(e) or str(e).startswith('--'), e


# short steps: long ones make much of rounding
TWENTY = [*TINY, '--prior-steps', '20', '--denoiser-steps', '20', '--updates', '20', '--lr', '3e-4',
          '--prior-lr', '8e-4', '--gan-steps', '2', '--test', '13', '--precision', 'fp32',
          '--method', 'cyclegan', 'sud-te', 'sud2', 'sud2-kl', 'sud2-kl+g']
TORCHRUN = ['-m', 'torch.distributed.run', '--nproc-per-node', '2']


@job
def two_processes_compute(folder):
    """All of it in 2, but for five updates of sud2, after which one process is killed in `killed`,
    with half of a cache -> folder."""
    code = ('import os, signal, sud2, sys\n'
            'original, calls = sud2.descend, []\n'
            'def descend(*what):\n'
            '    calls.append(1)\n'
            '    if len(calls) > 20 + 5:\n'                 # after the prior's 20 steps
            '        os.kill(os.getpid(), signal.SIGKILL)\n'
            '    original(*what)\n'
            'sud2.descend = descend\n'
            'with sud2.locked(sud2.Path(sys.argv[-1])):\n'
            '    open(sys.argv[-1] + "/cache/abc.123.tmp", "w")\n'
            '    sud2.work(sud2.Setup(sud2.parse(sys.argv[1:])), 0)')
    (folder / 'killed/cache').mkdir(parents=True)
    subprocess.run([sys.executable, '-c', code, *TWENTY, '--method', 'sud2', '--save-every', '0',
                    '--out', folder / 'killed'], cwd=HERE, capture_output=True)
    (folder / '2').mkdir()
    shutil.copy(folder / 'killed/sud2-s0.pt', folder / '2')
    r = command(*TWENTY, '--out', folder / '2', by=TORCHRUN)
    assert r.returncode == 0, r.stderr
    return folder


def test_two_processes_compute_what_one_does(meanwhile):
    """20 updates under torchrun with two processes: the same losses and weights, also where one
    process began. That, killed, left no lock, and its half of a cache goes with the next run."""
    tmp_path = meanwhile(two_processes_compute)
    assert torch.load(tmp_path / 'killed/sud2-s0.pt', weights_only=True)['step'] == 5
    (half,) = tmp_path.glob('killed/cache/*.tmp')
    with sud2.locked(tmp_path / 'killed'):
        assert not half.exists()
    sud2.main(sud2.parse([*TWENTY, '--out', str(tmp_path / '1')]))
    for name in ('prior', 'denoiser', 'sud-te-s0', 'sud2-s0', 'sud2-kl-s0', 'sud2-kl+g-s0'):
        ours, theirs = (torch.load(tmp_path / d / f'{name}.pt', weights_only=True)['parts']
                        for d in '12')
        part = 'f' if 'f' in ours else 'ema'
        for k, v in ours[part].items():
            assert_close(v, theirs[part][k], atol=2e-5, rtol=0)
    logs = [[json.loads(line) for line in (tmp_path / d / 'log.jsonl').read_text().splitlines()]
            for d in '12']
    last = [{(v['part'], v['step']): v for v in log} for log in logs]
    for key in last[0].keys() & last[1].keys():
        for name, value in last[0][key].items():
            if name not in ('part', 'corr'):        # whose mean over parts is not the whole's
                assert value == pytest.approx(last[1][key][name], rel=1e-3, abs=1e-5), (key, name)
    scores = [json.loads((tmp_path / d / 'metrics.json').read_text())['methods']['sud2']['0']
              for d in '12']
    assert scores[0]['psnr'] == pytest.approx(scores[1]['psnr'], abs=1e-3)
