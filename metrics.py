# SPDX-License-Identifier: MIT
"""Image metrics, from sud2. Copy freely; imports nothing else from this project.

Images are `(B, C, H, W)` of any float type and range; `data_range` is the width of that range (2
for [-1, 1], 1 for [0, 1], 255 for bytes as floats) and never guessed. One value an image, `(B,)`;
a ValueError where two images differ in shape.

    >>> x = torch.zeros(1, 3, 16, 16)
    >>> round(psnr(x + 0.1, x, data_range=1.0).item(), 4)
    20.0
    >>> round(ssim(x + 0.1, x, data_range=1.0).item(), 4)
    0.0099

Conventions: PSNR per image, then mean (not pooled over the batch). SSIM with an 11x11 Gaussian
window of σ 1.5, K = (0.01, 0.03), population covariance, valid region, mean over channels.
"""
import math

import torch
from torch.nn import functional as F


def check_shapes(x_hat, x):
    """Errors: images of other shapes than (B, C, H, W), both alike; they would be broadcast."""
    if x_hat.shape != x.shape or x.dim() != 4:
        raise ValueError('needs two (B, C, H, W) of one shape, '
                         f'got {tuple(x_hat.shape)} and {tuple(x.shape)}')


def psnr(x_hat, x, *, data_range, mask=None):
    """Peak signal-to-noise ratio in dB, (B,); inf for equal images.

    With mask (B, 1, H, W), bool, over the pixels where it is True; NaN for an empty mask.
    """
    check_shapes(x_hat, x)
    error = (x_hat.float() - x.float()).square()
    if mask is None:
        mse = error.flatten(1).mean(1)
    else:
        m = mask.expand_as(error).flatten(1)
        mse = (error.flatten(1) * m).sum(1) / m.sum(1)
    return 10 * torch.log10(data_range ** 2 / mse)


