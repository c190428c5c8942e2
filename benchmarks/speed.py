# SPDX-License-Identifier: MIT
"""Speed beside the peers, in one process, interleaved -> results/bench-SIZE.json and a table.

    pip install -r benchmarks/requirements.txt
    python benchmarks/speed.py [--size 32] [--turns 5]

Three networks of nearly equal size predict noise in 3 x SIZE x SIZE images. Each is measured in
fp32 and under bf16 autocast, channels-last, and shown at its faster precision; ours as the default
run uses it. Parameters are made equal by 72 channels here (64 by default).
"""
import argparse
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
import sud2  # noqa: E402
from unet import UNet  # noqa: E402

PEERS = ('sud2', 'denoising-diffusion-pytorch', 'diffusers')


def network(name, size):
    """-> a module called as net(x_t, t)."""
    torch.manual_seed(0)
    if name == 'sud2':
        return UNet(3, 3, 72, sud2.multipliers(size), time=True)
    if name == 'diffusers':
        from diffusers import UNet2DModel

        class Sample(UNet2DModel):
            def forward(self, x_t, t):
                return super().forward(x_t, t).sample
        return Sample(size, 3, 3, block_out_channels=(32, 64, 128), layers_per_block=1,
                      norm_num_groups=8,
                      down_block_types=('DownBlock2D', 'DownBlock2D', 'AttnDownBlock2D'),
                      up_block_types=('AttnUpBlock2D', 'UpBlock2D', 'UpBlock2D'))
    for part in ('torchvision', 'torchvision.transforms', 'torchvision.utils'):
        if part not in sys.modules:             # only its data loading and image grids want it
            stub = types.ModuleType(part)
            stub.__path__, stub.__spec__ = [], ModuleSpec(part, None)
            stub.T = stub.transforms = stub.utils = stub.save_image = stub
            sys.modules[part] = stub
    from denoising_diffusion_pytorch.denoising_diffusion_pytorch import Unet
    return Unet(dim=32, dim_mults=(1, 2, 4))


def jobs(net, size, batch, bf16):
    """-> {name: function} of what is timed."""
    acp, g = ddpm.alphas_cumprod(), torch.Generator().manual_seed(0)
    x = 2 * torch.rand(batch, 3, size, size, generator=g) - 1
    many = 2 * torch.rand(2 * batch, 3, size, size, generator=g) - 1
    t = torch.randint(1000, (batch,), generator=g)
    opt = torch.optim.AdamW(net.parameters(), 1e-4, fused=True)

    def amp():
        return torch.autocast('cpu', torch.bfloat16, enabled=bf16)

    def training():
        with amp():
            loss = ddpm.ddpm_loss(net, x, t, ddpm.noise_like(x, g), acp)
        sud2.descend(loss, net, opt, 1e-4)

    def forward():
        with torch.no_grad(), amp():
            net(x, t)

    def reverse():
        with torch.no_grad(), amp():
            ddpm.R_of_F(net, many, 200, acp, steps=10, generator=g)
    return {'training step': training, 'forward': forward, 'R, 10 steps': reverse}


def peak_mib(name, size, batch):
    """Peak memory of a process that trains the network for three steps."""
    code = (f'import sys; sys.path.insert(0, {str(ROOT / "benchmarks")!r})\n'
            'import speed\n'
            f'net = speed.network({name!r}, {size}).to(memory_format=speed.torch.channels_last)\n'
            f'job = speed.jobs(net, {size}, {batch}, {name == "sud2"})["training step"]\n'
            'for _ in range(3): job()\n'
            'print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])')
    return float(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                                check=True).stdout.split()[-1]) / 1024


def main():
    p = argparse.ArgumentParser(allow_abbrev=False)
    p.add_argument('--size', type=int, default=32)
    p.add_argument('--turns', type=int, default=5)
    a = p.parse_args()
    batch = 32 if a.size <= 32 else 16
    nets = {n: network(n, a.size).to(memory_format=torch.channels_last) for n in PEERS}
    todo = {(n, bf16, job): f for n, net in nets.items() for bf16 in (False, True)
            for job, f in jobs(net, a.size, batch, bf16).items()}
    times = {k: [] for k in todo}
    for turn in range(a.turns):
        for k, job in todo.items():
            job()                               # the first call of a turn is not counted
            for _ in range(2):
                began = time.perf_counter()
                job()
                times[k].append(time.perf_counter() - began)
        print(f'turn {turn + 1} of {a.turns}', flush=True)
    median = {k: statistics.median(v) for k, v in times.items()}
    limit = {b: sud2.conv_rate(torch.device('cpu'), torch.bfloat16 if b else torch.float32)
             for b in (False, True)}
    rows, columns = {}, ['training step', 'forward', 'R, 10 steps']
    for n, net in nets.items():
        with FlopCounterMode(display=False) as flops, torch.no_grad():
            net(torch.zeros(1, 3, a.size, a.size), torch.zeros(1, dtype=torch.long))
        gflop = flops.get_total_flops() / 1e9
        best = {job: min((False, True), key=lambda b, n=n, job=job: median[n, b, job])
                for job in columns}
        share = {'training step': 3 * batch, 'forward': batch, 'R, 10 steps': 20 * batch}
        rows[n] = {'parameters': sum(q.numel() for q in net.parameters()), 'gflop': gflop,
                   'peak_mib': peak_mib(n, a.size, batch),
                   'ms': {j: 1e3 * median[n, best[j], j] for j in columns},
                   'ms_fp32': {j: 1e3 * median[n, False, j] for j in columns},
                   'bf16': best,
                   'of_peak': {j: share[j] * gflop / median[n, best[j], j] / limit[best[j]]
                               for j in columns}}
    print(f'\n| 3 x {a.size} x {a.size}, batch {batch} | M parameters | GFLOP | '
          + ' | '.join(f'{j}, ms' for j in columns) + ' | peak MiB |\n|---|' + '---:|' * 6)
    for n, r in rows.items():
        cells = [f'{r["ms"][j]:.0f} (ours {rows["sud2"]["ms"][j] / r["ms"][j]:.2f}x, '
                 f'{r["of_peak"][j]:.0%} of peak)' for j in columns]
        print(f'| {n} | {r["parameters"] / 1e6:.2f} | {r["gflop"]:.2f} | ' + ' | '.join(cells)
              + f' | {r["peak_mib"]:.0f} |')
    sud2.write_json(ROOT / 'results' / f'bench-{a.size}.json', {
        'command': 'python benchmarks/speed.py ' + ' '.join(sys.argv[1:]), 'networks': rows,
        'environment': {'torch': torch.__version__, 'processor': sud2.processor(),
                        'threads': torch.get_num_threads()}})


if __name__ == '__main__':
    main()
