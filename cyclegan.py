# SPDX-License-Identifier: MIT
"""CycleGAN (Zhu et al. 2017), from sud2. Copy freely; imports nothing else from this project.

Learns measurement y <-> clean image x from unpaired images, float `(B, C, H, W)` in [-1, 1].

    >>> gan = CycleGAN(3, *sizes(32))
    >>> y, x = torch.zeros(2, 3, 32, 32), torch.ones(2, 3, 32, 32)
    >>> losses = train_step(gan, *optimisers(gan), y, x, torch.Generator())
    >>> sorted(losses), gan.to_x(y).shape[1:], sum(p.numel() for p in gan.to_x.parameters())
    (['adversarial', 'cycle', 'discriminator', 'identity'], torch.Size([3, 32, 32]), 1374723)

The losses are the paper's: least squares for the adversarial term (LSGAN), L1 with weight 10 for
the cycles and 5 for the identity, a pool of 50 former outputs for the discriminators.
"""
import torch
from torch import nn
from torch.nn.functional import l1_loss


def sizes(size):
    """(width, blocks, layers) for images of size x size: the original's from 256 on."""
    if size >= 256:
        return 64, 9, 3
    return (64, 6, 3) if size >= 128 else (32, 4, 2)


class Residual(nn.Module):
    """Two reflected 3x3 convolutions around the identity: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, padding_mode='reflect'),
            nn.InstanceNorm2d(channels), nn.ReLU(True),
            nn.Conv2d(channels, channels, 3, padding=1, padding_mode='reflect'),
            nn.InstanceNorm2d(channels))

    def forward(self, h):
        return h + self.body(h)


class Generator(nn.Module):
    """(B, C, H, W) -> (B, C, H, W) in [-1, 1]; H and W must divide by 4.

    11.378 M parameters with 3 channels, width 64 and 9 blocks, as in the original.
    """

    factor = 4                                          # that height and width must divide by

    def __init__(self, channels=3, width=64, blocks=9):
        super().__init__()
        w = width

        def layer(conv):
            return [conv, nn.InstanceNorm2d(conv.out_channels), nn.ReLU(True)]
        self.encoder = nn.Sequential(
            *layer(nn.Conv2d(channels, w, 7, padding=3, padding_mode='reflect')),
            *layer(nn.Conv2d(w, 2 * w, 3, stride=2, padding=1)),
            *layer(nn.Conv2d(2 * w, 4 * w, 3, stride=2, padding=1)),
            *[Residual(4 * w) for _ in range(blocks)])
        up = dict(stride=2, padding=1, output_padding=1)
        self.decoder = nn.Sequential(
            *layer(nn.ConvTranspose2d(4 * w, 2 * w, 3, **up)),
            *layer(nn.ConvTranspose2d(2 * w, w, 3, **up)),
            nn.Conv2d(w, channels, 7, padding=3, padding_mode='reflect'), nn.Tanh())

    def forward(self, x, latent=False):
        """-> the translated images; with latent=True also the last block's output."""
        z = self.encoder(x)
        return (self.decoder(z), z) if latent else self.decoder(z)


def discriminator(channels=3, width=64, layers=3):
    """PatchGAN: (B, C, H, W) -> (B, 1, h, w), near 1 where a patch looks real.

    3 layers see patches of 70 x 70 and have 2.765 M parameters, 2 layers 34 x 34.
    """
    net = [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.LeakyReLU(.2, True)]
    for i in range(1, layers + 1):
        a, b = width * 2 ** (i - 1), width * 2 ** i
        net += [nn.Conv2d(a, b, 4, stride=2 if i < layers else 1, padding=1),
                nn.InstanceNorm2d(b), nn.LeakyReLU(.2, True)]
    return nn.Sequential(*net, nn.Conv2d(b, 1, 4, padding=1))


