# SPDX-License-Identifier: MIT
"""Gaussian denoiser and diffusion model, from sud2. Copy freely; imports nothing else from this
project.

Every function takes any callable `eps_model(x_t, t)` that predicts the noise: x_t float
`(B, C, H, W)` (images in [-1, 1] plus noise), t long `(B,)`. Times are 0-based: t = 0 has been
diffused once and is the least noisy step; x_{-1} is the clean image.

    >>> acp = alphas_cumprod()
    >>> x = torch.full((1, 1, 1, 1), 0.5)
    >>> def eps_model(x_t, t):             # ideal for data that is always 0.5
    ...     a = acp[t].view(-1, 1, 1, 1)
    ...     return (x_t - a.sqrt() * 0.5) / (1 - a).sqrt()
    >>> round(R(eps_model, F(x, 300, acp), 300, acp, steps=4).item(), 4)
    0.5

Sources: DDPM (Ho et al. 2020), DDIM (Song et al. 2021), SDEdit (Meng et al. 2022), which is R∘F.
"""
import torch


def alphas_cumprod(T=1000, beta_start=1e-4, beta_end=0.02):
    """Schedule ᾱ_t of DDPM, betas linear in t -> float32 (T,), computed in float64."""
    betas = torch.linspace(beta_start, beta_end, T, dtype=torch.float64)
    return (1 - betas).cumprod(0).float()


def at(acp, t, like):
    """ᾱ_t for t (B,), shaped to broadcast against `like` (B, ...); ᾱ_{-1} = 1."""
    a = torch.where(t < 0, 1.0, acp[t])
    return a.view(-1, *[1] * (like.dim() - 1))


def add_noise(x, t, eps, acp):
    """x_t = sqrt(ᾱ_t) x + sqrt(1 - ᾱ_t) eps, for x (B, ...) in [-1, 1], t (B,). DDPM (4)."""
    a = at(acp, t, x)
    return a.sqrt() * x + (1 - a).sqrt() * eps


def ddpm_loss(eps_model, x, t, eps, acp):
    """Mean squared error of the predicted noise, a scalar. DDPM (14)."""
    return (eps_model(add_noise(x, t, eps, acp), t).float() - eps).square().mean()


def predict_x0(x_t, t, eps_hat, acp, clip=True):
    """Clean estimate x0_hat of x_t (B, ...), clipped to [-1, 1] unless clip=False. DDPM (15)."""
    a = at(acp, t, x_t)
    x0_hat = (x_t - (1 - a).sqrt() * eps_hat) / a.sqrt()
    return x0_hat.clamp(-1, 1) if clip else x0_hat


def strided_times(t_start, steps):
    """`steps` times from t_start down, evenly spaced; a last, implicit one is -1, the clean image.

    t_start + 1 steps visit every t. Errors: steps outside 1 .. t_start + 1.
    """
    if not 1 <= steps <= t_start + 1:
        raise ValueError(f'steps must be in 1 .. t_start + 1 = {t_start + 1}, got {steps}')
    return [round((t_start + 1) * (steps - k) / steps) - 1 for k in range(steps)]


def noise_like(x, generator=None):
    """White noise of x's shape and device, float32, drawn from `generator`."""
    return torch.randn(x.shape, generator=generator, device=x.device)


def F(x, t_start, acp, generator=None):
    """Forward operator: noises x (B, C, H, W) in [-1, 1] to x_t at t = t_start. DDPM (4)."""
    t = torch.full((len(x),), t_start, device=x.device)
    return add_noise(x, t, noise_like(x, generator), acp)


@torch.no_grad()
def R(eps_model, x_t, t_start, acp, *, steps, eta=0.0, clip=True, generator=None):
    """Reverse operator: denoises x_t (B, C, H, W) from t = t_start to a clean image, in `steps`.

    eta = 0 is deterministic (DDIM), eta = 1 ancestral: with every t visited, DDPM with the
    posterior's variance. One step is the minimum-mean-squared-error denoiser at t_start. DDIM (12).
    """
    times = strided_times(t_start, steps)
    for now, then in zip(times, times[1:] + [-1]):
        t = torch.full((len(x_t),), now, device=x_t.device)
        s = torch.full_like(t, then)
        a_t, a_s = at(acp, t, x_t), at(acp, s, x_t)
        x0_hat = predict_x0(x_t, t, eps_model(x_t, t).float(), acp, clip)
        eps_hat = (x_t - a_t.sqrt() * x0_hat) / (1 - a_t).sqrt()    # again: x0_hat was clipped
        std = eta * ((1 - a_t / a_s) * (1 - a_s) / (1 - a_t)).sqrt()  # 0 in the last step
        x_t = a_s.sqrt() * x0_hat + (1 - a_s - std.square()).clamp(min=0).sqrt() * eps_hat
        if eta > 0 and then >= 0:
            x_t = x_t + std * noise_like(x_t, generator)
    return x_t


def R_of_F(eps_model, x, t_start, acp, *, steps, eta=0.0, clip=True, generator=None):
    """R(F(x)): noises x (B, C, H, W) in [-1, 1] to t_start and denoises it again; no gradient."""
    return R(eps_model, F(x, t_start, acp, generator), t_start, acp,
             steps=steps, eta=eta, clip=clip, generator=generator)


def denoiser_loss(denoiser, x, sigma, generator=None):
    """Mean squared error of D_sigma(x + ν) against x (B, C, H, W), ν ~ N(0, sigma² I), a scalar.

    Its minimiser is the MMSE denoiser that Tweedie's formula speaks of.
    """
    return (denoiser(x + sigma * noise_like(x, generator)).float() - x).square().mean()


@torch.no_grad()
def ema_update(averaged, model, decay):
    """averaged <- decay * averaged + (1 - decay) * model, weight by weight, in place."""
    for p, q in zip(averaged.parameters(), model.parameters()):
        p.lerp_(q, 1 - decay)