def gaussian_band(n, device, sigma=1.5, taps=11):
    """(n - 10, n) matrix that blurs a row of n with the window, valid region only."""
    g = torch.exp(-(torch.arange(taps, device=device) - taps // 2) ** 2 / (2 * sigma ** 2))
    band = torch.zeros(n - taps + 1, n, device=device)
    for k in range(taps):
        band.diagonal(k).fill_(g[k] / g.sum())
    return band


TILE = 256      # a larger image's SSIM is taken in tiles of this size,
BLOCK = 32      # and blurred in blocks of so many rows: a wider band is mostly zeros


def blur(x, band):
    """Images (..., H, W) blurred along H, which gets shorter by 10; band: `gaussian_band` of BLOCK.

    Rows, for columns would take longer to put together again.
    """
    parts = []
    for i in range(0, x.shape[-2] - 10, BLOCK - 10):
        part = x[..., i:i + BLOCK, :]
        rows = part.shape[-2]
        parts.append(band[:rows - 10, :rows] @ part)
    return torch.cat(parts, -2) if len(parts) > 1 else parts[0]


def similarity(a, b, band, data_range):
    """SSIM at each place of the valid region, images (B, C, H, W) -> (B, C, H - 10, W - 10)."""
    m_a, m_b = a.mean((2, 3), keepdim=True), b.mean((2, 3), keepdim=True)
    a, b = a - m_a, b - m_b                         # variances of centred images lose no digits
    s = torch.stack([a, b, a * a + b * b, a * b])
    mu_a, mu_b, squares, product = blur(blur(s, band).mT, band).mT.unbind(0)
    cov, var = product - mu_a * mu_b, squares - mu_a * mu_a - mu_b * mu_b
    mu_a, mu_b = mu_a + m_a, mu_b + m_b
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    return ((2 * mu_a * mu_b + c1) * (2 * cov + c2)
            / ((mu_a * mu_a + mu_b * mu_b + c1) * (var + c2)))


def ssim(x_hat, x, *, data_range):
    """Structural similarity, (B,), 1 for equal images. Wang et al. 2004, (13).

    Errors: an image smaller than the 11x11 window. The blur is banded matrix products, on as many
    images at a time as stay in the cache; a large image is cut into tiles.
    """
    check_shapes(x_hat, x)
    H, W = x.shape[-2:]
    if min(H, W) < 11:
        raise ValueError(f'SSIM needs images of at least 11 x 11, got {H} x {W}')
    band, chunk = gaussian_band(BLOCK, x.device), max(1, 2 ** 15 // (H * W))
    places = [(..., slice(i, i + TILE), slice(j, j + TILE))
              for i in range(0, H - 10, TILE - 10) for j in range(0, W - 10, TILE - 10)]
    values = []
    for a, b in zip(x_hat.split(chunk), x.split(chunk)):
        parts = (similarity(a[k].float(), b[k].float(), band, data_range) for k in places)
        values.append(sum(s.flatten(1).sum(1) for s in parts))
    return torch.cat(values) / (x.shape[1] * (H - 10) * (W - 10))


def frechet_distance(features_a, features_b):
    """Fréchet distance of the Gaussians fitted to two feature matrices (N, D), (M, D), a float.

    ‖μa - μb‖² + Tr(Σa + Σb - 2 (Σa Σb)^½), covariances with n - 1. The trace of the root is the
    sum of singular values of Xa Xbᵀ, with X the centred rows over sqrt(n - 1): real, never
    negative, no matrix root, and exact also with fewer samples than dimensions.
    Errors: fewer than two samples on a side.
    """
    a, b = (f.to('cpu', torch.float64) for f in (features_a, features_b))   # Apple's GPUs lack it
    if min(len(a), len(b)) < 2:
        raise ValueError('the Fréchet distance needs at least two samples on each side')
    mean = (a.mean(0) - b.mean(0)).square().sum()
    a, b = ((f - f.mean(0)) / math.sqrt(len(f) - 1) for f in (a, b))
    # with more rows than columns, a square root of the covariance of D rows has the same products
    a, b = (torch.linalg.qr(f, mode='r')[1] if len(f) > f.shape[1] else f for f in (a, b))
    root = torch.linalg.svdvals(a @ b.T).sum()
    return (mean + a.square().sum() + b.square().sum() - 2 * root).clamp(min=0).item()


def correlation(vectors, form='signed'):
    """Mean off-diagonal Pearson correlation of B vectors (B, ...), flattened; a scalar.

    1 when all are alike (collapse), at least -1 / (B - 1). form: the mean is over the values
    ('signed'), their moduli ('abs') or their squares ('square'). A vector without variance counts
    as uncorrelated with every other; one vector alone gives 0. Differentiable.
    """
    v = vectors.flatten(1).float()
    v = v - v.mean(1, keepdim=True)
    v = v / v.norm(dim=1, keepdim=True).clamp(min=1e-12)
    r = v @ v.T                                                     # (B, B)
    r = {'signed': r, 'abs': r.abs(), 'square': r.square()}[form]
    B = len(v)
    return (r.sum() - r.diagonal().sum()) / max(1, B * (B - 1))


ALEXNET = {0: (4, 2), 3: (1, 2), 6: (1, 1), 8: (1, 1), 10: (1, 1)}     # layer: stride, padding


def lpips_weights(alexnet, linear):
    """Weights for `lpips` from the official files: torchvision's AlexNet and LPIPS v0.1's alex.pth.

    Errors: a file that is not there, no checkpoint, or another network's.
    """
    names = {alexnet: [f'features.{k}.{w}' for k in ALEXNET for w in ('weight', 'bias')],
             linear: [f'lin{k}.model.1.weight' for k in range(len(ALEXNET))]}
    weights = {}
    for path, keys in names.items():
        try:
            state = torch.load(path, map_location='cpu', weights_only=True)
            weights |= {k: state[k].float() for k in keys}
        except Exception as e:          # whatever a damaged file does to the reader
            raise ValueError(f'{path}: not a file with the weights {keys[0]} ... {keys[-1]}') from e
    return weights


def lpips(x_hat, x, weights):
    """Learned perceptual distance v0.1, AlexNet, (B,), 0 for equal images. Zhang et al. 2018.

    Images (B, 3, H, W) in [-1, 1], at least 31 x 31; weights from `lpips_weights`.
    """
    check_shapes(x_hat, x)

    def features(h):
        h = (h.float() - h.new_tensor([-.030, -.088, -.188]).view(3, 1, 1)) \
            / h.new_tensor([.458, .448, .450]).view(3, 1, 1)
        for k, (stride, padding) in ALEXNET.items():
            if k in (3, 6):
                h = F.max_pool2d(h, 3, 2)
            w, b = (weights[f'features.{k}.{p}'].to(h.device) for p in ('weight', 'bias'))
            h = F.relu(F.conv2d(h, w, b, stride, padding))
            yield h / (h.square().sum(1, keepdim=True).sqrt() + 1e-10)

    distance = 0
    for k, (a, b) in enumerate(zip(features(x_hat), features(x))):
        w = weights[f'lin{k}.model.1.weight'].to(a.device)
        distance = distance + F.conv2d((a - b).square(), w).mean((1, 2, 3))
    return distance
