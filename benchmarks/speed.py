# SPDX-License-Identifier: MIT
"""Speed beside the peers, in one process, interleaved -> results/bench-SIZE.json and a table.

    pip install -r benchmarks/requirements.txt
    python benchmarks/speed.py [--size 32] [--turns 5]

Three networks of nearly equal size predict noise in 3 x SIZE x SIZE images. Each is measured as it
comes, in fp32 channels-last and, where the processor is faster in it, under bf16 autocast
channels-last, and shown at its fastest; ours as sud2.py uses it, which is the last of these: one
image is what --restore calls, which is f.
"""
import argparse
import copy
import statistics
import subprocess
import sys
import time
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import ddpm  # noqa: E402
import metrics  # noqa: E402
import sud2  # noqa: E402
from unet import UNet  # noqa: E402

PEERS = ('sud2', 'denoising-diffusion-pytorch', 'diffusers')
SETTINGS = ('as it comes', 'fp32', 'bf16')[:2 + sud2.fast_bf16(torch.device('cpu'))]
OURS = SETTINGS[-1]                                 # the last ones channels-last


def network(name, size):
    """-> a module called as net(x_t, t); a larger size has one level more, like ours."""
    torch.manual_seed(0)
    widths = (32, 64, 96) if size <= 32 else (32, 64, 96, 96)
    if name == 'sud2':
        return UNet(3, 3, mults=sud2.multipliers(size)[1], time=True)
    if name == 'diffusers':
        from diffusers import UNet2DModel

        class Sample(UNet2DModel):
            def forward(self, x_t, t):
                return super().forward(x_t, t).sample
        finer = len(widths) - 1
        return Sample(size, 3, 3, block_out_channels=widths, layers_per_block=1, norm_num_groups=8,
                      down_block_types=('DownBlock2D',) * finer + ('AttnDownBlock2D',),
                      up_block_types=('AttnUpBlock2D',) + ('UpBlock2D',) * finer)
    for part in ('torchvision', 'torchvision.transforms', 'torchvision.utils'):
        if part not in sys.modules:             # only its data loading and image grids want it
            stub = types.ModuleType(part)
            stub.__path__, stub.__spec__ = [], ModuleSpec(part, None)
            stub.T = stub.transforms = stub.utils = stub.save_image = stub
            sys.modules[part] = stub
    from denoising_diffusion_pytorch.denoising_diffusion_pytorch import Unet
    return Unet(dim=32, dim_mults=[w // 32 for w in widths])


def reconstructor(size):
    """f as sud2.py makes it."""
    return UNet(3, 3, 64, sud2.multipliers(size)[0], patch=2, residual=True)


def gflop(net, *inputs):
    """Of one call."""
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        net(*inputs)
    return flops.get_total_flops() / 1e9


def jobs(net, size, batch, setting):
    """-> {name: function} of what is timed."""
    acp, g = ddpm.alphas_cumprod(), torch.Generator().manual_seed(0)
    x = 2 * torch.rand(2 * batch, 3, size, size, generator=g) - 1
    t = torch.randint(1000, (2 * batch,), generator=g)
    if isinstance(net, UNet):
        how = torch.contiguous_format if setting == 'as it comes' else torch.channels_last
        f, opt = reconstructor(size).to(memory_format=how), sud2.Muon(net, 1e-4)
    else:
        f, opt = None, torch.optim.AdamW(net.parameters(), 1e-4, fused=True)

    def amp():
        return torch.autocast('cpu', torch.bfloat16, enabled=setting == 'bf16')

    def training():
        with amp():
            loss = ddpm.ddpm_loss(net, x[:batch], t[:batch], ddpm.noise_like(x[:batch], g), acp)
        sud2.descend(loss, net, opt, 1e-4)

    def forward():
        with torch.no_grad(), amp():
            net(x[:batch], t[:batch])

    one = copy.deepcopy(f or net)
    if setting == 'bf16':                               # the weights too, as --restore has them
        one = one.bfloat16()

    def one_image():
        with torch.no_grad(), amp():
            one(x[:1]) if f else one(x[:1], t[:1])

    def reverse():
        with torch.no_grad(), amp():
            ddpm.R_of_F(net, x, 200, acp, steps=10, generator=g)
    return {'training step': training, 'forward': forward, 'R, 10 steps': reverse,
            'one image': one_image}


def ssim_jobs(size):
    """SSIM of 768 images, ours and pytorch-msssim's in chunks of 32."""
    from pytorch_msssim import ssim
    x, y = torch.rand(2, 768, 3, size, size)

    def theirs():
        for a, b in zip(x.split(32), y.split(32)):
            ssim(a, b, data_range=1, size_average=False)
    return {('sud2', 'fp32', 'SSIM'): lambda: metrics.ssim(x, y, data_range=1),
            ('pytorch-msssim', 'fp32', 'SSIM'): theirs}


def peak_mib(name, size, batch):
    """Peak memory of a process that trains the network for three steps."""
    code = (f'import sys; sys.path.insert(0, {str(ROOT / "benchmarks")!r})\n'
            'import speed\n'
            f'net = speed.network({name!r}, {size}).to(memory_format=speed.torch.channels_last)\n'
            f'job = speed.jobs(net, {size}, {batch}, speed.OURS)["training step"]\n'
            'for _ in range(3): job()\n'
            'print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])')
    return float(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                                check=True).stdout.split()[-1]) / 1024


def measure(todo, turns):
    """{key: function} -> {key: median seconds}, interleaved; a turn's first call is not counted,
    but for R, which is many calls."""
    times = {k: [] for k in todo}
    for turn in range(turns):
        for k, job in todo.items():
            once = 'R' in k[2] and turn > 0
            if not once:
                job()
            for _ in range(1 if once else 2):
                began = time.perf_counter()
                job()
                times[k].append(time.perf_counter() - began)
        print(f'turn {turn + 1} of {turns}', flush=True)
    return {k: statistics.median(v) for k, v in times.items()}


def conv_rate(dtype):
    """GFLOP/s of the convolution that sud2 times, best of a few."""
    seconds = min(sud2.conv_seconds(torch.device('cpu'), dtype) for _ in range(5))
    return 2 * 9 * 64 * 64 * 16 * 16 ** 2 / seconds / 1e9


def main():
    p = argparse.ArgumentParser(allow_abbrev=False)
    p.add_argument('--size', type=int, default=32)
    p.add_argument('--turns', type=int, default=5)
    a = p.parse_args()
    batch, todo, rows = 32 if a.size <= 32 else 16, ssim_jobs(a.size), {}
    image, f = torch.zeros(1, 3, a.size, a.size), reconstructor(a.size)
    for n in PEERS:
        for setting in SETTINGS:
            how = torch.contiguous_format if setting == 'as it comes' else torch.channels_last
            net = network(n, a.size).to(memory_format=how)
            todo |= {(n, setting, j): job for j, job in jobs(net, a.size, batch, setting).items()}
        rows[n] = {'parameters': sum(q.numel() for q in net.parameters()),
                   'gflop': gflop(net, image, torch.zeros(1, dtype=torch.long)),
                   'peak_mib': peak_mib(n, a.size, batch)}
    rows['sud2'] |= {'f_parameters': sum(q.numel() for q in f.parameters()),
                     'f_gflop': gflop(f, image)}
    seconds = measure(todo, a.turns)
    limit = {s: conv_rate(torch.bfloat16 if s == 'bf16' else torch.float32) for s in SETTINGS}
    calls = {'training step': 3 * batch, 'forward': batch, 'R, 10 steps': 20 * batch,
             'one image': 1}

    def work(n, j):
        return calls[j] * rows[n].get('f_gflop' if j == 'one image' else 'gflop', rows[n]['gflop'])
    print(f'\n| 3 x {a.size} x {a.size}, batch {batch} | M parameters | GFLOP | '
          + ' | '.join(f'{j}, ms' for j in calls) + ' | R as it comes | peak MiB |\n|---|'
          + '---:|' * 8)
    for n, r in rows.items():
        best = {j: min(SETTINGS, key=lambda s, n=n, j=j: seconds[n, s, j]) for j in calls}
        ours = {j: seconds['sud2', OURS, j] for j in calls}
        r |= {'ms': {s: {j: 1e3 * seconds[n, s, j] for j in calls} for s in SETTINGS},
              'best': best, 'sud2_over_best': {j: ours[j] / seconds[n, best[j], j] for j in calls},
              'of_convolution_limit': {j: work(n, j) / seconds[n, best[j], j] / limit[best[j]]
                                       for j in calls}}
        cells = [f'{1e3 * seconds[n, best[j], j]:.1f} (ours {r["sud2_over_best"][j]:.2f}x, '
                 f'{r["of_convolution_limit"][j]:.0%} of limit)' for j in calls]
        plain = seconds[n, 'as it comes', 'R, 10 steps']
        print(f'| {n} | {r["parameters"] / 1e6:.2f} | {r["gflop"]:.2f} | ' + ' | '.join(cells)
              + f' | {1e3 * plain:.0f} (ours {ours["R, 10 steps"] / plain:.2f}x) '
              f'| {r["peak_mib"]:.0f} |')
    both = {n: 1e3 * seconds[n, 'fp32', 'SSIM'] for n in ('sud2', 'pytorch-msssim')}
    print(f'\nSSIM of 768 images: {both["sud2"]:.0f} ms, pytorch-msssim '
          f'{both["pytorch-msssim"]:.0f} ms ({both["sud2"] / both["pytorch-msssim"]:.2f}x)')
    sud2.write_json(ROOT / 'results' / f'bench-{a.size}.json', {
        'command': 'python benchmarks/speed.py ' + ' '.join(sys.argv[1:]), 'networks': rows,
        'ssim_ms': both, 'convolution_limit_gflops': limit,
        'environment': {'torch': torch.__version__, 'processor': sud2.processor(),
                        'threads': torch.get_num_threads()}})


if __name__ == '__main__':
    main()