class CycleGAN(nn.Module):
    """Generators to_x: y -> x and to_y: x -> y, discriminators real_x and real_y, image pools."""

    def __init__(self, channels=3, width=64, blocks=9, layers=3):
        super().__init__()
        self.to_x, self.to_y = (Generator(channels, width, blocks) for _ in range(2))
        self.real_x, self.real_y = (discriminator(channels, width, layers) for _ in range(2))
        self.pool_x, self.pool_y = [], []               # former outputs, see pooled
        for m in self.modules():
            if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.normal_(m.weight, 0, .02)
                nn.init.zeros_(m.bias)

    def generators(self):
        return [*self.to_x.parameters(), *self.to_y.parameters()]

    def discriminators(self):
        return [*self.real_x.parameters(), *self.real_y.parameters()]


def pooled(pool, images, generator, size=50):
    """Images (B, ...) as they are or, half of the time once `size` of them are in the pool, an old
    one for a new one -> float32 (B, ...). It keeps a discriminator from following the last outputs
    alone. `pool`, empty at first, becomes [former images, how many]; what goes in and what comes
    out is decided where the images are, so that no GPU waits for it."""
    images, device = images.detach().float(), generator.device if generator else 'cpu'
    if not pool:
        pool += [images.new_zeros(size, *images.shape[1:]), torch.zeros(1, dtype=torch.long)]
    pool[:] = [part.to(images.device) for part in pool]     # a checkpoint's are on the processor
    former, count = pool
    draws = (torch.rand(len(images), generator=generator, device=device) < .5,
             torch.randint(size, (len(images),), generator=generator, device=device))
    out = []
    for image, swap, k in zip(*(v.to(images.device).split(1) for v in (images, *draws))):
        full = count == size
        k = torch.where(full, k, count)
        old = former[k]
        out.append(torch.where(full & swap, old, image))
        former.index_copy_(0, k, torch.where(full & ~swap, old, image))
        count += ~full
    return torch.cat(out)


def gan_loss(verdict, real):
    """LSGAN: mean squared distance of the verdicts to 1 (real) or 0; a scalar."""
    return (verdict.float() - float(real)).square().mean()


def generator_loss(gan, y, x, cycle=10.0, identity=5.0):
    """Adversarial, cycle and identity terms of y, x (B, C, H, W) -> (dict, fake_y, fake_x)."""
    fake_x, fake_y = gan.to_x(y), gan.to_y(x)
    return {'adversarial': gan_loss(gan.real_x(fake_x), True) + gan_loss(gan.real_y(fake_y), True),
            'cycle': cycle * (l1_loss(gan.to_y(fake_x), y) + l1_loss(gan.to_x(fake_y), x)),
            'identity': identity * (l1_loss(gan.to_x(x), x) + l1_loss(gan.to_y(y), y)),
            }, fake_y, fake_x


def discriminator_loss(net, real, fake):
    """Half the sum of the losses on real and on made images (B, C, H, W); a scalar."""
    return .5 * (gan_loss(net(real), True) + gan_loss(net(fake), False))


def optimisers(gan, lr=2e-4):
    """Adam for both generators, and for both discriminators."""
    on_gpu = next(gan.parameters()).is_cuda             # its steps may then be part of a CUDA graph
    return tuple(torch.optim.Adam(p, lr, (.5, .999), capturable=on_gpu)
                 for p in (gan.generators(), gan.discriminators()))


def linear_decay(step, steps):
    """Factor of the learning rate: 1 for the first half, then a line down to 0."""
    return min(1.0, 2 * (1 - step / steps))


def train_step(gan, opt_G, opt_D, y, x, generator=None):
    """One update of the generators, then one of the discriminators -> dict of scalars.

    y, x: unpaired measurements and clean images, (B, C, H, W). generator: draws from the pools.
    """
    for p in gan.discriminators():
        p.requires_grad_(False)
    terms, fake_y, fake_x = generator_loss(gan, y, x)
    opt_G.zero_grad()
    sum(terms.values()).backward()
    opt_G.step()
    for p in gan.discriminators():
        p.requires_grad_(True)
    loss = (discriminator_loss(gan.real_x, x, pooled(gan.pool_x, fake_x, generator))
            + discriminator_loss(gan.real_y, y, pooled(gan.pool_y, fake_y, generator)))
    opt_D.zero_grad()
    loss.backward()
    opt_D.step()
    return {k: v.detach() for k, v in terms.items()} | {'discriminator': loss.detach()}
