# SPDX-License-Identifier: MIT
"""One small U-Net and the optimiser that trains it fast, from sud2. Copy freely; imports nothing
else from this project.

Images are float `(B, C, H, W)` in [-1, 1]; times t are long `(B,)`, t = 0 is the least noisy step.

    >>> net = UNet(3, 3, channels=32, mults=(1, 2), time=True)
    >>> x_t, t = torch.zeros(2, 3, 32, 32), torch.tensor([0, 999])
    >>> net(x_t, t).shape, sum(p.numel() for p in net.parameters())
    (torch.Size([2, 3, 32, 32]), 395956)

What makes it quick on a processor: few channels at full resolution, or none of it (patch=2), one
block a level each way, skips that are added and not concatenated, attention at the coarsest level
alone, and at least 16 channels a group in GroupNorm, without which it is slow on small
channels-last bf16 maps.
"""
import math

import torch
from torch import nn
from torch.nn import functional as F


def time_embedding(t, dim):
    """Sinusoids of t (B,) at dim / 2 geometric frequencies -> float (B, dim). Vaswani 2017, 3.5."""
    freqs = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t.float()[:, None] * freqs
    return torch.cat([angles.sin(), angles.cos()], 1)


def groups(channels, least):
    """The most equal groups of at least `least` channels; one where there are fewer."""
    return next(n for n in range(max(1, channels // least), 0, -1) if channels % n == 0)


def group_norm(channels):
    """GroupNorm of at least 16 channels a group, for (B, channels, H, W)."""
    return nn.GroupNorm(groups(channels, 16), channels)


class Block(nn.Module):
    """Residual block of two 3x3 convolutions: (B, C, H, W) -> (B, C, H, W).

    A time embedding (B, time_dim), where there is one, scales and shifts between the two.
    """

    def __init__(self, channels, time_dim=0):
        super().__init__()
        self.norm1, self.norm2 = group_norm(channels), group_norm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.film = nn.Linear(time_dim, 2 * channels) if time_dim else None
        nn.init.zeros_(self.conv2.weight)  # the block starts as the identity
        nn.init.zeros_(self.conv2.bias)

    def forward(self, h, emb=None):
        r = self.norm2(self.conv1(F.silu(self.norm1(h))))
        if emb is not None:
            scale, shift = self.film(emb)[:, :, None, None].chunk(2, 1)
            r = torch.addcmul(shift.to(r.dtype), r, 1 + scale.to(r.dtype))
        return self.conv2(F.silu(r)).add_(h)        # in place: one map less to fill


class Attention(nn.Module):
    """Self-attention over all positions, heads of 32 channels or more: (B, C, H, W) -> like it."""

    def __init__(self, channels):
        super().__init__()
        self.heads = groups(channels, 32)
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, h):
        B, C, H, W = h.shape
        qkv = self.qkv(self.norm(h)).flatten(2)                     # (B, 3C, HW)
        q, k, v = qkv.view(B, 3, self.heads, C // self.heads, H * W).transpose(3, 4).unbind(1)
        if torch.is_grad_enabled():         # backwards in bf16, torch's own is 3 times slower here
            a = (q @ k.transpose(2, 3) * (C // self.heads) ** -.5).softmax(3) @ v
        else:                               # makes no (HW)² matrix: large pictures fit
            a = F.scaled_dot_product_attention(q, k, v)             # (B, heads, HW, C / heads)
        return self.out(a.transpose(2, 3).reshape(B, C, H, W)).add_(h)


class UNet(nn.Module):
    """U-Net: (B, in_channels, H, W) -> (B, out_channels, H, W).

    Level i has channels * mults[i] channels at 1 / 2^i of the input's height and width, or with
    patch=2, whose stem makes one pixel of 2 x 2, at half of that; both must divide by
    `factor` = patch * 2^(levels - 1). It has a block on the way down and one on the way up; the
    last has one more and the attention between. With time=True the net takes t (B,), long, as its
    second argument: the noise predictor of a DDPM. With residual=True it gives a change of the
    input and, through a sigmoid, the share of it that each pixel takes: a reconstructor or a
    denoiser starts as the identity, and once a share has closed little moves that pixel.
    """

    def __init__(self, in_channels, out_channels, channels=16, mults=(2, 3, 4, 8), *,
                 patch=1, time=False, residual=False):
        super().__init__()
        widths = [channels * m for m in mults]
        self.residual, self.factor = residual, patch * 2 ** (len(mults) - 1)
        dim = 2 * widths[-1] if time else 0
        self.embed = nn.Sequential(nn.Linear(dim // 4, dim), nn.SiLU(), nn.Linear(dim, dim),
                                   nn.SiLU()) if time else None
        self.stem = nn.Conv2d(in_channels, widths[0], patch + 2, stride=patch, padding=1)
        self.encoder = nn.ModuleList(Block(w, dim) for w in widths)
        self.down = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in zip(widths, widths[1:]))
        self.middle, self.attention = Block(widths[-1], dim), Attention(widths[-1])
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in zip(widths, widths[1:]))
        self.decoder = nn.ModuleList(Block(w, dim) for w in widths)
        self.norm = group_norm(widths[0])
        self.widen = nn.Conv2d(widths[0], 16 * patch ** 2, 3, padding=1)    # 16 at full resolution
        self.shuffle = nn.PixelShuffle(patch) if patch > 1 else nn.Identity()
        self.head = nn.Conv2d(16 + in_channels, out_channels + residual, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        with torch.no_grad():       # the pixels made of one start alike: no grid (ICNR, 2017)
            for up in self.up:
                up.weight.copy_(up.weight[:, :, :1, :1].expand_as(up.weight))
            for p in (self.widen.weight, self.widen.bias):
                p.copy_(p[::patch ** 2].repeat_interleave(patch ** 2, 0))

    def encode(self, x, t=None):
        """-> (z, skips, emb): the latent z (B, C', h, w), one skip a finer level, embedded t."""
        if x.shape[-1] % self.factor or x.shape[-2] % self.factor:
            raise ValueError(f'height and width must divide by {self.factor}, '
                             f'got {x.shape[-2]} x {x.shape[-1]}')
        if (t is None) != (self.embed is None):
            raise ValueError('t (B,) is needed with time=True and not taken without it')
        dtype = self.stem.weight.dtype                  # bf16 weights work on float images
        h, skips, emb = self.stem(x.to(dtype)), [], None
        if t is not None:
            emb = self.embed(time_embedding(t, self.embed[0].in_features).to(dtype))
        for i, block in enumerate(self.encoder):
            h = block(h, emb)
            if i < len(self.down):
                skips.append(h)
                h = self.down[i](h)
        return self.attention(self.middle(h, emb)), skips, emb

    def forward(self, x, t=None, latent=False):
        """-> (B, out_channels, H, W), with latent=True the pair of that and z (B, C', h, w)."""
        z, skips, emb = self.encode(x, t)
        h = z
        for i in reversed(range(len(self.decoder))):
            if i < len(self.up):
                h = self.up[i](h).add_(skips[i])
            h = self.decoder[i](h, emb)
        h = F.silu(self.shuffle(self.widen(F.silu(self.norm(h)))))
        out = self.head(torch.cat([h, x.to(h.dtype)], 1)).to(x.dtype)
        if self.residual:
            change, share = out.split([out.shape[1] - 1, 1], 1)
            out = x + torch.sigmoid(4 * share) * change
        return (out, z) if latent else out


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al. 2024) for the hidden convolutions of a UNet, AdamW for the rest.

    A convolution's averaged gradient, as a matrix (out, in * k * k), is replaced by the nearest
    one whose singular values are all about 1, times 3 lr: directions that the gradient hardly
    shows are learnt as fast as the others. Trains a DDPM in half the steps that AdamW needs.
    """

    def __init__(self, net, lr):
        hidden = {n: p for n, p in net.named_parameters()
                  if p.dim() == 4 and not n.startswith(('stem', 'head'))}
        rest = [p for n, p in net.named_parameters() if n not in hidden]
        super().__init__(rest, lr, betas=(.9, .95), weight_decay=1e-4, fused=True,
                         capturable=True)               # its step may become a CUDA graph
        self.add_param_group({'params': list(hidden.values())})
        for p in hidden.values():                       # AdamW's loading wants a step in each state
            self.state[p] = {'step': torch.zeros(()), 'momentum': torch.zeros_like(p)}

    @torch.no_grad()
    def step(self):
        hidden = self.param_groups[1]['params']
        grads, momenta = ([p.grad for p in hidden], [self.state[p]['momentum'] for p in hidden])
        torch._foreach_lerp_(momenta, grads, .1)
        averaged = torch._foreach_lerp(grads, momenta, .9)              # Nesterov
        rate = hidden[0].new_ones(()) * (3 * self.param_groups[1]['lr'])    # lr may be a tensor
        for shape in dict.fromkeys(p.shape for p in hidden):
            same = [k for k, p in enumerate(hidden) if p.shape == shape]    # one batch of matrices
            us = orthogonalised(torch.stack([averaged[k] for k in same]).flatten(2))
            for k, u in zip(same, us):
                hidden[k].addcmul_(u.reshape(shape), rate, value=-1)
        for p in hidden:
            p.grad = None                                               # nothing left for AdamW
        super().step()


def orthogonalised(m, steps=5):
    """Matrices m (B, r, c) with singular values brought to about 1 (0.7 to 1.2), same vectors.

    Newton and Schulz's iteration x <- (3.4445 + (-4.7750 + 2.0315 a) a) x with a = x xᵀ, whose
    coefficients let small values grow fastest. All factors commute, so only a, (r, r), is iterated.
    """
    if m.shape[1] > m.shape[2]:
        return orthogonalised(m.mT, steps).mT
    m = m / (m.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a = m @ m.mT
    factor = q = newton_schulz(a)
    for _ in range(steps - 1):
        a = q @ a @ q
        q = newton_schulz(a)
        factor = q @ factor
    return factor @ m


def newton_schulz(a):
    """3.4445 - 4.7750 a + 2.0315 a² for matrices a (B, r, r)."""
    q = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
    q.diagonal(dim1=1, dim2=2).add_(3.4445)
    return q
